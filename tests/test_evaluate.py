"""What evaluate.py measures, and what it hands to the figures, against values that are known or computed twice."""
import dataclasses
import itertools
import math
import random
import statistics
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
    for p_model, want in ((one_hot, 2 / 3), (0.9 * uniform, 0.1)):  # a tenth is no trace
        metrics, *_ = evaluate.router_at_work(one_hot.log(), p_model, uniform, 3 * ["a"])
        assert metrics["strategy_total_variation_per_input"] == pytest.approx(want)


def test_matching_equals_brute_force_over_permutations():
    """max over one-to-one matchings of sum_z C[z, pi(z)], also for more or fewer latents than strategies, and where
    several matchings are equally good."""
    generator = torch.Generator().manual_seed(0)
    for K, S in ((3, 3), (5, 5), (2, 4), (6, 3), (1, 1), (1, 3), (4, 1)):
        for values in 10 * (None, 1, 2, 0):  # C of any shares, of 0 and 1, of halves, of nothing
            C = torch.rand(K, S, generator=generator)
            C = C if values is None else C.mul(values).round() / max(values, 1)
            small, large = min(K, S), max(K, S)
            wide = C if K <= S else C.T
            brute = max(sum(wide[i, p] for i, p in enumerate(perm))
                        for perm in itertools.permutations(range(large), small))
            score, matching = one_to_one_matching(C)
            used = [s for s in matching if s is not None]
            assert len(matching) == K and len(set(used)) == len(used) == small
            assert score == pytest.approx(brute.item())
            assert score == pytest.approx(sum(C[k, s].item() for k, s in enumerate(matching) if s is not None))
    order = torch.randperm(40, generator=generator)  # as many as nobody could try one by one
    assert one_to_one_matching(0.5 * torch.eye(40)[order] + 0.4 * torch.rand(40, 40, generator=generator))[1] == \
        order.tolist()


GRID = tasks.TASKS["grid_pathfinding"]


def forced(strategies, task=GRID, xs=None):
    """evaluate.controlled, where the z of every input give `strategies(i)`, the i-th input's list of K indices."""
    xs = xs or evaluate.different_inputs(task, 20, "test")
    ys = [task.trace(x, task.strategies[s]) for i, x in enumerate(xs) for s in strategies(i)]
    scores, C = evaluate.controlled(task, xs, ys)
    assert scores["controlled_parse_success"] == scores["controlled_final_answer_accuracy"] == 1
    names = ("alignment_one_to_one", "local_strategy_coverage_mean", "permutation_gap", "latent_purity")
    return [scores[name] for name in names], C


def test_a_label_swap_shows_in_alignment_and_not_in_coverage():
    """Of three latents, two trade strategies on half of the inputs, and are right on the other half."""
    scores, C = forced(lambda i: [0, 1, 2] if i % 2 else [1, 0, 2])
    assert scores == pytest.approx([2 / 3, 1, 1 / 3, 1 / 2])
    assert torch.allclose(C, torch.tensor([[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]]))


def test_alignment_counts_latents_that_share_a_strategy_and_strategies_without_a_latent():
    assert forced(lambda i: [0, 1, 2, 0, 1, 2])[0] == pytest.approx([1 / 2, 1, 1 / 2, 1])
    assert forced(lambda i: [2, 0])[0] == pytest.approx([2 / 3, 1, 1 / 3, 1])


def test_local_coverage_counts_distinct_strategies_among_the_first_k():
    found = ["a", "b", None, None, "a", "b", "a", "a", "b", "b", None, "a"]  # 4 solutions to each of 3 inputs

    def coverage(K, S):
        metrics = evaluate.local_coverage(found, 4, K, S if type(S) is list else 3 * [S], "base_")
        return [metrics.pop(f"base_local_strategy_{key}") for key in ("coverage_mean", "full_coverage_rate")], metrics

    assert coverage(K=2, S=3) == (pytest.approx([(2 + 2 + 1) / 6, 2 / 3]), {})
    assert coverage(K=4, S=2) == ([1, 1], {})
    assert coverage(K=3, S=3) == (pytest.approx([(2 + 2 + 1) / 9, 0]), {})
    assert coverage(K=3, S=[2, 3, 1]) == (pytest.approx([(1 + 2 / 3 + 1) / 3, 2 / 3]), {})  # S there are on each x


