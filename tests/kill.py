"""Kills real runs at random moments and lets them go on: nothing may be lost.

    python tests/kill.py 24            # that many faults; a non-zero exit if anything was lost; CI tries 7
    python tests/kill.py 24 --write    # the same, and writes assets/results/faults.json, a table of tests/README.md

The base and its factorization on configs/tiny_*.py, saved after every step, are killed by SIGKILL, SIGTERM and SIGINT,
as one process or as two (torchrun), or run out of disk, or meet the same program once more in their folder, in turn,
and are started again with --resume=True. What a fault leaves must load; the last weights and logs must be those of runs
that nothing has interrupted.
"""
import contextlib
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FLAGS = ["--save_every=1", "--eval_every=20"]
RUNS = [["train_base.py", "configs/tiny_base.py", "--steps=60", *FLAGS],
        ["factorize.py", "configs/tiny_discrete.py", "--steps=60", "--fixed_label_steps=20",
         "--responsibility_steps=30", "--eval_inputs=8", "--cluster_inputs=32", "--cluster_searches=2", *FLAGS]]
FAULTS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT, "full disk": None,
          "the same program twice": None, "SIGKILL, two processes": signal.SIGKILL,
          "SIGTERM, two processes": signal.SIGTERM}


def small_disk():
    """No file of this process grows beyond 100 kB, less than a saved state takes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def start(script, *flags, fault=None):
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if "two" in (fault or "") else []
    return subprocess.Popen([sys.executable, *two, os.path.join(ROOT, script), *flags], stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True, start_new_session=True,
                            preexec_fn=small_disk if fault == "full disk" else None)


def strike(process, number):
    """Signals a run; SIGKILL also the processes that torchrun has started, each a group of its own: left alone, they go
    on, or wait half an hour for it if it has not yet brought them together."""
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as f:
        workers = list(map(int, f.read().split())) if number == signal.SIGKILL else []
    for group in (process.pid, *workers):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, number)


def result(name):
    """Weights and log of a finished run."""
    import torch
    with open(f"out/{name}/log.jsonl") as f:
        log = [{key: value for key, value in json.loads(line).items() if key != "minutes"} for line in f]
    return torch.load(f"out/{name}/ckpt.pt", weights_only=True)["model"], log


def note(tried):
    """Adds to assets/results/faults.json how many times each fault was tried."""
    path = os.path.join(ROOT, "assets", "results", "faults.json")
    with open(path) as f:
        tried = json.load(f) | tried
    with open(path, "w") as f:
        json.dump(tried, f, indent=1)


def main(kills, write):
    import torch
    rng, tried = random.Random(0), dict.fromkeys(FAULTS, 0)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.symlink(os.path.join(ROOT, "configs"), "configs")
        whole = {}
        for script, *flags in RUNS:
            began = time.time()
            assert start(script, *flags, "--name=whole").wait() == 0
            whole[script] = time.time() - began, *result("whole")
            shutil.rmtree("out/whole")
        for script, *flags in itertools.cycle(RUNS):
            if sum(tried.values()) == kills:
                break
            seconds, weights, log = whole[script]
            before, code = sum(tried.values()), None
            while code is None:  # until the run is complete
                fault = list(FAULTS)[sum(tried.values()) % len(FAULTS)] if sum(tried.values()) < kills else None
                command = script, *flags, "--name=killed", "--resume=True"
                process = start(*command, fault=fault)
                if fault == "full disk":
                    line = process.communicate()[1]
                    assert process.returncode == 1 and line.count("\n") == 1 and "cannot write" in line, line
                else:
                    try:
                        more = 6 if "two" in (fault or "") else 0  # they take longer to start
                        code = process.wait(rng.uniform(0.1, 0.9) * (seconds + more) if fault else None)
                        continue
                    except subprocess.TimeoutExpired:
                        if fault == "the same program twice":
                            second = start(*command)
                            line = second.communicate()[1]
                            told = f"process {process.pid} is at work" in line or "holds a checkpoint and" in line
                            refused = second.returncode == 1 and line.count("\n") == 1 and told
                            assert refused or process.poll() is not None, line
                        if process.poll() is None:
                            strike(process, FAULTS[fault] or signal.SIGKILL)
                        process.communicate()
                tried[fault] += 1
                left = os.listdir("out/killed") if os.path.exists("out/killed") else []
                for file in {"state.pt", "ckpt.pt"} & set(left):
                    torch.load(f"out/killed/{file}", weights_only=True)
                if "ckpt.pt" in left:  # killed while it was evaluated
                    code = 0
            got_weights, got_log = result("killed")
            same = got_log == log and all(torch.equal(value, weights[key]) for key, value in got_weights.items())
            print(f"{script}: {sum(tried.values()) - before} faults, exit code {code}, "
                  f"{'the same' if same else 'ANOTHER'} result", flush=True)
            if code or not same:
                return process.stderr.read() or 1
            shutil.rmtree("out/killed")
        os.chdir(ROOT)
    if write:
        note(tried)
    print("nothing was lost:", tried)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), "--write" in sys.argv))
