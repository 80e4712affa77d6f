"""The real loops, in process, on configs/tiny_*.py; and the same programs as a user starts them."""
import dataclasses
import itertools
import json
import math
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys

import pytest
import torch

import configs
import evaluate
import factorize
import figures
import losses
import metrics
import tasks
import train_base
from conftest import ROOT
from parallel import seeded

SHORT = ["configs/tiny_discrete.py", "--steps=4", "--held_steps=1", "--responsibility_steps=2", "--eval_every=2",
         "--cluster_inputs=16", "--cluster_responses=6", "--cluster_restarts=4", "--slot_steps=2", "--pool_size=32",
         "--eval_inputs=8", "--eval_samples=2", "--look_inputs=4", "--chunks=1", "--overwrite=True"]


def run(name, *flags):
    """Factorizes in process; returns (log entries without the clock, weights of the generator)."""
    folder = factorize.factorize(configs.load(factorize, [*SHORT, f"--name={name}", *flags]))
    with open(os.path.join(folder, "log.jsonl")) as f:
        log = [json.loads(line) for line in f]
    for entry in log:
        entry.pop("minutes")
    return log, torch.load(os.path.join(folder, "ckpt.pt"), weights_only=True)["model"]


def same(a, b):
    return all(torch.equal(a[key], b[key]) for key in a)


def program(*argv, cwd):
    """Runs a script as a user would; returns (exit code, output, lines on stderr)."""
    command = [sys.executable, os.path.join(ROOT, argv[0]), *argv[1:]]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr.strip().splitlines()


@pytest.fixture(scope="module")
def reference(workplace):
    return run("reference")


def test_the_base_learns_and_its_checkpoint_holds_c_base(workplace):
    """The held-out NLL falls, stays above the entropy of the mixture, log S, and is stored as c_base."""
    with open("out/tiny_base/log.jsonl") as f:
        first, *_, last = [json.loads(line) for line in f]
    assert first["nll"] > last["nll"] > math.log(3) - 0.05
    assert torch.load("out/tiny_base/ckpt.pt", weights_only=True)["c_base"] == last["nll"]


def test_a_batch_in_pieces_trains_the_base_like_a_whole_one(workplace):
    nll = {}
    for chunks in (1, 3):
        train_base.train(configs.load(train_base, ["configs/tiny_base.py", "--name=pieces", "--overwrite=True",
                                                   "--steps=8", "--warmup=0", f"--chunks={chunks}"]))
        with open("out/pieces/metrics.json") as f:
            nll[chunks] = json.load(f)["nll"]
    assert nll[3] == pytest.approx(nll[1], rel=1e-3)


def test_a_mixture_weighs_the_records_of_every_input(workplace):
    """Strategies of next to no weight change nothing, wherever they stand in the batch: loss, floor and gradient."""
    def scores(weights, batch_size):
        train_base.train(configs.load(train_base, [
            "configs/tiny_base.py", "--name=mixture", "--overwrite=True", "--steps=8", "--warmup=0",
            f"--strategy_weights={weights}", f"--batch_size={batch_size}"]))
        with open("out/mixture/log.jsonl") as f:
            return [json.loads(line) for line in f][-1]

    alone, among = scores([0.0, 3.0, 0.0], 10), scores([1e-9, 3.0, 1e-9], 30)
    assert among["loss"] == pytest.approx(alone["loss"], rel=1e-3)  # after 7 equal steps
    assert among["floor"] == pytest.approx(alone["floor"], abs=1e-6) == 0
    assert scores([1.0, 2.0, 1.0], 30)["floor"] == pytest.approx(1.5 * math.log(2))


def test_three_of_four_training_inputs_are_cropped(workplace, monkeypatch):
    lengths, score = [], train_base.score_base

    def spy(model, ids, starts):
        lengths.append((ids != 0).sum(dim=1) - starts)
        return score(model, ids, starts)

    monkeypatch.setattr(train_base, "score_base", spy)
    train_base.train(configs.load(train_base, ["configs/tiny_base.py", "--name=crop", "--steps=1", "--crop=5"]))
    training, *validation = lengths
    assert (training == 5).sum() == 21 and (training > 5).sum() == 9  # 10 inputs of 3 records
    assert all((held_out > 5).all() for held_out in validation)


def test_the_same_seed_gives_the_same_log_and_weights(reference):
    log, weights = run("again")
    assert log == reference[0] and same(weights, reference[1])


def test_a_base_trained_just_now_is_as_good_as_one_from_disk(workplace, tmp_path):
    """The factorization's weights do not depend on whether its process has trained the base before."""
    with open("configs/tiny_base.py") as f:
        (tmp_path / "new_base.py").write_text(f.read() + "steps = 2\nfinal_eval_size = 8\n")
    base = f"--base={tmp_path / 'new_base.py'}"
    first = run("first", base)
    again = run("first", base)
    assert first[0] == again[0] and same(first[1], again[1])


def test_another_seed_gives_another_log(reference):
    assert run("other", "--seed=1")[0] != reference[0]


def test_no_label_reaches_training(reference, monkeypatch):
    """Renaming and permuting the strategies changes what alignment is called, and not one weight."""
    grid = tasks.TASK_FUNCTIONS["grid_pathfinding"]

    def relabelled(**sizes):
        task = grid(**sizes)
        names = list(task.steps)
        return tasks.Task(task.name, task.vocab, task.draw, task.check, task.answer,
                          {f"s{i}": task.steps[names[(i + 1) % 3]] for i in range(3)})

    monkeypatch.setitem(tasks.TASK_FUNCTIONS, "grid_pathfinding", relabelled)
    assert same(run("relabelled")[1], reference[1])