def test_information_is_that_of_the_joint_distribution():
    """sum p(r, c) log p(r, c) / p(r) p(c), by loops, with entries of 0."""
    generator = torch.Generator().manual_seed(0)

    def brute_force(p):
        joint = {(r, c): p[r][c] / len(p) for r in range(len(p)) for c in range(len(p[0]))}
        columns = [sum(joint[r, c] for r in range(len(p))) for c in range(len(p[0]))]
        return sum(each * math.log(each * len(p) / columns[c]) for (r, c), each in joint.items() if each)

    for rows, columns in ((5, 4), (2, 6), (1, 3), (7, 2)):
        p = torch.rand(rows, columns, generator=generator) * (torch.rand(rows, columns, generator=generator) > 0.4)
        p[:, 0] += 0.1
        p = p / p.sum(dim=1, keepdim=True)
        assert evaluate.information(p) == pytest.approx(brute_force(p.tolist()), abs=1e-5)
    assert evaluate.information(torch.eye(3)) == pytest.approx(math.log(3))
    assert evaluate.information(torch.tensor([[0.2, 0.8]] * 4)) == pytest.approx(0, abs=1e-6)


def test_what_the_router_knows_is_told_from_what_it_knows_of_the_kind():
    """Three inputs of kind b and one of a. The base follows the first strategy on a and the second on b, in 4 of 5
    samples (the fifth follows none); a router knows that, or nothing, or what has nothing to do with the kind."""
    kinds, of_kind = ["b", "a", "b", "b"], torch.tensor([[0.0, 1], [1, 0], [0, 1], [0, 1]])
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    uniform, other = torch.full((4, 2), 0.5), torch.tensor([[1.0, 0], [0.5, 0.5], [0, 1], [0.5, 0.5]])
    for p_z, informed, of_it in ((of_kind, entropy, entropy), (uniform, 0, 0), (other, 0.5 * math.log(2), 0)):
        metrics, names, by_router, by_base = evaluate.router_at_work(p_z.clamp(min=1e-9).log(), uniform, 0.8 * of_kind,
                                                                     kinds)
        assert evaluate.information(p_z) == pytest.approx(informed, abs=1e-5)
        assert metrics == {name: pytest.approx(value, abs=1e-5) for name, value in {
            "router_kind_information": of_it, "base_kind_information": entropy,
            "strategy_total_variation_per_input": (0.3 + 0.5 + 0.2) / 2}.items()}
        assert names == ["a", "b"] and torch.allclose(by_base, torch.eye(2))
        want = torch.stack((p_z[1], p_z[[0, 2, 3]].mean(dim=0)))
        assert torch.allclose(by_router, want, atol=1e-6)


def test_a_trace_is_as_probable_as_all_its_wordings_and_is_shared_by_strategies_that_coincide(monkeypatch):
    """Of base and factorization, a record and a z at a time; a strategy that the data lacks has 0."""
    task = dataclasses.replace(tasks.TASK_FUNCTIONS["list_summation"](2, 4), separators=(";", ","), commute=True,
                               distinct=False, weights={"2 numbers": [1, 1, 1], "3 numbers": [1, 1, 0],
                                                        "4 numbers": [1, 0, 1]})
    task = dataclasses.replace(task, vocab=(*task.vocab, ","))
    torch.manual_seed(0)
    tokenizer, plain = tasks.Tokenizer(task.vocab, 2), tasks.Tokenizer(task.vocab)
    base, model = (GPT(GPTConfig(len(each), each.n_latents, block_size=48, n_layer=1, n_head=2, n_embd=16))
                   for each in (plain, tokenizer))
    for p in (*base.parameters(), *model.parameters()):
        p.requires_grad_(False).normal_(std=0.3)
    xs = [x.split() for x in ("3 5", "4 4", "1 2 3", "2 5 2", "3 5 2 7")]
    alike = torch.tensor([[3.0, 3, 3], [3, 3, 3], [1, 1, 0], [2, 2, 0], [1, 0, 1]])  # strategies that leave it, if any

    def log_p(network, prompt, rest):
        logp = network(torch.tensor([prompt + rest]))[0].double().log_softmax(dim=1)
        return sum(logp[len(prompt) + t - 1, token] for t, token in enumerate(rest))

    logp_z, rng = evaluate.router(model, tokenizer, xs), random.Random(0)
    want = torch.zeros(2, 5, 3)
    for (i, x), s in itertools.product(enumerate(xs), range(3)):
        for y in {tuple(task.word(task.trace(x, task.strategies[s]), rng)[0]) for _ in range(1000)}:
            rest = plain.record(x, y)[len(plain.prompt(x)):]
            of_model = sum((logp_z[i, k] + log_p(model, tokenizer.prompt(x, k), rest)).exp() for k in range(2))
            want[:, i, s] += torch.tensor([log_p(base, plain.prompt(x), rest).exp(), of_model])
    monkeypatch.setattr(tasks.Task.wordings, "__defaults__", (64,))
    p, parts = evaluate.strategy_probabilities(model, base, task, tokenizer, xs)
    assert p.shape == (3, 5, 3) and torch.allclose(p, parts * alike)
    found = torch.stack((parts[0], torch.einsum("nk,kns->ns", logp_z.exp(), parts[1:])))
    there = (alike > 0).expand(2, 5, 3)
    assert torch.equal(found > 0, there)
    assert torch.allclose((found * alike)[there].log(), want[there].log(), atol=1e-3)


