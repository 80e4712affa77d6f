"""Pooled features and the bigram table against loops, the cells of a continuous z, and clusters of responses."""
import functools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import losses
import posterior
from evaluate import one_to_one_matching
from harness.parallel import seeded
from model import Pairs, gaussian
from posterior import Cells, Posterior, agreement, cluster_responses, start_posterior
from tasks import PAD


# ----------------------------------------------------------------------------------------- features, and the head
def states_of_bigrams(base, pairs):
    """For every record, [(token, next token, state of all layers but the embedding)] at <y>, y, </y> and <eos>, and the
    base's surprise b_t at each, from a pass over the record alone. The token after the last one is <pad>."""
    found = []
    for row, start, b in zip(pairs.ids.tolist(), pairs.starts.tolist(), pairs.b):
        ids = row[:row.index(PAD)] if PAD in row else row
        h = torch.cat(base.hidden_states(torch.tensor([ids]))[1:], dim=-1)[0]
        places = range(start - 1, len(ids))
        found.append(([(ids[t], [*ids, PAD][t + 1], h[t]) for t in places], b[list(places)]))
    return found


def test_the_bigram_table_is_that_of_a_loop(trained):
    """bigram_mean[i] = the mean state over all places in y where token and next token are those of the i-th id."""
    base, pairs, _ = trained
    q, table = Posterior(base, 3), {}
    q.fit_statistics(pairs.rows(slice(100)))
    for places, _ in states_of_bigrams(base, pairs.rows(slice(100))):
        for token, following, h in places:
            table.setdefault(token * base.config.vocab_size + following, []).append(h)
    assert q.bigrams.tolist() == sorted(table) and len(table) > 20
    want = torch.stack([torch.stack(table[bigram]).mean(dim=0) for bigram in sorted(table)])
    assert torch.allclose(q.bigram_mean, want, atol=1e-4)


def test_features_are_means_of_deviations_and_an_unseen_bigram_tells_nothing(trained):
    """Both halves by loops over places of y: sum_t w_t (h_t - mean state of the bigram at t), a bigram that was not
    seen left out, w_t = 1 / |y| or b_t / sum_s b_s; less the mean, over the standard deviation."""
    base, pairs, other = trained
    q = Posterior(base, 3)
    q.fit_statistics(pairs.rows(slice(10)))
    mean_of = dict(zip(q.bigrams.tolist(), q.bigram_mean))
    pairs, unseen = other.rows(slice(30)), 0
    for (places, b), got in zip(states_of_bigrams(base, pairs), q.features(pairs)):
        evenly = weighted = 0
        for (token, following, h), b_t in zip(places, b):
            bigram = token * base.config.vocab_size + following
            unseen += bigram not in mean_of
            deviation = h - mean_of[bigram] if bigram in mean_of else torch.zeros(len(h))
            evenly, weighted = evenly + deviation / len(places), weighted + deviation * b_t / b.sum()
        want = torch.cat((evenly, weighted))
        assert torch.allclose(got * q.std + q.mean, want, atol=2e-3)
    assert unseen > 20
    assert not Posterior(base, 3).features(pairs).any()  # which has seen none at all


def test_posterior_features_are_standardised_and_ignore_padding_and_company(trained):
    base, pairs, _ = trained
    pairs, q = pairs.rows(slice(40)), Posterior(base, 3)
    features = q.fit_statistics(pairs)
    assert torch.allclose(features, q.features(pairs), atol=1e-3)
    assert features.mean(dim=0).abs().max() < 1e-3 and (features.std(dim=0) - 1).abs().max() < 1e-2
    assert torch.allclose(q.features(pairs.rows(torch.tensor([5]))), features[5:6], atol=1e-3)
    assert torch.equal(q.fit_statistics(pairs), features)  # whatever was fitted before


@pytest.mark.parametrize("z_dim", [0, 2])
def test_known_features_chunks_and_company_change_nothing_that_the_posterior_says(trained, z_dim):
    """forward = read of features, of one chunk, of 50 pairs in chunks, or known before: log q, which sums to 1 as q, or
    mean and log variance."""
    base, pairs, _ = trained
    pairs, q = pairs.rows(slice(50)), Posterior(base, 3, z_dim=z_dim)
    features = q.fit_statistics(pairs)
    said = [q(pairs), q(pairs, features), q.read(q.all_features(pairs))]
    if not z_dim:
        said = [(logq,) for logq in said]
        assert torch.allclose(said[0][0].exp().sum(dim=1), torch.ones(50))
    else:
        assert all(torch.equal(a, b) for a, b in zip(said[1], gaussian(q.head(features))))
    assert said[0][0].std(dim=0).min() > 0.1
    for each in said[1:]:
        assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(said[0], each, strict=True))