def test_a_loss_at_weight_zero_takes_no_part(reference, monkeypatch):
    """Whatever the losses say that weigh nothing by default, even NaN, training is the same; the log has it."""
    for name in ("token_weighted_nll", "posterior_entropy", "router_marginal_kl", "inter_latent_jsd"):
        monkeypatch.setattr(losses, name, lambda *args, loss=getattr(losses, name): math.nan * loss(*args))
    log, weights = run("zeros")
    assert same(weights, reference[1]) and log[-1]["objective"] == reference[0][-1]["objective"]
    for term in ("token_weighted", "posterior_entropy", "router_marginal_kl", "jsd"):
        assert math.isnan(log[-1][term]) and math.isfinite(reference[0][-1][term])


def test_the_objective_of_every_stage(reference):
    """J from the logged raw terms: held, two steps of responsibilities, the ELBO."""
    c_base = torch.load("out/tiny_base/ckpt.pt", weights_only=True)["c_base"]
    for entry, q_learns, elbo in zip(reference[0], (0, 1, 1, 0), (0, 0, 0, 1), strict=True):
        assert entry["objective"] == pytest.approx(
            entry["reconstruction"] / c_base + 0.1 * entry["router_support"] + elbo * 0.1 * entry["kl"]
            + (1 - elbo) * entry["router_distillation"] + q_learns * entry["posterior_distillation"], rel=1e-5)
        assert min(entry[term] for term in ("router_support", "kl", "posterior_distillation")) > 1e-4


@pytest.mark.parametrize("term", ["token_weighted", "posterior_entropy", "router_support", "router_marginal_kl", "jsd"])
def test_every_loss_can_be_switched_on_and_takes_its_share(reference, term):
    log, _ = run(term, "--router_support_weight=0", f"--{term}_weight=0.7", "--cluster_inputs=0", "--held_steps=0",
                 "--responsibility_steps=0")
    c_base = torch.load("out/tiny_base/ckpt.pt", weights_only=True)["c_base"]
    for entry in log:  # latents should differ: their divergence is the one term to be raised
        assert entry["objective"] == pytest.approx(entry["reconstruction"] / c_base + 0.1 * entry["kl"]
                                                   + (-0.7 if term == "jsd" else 0.7) * entry[term], rel=1e-5)
    if term != "router_marginal_kl":  # a router that starts uniform owes nothing yet
        assert any(entry[f"loss_fraction_{term}"] > 0 for entry in log)
    fractions = [value for key, value in log[-1].items() if key.startswith("loss_fraction_")]
    assert sum(fractions) == pytest.approx(1)


def test_labels_are_the_posteriors_while_held_and_the_generators_afterwards(workplace):
    """T = softmax(held_alpha log q), then Sinkhorn(log p / tau + alpha log q) over the pool: pair by pair, in order."""
    cfg = configs.load(factorize, [*SHORT, "--held_steps=5", "--held_alpha=3", "--tau=0.7", "--alpha=2"])
    base, task, _ = factorize.get_base(cfg)
    pool = factorize.draw_pairs(base, task, factorize.Tokenizer(task.vocab), 32, 1, "labels")
    torch.manual_seed(0)
    model = base.with_latents(3, pool, steps=1).requires_grad_(False)
    model.embed.weight[-3:] += torch.randn(3, 64)
    q, prior = factorize.Posterior(base, 3), torch.full((3,), -math.log(3))
    q.fit_statistics(pool)
    one = [pool.rows(torch.tensor([i])) for i in range(32)]
    logq = torch.cat([q(pair) for pair in one]).detach()
    logp = torch.cat([-factorize.score_latents(model, pair.ids, pair.starts)[0].sum(dim=2) for pair in one])
    got_q, held = factorize.label(model, q, pool, cfg, 4, prior)
    assert torch.allclose(got_q, logq, atol=1e-4) and torch.allclose(held, (3 * logq).log_softmax(dim=1), atol=1e-3)
    _, later = factorize.label(model, q, pool, cfg, 5, prior)
    want = factorize.losses.balanced_responsibilities(logp / 0.7 + 2 * logq, prior)
    assert torch.allclose(later.exp(), want.exp(), atol=1e-3) and logp.std() > 0.1 and logq.std() > 0.1


@pytest.mark.parametrize("z_dim", [0, 2])
def test_every_pair_is_trained_on_its_own_label(workplace, monkeypatch, z_dim):
    """Labels that are a function of the pair's tokens arrive at the generator beside these tokens."""
    def of(pairs):
        return pairs.ids.sum(dim=1) % 3

    def label(model, q, pool, *more):
        log_t = torch.nn.functional.one_hot(of(pool), 3).float().log().clamp(min=-1e4)
        return log_t, log_t

    def tile(q, pool, *more):
        return *q(pool), of(pool)[:, None].expand(-1, 2).float()

    def spy(model, batch, z, *more):
        arrived.append((batch.ids.tolist(), z[:, -1] if z_dim == 0 else z[:, -1, 0], of(batch)))
        return score_batch(model, batch, z, *more)

    arrived, score_batch = [], factorize.score_batch
    for name, replaced in (("label", label), ("tile", torch.no_grad()(tile)), ("score_batch", spy)):
        monkeypatch.setattr(factorize, name, replaced)
    run("own", f"--z_dim={z_dim}", "--batch_size=8", "--held_steps=2", "--responsibility_steps=2")
    assert len(arrived) == 4 and all(torch.equal(z, want) for _, z, want in arrived)
    assert len(set(torch.cat([want for *_, want in arrived]).tolist())) == 3
    assert len({tuple(row) for ids, *_ in arrived for row in ids}) > 24  # other pairs of the pool in every step


