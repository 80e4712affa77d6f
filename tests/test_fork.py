"""What the pages show for a seventh task and for a new loss works: their blocks are applied to a copy of the code."""
import json
import math
import os
import random
import re
import runpy
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT

# where the blocks stand: a page, and the title of a section of it
TASK_PAGE, TASK_SECTION = "configs/README.md", "Add your own task"
LOSS_PAGE, LOSS_SECTION = "README.md", "Add a loss, a task, traces"


def blocks(page, section, language):
    """The code blocks of a section, without those of other languages."""
    with open(os.path.join(ROOT, page)) as f:
        text = f.read()
    assert f"\n## {section}\n" in text, f"{page} has no section '{section}'"
    return re.findall(rf"```{language}\n(.*?)```", text.split(f"\n## {section}\n")[1].split("\n## ")[0], re.DOTALL)


def write_between(path, before, new, after):
    """Puts `new` between the one place where `before` is followed by `after`."""
    with open(path) as f:
        content = f.read()
    assert content.count(before + after) == 1, f"{before + after!r} is not there once"
    with open(path, "w") as f:
        f.write(content.replace(before + after, before + new + after))


def apply_diff(diff, folder):
    """Under '--- file', lines with a '+' go below the unmarked line before them, of which there must be one. Returns in
    how many places."""
    places = 0
    for name, body in re.findall(r"--- (\S+)\n((?:[ +].*\n)+)", diff):
        for context, added in re.findall(r"^ (.*\n)((?:\+.*\n)+)", body, re.MULTILINE):
            write_between(folder / name, context, "".join(line[1:] for line in added.splitlines(True)), "")
            places += 1
    return places


def program(*argv, cwd):
    """Runs a script of the copy as a user would; returns its output."""
    done = subprocess.run([sys.executable, *argv, "--threads=1"], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def read(path):
    with open(path) as f:
        return json.load(f)


@pytest.fixture
def fork(tmp_path):
    """A copy of the code, without what was trained."""
    for name in os.listdir(ROOT):
        if name.endswith(".py"):
            shutil.copy(os.path.join(ROOT, name), tmp_path)
    for name in ("configs", "harness"):
        shutil.copytree(os.path.join(ROOT, name), tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


TINY_BASE = """n_layer = 2; n_head = 2; n_embd = 64; block_size = 64
task_sizes = {"max_factor": 3}; steps = 150; batch_size = 64; eval_every = 150; final_eval_size = 100; chunks = 1
"""
TINY = ["--steps=8", "--fixed_label_steps=4", "--responsibility_steps=2", "--pool_size=64", "--cluster_inputs=24",
        "--cluster_responses=6", "--cluster_searches=1", "--eval_every=8",
        "--validation_inputs=8", "--eval_inputs=8", "--eval_samples=2", "--chunks=1"]


def add_task(fork):
    """Puts the page's block into tasks.py and its two configs beside the others; the base is made small."""
    code, *config_files = blocks(TASK_PAGE, TASK_SECTION, "python")
    assert len(config_files) == 2
    write_between(fork / "tasks.py", "", code + "\n\n", 'if __name__ == "__main__":')
    for content in config_files:
        path = content.split()[3]  # '# python factorize.py configs/...'
        (fork / path).write_text(content + TINY_BASE * path.endswith("_base.py"))
    return code


def test_a_seventh_task_is_trained_factorized_and_evaluated(fork):
    """With the one command of any other task. An untrained base follows no strategy at all, alignment is a share."""
    add_task(fork)
    program("factorize.py", "configs/multiplication_discrete.py", *TINY, cwd=fork)
    base, metrics = (read(fork / "out" / f"multiplication_{run}" / "metrics.json") for run in ("base", "discrete"))
    assert base["valid_trace_rate"] > 0.1 and base["parse_success"] > 0.5
    assert {"share_repeated-addition", "share_tens-and-ones"} <= set(base)
    assert 0 <= metrics["alignment_one_to_one"] <= metrics["local_strategy_coverage_mean"] + 1e-6 <= 1 + 2e-6
    assert math.isfinite(metrics["nll"]) and metrics["test_inputs"] > 2


def test_the_seventh_task_does_what_its_docstring_says(fork):
    """The examples are its traces; what it draws, it accepts, and both strategies differ on it; nothing else."""
    code = add_task(fork)
    task = runpy.run_path(str(fork / "tasks.py"))["TASKS"]["multiplication"]
    x, *examples = [line.split() for line in code.split('"""')[1].strip().splitlines()]
    x = x[2:]
    assert [strategy for strategy, *_ in examples] == list(task.strategies)
    for strategy, *y in examples:
        assert task.trace(x, strategy) == y and task.parse(y).answer == ["3", "6"]
    rng = random.Random(0)
    for split in ("train", "validation", "test"):
        assert all(task.check(task.sample_input(rng, split)) is None for _ in range(100))
    assert all(task.check(text.split()) for text in ("1 2", "1 2 * 9", "9 * 3", "1 2 * 3 * 2", "* 3", "1 2 + 3"))


def test_a_new_loss_is_trained_and_logged(fork, workplace):
    """The page's diff in losses.py and factorize.py, five places: KL(uniform || router) >= 0 is in the log, and takes
    its share of the objective once it has a weight. Where z is continuous its key is refused."""
    diff, = blocks(LOSS_PAGE, LOSS_SECTION, "diff")
    loss, = re.findall(r"^\+def (\w+)", diff, re.MULTILINE)
    assert apply_diff(diff, fork) == 5
    shutil.copytree(workplace / "out" / "tiny_base", fork / "out" / "tiny_base")
    program("factorize.py", "configs/tiny_discrete.py", *TINY, f"--{loss}_weight=0.1", cwd=fork)
    with open(fork / "out" / "tiny_discrete" / "log.jsonl") as f:
        log = [json.loads(line) for line in f]
    assert all(entry[loss] > -1e-5 for entry in log)
    assert log[-1][loss] > 1e-4 and log[-1][f"loss_fraction_{loss}"] > 1e-6
    refused = subprocess.run([sys.executable, "factorize.py", "configs/tiny_continuous.py", f"--{loss}_weight=0.1"],
                             cwd=fork, capture_output=True, text=True)
    assert refused.returncode == 1 and f"'{loss}_weight' plays no part where z is continuous" in refused.stderr
