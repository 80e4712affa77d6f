"""The posterior q_xi(z|x,y), and where it starts: clusters of the base's own responses.

    python factorize.py configs/sorting_discrete.py --posterior=full      # the backbone trains, too

Likelihood cannot tell a latent that means one strategy for every x from one that means strategy A on half of the inputs
and B on the other half. What can is a posterior too simple to say "A here, B there": one linear map of what a frozen
base knows about a solution *beyond its tokens*. That is Posterior; cluster_responses finds its first labels.
[1] Cuturi 2013, arXiv 1306.0895 (Sinkhorn)     [2] Arthur & Vassilvitskii 2007 (k-means++)
[3] Kuhn 1955; Munkres 1957 (Hungarian algorithm)
"""
import copy
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from losses import balanced_responsibilities, grouped_logsumexp, token_weights
from model import gaussian, in_pieces
from parallel import map_pieces, seeded, sum_pieces
from tasks import PAD


class Posterior(nn.Module):
    """A copy of the base, pooled over y in two ways, standardised, and a linear head: K logits, or the mean and the log
    variance of a Gaussian over z in D dimensions.

    Each hidden state enters as its deviation from the mean state of its bigram (token, next token): what is left is
    context, such as "this number continues the list from the right", and not the number. The embedding layer has no
    such deviation, so L layers of width C are pooled: with equal weights, and with the base's surprise b_t as weights,
    which is where strategies part. F = 2 L C features.
    """

    def __init__(self, base, n_latents, adaptation="linear", z_dim=0):
        super().__init__()
        self.adaptation, self.z_dim = adaptation, z_dim
        self.backbone = copy.deepcopy(base).requires_grad_(adaptation == "full")
        width, V = base.config.n_layer * base.config.n_embd, base.config.vocab_size
        self.register_buffer("bigram_mean", torch.zeros(V * V, width))
        self.register_buffer("bigram_seen", torch.zeros(V * V, 1))
        self.register_buffer("mean", torch.zeros(2 * width))
        self.register_buffer("std", torch.ones(2 * width))
        self.head = nn.Linear(2 * width, 2 * z_dim or n_latents)
        if z_dim:
            self.register_buffer("corners", torch.zeros(n_latents, z_dim))  # where the clusters begin
            self.register_buffer("offset", torch.zeros(n_latents))  # of their cells, in squared distance
        nn.init.normal_(self.head.weight, std=(2 * width) ** -0.5)

    def states(self, pairs):
        """model.Pairs -> hidden states (B, T, L C), bigram ids (B, T) and the mask (B, T) of <y>, y, </y>, <eos>."""
        h = torch.cat(self.backbone.hidden_states(pairs.ids)[1:], dim=-1)
        following = F.pad(pairs.ids[:, 1:], (0, 1), value=PAD)
        t = torch.arange(pairs.ids.shape[1], device=h.device)
        mask = (t >= pairs.starts[:, None] - 1) & (pairs.ids != PAD)
        return h, pairs.ids * self.backbone.config.vocab_size + following, mask.float()

    def features(self, pairs):
        """model.Pairs -> (B, F): both means over y of the deviations from the bigram means, standardised."""
        with torch.set_grad_enabled(self.adaptation == "full" and torch.is_grad_enabled()):
            h, bigram, mask = self.states(pairs)
            deviation = (h - self.bigram_mean[bigram]) * self.bigram_seen[bigram]  # an unseen bigram tells nothing
            weights = torch.stack((mask / mask.sum(dim=1, keepdim=True), token_weights(pairs.b)), dim=1)  # (B, 2, T)
            return ((weights @ deviation).flatten(1) - self.mean) / self.std

    @torch.no_grad()
    def fit_statistics(self, pairs, size=64):
        """Sets the bigram means, then mean and std of the pooled features, to those of `pairs`; returns them."""
        @torch.no_grad()
        def sums(rows):
            h, bigram, mask = self.states(pairs.rows(rows))
            h, bigram, mask = (h * mask[..., None]).flatten(0, 1), bigram.flatten(), mask.flatten()[:, None]
            return (torch.zeros_like(self.bigram_mean).index_add_(0, bigram, h),
                    torch.zeros_like(self.bigram_seen).index_add_(0, bigram, mask))

        total, seen = sum_pieces(sums, pairs.by_length(math.ceil(len(pairs.ids) / size)))
        self.bigram_mean.copy_(total / seen.clamp(min=1))
        self.bigram_seen.copy_(seen.clamp(max=1))
        self.mean.zero_()  # features() as they are, not as they were standardised before
        self.std.fill_(1)
        features = in_pieces(self.features, pairs, size=size)
        self.mean.copy_(features.mean(dim=0))
        self.std.copy_(features.std(dim=0) + 1e-6)
        return (features - self.mean) / self.std

    @torch.no_grad()
    def place_corners(self, share, std):
        """Where z is continuous, the start of the posterior: a Gaussian of standard deviation `std` around a corner for
        each cluster, and cells around the corners for clusters of these shares (K,). The K corners are those of a
        simplex around the origin of K - 1 dimensions, so far out that z has variance 1 in every one of them, if the
        shares are equal; further dimensions start at N(0, 1). The cells' offsets are what Sinkhorn adds to the scores
        of draws of N(0, I), back in units of squared distance."""
        K = len(share)
        self.corners[:, :K - 1] = math.sqrt(K * (1 - std ** 2)) * torch.linalg.eigh(torch.ones(K, K))[1][:, :-1]
        z = torch.randn(2 ** 14, self.z_dim, generator=seeded(0))
        scores = -torch.cdist(z, self.corners).square() / std ** 2
        shifted = balanced_responsibilities(scores, share.log(), iterations=1000)
        self.offset.copy_(std ** 2 * (shifted - scores)[0])  # but for a constant, which is the same for every cell
        self.head.weight.zero_()
        self.head.bias.zero_()
        self.head.bias[self.z_dim:self.z_dim + K - 1] = 5 * math.atanh(2 * math.log(std) / 5)

    def fit_head(self, features, log_t, weight, steps=200, lr=1e-2, weight_decay=0.01):
        """Fits the head to clusters exp(log_t) (N, K), weighted by `weight` (N,): penalised cross-entropy. Where z is
        continuous, its mean to the corners of the clusters: penalised squared distance, in units of the variance."""
        optimizer = torch.optim.Adam(self.head.parameters(), lr)
        for _ in range(steps):
            out = self.head(features)
            if self.z_dim:
                mean, log_var = gaussian(out)
                nll = 0.5 * ((mean - log_t.exp() @ self.corners).square() / log_var.detach().exp()).sum(dim=1)
            else:
                nll = -(log_t.exp() * F.log_softmax(out, dim=1)).sum(dim=1)
            loss = (weight * nll).sum() / weight.sum()
            loss = loss + weight_decay * self.head.weight.square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self.head.zero_grad()

    def cell(self, z):
        """(N, D) -> (N,): which of K cells z is in. Each lies around a corner, and a z ~ N(0, I) is in it about as
        often as a response of the base is in the corner's cluster. They divide space in the same way for every x."""
        return (torch.cdist(z, self.corners).square() - self.offset).argmin(dim=1)

    def forward(self, pairs):
        """model.Pairs of B records -> log q(z|x,y), (B, K), or mean and log variance (B, D) each."""
        backbone_learns = self.adaptation == "full" and torch.is_grad_enabled()
        features = self.features(pairs) if backbone_learns else in_pieces(self.features, pairs)
        return gaussian(self.head(features)) if self.z_dim else F.log_softmax(self.head(features), dim=1)


