"""Pooled features and the bigram table against loops, the cells of a continuous z, and clusters of responses."""
import functools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import losses
import posterior
from evaluate import one_to_one_matching
from harness.parallel import seeded
from model import gaussian
from posterior import (Cells, Clusters, Posterior, additive_model, agreement, cluster_responses, components, fit_linear,
                       mean_of_input, refine, search, split, spread, start_posterior)
from tasks import PAD

pytestmark = pytest.mark.usefixtures("whole_searches")


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

    def loss(out):
        return losses.distillation(log_r, F.log_softmax(out, dim=1))

    def share_right(weight):
        fit_linear(q.head, features, weight, loss)
        return (q.read(features).argmax(dim=1) == cluster).float().mean()

    assert share_right((~wrong).float()) == 1 and share_right(torch.ones(300)) == 0
    assert not any(p.grad is not None and p.grad.any() for p in q.parameters())
    before = q.head.weight.norm()
    fit_linear(q.head, features, torch.ones(300), loss, weight_decay=10.0)
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
def everywhere(n, S, generator):
    return torch.ones(n, S, dtype=torch.bool)


def often_alone(n, S, generator):
    """Of 12 responses to each input, drawn with shares of 0.8, 0.15 and 0.05: which strategies came up."""
    drawn = torch.multinomial(torch.tensor([0.8, 0.15, 0.05]).expand(n, S), 12, replacement=True, generator=generator)
    return F.one_hot(drawn, S).sum(dim=1) > 0


def missing(n, S, generator):
    """The first strategy answers two of four inputs alone."""
    return (torch.arange(S) > 0) | (torch.arange(n)[:, None] % 4 > 1)


def two_or_more(n, S, generator):
    """Each input is answered by 2 to S strategies."""
    rank = torch.rand(n, S, generator=generator).argsort(dim=1).argsort(dim=1)
    return rank < torch.randint(2, S + 1, (n, 1), generator=generator)


