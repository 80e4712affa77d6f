"""Kills real runs at random moments and lets them go on: nothing may be lost.

    python tests/kill.py 20            # that many kills; a non-zero exit if anything was lost; CI runs it
    python tests/kill.py 20 --write    # the same, and writes assets/results/faults.json, a table of the README

The base and its factorization on configs/tiny_*.py, saved after every step, are killed by SIGKILL, SIGTERM and SIGINT
in turn and started again with --resume=True. What a kill leaves must load; the last weights and logs must be those of
runs that nothing has interrupted.
"""
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FLAGS = ["--save_every=1", "--eval_every=20"]
RUNS = [["train_base.py", "configs/tiny_base.py", "--steps=60", *FLAGS],
        ["factorize.py", "configs/tiny_discrete.py", "--steps=60", "--held_steps=20", "--responsibility_steps=30",
         "--eval_inputs=8", "--cluster_inputs=32", "--cluster_restarts=8", *FLAGS]]
SIGNALS = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]


def start(script, *flags):
    return subprocess.Popen([sys.executable, os.path.join(ROOT, script), *flags], stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True)


def result(name):
    """Weights and log of a finished run."""
    import torch
    with open(f"out/{name}/log.jsonl") as f:
        log = [{key: value for key, value in json.loads(line).items() if key != "minutes"} for line in f]
    return torch.load(f"out/{name}/ckpt.pt", weights_only=True)["model"], log


def main(kills, write):
    import torch
    rng, tried = random.Random(0), {s.name: 0 for s in SIGNALS}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.symlink(os.path.join(ROOT, "configs"), "configs")
        whole = {}
        for script, *flags in RUNS:
            began = time.time()
            assert start(script, *flags, "--name=whole", "--overwrite=True").wait() == 0
            whole[script] = time.time() - began, *result("whole")
        for script, *flags in itertools.cycle(RUNS):
            if sum(tried.values()) == kills:
                break
            seconds, weights, log = whole[script]
            before, code = sum(tried.values()), None
            while code is None:  # until the run is complete
                process = start(script, *flags, "--name=killed", "--resume=True")
                try:
                    code = process.wait(rng.uniform(0.1, 0.9) * seconds if sum(tried.values()) < kills else None)
                except subprocess.TimeoutExpired:
                    number = SIGNALS[sum(tried.values()) % 3]
                    process.send_signal(number)
                    tried[number.name] += 1
                    process.wait()
                    left = os.listdir("out/killed") if os.path.exists("out/killed") else []
                    for file in {"state.pt", "ckpt.pt"} & set(left):
                        torch.load(f"out/killed/{file}", weights_only=True)
                    if "ckpt.pt" in left:  # killed while it was evaluated
                        code = 0
            got_weights, got_log = result("killed")
            same = got_log == log and all(torch.equal(value, weights[key]) for key, value in got_weights.items())
            print(f"{script}: {sum(tried.values()) - before} kills, exit code {code}, "
                  f"{'the same' if same else 'ANOTHER'} result", flush=True)
            if code or not same:
                return process.stderr.read() or 1
            shutil.rmtree("out/killed")
        os.chdir(ROOT)
    if write:
        with open("assets/results/faults.json", "w") as f:
            json.dump(tried, f, indent=1)
    print("nothing was lost:", tried)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), "--write" in sys.argv))
