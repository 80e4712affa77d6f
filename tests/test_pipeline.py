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
import torch.nn.functional as F

import evaluate
import factorize
import losses
import posterior
import tasks
import train_base
from conftest import ROOT
from harness import config, figures, runs
from harness.optim import set_learning_rates, update
from harness.parallel import seeded
from model import GPT, gaussian, score_latents, score_router
from posterior import Posterior
from tasks import Tokenizer

BOTH = ["--steps=4", "--eval_every=2", "--cluster_inputs=16", "--cluster_responses=6", "--cluster_searches=1",
        "--pool_size=32", "--eval_inputs=8", "--validation_inputs=4", "--chunks=1",
        "--overwrite=True"]
SHORT = ["configs/tiny_discrete.py", *BOTH, "--eval_samples=2", "--fixed_label_steps=1", "--responsibility_steps=2"]
SHORT_CONTINUOUS = ["configs/tiny_continuous.py", *BOTH, "--cell_steps=2"]
KINDS = pytest.mark.parametrize("short", [SHORT, SHORT_CONTINUOUS], ids=["discrete", "continuous"])


def read_log(name):
    """The entries of a run's log, without the clock."""
    with open(f"out/{name}/log.jsonl") as f:
        return [{key: value for key, value in json.loads(line).items() if key != "minutes"} for line in f]


def load(name):
    return torch.load(f"out/{name}/ckpt.pt", weights_only=True)


def run(name, *flags, short=SHORT):
    """Factorizes in process; returns (log entries without the clock, weights of the model and of the posterior)."""
    factorize.factorize(config.load(factorize, [*short, f"--name={name}", *flags]))
    return read_log(name), {f"{part} {key}": value for part in ("model", "posterior")
                            for key, value in load(name)[part].items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def get_base(short):
    """The frozen base of a factorization, its task, and its checkpoint."""
    cfg = config.load(factorize, short)
    return train_base.get_base(factorize.load_base_config(cfg), cfg.base)


def inputs(task, pairs):
    """The x of every pair, a list of tokens."""
    tokenizer = Tokenizer(task.vocab)
    return [tokenizer.decode(row[2:start - 2]) for row, start in zip(pairs.ids.tolist(), pairs.starts.tolist())]


def program(*argv, cwd):
    """Runs a script as a user would; returns (exit code, output, lines on stderr)."""
    command = [sys.executable, os.path.join(ROOT, argv[0]), *argv[1:]]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr.strip().splitlines()


def spy(monkeypatch, module, name, note):
    """Calls note(*args) with the arguments of every call of module.name, before the call."""
    real = getattr(module, name)

    def noted(*args, **kwargs):
        note(*args)
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, noted)


@pytest.fixture(scope="module")
def reference(workplace):
    return run("reference")


@pytest.fixture(scope="module")
def continuous(workplace):
    return run("continuous", short=SHORT_CONTINUOUS)


@pytest.fixture
def reference_of(reference, continuous):
    """short -> what the run of its kind gave."""
    return {"configs/tiny_discrete.py": reference, "configs/tiny_continuous.py": continuous}


# ----------------------------------------------------------------------------------------------- the base
def test_the_base_learns_and_c_base_is_its_least_validation_loss(workplace):
    """The NLL of validation inputs is far below that before training, and above the entropy of the mixture, log S.
    metrics.json is of test inputs."""
    best = min(read_log("tiny_base"), key=lambda entry: entry["nll"])
    with open("out/tiny_base/metrics.json") as f:
        metrics = json.load(f)
    base, task, checkpoint = get_base(SHORT)
    assert checkpoint["c_base"] == metrics["c_base"] == best["nll"] and metrics["best_step"] == best["step"]
    assert metrics["floor"] == pytest.approx(math.log(3)) == best["floor"]

    def nll(model, split):
        return train_base.validate(model, task, Tokenizer(task.vocab), 64, 0, split)["nll"]

    assert nll(base, "validation") == pytest.approx(best["nll"], rel=1e-4)
    assert nll(base, "test") == pytest.approx(metrics["nll"], rel=1e-4)
    assert abs(metrics["nll"] - best["nll"]) > 1e-3
    assert nll(GPT(base.config), "validation") / 2 > best["nll"] > math.log(3) - 0.05


def test_the_base_sees_no_test_input_before_its_last_step(workplace, monkeypatch):
    """It learns from train inputs, and its log is of validation inputs."""
    learned, validated, splits, task = [], [], [], get_base(SHORT)[1]
    spy(monkeypatch, train_base, "gradient", lambda model, pairs, *more: learned.extend(inputs(task, pairs)))
    spy(monkeypatch, train_base, "validate", lambda *args: validated.append((len(learned), args[-1])))
    spy(monkeypatch, train_base, "record_batch", lambda *args: splits.append(args[4]))
    train_base.train(config.load(train_base, ["configs/tiny_base.py", "--name=splits", "--steps=4", "--eval_every=2"]))
    assert splits[-9:] == 2 * ["train", "train", "validation"] + ["train", "validation", "test"]
    assert validated == [(60, "validation"), (120, "validation"), (120, "test")]
    assert {task.split(x) for x in learned} == {"train"}


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_validation_is_of_the_split_it_is_asked_for(workplace, monkeypatch, split):
    """Its records as well as the inputs that it samples a solution for."""
    base, task, _ = get_base(SHORT)
    seen, tokenizer = [], Tokenizer(task.vocab)
    spy(monkeypatch, train_base, "score_base", lambda model, pairs, *keep: seen.extend(inputs(task, pairs)))
    spy(monkeypatch, train_base, "sample_ys", lambda model, tokenizer, prompts, generator: seen.extend(
        tokenizer.decode(prompt[2:-2]) for prompt in prompts))
    train_base.validate(base, task, tokenizer, 30, 0, split)
    assert len(seen) == 60 and {task.split(x) for x in seen} == {split}


def test_a_batch_of_the_base_is_a_function_of_seed_and_step(workplace):
    task = get_base(SHORT)[1]

    def batch(seed, step):
        cfg = config.load(train_base, ["configs/tiny_base.py", f"--seed={seed}"])
        return train_base.training_batch(task, Tokenizer(task.vocab), cfg, step)[0].ids.tolist()

    assert batch(0, 0) == batch(0, 0)
    assert all(a != b for a, b in itertools.combinations([batch(0, 0), batch(0, 1), batch(1, 0), batch(1, 1)], 2))


@pytest.mark.parametrize("dropout", [0, 0.3])
def test_a_batch_in_chunks_trains_the_base_like_a_whole_one(workplace, monkeypatch, dropout):
    nll, kept = {}, []
    spy(monkeypatch, train_base, "gradient", lambda *args: kept.append(args[4]))
    for chunks in (1, 3):
        train_base.train(config.load(train_base, ["configs/tiny_base.py", "--name=chunks", "--overwrite=True",
                                                  "--steps=8", "--warmup=0", f"--chunks={chunks}",
                                                  f"--dropout={dropout}"]))
        with open("out/chunks/metrics.json") as f:
            nll[chunks] = json.load(f)["nll"]
    assert nll[3] == pytest.approx(nll[1], rel=1e-3)
    assert all((keep is not None) == (dropout > 0) for keep in kept)
    assert not dropout or not any(torch.equal(a[..., :9, :], b[..., :9, :]) for a, b in itertools.pairwise(kept))


def test_dropout_leaves_out_its_part_anew_in_every_step_and_the_mean_as_it_is(workplace):
    """Factors 0 in a part p, else 1 / (1 - p)."""
    base, task, _ = get_base(SHORT)
    cfg = config.load(train_base, ["configs/tiny_base.py"])
    pairs = train_base.training_batch(task, Tokenizer(task.vocab), cfg, 0)[0]
    one, again, other = (train_base.dropout(base, *pairs.ids.shape, 0.3, seeded(key)) for key in (1, 1, 2))
    assert torch.equal(one, again)
    assert ((one == 0) != (other == 0)).float().mean().item() == pytest.approx(0.42, abs=0.01)  # 2 p (1 - p)
    assert (one == 0).float().mean().item() == pytest.approx(0.3, abs=0.01)
    assert one[one > 0].unique().tolist() == pytest.approx([1 / 0.7])
    for dims in itertools.combinations(range(5), 4):  # each layer, branch, pair, place and channel has its own
        assert one.expand(len(pairs.ids), 2, 2, pairs.ids.shape[1], 64).mean(dim=dims).std() < 0.1


@pytest.mark.parametrize("short", [SHORT, SHORT_CONTINUOUS])
def test_dropout_of_the_generator_is_drawn_anew_in_every_step(workplace, monkeypatch, short):
    kept = []
    spy(monkeypatch, factorize, "gradient", lambda *args: kept.append(args[3].get("keep")))
    run("kept", "--overwrite=True", short=short)
    assert kept and not any(keep is not None for keep in kept)
    kept.clear()
    run("kept", "--overwrite=True", "--dropout=0.3", short=short)
    assert kept and all((keep == 0).float().mean().item() == pytest.approx(0.3, abs=0.01) for keep in kept)
    assert not any(torch.equal(a[..., :9, :], b[..., :9, :]) for a, b in itertools.pairwise(kept))


def test_a_mixture_weighs_the_records_of_every_input(workplace):
    """Strategies of next to no weight change nothing, wherever they stand in the batch: loss, floor and gradient. The
    inputs are the same where those stay on which strategies coincide."""
    def scores(weights, distinct=False):
        train_base.train(config.load(train_base, [
            "configs/tiny_base.py", "--name=mixture", "--overwrite=True", "--steps=8", "--warmup=0",
            f"--strategy_weights={weights}", f"--distinct_inputs={distinct}"]))
        return read_log("mixture")[-1]

    alone, among = scores([0.0, 3.0, 0.0]), scores([1e-9, 3.0, 1e-9])
    assert among["loss"] == pytest.approx(alone["loss"], rel=1e-3)  # after 7 equal steps
    assert among["floor"] == pytest.approx(alone["floor"], abs=1e-6) == 0
    assert scores([1.0, 2.0, 1.0], distinct=True)["floor"] == pytest.approx(1.5 * math.log(2))


