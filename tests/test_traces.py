"""A file of traces is a task: what is read, what is refused, and that its labels reach evaluate.py alone."""
import gzip
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import evaluate
import factorize
import tasks
import train_base
from conftest import ROOT
from harness import config, runs
from harness.traces import Record, read
from model import GPT, GPTConfig, as_pairs, score_base
from tasks import TASK_FUNCTIONS, Tokenizer, traces_task
from test_pipeline import SHORT, SHORT_CONTINUOUS, program, run, same

BASE = ["configs/tiny_base.py", "--task_sizes={}", "--steps=40", "--eval_every=10", "--overwrite=True"]


INPUTS = [" ".join(str(n)) for n in range(90, 300)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def rows():
    """Solutions of tiny grids, one strategy each."""
    task, rng, found = TASK_FUNCTIONS["grid_pathfinding"](side=8, max_distance=3), random.Random(0), []
    for _ in range(1500):
        x = task.sample_input(rng)
        strategy = rng.choice(task.strategies)
        y = task.trace(x, strategy)
        found.append({"x": " ".join(x), "y": " ".join(y), "strategy": strategy, "answer": y[-1]})
    return found


@pytest.fixture
def small(tmp_path):
    """210 inputs, each with the records that a test asks for."""
    return lambda *records: write(tmp_path / "small.jsonl", [{"x": x, **r} for x in INPUTS for r in records])


def ends(call):
    """The one line that the call ends with."""
    with pytest.raises(SystemExit) as exit:
        call()
    assert "\n" not in exit.value.code
    return exit.value.code


# ----------------------------------------------------------------------------------------------- reading
def test_a_file_is_read_as_it_stands(tmp_path):
    """Spaces between tokens count for nothing, empty lines neither; line numbers are those of the file; repeated
    records stay; what is missing is None."""
    text = '\n{"x": " 4  2", "y": "2 4\\t; ans", "strategy": "a b", "answer": "2  4"}\n\n{"x": "4 2", "y": "é"}\n' * 2
    want = [Record(2, "4 2", "2 4 ; ans", "a b", "2 4"), Record(4, "4 2", "é", None, None)]
    want += [Record(6, *want[0][1:]), Record(8, *want[1][1:])]
    text = text.replace("\\t", " ")
    (tmp_path / "a.jsonl").write_text("\ufeff" + text, encoding="utf-8")
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as f:
        f.write(text)
    for name in ("a.jsonl", "a.jsonl.gz"):
        assert read(str(tmp_path / name)) == (want, False)
    path = write(tmp_path / "chars.jsonl", [{"tokens": "chars"}, {"x": "4 2", "y": " 2"}])
    assert read(path) == ([Record(2, "4 2", " 2", None, None)], True)


BROKEN = {  # content of line 300, or of the whole file -> what is said
    "not JSON": ("{'x': 1}", "line 300: not JSON"), "cut": ('{"x": "1", "y": "2', "line 300: not JSON"),
    "two on a line": ('{"x": "1", "y": "2"} {}', "line 300: not JSON"), "deep": ("[" * 10 ** 5, "line 300: not JSON"),
    "a list": ('["1", "2"]', "line 300: a record is"), "a number": ("3", "line 300: a record is"),
    "null": ("null", "line 300: a record is"), "no y": ('{"x": "1"}', "line 300: 'y' is missing"),
    "no x": ('{"y": "1"}', "line 300: 'x' is missing"), "x null": ('{"x": null, "y": "1"}', "line 300: 'x' is missing"),
    "a number as y": ('{"x": "1", "y": 2}', "line 300: 'y' is a text"),
    "a list as y": ('{"x": "1", "y": ["2"]}', "line 300: 'y' is a text"),
    "y empty": ('{"x": "1", "y": ""}', "line 300: 'y' is a text"),
    "y of spaces": ('{"x": "1", "y": "  "}', "line 300: 'y' is a text"),
    "x empty": ('{"x": "", "y": "1"}', "line 300: 'x' is a text"),
    "strategy empty": ('{"x": "1", "y": "1", "strategy": ""}', "line 300: 'strategy' is a text"),
    "strategy a number": ('{"x": "1", "y": "1", "strategy": 4}', "line 300: 'strategy' is a text"),
    "answer a number": ('{"x": "1", "y": "1", "answer": 4}', "line 300: 'answer' is a text"),
    "unknown key": ('{"x": "1", "y": "1", "strateg": "a"}', "line 300: unknown key 'strateg'"),
    "digits": ('{"x": "1", "y": ' + 5000 * "1" + "}", "line 300: not JSON"),
    "newline": ('{"x": "1", "y": "1\\n2"}', "line 300: 'y' has characters"),
    "tokens late": ('{"tokens": "chars"}', "line 300: unknown key 'tokens'"),
    "reserved": ('{"x": "100", "y": "1 <z1>"}', "line 300: the token <z1> is reserved"),
    "reserved x": ('{"x": "100 </x>", "y": "1"}', "line 300: the token </x> is reserved"),
    "UTF-16": ('{"x": "1", "y": "2"}\n'.encode("utf-16"), "not UTF-8"),
    "latin-1": ('"é"'.encode("latin-1"), "not UTF-8"),
    "no header": (b'{"tokens": "words"}\n{"x": "1", "y": "2"}\n', "line 1: 'tokens' is"),
    "header and record": (b'{"tokens": "chars", "x": "1", "y": "2"}\n', "line 1: 'tokens' is"),
    "empty": (b"", "no train inputs"), "blank": (b"\n\n \n", "no train inputs"),
    "one input": (b'{"x": "1", "y": "2"}\n' * 99, "no validation inputs"), "not gzip": (b"x", "cannot read traces"),
    "cut gzip": (gzip.compress(b'{"x": "1", "y": "2"}\n' * 9 ** 5)[:-9], "cannot read traces"),
    "spoilt gzip": (gzip.compress(b"")[:10] + 999 * b"?", "cannot read traces"), "a folder": (None, "cannot read"),
    "no file": (..., "cannot read traces")}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_one_line_that_says_where(tmp_path, kind):
    content, says = BROKEN[kind]
    path = tmp_path / ("traces.jsonl.gz" if "gzip" in kind else "traces.jsonl")
    if isinstance(content, str):
        good = [json.dumps({"x": str(n), "y": f"{n} 1 2"}) for n in range(299)]
        path.write_text("\n".join([*good, content, good[0]]) + "\n")
    elif content is None:
        path.mkdir()
    elif content is not ...:
        path.write_bytes(content)
    said = ends(lambda: traces_task(str(path)))
    assert says in said and str(path) in said, said


def test_a_token_that_training_never_saw_is_named_with_its_line(tmp_path):
    rows = [{"x": x, "y": "1"} for x in INPUTS]
    task = traces_task(write(tmp_path / "a.jsonl", rows))
    n = next(i for i, x in enumerate(INPUTS) if task.split(x.split()) == "test")
    rows[n]["y"] = "unseen"
    said = ends(lambda: traces_task(write(tmp_path / "a.jsonl", rows)))
    assert f"line {n + 1}: no record of a training input has the token 'unseen'" in said and "test input" in said


def test_a_record_that_does_not_fit_is_named_with_its_line(tmp_path, rows, workplace):
    """A record has 6 special tokens besides those of x and y."""
    rows = [*rows, rows[0] | {"y": " ".join(43 * ["ans"])}]
    n = len(rows[0]["x"].split()) + 43 + 6
    flags = [*BASE, f"--task={write(tmp_path / 'a.jsonl', rows)}", "--name=long"]
    said = ends(lambda: train_base.train(config.load(train_base, [*flags, f"--block_size={n - 1}"])))
    assert f"line {len(rows)}: a record of {n} tokens exceeds block_size {n - 1}" in said
    train_base.train(config.load(train_base, [*flags, f"--block_size={n}", "--steps=1"]))


@pytest.mark.parametrize("key, value", [("task_sizes", {"side": 3}), ("strategy_weights", [1, 2]),
                                        ("wordings", ["separators"])])
def test_keys_of_made_tasks_play_no_part_where_the_task_is_a_file(tmp_path, rows, workplace, key, value):
    path = write(tmp_path / "a.jsonl", rows)
    said = ends(lambda: train_base.train(config.load(train_base, [*BASE, f"--task={path}", f"--{key}={value}"])))
    assert f"'{key}' plays no part" in said


def test_a_file_stands_beside_its_config_or_where_the_program_runs(tmp_path, rows, monkeypatch):
    write(tmp_path / "mine.jsonl", rows)
    (tmp_path / "mine_base.py").write_text("task = 'mine.jsonl'\n")
    monkeypatch.chdir("/")
    assert config.load(train_base, [str(tmp_path / "mine_base.py")]).task == str(tmp_path / "mine.jsonl")
    monkeypatch.chdir(tmp_path)
    assert config.load(train_base, ["mine_base.py"]).task == "mine.jsonl"


def test_200_000_records_are_read_in_seconds(tmp_path):
    rng = random.Random(0)
    with open(tmp_path / "many.jsonl", "w") as f:
        for _ in range(200_000):
            x, y = (" ".join(map(str, (rng.randrange(100) for _ in range(n)))) for n in (8, 60))
            f.write(json.dumps({"x": x, "y": y}) + "\n")
    code = ("import sys, tasks; task = tasks.traces_task(sys.argv[1]); status = open('/proc/self/status').read(); "
            "print(len(task.records), status.split('VmHWM:')[1].split()[0])")
    before = os.times().children_user
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "many.jsonl")], cwd=ROOT, capture_output=True,
                          text=True)
    seconds = os.times().children_user - before
    found, kilobytes = map(int, done.stdout.split())
    assert found > 199_000 and seconds < 10 and kilobytes < 2 ** 20, (seconds, kilobytes)


