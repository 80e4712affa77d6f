"""What the README says is so: its file map, its commands and its tables."""
import os
import re
import subprocess

import pytest

import configs
import evaluate
import factorize
import losses
import metrics
import model
import parallel
import posterior
import tasks
import train_base
from conftest import ROOT
from tables import filled

with open(os.path.join(ROOT, "README.md")) as f:
    README = f.read()


def test_the_tables_are_those_of_the_result_files():
    assert filled(README) == README, "run python tests/tables.py"


def test_the_file_map_names_every_file_at_the_top_and_no_other():
    block = README.split("## Files")[1].split("```")[1]
    named = {line.split()[0].rstrip("/") for line in block.strip().splitlines() if line[0] != " "}
    tracked = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                             capture_output=True, text=True).stdout.split()
    there = {path.split("/")[0] for path in tracked}
    assert named == {name for name in there if not name.startswith(".")} - {"README.md", "LICENSE"}


def test_every_command_names_files_and_keys_that_exist():
    """Every `python ...` or `torchrun ...` line: its config loads with its flags; its scripts and options exist."""
    text = re.sub(r"## Add your own task.*?\n## ", "", README, flags=re.S)  # whose files are yet to be written
    commands = re.findall(r"(?:python|torchrun[^`\n]*) (train_base|factorize)\.py (configs/\S+\.py)"
                          r"((?: --\w+=[^\s`]+)*)", text)
    assert len({script for script, _, _ in commands}) == 2 and README.count("torchrun --standalone") > 0
    for script, path, flags in commands:
        module = {"train_base": train_base, "factorize": factorize}[script]
        configs.load(module, [os.path.join(ROOT, path), *flags.split()])
    for path in re.findall(r"python (tests/\S+\.py|evaluate\.py)", README):
        assert os.path.exists(os.path.join(ROOT, path)), path
    known = set(re.findall(r"--\w+", evaluate.__doc__))
    assert set(re.findall(r"evaluate\.py \S+ (--\w+)", README)) == known


def test_every_function_that_the_text_names_exists():
    """`losses.categorical_kl`, `model.GPT.with_latents` and so on; every term of the objective has its function."""
    modules = [evaluate, factorize, losses, metrics, model, parallel, posterior, tasks, train_base]
    named = re.findall(rf"`({'|'.join(module.__name__ for module in modules)})\.((?!py\b|json\b)[\w.]+)`", README)
    for module, path in named:
        found = next(each for each in modules if each.__name__ == module)
        for name in path.split("."):
            assert hasattr(found, name), f"README names {module}.{path}"
            found = getattr(found, name)
    terms = {name for name, f in vars(losses).items() if getattr(f, "__module__", "") == "losses"}
    helpers = {"expected", "token_weights", "grouped_logsumexp", "distillation"}
    assert terms - helpers <= {path for module, path in named if module == "losses"}


def test_every_config_loads_and_opens_with_its_command():
    for name in sorted(os.listdir(os.path.join(ROOT, "configs"))):
        if name.endswith(".py") and name != "__init__.py":
            path = os.path.join(ROOT, "configs", name)
            script = train_base if name.endswith("_base.py") else factorize
            configs.load(script, [path])
            with open(path) as f:
                assert f.readline().strip() == f"# python {script.__name__}.py configs/{name}"


@pytest.mark.parametrize("z", ["--z_dim=0", "--z_dim=2"])
def test_every_logged_number_is_explained(workplace, z):
    """Each key of log.jsonl and metrics.json has a row, or is covered by a row with a <placeholder>, in the README."""
    import json
    folder = factorize.factorize(configs.load(factorize, [
        "configs/tiny_discrete.py", "--name=logged", "--overwrite=True", z, "--steps=2", "--held_steps=1",
        "--responsibility_steps=1", "--cluster_inputs=16", "--cluster_responses=6", "--cluster_restarts=4",
        "--slot_steps=2", "--pool_size=64", "--eval_inputs=4", "--eval_samples=2"]))
    found = evaluate.evaluate(folder)
    with open(os.path.join(folder, "log.jsonl")) as f:
        keys = set(found) | {key for line in f for key in json.loads(line)}
    section = README.split("## What the numbers mean")[1].split("\n## ")[0]
    explained = re.findall(r"`(\w+|loss_fraction_<term>)`", section)
    assert {k for k in keys if not k.startswith("loss_fraction_")} <= set(explained)
    assert "loss_fraction_<term>" in explained