def entropy(task, x):
    """Of p(y|x), by its definition: a strategy's share is spread over all wordings of its trace, as 2,000 draws find
    them."""
    p, rng = {}, random.Random(0)
    for strategy, share in task.mixture(x).items():
        ways = {tuple(task.word(task.trace(x, strategy), rng)[0]) for _ in range(2000)}
        for y in ways:
            p[y] = p.get(y, 0) + share / len(ways)
    assert sum(p.values()) == pytest.approx(1)
    return -sum(share * math.log(share) for share in p.values())


@pytest.mark.parametrize("distinct, wordings", [(True, []), (False, []), (True, ["separators"]),
                                                (False, ["separators", "operands"])])
def test_the_records_of_an_input_have_the_weights_of_its_mixture_and_its_entropy(distinct, wordings):
    """Of sums of two to four numbers: some strategies have no share, some leave the same trace."""
    weights = {"2 numbers": [1, 1, 0], "3 numbers": [2, 3, 5], "4 numbers": [0, 0, 1]}
    sizes = {"max_len": 4, "min_len": 4 if distinct else 2}
    task = train_base.make_task({"task": "list_summation", "task_sizes": sizes, "wordings": wordings,
                                 "strategy_weights": [1, 0, 3] if distinct else weights, "distinct_inputs": distinct})
    tokenizer, n = Tokenizer(task.vocab), 24
    assert task.commute == ("operands" in wordings) and task.separators == ((";", ",") if wordings else (";",))

    def batch(**crop):
        return train_base.record_batch(task, tokenizer, random.Random(1), n, "train", **crop)

    records, starts, weight, floor = batch()
    xs = [tokenizer.decode(record[2:start - 2]) for record, start in zip(records, starts)]
    ys = [tokenizer.solution(record[start:]) for record, start in zip(records, starts)]
    assert weight.sum().item() == pytest.approx(1) and [task.split(x) for x in xs] == len(xs) * ["train"]
    groups = [list(rows) for _, rows in itertools.groupby(range(len(xs)), key=lambda i: xs[i])]
    if not distinct:  # kinds of input, and inputs on which strategies with a share coincide
        assert len({task.kind(x) for x in xs}) == 3
        assert any(len(task.all_strategies(x, y)) > 1 for x, y in zip(xs, ys))
    assert len(groups) == n  # no input came twice in a row
    for rows in groups:
        mixture = task.mixture(xs[rows[0]])
        assert (weight[rows] * n).tolist() == pytest.approx([*mixture.values()])
        assert all(strategy in task.all_strategies(xs[i], ys[i]) for i, strategy in zip(rows, mixture, strict=True))
    if wordings:
        assert any(y != task.canonical(y) for y in ys)
    assert floor == pytest.approx(sum(entropy(task, xs[rows[0]]) for rows in groups) / n)
    cropped, *rest = batch(crop=5)
    assert rest[0] == starts and torch.equal(rest[1], weight) and rest[2] == floor
    whole = [records[i] for rows in groups[::4] for i in rows]
    assert [record for i, rows in enumerate(groups) for record in [cropped[j] for j in rows] if i % 4 == 0] == whole
    assert all(cropped[j] == records[j][:starts[j] + 5] for i, rows in enumerate(groups) for j in rows if i % 4)
    cfg = config.load(train_base, ["configs/tiny_base.py", "--batch_size=72", "--crop=5"])
    pairs, weight = train_base.training_batch(task, tokenizer, cfg, 0)
    rng = random.Random("base 0 0")
    records, starts, want, _ = train_base.record_batch(task, tokenizer, rng, 24, "train", 5)
    assert torch.equal(weight, want) and pairs.starts.tolist() == starts
    assert [[t for t in row if t] for row in pairs.ids.tolist()] == records


def test_a_base_of_kinds_and_wordings_is_factorized_and_evaluated_on_its_own_task(workplace, tmp_path, capsys):
    """The checkpoint's task is that of the config, in every program; a config that has changed since is refused."""
    path, weights = tmp_path / "kinds_base.py", {"wide": [3, 1, 0], "tall or square": [1, 1, 2]}

    def write(**changed):
        keys = {"strategy_weights": weights, "wordings": ["separators"], "distinct_inputs": False, "steps": 4,
                "final_eval_size": 8} | changed
        with open("configs/tiny_base.py") as f:
            path.write_text(f.read() + "".join(f"{key} = {value!r}\n" for key, value in keys.items()))

    write()
    run("of_kinds", f"--base={path}")
    *_, entry = read_log("kinds_base")
    assert 0.5 < entry["floor"] - 3 * math.log(2) < 4 * math.log(2)  # 2 to 6 steps, each ends in two ways
    _, task, checkpoint = train_base.load_base("out/kinds_base/ckpt.pt")
    for found in (task, evaluate.load_run("out/of_kinds")[2]):
        assert found.weights == weights and found.separators == (";", ",") and found.vocab[-1] == ","
        assert not found.distinct and not found.commute
    metrics = evaluate.evaluate("out/of_kinds")
    for name in ("alignment_one_to_one", "distinct_outputs", "consistency", "plausible_outputs"):
        assert 0 <= metrics[name] <= 1
    assert 0 <= metrics["router_kind_information"] <= metrics["router_information"] + 1e-6 < math.log(3)
    for changed in ({"strategy_weights": None}, {"strategy_weights": weights | {"wide": [3, 1, 1]}}, {"wordings": []},
                    {"distinct_inputs": True}):
        write(**changed)
        with pytest.raises(SystemExit, match=f"kinds_base.py says .*; remove the checkpoint or change the config"):
            run("of_kinds", f"--base={path}")


def test_three_of_four_training_inputs_are_cropped(workplace, monkeypatch):
    lengths = []
    spy(monkeypatch, train_base, "score_base", lambda model, pairs, *keep: lengths.append(
        (pairs.ids != 0).sum(dim=1) - pairs.starts))
    train_base.train(config.load(train_base, ["configs/tiny_base.py", "--name=crop", "--steps=1", "--crop=5",
                                              "--chunks=1"]))
    training, *scored = lengths
    assert (training == 5).sum() == 21 and (training > 5).sum() == 9  # 10 inputs of 3 records
    assert sum(map(len, scored)) == 4 * 66 and all((records > 5).all() for records in scored)


# ----------------------------------------------------------------------------------- what a run depends on
@KINDS
def test_the_same_seed_gives_the_same_log_and_weights(reference_of, short):
    log, weights = run("again", short=short)
    assert log == reference_of[short[0]][0] and same(weights, reference_of[short[0]][1])


@KINDS
def test_another_seed_gives_another_log(reference_of, short):
    assert run("other", "--seed=1", short=short)[0] != reference_of[short[0]][0]


def test_a_base_trained_just_now_is_as_good_as_one_from_disk(workplace, tmp_path):
    """The factorization's weights do not depend on whether its process has trained the base before."""
    with open("configs/tiny_base.py") as f:
        (tmp_path / "new_base.py").write_text(f.read() + "steps = 2\nfinal_eval_size = 8\n")
    base = f"--base={tmp_path / 'new_base.py'}"
    first = run("first", base)
    again = run("first", base)
    assert first[0] == again[0] and same(first[1], again[1])


@KINDS
def test_no_name_of_a_strategy_reaches_training(reference_of, monkeypatch, short):
    """Renaming and permuting the strategies changes what alignment is called, and not one weight."""
    grid = tasks.TASK_FUNCTIONS["grid_pathfinding"]

    def relabelled(**sizes):
        task = grid(**sizes)
        names = list(task.steps)
        return dataclasses.replace(task, steps={f"s{i}": task.steps[names[(i + 1) % 3]] for i in range(3)})

    monkeypatch.setitem(tasks.TASK_FUNCTIONS, "grid_pathfinding", relabelled)
    assert same(run("relabelled", short=short)[1], reference_of[short[0]][1])


@KINDS
def test_no_strategy_is_asked_for_in_training(reference_of, monkeypatch, short):
    """Without evaluations, training ends with the same weights where nobody can ask which strategy a solution follows,
    or what it would be. Whether an input is valid may be asked: it is so if all strategies differ on it."""
    def forbidden(*args):
        raise AssertionError("training has asked for a label")

    def is_valid_input(task, x):
        asked.append(x)
        with monkeypatch.context() as allowed:
            allowed.setattr(tasks.Task, "trace", trace)
            return is_valid(task, x)

    got, asked, trace, is_valid = get_base(short), [], tasks.Task.trace, tasks.Task.is_valid_input
    monkeypatch.setattr(train_base, "get_base", lambda *args: got)  # making a task tries out its traces
    for name in ("attribute", "trace", "nearest_strategy"):
        monkeypatch.setattr(tasks.Task, name, forbidden)
    monkeypatch.setattr(tasks.Task, "is_valid_input", is_valid_input)
    monkeypatch.setattr(evaluate, "during_training", lambda *args: {})
    assert same(run("unasked", short=short)[1], reference_of[short[0]][1]) and len(asked) > 100
    with pytest.raises(AssertionError):
        got[1].attribute([], [])


@KINDS
def test_more_threads_change_no_weight(workplace, short):
    log, weights = run("threads", "--threads=2", "--chunks=3", short=short)
    one = run("thread", "--threads=1", "--chunks=3", short=short)
    assert log == one[0] and same(weights, one[1])


@KINDS
def test_a_batch_in_chunks_is_factorized_like_a_whole_one(reference_of, short):
    log = run("factorized_chunks", "--chunks=3", short=short)[0]
    for entry, whole in zip(log, reference_of[short[0]][0], strict=True):
        assert {term: entry[term] for term in terms_of(entry)} == pytest.approx(
            {term: whole[term] for term in terms_of(whole)}, rel=1e-3, abs=1e-6)


@KINDS
def test_an_evaluation_changes_no_weight(reference_of, short):
    assert same(run("blind", "--eval_every=4", short=short)[1], reference_of[short[0]][1])