# ----------------------------------------------------------------------------------------------- the task
def test_a_base_learns_the_records_as_they_are(small):
    """Inputs and solutions are drawn as often as they are in the file."""
    twice = {"y": "1 1", "strategy": "a"}
    task = traces_task(small(twice, twice, {"y": "2"}, {"y": "3", "strategy": "b"}))
    rng, n = random.Random(0), 8000
    drawn = [(task.sample_input(rng, "train"), rng) for _ in range(n)]
    found = [task.solutions(x, rng) for x, rng in drawn]
    assert all(math.isnan(entropy) and [weight for _, weight in pairs] == [1.0] for pairs, entropy in found)
    count = Counter(" ".join(pairs[0][0]) for pairs, _ in found)
    for y, share in (("1 1", 0.5), ("2", 0.25), ("3", 0.25)):
        assert abs(count[y] / n - share) < 5 * math.sqrt(share * (1 - share) / n)
    assert {" ".join(x) for x, _ in drawn} == {x for x in INPUTS if task.split(x.split()) == "train"}
    records, starts, weights, entropy = train_base.record_batch(task, Tokenizer(task.vocab), rng, 10, "train")
    assert len(records) == 10 and weights.tolist() == pytest.approx(10 * [0.1]) and math.isnan(entropy)


def test_an_input_that_is_in_the_file_more_often_is_drawn_more_often(tmp_path):
    rows = [{"x": x, "y": "1"} for x in INPUTS]
    task = traces_task(write(tmp_path / "a.jsonl", rows))
    often = next(row for row in rows if task.split(row["x"].split()) == "train")
    task, rng = traces_task(write(tmp_path / "a.jsonl", rows + 200 * [often])), random.Random(0)
    share = 201 / (200 + sum(task.split(x.split()) == "train" for x in INPUTS))
    found = sum(task.sample_input(rng, "train") == often["x"].split() for _ in range(2000)) / 2000
    assert abs(found - share) < 5 * math.sqrt(share * (1 - share) / 2000)


