"""The posterior q_xi(z|x,y), and where it starts: clusters of the base's own responses.

    python factorize.py configs/sorting_discrete.py --posterior=linear      # "thaw" trains the backbone, too, in the end

Likelihood cannot tell a latent that means one strategy for every x from one that means strategy A on half of the inputs
and B on the other half. What can is a posterior too simple to say "A here, B there": one linear map of what a frozen
base knows about a solution *beyond its tokens*. That is Posterior; cluster_responses finds its first labels.
[1] Cuturi 2013, arXiv 1306.0895 (Sinkhorn)     [2] Arthur & Vassilvitskii 2007 (k-means++)
"""
import copy
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from losses import balanced_responsibilities
from tasks import PAD


class Posterior(nn.Module):
    """A copy of the base, pooled over y, standardised, and a linear head with K logits.

    Each hidden state enters as its deviation from the mean state of its bigram (token, next token): what is left is
    context, such as "this number continues the list from the right", and not the number. The embedding layer has no
    such deviation, so L layers of width C are pooled.
    """

    def __init__(self, base, n_latents, adaptation="linear"):
        super().__init__()
        assert adaptation in ("linear", "full"), adaptation
        self.adaptation = adaptation
        self.backbone = copy.deepcopy(base).requires_grad_(adaptation == "full")
        width, V = base.config.n_layer * base.config.n_embd, base.config.vocab_size
        self.register_buffer("bigram_mean", torch.zeros(V * V, width))
        self.register_buffer("bigram_seen", torch.zeros(V * V, 1))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))
        self.head = nn.Linear(width, n_latents)
        nn.init.normal_(self.head.weight, std=width ** -0.5)

    def states(self, pairs):
        """model.Pairs -> hidden states (B, T, L C), bigram ids (B, T) and the mask (B, T) of <y>, y, </y>, <eos>."""
        h = torch.cat(self.backbone.hidden_states(pairs.ids)[1:], dim=-1)
        following = F.pad(pairs.ids[:, 1:], (0, 1), value=PAD)
        t = torch.arange(pairs.ids.shape[1], device=h.device)
        mask = (t >= pairs.starts[:, None] - 1) & (pairs.ids != PAD)
        return h, pairs.ids * self.backbone.config.vocab_size + following, mask.float()

    def features(self, pairs):
        """model.Pairs -> (B, L C): mean over y of the deviations from the bigram means, standardised."""
        with torch.set_grad_enabled(self.adaptation == "full" and torch.is_grad_enabled()):
            h, bigram, mask = self.states(pairs)
            deviation = (h - self.bigram_mean[bigram]) * self.bigram_seen[bigram]  # an unseen bigram tells nothing
            pooled = (deviation * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
            return (pooled - self.mean) / self.std

    def unfreeze(self):
        """From here on the backbone trains, too; until then it is the base."""
        self.adaptation = "full"
        self.backbone.requires_grad_(True)

    @torch.no_grad()
    def fit_statistics(self, pairs, batch=256):
        """Sets the bigram means, then mean and std of the pooled features, to those of `pairs`. Returns the features."""
        parts = [pairs.rows(slice(i, i + batch)) for i in range(0, len(pairs.ids), batch)]
        for part in parts:
            h, bigram, mask = self.states(part)
            self.bigram_mean.index_add_(0, bigram.flatten(), (h * mask[..., None]).flatten(0, 1))
            self.bigram_seen.index_add_(0, bigram.flatten(), mask.flatten()[:, None])
        self.bigram_mean /= self.bigram_seen.clamp(min=1)
        self.bigram_seen.clamp_(max=1)
        features = torch.cat([self.features(part) for part in parts])
        self.mean.copy_(features.mean(dim=0))
        self.std.copy_(features.std(dim=0) + 1e-6)
        return (features - self.mean) / self.std

    def fit_head(self, features, log_t, steps=200, lr=1e-2, weight_decay=0.01):
        """Fits the head to labels exp(log_t) (N, K) by penalised cross-entropy, full batch."""
        optimizer = torch.optim.Adam(self.head.parameters(), lr)
        for _ in range(steps):
            loss = -(log_t.exp() * F.log_softmax(self.head(features), dim=1)).sum(dim=1).mean()
            loss = loss + weight_decay * self.head.weight.square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self.head.zero_grad()

    def forward(self, pairs):
        """model.Pairs of B records -> log q(z|x,y), (B, K)."""
        return F.log_softmax(self.head(self.features(pairs)), dim=1)


def cluster_responses(features, x_index, log_p, log_prior, generator, dims=24, restarts=24, iterations=40):
    """K clusters of responses that mean the same for every input: k-means under transport constraints.

    features (N, F) of distinct responses; x_index (N,): which input each one answers; log_p (N,): log p_theta(y|x).
    1. Contrast within x: subtract the mean over the responses to the same input, so that x itself is gone.
    2. Whiten: keep the `dims` leading principal directions at unit variance, so that no direction rules by size.
    3. Cluster: distances to K centroids give responsibilities that, *for every input on its own*, share its responses
       (weighted by p(y|x)) among the latents as the prior says; centroids follow; the temperature falls. Two different
       responses to one input thus cannot hide in one cluster while another one stays empty.
    Of all restarts (k-means++ [2]) the one with the least scatter within clusters wins; no label is needed to tell.
    Returns log T (N, K), and that scatter as a share of the total.
    """
    weight = torch.zeros(int(x_index.max()) + 1).index_add(0, x_index, log_p.exp())
    weight = log_p.exp() / weight[x_index]  # p(y|x) over the responses seen for this x
    mean = torch.zeros(int(x_index.max()) + 1, features.shape[1]).index_add(0, x_index, features * weight[:, None])
    centred = features - mean[x_index]
    u = torch.linalg.svd(centred, full_matrices=False).U[:, :dims] * len(features) ** 0.5  # (N, dims), unit variance
    total = (weight * u.square().sum(dim=1)).sum()
    best = (math.inf, None)
    for _ in range(restarts):
        centroids = u[torch.randint(len(u), (1,), generator=generator)]
        while len(centroids) < len(log_prior):
            distance = torch.cdist(u, centroids).min(dim=1).values.square()
            centroids = torch.cat((centroids, u[torch.multinomial(distance, 1, generator=generator)]))
        for i in range(iterations):
            temperature = 4.0 * 0.05 ** (i / (iterations - 1))
            log_t = balanced_responsibilities(-torch.cdist(u, centroids).square() / temperature, log_prior, x_index,
                                              weight.log(), iterations=15)
            t = log_t.exp() * weight[:, None]
            centroids = (t.T @ u) / t.sum(dim=0)[:, None]
        scatter = ((t * torch.cdist(u, centroids).square()).sum() / total).item()
        if scatter < best[0]:
            best = (scatter, log_t)
    return best[1], best[0]