def test_tiling_fills_the_prior_and_every_pair_gets_a_z_of_its_cell():
    """Two cells of N(0, 1) that meet at its quartile, and a quarter of the pairs in the smaller one."""
    n, quartile = 512, -0.674
    mean = torch.tensor([1.1, 0.8, 0.9, -1.0]).repeat(n // 4)[:, None]
    cfg = configs.load(factorize, [*SHORT, "--z_dim=1"])

    def q(pool):
        return mean, torch.full((n, 1), -1.0)

    q.cell = lambda z: (z[:, 0] > quartile).long()
    got_mean, log_var, z = factorize.tile(q, None, cfg, seeded(0))
    assert torch.equal(got_mean, mean) and (log_var == -1).all()
    assert z.mean().abs() < 0.15 and abs(z.std() - 1) < 0.1 and len(z.unique()) > 400
    assert ((z > quartile) == (mean > 0)).all()
    assert not torch.equal(z, factorize.tile(q, None, cfg, seeded(8))[2])
    q.cell = lambda z: torch.full((len(z),), len(z))  # no draw in the cell of any pair
    assert factorize.tile(q, None, cfg, seeded(0))[2].isfinite().all()


@pytest.mark.parametrize("recompute", [False, True])
def test_the_gradient_in_pieces_is_that_of_the_whole_batch(workplace, recompute):
    """Pieces of three lengths, scored and differentiated side by side, against one pass and one backward()."""
    cfg = configs.load(factorize, SHORT)
    base, task, _ = factorize.get_base(cfg)
    pairs = factorize.draw_pairs(base, task, factorize.Tokenizer(task.vocab), 10, 1, "gradient")
    model = base.with_latents(3, pairs, steps=1)
    model.embed.weight.data[-3:] += torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    z = torch.arange(20).view(10, 2) % 3
    w = factorize.losses.token_weights(pairs.b)
    example = torch.arange(1.0, 11.0)  # every example counts differently, and not only on its own

    def objective(logp_y, jsd, router_logits):
        return (logp_y.sum(dim=1) * example).sum() + jsd @ example - (example @ router_logits).square().mean()

    (logp_y, _, jsd, router_logits), backward = factorize.score_batch(model, pairs, z, w, 3, recompute)
    objective(logp_y, jsd, router_logits).backward()
    backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    nll, logits, router_logits = factorize.score_latents(model, pairs.ids, pairs.starts, z + len(base.embed.weight))
    jsd = factorize.losses.inter_latent_jsd(logits.log_softmax(dim=-1), w)
    objective(-nll.sum(dim=2), jsd, router_logits).backward()
    for mine, p in zip(got, model.parameters()):
        assert torch.allclose(mine, p.grad, rtol=1e-3, atol=1e-4 * p.grad.abs().max()) and p.grad.abs().max() > 0


def test_the_gradient_reaches_a_continuous_z_through_pieces(workplace):
    """The posterior's gradient, through a reparameterised z and three pieces, against one pass and one backward()."""
    cfg = configs.load(factorize, SHORT)
    base, task, _ = factorize.get_base(cfg)
    pairs = factorize.draw_pairs(base, task, factorize.Tokenizer(task.vocab), 10, 1, "gradient")
    model = base.with_latents(0, pairs, steps=1, z_dim=3)
    generator = torch.Generator().manual_seed(0)
    for layer in (model.embed_z[0], model.embed_z[2]):
        layer.weight.data.normal_(generator=generator)
    mean, noise, w = torch.randn(10, 3, generator=generator), torch.randn(10, 2, 3, generator=generator), pairs.b
    example = torch.arange(1.0, 11.0)
    pieces, whole = mean.clone().requires_grad_(), mean.clone().requires_grad_()
    (logp_y, *_), backward = factorize.score_batch(model, pairs, pieces[:, None] + noise, w, chunks=3)
    (logp_y.sum(dim=1) * example).sum().backward(retain_graph=True)
    backward()
    got = [p.grad.clone() for p in (pieces, model.embed_z[0].weight, model.head.weight)]
    model.zero_grad()
    token_nll, _, _ = factorize.score_latents(model, pairs.ids, pairs.starts, whole[:, None] + noise)
    (-token_nll.sum(dim=2).sum(dim=1) * example).sum().backward()
    want = [p.grad for p in (whole, model.embed_z[0].weight, model.head.weight)]
    assert got[0].abs().sum() > 0
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item()) for a, b in zip(got, want))


CONTINUOUS = ["--z_dim=2", "--steps=4", "--held_steps=2"]


@pytest.fixture(scope="module")
def continuous(workplace):
    return run("continuous", *CONTINUOUS)


def test_a_continuous_run_repeats_itself_and_logs_every_term(continuous):
    log, weights = continuous
    assert log == run("again", *CONTINUOUS)[0]
    assert same(weights, run("unlooked", *CONTINUOUS, "--eval_every=4")[1])
    c_base = torch.load("out/tiny_base/ckpt.pt", weights_only=True)["c_base"]
    for entry, beta, tiling in zip(log, (1.0, 1.0, 0.1, 0.1), (0, 0, 0.5, 0.5)):  # held, the router learns q
        assert entry["objective"] == pytest.approx(entry["reconstruction"] / c_base + beta * entry["kl"]
                                                   + tiling * entry["tiling"], rel=1e-4)
        assert (entry["reconstruction"] == entry["tiling"]) == (tiling == 0)
    terms = ("token_weighted", "posterior_variance", "router_marginal_kl")
    with_terms, _ = run("terms", *CONTINUOUS, *(f"--{term}_weight=0.7" for term in terms))
    for term in terms:
        assert with_terms[-1][f"loss_fraction_{term}"] > 0 and term in log[0] and log[0][f"loss_fraction_{term}"] == 0


def test_a_continuous_posterior_learns_once_it_is_no_longer_held(continuous):
    run("held", *CONTINUOUS, "--held_steps=4")
    held, learned = (torch.load(f"out/{name}/ckpt.pt", weights_only=True)["posterior"]["head.weight"]
                     for name in ("held", "continuous"))
    assert not torch.equal(held, learned)


def test_a_continuous_run_is_evaluated_and_shown(continuous, capsys, monkeypatch):
    found = evaluate.evaluate("out/continuous")
    assert found["nll"] > 0 and found["kl"] > 0 and "alignment_one_to_one" not in found
    assert {"latent_space.png", "maps.png", "shares.png", "training.png"} <= set(os.listdir("out/continuous"))
    evaluate.main(["out/continuous", "--show=1"])
    assert "z of " in capsys.readouterr().out
    monkeypatch.setattr(tasks.Task, "attribute", lambda task, x, y: None)
    with pytest.raises(SystemExit, match="nothing to show"):
        evaluate.main(["out/continuous", "--show=1"])


