"""The posterior q_xi(z|x,y), the cells of a continuous z, and the clusters both start from.

    python factorize.py configs/sorting_discrete.py --posterior=full    # trains the backbone, too

Likelihood cannot tell a latent that means one strategy for every x from one that means strategy A
on half of the inputs and B on the other half. Clusters of the base's own responses can, if each
response is described by how it differs from the others to the same x (cluster_responses). They are
the first labels of the posterior, a linear map of a frozen base's states.
[1] Cuturi 2013, arXiv 1306.0895 (Sinkhorn)     [2] Arthur & Vassilvitskii 2007 (k-means++)
"""
import copy
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

import losses
from harness.config import fail
from harness.parallel import map_chunks, seeded, sum_chunks
from losses import balanced_responsibilities, grouped_logsumexp, token_weights
from model import gaussian, in_chunks
from tasks import PAD


# ------------------------------------------------------------- pooled features, and a head
class Posterior(nn.Module):
    """A copy of the base, pooled over y in two ways, standardised, and a linear head: K logits, or
    the mean and the log variance of a Gaussian over z in D dimensions.

    Each hidden state enters as its deviation from the mean state of its bigram (token, next token).
    What is left is context, such as "this number continues the list from the right", and not the
    number. The embedding layer has no such deviation. So L layers of width C are pooled: with equal
    weights, and with the base's surprise b_t as weights. These are F = 2 L C features.
    """

    def __init__(self, base, n_latents, adaptation="linear", z_dim=0):
        super().__init__()
        self.adaptation, self.z_dim = adaptation, z_dim
        self.backbone = copy.deepcopy(base).requires_grad_(adaptation == "full")
        width = base.config.n_layer * base.config.n_embd
        self.register_buffer("bigrams", torch.tensor([-1]))  # sorted ids of those that were seen
        self.register_buffer("bigram_mean", torch.zeros(1, width))  # and the mean state of each
        self.register_buffer("mean", torch.zeros(2 * width))
        self.register_buffer("std", torch.ones(2 * width))
        self.head = nn.Linear(2 * width, 2 * z_dim or n_latents)
        nn.init.normal_(self.head.weight, std=(2 * width) ** -0.5)
        self.cells = Cells(n_latents, z_dim) if z_dim else None

    def load_state_dict(self, state):
        for name in ("bigrams", "bigram_mean"):  # as many as were seen
            setattr(self, name, torch.empty_like(state[name]))
        return super().load_state_dict(state)

    def states(self, pairs):
        """model.Pairs of B -> hidden states (B, T, L C), bigram ids (B, T) and the mask (B, T) of
        <y>, y, </y>, <eos>."""
        h = torch.cat(self.backbone.hidden_states(pairs.ids)[1:], dim=-1)
        t = torch.arange(pairs.ids.shape[1], device=h.device)
        mask = (t >= pairs.starts[:, None] - 1) & (pairs.ids != PAD)
        return h, self.bigram_ids(pairs.ids), mask.to(h.dtype)

    def bigram_ids(self, ids):
        following = F.pad(ids[:, 1:], (0, 1), value=PAD)
        return ids * self.backbone.config.vocab_size + following

    def features(self, pairs):
        """model.Pairs of B -> (B, F): both means over y of the deviations, standardised."""
        with torch.set_grad_enabled(self.adaptation == "full" and torch.is_grad_enabled()):
            h, bigram, mask = self.states(pairs)
            place = torch.searchsorted(self.bigrams, bigram).clamp(max=len(self.bigrams) - 1)
            seen = self.bigrams[place] == bigram  # a bigram that was not seen tells nothing
            deviation = (h - self.bigram_mean[place]) * seen[..., None]
            evenly = mask / mask.sum(dim=1, keepdim=True)
            weights = torch.stack((evenly, token_weights(pairs.b)), dim=1)  # (B, 2, T)
            return ((weights @ deviation).flatten(1) - self.mean) / self.std

    def read(self, features):
        """(B, F) -> log q(z|x,y), (B, K), or mean and log variance (B, D) each."""
        out = self.head(features)
        return gaussian(out) if self.z_dim else F.log_softmax(out, dim=1)

    def forward(self, pairs, features=None):
        """model.Pairs of B -> what `read` says of them. Their features may be known already: those
        of a frozen backbone do not change."""
        return self.read(self.features(pairs) if features is None else features)

    def all_features(self, pairs):
        """`features` of any number of pairs, without gradient, in chunks side by side."""
        return in_chunks(self.features, pairs)

    @torch.no_grad()
    def fit_statistics(self, pairs):
        """Sets the bigram means, then mean and std of the features, to those of N `pairs`; returns
        the features (N, F)."""
        t = torch.arange(pairs.ids.shape[1], device=pairs.ids.device)
        in_y = (t >= pairs.starts[:, None] - 1) & (pairs.ids != PAD)
        self.bigrams = self.bigram_ids(pairs.ids)[in_y].unique()

        @torch.no_grad()
        def sums(rows):
            h, bigram, mask = self.states(pairs.rows(rows))
            h, bigram = h[mask > 0], torch.searchsorted(self.bigrams, bigram[mask > 0])
            total = torch.zeros(len(self.bigrams), h.shape[-1]).index_add_(0, bigram, h)
            return total, bigram.bincount(minlength=len(self.bigrams))

        total, seen = sum_chunks(sums, pairs.by_length(math.ceil(len(pairs.ids) / 64)))
        self.bigram_mean = total / seen[:, None]
        self.mean.zero_()  # features() as they are, not as they were standardised before
        self.std.fill_(1)
        features = in_chunks(self.features, pairs, size=64)
        self.mean.copy_(features.mean(dim=0))
        self.std.copy_(features.std(dim=0) + 1e-6)
        return (features - self.mean) / self.std

    def fit_head(self, features, loss, weight, steps=200, lr=1e-2, weight_decay=0.01):
        """Fits the head to minimise loss(what `read` says of features (N, F)), (N,), weighted by
        `weight` (N,), with a penalty on the squared weights."""
        optimizer = torch.optim.Adam(self.head.parameters(), lr)
        for _ in range(steps):
            total = (weight * loss(self.read(features))).sum() / weight.sum()
            total = total + weight_decay * self.head.weight.square().sum()
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
        self.head.zero_grad()


