"""The posterior q_xi(z|x,y): which latent explains this solution?

    python factorize.py configs/sorting_discrete.py --posterior=full      # "linear" is the default

Both kinds pool the hidden states of a copy of the base over the record and read K logits off with one linear map.
"linear" freezes that copy. It then cannot express "strategy XOR input", and so cannot hold label swaps: latents that
mean one strategy for some inputs and another one for others, which likelihood alone does not see.
"""
import copy

import torch
import torch.nn as nn
import torch.nn.functional as F

from tasks import PAD


def pool(states, pairs):
    """Hidden states of a record -> one vector: each layer's mean over the y region, and its mean weighted by b_t.

    states: list of L + 1 tensors (B, T, C); pairs: model.Pairs, whose b singles out the tokens where strategies part.
    Returns (B, 2 (L + 1) C).
    """
    h = torch.cat(states, dim=-1)  # (B, T, (L + 1) C)
    t = torch.arange(pairs.ids.shape[1], device=h.device)
    uniform = ((t >= pairs.starts[:, None]) & (pairs.ids != PAD)).float()
    weights = torch.stack((uniform, pairs.b), dim=1)  # (B, 2, T)
    weights = weights / weights.sum(dim=2, keepdim=True).clamp(min=1e-8)
    return (weights @ h).flatten(1)


class Posterior(nn.Module):
    """Backbone initialised from the base, pooling, standardisation, linear head.

    adaptation: "linear" keeps the backbone frozen and trains the head; "full" trains both.
    """

    def __init__(self, base, n_latents, adaptation):
        super().__init__()
        assert adaptation in ("linear", "full"), adaptation
        self.adaptation = adaptation
        self.backbone = copy.deepcopy(base).requires_grad_(adaptation == "full")
        width = 2 * (base.config.n_layer + 1) * base.config.n_embd
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))
        self.head = nn.Linear(width, n_latents)
        nn.init.normal_(self.head.weight, std=width ** -0.5)  # logits of order one: something to start from
        nn.init.zeros_(self.head.bias)

    def features(self, pairs):
        """(B, 2 (L + 1) C) standardised pooled hidden states."""
        with torch.set_grad_enabled(self.adaptation == "full" and torch.is_grad_enabled()):
            return (pool(self.backbone.hidden_states(pairs.ids), pairs) - self.mean) / self.std

    @torch.no_grad()
    def fit_standardisation(self, pairs):
        """Sets mean and std of every pooled feature to those of `pairs`."""
        features = self.features(pairs)
        self.mean += features.mean(dim=0) * self.std
        self.std *= features.std(dim=0) + 1e-6

    def forward(self, pairs):
        """model.Pairs of B records -> log q(z|x,y), (B, K)."""
        return F.log_softmax(self.head(self.features(pairs)), dim=1)