@KINDS
def test_no_test_input_is_seen_before_the_evaluation(workplace, monkeypatch, short):
    """Neither in training, which sees train inputs alone, nor in an evaluation by which a recipe is chosen."""
    got, drawn, trained, evaluated = get_base(short), set(), set(), []
    task, sample_input = got[1], tasks.Task.sample_input

    def noted(task, rng, split=None):
        x = sample_input(task, rng, split)
        drawn.add(task.split(x))
        return x

    def note(place, at):
        return lambda *args: trained.update((place, task.split(x)) for x in inputs(task, args[at]))

    places = {"start_posterior": 1, "label_pool": 2, "take_batch": 1, "gradient": 2}
    for place, at in places.items():
        spy(monkeypatch, factorize, place, note(place, at))
    spy(monkeypatch, evaluate, "different_inputs", lambda task, n, split: evaluated.append(split))
    monkeypatch.setattr(train_base, "get_base", lambda *args: got)  # making a task tries out every split
    monkeypatch.setattr(tasks.Task, "sample_input", noted)
    run("unseen", "--n_latents=3", short=short)
    assert trained == {(place, "train") for place in places}
    assert drawn == {"train", "validation"} and evaluated == 2 * ["validation"]
    evaluate.evaluate("out/unseen")
    assert evaluated[2:] == 2 * ["test"]


# ----------------------------------------------------------------------------------------- stages and terms
def assert_objective(entry, weights):
    """The objective of a log entry is the sum of its terms by these weights, and each term has its share of it."""
    weighted = {name: weights.get(name, 0) * entry[name] for name in terms_of(entry)}
    size = sum(map(abs, weighted.values()))
    assert set(weights) <= set(weighted)
    assert entry["objective"] == pytest.approx(sum(weighted.values()), rel=1e-5)
    for name, value in weighted.items():
        assert entry[f"loss_fraction_{name}"] == pytest.approx(abs(value) / size, rel=1e-5), name


def terms_of(entry):
    return {key.removeprefix("loss_fraction_") for key in entry if key.startswith("loss_fraction_")}


def test_the_objective_of_every_stage_where_z_is_discrete(reference):
    """A step of fixed labels, two of responsibilities, one of the ELBO; a term is in the log where it is computed."""
    log, c_base = reference[0], load("tiny_base")["c_base"]
    always = {"reconstruction": 1 / c_base, "router_support": 0.1}
    distilled = always | {"router_distillation": 1.0}
    stages = {"fixed labels": distilled, "responsibilities": distilled | {"posterior_distillation": 1.0},
              "ELBO": always | {"kl": 0.1}}
    assert [entry["stage"] for entry in log] == ["fixed labels", "responsibilities", "responsibilities", "ELBO"]
    assert [entry["step"] for entry in log] == [1, 2, 3, 4]
    assert ["alignment_one_to_one" in entry for entry in log] == [False, True, False, True]
    for entry in log:
        weights = stages[entry["stage"]]
        assert terms_of(entry) == {*weights, "kl", "token_weighted", "posterior_entropy"}
        assert_objective(entry, weights)
        assert min(entry[term] for term in terms_of(entry)) > 1e-4  # no share is that of a term that happens to be 0
        assert entry["normalized_reconstruction"] == pytest.approx(entry["reconstruction"] / c_base)
        assert 0.5 < entry["normalized_reconstruction"] < 2  # a mean over pairs, of a model that is nearly the base


def test_the_objective_of_every_stage_where_z_is_continuous(continuous):
    """Two steps of fixed labels, in which the router learns the posterior, and two of the ELBO."""
    log, c_base = continuous[0], load("tiny_base")["c_base"]
    always = {"reconstruction": 1 / c_base, "router_moment_kl": 1.0}
    stages = {"fixed labels": always | {"router_distillation": 1.0},
              "ELBO": always | {"kl": 0.1, "cell_reconstruction": 0.5}}
    assert [entry["stage"] for entry in log] == 2 * ["fixed labels"] + 2 * ["ELBO"]
    for entry in log:
        weights = stages[entry["stage"]]
        assert terms_of(entry) == {*weights, "kl", "token_weighted", "posterior_variance"}
        assert_objective(entry, weights)
        assert entry.get("router_distillation", entry["kl"]) == entry["kl"] > 1e-4
        assert 0.5 < entry["reconstruction"] / c_base < 2
    assert log[-1]["router_moment_kl"] > 1e-6 and log[-1]["cell_reconstruction"] != log[-1]["reconstruction"]


ALONE = ["--cluster_inputs=0", "--fixed_label_steps=0", "--responsibility_steps=0", "--router_support_weight=0"]
ALONE_CONTINUOUS = ["--cell_steps=0", "--cell_weight=0", "--router_moment_kl_weight=0"]


@pytest.fixture(scope="module")
def alone_of(workplace):
    """short -> the weights where reconstruction and KL are all the terms that weigh anything."""
    return {short[0]: run("alone", *alone, short=short)[1]
            for short, alone in ((SHORT, ALONE), (SHORT_CONTINUOUS, ALONE_CONTINUOUS))}


@pytest.mark.parametrize("short, alone, name, sign", [
    *((SHORT, ALONE, name, 1) for name in ("token_weighted", "posterior_entropy", "router_support",
                                           "router_marginal_kl")),
    (SHORT, ALONE, "jsd", -1),  # latents should differ: their divergence is the one term to be raised
    *((SHORT_CONTINUOUS, ALONE_CONTINUOUS, name, 1) for name in ("token_weighted", "posterior_variance", "cell",
                                                                 "router_moment_kl"))])
def test_every_loss_can_be_switched_on_and_takes_its_share(alone_of, short, alone, name, sign):
    log, weights = run(name, *alone, f"--{name}_weight=0.7", short=short)
    term, c_base = {"cell": "cell_reconstruction"}.get(name, name), load("tiny_base")["c_base"]
    for entry in log:
        assert_objective(entry, {"reconstruction": 1 / c_base, "kl": 0.1, term: sign * 0.7})
    assert any(entry[f"loss_fraction_{term}"] > 0 for entry in log[1:])  # a router that starts uniform owes nothing yet
    assert sum(log[-1][f"loss_fraction_{each}"] for each in terms_of(log[-1])) == pytest.approx(1)
    assert not same(weights, alone_of[short[0]])


def test_the_plain_elbo_is_reconstruction_plus_beta_kl(workplace):
    """J = R / c_base + beta KL, or R + beta KL, from the logged raw terms; and training follows it."""
    c_base, found = load("tiny_base")["c_base"], []
    for beta, normalize in ((0.3, True), (0.3, False), (0.0, False)):
        log, weights = run("elbo", *ALONE, f"--beta={beta}", f"--normalize_reconstruction={normalize}")
        for entry in log:
            assert_objective(entry, {"reconstruction": 1 / c_base if normalize else 1.0, "kl": beta})
        found.append(weights)
    assert not any(same(a, b) for a, b in itertools.combinations(found, 2))


@pytest.mark.parametrize("short, costly", [
    (SHORT, ["inter_latent_jsd", "router_marginal_kl"]), (SHORT_CONTINUOUS, ["router_moment_kl"])])
def test_a_costly_term_of_weight_zero_is_not_computed(workplace, monkeypatch, short, costly):
    """Nor are the routers scored for it before a batch is cut; and it is not in the log."""
    def fail(*args):
        raise AssertionError("a term of weight 0 was computed")

    for module, name in (*((losses, name) for name in costly), (factorize, "score_router")):
        monkeypatch.setattr(module, name, fail)
    flags = ["--router_moment_kl_weight=0", "--cell_weight=0"] if short is SHORT_CONTINUOUS else []
    log, _ = run("costly", *flags, short=short)
    assert not {"jsd", "router_marginal_kl", "router_moment_kl", "cell_reconstruction"} & set().union(*log)


@pytest.mark.parametrize("short, cheap", [
    (SHORT, {"token_weighted_reconstruction": "token_weighted", "posterior_entropy": "posterior_entropy"}),
    (SHORT_CONTINUOUS, {"token_weighted_reconstruction": "token_weighted",
                        "posterior_variance": "posterior_variance"})])
def test_a_cheap_term_of_weight_zero_is_in_the_log_and_takes_no_part(reference_of, monkeypatch, short, cheap):
    """Whatever it says, even NaN, weights and objective are the same."""
    want_log, want_weights = reference_of[short[0]]
    for name in cheap:
        monkeypatch.setattr(losses, name, lambda *args, loss=getattr(losses, name): math.nan * loss(*args))
    log, weights = run("zeros", short=short)
    assert same(weights, want_weights)
    for entry, want in zip(log, want_log, strict=True):
        assert entry["objective"] == want["objective"]
        assert all(math.isnan(entry[term]) and math.isfinite(want[term]) for term in cheap.values())


@pytest.mark.parametrize("short, stage, term", [(SHORT, "fixed_label_steps", "posterior_entropy"),
                                                (SHORT_CONTINUOUS, "cell_steps", "posterior_variance")])
def test_the_posterior_stands_still_while_it_labels_and_learns_afterwards(workplace, short, stage, term):
    """Also where a term of its own has a weight."""
    def posterior(steps, *flags):
        weights = run("still", f"--{stage}={steps}", f"--{term}_weight=0.7", *flags, short=short)[1]
        return {key: value for key, value in weights.items() if key.startswith("posterior")}

    first, later, learned = posterior(1, "--steps=1"), posterior(4), posterior(3)
    assert same(first, later) and not same(later, learned)


# ----------------------------------------------------------------------------------------- data and labels
@pytest.fixture(scope="module")
def pool(workplace):
    """(base, model of three latents that differ, 32 pairs, the same pair by pair)."""
    base, task, _ = get_base(SHORT)
    pairs = factorize.sample_responses(base, task, 32, 1, "labels")
    model = base.with_latents(3).requires_grad_(False)
    model.embed.weight[-3:] += torch.randn(3, 64, generator=seeded(0))
    model.head.weight[-3:] += torch.randn(3, 64, generator=seeded(1))
    return base, model, pairs, [pairs.rows(torch.tensor([i])) for i in range(32)]