def responses(appears, n=100, S=3, seed=0, wordings=1, nuisance=0.2):
    """(features (N, 16), x_index (N,), strategy (N,)) of one response for each strategy that appears on an input:
    large offset of x + direction of the strategy + noise; and every x has two bits, which add to a strategy's direction
    a smaller one of that strategy. With two wordings each of them comes up, a small direction apart."""
    generator = seeded(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    there = appears(n, S, generator)
    there = there & (there.sum(dim=1, keepdim=True) > 1)  # a response that is alone is none of its callers'
    x, strategy = there.nonzero().T.repeat_interleave(wordings, dim=1)
    wording = torch.arange(len(x)) % wordings
    bits = torch.randint(2, (n, 2), generator=generator).float()
    features = (3 * normal(n, 16)[x] + normal(S, 16)[strategy] + 0.3 * wording[:, None] * normal(16)
                + torch.einsum("nb, nbf -> nf", bits[x], nuisance * normal(S, 2, 16)[strategy])
                + 0.3 * normal(len(x), 16))
    return features, x.unique(return_inverse=True)[1], strategy


def share_right(r, strategy):
    """Of the responses, in the best one-to-one matching of clusters and strategies."""
    C = F.one_hot(r.argmax(dim=1), r.shape[1]).float().T @ F.one_hot(strategy, r.shape[1]).float()
    return one_to_one_matching(C)[0] / len(r)


def pure_noise(n, responses, F):
    return torch.randn(n * responses, F, generator=seeded(0)), torch.arange(n).repeat_interleave(responses)


@pytest.fixture
def growth_alone(whole_searches, monkeypatch):
    """Searches split until there are K, and then neither merge nor split again: enough where clusters are clear."""
    monkeypatch.setattr(posterior, "TRIES", 0)


@functools.cache
def found(appears, S=3, wordings=1):
    """Clusters of made-up responses, the features, which input they answer, and their strategies."""
    made = responses(appears, S=S, wordings=wordings, n=100 if appears in (everywhere, two_or_more) else 200)
    return cluster_responses(*made[:2], S, seed=0, searches=1), *made


@pytest.mark.parametrize("appears, S, wordings", [
    (everywhere, 3, 1), (often_alone, 3, 1), (missing, 3, 1), (two_or_more, 4, 1), (everywhere, 3, 2)])
def test_clusters_are_the_strategies_whatever_their_shares(appears, S, wordings):
    """Of equal shares or not, where one is missing on half of the inputs, inputs differ in how many they have, or each
    strategy is worded in two ways, so that inputs have more responses than there are clusters; there 3 of 5 responses
    beyond the first collide. Halves of the inputs find the same."""
    clusters, features, _, strategy = found(appears, S, wordings)
    assert strategy.unique().tolist() == list(range(S))
    assert share_right(clusters.r, strategy) > 0.98 and clusters.halves > 0.95 and clusters.agreement == 1
    assert torch.allclose(clusters.r.sum(dim=1), torch.ones(len(features)), atol=1e-4) and clusters.r.min() >= 0
    assert clusters.collisions == pytest.approx(0.6 if wordings == 2 else 0, abs=0.01)


def test_clusters_depend_on_nothing_but_what_differs_within_an_input():
    """Same seed, same r, to the last bit; units of the features, and whatever is added to all responses to an input,
    make no difference. The nearest of one response each, which is a matter of x, does not find the strategies."""
    (first, *_), features, x_index, strategy = found(everywhere)
    other = 7 * (features + 5 * torch.randn(100, 16, generator=seeded(1))[x_index])
    again, moved = (cluster_responses(each, x_index, 3, seed=0, searches=1).r for each in (features, other))
    assert torch.equal(first, again) and agreement(first, moved) == 1
    assert torch.allclose(first.max(dim=1).values, moved.max(dim=1).values, atol=0.01)
    nearest = F.one_hot(torch.cdist(features, features[:3]).argmin(dim=1), 3)
    assert share_right(first, strategy) > 0.98 and share_right(nearest, strategy) < 0.7


@pytest.mark.parametrize("S", [2, 3, 5])
def test_the_number_of_clusters_is_found(growth_alone, capsys, S):
    """And for each number that was tried, it is said what spoke for it."""
    features, x_index, strategy = responses(everywhere, S=S)
    clusters = cluster_responses(features, x_index, 0, seed=0, searches=3)
    assert clusters.r.shape[1] == S and share_right(clusters.r, strategy) > 0.98 and clusters.collisions < 0.01
    said = capsys.readouterr().out.splitlines()
    assert [int(line.split()[0]) for line in said] == list(range(2, S + 1))
    assert said[-1] == (f"{S} clusters: {clusters.collisions:.1%} of the responses collide, halves of the inputs "
                        f"agree on {clusters.halves:.1%}")


def test_responses_that_no_number_of_clusters_tells_apart_are_one_line(growth_alone):
    """16 responses to an input that differ by noise alone, more than there may be clusters."""
    with pytest.raises(SystemExit, match="no number of clusters up to 10 tells .* apart .*: set n_lat") as exit:
        cluster_responses(*pure_noise(4, 16, 4), 0, seed=0, searches=1)
    assert "\n" not in exit.value.code


def test_halves_are_drawn_whatever_the_order_of_the_inputs_means(monkeypatch):
    """Every second input, as one half, could be all that lack a strategy. Each input is in one half."""
    parts = []

    def fake(features, x_index, K, generator):
        parts.append(set(features[:, 0].long().tolist()))
        return 0.0, F.one_hot(x_index % K, K).float()

    monkeypatch.setattr(posterior, "search", fake)
    x_index = torch.arange(40).repeat_interleave(2)
    cluster_responses(torch.stack((x_index, torch.arange(80)), dim=1).float(), x_index, 2, seed=0, searches=1)
    whole, one, other = sorted(parts, key=len, reverse=True)
    assert one | other == whole == set(range(40)) and not one & other and len(one) == 20
    assert {x % 2 for x in one} == {x % 2 for x in other} == {0, 1}


def test_halves_of_the_inputs_do_not_agree_on_clusters_of_noise(growth_alone):
    clusters = cluster_responses(*pure_noise(60, 6, 12), 3, seed=0, searches=1)
    assert clusters.halves < 0.6


def test_what_is_said_of_clusters_is_counted_right(monkeypatch):
    """On inputs of 3, 2, 3 and 2 responses. The search of least spread counts. Of its 6 responses beyond the first to
    their input, 1 and 2 bring no new cluster. One other search of three gives the same, under other names. Of the
    searches of either half, the one of less spread differs from all inputs' in 1 of 6, or in none of 4."""
    cluster = torch.tensor([0, 0, 1, 0, 1, 2, 2, 2, 1, 2])
    x_index = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 3, 3])
    called = []

    def fake(features, x_index, K, generator):
        j, found = generator.initial_seed(), features[:, 0].long()
        assert x_index.unique().tolist() == list(range(len(x_index.unique())))  # of a half, too
        called.append((len(features), j, K))
        worse = len(features) == 10 and j == 7000 or len(features) < 10 and j != 7001
        if worse:
            found = 0 * found
        if j == 7002:
            found = (found + 1) % 3
        if len(features) == 6 and j == 7001:  # inputs 0 and 2
            found = found.clone()
            found[2] = 0
        return 3.0 if worse else float(j != 7001), F.one_hot(found, K).float()

    monkeypatch.setattr(posterior, "search", fake)
    monkeypatch.setattr(torch, "randperm", lambda n, generator: torch.arange(n))  # inputs 0 and 2 are a half
    found = cluster_responses(cluster[:, None].float(), x_index, 3, seed=7, searches=3)
    assert sorted(called) == [(n, j, 3) for n in (4, 6, 10) for j in (7000, 7001, 7002)]
    assert found.r.argmax(dim=1).tolist() == cluster.tolist()
    assert found.collisions == pytest.approx(3 / 6) and found.agreement == pytest.approx(2 / 3)
    assert found.halves == pytest.approx(5 / 6)