def test_a_latent_in_one_dimension_is_drawn_too(tmp_path):
    figures.draw_latent_space(torch.randn(9, 1), torch.arange(9) % 3, torch.randn(9, 1), torch.arange(9) % 3 - 1,
                              ("a", "b", "c"), tmp_path / "line.png")
    assert (tmp_path / "line.png").stat().st_size > 1000


def test_more_threads_change_no_weight(reference):
    log, weights = run("threads", "--threads=2", "--chunks=3")
    one = run("thread", "--threads=1", "--chunks=3")
    assert log == one[0] and same(weights, one[1])


def test_the_plain_elbo_is_reconstruction_plus_beta_kl(workplace):
    """J = R / c_base + beta KL, from the logged raw terms."""
    log, _ = run("elbo", "--responsibility_steps=0", "--held_steps=0", "--cluster_inputs=0",
                 "--router_support_weight=0", "--beta=0.3")
    c_base = torch.load("out/tiny_base/ckpt.pt", weights_only=True)["c_base"]
    for entry in log:
        assert entry["objective"] == pytest.approx(entry["reconstruction"] / c_base + 0.3 * entry["kl"], rel=1e-5)


def test_looking_at_the_alignment_changes_no_weight(reference):
    assert same(run("blind", "--eval_every=4")[1], reference[1])


def test_no_test_input_is_seen_before_the_evaluation(workplace, monkeypatch):
    """Neither by training nor by a look, by which a recipe is chosen."""
    seen, sample_input = [], tasks.Task.sample_input

    def spy(task, rng, test=None):
        seen.append(task.is_test_input(x := sample_input(task, rng, test)))
        return x

    cfg = configs.load(factorize, [*SHORT, "--name=unseen", "--n_latents=3"])
    made = factorize.get_base(cfg)
    monkeypatch.setattr(factorize, "get_base", lambda cfg: made)  # making a task tries both sides of the split out
    monkeypatch.setattr(tasks.Task, "sample_input", spy)
    factorize.factorize(cfg)
    assert len(seen) > 100 and not any(seen)
    metrics.different_inputs(made[1], 4, test=True)
    assert any(seen)


@pytest.mark.parametrize("clusters", [16, 0])
def test_only_a_full_posterior_trains_its_backbone(reference, clusters):
    base = torch.load("out/tiny_base/ckpt.pt", weights_only=True)["model"]
    for name in ("linear", "full"):
        run(name, f"--posterior={name}", f"--cluster_inputs={clusters}")
        q = torch.load(f"out/{name}/ckpt.pt", weights_only=True)["posterior"]
        assert same(base, {key: q[f"backbone.{key}"] for key in base}) == (name == "linear")


@pytest.mark.parametrize("clusters", [16, 0])
def test_the_posterior_tells_solutions_apart_with_and_without_clusters(reference, clusters):
    run("seeing", f"--cluster_inputs={clusters}")
    _, base, task, tokenizer, _, q = evaluate.load_run("out/seeing")
    with torch.no_grad():
        logq = q(factorize.draw_pairs(base, task, tokenizer, 16, 1, "some"))
    assert logq.std(dim=0).min() > 0.01


def test_adamw_alone_trains_too(reference):
    assert not same(run("adamw", "--optimizer=adamw")[1], reference[1])


def test_a_run_folder_is_evaluated_on_its_own(reference, workplace):
    """evaluate.py needs nothing but the folder, writes all it promises, and repeats itself."""
    os.rename("out/reference", "out/moved")
    try:
        found = evaluate.evaluate("out/moved")
        assert found == evaluate.evaluate("out/moved")
        for name in ("metrics.json", "result.json", "matching.png", "training.png", "shares.png"):
            assert os.path.getsize(f"out/moved/{name}") > 0
        with open("out/moved/result.json") as f:
            assert set(json.load(f)) == {"config", "seed", "commit", "versions", "base", "metrics"}
        assert all(math.isfinite(value) for value in found.values())
        assert found["nll"] > 0
        assert 0 <= found["alignment_one_to_one"] <= found["local_strategy_coverage_mean"] <= 1
    finally:
        os.rename("out/moved", "out/reference")


def test_strategy_probabilities_are_the_shares_of_samples(reference):
    """Of 2048 samples for one x, from the base and from router and generator, within 5 standard errors."""
    _, base, task, tokenizer, model, _ = evaluate.load_run("out/reference")
    x, = metrics.different_inputs(task, 1, test=True)
    generator = seeded(0)
    ys = (train_base.sample_ys(base, tokenizer, 2048 * [tokenizer.prompt(x)], generator),
          metrics.router_sampled(model, task, tokenizer, [x], 2048, generator)[1])
    for p, sampled in zip(metrics.strategy_probabilities(model, base, task, tokenizer, [x]), ys):
        found = [task.attribute(x, y) for y in sampled]
        for share, s in zip(p[0].tolist(), task.strategies):
            assert abs(found.count(s) / 2048 - share) < 5 * math.sqrt(share * (1 - share) / 2048) + 1e-3


def test_the_strategy_of_a_router_sample_is_that_on_its_own_input(reference, monkeypatch):
    _, _, task, tokenizer, model, _ = evaluate.load_run("out/reference")
    xs = metrics.different_inputs(task, 4, test=True)
    ys = [task.trace(x, s) for x in xs for s in task.strategies]
    monkeypatch.setattr(metrics, "sample_ys", lambda *args, **kwargs: ys)
    z, sampled, found = metrics.router_sampled(model, task, tokenizer, xs, len(task.strategies), seeded(0))
    assert z.shape == (4, 3) and sampled == ys and found == 4 * list(task.strategies)


