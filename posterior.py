"""The posterior q_xi(z|x,y), the cells of a continuous z, and the clusters both start from.

    python factorize.py configs/sorting_discrete.py --posterior=full    # trains the backbone, too

Likelihood cannot tell a latent that means one strategy for every x from one that means strategy A
on half of the inputs and B on the other half. Clusters of the base's own responses can, if each
response is described by how it differs from the others to the same x (cluster_responses). They are
the first labels of the posterior, a linear map of a frozen base's states.
[1] Cuturi 2013, arXiv 1306.0895 (Sinkhorn)     [2] Hyvärinen 1999 (FastICA)
[3] Frisch & Waugh 1933 (partial regression)
"""
import copy
import itertools
import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

import losses
from harness.config import fail, say
from harness.parallel import map_chunks, seeded, sum_chunks
from model import gaussian, in_chunks
from tasks import PAD


class Posterior(nn.Module):
    """A copy of the base, pooled over y in two ways, standardised, and a linear head: K logits, or
    the mean and the log variance of a Gaussian over z in D dimensions.

    Each hidden state enters as its deviation from the mean state of its bigram (token, next token).
    What is left is context, such as "this number continues the list from the right", and not the
    number. The embedding layer has no such deviation. So L layers of width C are pooled: with equal
    weights, and with the base's surprise b_t as weights. These are F = 2 L C features.
    """

    def __init__(self, base, n_latents=0, adaptation="linear", z_dim=0):
        super().__init__()
        self.adaptation, self.z_dim = adaptation, z_dim
        self.backbone = copy.deepcopy(base).requires_grad_(adaptation == "full")
        width = base.config.n_layer * base.config.n_embd
        self.register_buffer("bigrams", torch.tensor([-1]))  # sorted ids of those that were seen
        self.register_buffer("bigram_mean", torch.zeros(1, width))  # and the mean state of each
        self.register_buffer("mean", torch.zeros(2 * width))
        self.register_buffer("std", torch.ones(2 * width))
        if n_latents:
            self.make_head(n_latents)

    def make_head(self, n_latents):
        """A linear map of small random weights, for K latents or K cells."""
        self.head = nn.Linear(len(self.mean), 2 * self.z_dim or n_latents)
        nn.init.normal_(self.head.weight, std=len(self.mean) ** -0.5)
        self.cells = Cells(n_latents, self.z_dim) if self.z_dim else None

    def load_state_dict(self, state):
        for name in ("bigrams", "bigram_mean"):  # as many as were seen
            setattr(self, name, torch.empty_like(state[name]))
        return super().load_state_dict(state)

    def states(self, pairs):
        """model.Pairs of B -> hidden states (B, T, L C), and what `places` says."""
        h = torch.cat(self.backbone.hidden_states(pairs.ids)[1:], dim=-1)
        return h, *self.places(pairs)

    def places(self, pairs):
        """model.Pairs of B -> bigram ids (B, T) and the mask (B, T) of <y>, y, </y>, <eos>."""
        following = F.pad(pairs.ids[:, 1:], (0, 1), value=PAD)
        t = torch.arange(pairs.ids.shape[1], device=pairs.ids.device)
        mask = (t >= pairs.starts[:, None] - 1) & (pairs.ids != PAD)
        return pairs.ids * self.backbone.config.vocab_size + following, mask

    def features(self, pairs):
        """model.Pairs of B -> (B, F): both means over y of the deviations, standardised."""
        with torch.set_grad_enabled(self.adaptation == "full" and torch.is_grad_enabled()):
            h, bigram, mask = self.states(pairs)
            place = torch.searchsorted(self.bigrams, bigram).clamp(max=len(self.bigrams) - 1)
            seen = self.bigrams[place] == bigram  # a bigram that was not seen tells nothing
            deviation = (h - self.bigram_mean[place]) * seen[..., None]
            evenly = mask / mask.sum(dim=1, keepdim=True)
            weights = torch.stack((evenly, losses.token_weights(pairs.b)), dim=1)  # (B, 2, T)
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
        bigram, mask = self.places(pairs)
        self.bigrams = bigram[mask].unique()

        @torch.no_grad()
        def sums(rows):
            h, bigram, mask = self.states(pairs.rows(rows))
            h, bigram = h[mask], torch.searchsorted(self.bigrams, bigram[mask])
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


