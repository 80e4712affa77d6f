"""What evaluate.py measures, and what it hands to the figures, against values that are known or computed twice."""
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import evaluate
import tasks
from evaluate import one_to_one_matching
from harness.parallel import seeded
from model import GPT, GPTConfig, as_pairs


def test_the_bound_is_the_same_whoever_the_samples_come_from(monkeypatch):
    """Many samples, most of them from a posterior that is narrower than the router and beside it, or hardly any: each
    is weighted as one of the mixture, and both bounds are the log of the same integral."""
    def log_likelihood(model, pairs, z):
        return -2 * (z - torch.tensor([0.5, -0.5])).square().sum(dim=2)

    monkeypatch.setattr(evaluate, "log_likelihood", log_likelihood)
    q = torch.tensor([[0.4, -0.2], [1.0, 0.5]]), torch.full((2, 2), -1.0)
    p = torch.tensor([[0.0, 0.0], [0.0, 1.0]]), torch.zeros(2, 2)
    # p(y) = integral of N(z; mean, I) exp(-2 |z - c|^2) = prod_d exp(-2 (mean - c)^2 / 5) / sqrt(5)
    want = math.log(5) + 0.4 * (p[0] - torch.tensor([0.5, -0.5])).square().sum(dim=1)
    for of_posterior, of_router in ((8, 56), (4000, 1000), (100, 20000)):
        found = evaluate.continuous_fidelity(None, None, q, p, 0, of_posterior, of_router)
        assert found["importance_samples"] == of_posterior + of_router
        assert torch.allclose(found["nll"], want, atol=0.5 if of_router == 56 else 0.05)


def test_a_linear_probe_finds_what_is_linear_and_nothing_in_permuted_labels():
    generator = torch.Generator().manual_seed(0)
    z, group = torch.randn(900, 2, generator=generator), torch.arange(900)
    centres = torch.tensor([[1.0, 0], [-0.5, 0.87], [-0.5, -0.87]])
    labels = torch.cdist(z, centres).argmin(dim=1)
    assert evaluate.linear_probe(z, labels, group, 3) > 0.98
    assert abs(evaluate.linear_probe(z, labels, group, 3, generator) - 1 / 3) < 0.06
    labels[1::4] = -1  # half of the scored ones follow no strategy
    assert 0.45 < evaluate.linear_probe(z, labels, group, 3) < 0.52
    wide, noise = torch.randn(200, 300, generator=generator), torch.randint(2, (200,), generator=generator)
    assert abs(evaluate.linear_probe(wide, noise, torch.arange(200), 2) - 0.5) < 0.2  # it learns others by heart


def test_a_router_that_chooses_by_x_has_the_shares_of_the_base_but_not_on_any_x():
    one_hot, uniform = torch.eye(3), torch.full((3, 3), 1 / 3)
    assert torch.allclose(one_hot.mean(dim=0), uniform[0])
    assert evaluate.total_variation(one_hot, uniform).tolist() == pytest.approx(3 * [2 / 3])
    assert evaluate.total_variation(0.9 * uniform, uniform).tolist() == pytest.approx(3 * [0.1])  # a tenth is no trace


def test_matching_equals_brute_force_over_permutations():
    """max over one-to-one matchings of sum_z C[z, pi(z)], also for more or fewer latents than strategies."""
    generator = torch.Generator().manual_seed(0)
    for K, S in ((3, 3), (5, 5), (2, 4), (6, 3), (1, 1)):
        for _ in range(20):
            C = torch.rand(K, S, generator=generator)
            small, large = min(K, S), max(K, S)
            wide = C if K <= S else C.T
            brute = max(sum(wide[i, p] for i, p in enumerate(perm))
                        for perm in itertools.permutations(range(large), small))
            score, matching = one_to_one_matching(C)
            used = [s for s in matching if s is not None]
            assert len(matching) == K and len(set(used)) == len(used) == small
            assert score == pytest.approx(brute.item())
            assert score == pytest.approx(sum(C[k, s].item() for k, s in enumerate(matching) if s is not None))


GRID = tasks.TASKS["grid_pathfinding"]