def test_a_log_of_another_run_is_not_drawn(reference, capsys):
    """As while a run starts again in the folder of a finished one: its log is cut, and not of the checkpoint."""
    shutil.copytree("out/reference", "out/again", dirs_exist_ok=True)
    for text in ("", '{"step": 1, "minu', '{"step": 1, "minutes": 0.0}\n'):
        with open("out/again/log.jsonl", "w") as f:
            f.write(text)
        evaluate.main(["out/again"])
        assert "no training.png" in capsys.readouterr().out


def test_a_result_without_git_says_so(monkeypatch):
    def missing(*args, **kwargs):
        raise FileNotFoundError("git")
    monkeypatch.setattr(subprocess, "run", missing)
    assert train_base.provenance()["commit"] == "unknown"


def test_a_result_names_the_commit_that_trained_and_not_the_one_that_evaluates(reference, monkeypatch):
    monkeypatch.setattr(train_base, "current_commit", lambda: "another")
    evaluate.evaluate("out/reference")
    with open("out/reference/result.json") as f:
        result = json.load(f)
    assert result["commit"] not in ("another", "unknown") and result["versions"]["torch"] == torch.__version__
    assert result["base"]["steps"] == 160 and result["config"]["base"] == "configs/tiny_base.py"  # which says 240


def test_the_gap_of_valid_solutions_leaves_the_others_out(reference, monkeypatch):
    _, base, task, tokenizer, model, q = evaluate.load_run("out/reference")
    xs = metrics.different_inputs(task, 8, test=True)

    def gap(answers):
        found = itertools.cycle(answers)
        monkeypatch.setattr(tasks.Task, "attribute", lambda task, x, y: next(found))
        scores = metrics.held_out(model, q, base, task, tokenizer, xs, 8, 1.0, seed=0)[0]
        return scores.get("nll_gap_of_valid"), scores["nll"] - scores["base_nll"]

    first, second = "right-first", "down-first"
    assert gap([first, second])[0] == pytest.approx(gap([first, second])[1], abs=1e-4)
    assert gap([None, None])[0] is None
    assert (gap([first, None])[0] + gap([None, first])[0]) / 2 == pytest.approx(gap([first, first])[1], abs=1e-4)


@pytest.mark.parametrize("argv, words", [
    (["factorize.py", "configs/tiny_discrete.py", "--beat=0.1"], "did you mean 'beta'?"),
    (["factorize.py", "configs/missing.py"], "does not exist"),
    (["factorize.py", "configs/tiny_discreet.py"], "did you mean 'configs/tiny_discrete.py'?"),
    (["factorize.py", "configs/tiny_discrete.py", "--name=../elsewhere"], "names a folder in out/"),
    (["factorize.py", "configs/tiny_discrete.py", "--name=.."], "names a folder in out/"),
    (["factorize.py", "configs/tiny_discrete.py", "--steps=many"], "'steps' takes int"),
    (["factorize.py", "configs/tiny_discrete.py", "steps=3"], "expected --key=value"),
    (["factorize.py", "configs/tiny_discrete.py", "--n_latents=1"], "at least 2 latents"),
    (["factorize.py", "configs/tiny_discrete.py", "--prior=[0.5, 0.5]"], "takes 3 positive shares"),
    (["factorize.py", "configs/tiny_discrete.py", "--batch_size=0"], "'batch_size' must be at least 1"),
    (["factorize.py", "configs/tiny_discrete.py", "--posterior=half"], "'linear' or 'full'"),
    (["train_base.py", "configs/tiny_base.py", "--task=sort"], "unknown task 'sort'"),
    (["train_base.py", "configs/tiny_base.py", "--strategy_weights=[1.0]"], "takes 3 weights"),
    (["train_base.py", "configs/tiny_base.py", "--task_sizes={'sides': 3}"], "task_sizes"),
    (["train_base.py", "configs/tiny_base.py", "--task_sizes={'max_distance': 1}"], "no input on which all strategies"),
    (["train_base.py", "configs/base_conversion_base.py", "--name=single", "--steps=1",
      "--task_sizes={'max_value': 20}"], "has a single test input"),
    (["train_base.py", "configs/tiny_base.py", "--strategy_weights=[]"], "takes 3 weights"),
    (["evaluate.py", "out/reference", f"--x={5000 * '1'} 2 to 3 4"], "is no input of grid_pathfinding"),
    (["train_base.py", "configs/summation_base.py", "--task_sizes={'max_value': 12}"], "not in the vocabulary"),
    (["train_base.py", "configs/tiny_base.py", "--name=short", "--block_size=16"], "block_size"),
    (["train_base.py", "configs/addition_base.py", "--name=long", "--task_sizes={'max_digits': 4}", "--steps=1",
      "--block_size=113", "--final_eval_size=300", "--seed=2"], "a record of 115 tokens exceeds 113"),  # a test input's
    (["factorize.py", "configs/tiny_discrete.py", "--prior=[1e-9, 1, 1]"], "each at least 0.0001 of their sum"),
    (["factorize.py", "configs/tiny_discrete.py", "--n_latents=129"], "129 latents cannot share the 128 pairs"),
    (["factorize.py", "configs/tiny_discrete.py", "--threads=0"], "'threads' must be at least 1"),
    (["train_base.py", "configs/tiny_base.py", "--chunks=0"], "'chunks' must be at least 1"),
    (["train_base.py", "configs/tiny_base.py", "--crop=-1"], "'crop' takes no negative"),
    (["train_base.py", "configs/tiny_base.py", "--n_head=3"], "'n_embd' (64) must be an even multiple of n_head (3)"),
    (["train_base.py", "configs/tiny_base.py", "--strategy_weights=['a', 1, 1]"], "list of numbers"),
    (["train_base.py", "configs/tiny_base.py", "--lr=1e999"], "'lr' takes no negative number, and none of 10^12"),
    (["train_base.py", "configs/tiny_base.py", "--task_sizes={'max_distance': 0}"], "task_sizes"),
    (["factorize.py", "configs/tiny_discrete.py", "--name=few", "--cluster_inputs=1", "--cluster_responses=2"],
     "too few for 3 clusters"),
    (["factorize.py", "configs/tiny_discrete.py", "--tau=0"], "'tau' must not be 0"),
    (["train_base.py", "configs/tiny_base.py", "--seed=1795658400000000000"], "'seed' takes no negative number"),
    (["factorize.py", "configs/tiny_continuous.py", "--cluster_inputs=0"], "a continuous z needs clusters"),
    (["factorize.py", "configs/tiny_continuous.py", "--name=unequal", "--prior=[98, 1, 1]"], "of such unequal shares"),
    (["train_base.py", "configs/base_conversion_base.py", "--name=zero", "--steps=1", "--task_sizes={'min_value': 0}"],
     "at least 1"),
    (["train_base.py", "configs/tiny_base.py", "--batch_size=2"], "one record of each strategy"),
    (["train_base.py", "configs/tiny_base.py", "--final_eval_size=0"], "'final_eval_size' must be at least 1"),
    (["train_base.py", "configs/tiny_base.py", "--optimizer=sgd"], "'muon' or 'adamw', got 'sgd'"),
    (["train_base.py", "--steps=3"], "the first argument is a config file"),
    (["factorize.py", "configs/tiny_discrete.py", "--eval_inputs=0"], "'eval_inputs' must be at least 2"),
    (["factorize.py", "configs/tiny_discrete.py", "--cluster_responses=1"], "'cluster_responses' must be at least 2"),
    (["factorize.py", "configs/tiny_discrete.py", "--optimizer=sgd"], "'optimizer' is 'muon' or 'adamw'"),
    (["train_base.py", "configs/addition_base.py", "--task_sizes={'max_digits': 1}"], "has no input on which all"),
    (["train_base.py", "configs/equation_base.py", "--task_sizes={'max_root': 1e999}"], "task_sizes"),
    (["evaluate.py", "out/reference", "--show=²"], "unknown or incomplete flag"),
    (["factorize.py", "configs/tiny_discrete.py", "--pool_size=100"], "(100) must be a multiple of batch_size"),
    (["evaluate.py", "out/nothing"], "does not exist"),
    (["evaluate.py", "out/tiny_base"], "is no factorization checkpoint"),
    (["evaluate.py", "out/reference", "--figures", "--shw=2"], "unknown or incomplete flag '--shw=2'"),
    (["evaluate.py", "out/reference", "--x=1 2 to"], "expected 'row column to row column'"),
    (["evaluate.py", "out/reference", "--x=1 2 hop 3 4"], "not in the task's vocabulary"),
])
def test_a_mistake_of_the_user_is_one_line_and_a_non_zero_exit(reference, monkeypatch, argv, words):
    """The program itself, in this process: it exits with a message, which Python prints, with exit code 1."""
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(os.path.join(ROOT, argv[0]), run_name="__main__")
    assert isinstance(exit.value.code, str) and "\n" not in exit.value.code and words in exit.value.code