class Cells(nn.Module):
    """Divides the space of a continuous z into K cells, in the same way for every x. Each lies
    around the centre of a cluster, and a z ~ N(0, I) is in it about as often as a response of the
    base is in the cluster."""

    def __init__(self, K, D):
        super().__init__()
        self.register_buffer("centres", torch.zeros(K, D))
        self.register_buffer("offset", torch.zeros(K))  # in squared distance

    def place(self, share, std):
        """For clusters of these shares (K,), and posteriors of standard deviation `std` around
        their centres. These are the corners of a simplex around the origin of K - 1 dimensions, so
        far out that z has variance 1 in every one of them, if the shares are equal. The offsets, in
        units of squared distance, are potentials of optimal transport [1] from draws of N(0, I): at
        the minimum of its dual, cells have the clusters' shares."""
        K, D = self.centres.shape
        if D < K - 1:
            fail(f"config key 'z_dim': {K} clusters need at least {K - 1} dimensions, got {D}")
        simplex = torch.linalg.eigh(torch.ones(K, K))[1][:, :-1]
        self.centres[:, :K - 1] = math.sqrt(K * (1 - std ** 2)) * simplex
        z = torch.randn(2 ** 14, D, generator=seeded(0))
        scores = -torch.cdist(z, self.centres).square() / std ** 2
        potential = torch.zeros(K, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [potential], max_iter=100, tolerance_change=0, line_search_fn="strong_wolfe")

        def dual():
            optimizer.zero_grad()
            value = (scores + potential).logsumexp(dim=1).mean() - share @ potential
            value.backward()
            return value

        optimizer.step(dual)
        self.offset.copy_(std ** 2 * potential.detach())
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


TRIES = 12  # to merge and split without success, after which a search ends


class Clusters(NamedTuple):
    r: torch.Tensor  # (N, K): how much each response belongs to each cluster
    collisions: float  # share of an input's responses beyond the first that are in no new cluster
    searches: int  # how many were made
    agreement: float  # share of them that ended in these clusters
    halves: float  # share of the responses that clusters of half of the inputs alone put likewise


