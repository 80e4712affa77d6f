"""Makes the result files of the pages again: the runs that have none yet, two at a time, their bases first.

    python tests/results.py                  # all that is left
    python tests/results.py --list           # what is left, and nothing is run
    python tests/results.py shares/ _seed0   # of paths below assets/results that contain all of these

A run that was interrupted goes on. Logs stand in out/logs. A result file that is to be made again is removed first.
"""
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RESULTS = os.path.join(ROOT, "assets", "results")
TASKS = ("addition", "base_conversion", "equation", "grid", "sorting", "summation")

SKEWED, RARE = "--strategy_weights=[6,3,1]", "--strategy_weights=[0.9,0.07,0.03]"
SEPARATORS, ALL_AS_THEY_COME = "--wordings=['separators']", "--distinct_inputs=False"
SHARES = {  # name: (config of the run, of the base, flags of the base, of the run)
    "grid_skewed": ("grid_discrete", "grid_base", SKEWED, ""),
    "equation_skewed": ("equation_discrete", "equation_base", SKEWED, ""),
    "summation_skewed": ("summation_discrete", "summation_base", SKEWED, ""),
    "sorting_skewed": ("sorting_discrete", "sorting_base", "--strategy_weights=[0.4,0.25,0.2,0.1,0.05]", ""),
    "grid_rare": ("grid_discrete", "grid_base", RARE, "--cluster_responses=36"),
    "equation_rare": ("equation_discrete", "equation_base", RARE, "--cluster_responses=36"),
    "grid_routed": ("grid_routed_discrete", "grid_routed_base", "", ""),
    "sorting_routed": ("sorting_routed_discrete", "sorting_routed_base", "", ""),
    "equation_missing": ("equation_missing_discrete", "equation_missing_base", "", ""),
    "grid_worded": ("grid_discrete", "grid_base", SEPARATORS, ""),
    "equation_worded": ("equation_discrete", "equation_base", SEPARATORS, ""),
    "summation_worded": ("summation_discrete", "summation_base", "--wordings=['separators','operands']", ""),
    "grid_worded_skewed": ("grid_discrete", "grid_base", f"{SEPARATORS} {SKEWED}", ""),
    "grid_unfiltered": ("grid_discrete", "grid_base", ALL_AS_THEY_COME, ""),
    "sorting_unfiltered": ("sorting_discrete", "sorting_base", ALL_AS_THEY_COME, ""),
}


def base_of(name, config, flags, seed):
    """The base of a run: its name, and `base` as a config has it."""
    name += f"_base_seed{seed}" if seed else "_base"
    return name, " ".join(f"configs/{config}.py --name={name} --seed={seed} {flags}".split())


def all_runs():
    """Path of a result file -> (name of its run, name of its base, the base's config and flags, what makes the run)."""
    found = {}
    for seed in range(3):
        for task in TASKS:
            base, of_base = base_of(task, f"{task}_base", "", seed)
            for kind, seeds in (("discrete", 2), ("continuous", 1)):
                for s in range(seeds):
                    name = f"{task}_{kind}_base{seed}_seed{s}"
                    found[f"tasks/{name}"] = name, base, of_base, ["factorize.py", f"configs/{task}_{kind}.py",
                                                                  f"--seed={s}"]
        for condition, (config, base_config, base_flags, flags) in SHARES.items():
            base, of_base = base_of(condition, base_config, base_flags, seed)
            name = f"{condition}_discrete_seed{seed}"
            found[f"shares/{name}"] = name, base, of_base, ["factorize.py", f"configs/{config}.py", f"--seed={seed}",
                                                           *flags.split()]
        name = f"two_tasks_discrete_seed{seed}"  # whose base no other program knows the task of
        of_base = f"tests/two_tasks_base.py --name=two_tasks_base_seed{seed} --seed={seed}"
        found[f"shares/{name}"] = name, None, of_base, ["tests/baselines.py", "two_tasks",
                                                       "tests/two_tasks_discrete.py", f"--seed={seed}"]
    return found


def call(name, command):
    """Whether a command succeeds; what it prints stands in out/logs."""
    os.makedirs(os.path.join(ROOT, "out", "logs"), exist_ok=True)
    with open(os.path.join(ROOT, "out", "logs", f"{name}.log"), "a") as log:
        code = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT).returncode
    print(f"{name}: {'done' if code == 0 else f'exit code {code}, see out/logs/{name}.log'}", flush=True)
    return code == 0


def finish(path, name, script, flags):
    """Makes a run, or what is left of it, and copies its result file; whether that is there."""
    path, folder = os.path.join(RESULTS, f"{path}.json"), os.path.join("out", name)
    result, checkpoint = (os.path.join(ROOT, folder, each) for each in ("result.json", "ckpt.pt"))
    command = [script, *flags, f"--name={name}", "--threads=1", "--resume=True"]
    if os.path.exists(checkpoint) and script == "factorize.py":  # it is only to be evaluated
        command = ["evaluate.py", folder]
    if not os.path.exists(result) and not call(name, command):
        return False
    os.makedirs(os.path.dirname(path), exist_ok=True)
    shutil.copyfile(result, path)
    return True


def make(group):
    """A base and the runs on it."""
    for path, (name, base, of_base, (script, *flags)) in group:
        if base and not finish(f"bases/{base}", base, "train_base.py", of_base.split()):
            return
        finish(path, name, script, [*flags, f"--base={of_base}"])


def main(argv):
    wanted = [each for each in argv if each != "--list"]
    left = {path: run for path, run in all_runs().items()
            if all(each in path for each in wanted) and not os.path.exists(os.path.join(RESULTS, f"{path}.json"))}
    print(f"{len(left)} runs are left:", *left, sep="\n  ")
    if "--list" in argv:
        return
    groups = {}  # the base's config and flags -> the runs on it, which one process after the other makes
    for path, run in left.items():
        groups.setdefault(run[2], []).append((path, run))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(make, groups.values()))


if __name__ == "__main__":
    main(sys.argv[1:])