def test_exact_alignment_is_the_probability_that_forced_z_gives_its_strategy():
    """Averaged over z and inputs, its product over z, both of the strategies that are there; a latent too many and one
    too few count as nothing."""
    generator = torch.Generator().manual_seed(0)
    for K, S, matching in ((3, 3, [2, 0, 1]), (4, 3, [1, None, 0, 2]), (2, 3, [2, 0])):
        p, there = torch.rand(K, 5, S, generator=generator), torch.ones(5, S) > 0
        there[3, 0] = there[4, 1] = False
        kinds, want, coverage = ["a b", "c", "c", "a b", "c"], [], []
        for x in range(5):
            served = {s: p[z, x, s].item() for z, s in enumerate(matching) if s is not None}
            own = [served.get(s, 0.0) for s in range(S) if there[x, s]]
            want.append(sum(own) / (len(own) + max(0, K - S)))
            coverage.append(math.prod(own))
        metrics = evaluate.exact_alignment(p, there, matching, kinds)
        assert metrics == {name: pytest.approx(value, abs=1e-6) for name, value in {
            "exact_alignment": statistics.mean(want), "exact_full_coverage": statistics.mean(coverage),
            "exact_alignment_error": statistics.stdev(want) / math.sqrt(5),
            "exact_alignment_on_a_b": (want[0] + want[3]) / 2,
            "exact_alignment_on_c": (want[1] + want[2] + want[4]) / 3}.items()}
    assert evaluate.exact_alignment(p, there, matching, 5 * ["a"]).keys() == {
        "exact_alignment", "exact_alignment_error", "exact_full_coverage"}


def test_a_strategy_is_asked_for_only_on_inputs_where_the_data_has_it():
    """Of wide inputs the data has no alternating trace: there, the third latent gives one all the same, or another."""
    task = dataclasses.replace(GRID, weights={"wide": [1, 1, 0], "tall or square": [1, 1, 1]})
    xs = evaluate.different_inputs(task, 20, "test")
    wide = [task.kind(x) == "wide" for x in xs]
    share = sum(wide) / 20
    assert 0.2 < share < 0.8
    scores, C = forced(lambda i: [0, 1, 2], task)
    assert scores == pytest.approx([1, 1, 0, 1]) and torch.equal(C, torch.eye(3))
    scores, C = forced(lambda i: [0, 1, 0 if wide[i] else 2], task)
    assert scores == pytest.approx([1, 1, 0, 1])
    assert torch.allclose(C, torch.tensor([[1, 0, 0], [0, 1, 0], [share, 0, 1]]))
    scores, C = forced(lambda i: [2, 1, 2], task)  # the first latent gives nothing that wide inputs have
    assert torch.allclose(C, torch.tensor([[0, 0, 1], [0, 1, 0], [0, 0, 1.0]]))
    assert scores == pytest.approx([2 / 3, share / 2 + (1 - share) * 2 / 3, share / 2 + (1 - share) * 2 / 3 - 2 / 3, 1])


def test_a_solution_of_several_strategies_is_that_of_the_one_which_its_latent_means():
    """One cell to go in either direction: right-first and alternating coincide. A latent that means neither has the
    first."""
    task = dataclasses.replace(GRID, distinct=False)
    xs = [x.split() for x in ("3 4 to 4 5", "1 1 to 2 2", "3 4 to 5 6", "3 4 to 6 6")]
    scores, C = forced(lambda i: [2, 1, 0], task, xs)
    assert scores == pytest.approx([1, 1, 0, 1])
    assert torch.allclose(C, torch.tensor([[0.5, 0, 1], [0, 1, 0], [1, 0, 0.5]]))
    scores, C = forced(lambda i: [2, 1, 0 if i < 2 else 1], task, xs)
    #  the third latent means right-first: on the first two inputs it gives that, and the first one alternating
    assert C[2].tolist() == [0.5, 0.5, 0.5]
    assert scores == pytest.approx([(1 + 1 + 0.5) / 3, (1 + 1 + 2 / 3 + 2 / 3) / 4, 0, 0.5])