def forced(monkeypatch, strategies):
    """evaluate.controlled, where the z of every input give `strategies(i)`, the i-th input's list of K indices."""
    xs = evaluate.different_inputs(GRID, 20, "test")
    ys = [GRID.trace(x, GRID.strategies[s]) for i, x in enumerate(xs) for s in strategies(i)]
    K = len(strategies(0))
    tokenizer = tasks.Tokenizer(GRID.vocab, K)
    monkeypatch.setattr(evaluate, "sample_ys", lambda *args, **kwargs: ys)
    scores, C = evaluate.controlled(GPT(GPTConfig(len(tokenizer), K)), GRID, tokenizer, xs, 0)
    assert scores["controlled_parse_success"] == scores["controlled_final_answer_accuracy"] == 1
    names = ("alignment_one_to_one", "local_strategy_coverage_mean", "permutation_gap", "latent_purity")
    return [scores[name] for name in names], C


def test_a_label_swap_shows_in_alignment_and_not_in_coverage(monkeypatch):
    """Of three latents, two trade strategies on half of the inputs, and are right on the other half."""
    scores, C = forced(monkeypatch, lambda i: [0, 1, 2] if i % 2 else [1, 0, 2])
    assert scores == pytest.approx([2 / 3, 1, 1 / 3, 1 / 2])
    assert torch.allclose(C, torch.tensor([[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]]))


def test_alignment_counts_latents_that_share_a_strategy_and_strategies_without_a_latent(monkeypatch):
    assert forced(monkeypatch, lambda i: [0, 1, 2, 0, 1, 2])[0] == pytest.approx([1 / 2, 1, 1 / 2, 1])
    assert forced(monkeypatch, lambda i: [2, 0])[0] == pytest.approx([2 / 3, 1, 1 / 3, 1])


def test_local_coverage_counts_distinct_strategies_among_the_first_k():
    found = ["a", "b", None, None, "a", "b", "a", "a", "b", "b", None, "a"]  # 4 solutions to each of 3 inputs

    def coverage(K, S):
        metrics = evaluate.local_coverage(found, 4, K, S, "base_")
        return [metrics.pop(f"base_local_strategy_{key}") for key in ("coverage_mean", "full_coverage_rate")], metrics

    assert coverage(K=2, S=3) == (pytest.approx([(2 + 2 + 1) / 6, 2 / 3]), {})
    assert coverage(K=4, S=2) == ([1, 1], {})
    assert coverage(K=3, S=3) == (pytest.approx([(2 + 2 + 1) / 9, 0]), {})


@pytest.fixture(scope="module")
def factorization():
    """An untrained generator and router with large weights, and five inputs of three lengths with a solution each."""
    task = tasks.TASKS["sorting_algorithms"]
    tokenizer = tasks.Tokenizer(task.vocab, 3)
    torch.manual_seed(0)
    model = GPT(GPTConfig(len(tokenizer), 3, block_size=128, n_layer=2, n_head=2, n_embd=32)).requires_grad_(False)
    for p in model.parameters():
        p.normal_(std=0.2)
    xs = [tokenizer.split(x) for x in ("4 2 3 1", "2 6 1 3 5", "6 1 2 5 4 3", "4 3 2 1", "5 3 6 2 1")]
    ys = [task.trace(x, s) for x, s in zip(xs, task.strategies)]
    pairs = as_pairs([tokenizer.record(x, y) for x, y in zip(xs, ys)], [len(x) + 4 for x in xs])
    return model, tokenizer, xs, ys, pairs


def test_the_router_is_read_where_the_prompt_ends(factorization):
    """log p(z|x) from the logits after '<bos> <x> x </x> <z>', an input at a time."""
    model, tokenizer, xs, *_ = factorization
    found = evaluate.router(model, tokenizer, xs)
    for x, logp in zip(xs, found):
        prompt = [*tokenizer.prompt(x)[:-1], tasks.Z]
        alone = model(torch.tensor([prompt]))[0, -1, -3:].log_softmax(dim=0)
        assert torch.allclose(logp, alone, atol=1e-5)
    assert found.std(dim=0).min() > 0.02


