"""Makes the result files of the pages again: the runs that have none yet, two at a time, their bases first.

    python tests/results.py                  # all that is left
    python tests/results.py --list           # what is left, and nothing is run
    python tests/results.py tasks/ sorting   # of paths below assets/results that contain all of these words
    python tests/results.py shares/          # runs on bases of unequal shares
    python tests/results.py shares/grid_skewed_continuous

A run that was interrupted goes on. Logs stand in out/logs. A result file that is to be made again is removed first.
"""
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RESULTS = os.path.join(ROOT, "assets", "results")
TASKS = ("addition", "base_conversion", "equation", "grid", "sorting", "summation")

SKEWED, RARE = "--strategy_weights=[6,3,1]", "--strategy_weights=[0.9,0.07,0.03]"
SEPARATORS, ALL_AS_THEY_COME = "--wordings=['separators']", "--distinct_inputs=False"
SHARES = {  # name: (config of the run, of the base, flags of the base, of the run)
    "grid_skewed": ("grid_discrete", "grid_base", SKEWED, ""),
    "equation_skewed": ("equation_discrete", "equation_base", SKEWED, ""),
    "summation_skewed": ("summation_discrete", "summation_base", f"{SKEWED} --steps=6000", ""),
    "sorting_skewed": ("sorting_discrete", "sorting_base", "--strategy_weights=[0.4,0.25,0.2,0.1,0.05]", ""),
    "grid_rare": ("grid_discrete", "grid_base", RARE, "--cluster_responses=36"),
    "equation_rare": ("equation_discrete", "equation_base", RARE,
                      "--cluster_responses=36 --steps=1700 --fixed_label_steps=600 --responsibility_steps=1060"),
    "grid_routed": ("grid_routed_discrete", "grid_routed_base", "", ""),
    "sorting_routed": ("sorting_routed_discrete", "sorting_routed_base", "", ""),
    "equation_missing": ("equation_missing_discrete", "equation_missing_base", "", ""),
    "grid_worded": ("grid_discrete", "grid_base", SEPARATORS, ""),
    "equation_worded": ("equation_discrete", "equation_base", SEPARATORS, ""),
    "addition_worded": ("addition_discrete", "addition_base", "--wordings=['separators','operands']", ""),
    "summation_worded": ("summation_discrete", "summation_base", "--wordings=['separators','operands']", ""),
    "grid_worded_skewed": ("grid_discrete", "grid_base", f"{SEPARATORS} {SKEWED}", ""),
    "grid_unfiltered": ("grid_discrete", "grid_base", ALL_AS_THEY_COME, ""),
    "sorting_unfiltered": ("sorting_discrete", "sorting_base", ALL_AS_THEY_COME, ""),
}


VARIED = {"grid": (3, 700, 300, 380), "equation": (3, 700, 300, 380), "sorting": (5, 1700, 600, 1060)}  # S, steps
ELBO = "--cluster_inputs=0 --fixed_label_steps=0 --responsibility_steps=0 --posterior=full"  # and nothing else
VARIANTS = {  # of the recipe, on as many pairs; {before}: steps before the ELBO, {rest}: those after fixed labels
    "found": "--n_latents=0",
    "twice": "--n_latents={twice}",
    "no_clusters": "--cluster_inputs=0 --fixed_label_steps=0 --responsibility_steps={before}",
    "no_responsibilities": "--fixed_label_steps={before} --responsibility_steps=0",
    "no_elbo": "--responsibility_steps={rest}",
    "full": "--posterior=full",
    "no_support": "--router_support_weight=0",
    "token_weighted": "--token_weighted_weight=1",
    "entropy": "--posterior_entropy_weight=0.1",
    "marginal": "--router_marginal_kl_weight=1",
    "jsd": "--jsd_weight=1",
    "elbo": f"{ELBO} --router_support_weight=0",
    "elbo_all": f"{ELBO} --token_weighted_weight=1 --posterior_entropy_weight=0.1 --router_marginal_kl_weight=1 "
                "--jsd_weight=1",
}


class Run(NamedTuple):
    name: str
    of_base: str  # `base` as a config has it: the config of the base, and flags
    base: str | None  # the base's name; None where no other program can train it
    command: list  # script, config, flags