def test_without_labels_different_solutions_are_counted_and_latents_recognised(monkeypatch):
    """q reads the strategy's index from a record of the base, or the last where it follows none. Of the first input,
    three solutions are right; of the second, two are the same, and a third is right but for a latent token: q never
    sees that, nor more than a block. A y is plausible if the base's surprise is no nat above that of z and y."""
    xs = evaluate.different_inputs(GRID, 2, "test")
    plain = tasks.Tokenizer(GRID.vocab)
    a, b = ([GRID.trace(x, s) for s in GRID.strategies] for x in xs)
    base, model = GPT(GPTConfig(len(plain), block_size=64)), GPT(GPTConfig(len(plain) + 3, 3, block_size=64))
    seen, tokenizer = [], tasks.Tokenizer(GRID.vocab, 3)

    def surprise(pairs):  # of tokens that are likely, and in every other pair unlikely
        return pairs.ids * 0 + 0.5 + 5.0 * (torch.arange(6) % 2)[:, None]

    def read(pairs):
        seen.append(pairs)
        _, labels = evaluate.strategies_of(GRID, plain, pairs)
        return F.one_hot(labels % 3, 3).float()  # -1 is the last

    def scores(*ys):
        q = SimpleNamespace(all_features=lambda pairs: pairs, read=read)
        found = evaluate.without_labels(model, q, base, GRID, tokenizer, xs, list(ys))
        logp_y = evaluate.log_likelihood(model, seen[-1]).view(2, 3, 3).diagonal(dim1=1, dim2=2)  # of its own z
        logp_z = evaluate.router(model, tokenizer, xs)
        excess = logp_z + logp_y + seen[-1].b.sum(dim=1).view(2, 3)
        assert found.pop("plausible_outputs") == pytest.approx((excess < 1).float().mean().item())
        assert 0 < (excess < 1).sum() < 6
        return found

    monkeypatch.setattr(evaluate, "score_base", lambda model, pairs: surprise(pairs) if model is base else None)
    found = scores(*a, b[0], b[0], [*b[2], "<z3>"])
    assert found == {"distinct_outputs": pytest.approx(5 / 6), "consistency": pytest.approx(5 / 6)}
    records = [plain.record(xs[0], y) for y in a] + 2 * [plain.record(xs[1], b[0])] + [plain.record(xs[1], b[2])]
    assert [[t for t in row if t] for row in seen[0].ids.tolist()] == records
    assert seen[0].starts.tolist() == 6 * [len(plain.prompt(xs[0]))] and torch.equal(seen[0].b, surprise(seen[0]))
    found = scores(a[1], a[1], a[1], b[1], b[2], 70 * ["right"])
    assert found == {"distinct_outputs": pytest.approx(4 / 6), "consistency": pytest.approx(2 / 6)}
    assert seen[1].ids.shape == (6, 64)


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
    """-log sum_z p(z|x) p(y|x,z), a record and a z at a time; and the mean of the same with the mean of p(z|x) over all
    records in its place."""
    model, tokenizer, xs, ys, pairs = factorization
    logp_z, logq = evaluate.router(model, tokenizer, xs), torch.full((5, 3), -math.log(3))
    scores = evaluate.discrete_fidelity(model, pairs, logq, logp_z, torch.arange(5), torch.ones(5), 5)
    found, mean_router, nll_of_mean = scores["nll"], logp_z.exp().mean(dim=0), []
    for i, (x, y) in enumerate(zip(xs, ys)):
        total = of_mean = 0.0
        for k in range(3):
            prompt = tokenizer.prompt(x, k)
            rest = tokenizer.record(x, y)[len(tokenizer.prompt(x)):]
            logp = model(torch.tensor([prompt + rest]))[0].log_softmax(dim=1)
            logp_y = sum(logp[len(prompt) + t - 1, token] for t, token in enumerate(rest))
            total = total + (logp_z[i, k] + logp_y).double().exp()
            of_mean = of_mean + mean_router[k] * logp_y.double().exp()
        assert found[i].item() == pytest.approx(-total.log().item(), rel=1e-4)
        nll_of_mean.append(-of_mean.log().item())
    assert scores["nll_of_mean_router"] == pytest.approx(sum(nll_of_mean) / 5, abs=1e-4)
    assert abs(scores["nll_of_mean_router"] - found.mean().item()) > 1e-3


