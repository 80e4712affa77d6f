"""What the four pages say is so: tables, commands and flags, functions, links, the glossary and the file map."""
import importlib
import inspect
import json
import dataclasses
import os
import re
import shlex
import subprocess

import pytest

import evaluate
import factorize
import losses
import model
import posterior
import tasks
import train_base
from conftest import ROOT
from harness import config
from results import all_runs
from tables import PAGES, RENAMED, filled

HARNESS = sorted(name[:-3] for name in os.listdir(os.path.join(ROOT, "harness"))
                 if name.endswith(".py") and name != "__init__.py")
MODULES = {module.__name__: module for module in (evaluate, factorize, losses, model, posterior, tasks, train_base)}
MODULES |= {f"harness.{name}": importlib.import_module(f"harness.{name}") for name in HARNESS}
# Functions of losses.py that are no terms of the objective: parts of terms, labels, and what is measured.
NO_TERMS = {"token_weights", "distillation", "balanced_responsibilities", "importance_weighted_bound"}
SHORT = ["--overwrite=True", "--cluster_inputs=16", "--cluster_responses=6", "--cluster_searches=1",
         "--pool_size=64", "--eval_inputs=4"]
ALL_TERMS = {  # every stage, and every term with a weight: one of weight 0 may be absent from the log
    "discrete": ["--steps=3", "--fixed_label_steps=1", "--responsibility_steps=1", "--eval_samples=2", "--jsd_weight=1",
                 "--router_marginal_kl_weight=1", "--token_weighted_weight=1", "--posterior_entropy_weight=1"],
    "continuous": ["--steps=2", "--cell_steps=1", "--token_weighted_weight=1", "--posterior_variance_weight=1"]}


def read(page):
    with open(os.path.join(ROOT, page)) as f:
        return f.read()


TEXT = {page: read(page) for page in PAGES}
FRONT, RESULTS, TESTS, _ = (TEXT[page] for page in PAGES)


def code_of(text):
    """Every line of the code blocks of a page, indented or fenced, and every piece of code inside a sentence."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.M | re.S)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    lines = [line.strip() for block in fenced for line in block.splitlines()]
    lines += [line.strip() for line in re.findall(r"^    (\S.*)$", rest, flags=re.M)]
    return lines + re.findall(r"`([^`\n]+)`", rest)


def commands(text):
    """The commands of a page that start a script of ours: [script, arguments], without comments and redirections."""
    found = []
    for line in code_of(re.sub(r" \\\n *", " ", text)):  # a command may go on in the next line
        for part in re.split(r" && | ; | \| | > ", line):
            words = shlex.split(part, comments=True) if part.strip().startswith(("python ", "torchrun ")) else []
            script = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
            if script is not None and words[:2] != ["python", "-m"]:
                assert words[0] == "torchrun" or script == 1, line
                found.append((words[script], words[script + 1:]))
    return found


def made_on_page(text, path):
    """Whether the page shows the config file, whose first line is its command: the reader is to write it."""
    return re.search(rf"^```python\n# python \w+\.py {re.escape(path)}$", text, flags=re.M)


def added_on_page(text):
    """Config keys that a diff on the page adds: the reader is to add them."""
    return set(re.findall(r"^\+ +(\w+): ", text, flags=re.M))


def headings(text):
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    titles = re.findall(r"^#+ (.*)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_the_tables_are_those_of_the_result_files(page):
    assert filled(TEXT[page]) == TEXT[page], "run python tests/tables.py"


def test_the_front_page_is_short():
    assert len(FRONT.splitlines()) <= 200 and len(FRONT.encode()) <= 14_000


def test_the_code_tour_names_every_file_at_the_top_and_no_other():
    block = FRONT.split("\n## Code tour\n")[1].split("```")[1]
    named = {line.split()[0].rstrip("/") for line in block.splitlines()[1:] if line and line[0] != " "}
    tracked = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                             capture_output=True, text=True).stdout.split()
    there = {path.split("/")[0] for path in tracked if os.path.exists(os.path.join(ROOT, path))}
    assert named == {name for name in there if not name.startswith(".")} - {"README.md", "LICENSE"}
    assert {f"{name}.py" for name in MODULES if "." not in name} == {name for name in named if name.endswith(".py")}


def test_the_page_of_the_tests_names_every_file_beside_it_and_no_other():
    named = [name for line in TESTS.splitlines() if line.startswith("| `")
             for name in re.findall(r"`(\w+\.py)`", line.split(" | ")[0])]
    folder = os.listdir(os.path.join(ROOT, "tests"))
    assert sorted(named) == sorted(name for name in folder if name.endswith(".py"))


@pytest.mark.parametrize("page", PAGES)
def test_every_command_names_scripts_configs_and_flags_that_exist(page):
    """Configs load with the flags beside them, and the values make sense for their kind of z."""
    found = commands(TEXT[page])
    assert len(found) > 3
    for script, args in found:
        where = f"{page}: {script} {' '.join(args)}"
        assert os.path.exists(os.path.join(ROOT, script)), where
        documented, of_base = read(script).split('"""')[1], script == "train_base.py" or args[:1] == ["export"]
        if script == "tests/baselines.py":
            assert f"{script} {args[0]} " in documented, where
            args = args[1:]
        if script in ("train_base.py", "factorize.py", "tests/baselines.py"):
            if args == ["--help"] or made_on_page(TEXT[page], args[0]):
                continue
            module = train_base if of_base else factorize
            flags = [flag for flag in args[1:] if flag[2:].split("=")[0] not in added_on_page(TEXT[page])]
            cfg = config.load(module, [os.path.join(ROOT, args[0]), *flags])
            if module is factorize:
                factorize.check(cfg)
                factorize.load_base_config(dataclasses.replace(cfg, base=os.path.join(ROOT, cfg.base)))
        elif script == "evaluate.py":
            run, *flags = args
            name = run.removeprefix("out/")
            known = [os.path.exists(os.path.join(ROOT, "configs", f"{name}.py")), f"--name={name}" in TEXT[page],
                     name == "<run>"]
            assert run.startswith("out/") and any(known), where
            assert {flag.split("=")[0] for flag in flags} <= set(re.findall(r"--\w+", documented)), where
        else:
            for arg in args:  # a number, a config, or a word that the script's own docstring has
                exists = os.path.exists(os.path.join(ROOT, arg))
                assert arg.isdecimal() or exists or re.search(rf"{re.escape(arg)}(?!\w)", documented), where


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_in_the_text_exists(page):
    """Also one that stands alone in a sentence or in a table, such as `--chunks=32`."""
    known = set(factorize.Config.__dataclass_fields__) | set(train_base.Config.__dataclass_fields__)
    known |= {"show", "x", "write", "help"}  # of other scripts
    known |= {key for key, name in RENAMED.items() if name is None}  # once there were, and the page says so
    for code in re.findall(r"`(--[^`\n]+)`", TEXT[page]):
        unknown = set(re.findall(r"--(\w+)", code)) - known - added_on_page(TEXT[page])
        assert not unknown, f"{page}: {code}"