VALUES = ["", "0", "-1", "3", "1.5", "1e400", "nan", "None", "True", "[]", "[1, 2]", "[None]", "{'a': 1}", "'", "(",
          "x" * 99, "\n", "\0", "ä", "__import__('os')"]


@pytest.mark.parametrize("script, path", [(train_base, "configs/tiny_base.py"),
                                          (factorize, "configs/tiny_discrete.py")])
def test_any_flag_loads_or_is_one_line_that_names_its_key(workplace, script, path):
    """500 random flags: known and mistyped keys, values of every type, nonsense."""
    rng = random.Random(0)
    keys = [field.name for field in dataclasses.fields(script.Config)]
    loaded = 0
    for _ in range(500):
        key = rng.choice(keys)
        if rng.random() < 0.2:
            key = key.replace(rng.choice(key), rng.choice("xyz_-= "))
        try:
            configs.load(script, [path, f"--{key}={rng.choice(VALUES)}"])
            loaded += 1
        except SystemExit as exit:
            assert isinstance(exit.code, str) and "\n" not in exit.code and key.split("=")[0] in exit.code
    assert 50 < loaded < 450


@pytest.mark.parametrize("script", [train_base, factorize])
def test_any_config_file_loads_or_is_one_line_that_names_a_key_or_the_file(script, tmp_path):
    """500 random files of up to three assignments, some of them no Python at all."""
    rng, loaded = random.Random(0), 0
    keys = [field.name for field in dataclasses.fields(script.Config)]
    for i in range(500):
        chosen = rng.choices(keys + ["stepz", "_private"], k=rng.randint(0, 3))
        path = tmp_path / f"random{i}.py"
        first = rng.choice(["", "task = 'a'", "base = 'a'"])  # the keys without a default
        path.write_text("\n".join([first, *(f"{key} = {rng.choice(VALUES)}" for key in chosen)]), encoding="utf-8")
        try:
            configs.load(script, [str(path)])
            loaded += 1
        except SystemExit as exit:
            assert isinstance(exit.code, str) and "\n" not in exit.code
            assert f"random{i}.py" in exit.code or any(f"'{key}'" in exit.code for key in [*chosen, "task", "base"])
    assert 30 < loaded < 450