def test_nll_is_the_exact_sum_over_z_of_router_and_generator(factorization):
    """-log sum_z p(z|x) p(y|x,z), a record and a z at a time."""
    model, tokenizer, xs, ys, pairs = factorization
    logp_z, logq = evaluate.router(model, tokenizer, xs), torch.full((5, 3), -math.log(3))
    found = evaluate.discrete_fidelity(model, pairs, logq, logp_z, torch.arange(5), 5)["nll"]
    for i, (x, y) in enumerate(zip(xs, ys)):
        total = 0.0
        for k in range(3):
            prompt = tokenizer.prompt(x, k)
            rest = tokenizer.record(x, y)[len(tokenizer.prompt(x)):]
            logp = model(torch.tensor([prompt + rest]))[0].log_softmax(dim=1)
            logp_y = sum(logp[len(prompt) + t - 1, token] for t, token in enumerate(rest))
            total = total + (logp_z[i, k] + logp_y).double().exp()
        assert found[i].item() == pytest.approx(-total.log().item(), rel=1e-4)


def test_what_the_posterior_knows_is_measured(factorization):
    """One posterior is right on three of five pairs, and sure of all; one that says the same of every pair knows
    nothing."""
    model, _, _, _, pairs = factorization
    labels, says = torch.tensor([2, 2, 0, 1, -1]), torch.tensor([0, 0, 1, 1, 2])
    uniform = torch.full((5, 3), -math.log(3))
    sure = F.one_hot(says, 3).float().clamp(min=1e-9).log()
    found = evaluate.discrete_fidelity(model, pairs, sure, uniform, labels, 3)
    assert found["posterior_alignment"] == pytest.approx(3 / 5)
    entropy = -sum(p * math.log(p) for p in (0.4, 0.4, 0.2))
    assert found["posterior_mutual_information"] == pytest.approx(entropy, abs=1e-4)
    assert found["posterior_entropy"] == pytest.approx(0, abs=1e-4)
    assert found["kl"] == pytest.approx(math.log(3), abs=1e-4)
    ignorant = uniform + torch.tensor([0.1, 0.0, -0.1])
    found = evaluate.discrete_fidelity(model, pairs, ignorant.log_softmax(dim=1), uniform, labels, 3)
    assert found["posterior_mutual_information"] == pytest.approx(0, abs=1e-5)