def test_what_the_posterior_knows_is_measured(factorization):
    """One posterior is right on three of five pairs, and sure of all; one that says the same of every pair knows
    nothing."""
    model, _, _, _, pairs = factorization
    labels, says = torch.tensor([2, 2, 0, 1, -1]), torch.tensor([0, 0, 1, 1, 2])
    uniform = torch.full((5, 3), -math.log(3))
    sure = F.one_hot(says, 3).float().clamp(min=1e-9).log()
    found = evaluate.discrete_fidelity(model, pairs, sure, uniform, labels, torch.ones(5), 3)
    assert found["posterior_alignment"] == pytest.approx(3 / 5)
    entropy = -sum(p * math.log(p) for p in (0.4, 0.4, 0.2))
    assert found["posterior_mutual_information"] == pytest.approx(entropy, abs=1e-4)
    assert found["posterior_entropy"] == pytest.approx(0, abs=1e-4)
    assert found["kl"] == pytest.approx(math.log(3), abs=1e-4)
    ignorant = uniform + torch.tensor([0.1, 0.0, -0.1])
    found = evaluate.discrete_fidelity(model, pairs, ignorant.log_softmax(dim=1), uniform, labels, torch.ones(5), 3)
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
    found = evaluate.against_base(model, None, dataclasses.replace(GRID, weights=[1, 1, 0]), tokenizer, xs, 4, 0)[0]
    assert found["base_local_strategy_coverage_mean"] == pytest.approx((1 / 2 + 1 + 1) / 3)  # of two that there are


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


def test_of_a_file_only_solutions_that_it_labels_are_counted(factorization, monkeypatch):
    """A task knows all of its traces, and a y that follows none is wrong; a file may lack a y or its label, and what
    the strategy of that is nobody knows. A posterior that is right where there is a label, and a probe of such a z."""
    file = dataclasses.replace(GRID, records={})
    z, labels = torch.randn(400, 2, generator=torch.Generator().manual_seed(0)), torch.arange(400) % 2
    z[labels == 1] += 8
    labels[100:] = torch.where(torch.arange(300) % 3 == 0, labels[100:], -1)
    found, x_index = [None if s < 0 else GRID.strategies[s] for s in labels.tolist()], torch.arange(400) // 4
    for task, least, most in (GRID, 0, 0.6), (file, 0.99, 1):
        scores = evaluate.semantics(z, labels, x_index, z.view(100, 4, 2), found, task, 0)
        assert least <= scores["posterior_mu_probe_accuracy"] <= most
        assert least <= scores["sampled_z_probe_accuracy"] <= most
    scores = evaluate.semantics(z, labels, torch.where(labels < 0, 1, 0), z.view(100, 4, 2), found, file, 0)
    assert "posterior_mu_probe_accuracy" not in scores and "sampled_z_probe_accuracy" in scores

    model, tokenizer, xs, _, pairs = factorization
    labels = torch.tensor([0, 1, 2, -1, -1])
    monkeypatch.setattr(evaluate, "sample_pairs", lambda *args: pairs)
    monkeypatch.setattr(evaluate, "strategies_of", lambda *args: (xs, labels))
    sure = F.one_hot(torch.tensor([0, 1, 2, 0, 0]), 3).float().clamp(min=1e-9).log()
    q = SimpleNamespace(all_features=lambda pairs: None, read=lambda features: sure)
    for task, want in (tasks.TASKS["sorting_algorithms"], 3 / 5), (file, 1):
        got = evaluate.held_out(model, q, None, task, tokenizer, xs, 5, 1.0, 0)[0]
        assert got["posterior_alignment"] == pytest.approx(want)


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

    def sample_ys(model, tokenizer, prompts, generator):
        seen.append((prompts, generator.initial_seed(), tokenizer))
        return [GRID.trace(x, s) for x in xs for s in GRID.strategies]

    xs = evaluate.different_inputs(GRID, 12, "validation")
    monkeypatch.setattr(evaluate, "sample_ys", sample_ys)
    model = GPT(GPTConfig(10 + len(GRID.vocab) + 3, 3))
    found = evaluate.during_training(model, None, GRID, None, 12, seed=7)
    assert found["alignment_one_to_one"] == 1 and found["strategy_by_latent"] == torch.eye(3).tolist()
    (prompts, seed, tokenizer), = seen
    assert prompts == [tokenizer.prompt(x, k) for x in xs for k in range(3)] and seed == 7
    assert {GRID.split(x) for x in xs} == {"validation"} and tokenizer.n_latents == 3


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
    found = evaluate.during_training(model, q, dataclasses.replace(GRID, weights=[1, 1, 0]), pool, 40, seed=0)
    assert found["local_strategy_coverage_mean"] == 1  # of the two strategies that the data has


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