# ------------------------------------------------------------- a continuous z
class Cells(nn.Module):
    """Divides the space of a continuous z into K cells, in the same way for every x. Each lies
    around the centre of a cluster, and a z ~ N(0, I) is in it about as often as a response of the
    base is in the cluster."""

    def __init__(self, K, D):
        super().__init__()
        self.register_buffer("centres", torch.zeros(K, D))
        self.register_buffer("offset", torch.zeros(K))  # in squared distance

    @torch.no_grad()
    def place(self, share, std):
        """For clusters of these shares (K,), and posteriors of standard deviation `std` around
        their centres. These are the corners of a simplex around the origin of K - 1 dimensions, so
        far out that z has variance 1 in every one of them, if the shares are equal. The offsets are
        what Sinkhorn [1] adds to the scores of draws of N(0, I), in units of squared distance."""
        K, D = self.centres.shape
        simplex = torch.linalg.eigh(torch.ones(K, K))[1][:, :-1]
        self.centres[:, :K - 1] = math.sqrt(K * (1 - std ** 2)) * simplex
        z = torch.randn(2 ** 14, D, generator=seeded(0))
        scores = -torch.cdist(z, self.centres).square() / std ** 2
        shifted = balanced_responsibilities(scores, share.log(), iterations=1000)
        self.offset.copy_(std ** 2 * (shifted - scores)[0])  # up to a constant, the same for all
        if self(self.centres).tolist() != list(range(K)):
            fail("config key 'z_dim': clusters of such unequal shares have no cells of their own "
                 "in a continuous z; discrete latents (z_dim = 0) have")

    def forward(self, z):
        """(N, D) -> (N,): which cell each z is in."""
        return (torch.cdist(z, self.centres).square() - self.offset).argmin(dim=1)

    def sample(self, mean, generator):
        """(N, D) -> (N, D): for every row a z ~ N(0, I) out of the cell that the row is in. All of
        them together are N(0, I), if rows are in cells as often as z are."""
        z = torch.randn(8 * len(mean), mean.shape[1], generator=generator)
        same = self(mean)[:, None] == self(z)  # (N, 8 N)
        same |= ~same.any(dim=1, keepdim=True)  # no draw in a cell: any will do
        return z[torch.multinomial(same.float(), 1, generator=generator)[:, 0]]