def test_responses_are_those_of_the_base_to_train_inputs_by_their_key(workplace, monkeypatch):
    base, task, _ = get_base(SHORT)
    pairs = factorize.sample_responses(base, task, 16, 3, "key")
    xs = inputs(task, pairs)
    assert xs[::3] == xs[1::3] == xs[2::3] and len(set(map(tuple, xs))) > 8
    assert {task.split(x) for x in xs} == {"train"}
    assert len(set(map(tuple, pairs.ids.tolist()))) > 20  # responses to an x are drawn one by one
    again, other = (factorize.sample_responses(base, task, 16, 3, key) for key in ("key", "other"))
    assert all(torch.equal(a, b) for a, b in zip(pairs, again)) and xs != inputs(task, other)
    monkeypatch.setattr(tasks.Task, "sample_input", lambda *args: xs[0])
    one, two = (factorize.sample_responses(base, task, 16, 3, key).ids.tolist() for key in ("key", "other"))
    assert one != two  # other responses to the same inputs


def test_labels_are_the_posteriors_while_fixed_and_the_generators_afterwards(pool):
    """r = softmax(fixed_label_power log q), then Sinkhorn(log p / tau + alpha log q) over the pool, in order, log p of
    what comes before the rest of y is certain; none in the ELBO."""
    base, model, pairs, one = pool
    cfg = config.load(factorize, [*SHORT, "--fixed_label_power=3", "--tau=0.7", "--alpha=2"])
    q, share = Posterior(base, 3), torch.tensor([0.5, 0.3, 0.2])
    q.fit_statistics(pairs)
    with torch.no_grad():
        logq = torch.cat([q(pair) for pair in one])
        whole, logp = (torch.cat([-score_latents(model, pair)[0].sum(dim=2) for pair in pairs_of])
                       for pairs_of in (one, [pair.decided() for pair in one]))
        features = torch.cat([q.features(pair) for pair in one])
    want = {"fixed labels": (3 * logq).log_softmax(dim=1),
            "responsibilities": losses.balanced_responsibilities(logp / 0.7 + 2 * logq, share.log())}
    assert logp.std() > 0.1 and logq.std() > 0.1 and not torch.allclose(logp, whole, atol=0.1)
    for stage in ("fixed labels", "responsibilities", "ELBO"):
        labels = factorize.label_pool(model, q, pairs, stage, cfg, share, seeded(0))
        assert torch.allclose(labels.pop("features"), features, atol=1e-3)
        assert set(labels) == ({"log_r"} if stage in want else set())
        assert not labels or torch.allclose(labels["log_r"].exp(), want[stage].exp(), atol=1e-3), stage