def test_a_solution_follows_the_strategy_whose_labelled_solution_it_is(small):
    """And no other: a y without a label, of another x, or with one token more follows none."""
    twice = {"y": "1 1", "strategy": "b"}
    task = traces_task(small(twice, {"y": "1 2", "strategy": "b"}, {"y": "2 3", "strategy": "a"},
                             {"y": "4", "answer": "9"}, {"y": "2 3", "strategy": "c"}, twice))
    x, typed = ["1", "0", "0"], ["7", "7", "7"]
    assert task.strategies == ("a", "b", "c") and task.kind(x) == "all"
    assert task.mixture(x) == {"a": 0.2, "b": 0.6, "c": 0.2} and task.mixture(typed) == {}
    for y, want in (("1 1", ["b"]), ("1 2", ["b"]), ("2 3", ["a", "c"]), ("4", []), ("2 3 3", []), ("2", [])):
        assert task.all_strategies(x, y.split()) == want and task.attribute(x, y.split()) == next(iter(want), None)
        assert task.is_trace(x, y.split()) == (bool(want) or y == "4") and not task.all_strategies(typed, y.split())
    assert task.nearest_strategy(x, ["1", "9"]) == "b" and task.nearest_strategy(x, ["2"]) == "a"
    assert task.nearest_strategy(typed, ["1"]) is None
    assert train_base.score_answers(task, [x, x, typed, x], [["4", "9"], ["9"], ["9"], []]) == {
        "final_answer_accuracy": pytest.approx(2 / 3)}
    assert train_base.score_answers(traces_task(small({"y": "1"})), [x], [["1"]]) == {}
    of_each = traces_task(small({"y": "1 ans 1", "answer": "1"}, {"y": "2 ans 2", "answer": "2"}, {"y": "3"}))
    ys = [["ans", end] for end in "1231"]
    assert train_base.score_answers(of_each, 4 * [x], ys) == {"final_answer_accuracy": 0.75}
    task = traces_task(small({"y": "1 ans 3 2", "answer": "3 2"}))
    for y, right in (("ans 3 2", 1), ("ans 1 3 2", 0), ("3 2", 0)):
        assert train_base.score_answers(task, [x], [y.split()]) == {"final_answer_accuracy": right}