@pytest.mark.parametrize("page", PAGES)
def test_every_function_that_the_text_names_exists(page):
    """`losses.categorical_kl`, `model.GPT.with_latents`, `harness.parallel.gather` and so on."""
    names = "|".join(re.escape(name) for name in MODULES)
    for module, path in re.findall(rf"`({names})\.((?!py\b|json\b)[A-Za-z_][\w.]*)(?:\(\))?`", TEXT[page]):
        found = MODULES[module]
        for name in path.split("."):
            fields = getattr(found, "__dataclass_fields__", {})
            assert hasattr(found, name) or name in fields, f"{page}: {module}.{path}"
            found = getattr(found, name, None)


def test_every_term_of_the_objective_is_on_the_front_page():
    functions = {name for name, f in inspect.getmembers(losses, inspect.isfunction) if f.__module__ == "losses"}
    assert NO_TERMS <= functions
    code = " ".join(code_of(FRONT))
    missing = {name for name in functions - NO_TERMS if not re.search(rf"\b{name}\b", code)}
    assert not missing


def test_every_run_of_the_queue_of_results_has_configs_that_load():
    """Each under a name of its own, in one folder with no other, and its base, too."""
    found = all_runs()
    assert len({run.name for run in found.values()}) == len(found)
    for path, run in found.items():
        assert os.path.basename(path) == run.name
        (configured,) = [arg for arg in run.command if arg.endswith("_discrete.py") or arg.endswith("_continuous.py")]
        flags = [arg for arg in run.command if arg.startswith("--")]
        base = f"--base={os.path.join(ROOT, run.of_base)}"
        cfg = config.load(factorize, [os.path.join(ROOT, configured), *flags, base])
        factorize.check(cfg)
        assert run.base in (factorize.load_base_config(cfg).name, None)


def test_every_config_loads_and_opens_with_its_command():
    for name in sorted(os.listdir(os.path.join(ROOT, "configs"))):
        if name.endswith(".py"):
            path = os.path.join(ROOT, "configs", name)
            script = train_base if name.endswith("_base.py") else factorize
            config.load(script, [path])
            assert read(path).splitlines()[0] == f"# python {script.__name__}.py configs/{name}"


@pytest.mark.parametrize("kind", ["discrete", "continuous"])
def test_every_logged_number_is_explained(workplace, kind):
    """Each key of log.jsonl and metrics.json, of a base and of a factorization, has a row of the glossary, or is
    covered by a row with a <placeholder>."""
    folder = factorize.factorize(config.load(factorize, [
        f"configs/tiny_{kind}.py", f"--name=logged_{kind}", *SHORT, *ALL_TERMS[kind]]))
    keys = set(evaluate.evaluate(folder))
    for logged in (folder, os.path.join("out", "tiny_base")):
        with open(os.path.join(logged, "log.jsonl")) as f:
            keys |= {key for line in f for key in json.loads(line)}
    with open(os.path.join("out", "tiny_base", "metrics.json")) as f:
        keys |= set(json.load(f))
    rows = RESULTS.split("\n## What the numbers mean\n")[1].split("\n## ")[0].splitlines()
    explained = re.findall(r"`([\w<>]+)`", " ".join(row.split(" | ")[0] for row in rows if row.startswith("| `")))
    covered = [name.split("<")[0] for name in explained if "<" in name]
    assert {key for key in keys if not key.startswith(tuple(covered))} <= set(explained)
    assert any(key.startswith("loss_fraction_") for key in keys) and "c_base" in keys


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_and_image_exists(page):
    """Also the heading that a link jumps to."""
    links = re.findall(r"\]\(([^()\s#]*)(?:#([^()\s]+))?\)", TEXT[page])
    assert links
    for target, anchor in links:
        if "://" in target:
            continue
        path = os.path.normpath(os.path.join(ROOT, os.path.dirname(page), target)) if target else \
            os.path.join(ROOT, page)
        assert os.path.exists(path), f"{page}: {target}"
        if anchor:
            text = read(os.path.join(path, "README.md") if os.path.isdir(path) else path)
            assert anchor in headings(text), f"{page}: {target}#{anchor}"
