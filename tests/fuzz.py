"""Runs training, factorization and evaluation with random values: each run ends well or in one line; CI runs it.

    python tests/fuzz.py 40            # that many runs; a non-zero exit and the flags if one fails in another way
    python tests/fuzz.py 40 --write    # the same, and adds them to assets/results/faults.json

Up to three keys of a short run, of the base or of a factorization with either kind of z, take a value that their type
allows, sensible or not. Then evaluate.py is asked about ten inputs a run, made of random characters, and ten files of
traces a run are read, with pieces lost, moved and inserted. For every fourth run a short one is started from an odd
shell: with an odd environment, with streams closed, from another folder.
"""
import contextlib
import dataclasses
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from typing import Annotated, Literal, get_args, get_origin

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import evaluate
import factorize
import train_base
from harness import config
from kill import note
from tasks import traces_task

FACTORIZATION = ["--steps=4", "--eval_every=2", "--cluster_inputs=12", "--cluster_searches=1",
                 "--pool_size=32", "--eval_inputs=3", "--validation_inputs=2"]
DISCRETE = ["configs/tiny_discrete.py", "--fixed_label_steps=1", "--responsibility_steps=2", *FACTORIZATION]
SHORT = [(train_base, ["configs/tiny_base.py", "--steps=3", "--eval_every=2", "--eval_size=4", "--final_eval_size=4"]),
         (factorize, DISCRETE), (factorize, ["configs/tiny_continuous.py", "--cell_steps=2", *FACTORIZATION])]
VALUES = {int: ["-1", "0", "1", "2", "3", "5", "64", "100000000"], bool: ["True", "False"],
          float: ["-1", "0", "1e-30", "0.3", "1", "7", "1e30", "1e-400"],
          str: ["muon", "grid_pathfinding", "configs/tiny_base.py", "a/b", "..", "x" * 300],
          list | dict | None: ["None", "[]", "{}", "[1.0, 2.0, 3.0]", "[0.5, 0.5, 0]", "[1e-300, 1, 1]", "[1.0, 1.0]",
                              "{'wide': [1, 2, 3], 'tall or square': [3, 0, 1]}", "{'wide': [1, 2, 3]}", "{1: 2}"],
         list: ["[]", "['separators']", "['separators', 'operands']", "['x']", "[1]", "[[]]"],
          dict: ["{}", "{'side': 4}", "{'side': 0}", "{'max_distance': 99}", "{'side': 'a'}", "{1: 2}"]}
MAY_BE_HUGE = {"seed", "eval_every", "save_every", "fixed_label_steps", "responsibility_steps", "cell_steps", "warmup",
               "crop", "chunks", "n_latents", "n_head"}  # others, valid but huge, would take hours or all memory

ENVIRONMENTS = ["MPLBACKEND=module://matplotlib_inline.backend_inline", "MPLBACKEND=TkAgg", "PYTHONIOENCODING=ascii",
                "LC_ALL=C", "LC_ALL=POSIX PYTHONUTF8=0 PYTHONCOERCECLOCALE=0", "TMPDIR=/nonexistent", "COLUMNS=1",
                "HOME=/nonexistent", "PYTHONOPTIMIZE=2", "PYTHONWARNINGS=error", "RANK=0 WORLD_SIZE=4", "LOCAL_RANK=x",
                "PYTHONUNBUFFERED=1", "DISPLAY=nowhere:0"]
STREAMS = ["", "<&-", ">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full", "| head -1"]
FOLDERS = [".", "elsewhere"]


def random_flag(rng, script):
    field = rng.choice(dataclasses.fields(script.Config))
    kind = get_args(field.type)[0] if get_origin(field.type) is Annotated else field.type
    values = [*get_args(kind), "another"] if get_origin(kind) is Literal else VALUES[kind]
    return f"--{field.name}={rng.choice([v for v in values if v != '100000000' or field.name in MAY_BE_HUGE])}"


def run(script, flags):
    """None, or the line with which the run ended."""
    try:
        cfg = config.load(script, flags)
        if script is train_base:
            train_base.train(cfg)
        else:
            evaluate.evaluate(factorize.factorize(cfg))
    except SystemExit as exit:
        assert isinstance(exit.code, str) and "\n" not in exit.code, exit.code
        return exit.code