def test_characters_are_tokens_where_the_first_line_says_so(tmp_path, workplace, capsys):
    """A space is one, too; so it is in what a user types, and in what is shown."""
    rng = random.Random(0)
    rows = [{"x": f"{a} {b}", "y": (f"{a}+{b} = {a + b}" if i else f"{b} + {a}={a + b}"), "strategy": "ab"[i]}
            for a in range(10) for b in range(10, 30) for i in range(2)]
    rng.shuffle(rows)
    path = write(tmp_path / "chars.jsonl", [{"tokens": "chars"}, *rows])
    task = traces_task(path)
    assert task.vocab == tuple(" +0123456789=") and task.traces(list("3 12")) in (
        [("a", list("12 + 3=15")), ("b", list("3+12 = 15"))], [("b", list("3+12 = 15")), ("a", list("12 + 3=15"))])
    (tmp_path / "chars_base.py").write_text("".join(f"{key} = {value!r}\n" for key, value in dict(
        task=path, n_layer=1, n_head=2, n_embd=32, block_size=32, steps=20, eval_every=20, eval_size=16,
        final_eval_size=16).items()))
    flags = [*SHORT, f"--base={tmp_path / 'chars_base.py'}", "--n_latents=2", "--name=chars"]
    factorize.factorize(config.load(factorize, flags))
    for x in ("", " " * 60):
        assert "no input of" in ends(lambda: evaluate.typed_input(evaluate.load_run("out/chars"), x))
    evaluate.main(["out/chars", "--x=3 12"])
    assert "x = 3 12" in capsys.readouterr().out
    assert "'#' is not in the task's vocabulary" in ends(lambda: evaluate.main(["out/chars", "--x=3#12"]))