def all_runs():
    """Path of a result file below assets/results, without .json -> Run."""
    found = {}

    def add(folder, name, base, base_config, base_flags, seed, command):
        base += f"_base_seed{seed}" if seed else "_base"
        of_base = " ".join(f"{base_config} --name={base} --seed={seed} {base_flags}".split())
        alone = command[0] != "factorize.py"
        found[f"{folder}/{name}"] = Run(name, of_base, None if alone else base, command)

    for seed in range(3):  # of the base
        for task in TASKS:
            for kind, s in (("discrete", 0), ("discrete", 1), ("continuous", 0)):
                add("tasks", f"{task}_{kind}_base{seed}_seed{s}", task, f"configs/{task}_base.py", "", seed,
                    ["factorize.py", f"configs/{task}_{kind}.py", f"--seed={s}"])
        for name, (config, base_config, base_flags, flags) in SHARES.items():
            add("shares", f"{name}_discrete_seed{seed}", name, f"configs/{base_config}.py", base_flags, seed,
                ["factorize.py", f"configs/{config}.py", f"--seed={seed}", *flags.split()])
        for name in ("grid_skewed", "grid_routed"):
            _, base_config, base_flags, _ = SHARES[name]
            add("shares", f"{name}_continuous_seed{seed}", name, f"configs/{base_config}.py", base_flags, seed,
                ["factorize.py", "configs/grid_continuous.py", f"--seed={seed}"])
        for task, (S, steps, fixed, balanced) in VARIED.items():
            for name, flags in VARIANTS.items():
                flags = flags.format(twice=2 * S, before=fixed + balanced, rest=steps - fixed).split()
                add("variants", f"{task}_{name}_seed{seed}", task, f"configs/{task}_base.py", "", 0,
                    ["factorize.py", f"configs/{task}_discrete.py", f"--seed={seed}", *flags])
        for what in ("unseen", "smaller"):
            add("splits", f"sorting_{what}_seed{seed}", "sorting", "configs/sorting_base.py", "", 0,
                ["tests/baselines.py", what, "configs/sorting_discrete.py", f"--seed={seed}"])
        add("shares", f"two_tasks_discrete_seed{seed}", "two_tasks", "tests/two_tasks_base.py", "", seed,
            ["tests/baselines.py", "two_tasks", "tests/two_tasks_discrete.py", f"--seed={seed}"])
    return found


def call(name, command):
    """Whether a command succeeds; what it prints stands in out/logs."""
    os.makedirs(os.path.join(ROOT, "out", "logs"), exist_ok=True)
    with open(os.path.join(ROOT, "out", "logs", f"{name}.log"), "a") as log:
        code = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT).returncode
    print(f"{name}: {'done' if code == 0 else f'exit code {code}, see out/logs/{name}.log'}", flush=True)
    return code == 0


def finish(path, name, command):
    """Makes a run, or what is left of it, and copies its result file; whether that is there."""
    path, folder = os.path.join(RESULTS, f"{path}.json"), os.path.join("out", name)
    result, checkpoint = (os.path.join(ROOT, folder, each) for each in ("result.json", "ckpt.pt"))
    if os.path.exists(checkpoint) and command[0] == "factorize.py":  # it is only to be evaluated
        command = ["evaluate.py", folder]
    else:
        command = [*command, f"--name={name}", "--threads=1", "--resume=True"]
    if not os.path.exists(result) and not call(name, command):
        return False
    os.makedirs(os.path.dirname(path), exist_ok=True)
    shutil.copyfile(result, path)
    return True


def make(group):
    """A base and the runs on it, path -> Run; whether all are made."""
    made = []
    for path, run in group.items():
        if run.base and not finish(f"bases/{run.base}", run.base, ["train_base.py", *run.of_base.split()]):
            return False
        made.append(finish(path, run.name, [*run.command, f"--base={run.of_base}"]))
    return all(made)


def main(argv):
    wanted = [each for each in argv if each != "--list"]
    left = {path: run for path, run in all_runs().items()
            if all(each in path for each in wanted) and not os.path.exists(os.path.join(RESULTS, f"{path}.json"))}
    print(f"{len(left)} runs are left:", *left, sep="\n  ", flush=True)
    groups = {}  # by base: two runs do not train the same one
    for path, run in left.items():
        groups.setdefault(run.of_base, {})[path] = run
    if "--list" not in argv:
        with ThreadPoolExecutor(2) as pool:
            sys.exit(not all(list(pool.map(make, groups.values()))))


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # whoever reads may have seen enough
    main(sys.argv[1:])