# ------------------------------------------------------------- clusters of the base's responses
def start_posterior(q, pairs, x_index, log_prior, generator, restarts, std):
    """Clusters responses of the base and fits the head of q to the clusters. pairs: model.Pairs of
    N, x_index (N,): which input each one answers; log_prior (K,): the clusters' shares; std: of a
    continuous q. Returns the share of restarts that agree on the clusters."""
    first = {}  # a response that came up several times is one response, weighted by its probability
    for i, row in enumerate(zip(x_index.tolist(), map(tuple, pairs.ids.tolist()))):
        first.setdefault(row, i)
    index = torch.tensor(list(first.values()))
    if len(index) < 2 * len(log_prior):
        fail(f"config key 'cluster_inputs': {len(index)} different responses are too few for "
             f"{len(log_prior)} clusters")
    pairs, x_index = pairs.rows(index), x_index[index]
    features, log_p = q.fit_statistics(pairs), -pairs.b.sum(dim=1)
    # the last two layers, pooled with equal weights: earlier ones say more about x than about z
    width = q.backbone.config.n_embd
    evenly = features[:, :features.shape[1] // 2][:, -2 * width:]
    log_r, agreement = cluster_responses(evenly, x_index, log_p, log_prior, generator, restarts)
    weight = log_p.softmax(dim=0)  # an x counts by how much of what the base says to it was sampled
    if not q.z_dim:
        q.fit_head(features, lambda logq: losses.distillation(log_r, logq), weight)
        return agreement

    def distance(gauss):  # of the mean from its cluster's centre, in units of the variance
        mean, log_var = gauss
        squared = (mean - log_r.exp() @ q.cells.centres).square() / log_var.detach().exp()
        return 0.5 * squared.sum(dim=1)

    q.cells.place(weight @ log_r.exp(), std)
    with torch.no_grad():
        K, D = q.cells.centres.shape
        q.head.weight.zero_()
        q.head.bias.zero_()
        # the inverse of model.gaussian: `std` in the K - 1 dimensions of the centres, 1 in others
        q.head.bias[D:D + K - 1] = 5 * math.atanh(2 * math.log(std) / 5)
    q.fit_head(features, distance, weight)
    return agreement


def cluster_responses(features, x_index, log_p, log_prior, generator, restarts, dims=(40, 80, 160)):
    """K clusters of responses that mean the same for every input.

    features (N, F) of distinct responses; x_index (N,): which input each one answers; log_p (N,):
    log p_theta(y|x); log_prior (K,).
    1. Contrast within x: subtract the mean over the responses to the same input, so that x itself
       is gone.
    2. Whiten: principal components, each of unit variance.
    3. Cluster the first 12 to 28 components from a k-means++ start [2], the temperature falling.
       Then go on from these clusters in more and more components (`dims`). Few components find
       clusters, but mix up similar strategies. Many tell them apart, but trap a k-means that starts
       there.
    4. Of all restarts the one with the least scatter in the end counts.
    Returns log r (N, K) and the share of restarts that ended in the same clusters (98% of the
    probability).
    """
    n_inputs, N, K = int(x_index.max()) + 1, len(features), len(log_prior)
    # in the log domain: no probability of a long response is too small to be divided by
    of_x = grouped_logsumexp(log_p[:, None], x_index, n_inputs)[x_index, 0]
    weight = (log_p - of_x).exp().clamp(min=1e-30)  # p(y|x) among the responses to x
    mean = torch.zeros(n_inputs, features.shape[1])
    mean.index_add_(0, x_index, features * weight[:, None])
    centred = features - mean[x_index]
    variance, directions = torch.linalg.eigh(centred.T @ centred / N)  # by rising variance
    n_components = min(dims[-1], features.shape[1], max(N // 8, K))  # more would be noise
    scale = variance.flip(0)[:n_components].clamp(min=1e-8).sqrt()
    u = centred @ directions.flip(1)[:, :n_components] / scale

    def restart(seed):
        generator = seeded(seed)
        few = u[:, :int(torch.randint(12, 29, (1,), generator=generator))]
        centroids = few[torch.randint(N, (1,), generator=generator)]
        while len(centroids) < K:
            distance = torch.cdist(few, centroids).min(dim=1).values.square()
            distance = distance.clamp(min=1e-12)  # all may be the same
            chosen = torch.multinomial(distance, 1, generator=generator)
            centroids = torch.cat((centroids, few[chosen]))
        falling = [4.0 * 0.05 ** (i / 19) for i in range(20)]
        mass, _ = constrained_kmeans(few, centroids, falling, x_index, log_p, weight, log_prior)
        for d in dims:
            centroids = (mass.T @ u[:, :d]) / mass.sum(dim=0)[:, None]
            mass, scatter = constrained_kmeans(u[:, :d], centroids, 4 * [0.2], x_index, log_p,
                                               weight, log_prior)
        return scatter, mass

    seeds = torch.randint(2 ** 62, (restarts,), generator=generator).tolist()
    found = map_chunks(restart, seeds)
    best = min(found, key=lambda scatter_and_mass: scatter_and_mass[0])[1]
    same = [agreement(mass, best, weight) > 0.98 for _, mass in found]
    return (best / weight[:, None]).log(), sum(same) / restarts


def constrained_kmeans(u, centroids, temperatures, x_index, log_p, weight, log_prior):
    """Soft k-means of u (N, d) in which *every input on its own* shares its responses among the
    clusters as the prior says: two different responses to one input cannot hide in one cluster
    while another one stays empty. weight (N,) is p(y|x), scaled to sum to 1 for every x. Returns
    weight times r (N, K) and the scatter within clusters."""
    for temperature in temperatures:
        scores = -torch.cdist(u, centroids).square() / temperature
        log_r = balanced_responsibilities(scores, log_prior, x_index, log_p, iterations=10)
        mass = log_r.exp() * weight[:, None]
        centroids = (mass.T @ u) / mass.sum(dim=0)[:, None]
    return mass, (mass * torch.cdist(u, centroids).square()).sum().item()


def agreement(r, other, weight):
    """Share of the responses, by weight (N,), that lie in the same cluster in both r and other
    (N, K), whatever the clusters are called: each cluster of one goes with the cluster of the
    other that shares most with it, in both directions, so that no two go with the same one."""
    K = r.shape[1]
    a, b = (F.one_hot(each.argmax(dim=1), K).to(weight.dtype) for each in (r, other))
    overlap = (a * weight[:, None]).T @ b  # (K, K)
    shared = min(overlap.max(dim=dim).values.sum().item() for dim in (0, 1))
    return shared / weight.sum().item()