# ----------------------------------------------------------------------------------------------- the runs
@pytest.fixture(scope="module")
def labelled(workplace, rows, tmp_path_factory):
    """Runs on the same records with and without their labels, and with labels that are permuted; with a discrete z."""
    folder, found = tmp_path_factory.mktemp("files"), {}
    names = [row["strategy"] for row in rows]
    random.Random(1).shuffle(names)
    kinds = {"labels": rows, "no_labels": [{key: row[key] for key in ("x", "y", "answer")} for row in rows],
             "permuted": [row | {"strategy": name} for row, name in zip(rows, names)],
             "some": [row if int(row["x"][0]) % 3 else {key: row[key] for key in ("x", "y", "answer")}
                      for row in rows]}
    for kind, content in kinds.items():
        path = write(folder / f"{kind}.jsonl", content)
        base = f"configs/tiny_base.py --task={path} --task_sizes={{}} --steps=40 --eval_every=20 --name={kind}_base"
        log, weights = run(kind, f"--base={base}")
        base_weights = runs.load_checkpoint(f"out/{kind}_base/ckpt.pt", "base")["model"]
        found[kind] = log, weights, base_weights, evaluate.evaluate(f"out/{kind}")
    return found


LABELLED = re.compile("alignment|coverage|strategy|permutation|purity|kind|valid|attributed|probe|centroid|share_")


def test_few_labels_leave_the_rest_of_the_report_as_it_is(labelled):
    """What needs no labels is of the same inputs; what needs them is of those that have some."""
    some, none = labelled["some"][3], labelled["no_labels"][3]
    assert {"alignment_one_to_one", "exact_alignment"} <= some.keys()
    for key in none.keys() - {"cluster_shares", "minutes", "controlled_final_answer_accuracy"}:
        assert some[key] == pytest.approx(none[key]), key
    _, _, task, *_ = evaluate.load_run("out/some")
    every = evaluate.different_inputs(task, 10 ** 6, "test")
    named = evaluate.different_inputs(task, 10 ** 6, "test", labelled=True)
    assert 0 < len(named) < len(every) and named == [x for x in every if task.mixture(x)]
    assert {task.split(x) for x in every} == {"test"} and len(every) == len({tuple(x) for x in every})


def test_a_latent_is_named_by_the_labelled_solutions_that_its_own_are_like(small):
    """Also where each x has one label, so that the nearest labelled y is always of that one: z1 says 1 1 1 and z2 says
    2 2 2, but for the last token."""
    path = small({"y": "1 1 1", "strategy": "b"})
    with open(path) as f:
        rows = [json.loads(line) for line in f]
    for row in rows[::2]:
        row.update(y="2 2 2", strategy="a")
    task = traces_task(write(Path(path), rows))
    xs = evaluate.different_inputs(task, 50, "test")
    assert evaluate.nearest(task, xs, len(xs) * ["1 1 2".split(), "2 2 1".split()]) == ["b", "a"]
    assert [task.nearness(rows[0]["x"].split(), y.split(), "a") for y in ("2 2 2", "2 2 1", "2", "1", "2 2 2 2")] == [
        1, pytest.approx(2 / 3), pytest.approx(1 / 3), 0, 0.75]


def test_several_solutions_of_a_strategy_add_up(small):
    """p(strategy|x) is that of all y with its label, and half of a y that two strategies share."""
    task = traces_task(small({"y": "1", "strategy": "a"}, {"y": "1 2", "strategy": "a"}, {"y": "2", "strategy": "b"},
                             {"y": "3", "strategy": "b"}, {"y": "3", "strategy": "c"}))
    tokenizer, plain, torch_seed = Tokenizer(task.vocab, 2), Tokenizer(task.vocab), torch.manual_seed(0)
    base, model = (GPT(GPTConfig(len(each), each.n_latents, block_size=16, n_layer=1, n_head=2, n_embd=16))
                   for each in (plain, tokenizer))
    x = ["1", "2", "0"]
    with torch.no_grad():
        p, parts = evaluate.strategy_probabilities(model, base, task, tokenizer, [x])
        one = {y: score_base(base, as_pairs([plain.record(x, y.split())], [len(plain.prompt(x))])).sum().neg().exp()
               for y in ("1", "1 2", "2", "3")}
    want = torch.stack((one["1"] + one["1 2"], one["2"] + one["3"], one["3"]))
    assert torch.allclose(p[0, 0], want) and torch_seed
    assert torch.allclose(parts[0, 0], want - torch.stack((one["1"] * 0, one["3"] / 2, one["3"] / 2)))