@pytest.mark.parametrize("adaptation", ["linear", "full"])
def test_a_pair_gets_a_vector_of_its_own_cell(pool, adaptation):
    """Where z is continuous, and in every stage; and the features of a posterior whose backbone stands still."""
    base, model, pairs, one = pool
    cfg = config.load(factorize, SHORT_CONTINUOUS)
    q = Posterior(base, 3, adaptation, z_dim=2)
    responses = factorize.sample_responses(base, get_base(SHORT)[1], 16, 6, "clusters")
    share, _ = factorize.start_posterior(q, responses, torch.arange(96) // 6, K=3, seed=0, searches=1, std=0.3)
    cell = torch.cat([q.cells(q(pair)[0]) for pair in one])
    assert len(set(cell.tolist())) > 1
    for stage in ("fixed labels", "ELBO"):
        labels = factorize.label_pool(model, q, pairs, stage, cfg, share, seeded(1))
        assert set(labels) == ({"z", "features"} if adaptation == "linear" else {"z"})
        assert labels["z"].shape == (32, 1, 2) and torch.equal(q.cells(labels["z"][:, 0]), cell)
    other = factorize.label_pool(model, q, pairs, stage, cfg, share, seeded(2))
    assert not torch.equal(labels["z"], other["z"])


def test_a_batch_is_rows_of_the_pool_with_draws_of_their_responsibilities_or_noise(pool):
    _, model, pairs, _ = pool
    share, latent, rows = torch.full((3,), 1 / 3), torch.arange(32) % 3, slice(8, 24)

    def take(short, stage, seed, log_r=None, *flags):
        """What a batch gets besides the rows of what the pool has."""
        labels = {} if log_r is None else {"log_r": log_r, "features": pairs.b}
        batch, found = factorize.take_batch(model, pairs, labels, rows, stage, config.load(factorize, [*short, *flags]),
                                            {}, share, seeded(seed))
        assert all(torch.equal(got, want) for got, want in zip(batch, pairs.rows(rows)))
        assert all(torch.equal(found.pop(name), value[rows]) for name, value in labels.items())
        return found

    one_hot = F.one_hot(latent, 3).float().log().clamp(min=-1e4)
    for stage in ("fixed labels", "responsibilities"):
        assert take(SHORT, stage, 0, one_hot)["z"].tolist() == latent[rows, None].tolist()
    uniform = torch.full((32, 3), 1 / 3).log()
    first, second = (take(SHORT, "fixed labels", seed, uniform)["z"] for seed in (0, 1))
    assert len(first.unique()) == 3 and not torch.equal(first, second)
    assert take(SHORT, "ELBO", 0) == {} == take(SHORT_CONTINUOUS, "fixed labels", 0)
    noise, other = (take(SHORT_CONTINUOUS, "ELBO", seed, None, "--z_samples=50")["noise"] for seed in (0, 1))
    assert noise.shape == (16, 50, 2) and not torch.equal(noise, other)
    assert abs(noise.mean()) < 0.06 and abs(noise.std() - 1) < 0.06


def test_the_marginal_of_the_routers_is_that_of_the_whole_batch(pool):
    """Every row has it: the mean of p(z|x), and the two moments of the mixture where z is continuous."""
    base, model, pairs, one = pool
    share = torch.tensor([0.5, 0.3, 0.2])
    logp_z = torch.cat([score_latents(model, pair)[2][:, -3:].log_softmax(dim=1) for pair in one])[4:]

    def take(model, short, term):
        return factorize.take_batch(model, pairs, {}, slice(4, 32), "ELBO", config.load(factorize, short), {term: 1.0},
                                    share, seeded(0))[1]

    found = take(model, SHORT, "router_marginal_kl")
    assert found["log_prior"].shape == found["log_marginal"].shape == (28, 3)
    assert (found["log_prior"] == share.log()).all() and logp_z.std(dim=0).max() > 1e-3
    assert torch.allclose(found["log_marginal"].exp(), logp_z.exp().mean(dim=0).expand(28, 3), atol=1e-5)
    vectors = base.with_latents(0, 2).requires_grad_(False)
    vectors.gaussian_router.weight.normal_(generator=seeded(0))
    found = take(vectors, SHORT_CONTINUOUS, "router_moment_kl")
    mean, log_var = gaussian(torch.cat([score_router(vectors, pair) for pair in one])[4:])
    z = mean + (0.5 * log_var).exp() * torch.randn(20_000, 28, 2, generator=seeded(1))
    assert found["m"].shape == found["v"].shape == (28, 2) and mean.std(dim=0).min() > 0.1
    assert torch.allclose(found["m"], mean.mean(dim=0).expand(28, 2), atol=1e-4)
    assert torch.allclose(found["v"], z.flatten(0, 1).var(dim=0).expand(28, 2), rtol=0.02)


@pytest.mark.parametrize("short, stages, terms", [
    (SHORT, ["--fixed_label_steps=2", "--responsibility_steps=2"], "discrete_terms"),
    (SHORT_CONTINUOUS, ["--cell_steps=2"], "continuous_terms")])
def test_every_pair_is_trained_on_its_own_label(workplace, monkeypatch, short, stages, terms):
    """Labels that are a function of a pair's tokens arrive beside these tokens, through batches and chunks."""
    def of(pairs):
        return pairs.ids.sum(dim=1) % 3

    def label(model, q, pool, *more):
        labels = label_pool(model, q, pool, *more)
        if "z" in labels:
            return labels | {"z": of(pool)[:, None, None].expand(-1, 1, 2).float()}
        return labels | {"log_r": F.one_hot(of(pool), 3).float().log().clamp(min=-1e4)}

    def arrive(model, q, pairs, labels, *more):
        arrived.append((pairs.ids.tolist(), labels["z"].flatten(1)[:, 0], of(pairs)))
        if "log_r" in labels:
            assert torch.equal(labels["log_r"].argmax(dim=1), of(pairs))
        assert torch.allclose(labels["features"], q.features(pairs), atol=1e-3)

    arrived, label_pool = [], factorize.label_pool
    monkeypatch.setattr(factorize, "label_pool", label)
    spy(monkeypatch, factorize, terms, arrive)
    run("own", "--batch_size=8", "--chunks=3", *stages, short=short)
    assert len(arrived) == 12 and all(torch.equal(z, want) for _, z, want in arrived)
    assert len(set(torch.cat([want for *_, want in arrived]).tolist())) == 3
    rows = [tuple(t for t in row if t) for ids, *_ in arrived for row in ids]
    assert len(rows) == 32 and len(set(rows)) > 24  # each pair of the pool once


@pytest.mark.parametrize("short, stages, want", [
    (SHORT, ["--fixed_label_steps=3", "--responsibility_steps=3"],
     {1: "fixed labels", 4: "responsibilities", 5: "responsibilities", 7: "ELBO"}),
    (SHORT_CONTINUOUS, ["--cell_steps=3"], {1: "fixed labels", 4: "ELBO", 5: "ELBO"})])
def test_a_pool_is_labelled_as_it_is_drawn_and_when_the_stage_changes(workplace, monkeypatch, short, stages, want):
    """Pools of four steps. No step learns from labels of a stage that is over."""
    def note(model, q, pool, stage, *more):
        labelled[steps[0] + 1] = stage
        pools[steps[0] + 1] = pool.ids.tolist()

    steps, labelled, pools = [0], {}, {}
    spy(monkeypatch, factorize, "label_pool", note)
    spy(monkeypatch, factorize, "update", lambda *args: steps.append(steps.pop() + 1))
    run("relabelled", "--steps=8", "--pool_size=128", "--eval_every=8", *stages, short=short)
    assert labelled == want
    assert pools[1] == pools[4] != pools[5]


@KINDS
def test_every_step_draws_anew(workplace, monkeypatch, short):
    """A pool in every step, and what is drawn for it: a function of seed and step."""
    def note(model, q, batch, labels, *more):
        drawn.append(batch.ids.flatten().tolist() + labels.get("noise", torch.zeros(0)).flatten().tolist())
        noise.append(labels.get("noise"))

    drawn, noise = [], []
    spy(monkeypatch, factorize, "gradient", note)
    spy(monkeypatch, factorize, "take_batch", lambda *args: seeds.append(args[-1].initial_seed()))
    stages, seeds = (["--cell_steps=0"] if short is SHORT_CONTINUOUS else []), []
    for seed in (0, 1):
        run("anew", *stages, f"--seed={seed}", short=short)
    assert len(drawn) == 8 and all(a != b for a, b in itertools.combinations(drawn, 2))
    assert len(set(seeds)) == 8
    if short is SHORT_CONTINUOUS:
        assert all(not torch.equal(a, b) for a, b in itertools.combinations(noise, 2))


# ------------------------------------------------------------------------------- the posterior, and optimizers
@pytest.mark.parametrize("clusters", [16, 0])
def test_only_a_full_posterior_trains_its_backbone(workplace, clusters):
    base = load("tiny_base")["model"]
    for name in ("linear", "full"):
        _, weights = run(name, f"--posterior={name}", f"--cluster_inputs={clusters}")
        assert same(base, {key: weights[f"posterior backbone.{key}"] for key in base}) == (name == "linear")


@pytest.mark.parametrize("clusters", [16, 0])
def test_the_posterior_tells_solutions_apart_with_and_without_clusters(workplace, clusters):
    run("seeing", f"--cluster_inputs={clusters}")
    _, base, task, _, _, q = evaluate.load_run("out/seeing")
    with torch.no_grad():
        logq = q(factorize.sample_responses(base, task, 16, 1, "some"))
    assert logq.std(dim=0).min() > 0.01


def test_the_posterior_starts_from_clusters_of_responses_to_the_same_inputs(workplace, monkeypatch):
    def note(q, pairs, x_index, *more):
        xs = inputs(get_base(SHORT)[1], pairs)
        assert [xs[x_index.tolist().index(i)] for i in x_index] == xs and x_index.bincount().tolist() == 16 * [6]
        noted.append(more)

    noted = []
    spy(monkeypatch, factorize, "start_posterior", note)
    run("starts", "--posterior_std=0.4", "--cluster_searches=2", "--seed=3", short=SHORT_CONTINUOUS)
    assert noted == [(3, 3, 2, 0.4)]


def find(monkeypatch, share=None, **what):
    """What start_posterior returns is this instead."""
    real = factorize.start_posterior

    def changed(*args):
        found, clusters = real(*args)
        return found if share is None else share, clusters._replace(**what)

    monkeypatch.setattr(factorize, "start_posterior", changed)


def test_the_labels_are_balanced_by_the_shares_of_the_clusters(workplace, monkeypatch):
    """Labels in four steps, batches, and KL(mean router || shares); they are in the checkpoint, with what else is known
    of the clusters, and in the metrics. Without clusters they are equal."""
    of_labels, of_batches, share = [], [], torch.tensor([0.6, 0.3, 0.1])
    spy(monkeypatch, factorize, "label_pool", lambda *args: of_labels.append(args[5]))
    spy(monkeypatch, factorize, "take_batch", lambda *args: of_batches.append(args[7]))
    with monkeypatch.context() as patch:
        find(patch, share, collisions=0.01, agreement=0.75, halves=0.98)
        run("shares")
    assert len(of_labels) == len(of_batches) == 4
    assert all(torch.equal(each, share) for each in of_labels + of_batches)
    known = load("shares")["clusters"]
    assert known.pop("cluster_shares") == pytest.approx([0.6, 0.3, 0.1])
    assert known == {"cluster_collisions": 0.01, "cluster_searches": 1, "cluster_agreement": 0.75,
                     "cluster_halves": 0.98}
    assert load("shares")["clusters"].items() <= evaluate.evaluate("out/shares").items()
    run("shares", "--cluster_inputs=0", "--n_latents=4")
    assert all(each.tolist() == 4 * [0.25] for each in of_labels[4:]) and len(of_labels) == 8
    assert load("shares")["clusters"] == {}


@pytest.mark.parametrize("short, size", [(SHORT, "n_latents"), (SHORT_CONTINUOUS, "z_dim")])
def test_the_number_of_latents_is_that_of_the_clusters_if_it_is_not_told(workplace, monkeypatch, short, size):
    """Four, on a task of three strategies, where the clustering finds four; so it is where a run goes on, to the last
    bit, without another clustering. Where z is continuous, there are as many cells."""
    told, real, flags = [], posterior.cluster_responses, ["--n_latents=0"] + ["--z_dim=4"] * (size == "z_dim")

    def four(features, x_index, K, *more):
        told.append(K)
        return real(features, x_index, 4, *more)

    monkeypatch.setattr(posterior, "cluster_responses", four)
    log, weights = run("found", *flags, short=short)
    assert told == [0] and load("found")["model_config"][size] == 4
    assert len(load("found")["clusters"]["cluster_shares"]) == 4
    cells = weights["posterior cells.centres"] if size == "z_dim" else weights["posterior head.weight"]
    assert len(cells) == 4
    cfg = config.load(factorize, [*short, "--name=found_parts", *flags])
    interrupt(monkeypatch, factorize.factorize, cfg)
    resumed_log, resumed_weights = run("found_parts", *flags, "--overwrite=False", "--resume=True", short=short)
    assert resumed_log == log and same(resumed_weights, weights) and told == [0, 0]
    assert load("found_parts")["clusters"] == load("found")["clusters"]


@pytest.mark.parametrize("halves, warned", [(0.89, True), (0.91, False)])
def test_clusters_that_halves_of_the_inputs_do_not_confirm_are_warned_of(workplace, monkeypatch, capsys, halves,
                                                                         warned):
    find(monkeypatch, torch.tensor([0.5, 0.3, 0.2]), collisions=0.012, agreement=0.5, halves=halves)
    run("doubtful", "--steps=1", "--eval_every=1")
    out = capsys.readouterr().out
    assert ("doubtful: clusters that half of the inputs do not confirm are not to be trusted" in out) == warned
    assert (f"doubtful: 3 clusters with shares 0.50, 0.30, 0.20; 1.2% of the responses collide, 50% of 1 "
            f"searches agree, halves of the inputs on {halves:.1%}" in out)


def test_muon_iterates_in_float32_on_a_cpu():
    """Newton-Schulz, X <- a X + (b A + c A^2) X with A = X X^T, five times, on the gradient over its norm: in bfloat16
    it would be off by a hundredth. The gradient stays as it is."""
    generator = torch.Generator().manual_seed(0)
    weight, gradient = (torch.randn(6, 16, generator=generator) for _ in range(2))
    parameter, (a, b, c) = torch.nn.Parameter(weight.clone()), (3.4445, -4.7750, 2.0315)
    update([torch.optim.Muon([parameter], lr=0.1, weight_decay=0.0)], [parameter], [gradient.clone()])
    X = gradient.double() / gradient.double().norm()
    for _ in range(5):
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    assert torch.allclose(parameter.double(), weight.double() - 0.1 * X, atol=1e-5)
    assert torch.equal(parameter.grad, gradient)


def test_a_learning_rate_rises_and_then_falls_to_zero_from_a_peak_of_its_own():
    """Linear warm-up under a linear decay over all steps; the peak is part of what a state saves."""
    cfg = config.load(factorize, [*SHORT, "--steps=10", "--warmup=4"])
    optimizers = [torch.optim.SGD([torch.zeros(1)], lr) for lr in (2.0, 0.5)]
    for step in (*range(7), *range(5, 10)):  # as after an interruption
        if step == 5:
            state, optimizers[0] = optimizers[0].state_dict(), torch.optim.SGD([torch.zeros(1)], 7.0)
            optimizers[0].load_state_dict(state)
        set_learning_rates(optimizers, step, cfg)
        fraction = min((step + 1) / 4, 1) * (10 - step) / 10
        assert [each.param_groups[0]["lr"] for each in optimizers] == pytest.approx([2 * fraction, fraction / 2])


def test_each_learning_rate_is_that_of_its_own_parameters(workplace):
    """Muon's are the matrices of the blocks."""
    rates = {"lr": 0.003, "adamw_lr": 0.003, "posterior_lr": 0.003}

    def after(**more):
        return run("rates", *(f"--{key}={value}" for key, value in (dict.fromkeys(rates, 0.0) | more).items()))[1]

    start, changed = after(), {}
    for rate, value in rates.items():
        weights = after(**{rate: value})
        changed[rate] = {name for name in start if not torch.equal(weights[name], start[name])}
    assert changed["posterior_lr"] == {"posterior head.weight", "posterior head.bias"}
    assert changed["adamw_lr"] == {"model embed.weight", "model head.weight"}
    assert changed["lr"] == {name for name in start if name.startswith("model blocks.")}


def test_adamw_alone_trains_too(reference):
    assert not same(run("adamw", "--optimizer=adamw")[1], reference[1])


# --------------------------------------------------------------------------------------------- evaluation
def test_a_run_folder_is_evaluated_on_its_own(reference, workplace):
    """evaluate.py needs nothing but the folder, writes all it promises, and repeats itself."""
    os.rename("out/reference", "out/moved")
    try:
        found = evaluate.evaluate("out/moved")
        assert found == evaluate.evaluate("out/moved")
        for name in ("metrics.json", "result.json", "matching.png", "router.png", "traces.png", "training.png"):
            assert os.path.getsize(f"out/moved/{name}") > 0
        with open("out/moved/result.json") as f:
            assert set(json.load(f)) == {"config", "seed", "commit", "evaluated_by", "versions", "base", "metrics"}
        assert sum(found.pop("cluster_shares")) == pytest.approx(1)
        assert all(math.isfinite(value) for value in found.values())
        assert found["nll"] > 0
        assert 0 <= found["alignment_one_to_one"] <= found["local_strategy_coverage_mean"] <= 1
    finally:
        os.rename("out/moved", "out/reference")


def test_a_continuous_run_is_evaluated_and_shown(continuous, capsys, monkeypatch):
    found = evaluate.evaluate("out/continuous")
    assert found["nll"] > 0 and found["kl"] > 0
    assert not {"alignment_one_to_one", "router_information", "consistency"} & set(found)
    assert {"latent_space.png", "training.png"} <= set(os.listdir("out/continuous"))
    found = itertools.cycle(get_base(SHORT)[1].strategies)  # so short a run may give none, or one
    monkeypatch.setattr(tasks.Task, "attribute", lambda task, x, y: next(found))
    evaluate.main(["out/continuous", "--show=1"])
    out = capsys.readouterr().out
    assert "z of right-first: " in out and "z of down-first: " in out
    monkeypatch.setattr(tasks.Task, "attribute", lambda task, x, y: None)
    monkeypatch.setattr(tasks.Task, "is_trace", lambda task, x, y: False)
    evaluate.main(["out/continuous", "--show=1"])  # the middle of each cell, where no z gives a strategy
    out = capsys.readouterr().out
    assert all(f"cell {k}: no strategy" in out for k in (1, 2, 3))


def test_a_latent_in_one_dimension_is_drawn_too(tmp_path):
    figures.draw_latent_space(torch.randn(9, 1), torch.arange(9) % 3, torch.randn(9, 1), torch.arange(9) % 3 - 1,
                              ("a", "b", "c"), tmp_path / "line.png")
    assert (tmp_path / "line.png").stat().st_size > 1000


def test_strategy_probabilities_are_the_shares_of_samples(reference):
    """Of 2048 samples for one x, from the base and from router and generator, within 5 standard errors."""
    _, base, task, tokenizer, model, _ = evaluate.load_run("out/reference")
    x, = evaluate.different_inputs(task, 1, "test")
    generator = seeded(0)
    ys = (train_base.sample_ys(base, tokenizer, 2048 * [tokenizer.prompt(x)], generator),
          evaluate.router_sampled(model, task, tokenizer, [x], 2048, generator)[1])
    p, _ = evaluate.strategy_probabilities(model, base, task, tokenizer, [x])
    p_model = torch.einsum("nk,kns->ns", evaluate.router(model, tokenizer, [x]).exp(), p[1:])
    for p, sampled in zip((p[0], p_model), ys):
        found = [task.attribute(x, y) for y in sampled]
        for share, s in zip(p[0].tolist(), task.strategies):
            assert abs(found.count(s) / 2048 - share) < 5 * math.sqrt(share * (1 - share) / 2048) + 1e-3


def test_the_strategy_of_a_router_sample_is_that_on_its_own_input(reference, monkeypatch):
    _, _, task, tokenizer, model, _ = evaluate.load_run("out/reference")
    xs = evaluate.different_inputs(task, 4, "test")
    ys = [task.trace(x, s) for x in xs for s in task.strategies]
    monkeypatch.setattr(evaluate, "sample_ys", lambda *args, **kwargs: ys)
    z, sampled, found = evaluate.router_sampled(model, task, tokenizer, xs, len(task.strategies), seeded(0))
    assert z.shape == (4, 3) and sampled == ys and found == 4 * list(task.strategies)


def test_a_log_of_another_run_is_not_drawn(reference, capsys):
    """As while a run starts again in the folder of a finished one: its log is cut, and not of the checkpoint."""
    shutil.copytree("out/reference", "out/again", dirs_exist_ok=True)
    for text in ("", '{"step": 1, "minu', '{"step": 1, "minutes": 0.0}\n'):
        with open("out/again/log.jsonl", "w") as f:
            f.write(text)
        evaluate.main(["out/again"])
        assert "out/again/log.jsonl is of another run than ckpt.pt" in capsys.readouterr().out


def test_a_result_without_git_says_so(monkeypatch):
    def missing(*args, **kwargs):
        raise FileNotFoundError("git")
    monkeypatch.setattr(subprocess, "run", missing)
    assert runs.provenance()["commit"] == "unknown"


def test_a_result_names_the_commit_that_trained_and_not_the_one_that_evaluates(reference, monkeypatch):
    monkeypatch.setattr(runs, "current_commit", lambda: "another")
    evaluate.evaluate("out/reference")
    with open("out/reference/result.json") as f:
        result = json.load(f)
    assert result["commit"] not in ("another", "unknown") and result["versions"]["torch"] == torch.__version__
    assert result["base"]["steps"] == 160 and result["config"]["base"] == "configs/tiny_base.py"  # which says 240


def test_the_gap_of_valid_solutions_leaves_the_others_out(reference, monkeypatch):
    _, base, task, tokenizer, model, q = evaluate.load_run("out/reference")
    xs = evaluate.different_inputs(task, 8, "test")

    def gap(answers):
        found = itertools.cycle(answers)
        monkeypatch.setattr(tasks.Task, "attribute", lambda task, x, y: next(found))
        scores = evaluate.held_out(model, q, base, task, tokenizer, xs, 8, 1.0, seed=0)[0]
        return scores.get("nll_gap_of_valid"), scores["nll"] - scores["base_nll"]

    first, second = "right-first", "down-first"
    assert gap([first, second])[0] == pytest.approx(gap([first, second])[1], abs=1e-4)
    assert gap([None, None])[0] is None
    assert (gap([first, None])[0] + gap([None, first])[0]) / 2 == pytest.approx(gap([first, first])[1], abs=1e-4)


# ---------------------------------------------------------------------------------- mistakes of the user
@pytest.mark.parametrize("argv, words", [
    (["factorize.py", "configs/tiny_discrete.py", "--beat=0.1"], "did you mean 'beta'?"),
    (["factorize.py", "configs/missing.py"], "does not exist"),
    (["factorize.py", "configs/tiny_discreet.py"], "did you mean 'configs/tiny_discrete.py'?"),
    (["factorize.py", "configs/tiny_discrete.py", "--name=../elsewhere"], "names a folder in out/"),
    (["factorize.py", "configs/tiny_discrete.py", "--name=.."], "names a folder in out/"),
    (["factorize.py", "configs/tiny_discrete.py", "--steps=many"], "'steps' takes int"),
    (["factorize.py", "configs/tiny_discrete.py", "steps=3"], "expected --key=value"),
    (["factorize.py", "configs/tiny_discrete.py", "--n_latents=1"], "at least 2 latents"),
    (["factorize.py", "configs/tiny_discrete.py", "--n_latents=0", "--cluster_inputs=0"], "nothing finds it"),
    (["factorize.py", "configs/tiny_discrete.py", "--batch_size=0"], "'batch_size' must be at least 1"),
    (["factorize.py", "configs/tiny_discrete.py", "--posterior=half"], "'linear' or 'full'"),
    (["train_base.py", "configs/tiny_base.py", "--task=sort"], "neither a file nor a task 'sort'"),
    (["train_base.py", "configs/tiny_base.py", "--strategy_weights=[1.0]"], "takes 3 weights"),
    (["train_base.py", "configs/tiny_base.py", "--task_sizes={'sides': 3}"], "task_sizes"),
    (["train_base.py", "configs/tiny_base.py", "--task_sizes={'max_distance': 1}"], "no train input on which all"),
    (["train_base.py", "configs/base_conversion_base.py", "--name=single", "--steps=1",
      "--task_sizes={'max_value': 20}"], "has a single validation input"),
    (["train_base.py", "configs/tiny_base.py", "--strategy_weights=[]"], "takes 3 weights"),
    (["evaluate.py", "out/reference", f"--x={5000 * '1'} 2 to 3 4"], "is no input of grid_pathfinding"),
    (["train_base.py", "configs/summation_base.py", "--task_sizes={'max_value': 12}"], "not in the vocabulary"),
    (["train_base.py", "configs/tiny_base.py", "--name=short", "--block_size=16"], "block_size"),
    (["train_base.py", "configs/addition_base.py", "--name=long", "--task_sizes={'max_digits': 4}", "--steps=1",
      "--block_size=113", "--final_eval_size=300", "--seed=2"], "a record of 115 tokens exceeds 113"),  # a test input's
    (["factorize.py", "configs/tiny_discrete.py", "--n_latents=129"], "129 latents cannot share the 128 pairs"),
    (["factorize.py", "configs/tiny_discrete.py", "--threads=-1"], "'threads' must be at least 0"),
    (["train_base.py", "configs/tiny_base.py", "--chunks=0"], "'chunks' must be at least 1"),
    (["train_base.py", "configs/tiny_base.py", "--crop=-1"], "'crop' must be at least 0, got -1"),
    (["train_base.py", "configs/tiny_base.py", "--n_head=3"], "'n_embd' (64) must be an even multiple of n_head (3)"),
    (["train_base.py", "configs/tiny_base.py", "--strategy_weights=['a', 1, 1]"], "takes 3 weights from 0"),
    (["train_base.py", "configs/tiny_base.py", "--strategy_weights=[1, 1, True]"], "takes 3 weights from 0"),
    (["train_base.py", "configs/tiny_base.py", "--strategy_weights={'wide': [1, 1, 1]}"],
     "has a row for every kind of input: tall or square, wide"),
    (["train_base.py", "configs/tiny_base.py", "--strategy_weights={}"], "has a row for every kind of input: tall"),
    (["train_base.py", "configs/tiny_base.py",
      "--strategy_weights={'wide': [1, 1, 1], 'tall or square': [1, 1, 1], 'round': [1, 1, 1]}"], "row for every kind"),
    (["train_base.py", "configs/tiny_base.py", "--strategy_weights={'wide': [1, 1], 'tall or square': [1, 1, 1]}"],
     "takes 3 weights from 0"),
    (["train_base.py", "configs/tiny_base.py", "--strategy_weights={'wide': 1, 'tall or square': [1, 1, 1]}"],
     "takes 3 weights from 0"),
    (["train_base.py", "configs/tiny_base.py", "--strategy_weights={'wide': [0, 0, 0], 'tall or square': [1, 1, 1]}"],
     "not all 0"),
    (["train_base.py", "configs/tiny_base.py", "--strategy_weights={'wide': [1, -1, 1], 'tall or square': [1, 1, 1]}"],
     "weights from 0 on"),
    (["train_base.py", "configs/tiny_base.py", "--wordings=['separators', 'commas']"],
     "a list of 'separators' and 'operands'"),
    (["train_base.py", "configs/tiny_base.py", "--lr=1e999"], "'lr' must be at most 1e+12, got inf"),
    (["train_base.py", "configs/tiny_base.py", "--task_sizes={'max_distance': 0}"], "task_sizes"),
    (["factorize.py", "configs/tiny_discrete.py", "--name=few", "--cluster_inputs=1", "--cluster_responses=2"],
     "too few for 3 clusters"),
    (["factorize.py", "configs/tiny_discrete.py", "--tau=1e-38"], "'tau' must be at least 0.001, got 1e-38"),
    (["factorize.py", "configs/tiny_discrete.py", "--beta=-0.1"], "'beta' must be at least 0, got -0.1"),
    (["factorize.py", "configs/tiny_discrete.py", "--jsd_weight=-2e12"], "'jsd_weight' must be at least -1e+12"),
    (["factorize.py", "configs/tiny_continuous.py", "--posterior_std=0.99"], "'posterior_std' must be at most 0.9"),
    (["train_base.py", "configs/tiny_base.py", "--seed=1795658400000000000"], "'seed' must be at most 1e+12"),
    (["factorize.py", "configs/tiny_continuous.py", "--z_dim=1"], "'z_dim': 3 clusters need at least 2 dimensions"),
    (["factorize.py", "configs/tiny_continuous.py", "--cluster_inputs=0"], "a continuous z needs clusters"),
    (["train_base.py", "configs/base_conversion_base.py", "--name=zero", "--steps=1", "--task_sizes={'min_value': 0}"],
     "at least 1"),
    (["train_base.py", "configs/tiny_base.py", "--batch_size=2"], "one record of each strategy"),
    (["train_base.py", "configs/tiny_base.py", "--final_eval_size=0"], "'final_eval_size' must be at least 1"),
    (["train_base.py", "configs/tiny_base.py", "--optimizer=sgd"], "'muon' or 'adamw', got 'sgd'"),
    (["train_base.py", "--steps=3"], "the first argument is a config file"),
    (["factorize.py", "configs/tiny_discrete.py", "--eval_inputs=0"], "'eval_inputs' must be at least 2"),
    (["factorize.py", "configs/tiny_discrete.py", "--cluster_responses=1"], "'cluster_responses' must be at least 2"),
    (["factorize.py", "configs/tiny_discrete.py", "--optimizer=sgd"], "'optimizer' is 'muon' or 'adamw'"),
    (["train_base.py", "configs/addition_base.py", "--task_sizes={'max_digits': 1}"], "no train input on which all"),
    (["train_base.py", "configs/equation_base.py", "--task_sizes={'max_root': 1e999}"], "task_sizes"),
    (["evaluate.py", "out/reference", "--show=²"], "unknown or incomplete flag"),
    (["factorize.py", "configs/tiny_discrete.py", "--pool_size=100"], "'pool_size' must be a multiple of batch_size"),
    (["evaluate.py", "out/nothing"], "does not exist"),
    (["evaluate.py", "out/tiny_base"], "is no factorization checkpoint"),
    (["evaluate.py", "out/reference", "--show=1", "--shw=2"], "unknown or incomplete flag '--shw=2'"),
    (["evaluate.py", "out/reference", "--x=1 2 to"], "expected 'row column to row column'"),
    (["evaluate.py", "out/reference", "--x=1 2 hop 3 4"], "not in the task's vocabulary"),
])
def test_a_mistake_of_the_user_is_one_line_and_a_non_zero_exit(reference, monkeypatch, argv, words):
    """The program itself, in this process: it exits with a message, which Python prints, with exit code 1."""
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(os.path.join(ROOT, argv[0]), run_name="__main__")
    assert isinstance(exit.value.code, str) and "\n" not in exit.value.code and words in exit.value.code


UNUSED = [(SHORT_CONTINUOUS, "continuous (z_dim = 2)", factorize.DISCRETE_ONLY),
          (SHORT, "discrete (z_dim = 0)", factorize.CONTINUOUS_ONLY)]


@pytest.mark.parametrize("short, kind, keys", UNUSED, ids=["continuous", "discrete"])
def test_a_key_that_plays_no_part_for_the_kind_of_z_is_refused(workplace, short, kind, keys):
    """In the same words for each, before anything is trained. Its default is no mistake."""
    defaults = {field.name: field.default for field in dataclasses.fields(factorize.Config)}
    for key in keys:
        value = defaults[key] + (1 if type(defaults[key]) is int else 0.1)
        with pytest.raises(SystemExit) as exit:
            run("unused", f"--{key}={value}", short=short)
        assert exit.value.code == f"error: config key '{key}' plays no part where z is {kind}"
    factorize.check(config.load(factorize, [*short, *(f"--{key}={defaults[key]}" for key in keys)]))
    assert not os.path.exists("out/unused")


@KINDS
def test_steps_that_end_before_the_elbo_are_said_to(workplace, short, capsys):
    before = 2 if short is SHORT_CONTINUOUS else 3
    for steps in (before - 1, before):
        factorize.check(config.load(factorize, [*short, f"--steps={steps}"]))
        said = f"{steps} steps end before the ELBO, which begins after {before}" in capsys.readouterr().out
        assert said == (steps < before)


@pytest.mark.parametrize("kind, keys", [unused[1:] for unused in UNUSED], ids=["continuous", "discrete"])
def test_the_help_says_for_which_kind_of_z_a_key_is(kind, keys):
    """The keys that a kind of z refuses stand under the headings of the other kind, and no others do."""
    other = {"continuous": "discrete", "discrete": "continuous"}[kind.split()[0]]
    heading, found = "", []
    for line in config.usage(factorize).split("config keys")[1].splitlines():
        heading = line if line.startswith("    # ") else heading
        if f"z is {other}" in heading and ": " in line and line != heading:
            found.append(line.split(":")[0].strip())
    assert found == list(keys)


VALUES = ["", "0", "-1", "3", "1.5", "1e400", "nan", "None", "True", "[]", "[1, 2]", "[None]", "{'a': 1}", "'", "(",
          "x" * 99, "\n", "\0", "ä", "__import__('os')", "1" + 400 * "0", 5000 * "-" + "1"]


@pytest.mark.parametrize("script, path", [(train_base, "configs/tiny_base.py"),
                                          (factorize, "configs/tiny_discrete.py"),
                                          (factorize, "configs/tiny_continuous.py")])
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
            config.load(script, [path, f"--{key}={rng.choice(VALUES)}"])
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
            config.load(script, [str(path)])
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


@pytest.mark.parametrize("version", [1, None])
def test_a_checkpoint_of_another_version_or_of_none_is_one_line(reference, tmp_path, version):
    for name, kind, load_it in (("tiny_base", "base", train_base.load_base),
                                ("reference", "factorization", lambda path: evaluate.evaluate(os.path.dirname(path)))):
        checkpoint = load(name)
        assert checkpoint.pop("version") == runs.VERSIONS[kind]
        torch.save(checkpoint | ({"version": version} if version else {}), tmp_path / "ckpt.pt")
        with pytest.raises(SystemExit, match=f"has format version {version}, this code reads version "
                                             f"{runs.VERSIONS[kind]}; without it, it is trained again"):
            load_it(str(tmp_path / "ckpt.pt"))


def test_a_foreign_base_checkpoint_is_one_line(reference):
    os.makedirs("out/foreign", exist_ok=True)
    base = load("tiny_base")
    summation = {"config": base["config"] | {"task": "list_summation", "task_sizes": {}},
                 "vocab": list(tasks.TASKS["list_summation"].vocab)}
    for foreign, words in (
            (load("reference"), "no base checkpoint, but a factorization checkpoint"),
            ([1, 2], "is no base checkpoint"),
            (base | {"vocab": base["vocab"][::-1]}, "another vocabulary than that of grid_pathfinding"),
            (base | {"config": base["config"] | {"n_layer": 7}}, "was trained with n_layer = 7, but foreign.py says 2"),
            (base | {"config": base["config"] | {"strategy_weights": [1, 2, 1]}},
             r"was trained with strategy_weights = \[1, 2, 1\], but foreign.py says None"),
            (base | {"config": base["config"] | {"wordings": ["operands"]}},
             r"was trained with wordings = \['operands'\], but foreign.py says \[\]"),
            (base | {"config": base["config"] | {"distinct_inputs": False}},
             "was trained with distinct_inputs = False, but foreign.py says True"),
            (base | summation, "was trained with task = 'list_summation', but foreign.py says 'grid_pathfinding'")):
        torch.save(foreign, "out/foreign/ckpt.pt")
        with open("configs/tiny_base.py") as f, open("foreign.py", "w") as own:
            own.write(f.read())
        with pytest.raises(SystemExit, match=words):
            run("of_foreign", "--base=foreign.py")


def test_a_base_of_another_run_is_used_with_a_word_about_it(workplace, capsys):
    get_base(SHORT)
    assert "was trained with steps = 160, but configs/tiny_base.py says 240: used" in capsys.readouterr().out


def test_a_config_file_error_names_the_file(workplace, tmp_path):
    (tmp_path / "broken.py").write_text("base = \n")
    code, _, errors = program("factorize.py", str(tmp_path / "broken.py"), cwd=workplace)
    assert code == 1 and len(errors) == 1 and "broken.py" in errors[0]
    (tmp_path / "typo.py").write_text("base = 'configs/tiny_base.py'\nstep = 3\n")
    with pytest.raises(SystemExit, match="did you mean 'steps'?"):
        config.load(factorize, [str(tmp_path / "typo.py")])


def test_a_config_file_may_compute_its_values(tmp_path):
    """With modules, and with names of its own that begin with an underscore; any other name is a key."""
    path = tmp_path / "computed.py"
    path.write_text("import math\n_half = 350\nbase = 'b.py'\nsteps = 2 * _half\nbeta = math.exp(-1)\n")
    cfg = config.load(factorize, [str(path)])
    assert (cfg.steps, cfg.beta, cfg.name) == (700, math.exp(-1), "computed")
    path.write_text("half = 350\nbase = 'b.py'\nsteps = 2 * half\n")
    with pytest.raises(SystemExit, match="unknown config key 'half'"):
        config.load(factorize, [str(path)])


def test_an_int_widens_to_float_and_nothing_else_changes_type(workplace):
    assert repr(config.load(factorize, ["configs/tiny_discrete.py", "--beta=1"]).beta) == "1.0"
    for flag in ("--steps=1.5", "--steps=True", "--beta=True", "--resume=1", "--strategy_weights=(1, 1, 1)"):
        script, path = (train_base, "base") if "weights" in flag else (factorize, "discrete")
        with pytest.raises(SystemExit, match=f"'{flag[2:].split('=')[0]}' takes"):
            config.load(script, [f"configs/tiny_{path}.py", flag])


def test_a_non_finite_loss_names_its_term_and_saves_nothing(workplace, monkeypatch):
    """A KL that is infinite, or no number, stops the run at its step, the first of the ELBO; the checkpoint of an
    earlier run of that name survives."""
    folder = factorize.factorize(config.load(factorize, [*SHORT, "--name=survivor"]))
    before = open(os.path.join(folder, "ckpt.pt"), "rb").read()
    monkeypatch.setattr(losses, "categorical_kl", lambda logq, logp: logq.sum(dim=1) * math.inf)
    with pytest.raises(SystemExit, match="step 4: term kl is not finite; nothing was saved"):
        run("survivor")
    monkeypatch.setattr(losses, "categorical_kl", lambda logq, logp: logq.sum(dim=1) * math.nan)
    with pytest.raises(SystemExit, match="step 4: term kl is not finite; 'out/survivor/state.pt' holds the last steps"):
        run("survivor", "--save_every=2")
    assert open(os.path.join(folder, "ckpt.pt"), "rb").read() == before


def test_a_gradient_that_is_not_finite_stops_a_run_whose_terms_are(workplace, monkeypatch):
    """The slope of a root at 0 is infinite, its value is 0. The weights are as they were."""
    monkeypatch.setattr(losses, "router_support", lambda logits, K: (0 * logits.sum(dim=1)).sqrt())
    with pytest.raises(SystemExit, match="step 1: a gradient is not finite; nothing was saved"):
        run("infinite")
    monkeypatch.setattr(train_base, "score_base", lambda model, pairs, keep: (0 * model(pairs.ids).sum(dim=2)).sqrt())
    with pytest.raises(SystemExit, match="step 1: a gradient is not finite"):
        train_base.train(config.load(train_base, ["configs/tiny_base.py", "--name=infinite_base"]))


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
            run("half", f"--base={path}", flag)
    with pytest.raises(SystemExit, match="run is not finished"):
        evaluate.main(["out/half_base"])


def test_a_base_that_is_not_finished_goes_on_before_it_is_factorized(workplace, monkeypatch, tmp_path):
    path = tmp_path / "begun_base.py"
    with open("configs/tiny_base.py") as f:
        path.write_text(f.read() + "steps = 4\neval_size = 8\nfinal_eval_size = 8\n")
    interrupt(monkeypatch, train_base.train, config.load(train_base, [str(path)]), step=2)
    run("of_begun", f"--base={path}", "--resume=True")
    log = read_log("begun_base")
    assert log[-1]["step"] == 4 and load("of_begun")["base"]["c_base"] == log[-1]["nll"]


@pytest.mark.parametrize("script", [train_base, factorize])
def test_help_lists_every_config_key_with_a_word_about_it(script):
    code, out, _ = program(f"{script.__name__}.py", "--help", cwd=ROOT)
    assert code == 0 and f"python {script.__name__}.py configs/" in out
    for field in dataclasses.fields(script.Config):
        assert re.search(rf"^ +{field.name}: .+  # .", out, flags=re.M), field.name


# --------------------------------------------------------------- interruptions, and what stood there before
def interrupt(monkeypatch, train, cfg, step=3, number=signal.SIGTERM):
    """Trains until a signal arrives in the middle of a step; returns the exit code."""
    check_finite = runs.Run.check_finite

    def signalled(run, at, *more):
        check_finite(run, at, *more)
        if at + 1 == step:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(runs.Run, "check_finite", signalled)
        with pytest.raises(SystemExit) as exit:
            train(cfg)
    return exit.value.code


def test_a_second_signal_ends_the_program_at_once(workplace):
    """The first one only asks; the loop, here one that never looks, is left at the second. Before the loop, at the
    first."""
    reached, before = [], signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as exit:
        with runs.Run(config.load(train_base, ["configs/tiny_base.py", "--name=never_looks"])) as run:
            run.begin(None)
            run.steps()
            os.kill(os.getpid(), signal.SIGINT)
            reached.append(run.signals.copy())
            os.kill(os.getpid(), signal.SIGTERM)
            reached.append("the end")
    assert exit.value.code == 128 + signal.SIGTERM and reached == [[signal.SIGINT]]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_in_the_last_step_finds_a_finished_run(workplace, monkeypatch):
    cfg = config.load(factorize, [*SHORT, "--name=last"])
    assert interrupt(monkeypatch, factorize.factorize, cfg, step=4) == 128 + signal.SIGTERM
    assert load("last")["last_log"]["step"] == 4 and not os.path.exists("out/last/state.pt")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_base_that_is_interrupted_and_resumed_is_the_same_base(workplace, monkeypatch, number):
    flags = ["configs/tiny_base.py", "--steps=6", "--eval_every=2", "--dropout=0.2"]
    names = f"whole{number}", f"parts{number}"
    whole, parts = (config.load(train_base, [*flags, f"--name={name}"]) for name in names)
    train_base.train(whole)
    assert interrupt(monkeypatch, train_base.train, parts, number=number) == 128 + number
    assert not os.path.exists(f"out/{parts.name}/ckpt.pt")
    train_base.train(config.load(train_base, [*flags, f"--name={parts.name}", "--resume=True"]))
    logs = [read_log(name) for name in names]
    assert logs[0] == logs[1] and len(logs[0]) == 3
    assert same(*(load(name)["model"] for name in names))
    assert not os.path.exists(f"out/{parts.name}/state.pt")


@pytest.mark.parametrize("short, stages, before, after", [
    (SHORT, ["--fixed_label_steps=5"], "fixed labels", "fixed labels"),
    (SHORT, ["--fixed_label_steps=3"], "fixed labels", "responsibilities"),
    (SHORT, ["--responsibility_steps=4"], "responsibilities", "responsibilities"),
    (SHORT, ["--responsibility_steps=1"], "ELBO", "ELBO"),
    (SHORT_CONTINUOUS, ["--cell_steps=5"], "fixed labels", "fixed labels"),
    (SHORT_CONTINUOUS, ["--cell_steps=3"], "fixed labels", "ELBO"),
    (SHORT_CONTINUOUS, ["--cell_steps=2"], "ELBO", "ELBO")])
def test_a_factorization_that_is_interrupted_and_resumed_is_the_same_one(workplace, monkeypatch, short, stages,
                                                                         before, after):
    """To the last bit. The interruption comes after the third step of five, within a pool of four batches: its pairs
    and labels are part of the state."""
    stages = ["--pool_size=128", "--steps=5", "--dropout=0.2", *stages]
    log, weights = run("whole", *stages, short=short)
    assert [entry["stage"] for entry in log[2:4]] == [before, after]
    cfg = config.load(factorize, [*short, "--name=parts", *stages])
    assert interrupt(monkeypatch, factorize.factorize, cfg) == 128 + signal.SIGTERM
    resumed_log, resumed_weights = run("parts", *stages, "--overwrite=False", "--resume=True", short=short)
    assert resumed_log == log and same(resumed_weights, weights)
    assert load("parts")["clusters"] == load("whole")["clusters"]


def test_a_saved_state_survives_a_kill_and_lines_after_it_are_dropped(reference, monkeypatch):
    """A run that dies in step 4, saved after step 2: its third log line goes, and step 3 is done again."""
    def die(run, step, *more):
        if step == 3:
            run.log_file.flush()  # what is in the buffer may be on disk, or not
            raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(runs.Run, "check_finite", die)
        with pytest.raises(RuntimeError):
            run("dead", "--save_every=2")
    assert len(read_log("dead")) == 3
    log, weights = run("dead", "--overwrite=False", "--resume=True")
    assert log == reference[0] and same(weights, reference[1])


def test_a_second_run_in_a_folder_is_refused(reference):
    for flag, words in (("--resume=False", "holds a run already"), ("--resume=True", "a checkpoint and no saved")):
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
    """Threads and savings may change: they change no result."""
    cfg = config.load(factorize, [*SHORT, "--name=begun"])
    interrupt(monkeypatch, factorize.factorize, cfg)
    with pytest.raises(SystemExit, match="begun with beta = 0.1, but goes on with 0.2"):
        run("begun", "--resume=True", "--beta=0.2")
    content = torch.load("out/begun/state.pt", weights_only=True)
    torch.save(content | {"c_base": 0.5}, "out/begun/state.pt")
    with pytest.raises(SystemExit, match="another base"):
        run("begun", "--resume=True")
    torch.save(content | {"version": 1}, "out/begun/state.pt")
    with pytest.raises(SystemExit, match="format version 1, this code reads version"):
        run("begun", "--resume=True")
    torch.save(content | {"minutes": 100.0}, "out/begun/state.pt")
    assert len(run("begun", "--resume=True", "--threads=2", "--save_every=7")[0]) == 4
    assert 100 < load("begun")["minutes"] < 110  # the clock goes on, too


def test_a_state_of_an_overwritten_run_is_gone_once_another_has_begun(workplace, monkeypatch):
    interrupt(monkeypatch, factorize.factorize, config.load(factorize, [*SHORT, "--name=gone"]))
    assert os.path.exists("out/gone/state.pt")
    with monkeypatch.context() as patch:
        patch.setattr(factorize, "start_posterior", None)
        with pytest.raises(TypeError):
            run("gone")
    assert not os.path.exists("out/gone/state.pt")


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
    monkeypatch.setattr(runs.Run, "log", full)
    with pytest.raises(SystemExit, match="disk: .*No space left on device; what was saved before is as it was"):
        run("disk")
    assert open("out/disk/ckpt.pt", "rb").read() == before