def test_a_linear_posterior_trains_its_head_and_a_full_one_everything(trained):
    base, pairs, _ = trained
    pairs = pairs.rows(slice(12))
    for adaptation in ("linear", "full"):
        q = Posterior(base, 3, adaptation)
        q.fit_statistics(pairs)
        q(pairs)[:, 0].sum().backward()
        assert q.head.weight.grad.abs().sum() > 0
        got = [p.grad is not None and p.grad.abs().sum() > 0 for p in q.backbone.blocks.parameters()]
        assert all(got) if adaptation == "full" else not any(got)
        assert not q.all_features(pairs).requires_grad
    assert not any(p.requires_grad for p in base.parameters())


@pytest.mark.parametrize("z_dim", [0, 2])
def test_a_posterior_saved_and_loaded_says_the_same(trained, tmp_path, z_dim):
    """Bit for bit, with a table of another size, cells included; also into a posterior that has a table already."""
    base, pairs, other = trained
    torch.manual_seed(0)
    q = Posterior(base, 3, z_dim=z_dim)
    q.fit_statistics(pairs)
    if z_dim:
        q.cells.place(torch.tensor([0.5, 0.3, 0.2]), std=0.3)
    torch.save(q.state_dict(), tmp_path / "q.pt")
    loaded, fitted = Posterior(base, 3, z_dim=z_dim), Posterior(base, 3, z_dim=z_dim)
    fitted.fit_statistics(other.rows(slice(10)))
    for again in (loaded, fitted):
        assert len(again.bigrams) < len(q.bigrams)
        again.load_state_dict(torch.load(tmp_path / "q.pt", weights_only=True))
        for a, b in zip(q(other.rows(slice(30))), again(other.rows(slice(30))), strict=True):
            assert torch.equal(a, b)
        assert all(torch.equal(again.state_dict()[name], value) for name, value in q.state_dict().items())
    if z_dim:
        z = torch.randn(1000, 2)
        assert torch.equal(q.cells(z), loaded.cells(z)) and len(q.cells(z).unique()) == 3


def test_the_head_is_fitted_to_the_labels_that_have_weight(trained):
    """Two clusters that two features tell apart; a third of the labels is wrong, and has a weight of 0. Without the
    weights the same labels are believed half of the time."""
    q = Posterior(trained[0], 2)
    features, cluster = torch.zeros(300, q.head.in_features), torch.arange(300) % 2
    features[torch.arange(300), cluster] = 1.0
    wrong = torch.arange(300) % 3 > 0
    labels = torch.where(wrong, 1 - cluster, cluster)
    log_r = F.one_hot(labels, 2).float().log()

    def share_right(weight):
        q.fit_head(features, lambda logq: losses.distillation(log_r, logq), weight)
        return (q.read(features).argmax(dim=1) == cluster).float().mean()

    assert share_right((~wrong).float()) == 1 and share_right(torch.ones(300)) == 0
    assert not any(p.grad is not None and p.grad.any() for p in q.parameters())
    before = q.head.weight.norm()
    q.fit_head(features, lambda logq: losses.distillation(log_r, logq), torch.ones(300), weight_decay=10.0)
    assert q.head.weight.norm() < before / 2


# ------------------------------------------------------------------------------------- the cells of a continuous z
@pytest.mark.parametrize("std", [0.1, 0.3])
@pytest.mark.parametrize("share", [(1 / 3, 1 / 3, 1 / 3), (0.6, 0.3, 0.1)])
def test_a_cell_takes_as_much_of_space_as_its_cluster_of_the_responses(share, std):
    """Also where clusters are of different sizes; a centre is in its own cell."""
    cells = Cells(3, 2)
    cells.place(torch.tensor(share), std)
    found = cells(torch.randn(20000, 2, generator=torch.Generator().manual_seed(1))).bincount(minlength=3) / 20000
    assert torch.allclose(found, torch.tensor(share), atol=0.015), found
    assert cells(cells.centres).tolist() == [0, 1, 2]


def test_centres_are_equally_far_apart_and_give_unit_variance():
    """The variance of the centres and that around them, std^2, is 1 in each of K - 1 dimensions; the others are 0."""
    cells = Cells(4, 5)
    cells.place(torch.full((4,), 0.25), std=0.5)
    assert torch.allclose(torch.pdist(cells.centres), torch.pdist(cells.centres)[0].expand(6))
    assert cells.centres.mean(dim=0).abs().max() < 1e-5
    variance = cells.centres.var(dim=0, unbiased=False) + 0.5 ** 2
    assert torch.allclose(variance[:3], torch.ones(3), atol=1e-4) and not cells.centres[:, 3:].any()