def test_what_is_shown_of_a_solution_is_what_the_file_says_of_it(small):
    task = traces_task(small({"y": "1 1", "strategy": "a"}, {"y": "1 2"}))
    x = ["1", "2", "0"]
    for y, says in (("1 1", "a"), ("1 2", "in the file, without a label"), ("1 3", "no strategy (nearest: a)")):
        assert evaluate.followed(task, x, y.split()) == says
    bare = traces_task(small({"y": "1 2"}))
    assert [evaluate.followed(bare, x, y) for y in (["1", "2"], ["1"])] == ["in the file, without a label",
                                                                            "not in the file"]


def test_a_file_that_has_changed_is_noticed(labelled, rows, tmp_path, capsys):
    """By its x and y: labels may be added. A base does not go on in training with other records."""
    with open("out/no_labels/config.json") as f:
        path = re.search(r"--task=(\S+)", json.load(f)["base"])[1]
    with open(path) as f:
        before = f.read()
    try:
        for content, notice in ((rows, False), ([rows[0] | {"y": rows[1]["y"]}, *rows[1:]], True)):
            write(Path(path), content)
            evaluate.load_run("out/no_labels")
            assert ("has other records than when the base was trained" in capsys.readouterr().out) == notice
        long = {"x": "1 2", "y": " ".join(60 * ["down"]), "strategy": None}
        write(Path(path), [*rows, long])
        assert f"{path}, line 1501: a record of 68 tokens" in ends(lambda: evaluate.load_run("out/no_labels"))
    finally:
        Path(path).write_text(before)
    flags = [*BASE[:-1], f"--task={write(tmp_path / 'a.jsonl', rows)}", "--name=changed", "--save_every=10"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs.Run, "check_finite", lambda run, step, *more: sys.exit("stop") if step == 15 else None)
        ends(lambda: train_base.train(config.load(train_base, flags)))
    write(tmp_path / "a.jsonl", rows[1:])
    assert "other records" in ends(lambda: train_base.train(config.load(train_base, [*flags, "--resume=True"])))


def test_a_file_may_move_to_where_the_config_says_it_is(labelled, tmp_path):
    """Not to anywhere: evaluate.py has no config, and names the file that is missing."""
    with open("out/no_labels/config.json") as f:
        base = json.load(f)["base"]
    path, moved = re.search(r"--task=(\S+)", base)[1], str(tmp_path / "moved.jsonl")
    os.rename(path, moved)
    try:
        assert f"'{path}', which is not there" in ends(lambda: evaluate.load_run("out/no_labels"))
        name = re.search(r"--name=(\S+)", base)[1]
        assert train_base.load_base(f"out/{name}/ckpt.pt", moved)[1].name == moved
        run("after_the_move", f"--base={base.replace(path, moved)}")
        assert evaluate.load_run("out/after_the_move")[2].name == moved
    finally:
        os.rename(moved, path)