def test_a_pickle_that_runs_code_runs_nothing(workplace, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    os.makedirs(tmp_path / "run")
    torch.save({"kind": "factorization", "version": 1, "model": Bomb()}, tmp_path / "run" / "ckpt.pt")
    with pytest.raises(SystemExit, match="cannot be read"):
        evaluate.evaluate(str(tmp_path / "run"))
    assert not os.path.exists(tmp_path / "exploded")


def test_a_truncated_checkpoint_is_one_line(workplace, tmp_path):
    content = open("out/tiny_base/ckpt.pt", "rb").read()
    for bad in (content[:len(content) // 2], b"", b"not a checkpoint"):
        (tmp_path / "ckpt.pt").write_bytes(bad)
        with pytest.raises(SystemExit, match="cannot be read"):
            evaluate.evaluate(str(tmp_path))
    code, _, errors = program("evaluate.py", str(tmp_path), cwd=workplace)
    assert code == 1 and len(errors) == 1 and "cannot be read" in errors[0], errors


def test_a_factorization_of_an_older_version_is_one_line(reference, tmp_path):
    checkpoint = torch.load("out/reference/ckpt.pt", weights_only=True)
    torch.save(checkpoint | {"version": 1}, tmp_path / "ckpt.pt")
    with pytest.raises(SystemExit, match="format version 1, this code reads version 3"):
        evaluate.evaluate(str(tmp_path))


def test_a_foreign_base_checkpoint_is_one_line(reference):
    os.makedirs("out/foreign", exist_ok=True)
    base = torch.load("out/tiny_base/ckpt.pt", weights_only=True)
    summation = {"config": base["config"] | {"task": "list_summation", "task_sizes": {}},
                 "vocab": list(train_base.make_task("list_summation", {}).vocab)}
    for foreign, words in (
            (torch.load("out/reference/ckpt.pt", weights_only=True),
             "no base checkpoint, but a factorization checkpoint"),
            ([1, 2], "is no base checkpoint"),
            (base | {"version": 2}, "format version 2, this code reads version 1"),
            (base | {"vocab": base["vocab"][::-1]}, "another vocabulary than that of grid_pathfinding"),
            (base | {"config": base["config"] | {"n_layer": 7}}, "was trained with n_layer = 7, but foreign.py says 2"),
            (base | summation, "was trained with task = 'list_summation', but foreign.py says 'grid_pathfinding'")):
        torch.save(foreign, "out/foreign/ckpt.pt")
        with open("configs/tiny_base.py") as f, open("foreign.py", "w") as own:
            own.write(f.read())
        with pytest.raises(SystemExit, match=words):
            run("of_foreign", "--base=foreign.py")


def test_a_base_of_another_run_is_used_with_a_word_about_it(reference, capsys):
    factorize.get_base(configs.load(factorize, SHORT))
    assert "was trained with steps = 160, but configs/tiny_base.py says 240: used" in capsys.readouterr().out


def test_a_config_file_error_names_the_file(workplace, tmp_path):
    (tmp_path / "broken.py").write_text("base = \n")
    code, _, errors = program("factorize.py", str(tmp_path / "broken.py"), cwd=workplace)
    assert code == 1 and len(errors) == 1 and "broken.py" in errors[0]
    (tmp_path / "typo.py").write_text("base = 'configs/tiny_base.py'\nstep = 3\n")
    with pytest.raises(SystemExit, match="did you mean 'steps'?"):
        configs.load(factorize, [str(tmp_path / "typo.py")])


def test_an_int_widens_to_float_and_nothing_else_changes_type(workplace):
    assert configs.load(factorize, ["configs/tiny_discrete.py", "--beta=1"]).beta == 1.0
    with pytest.raises(SystemExit):
        configs.load(factorize, ["configs/tiny_discrete.py", "--steps=1.5"])


def test_a_non_finite_loss_names_its_term_and_saves_nothing(workplace, monkeypatch):
    """An infinite KL stops the run at its step; the checkpoint of an earlier run of that name survives."""
    folder = factorize.factorize(configs.load(factorize, [*SHORT, "--name=survivor"]))
    before = open(os.path.join(folder, "ckpt.pt"), "rb").read()
    monkeypatch.setattr(losses, "categorical_kl", lambda logq, logp: logq.sum(dim=1) * math.nan)
    with pytest.raises(SystemExit, match="step 4: term kl is not finite; nothing was saved"):
        run("survivor")
    with pytest.raises(SystemExit, match="step 4: term kl is not finite; 'out/survivor/state.pt' holds the last steps"):
        run("survivor", "--save_every=2")
    assert open(os.path.join(folder, "ckpt.pt"), "rb").read() == before


def test_show_prints_every_latent_side_by_side(reference, workplace, capsys):
    code, out, errors = program("evaluate.py", "out/reference", "--show=2", cwd=workplace)
    assert code == 0 and not errors and out.count("<z1>") == out.count("<z3>") == out.count("x = ") == 2
    evaluate.main(["out/reference", "--x=1 2 to 3 4"])
    assert "x = 1 2 to 3 4" in capsys.readouterr().out


def test_a_reader_that_has_seen_enough_ends_evaluate_quietly(reference, workplace):
    """As in `evaluate.py ... --show=2 | head -1`: whoever read is gone when the rest is printed."""
    there, here = os.pipe()
    os.close(there)
    done = subprocess.run([sys.executable, os.path.join(ROOT, "evaluate.py"), "out/reference", "--show=2"],
                          cwd=workplace, stdout=here, stderr=subprocess.PIPE, text=True)
    os.close(here)
    assert not done.stderr


def test_a_base_that_is_not_finished_is_told_apart_from_one_that_is_missing(workplace, tmp_path):
    """Its run goes on with --resume=True, or again by train_base.py; neither flag of factorize.py restarts it."""
    path = tmp_path / "half_base.py"
    path.write_text('task = "grid_pathfinding"\n')
    os.makedirs("out/half_base")
    open("out/half_base/log.jsonl", "w").close()
    for flag in ("--overwrite=False", "--overwrite=True"):
        with pytest.raises(SystemExit, match="not finished: --resume=True goes on"):
            factorize.factorize(configs.load(factorize, [*SHORT, f"--base={path}", "--name=half", flag]))
    with pytest.raises(SystemExit, match="run is not finished"):
        evaluate.main(["out/half_base"])


@pytest.mark.parametrize("script", [train_base, factorize])
def test_help_lists_every_config_key_and_when_it_acts(script):
    code, out, _ = program(f"{script.__name__}.py", "--help", cwd=ROOT)
    assert code == 0 and f"python {script.__name__}.py configs/" in out
    for field in dataclasses.fields(script.Config):
        assert re.search(rf"^ +{field.name}: .+  # .", out, flags=re.M), field.name
    assert script is train_base or "play no part where z is continuous" in out


def interrupted(monkeypatch, script, train, cfg, number=signal.SIGTERM):
    """Trains until a signal arrives in the middle of step 3; returns the exit code."""
    check = script.check_finite

    def third(loss, parameters, step, *more):
        check(loss, parameters, step, *more)
        if step == 2:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(script, "check_finite", third)
    with pytest.raises(SystemExit) as exit:
        train(cfg)
    monkeypatch.setattr(script, "check_finite", check)
    return exit.value.code


def test_a_second_signal_ends_the_program_at_once():
    """The first one only asks; the loop, here one that never looks, is left at the second."""
    reached = []

    @train_base.interruptible
    def never_looks(cfg, signals):
        os.kill(os.getpid(), signal.SIGINT)
        reached.append(signals.copy())
        os.kill(os.getpid(), signal.SIGTERM)
        reached.append("the end")

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as exit:
        never_looks(None)
    assert exit.value.code == 128 + signal.SIGTERM and reached == [[signal.SIGINT]]
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_base_that_is_interrupted_and_resumed_is_the_same_base(workplace, monkeypatch, number):
    flags, names = ["configs/tiny_base.py", "--steps=6", "--eval_every=2"], (f"whole{number}", f"parts{number}")
    whole, parts = (configs.load(train_base, [*flags, f"--name={name}"]) for name in names)
    train_base.train(whole)
    assert interrupted(monkeypatch, train_base, train_base.train, parts, number) == 128 + number
    assert not os.path.exists(f"out/{parts.name}/ckpt.pt")
    train_base.train(configs.load(train_base, [*flags, f"--name={parts.name}", "--resume=True"]))
    logs = [[{k: v for k, v in json.loads(line).items() if k != "minutes"} for line in open(f"out/{name}/log.jsonl")]
            for name in names]
    assert logs[0] == logs[1] and len(logs[0]) == 3
    assert same(*(torch.load(f"out/{name}/ckpt.pt", weights_only=True)["model"] for name in names))
    assert not os.path.exists(f"out/{parts.name}/state.pt")


# within the responsibilities, in the ELBO, and with a continuous z
@pytest.mark.parametrize("stages", [[], ["--responsibility_steps=1"], CONTINUOUS[:1] + ["--held_steps=2"]])
def test_a_factorization_that_is_interrupted_and_resumed_is_the_same_one(workplace, monkeypatch, stages):
    """The interruption comes within a pool: its pairs and labels are part of the state."""
    stages = ["--pool_size=128", "--steps=5", *stages]
    log, weights = run("whole", *stages)
    cfg = configs.load(factorize, [*SHORT, "--name=parts", *stages])
    assert interrupted(monkeypatch, factorize, factorize.factorize, cfg) == 128 + signal.SIGTERM
    resumed_log, resumed_weights = run("parts", *stages, "--overwrite=False", "--resume=True")
    assert resumed_log == log and same(resumed_weights, weights)


def test_a_saved_state_survives_a_kill_and_lines_after_it_are_dropped(reference, monkeypatch):
    """A run that dies in step 4, saved after step 2: its third log line goes, and step 3 is done again."""
    def die(loss, parameters, step, *more):
        if step == 3:
            raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(factorize, "check_finite", die)
        with pytest.raises(RuntimeError):
            run("dead", "--save_every=2")
    with open("out/dead/log.jsonl") as f:
        assert len(f.readlines()) == 3
    log, weights = run("dead", "--overwrite=False", "--resume=True")
    assert log == reference[0] and same(weights, reference[1])


def test_a_second_run_in_a_folder_is_refused(reference):
    for flag, words in (("--resume=False", "holds a run already"), ("--resume=True", "finished run")):
        with pytest.raises(SystemExit, match=words):
            run("reference", flag, "--overwrite=False")


def test_a_run_that_starts_again_may_be_resumed_before_it_has_saved_anything(workplace, monkeypatch):
    """Interrupted while the checkpoint of an earlier run is all there is, it starts again if that is allowed."""
    log, weights = run("once_more")
    with monkeypatch.context() as patch:
        patch.setattr(factorize, "start_posterior", None)
        with pytest.raises(TypeError):
            run("once_more")
    again, weights_again = run("once_more", "--resume=True", "--overwrite=True")
    assert log == again and same(weights, weights_again)


def test_a_run_goes_on_only_as_it_was_begun(workplace, monkeypatch):
    cfg = configs.load(factorize, [*SHORT, "--name=begun"])
    interrupted(monkeypatch, factorize, factorize.factorize, cfg)
    with pytest.raises(SystemExit, match="begun with beta = 0.1, but goes on with 0.2"):
        run("begun", "--resume=True", "--beta=0.2")
    content = torch.load("out/begun/state.pt", weights_only=True)
    torch.save(content | {"c_base": 0.5}, "out/begun/state.pt")
    with pytest.raises(SystemExit, match="another base"):
        run("begun", "--resume=True")


def test_a_full_disk_is_one_line_and_costs_no_checkpoint(workplace, monkeypatch):
    run("disk")
    before = open("out/disk/ckpt.pt", "rb").read()

    def full(*args):
        raise OSError(28, "No space left on device")

    def half(content, f):
        f.write(b"half of it")
        full()

    for module, name, path in ((os, "fsync", "log.jsonl"), (torch, "save", "state.pt"), (torch, "save", "ckpt.pt")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full if name == "fsync" else half)
            with pytest.raises(SystemExit, match=f"cannot write 'out/disk/{path}'.*No space left on device"):
                run("disk", "--save_every=2" if path == "state.pt" else "--save_every=100")
        assert open("out/disk/ckpt.pt", "rb").read() == before
        assert not [name for name in os.listdir("out/disk") if name.endswith(".tmp") or name == "state.pt"]