def start_posterior(q, pairs, x_index, K, seed, searches, std):
    """Clusters responses of the base and gives q a head that is fitted to the clusters. pairs:
    model.Pairs of N samples, x_index (N,): which input each one answers; K: how many clusters, or 0
    if that is to be found; std: of a continuous q. Returns the clusters' shares of the samples,
    (K,), and Clusters."""
    count = {}  # a response that came up several times is one response
    for i, row in enumerate(zip(x_index.tolist(), map(tuple, pairs.ids.tolist()))):
        count.setdefault(row, []).append(i)
    index = torch.tensor([rows[0] for rows in count.values()])
    weight = torch.tensor([float(len(rows)) for rows in count.values()])
    pairs, x_index = pairs.rows(index), x_index[index]
    siblings = (x_index.bincount() > 1)[x_index]  # a response that is alone has no contrast
    if siblings.sum() < 2 * max(K, 2):
        fail(f"the base answers nearly every input in one way: {siblings.sum()} responses, of "
             f"inputs that have several, are too few for {K or 'any'} clusters")
    features = q.fit_statistics(pairs)
    # the last two layers, pooled with equal weights: earlier ones say more about x than about z
    width = q.backbone.config.n_embd
    evenly = features[siblings, :features.shape[1] // 2][:, -2 * width:]
    x_index = x_index[siblings].unique(return_inverse=True)[1]
    clusters = cluster_responses(evenly, x_index, K, seed, searches)
    q.make_head(clusters.r.shape[1])
    head = nn.Linear(features.shape[1], clusters.r.shape[1]) if q.z_dim else q.head
    fit_linear(head, features[siblings], weight[siblings],
               lambda out: losses.distillation(clusters.r.log(), F.log_softmax(out, dim=1)))
    with torch.no_grad():  # the linear map also labels the responses that are alone
        r = F.softmax(head(features), dim=1)
    r[siblings] = clusters.r
    share = weight @ r / weight.sum()
    if not q.z_dim:
        return share, clusters

    def distance(out):  # of the mean from its cluster's centre, in units of the variance
        mean, log_var = gaussian(out)
        squared = (mean - r @ q.cells.centres).square() / log_var.detach().exp()
        return 0.5 * squared.sum(dim=1)

    q.cells.place(share, std)
    with torch.no_grad():
        K, D = q.cells.centres.shape
        q.head.weight.zero_()
        q.head.bias.zero_()
        # the inverse of model.gaussian: `std` in the K - 1 dimensions of the centres, 1 in others
        q.head.bias[D:D + K - 1] = 5 * math.atanh(2 * math.log(std) / 5)
    fit_linear(q.head, features, weight, distance)
    return share, clusters


def fit_linear(head, features, weight, loss, steps=200, lr=1e-2, weight_decay=0.01):
    """Fits a linear map to minimise loss(what it makes of features (N, F)), (N,), weighted by
    `weight` (N,), with a penalty on its squared weights."""
    optimizer = torch.optim.Adam(head.parameters(), lr)
    for _ in range(steps):
        total = (weight * loss(head(features))).sum() / weight.sum()
        total = total + weight_decay * head.weight.square().sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    head.zero_grad()


def cluster_responses(features, x_index, K, seed, searches):
    """K clusters of responses that mean the same for every input: features (N, F) of different
    responses, x_index (N,): which input, from 0, each one answers, at least two to each. Each input
    may have shares of its own, and a cluster may be missing on it.

    The model is additive: features = c_x + mu_z + noise. What an input adds to all of its responses
    (c_x) is estimated together with what a cluster does (mu_z). Of all searches that one counts
    which leaves the least noise (`spread`). Three are made, and three more, up to `searches`, until
    all agree. Halves of the inputs are searched on their own.

    K = 0: the fewest clusters, up to 10, in which at most 7% collide and which halves confirm in
    90%. Whoever answers one input in two ways that are in one cluster has more strategies than
    there are clusters. More clusters than strategies split one by what its inputs look like; they
    collide as little, and this is why the fewest are taken.
    """
    contrast = (features - mean_of_input(features, x_index)).square().sum()
    if not 1e-12 < contrast < math.inf:
        fail("nothing tells different responses to an input apart: in the base's states they "
             f"differ by a square sum of {contrast:.3g}")
    inputs = int(x_index.max()) + 1
    if inputs < 4:
        fail(f"{inputs} inputs with several responses have no halves: more cluster_inputs are "
             "needed, or a base that answers in several ways")
    half = torch.randperm(inputs, generator=seeded(seed))[x_index] % 2 == 0
    halves = (x_index >= 0, half, ~half)  # all, and either half of the inputs
    parts = [(features[part], x_index[part].unique(return_inverse=True)[1]) for part in halves]
    for k in (K,) if K else range(2, 11):
        found, same = ([], [], []), [[False]]
        while len(found[0]) < searches and not all(map(all, same)):
            more = range(len(found[0]), min(len(found[0]) + 3, searches))
            jobs = [(i, 1000 * seed + j) for i in range(3) for j in more]
            new = map_chunks(lambda job: search(*parts[job[0]], k, seeded(job[1])), jobs)
            for (i, _), one in zip(jobs, new):
                found[i].append(one)
            r, *of_halves = best = [min(each, key=lambda one: one[0])[1] for each in found]
            same = [[agreement(one, b) > 0.98 for _, one in each] for each, b in zip(found, best)]
        different = len((x_index * k + r.argmax(dim=1)).unique())
        collisions = (len(r) - different) / (len(r) - inputs)
        confirmed = min(agreement(one, r[part]) for one, part in zip(of_halves, halves[1:]))
        if not K:
            say(f"{k} clusters: {collisions:.1%} of the responses collide, halves of the inputs "
                f"agree on {confirmed:.1%}")
        if K or (collisions < 0.07 and confirmed > 0.9):
            return Clusters(r, collisions, len(found[0]), sum(same[0]) / len(found[0]), confirmed)
    fail(f"no number of clusters up to {k} tells the different responses to one input apart and is "
         "found in halves of the inputs, too: set n_latents to the number you want")


def search(features, x_index, K, generator):
    """One search for K clusters: split until there are K, then merge two and split again wherever
    that lessens the spread, until TRIES in a row do not. Returns spread and r (N, K)."""
    v = components(features - mean_of_input(features, x_index), 160)
    r = torch.ones(len(v), 1)
    while r.shape[1] < K:
        found = [split(v, r, k, x_index, generator) for k in range(r.shape[1])]
        r = refine(v, min(found, key=lambda each: spread(v, each, x_index)), x_index)
    r = refine(v, r, x_index, exclusive=True)
    least, pairs = spread(v, r, x_index), list(itertools.combinations(range(K), 2))
    tries = 0
    while tries < TRIES:
        if tries % len(pairs) == 0:
            order = torch.randperm(len(pairs), generator=generator).tolist()
        a, b = pairs[order[tries % len(pairs)]]
        tries += 1
        merged = torch.cat((r[:, :b], r[:, b + 1:]), dim=1)
        merged[:, a] += r[:, b]
        other = split(v, refine(v, merged, x_index), a, x_index, generator)
        other = refine(v, other, x_index, exclusive=True)
        left = spread(v, other, x_index)
        if left < least - 0.003:
            least, r, tries = left, other, 0
    return least, r


def split(v, r, k, x_index, generator, starts=4):
    """Cluster k in two, along a direction in which what varies within it has two values rather than
    those of a bell curve: of least kurtosis E[p^4] / E[p^2]^2, found by fixed-point iterations [2]
    in few principal components. Of random starts, the one counts that leaves the least spread:
    wordings have two values, too."""
    mu, noise = additive_model(v, r, x_index)
    rows = (r.argmax(dim=1) == k).nonzero()[:, 0]
    whole, found = torch.cat((r, torch.zeros(len(r), 1)), dim=1), []
    if len(rows) < 32:
        return whole
    leading = components((noise + r @ mu)[rows], 40)
    for few in (8, 20, 40):
        u = leading[:, :few]
        w = torch.randn(u.shape[1], starts, generator=generator)
        for _ in range(60):
            w = F.normalize(w, dim=0)
            p = u @ w
            fourth = (p ** 4).mean(dim=0)
            slope = u.T @ p ** 3 / len(u)
            w = torch.where(fourth < 3, 3 * w - slope, 1.5 * w - 0.5 * slope / fourth)
        for over in (u @ w > 0).T:
            two = whole.clone()
            two[rows[over], -1], two[rows[over], k] = r[rows[over], k], 0
            found.append(two)
    return min(found, key=lambda each: spread(v[:, :40], each, x_index))


def refine(v, r, x_index, exclusive=False):
    """Soft k-means of v (N, d) about c_x + mu_z, in more and more components. Few find clusters,
    many tell similar ones apart. exclusive: different responses to one input are in different
    clusters, unless there are more of them than clusters."""
    K = r.shape[1]
    count = x_index.bincount()
    limit = torch.where(count <= K, 0.0, torch.inf)[:, None]
    rounds = 30 if exclusive and (count <= K).any() else 0
    for d in (40, 80, 160):
        for _ in range(6):
            mu, noise = additive_model(v[:, :d], r, x_index)
            scores = -torch.cdist(noise + r @ mu, mu).square() + (r.mean(dim=0) + 1e-3).log()
            # a Sinkhorn whose potentials can only fall: a cluster may have less than one response
            shift = torch.zeros(len(count), K)
            for _ in range(rounds):
                mass = torch.zeros_like(shift).index_add_(
                    0, x_index, F.softmax(scores + shift[x_index], dim=1))
                shift = (shift + limit - mass.clamp(min=1e-30).log()).clamp(max=0)
            r = F.softmax(scores + shift[x_index], dim=1)
    return r


def additive_model(v, r, x_index):
    """Least squares of v = c_x + mu_z + noise for z ~ r, v without its means of inputs: mu (K, d),
    up to a constant, and the noise (N, d). v without c_x is the noise + r @ mu. [3]: take the mean
    of the input away from both sides, and regress the rest."""
    own = r - mean_of_input(r, x_index)
    # singular without the 1, as mu has no fixed mean, and without the 1e-6, if a cluster is empty
    square = (own.T @ own).double() + 1 + 1e-6 * torch.eye(r.shape[1], dtype=torch.double)
    mu = torch.linalg.solve(square, (own.T @ v).double()).to(v.dtype)
    return mu, v - own @ mu


def spread(v, r, x_index):
    """log det of the noise's covariance, v being white: how little is left of the directions in
    which clusters differ. Where they are right it is a hundredth, in all K - 1 directions."""
    noise = additive_model(v, r, x_index)[1]
    return torch.logdet(noise.T @ noise / len(v) + 1e-4 * torch.eye(v.shape[1])).item()


def components(rows, most):
    """Principal components (N, d), each of unit variance; the largest first."""
    rows = rows - rows.mean(dim=0)
    variance, directions = torch.linalg.eigh(rows.T @ rows / len(rows))  # by rising variance
    d = min(most, rows.shape[1], max(len(rows) // 8, 2))  # more would be noise
    return rows @ (directions.flip(1)[:, :d] / variance.flip(0)[:d].clamp(min=1e-8).sqrt())


def mean_of_input(values, x_index):
    """The mean over the rows of an input, at each of its rows: (N, d), (N,) -> (N, d)."""
    total = torch.zeros(int(x_index.max()) + 1, values.shape[1]).index_add_(0, x_index, values)
    return (total / x_index.bincount()[:, None])[x_index]


def agreement(r, other):
    """Share of the responses that lie in the same cluster in both r and other (N, K), whatever the
    clusters are called: each cluster of one goes with the cluster of the other that shares most
    with it, in both directions, so that no two go with the same one."""
    a, b = (F.one_hot(each.argmax(dim=1), r.shape[1]).float() for each in (r, other))
    overlap = a.T @ b  # (K, K)
    return min(overlap.max(dim=dim).values.sum().item() for dim in (0, 1)) / len(r)