@pytest.mark.parametrize("odd, searches, made", [
    ((), 6, 3), ((), 2, 2), ((7000,), 6, 6), ((7004,), 8, 3), ((7001, 7003), 8, 8), ((7002, 7007), 8, 8)])
def test_searches_go_on_until_all_agree(monkeypatch, odd, searches, made):
    """Three at a time; the odd ones end elsewhere in the second half of the inputs, the smallest part."""
    called, x_index = [], torch.arange(6).repeat_interleave(torch.tensor([3, 3, 3, 3, 3, 2]))

    def fake(features, x_index, K, generator):
        made, found = generator.initial_seed(), features[:, 0].long()
        called.append((len(features), made))  # by several threads
        return 0.0, F.one_hot(0 * found if made in odd and len(features) == 8 else found, K).float()

    monkeypatch.setattr(posterior, "search", fake)
    monkeypatch.setattr(torch, "randperm", lambda n, generator: torch.arange(n))
    found = cluster_responses((torch.arange(17) % 3)[:, None].float(), x_index, 3, seed=7, searches=searches)
    assert sorted(called) == [(n, 7000 + j) for n in (8, 9, 17) for j in range(made)] and found.agreement == 1


def test_clusters_that_are_nearly_empty_are_no_obstacle():
    """What they add is nothing: the noise is that of the others alone. Probabilities of 1e-30 stay in a softmax."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        x_index = (torch.arange(136) // 3).clamp(max=44)
        scores = (20 * torch.randn(136, 4, generator=generator), -60 - 20 * torch.rand(136, 16, generator=generator))
        r = F.softmax(torch.cat(scores, dim=1), dim=1)
        v = torch.randn(136, 8, generator=generator)
        v = v - mean_of_input(v, x_index)
        (mu, noise), (few, same) = additive_model(v, r, x_index), additive_model(v, r[:, :4], x_index)
        assert torch.allclose(noise, same, atol=1e-4) and mu.abs().max() < 10
        assert torch.allclose(mu[:4] - mu[0], few - few[0], atol=1e-4)


def test_the_additive_model_is_least_squares_with_a_dummy_variable_for_every_input():
    """Of memberships in part, on inputs of 2 to 5 responses: mu up to a constant, and the noise, which is orthogonal to
    memberships and inputs; with r @ mu it is what lies about mu, without what the input adds."""
    generator = seeded(0)
    x_index = torch.arange(60).repeat_interleave(torch.randint(2, 6, (60,), generator=generator))
    N = len(x_index)
    r = torch.randn(N, 3, generator=generator).softmax(dim=1)
    v = torch.randn(N, 7, generator=generator) + r @ torch.randn(3, 7, generator=generator)
    v = v - mean_of_input(v, x_index)
    mu, noise = additive_model(v, r, x_index)
    dummies = F.one_hot(x_index).float()
    want = torch.linalg.lstsq(torch.cat((r, dummies), dim=1).double(), v.double(), rcond=1e-5,
                              driver="gelsd").solution
    of_x = dummies @ want[3:].float()
    want = want[:3].float()
    assert torch.allclose(mu - mu.mean(dim=0), want - want.mean(dim=0), atol=5e-3)
    assert torch.allclose(noise, v - of_x - r @ want, atol=5e-3)
    assert (r.T @ noise).abs().max() < 5e-3 and (dummies.T @ noise).abs().max() < 1e-4
    about = v - of_x
    assert torch.allclose(noise + r @ mu - mu.mean(dim=0), about - want.mean(dim=0), atol=1e-2)


def test_the_spread_falls_as_labels_become_the_strategies():
    """By about log(1/100) for each of two directions, from labels at random to the right ones."""
    features, x_index, strategy = responses(everywhere)
    v, order = components(features - mean_of_input(features, x_index), 160), torch.randperm(300, generator=seeded(0))
    spreads = []
    for wrong in (300, 200, 100, 0):
        label = strategy.clone()
        label[order[:wrong]] = strategy[order[:wrong]].roll(1)  # of some response or other
        spreads.append(spread(v, F.one_hot(label, 3).float(), x_index))
    assert spreads == sorted(spreads, reverse=True) and spreads[0] - spreads[-1] > 4


def test_principal_components_are_of_unit_variance_and_sorted_and_no_more_than_rows_can_tell():
    scale = torch.tensor([1.0, 5.0, 0.1, 2.0])
    rows = scale * torch.randn(800, 4, generator=seeded(0)) + 3
    u = components(rows, 3)
    assert torch.allclose(u.T @ u / 800, torch.eye(3), atol=1e-4) and u.mean(dim=0).abs().max() < 1e-4
    for column, source in zip(u.T, (1, 3, 0)):  # by falling variance
        assert torch.corrcoef(torch.stack((column, rows[:, source])))[0, 1].abs() > 0.98
    assert components(rows[:16], 3).shape == (16, 2) and components(rows[:24], 9).shape == (24, 3)


def test_a_split_is_along_what_has_two_values_and_not_along_what_varies_most():
    """Twenty directions, of which one has two values, and a hundredth of the others' variance. Responses of the other
    cluster stay where they are, and a cluster of fewer than 32 is not split."""
    sign = torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0, -1.0]).repeat(100)
    x_index = torch.arange(600) // 6
    features = 5 * torch.randn(600, 20, generator=seeded(0))
    features[:, 7] = 0.5 * sign + 0.05 * torch.randn(600, generator=seeded(1))
    features = features - mean_of_input(features, x_index)
    two = split(features, torch.ones(600, 1), 0, x_index, seeded(2))
    assert share_right(two, (sign > 0).long()) > 0.97
    r = F.one_hot(torch.arange(600) % 6 // 4, 2).float()  # four responses to an input, and two
    three = split(features, 0.9 * r + 0.05, 0, x_index, seeded(2))
    assert torch.allclose(three[:, [0]] + three[:, [2]], 0.9 * r[:, [0]] + 0.05)
    assert (three[r[:, 1] > 0, 2] == 0).all() and torch.equal(three[:, 1], 0.9 * r[:, 1] + 0.05)
    assert share_right(three[r[:, 0] > 0][:, [0, 2]], (sign[r[:, 0] > 0] > 0).long()) > 0.97
    small = split(features[:30], torch.ones(30, 1), 0, x_index[:30], seeded(2))
    assert small.tolist() == 30 * [[1.0, 0.0]]


def test_siblings_are_in_different_clusters_unless_there_are_more_of_them_than_clusters():
    """Sixty inputs have a response of each strategy; ten have two of the first one; ten have four of it and another."""
    x_index = torch.cat((torch.arange(60).repeat_interleave(3), torch.arange(60, 70).repeat_interleave(2),
                         torch.arange(70, 80).repeat_interleave(5)))
    strategy = torch.cat((torch.arange(3).repeat(60), torch.zeros(20, dtype=torch.long),
                          torch.tensor([0, 0, 0, 0, 1]).repeat(10)))
    features = (3 * torch.randn(80, 8, generator=seeded(0))[x_index] + torch.randn(3, 8, generator=seeded(1))[strategy]
                + 0.1 * torch.randn(250, 8, generator=seeded(2)))
    v = components(features - mean_of_input(features, x_index), 160)
    labels = {}
    for exclusive in (False, True):
        r = refine(v, F.one_hot(strategy, 3).float(), x_index, exclusive)
        assert torch.allclose(r.sum(dim=1), torch.ones(250), atol=1e-4)
        label = r.argmax(dim=1)
        assert torch.equal(label[:180], strategy[:180]) and torch.equal(label[200:], strategy[200:])
        labels[exclusive] = label[180:200].view(10, 2)
    assert (labels[False][:, 0] == labels[False][:, 1]).all() and (labels[True][:, 0] != labels[True][:, 1]).all()


def test_a_response_is_compared_without_what_its_input_adds():
    """Strategies at 0, 4 and 12 on a line; inputs of two of them each. Beside its sibling, the one in the middle lies 2
    above the mean of its input, or 4 below: it is in its cluster all the same."""
    strategy = torch.tensor([0, 1, 1, 2, 0, 2]).repeat(50)
    x_index = torch.arange(150).repeat_interleave(2)
    place = torch.tensor([0.0, 4.0, 12.0])[strategy] + 0.3 * torch.randn(300, generator=seeded(0))
    v = place[:, None] - mean_of_input(place[:, None], x_index)
    for exclusive in (False, True):
        assert share_right(refine(v, F.one_hot(strategy, 3).float(), x_index, exclusive), strategy) == 1


def test_a_merge_and_another_split_repair_what_growth_got_wrong(monkeypatch):
    """Where what the bits of x do to a strategy is half of what strategies differ by. Both from the same seed."""
    features, x_index, strategy = responses(missing, n=80, S=4, nuisance=0.5, seed=4)
    least, r = search(features, x_index, 4, seeded(0))
    monkeypatch.setattr(posterior, "TRIES", 0)
    more, grown = search(features, x_index, 4, seeded(0))
    assert share_right(grown, strategy) < 0.9 and share_right(r, strategy) > 0.98 and least < more - 1


def test_fair_coins_of_wording_are_not_taken_for_strategies():
    """Strategies in shares of 6:3:1, and ten coins in every response. Each coin has two values that are equally
    frequent, and so less kurtosis than any split of the strategies. Of three searches, that of the least spread."""
    generator, n = seeded(0), 1200
    strategy = torch.multinomial(torch.tensor([0.6, 0.3, 0.1]), n, replacement=True, generator=generator)
    coins, x_index = torch.randint(2, (n, 10), generator=generator).float(), torch.arange(n // 8).repeat_interleave(8)
    means = torch.randn(3, 24, generator=generator)
    of_input, of_coin, noise = (torch.randn(rows, 24, generator=generator) for rows in (n // 8, 10, n))
    features = 3 * of_input[x_index] + means[strategy] + 0.4 * coins @ of_coin + 0.3 * noise
    found = [search(features, x_index, 3, seeded(seed)) for seed in range(3)]
    assert share_right(min(found, key=lambda one: one[0])[1], strategy) > 0.98


def test_agreement_is_the_share_in_the_same_cluster_whatever_its_name():
    """1 for renamed clusters; a cluster that is split, or two that are one, do not agree, from either side. It is never
    below the best one-to-one matching of clusters."""
    r = torch.eye(3)[torch.arange(13) % 3]  # 5, 4 and 4
    assert agreement(r, r[:, [2, 0, 1]]) == 1
    moved = r.clone()
    moved[4] = moved[4].roll(1)
    assert agreement(moved, r[:, [2, 0, 1]]) == pytest.approx(12 / 13)
    assert agreement(10 * moved.clamp(min=0.1), r) == pytest.approx(12 / 13)
    merged = r.clone()
    merged[:, 0], merged[:, 1] = r[:, 0] + r[:, 1], 0
    assert agreement(merged, r) == agreement(r, merged) == pytest.approx(9 / 13)  # the larger of the two, and the third
    for seed in range(20):
        a, b = torch.rand(2, 30, 4, generator=seeded(seed))
        overlap = torch.zeros(4, 4).index_put_((a.argmax(dim=1), b.argmax(dim=1)), torch.ones(30), accumulate=True)
        assert agreement(a, b) >= one_to_one_matching(overlap)[0] / 30 - 1e-6
        assert agreement(a, b) == pytest.approx(agreement(b, a))


# --------------------------------------------------------------------------- the posterior starts at the clusters
@pytest.fixture
def clustered(monkeypatch):
    """Clusters of `handed.K` that are 0, 1, 2, ... in turn, from features that are those clusters; and what
    start_posterior hands to cluster_responses. Linear maps are fitted until they have converged."""
    handed = SimpleNamespace(K=3)

    def cluster(features, x_index, K, seed, searches):
        handed.features, handed.x_index, handed.told = features, x_index, (K, seed, searches)
        r = F.one_hot(torch.arange(len(features)) % handed.K, handed.K).float().clamp(min=1e-20)
        return Clusters(r, 0.1, 4, 0.75, 0.9)

    def fit_statistics(q, pairs):
        handed.pairs = pairs
        return F.pad(2.0 * F.one_hot(torch.arange(len(pairs.ids)) % handed.K, handed.K), (0, len(q.mean) - handed.K))

    monkeypatch.setattr(posterior, "cluster_responses", cluster)
    monkeypatch.setattr(Posterior, "fit_statistics", fit_statistics)
    monkeypatch.setattr(posterior, "fit_linear", functools.partial(fit_linear, steps=400, lr=0.02, weight_decay=0.0))
    return handed


def start(q, pairs, x_index, K, std=0.5):
    return start_posterior(q, pairs, x_index, K, seed=8, searches=5, std=std)


ROWS = torch.tensor([0, 1, 0, 2, 1, 3, 0])  # of the base's samples, to the inputs
TO_INPUTS = torch.tensor([0, 0, 0, 0, 0, 0, 5])


@pytest.mark.parametrize("K, z_dim", [(2, 0), (0, 0), (2, 1)])
def test_shares_are_those_of_the_samples_and_a_response_that_is_alone_is_labelled_by_the_linear_map(
        trained, clustered, K, z_dim):
    """Four responses to one input, of which two came up twice, clusters 0, 1, 0, 1: they are clustered once each. The
    same y to another input, where it is alone, is another response: it is not clustered, and its features are those of
    cluster 0. So 2 + 1 + 1 of 7 samples are of cluster 0. If K is not told it is that of the clusters."""
    clustered.K, q = 2, Posterior(trained[0], K, z_dim=z_dim)
    share, clusters = start(q, trained[1].rows(ROWS), TO_INPUTS, K)
    assert clustered.told == (K, 8, 5) and clusters[1:] == (0.1, 4, 0.75, 0.9)
    assert clustered.x_index.tolist() == [0, 0, 0, 0] and clustered.features.shape == (4, 128)
    assert clusters.r.argmax(dim=1).tolist() == [0, 1, 0, 1]
    for kept, original in enumerate((0, 1, 2, 3, 0)):
        row, want = clustered.pairs.ids[kept], trained[1].ids[original]
        assert row[row != PAD].tolist() == want[want != PAD].tolist()
    assert torch.allclose(share, torch.tensor([4 / 7, 3 / 7]), atol=0.01), share
    features = q.fit_statistics(clustered.pairs)
    label = q.cells(q.read(features)[0]) if z_dim else q.read(features).argmax(dim=1)
    assert label.tolist() == [0, 1, 0, 1, 0]


def test_the_last_two_layers_pooled_evenly_are_clustered(trained, clustered):
    """Of the features of a base of more layers, L C of either way of pooling, those before the last 2 C of the first
    half."""
    q = Posterior(trained[0])
    q.backbone.config.n_embd = 20
    start(q, trained[1].rows(slice(24)), torch.arange(24) // 4, K=3)
    features = q.fit_statistics(clustered.pairs)
    assert clustered.features.shape == (24, 40) and torch.equal(clustered.features, features[:, 88:128])


@pytest.mark.parametrize("K, words", [(3, "4 responses, of inputs that have several, are too few for 3 clusters"),
                                      (0, "2 responses, of inputs that have several, are too few for any clusters")])
def test_too_few_responses_that_have_a_sibling_are_one_line(trained, clustered, K, words):
    """However many are alone: here three."""
    few = slice(None) if K else torch.tensor([0, 1, 2, 6])
    rows, to_inputs = torch.cat((ROWS[few], torch.tensor([0, 0]))), torch.cat((TO_INPUTS[few], torch.tensor([6, 7])))
    with pytest.raises(SystemExit, match=f"^error: the base answers nearly every input in one way: {words}$"):
        start(Posterior(trained[0], K), trained[1].rows(rows), to_inputs, K)


def test_a_discrete_posterior_starts_at_the_clusters(trained, clustered):
    q = Posterior(trained[0])
    start(q, trained[1], torch.arange(512) // 2, K=3)
    logq = q.read(q.fit_statistics(trained[1]))
    assert (logq.exp()[torch.arange(512), torch.arange(512) % 3] > 0.95).all()


def share_of_space(q, K):
    z = torch.randn(20000, q.z_dim, generator=seeded(1))
    return q.cells(z).bincount(minlength=K) / 20000


def test_a_continuous_posterior_starts_at_the_centres_of_the_clusters(trained, clustered):
    """N(centre, std^2) in the dimensions of the centres, N(0, 1) in the others; every mean in its own cell, and cells
    that take as much of space as their clusters of the samples."""
    clustered.K, q = 4, Posterior(trained[0], z_dim=5)
    start(q, trained[1], torch.arange(512) // 2, K=4)
    mean, log_var = (part.detach() for part in q.read(q.fit_statistics(trained[1])))
    cluster = torch.arange(512) % 4
    assert torch.allclose(mean, q.cells.centres[cluster], atol=0.05) and torch.equal(q.cells(mean), cluster)
    assert torch.allclose((0.5 * log_var).exp(), torch.tensor([0.5, 0.5, 0.5, 1, 1]).expand(512, 5), atol=1e-3)
    assert torch.allclose(share_of_space(q, 4), torch.full((4,), 0.25), atol=0.015)


def test_cells_have_the_shares_of_the_samples_and_not_of_the_number_of_responses(trained, clustered):
    """Every response of the first of three clusters came up twice: half of all samples."""
    rows = torch.cat((torch.arange(510), torch.arange(0, 510, 3)))
    q = Posterior(trained[0], z_dim=2)
    share, _ = start(q, trained[1].rows(rows), rows // 2, K=3, std=0.3)
    assert torch.allclose(share, torch.tensor([0.5, 0.25, 0.25]), atol=1e-3)
    assert torch.allclose(share_of_space(q, 3), share, atol=0.015)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_states_that_tell_nothing_apart_are_said_and_not_clustered(value):
    """And never reported as searches that agree: features that are all alike, or not finite."""
    with pytest.raises(SystemExit, match="nothing tells different responses to an input apart") as exit:
        cluster_responses(torch.full((80, 16), value), torch.arange(80) // 4, 3, seed=0, searches=3)
    assert "\n" not in exit.value.code