def test_a_cluster_too_small_for_a_cell_is_one_line():
    with pytest.raises(SystemExit, match="'z_dim'.*unequal shares"):
        Cells(3, 2).place(torch.tensor([0.99, 0.009, 0.001]), std=0.9)


def test_samples_of_cells_fill_the_prior_and_each_is_of_its_own_cell():
    """Two cells of N(0, 1) that meet at its quartile, and a quarter of the rows in the smaller one: z is N(0, 1). With
    |z + 1|^2 - o_0 = |z - 1|^2 - o_1, they meet at (o_0 - o_1) / 4."""
    n, quartile = 512, -0.674
    mean = torch.tensor([1.1, 0.8, 0.9, -1.0]).repeat(n // 4)[:, None]
    cells = Cells(2, 1)
    cells.centres.copy_(torch.tensor([[-1.0], [1.0]]))
    cells.offset.copy_(torch.tensor([4 * quartile, 0.0]))
    z = cells.sample(mean, seeded(0))
    assert z.shape == (n, 1) and abs(z.mean()) < 0.15 and abs(z.std() - 1) < 0.1 and len(z.unique()) > 400
    assert ((z > quartile) == (mean > 0)).all()
    assert torch.equal(z, cells.sample(mean, seeded(0))) and not torch.equal(z, cells.sample(mean, seeded(8)))
    cells.forward = lambda z: torch.full((len(z),), len(z))  # no draw in the cell of any row
    assert cells.sample(mean, seeded(0)).isfinite().all()


# ----------------------------------------------------------------------------------------- clusters of responses
def test_clusters_mean_the_same_for_every_input_where_plain_distances_do_not():
    """features = large offset of x + direction of the strategy + noise, one response a strategy: constrained, centred
    k-means finds the strategies; the nearest raw centroids, which are those of x, do not. Same seed, same labels."""
    generator = torch.Generator().manual_seed(0)
    n, S = 200, 3
    x_index, strategy = torch.arange(n).repeat_interleave(S), torch.arange(S).repeat(n)
    features = (10 * torch.randn(n, 40, generator=generator)[x_index]
                + 2 * torch.randn(S, 40, generator=generator)[strategy]
                + 0.5 * torch.randn(n * S, 40, generator=generator))
    prior, log_p = torch.full((S,), -math.log(S)), torch.full((n * S,), -math.log(S))

    def labels(features):
        generator = torch.Generator().manual_seed(1)
        return cluster_responses(features, x_index, log_p, prior, generator, restarts=8)

    log_r, agree = labels(features)
    assert 0.5 < agree <= 1  # whatever a restart calls its clusters
    assert torch.allclose(log_r.exp().sum(dim=1), torch.ones(n * S), atol=1e-4)
    joint = torch.zeros(S, S).index_put_((log_r.argmax(dim=1), strategy), torch.ones(n * S), accumulate=True) / n
    assert joint.max(dim=1).values.min() > 0.95 and joint.max(dim=0).values.min() > 0.95
    assert torch.equal(log_r, labels(features)[0])
    raw = torch.cdist(features, features[:S]).argmin(dim=1)
    plain = torch.zeros(S, S).index_put_((raw, strategy), torch.ones(n * S), accumulate=True) / n
    assert plain.max(dim=0).values.min() < 0.8


def test_agreement_is_the_share_in_the_same_cluster_whatever_its_name():
    """1 for renamed clusters; what is moved elsewhere counts by its weight; a cluster that is split, or two that are
    one, do not agree, from either side. It is never below the best one-to-one matching of clusters."""
    r = torch.eye(3)[torch.arange(12) % 3]
    weight = torch.arange(1.0, 13)
    assert agreement(r, r[:, [2, 0, 1]], weight) == pytest.approx(1)
    moved = r.clone()
    moved[4] = moved[4].roll(1)  # the fifth response, of weight 5 of 78
    assert agreement(moved, r[:, [2, 0, 1]], weight) == pytest.approx(1 - 5 / 78)
    assert agreement(10 * moved.clamp(min=0.1), r, weight) == pytest.approx(1 - 5 / 78)
    merged = r.clone()
    merged[:, 0], merged[:, 1] = r[:, 0] + r[:, 1], 0
    want = (weight[1::3].sum() + weight[2::3].sum()).item() / 78  # the larger one of the two, and the third
    assert agreement(merged, r, weight) == agreement(r, merged, weight) == pytest.approx(want)
    for seed in range(20):
        a, b = torch.rand(2, 30, 4, generator=torch.Generator().manual_seed(seed))
        weight = torch.rand(30, generator=torch.Generator().manual_seed(seed))
        overlap = torch.zeros(4, 4).index_put_((a.argmax(dim=1), b.argmax(dim=1)), weight, accumulate=True)
        assert agreement(a, b, weight) >= one_to_one_matching(overlap)[0] / weight.sum().item() - 1e-6
        assert agreement(a, b, weight) == pytest.approx(agreement(b, a, weight))


@pytest.fixture
def clustered(monkeypatch):
    """What start_posterior hands to cluster_responses, whose clusters are 0, 1, 2, ... in turn, from features that are
    those clusters. The head is fitted until it has converged."""
    handed = SimpleNamespace()

    def cluster(features, x_index, log_p, log_prior, generator, restarts):
        handed.x_index, handed.log_p, handed.restarts = x_index, log_p, restarts
        return F.one_hot(torch.arange(len(features)) % len(log_prior)).float().clamp(min=1e-20).log(), 0.75

    def fit_statistics(q, pairs):
        handed.pairs, K = pairs, len(q.cells.centres) if q.z_dim else q.head.out_features
        return F.pad(2.0 * F.one_hot(torch.arange(len(pairs.ids)) % K), (0, q.head.in_features - K))

    monkeypatch.setattr(posterior, "cluster_responses", cluster)
    monkeypatch.setattr(Posterior, "fit_statistics", fit_statistics)
    monkeypatch.setattr(Posterior, "fit_head",
                        functools.partialmethod(Posterior.fit_head, steps=800, weight_decay=0.0))
    return handed


def start(q, pairs, x_index, K, std=0.5):
    return start_posterior(q, pairs, x_index, torch.full((K,), -math.log(K)), seeded(0), restarts=5, std=std)


def test_a_response_that_came_up_twice_is_one_of_its_probability(trained, clustered):
    """The same y to another input is another response. log p(y|x) = -sum_t b_t."""
    pairs = trained[1].rows(torch.tensor([0, 1, 0, 2, 1, 0]))
    assert start(Posterior(trained[0], 2), pairs, torch.tensor([0, 0, 0, 0, 0, 1]), K=2) == 0.75
    assert clustered.x_index.tolist() == [0, 0, 0, 1] and clustered.restarts == 5
    for kept, original in enumerate((0, 1, 2, 0)):
        row, want = clustered.pairs.ids[kept], trained[1].ids[original]
        assert row[row != PAD].tolist() == want[want != PAD].tolist()
        assert clustered.log_p[kept].item() == pytest.approx(-trained[1].b[original].sum().item(), rel=1e-5)
    with pytest.raises(SystemExit, match="'cluster_inputs': 4 different responses are too few for 3 clusters"):
        start(Posterior(trained[0], 3), pairs, torch.tensor([0, 0, 0, 0, 0, 1]), K=3)


def test_a_discrete_posterior_starts_at_the_clusters(trained, clustered):
    q = Posterior(trained[0], 3)
    start(q, trained[1], torch.arange(512), K=3)
    logq = q.read(q.fit_statistics(trained[1]))
    assert (logq.exp()[torch.arange(512), torch.arange(512) % 3] > 0.95).all()


def test_a_continuous_posterior_starts_at_the_centres_of_the_clusters(trained, clustered):
    """N(centre, std^2) in the dimensions of the centres, N(0, 1) in the others; every mean in its own cell, and cells
    that take as much of space as their clusters of the probability."""
    pairs = Pairs(trained[1].ids, trained[1].starts, torch.ones(trained[1].b.shape))  # all are as likely
    q = Posterior(trained[0], 4, z_dim=5)
    start(q, pairs, torch.arange(512), K=4)
    mean, log_var = (part.detach() for part in q.read(q.fit_statistics(pairs)))
    cluster = torch.arange(512) % 4
    assert torch.allclose(mean, q.cells.centres[cluster], atol=0.05) and torch.equal(q.cells(mean), cluster)
    assert torch.allclose((0.5 * log_var).exp(), torch.tensor([0.5, 0.5, 0.5, 1, 1]).expand(512, 5), atol=1e-3)
    share = q.cells(torch.randn(20000, 5, generator=torch.Generator().manual_seed(1))).bincount(minlength=4) / 20000
    assert torch.allclose(share, torch.full((4,), 0.25), atol=0.015)


def test_cells_have_the_shares_of_the_probability_and_not_of_the_number_of_responses(trained, clustered):
    """Responses of the first of three clusters are twice as likely as the others: half of all."""
    b = torch.zeros(trained[1].b.shape)
    b[torch.arange(512) % 3 > 0, 0] = math.log(2)
    q = Posterior(trained[0], 3, z_dim=2)
    start(q, Pairs(trained[1].ids, trained[1].starts, b), torch.arange(512), K=3, std=0.3)
    share = q.cells(torch.randn(20000, 2, generator=torch.Generator().manual_seed(1))).bincount(minlength=3) / 20000
    assert torch.allclose(share, torch.tensor([0.5, 0.25, 0.25]), atol=0.015)