def test_the_router_is_compared_with_as_many_base_samples(monkeypatch):
    """The router gives the first strategy half of the time and the others a quarter, the base a third each."""
    xs = evaluate.different_inputs(GRID, 3, "test")
    tokenizer = tasks.Tokenizer(GRID.vocab, 3)
    samples = {"router": [0, 0, 1, 2] * 3, "base": [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2]}
    ys = {who: [GRID.trace(xs[i // 4], GRID.strategies[s]) for i, s in enumerate(found)]
          for who, found in samples.items()}
    ys["base"][0] = ["ans"]  # the base's first sample is no solution
    monkeypatch.setattr(evaluate, "router_sampled", lambda *args: (
        None, ys["router"], [GRID.strategies[s] for s in samples["router"]]))
    monkeypatch.setattr(evaluate, "sample_ys", lambda *args, **kwargs: ys["base"])
    model = GPT(GPTConfig(len(tokenizer), 3))
    found, shares, base_shares, *_ = evaluate.against_base(model, None, GRID, tokenizer, xs, 4, 0)
    assert shares == pytest.approx([1 / 2, 1 / 4, 1 / 4, 0])
    assert base_shares == pytest.approx([1 / 4, 1 / 3, 1 / 3, 1 / 12])
    assert found["sampled_strategy_total_variation"] == pytest.approx(1 / 4)
    assert found["sampled_final_answer_accuracy"] == 1
    assert found["base_final_answer_accuracy"] == found["base_parse_success"] == pytest.approx(11 / 12)
    # of the base's first three samples, the first input's show two strategies, the others' three
    assert found["base_local_strategy_coverage_mean"] == pytest.approx((2 / 3 + 1 + 1) / 3)


def test_probes_are_scored_on_other_inputs_and_centroids_compared(monkeypatch):
    """Posterior means at -1 and 1, z of the router at -0.5 and 1.5, all at a distance of 0.1 from their centroid."""
    groups = []
    monkeypatch.setattr(evaluate, "linear_probe", lambda z, labels, group, *args: groups.append(group.tolist()) or 1.0)
    off = torch.tensor([0.1, -0.1])
    means, labels = torch.cat((off - 1, off + 1))[:, None], torch.tensor([0, 0, 1, 1])
    z = torch.stack((off - 0.5, off + 1.5))[:, :, None]  # two inputs, two z each
    found = evaluate.semantics(means, labels, torch.tensor([0, 1, 0, 1]), z, 2 * [GRID.strategies[0]]
                              + 2 * [GRID.strategies[1]], GRID, 0)
    assert groups == [[0, 1, 0, 1]] * 2 + [[0, 0, 1, 1]] * 2
    assert found["centroid_separation"] == pytest.approx(2 / 0.1, rel=1e-4)
    assert found["sampled_centroid_separation"] == pytest.approx(2 / 0.1, rel=1e-4)
    assert found["centroid_distance"] == pytest.approx(0.5 / 0.1, rel=1e-4)


def test_inputs_and_strategies_are_read_back_from_records(factorization):
    """The x that a record was made of, and the strategy of its y; a solution that never ends follows none."""
    _, tokenizer, xs, _, pairs = factorization
    task = tasks.TASKS["sorting_algorithms"]
    found, labels = evaluate.strategies_of(task, tokenizer, pairs)
    assert found == xs and labels.tolist() == [0, 1, 2, 3, 4]
    ids = pairs.ids.clone()
    ids[2, pairs.starts[2] + 3:] = tasks.PAD
    found, labels = evaluate.strategies_of(task, tokenizer, pairs._replace(ids=ids))
    assert found == xs and labels.tolist() == [0, 1, -1, 3, 4]


def test_different_inputs_are_different_of_one_split_and_always_the_same():
    for split in ("train", "validation", "test"):
        xs = evaluate.different_inputs(GRID, 50, split)
        assert len({tuple(x) for x in xs}) == len(xs) == 50 and {GRID.split(x) for x in xs} == {split}
        assert evaluate.different_inputs(GRID, 50, split) == xs
        assert evaluate.different_inputs(GRID, 20, split) == xs[:20]
    small = tasks.TASK_FUNCTIONS["grid_pathfinding"](side=8, max_distance=3)
    assert 1 < len(evaluate.different_inputs(small, 64, "validation")) < 64  # as many as there are


def test_a_run_in_training_forces_every_z_on_validation_inputs(monkeypatch):
    """The metrics of `controlled` with its C, on inputs of no other split."""
    seen = []

    def controlled(model, task, tokenizer, xs, seed):
        seen.append((xs, seed, tokenizer.n_latents))
        return {"alignment_one_to_one": 0.5}, torch.eye(3)

    monkeypatch.setattr(evaluate, "controlled", controlled)
    model = GPT(GPTConfig(10 + len(GRID.vocab) + 3, 3))
    found = evaluate.during_training(model, None, GRID, None, 12, seed=7)
    assert found == {"alignment_one_to_one": 0.5, "strategy_by_latent": torch.eye(3).tolist()}
    (xs, seed, K), = seen
    assert len(xs) == 12 and {GRID.split(x) for x in xs} == {"validation"} and (seed, K) == (7, 3)


def test_a_run_in_training_reads_a_continuous_z_from_its_pool_and_from_at_most_32_inputs(monkeypatch):
    """Posterior means of the pool with the strategies of its own solutions, an input that came up twice as one; and
    what router samples for validation inputs gave."""
    tokenizer, handed = tasks.Tokenizer(GRID.vocab), {}
    a, b = evaluate.different_inputs(GRID, 2, "train")
    xs, strategies = [a, b, a, b], [0, 2, 1, None]
    ys = [["ans"] if s is None else GRID.trace(x, GRID.strategies[s]) for x, s in zip(xs, strategies)]
    pool = as_pairs([tokenizer.record(x, y) for x, y in zip(xs, ys)], [len(x) + 4 for x in xs])

    def router_sampled(model, task, tokenizer, xs, samples, generator):
        handed["xs"] = xs
        return torch.zeros(len(xs), samples, 2), None, len(xs) * (samples // 2) * [*GRID.strategies[:2]]

    def semantics(means, labels, x_index, z, found, task, seed):
        handed["means"], handed["labels"], handed["x_index"] = means, labels.tolist(), x_index.tolist()
        return {"sampled_z_probe_accuracy": 0.8}

    q = SimpleNamespace(all_features=lambda pairs: ("features of", pairs),
                        read=lambda features: ("means", "log variances") if features == ("features of", pool) else None)
    monkeypatch.setattr(evaluate, "router_sampled", router_sampled)
    monkeypatch.setattr(evaluate, "semantics", semantics)
    model = GPT(GPTConfig(len(tokenizer), z_dim=2))
    found = evaluate.during_training(model, q, GRID, pool, 40, seed=0)
    assert found == {"local_strategy_coverage_mean": pytest.approx(2 / 3), "local_strategy_full_coverage_rate": 0,
                     "sampled_z_probe_accuracy": 0.8}
    assert handed["means"] == "means" and handed["labels"] == [0, 2, 1, -1]
    first, second, *again = handed["x_index"]
    assert first != second and again == [first, second]
    assert len(handed["xs"]) == 32 and {GRID.split(x) for x in handed["xs"]} == {"validation"}


def test_a_map_has_the_strategy_of_every_z_of_the_plane_at_its_place(monkeypatch):
    """map[i, j] is of z = (-3 + i / 4, -3 + j / 4): the first strategy where z_1 > 1, else none where z_2 < 0, else the
    second."""
    xs = evaluate.different_inputs(GRID, 2, "test")
    tokenizer, turn = tasks.Tokenizer(GRID.vocab), iter(xs)

    def sample_ys(model, tokenizer, prompts, generator, temperature, z):
        x = next(turn)
        assert temperature == 0 and prompts == len(z) * [tokenizer.prompt(x, continuous=True)]
        first, second, _ = (GRID.trace(x, s) for s in GRID.strategies)
        return [first if z_1 > 1 else ["ans"] if z_2 < 0 else second for z_1, z_2 in z.tolist()]

    monkeypatch.setattr(evaluate, "sample_ys", sample_ys)
    maps, titles = evaluate.strategy_maps(None, GRID, tokenizer, xs)
    assert titles == [" ".join(x) for x in xs] and len(maps) == 2
    for found in maps:
        for i, j in itertools.product(range(25), repeat=2):
            z_1, z_2 = -3 + i / 4, -3 + j / 4
            assert found[i, j] == (0 if z_1 > 1 else 3 if z_2 < 0 else 1), (i, j)


def test_a_continuous_z_of_the_router_is_drawn_from_its_gaussian(monkeypatch):
    """20,000 z for each of two inputs: mean mu(x) and variance sigma^2(x); the y of z[i, s] is in place i n + s."""
    xs = evaluate.different_inputs(GRID, 2, "test")
    tokenizer, n = tasks.Tokenizer(GRID.vocab), 20_000
    mean, log_var = torch.tensor([[1.0, -2.0], [0.0, 3.0]]), torch.tensor([[0.0, 2.0], [-2.0, 1.0]])
    monkeypatch.setattr(evaluate, "router", lambda *args: (mean, log_var))
    monkeypatch.setattr(evaluate, "sample_ys", lambda model, tokenizer, prompts, generator, z: [
        GRID.trace(x, GRID.strategies[int(v[1] > 0)]) for x, v in zip([x for x in xs for _ in range(n)], z)])
    z, _, found = evaluate.router_sampled(GPT(GPTConfig(len(tokenizer), z_dim=2)), GRID, tokenizer, xs, n, seeded(0))
    assert torch.allclose(z.mean(dim=1), mean, atol=0.1) and torch.allclose(z.var(dim=1).log(), log_var, atol=0.1)
    assert found == [GRID.strategies[s] for s in (z[..., 1] > 0).flatten().long().tolist()]