def cluster_responses(features, x_index, log_p, log_prior, generator, restarts, dims=(40, 80, 160)):
    """K clusters of responses that mean the same for every input.

    features (N, F) of distinct responses; x_index (N,): which input each one answers; log_p (N,): log p_theta(y|x).
    1. Contrast within x: subtract the mean over the responses to the same input, so that x itself is gone.
    2. Whiten: principal components, each of unit variance.
    3. Cluster the first 12 to 28 components from a k-means++ start [2], the temperature falling; then go on from these
       clusters in more and more components (`dims`). Few components find clusters, but mix up similar strategies; many
       tell them apart, but trap a k-means that starts there.
    4. Of all restarts the one with the least scatter in the end counts.
    Returns log T (N, K) and the share of restarts that ended in the same clusters (98% of the probability).
    """
    n_inputs, N = int(x_index.max()) + 1, len(features)
    # in the log domain: no probability of a long response is too small to be divided by
    weight = (log_p - grouped_logsumexp(log_p[:, None], x_index, n_inputs)[x_index, 0]).exp().clamp(min=1e-30)
    mean = torch.zeros(n_inputs, features.shape[1]).index_add(0, x_index, features * weight[:, None])
    centred = features - mean[x_index]
    variance, directions = torch.linalg.eigh(centred.T @ centred / N)  # by rising variance
    n_components = min(dims[-1], features.shape[1], max(N // 8, len(log_prior)))  # more would be noise
    u = centred @ directions.flip(1)[:, :n_components] / variance.flip(0)[:n_components].clamp(min=1e-8).sqrt()

    def restart(seed):
        generator = seeded(seed)
        few = u[:, :int(torch.randint(12, 29, (1,), generator=generator))]
        centroids = few[torch.randint(N, (1,), generator=generator)]
        while len(centroids) < len(log_prior):
            distance = torch.cdist(few, centroids).min(dim=1).values.square().clamp(min=1e-12)  # all may be the same
            centroids = torch.cat((centroids, few[torch.multinomial(distance, 1, generator=generator)]))
        falling = [4.0 * 0.05 ** (i / 19) for i in range(20)]
        t, _ = constrained_kmeans(few, centroids, falling, x_index, log_p, weight, log_prior)
        for d in dims:
            centroids = (t.T @ u[:, :d]) / t.sum(dim=0)[:, None]
            t, scatter = constrained_kmeans(u[:, :d], centroids, 4 * [0.2], x_index, log_p, weight, log_prior)
        return scatter, t

    found = map_pieces(restart, torch.randint(2 ** 62, (restarts,), generator=generator).tolist())
    best = min(found, key=lambda scatter_and_t: scatter_and_t[0])[1]

    def overlap(a, b):  # (K, K): probability of the responses that are likeliest in one cluster of a and one of b
        a, b = (F.one_hot(t.argmax(dim=1), len(log_prior)).float() for t in (a, b))
        return (a * weight[:, None]).T @ b

    same = [one_to_one_matching(overlap(t, best))[0] > 0.98 * n_inputs for _, t in found]
    return (best / weight[:, None]).log(), sum(same) / restarts


def constrained_kmeans(u, centroids, temperatures, x_index, log_p, weight, log_prior):
    """Soft k-means of u (N, d) in which *every input on its own* shares its responses among the clusters as the prior
    says: two different responses to one input cannot hide in one cluster while another one stays empty. weight (N,) is
    p(y|x), scaled to sum to 1 for every x. Returns weight times T (N, K) and the scatter within clusters."""
    for temperature in temperatures:
        scores = -torch.cdist(u, centroids).square() / temperature
        t = balanced_responsibilities(scores, log_prior, x_index, log_p, iterations=10).exp() * weight[:, None]
        centroids = (t.T @ u) / t.sum(dim=0)[:, None]
    return t, (t * torch.cdist(u, centroids).square()).sum().item()


def one_to_one_matching(C):
    """C (K, S) -> (score, matching): the largest sum of C[z, matching[z]] over matchings in which no column serves two
    rows; matching[z] is None for a row left over where K > S. Exact: Hungarian algorithm [3], a shortest augmenting
    path for every row, over reduced costs -C[i, j] - row[i] - column[j] >= 0."""
    rows = C.tolist() if C.shape[0] <= C.shape[1] else C.T.tolist()
    n, m = len(rows), len(rows[0])
    row, column = [0.0] * n, [0.0] * (m + 1)  # potentials
    owner = [None] * (m + 1)  # the row that each column serves; column m stands for "not served yet"
    for i in range(n):
        owner[m], j, reached = i, m, set()
        distance, previous = [math.inf] * m, [None] * m
        while owner[j] is not None:
            reached.add(j)
            for k in set(range(m)) - reached:
                reduced = -rows[owner[j]][k] - row[owner[j]] - column[k]
                if reduced < distance[k]:
                    distance[k], previous[k] = reduced, j
            nearest = min(set(range(m)) - reached, key=lambda k: distance[k])
            step = distance[nearest]
            for k in reached:
                row[owner[k]] += step
                column[k] -= step
            distance = [d - step for d in distance]
            j = nearest
        while j != m:  # the path's columns change hands
            owner[j], j = owner[previous[j]], previous[j]
    pairs = [(owner[j], j) for j in range(m) if owner[j] is not None]
    matching = dict(pairs) if C.shape[0] <= C.shape[1] else {j: i for i, j in pairs}
    return sum(rows[i][j] for i, j in pairs), [matching.get(z) for z in range(C.shape[0])]