def odd_shell(rng):
    """A short run, started from an odd shell: it must end with a result, or in one line on stderr."""
    script, short = rng.choice(SHORT)
    where, streams, variables = (rng.choice(each) for each in (FOLDERS, STREAMS, ENVIRONMENTS))
    path = os.path.join(ROOT, script.__name__ + ".py")
    flags = [os.path.abspath(short[0]), *short[1:], "--name=odd", "--overwrite=True", f"--threads={rng.choice((0, 1))}"]
    command = f"env {variables} {sys.executable} {path} {' '.join(flags)} {streams}"
    os.makedirs(where, exist_ok=True)
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], cwd=where, capture_output=True, text=True)
    lines = done.stderr.splitlines()
    print(f"{short[0]} in {where}, {variables} {streams} -> {lines or 'done'}", flush=True)
    assert not done.returncode or len(lines) == 1 and lines[0].startswith("error: "), (command, done.stderr)


def spoil(content, rng):
    """A file's bytes with up to three pieces lost, doubled, moved to another place, or replaced by what JSON means
    something by."""
    for _ in range(rng.randint(1, 3)):
        a, b = sorted(rng.randrange(len(content) + 1) for _ in range(2))
        b, at = min(b, a + rng.choice((1, 3, 200))), rng.randrange(len(content) + 1)
        piece = rng.choice((b"", 2 * content[a:b], b'"', b"{", b"null", b"\n", b"\xff", b"\0", b"<y>",
                            b"\\u0000", b" ", b"1e999"))
        content = content[:a] + piece + content[b:]
        content = content[:at] + rng.choice((b"", content[a:b])) + content[at:]
    return content


def read_spoilt_traces(rng):
    xs = [" ".join(str(n)) for n in range(100, 200)]
    rows = [{"x": x, "y": f"{x} ; ans", "strategy": "a", "answer": "ans"} for x in xs]
    content = spoil("".join(json.dumps(row) + "\n" for row in rows).encode(), rng)
    with open("spoilt.jsonl", "wb") as f:
        f.write(content)
    try:
        traces_task("spoilt.jsonl")
    except SystemExit as exit:
        assert isinstance(exit.code, str) and "\n" not in exit.code and "spoilt.jsonl" in exit.code, exit.code


def main(n, write):
    rng, told = random.Random(0), 0
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.symlink(os.path.join(ROOT, "configs"), "configs")
        train_base.train(config.load(train_base, ["configs/tiny_base.py"]))
        for i in range(n):
            script, short = rng.choice(SHORT)
            flags = [f"--name=run{i}", *(random_flag(rng, script) for _ in range(rng.randint(1, 3)))]
            output = io.StringIO()
            try:
                with contextlib.redirect_stdout(output):
                    line = run(script, short + flags)
            except BaseException:
                print(output.getvalue(), short[0], *flags, flush=True)
                raise
            print(short[0], *flags, "->", line or "done", flush=True)
            told += line is not None
        run(factorize, DISCRETE + ["--name=asked"])
        asked = evaluate.load_run("out/asked")
        letters = "0123456789 to+-=xbase/\t\n\0ä;<>'\"\\"
        for _ in range(10 * n):
            text = "".join(rng.choice(letters) for _ in range(rng.randint(0, 20)))
            try:
                evaluate.typed_input(asked, text)
            except SystemExit as exit:
                assert isinstance(exit.code, str), exit.code
        for _ in range(10 * n):
            read_spoilt_traces(rng)
        for _ in range(n // 4):
            for folder in ("out/odd", "elsewhere/out/odd"):  # what was a base's may not be a factorization's
                shutil.rmtree(folder, ignore_errors=True)
            odd_shell(rng)
        os.chdir(ROOT)
    if write:
        note({"random values in a config": n, "random text as an input": 10 * n,
              "spoilt files of traces": 10 * n, "odd shells": n // 4})
    print(f"{n - told} runs ended well, {told} in one line")


if __name__ == "__main__":
    main(int(sys.argv[1]), "--write" in sys.argv)