def test_a_factorization_does_not_go_on_with_other_records(labelled, rows, tmp_path):
    file = write(tmp_path / "a.jsonl", rows)
    base = [*BASE[:-1], f"--task={file}", "--name=of_file"]
    train_base.train(config.load(train_base, base))
    flags = ["--save_every=1", f"--base={' '.join(base)}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs.Run, "check_finite", lambda run, step, *more: sys.exit("stop") if step == 2 else None)
        assert ends(lambda: run("other_records", *flags)) == "stop"
    write(tmp_path / "a.jsonl", rows[1:])
    assert "other records" in ends(lambda: run("other_records", *flags, "--overwrite=False", "--resume=True"))
    write(tmp_path / "a.jsonl", rows)
    run("other_records", *flags, "--overwrite=False", "--resume=True")


def test_a_split_with_hardly_any_records_is_refused(tmp_path):
    """A draw of its inputs, each as often as the file has it, would take forever."""
    task = traces_task(write(tmp_path / "even.jsonl", [{"x": x, "y": "1"} for x in INPUTS]))
    often = next(x for x in INPUTS if task.split(x.split()) == "train")
    rows = [{"x": x, "y": "1"} for x in INPUTS] + 200_000 * [{"x": often, "y": "1"}]
    assert re.search(r"rows.jsonl: only \d+ of 200210 records have \w+ inputs",
                     ends(lambda: traces_task(write(tmp_path / "rows.jsonl", rows))))


def test_a_solution_of_characters_is_shown_as_it_is(tmp_path):
    rows = [{"tokens": "chars"}, *({"x": x, "y": "a  b; c ;"} for x in INPUTS)]
    task = traces_task(write(tmp_path / "chars.jsonl", rows))
    assert evaluate.trace_lines(task, list("a  b; c ;" * 8)) == [("a  b; c ;" * 8)[:60], ("a  b; c ;" * 8)[60:]]


def test_only_strategies_that_a_latent_may_need_are_matched():
    """Sixty labels take no longer than the few best of every latent, and the best matching is the same."""
    generator = torch.Generator().manual_seed(0)
    C = torch.rand(4, 60, generator=generator)
    total, matching = evaluate.one_to_one_matching(C)
    columns = sorted({s for row in C for s in row.argsort(descending=True)[:4].tolist()})
    want = max(sum(C[z, s].item() for z, s in enumerate(each)) for each in itertools.permutations(columns, 4))
    assert total == pytest.approx(want) and len(set(matching)) == 4


def test_labels_of_a_file_change_no_weight(labelled):
    """Base, generator, router and posterior are the same bit by bit without labels, and with others."""
    _, weights, base_weights, _ = labelled["labels"]
    for kind in ("no_labels", "permuted", "some"):
        assert same(weights, labelled[kind][1]) and same(base_weights, labelled[kind][2])


def test_without_labels_every_labelled_metric_is_absent(labelled):
    """In the log and in metrics.json, and not 0; the report without labels is there all the same."""
    log, _, _, metrics = labelled["no_labels"]
    assert not [key for entry in (*log, metrics) for key in entry if LABELLED.search(key)]
    with_labels = labelled["labels"]
    for key in ("consistency", "distinct_outputs", "router_information", "nll", "base_nll", "cluster_agreement",
                "posterior_mutual_information", "controlled_final_answer_accuracy"):
        assert metrics[key] == pytest.approx(with_labels[3][key])
    assert {"alignment_one_to_one", "local_strategy_coverage_mean"} <= with_labels[3].keys()
    assert all("consistency" in entry for entry in log if entry["step"] in (2, 4))
    names = set(os.listdir("out/no_labels"))
    assert "traces.png" in names and "training.png" in names and "matching.png" not in names


def test_a_continuous_run_needs_no_labels(labelled, rows, tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [{key: row[key] for key in ("x", "y")} for row in rows])
    base = f"configs/tiny_base.py --task={path} --task_sizes={{}} --steps=40 --eval_every=20 --name=bare_base"
    run("bare", f"--base={base}", short=SHORT_CONTINUOUS)
    metrics = evaluate.evaluate("out/bare")
    assert "nll" in metrics and not [key for key in metrics if LABELLED.search(key) or "answer" in key]
    evaluate.main(["out/bare", "--show=1"])
    assert "cell 3: " in capsys.readouterr().out


def test_each_shown_solution_stands_beside_its_probability_under_the_base(labelled, capsys):
    """p(y|x) = exp(-sum_t l_t) of the canonical record."""
    _, base, task, tokenizer, model, _ = evaluate.load_run("out/no_labels")
    evaluate.main(["out/no_labels", "--show=1"])
    shown = capsys.readouterr().out
    x = evaluate.different_inputs(task, 1, "test")[0]
    prompts = [tokenizer.prompt(x, k) for k in range(3)]
    ys = train_base.sample_ys(model, tokenizer, prompts, None, temperature=0)
    plain = Tokenizer(task.vocab)
    with torch.no_grad():
        pairs = as_pairs([plain.record(x, y) for y in ys], 3 * [len(plain.prompt(x))])
        want = score_base(base, pairs).sum(dim=1).neg().exp()
    found = [float(p) for p in re.findall(r"p\(y\|x\) of the base: ([0-9.e-]+)", shown)]
    assert found == pytest.approx(want.tolist(), rel=0.01)


def test_the_weights_of_the_least_validation_loss_are_kept_and_overfitting_is_said(workplace, monkeypatch, capsys):
    """Also by a run that was interrupted after it was at its best. Learned by heart is what costs more than 10% less on
    training inputs."""
    losses, states = iter([3.0, 2.0, 2.5, 4.0, 9.0]), []

    def validate(model, *args):
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return {"nll": next(losses), "valid_trace_rate": 0.5}

    monkeypatch.setattr(train_base, "validate", validate)
    monkeypatch.setattr(train_base, "mean_loss", lambda *args: (7.0 if args[-1] == "validation" else known, 1.0))
    known = 6.0
    flags = [*BASE[:-1], "--task_sizes={'side': 8, 'max_distance': 3}", "--name=best", "--save_every=30"]
    cfg = config.load(train_base, [*flags, "--overwrite=True"])
    train_base.train(cfg)
    kept = runs.load_checkpoint("out/best/ckpt.pt", "base")
    assert same(kept["model"], states[1]) and not same(kept["model"], states[3]) and kept["c_base"] == 7.0
    said = capsys.readouterr().out
    assert "rose from 2.000 after step 20 to 4.000" in said and "50% of its samples are not among" in said
    assert "a loss of 6.000 on training inputs, of 7.000 on others" in said
    losses, again = iter([3.0, 2.0, 2.5]), config.load(train_base, [*flags, "--resume=True"])
    with pytest.raises((StopIteration, RuntimeError)):
        train_base.train(cfg)
    losses, known = iter([4.0, 9.0]), 6.5
    train_base.train(again)
    assert "on training inputs" not in capsys.readouterr().out
    assert same(runs.load_checkpoint("out/best/ckpt.pt", "base")["model"], kept["model"])


def test_what_a_file_holds_is_printed(tmp_path, rows):
    path = write(tmp_path / "a.jsonl", rows)
    code, out, err = program("tasks.py", path, cwd=tmp_path)
    lines = out.splitlines()
    inputs = {row["x"] for row in rows}
    assert code == 0 and not err and lines[0].startswith(f"1500 records of {len(inputs)} different x")
    labels = Counter(row["strategy"] for row in rows)
    assert all(f"{s} ({labels[s]})" in out for s in labels) and len([line for line in lines if "x = " in line]) == 3
    longest = max(len(row["x"].split()) + len(row["y"].split()) + 6 for row in rows)
    assert f"to {longest}" in out and "different y for one x: 1 to 3" in out
    assert program("tasks.py", str(tmp_path / "none.jsonl"), cwd=tmp_path)[0] == 1


def test_the_shipped_file_is_what_its_licence_note_says():
    task = tasks.traces_task(os.path.join(ROOT, "tests", "data", "clrs_sorts.jsonl.gz"))
    assert task.strategies == ("bubble_sort", "heapsort", "insertion_sort", "quicksort")
    assert len(task.records) == 6000 and sum(map(len, task.records.values())) == 24000
    for x, records in list(task.records.items())[:200]:
        assert {record.answer for record in records} == {" ".join(sorted(x.split()))}
        assert all(record.y.endswith(record.answer) for record in records)
