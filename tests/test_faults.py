"""What users of other projects report, tried here: shared names, two programs in one folder, odd shells and folders."""
import contextlib
import copy
import dataclasses
import errno
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading

import matplotlib
import pytest
import torch
from matplotlib.text import Text

import evaluate
import factorize
import train_base
from conftest import ROOT
from harness import config, figures, runs
from harness.parallel import seeded
from model import GPT, GPTConfig, KVCache, sample
from tasks import EOS, PAD, Tokenizer
from test_pipeline import SHORT, program, run

BASE = ["configs/tiny_base.py", "--steps=2", "--eval_size=4", "--final_eval_size=4"]


def bytes_of(path):
    with open(path, "rb") as f:
        return f.read()


def fails(call, *says):
    """The call ends in one line that says all this."""
    with pytest.raises(SystemExit) as exit:
        call()
    assert "\n" not in exit.value.code and all(part in exit.value.code for part in says), exit.value.code


def test_a_run_never_replaces_one_of_another_kind(workplace):
    """Neither a finished one nor one in training, --overwrite or not; nor does a factorization share its base's name.
    Who is refused does not keep the folder."""
    run("kind")
    shutil.copytree("out/tiny_base", "out/half_trained", dirs_exist_ok=True)
    os.remove("out/half_trained/ckpt.pt")
    state = runs.load_checkpoint("out/tiny_base/ckpt.pt", "base") | {"kind": "state"}
    runs.save("out/half_trained/state.pt", state)
    for name, path in (("tiny_base", "ckpt.pt"), ("half_trained", "state.pt")):
        before = bytes_of(f"out/{name}/{path}")
        flags = [*SHORT, f"--name={name}", "--base=configs/tiny_base.py --name=another_base"]
        fails(lambda: factorize.factorize(config.load(factorize, flags)), f"out/{name}/{path}' is of a base")
        assert bytes_of(f"out/{name}/{path}") == before
    before = bytes_of("out/kind/ckpt.pt")
    fails(lambda: train_base.train(config.load(train_base, [*BASE, "--name=kind", "--overwrite=True"])),
          "out/kind/ckpt.pt' is of a factorization")
    runs.claim("out/kind").close()
    assert bytes_of("out/kind/ckpt.pt") == before
    flags = [*SHORT, "--name=new", "--base=configs/tiny_base.py --name=new"]
    fails(lambda: factorize.factorize(config.load(factorize, flags)), "share out/new")
    assert not os.path.exists("out/new")


@pytest.mark.parametrize("file", ["ckpt.pt", "state.pt", "result.json"])
def test_a_checkpoint_a_state_or_a_result_that_stands_alone_is_a_run_as_well(workplace, file):
    folder = f"out/{file}_stands_alone"
    os.makedirs(folder, exist_ok=True)
    shutil.copy(f"out/tiny_base/{'result.json' if file == 'result.json' else 'ckpt.pt'}", f"{folder}/{file}")
    before, cfg = bytes_of(f"{folder}/{file}"), config.load(train_base, [*BASE, f"--name={file}_stands_alone"])
    fails(lambda: train_base.train(cfg), "holds a run already")
    assert bytes_of(f"{folder}/{file}") == before


def test_a_run_killed_before_it_saved_anything_is_of_its_kind_as_well(workplace):
    os.makedirs("out/killed", exist_ok=True)
    runs.write_json("out/killed/config.json", dict(base="configs/tiny_base.py", name="killed"))
    runs.write("out/killed/log.jsonl", lambda f: None)
    cfg = config.load(train_base, [*BASE, "--name=killed", "--resume=True"])
    fails(lambda: train_base.train(cfg), "out/killed/config.json' is of a factorization")


@pytest.mark.parametrize("key", ["config", "model_config", "vocab", "c_base"])
def test_a_checkpoint_that_lacks_something_is_refused_in_one_line(workplace, key):
    os.makedirs("out/lacking", exist_ok=True)
    checkpoint = runs.load_checkpoint("out/tiny_base/ckpt.pt", "base")
    del checkpoint[key]
    torch.save(checkpoint, "out/lacking/ckpt.pt")
    fails(lambda: train_base.load_base("out/lacking/ckpt.pt"), "out/lacking/ckpt.pt", key)
    torch.save({"config": 3}, "out/lacking/ckpt.pt")
    flags = [*BASE, "--name=lacking"]
    fails(lambda: train_base.train(config.load(train_base, flags)), "holds a run already")


@pytest.mark.parametrize("kind, key, other", [("base", "best", "pool"), ("factorization", "pool", "best")])
def test_a_state_that_lacks_something_is_refused_by_what_its_own_kind_needs(workplace, kind, key, other):
    keys = runs.KEYS["state"] | runs.OF_STATE[kind] - {key}
    cfg = {"task": "grid"} if kind == "base" else {"base": "b"}
    content = dict.fromkeys(keys, 0) | {"kind": "state", "config": cfg}
    runs.save("state_of_none.pt", content)
    fails(lambda: runs.load_checkpoint("state_of_none.pt", "state"), f"it lacks {key}")
    runs.save("state_of_none.pt", content | {key: 0})
    assert other not in runs.load_checkpoint("state_of_none.pt", "state")


@pytest.fixture
def holder(workplace):
    """A process that claims out/held, until it is killed."""
    code = "from harness import runs; claimed = runs.claim('out/held'); print('ready', flush=True); input()"
    held = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stdin=subprocess.PIPE,
                            env=os.environ | {"PYTHONPATH": ROOT})
    assert held.stdout.readline() == b"ready\n"
    yield held
    held.kill()
    held.wait()


def test_two_programs_do_not_share_a_folder(holder):
    """The second one says which process is at work, also where it is the base that is in training; a claim ends with
    its process, however that ends."""
    base = config.load(train_base, [*BASE, "--name=held", "--overwrite=True"])
    says = f"process {holder.pid} is at work in 'out/held'"
    fails(lambda: train_base.train(base), says)
    with open("out/held/log.jsonl", "w"):
        flags = [*SHORT, "--name=second", "--base=configs/tiny_base.py --name=held --steps=2"]
    fails(lambda: factorize.factorize(config.load(factorize, flags)), says)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    train_base.train(base)
    assert os.path.exists("out/held/ckpt.pt")


def test_a_folder_is_not_replaced_while_it_is_evaluated(holder):
    """Else result.json would be of another run than ckpt.pt."""
    fails(lambda: evaluate.main(["out/held"]), f"process {holder.pid} is at work")


def test_a_file_system_without_locks_is_no_obstacle(workplace, monkeypatch):
    def no_lock(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(runs.fcntl, "flock", no_lock)
    train_base.train(config.load(train_base, [*BASE, "--name=unlocked"]))
    assert os.path.exists("out/unlocked/ckpt.pt")


def test_a_run_gives_its_folder_back_however_it_ends(workplace):
    cfg = config.load(train_base, [*BASE, "--name=again", "--overwrite=True"])
    kept = runs.Run(cfg)  # nothing is freed by being forgotten
    with pytest.raises(ZeroDivisionError), kept:
        1 / 0
    with runs.Run(cfg):
        fails(lambda: runs.claim("out/again"), str(os.getpid()))


def test_a_signal_before_the_first_step_ends_the_program(workplace):
    with pytest.raises(SystemExit) as exit, runs.Run(config.load(train_base, [*BASE, "--name=early"])):
        os.kill(os.getpid(), signal.SIGTERM)
        assert False, "goes on"
    assert exit.value.code == 128 + signal.SIGTERM


def test_a_run_works_in_a_thread(workplace):
    found = []
    thread = threading.Thread(target=lambda: found.append(run("thread")))
    thread.start()
    thread.join()
    assert found and os.path.exists("out/thread/ckpt.pt")


def test_samples_of_a_row_end_where_they_would_alone(workplace, monkeypatch):
    """Each row has the room of its own prompt, up to the block, also beside a longer or a shorter one. The likeliest
    tokens, among which there is no <eos>."""
    base, task, _ = train_base.load_base("out/tiny_base/ckpt.pt")
    prompt, logits = Tokenizer(task.vocab).prompt("0 1 to 2 3".split()), base.logits
    endless = torch.zeros(base.config.vocab_size).index_fill(0, torch.tensor([EOS, PAD]), -torch.inf)
    monkeypatch.setattr(base, "logits", lambda hidden: logits(hidden) + endless)
    prompts = [prompt, 2 * prompt, prompt[:3]]
    alone = [sample(base, [each], seeded(0), temperature=0)[0][0] for each in prompts]
    together, _ = sample(base, prompts, seeded(0), temperature=0)
    for each, one, row in zip(prompts, alone, together):
        assert len(one) == base.config.block_size - len(each) and torch.equal(row[row != PAD], one)


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "TkAgg", "nonsense"])
def test_figures_need_no_window_whatever_the_environment_says(tmp_path, backend):
    code = ("import torch; from harness import figures; "
            f"figures.draw_matching(torch.eye(2), [0, 1], ('a', 'b'), '{tmp_path}/matching.png')")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"MPLBACKEND": backend},
                          capture_output=True, text=True)
    assert done.returncode == 0 and os.path.getsize(tmp_path / "matching.png") > 5000, done.stderr


@pytest.mark.filterwarnings("error:Glyph")
def test_tokens_are_drawn_as_they_are(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Text, "draw", lambda text, *args: drawn.append((text.get_text(), text.get_parse_math())))
    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)  # by a matplotlibrc
    for tokens in ("$ x $", "{ \\frac _ ^", "é 中 %"):
        traces = [("a", [tokens])]
        figures.draw_traces(tokens, traces, traces, ("a",), tmp_path / "traces.png")
        assert any(tokens in text for text, _ in drawn) and not any(parsed for _, parsed in drawn)
        drawn.clear()


def shell(command, cwd):
    return subprocess.run(["bash", "-c", command], cwd=cwd, capture_output=True, text=True)


def test_programs_run_with_stdout_closed_and_into_a_pipe_that_closes(workplace):
    """Nobody may read what a run says, or it does not fit on the disk: the run goes on. Its files are its own, also
    where the descriptors of stdout and stderr are free."""
    python = sys.executable
    for i, to in enumerate(("0<&- >&- 2>&-", "2>&1 | head -1", ">/dev/full 2>&-")):
        flags = " ".join([*BASE, "--eval_every=1", f"--name=closed{i}"])
        done = shell(f"set -o pipefail; {python} {ROOT}/train_base.py {flags} {to}", workplace)
        assert done.returncode == 0 and not done.stderr, (to, done.stderr)
        assert os.path.exists(f"out/closed{i}/ckpt.pt")
        assert [entry["step"] for entry in runs.read_log(f"out/closed{i}")] == [1, 2]
        assert bytes_of(f"out/closed{i}/pid").isdigit()
    done = shell(f"{python} -c 'from harness import config; config.say(str())' <&- >&- 2>&-", ROOT)
    assert done.returncode == 0  # also before a run begins
    done = shell(f"{python} -u {ROOT}/tasks.py | head -2", workplace)
    assert done.returncode == 0 and not done.stderr and len(done.stdout.splitlines()) == 2


def test_a_config_may_be_a_pipe_and_import_modules(workplace):
    lines = ("import math\\nfrom math import sqrt\\n"
             "task = 'grid_pathfinding'\\nsteps = int(math.sqrt(4))\\nname = 'piped'\\n")
    more = " ".join(BASE[2:] + ["--overwrite=True", "--block_size=64", "--n_layer=1", "--n_embd=16"])
    done = shell(f'{sys.executable} {ROOT}/train_base.py <(printf "{lines}") {more}', workplace)
    assert done.returncode == 0 and os.path.exists("out/piped/ckpt.pt"), done.stderr


@pytest.mark.parametrize("text", [b"\xef\xbb\xbfn_layer = 1\n", b"# -*- coding: latin-1 -*-\n# \xe9\nn_layer = 1\n"])
def test_a_config_may_have_any_encoding_that_python_reads(tmp_path, text):
    (tmp_path / "base.py").write_bytes(text + b"task = 'grid_pathfinding'\n")
    assert config.load(train_base, [str(tmp_path / "base.py")]).n_layer == 1


@pytest.mark.parametrize("text, says", [
    ("import sys\nsys.exit(0)", "SystemExit"), ("raise SystemExit", "SystemExit"), ("name = 'a\\nb'", "'name'"),
    ("name = 'a\\0b'", "'name'"), ("name = ''", "'name'"), (None, "is a folder"),
    ("raise ImportError('one\\n\\ntwo')", "ImportError: one two")])
def test_a_config_that_cannot_be_used_is_one_line(tmp_path, text, says):
    path = tmp_path / "base.py"
    path.mkdir() if text is None else path.write_text(f"task = 'grid_pathfinding'\n{text}\n")
    fails(lambda: config.load(train_base, [str(path)]), says)


def test_no_config_is_looked_for_where_nothing_can_be_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(os, "listdir", lambda path: errno.EACCES / 0)
    fails(lambda: config.load(train_base, [str(tmp_path / "base.py")]), "does not exist")


def test_a_base_is_looked_up_beside_the_config_file_and_this_is_said(tmp_path, monkeypatch, capsys):
    """As `base` says from there, or by the name of its file alone; its flags are kept."""
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "run.py").write_text("base = 'bases/tiny.py  --seed=3 --n_embd=16'\nn_latents = 2\n")
    (tmp_path / "my" / "tiny.py").write_text("task = 'grid_pathfinding'\n")
    monkeypatch.chdir(tmp_path)
    for place in ("my/tiny.py", "my/bases/tiny.py"):  # the latter, where there are both
        cfg = config.load(factorize, ["my/run.py"])
        assert cfg.base == f"{place} --seed=3 --n_embd=16" and f"taken to be '{place}'" in capsys.readouterr().out
        base = factorize.load_base_config(cfg)
        assert (base.seed, base.n_embd, base.name) == (3, 16, "tiny")
        (tmp_path / "my" / "bases").mkdir(exist_ok=True)
        shutil.copy("my/tiny.py", "my/bases/tiny.py")


def test_a_terminal_of_few_characters_shows_them_as_codes(workplace):
    flags = " ".join([*BASE, "--name=é"])
    done = shell(f"PYTHONIOENCODING=ascii {sys.executable} {ROOT}/train_base.py {flags}", workplace)
    assert done.returncode == 0 and "\\xe9 step 2/2" in done.stdout, done.stderr


def test_ctrl_c_before_the_first_step_leaves_no_traceback(workplace):
    code = ("import os, runpy, signal, sys, train_base; sys.argv = sys.argv[1:]; "
            "sys.modules['tasks'].Task.traces = lambda *args: os.kill(os.getpid(), signal.SIGINT); "
            "runpy.run_path(sys.argv[0], run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", code, f"{ROOT}/train_base.py", *BASE, "--name=interrupted"],
                          cwd=workplace, env=os.environ | {"PYTHONPATH": ROOT}, capture_output=True, text=True)
    assert done.returncode == -signal.SIGINT and not done.stderr


def test_ctrl_c_leaves_no_traceback_while_a_file_is_read(tmp_path):
    os.mkfifo(tmp_path / "traces.jsonl")
    reader = subprocess.Popen([sys.executable, f"{ROOT}/tasks.py", "traces.jsonl"], cwd=tmp_path,
                              stderr=subprocess.PIPE)
    with open(tmp_path / "traces.jsonl", "w"):  # waits until it is opened on the other side, too
        reader.send_signal(signal.SIGINT)
        assert reader.communicate()[1] == b"" and reader.returncode == -signal.SIGINT


@pytest.mark.parametrize("script", ["train_base.py", "factorize.py", "evaluate.py"])
def test_ctrl_c_leaves_no_traceback_while_packages_load(tmp_path, script):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, *more):\n"
        "        if name == 'torch':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupt())\n")
    done = subprocess.run([sys.executable, f"{ROOT}/{script}", "-h"], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.returncode == -signal.SIGINT and not done.stderr


def test_help_ends_quietly_and_leaves_signals_to_the_caller(workplace):
    before, found = signal.getsignal(signal.SIGPIPE), []

    def ask():
        with pytest.raises(SystemExit) as exit:
            config.load(train_base, ["--help"])
        found.append(exit.value.code)

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert found == [0] and signal.getsignal(signal.SIGPIPE) == before
    done = shell(f"{sys.executable} {ROOT}/train_base.py --help | true", workplace)
    assert not done.stderr


def test_a_signal_is_noted_where_nobody_reads_the_message(workplace, monkeypatch):
    """A pipe that stderr goes into may be closed by the same Ctrl-C: the step is finished and saved all the same."""
    def closed(*args):
        raise BrokenPipeError

    cfg = config.load(train_base, [*BASE, "--name=unread", "--overwrite=True"])
    monkeypatch.setattr(runs.Run, "check_finite", lambda *args: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr(runs.os, "write", closed)
    with pytest.raises(SystemExit) as exit:
        train_base.train(cfg)
    assert exit.value.code == 128 + signal.SIGTERM and os.path.exists("out/unread/state.pt")


def test_samples_are_of_the_models_own_type(workplace):
    base, task, _ = train_base.load_base("out/tiny_base/ckpt.pt")
    prompt = Tokenizer(task.vocab).prompt("0 1 to 2 3".split())
    models = base, copy.deepcopy(base).double()
    single, double = (sample(model, [prompt], seeded(0), temperature=0) for model in models)
    assert double[1].shape == single[1].shape and torch.equal(single[0], double[0])


def test_a_config_finds_its_base_from_another_folder(workplace, tmp_path):
    """Beside the config file, if not where `base` says; out/ is where the program runs."""
    os.makedirs(tmp_path / "out")
    shutil.copytree("out/tiny_base", tmp_path / "out" / "tiny_base")
    flags = [*SHORT[1:], "--steps=1", "--name=elsewhere"]
    code, out, err = program("factorize.py", os.path.join(ROOT, "configs", "tiny_discrete.py"), *flags, cwd=tmp_path)
    assert code == 0 and os.path.exists(tmp_path / "out" / "elsewhere" / "metrics.json"), err


def test_more_inputs_than_there_are_are_all_there_are(workplace, monkeypatch, capsys):
    """At once; --show says how many there are, if it was asked for more."""
    task = train_base.load_base("out/tiny_base/ckpt.pt")[1]
    found = evaluate.different_inputs(task, 10 ** 6, "test")
    grids = {tuple(x) for x in found}
    assert len(grids) == len(found) > 20
    shown = []
    monkeypatch.setattr(evaluate, "load_run", lambda folder: (None, None, task))
    monkeypatch.setattr(evaluate, "show", lambda run, xs: shown.append(xs))
    for n in (len(found), len(found) + 1):
        evaluate.main(["out/tiny_base", f"--show={n}"])
        said = capsys.readouterr().out
        assert (f"has {len(found)} test inputs" in said) == (n > len(found)) and shown.pop() == found
    assert all(tuple(task.sample_input(random.Random(i), "test")) in grids for i in range(500))


def test_a_result_of_changed_code_says_so(tmp_path, monkeypatch):
    def git(*args):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *args], cwd=tmp_path, check=True,
                       capture_output=True)

    git("init")
    os.mkdir(tmp_path / "harness")
    (tmp_path / "code.py").write_text("a = 1\n")
    (tmp_path / "result.json").write_text("1")
    git("add", ".")
    git("commit", "-m", "first")
    monkeypatch.setattr(runs, "__file__", str(tmp_path / "harness" / "runs.py"))
    clean = runs.current_commit()
    assert re.fullmatch("[0-9a-f]{7,}", clean)
    monkeypatch.setenv("GIT_DIR", os.path.join(ROOT, ".git"))  # in a hook of another repository, say
    (tmp_path / "result.json").write_text("2")  # which another run replaced
    assert runs.current_commit() == clean
    (tmp_path / "code.py").write_text("a = 2\n")
    assert runs.current_commit() == f"{clean}-dirty"


def test_a_result_names_every_commit_that_made_it(workplace, monkeypatch):
    """Of a run that went on with other code, and of its evaluation."""
    for commit, flags, fails_at in (("a", ["--save_every=1"], 2), ("a", ["--save_every=1", "--resume=True"], 3),
                                    ("b", ["--save_every=1", "--resume=True"], 0)):
        cfg = config.load(factorize, [*SHORT, "--name=several", *flags])
        monkeypatch.setattr(runs, "current_commit", lambda: commit)
        step = [cfg.save_every if fails_at < 3 else 2]

        def stop(run, *args):
            step[0] += 1
            if fails_at and step[0] > fails_at:
                sys.exit(f"stopped at {step[0]}")

        monkeypatch.setattr(runs.Run, "check_finite", stop)
        with pytest.raises(SystemExit) if fails_at else contextlib.nullcontext():
            factorize.factorize(cfg)
    monkeypatch.setattr(runs, "current_commit", lambda: "c-dirty")
    evaluate.evaluate("out/several")
    with open("out/several/result.json") as f:
        result = json.load(f)
    assert (result["commit"], result["evaluated_by"]) == ("a, b", "c-dirty")


def test_a_cache_that_is_filled_in_pieces_needs_a_mask(workplace):
    """Without one, queries would be taken for the first positions. With one, pieces give what the whole gives."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(20, 0, 16, n_layer=2, n_head=2, n_embd=16)).requires_grad_(False)
    ids, whole = torch.randint(10, 20, (2, 8)), None
    for pieces in ((8,), (5, 3), (1, 6, 1)):
        caches, done, found = [KVCache(model.embed.weight, 2, 2, 8, 8) for _ in range(2)], 0, []
        for n in pieces:
            positions, mask = torch.arange(done, done + n).expand(2, n), torch.ones(8, 8).tril().bool()
            mask = mask[done:done + n, :done + n]
            if done:
                with pytest.raises(AssertionError, match=f"{n} queries of {done + n} keys"):
                    model.hidden_states(ids[:, done:done + n], positions, None, copy.deepcopy(caches))
            found.append(model.hidden_states(ids[:, done:done + n], positions, mask, caches)[-1])
            done += n
        whole = torch.cat(found, dim=1) if whole is None else whole
        assert torch.allclose(torch.cat(found, dim=1), whole, atol=1e-6)
    assert torch.allclose(model.hidden_states(ids)[-1], whole, atol=1e-6)


def test_a_folder_that_cannot_be_made_or_that_goes_away_is_one_line(workplace, tmp_path, monkeypatch):
    cfg = config.load(train_base, [*BASE, "--name=gone", "--save_every=1"])
    monkeypatch.setattr(runs.Run, "check_finite", lambda *args: shutil.rmtree("out/gone"))
    fails(lambda: train_base.train(cfg), "out/gone")
    (tmp_path / "out").write_text("a file")
    monkeypatch.chdir(tmp_path)
    fails(lambda: train_base.train(cfg), "cannot work in 'out/gone'")


def test_a_base_that_cannot_be_saved_leaves_the_old_result_beside_the_old_checkpoint(workplace, monkeypatch):
    train_base.train(config.load(train_base, [*BASE, "--name=both", "--overwrite=True"]))
    before = {name: bytes_of(f"out/both/{name}") for name in ("ckpt.pt", "result.json", "metrics.json")}

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    again = [*BASE, "--name=both", "--seed=5"]
    fails(lambda: train_base.train(config.load(train_base, [*again, "--overwrite=True"])), "cannot write", "ckpt.pt")
    assert {name: bytes_of(f"out/both/{name}") for name in before} == before
    fails(lambda: train_base.train(config.load(train_base, [*again, "--resume=True"])), "a checkpoint and no saved")


def test_a_log_of_other_bytes_is_no_obstacle(workplace):
    """What stands in it before the saved state stays as it is, and the resumed run saves its states."""
    flags = [*BASE, "--name=bytes", "--steps=3", "--eval_every=1", "--save_every=1"]
    cfg = config.load(train_base, flags)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs.Run, "check_finite", lambda run, step, *more: sys.exit("stop") if step == 1 else None)
        fails(lambda: train_base.train(cfg), "stop")
    with open("out/bytes/log.jsonl", "rb+") as f:
        f.write(b"\xff\xfe")
    train_base.train(config.load(train_base, [*flags, "--resume=True"]))
    assert bytes_of("out/bytes/log.jsonl").startswith(b"\xff\xfe") and bytes_of("out/bytes/log.jsonl").count(b"\n") == 3
    assert runs.read_log("out/bytes") == []
    with open("out/bytes/pid", "wb") as f:
        f.write(b"\xff\xfe")
    runs.claim("out/bytes").close()


def test_a_checkpoint_that_may_not_be_read_is_not_called_broken(workplace, monkeypatch):
    """What says so may be removed."""
    def refuse(path, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(SystemExit) as exit:
        runs.load_checkpoint("out/tiny_base/ckpt.pt", "base")
    assert "Permission denied" in exit.value.code and not re.search("truncated|trained again", exit.value.code)


@pytest.mark.parametrize("steps, says", [
    (lambda x: ["right", "1"], "'r'"), (lambda x: [["right", ";", "1"], []], "empty step"),
    (lambda x: [[random.choice("12345678")] for _ in range(9)], "another way each time"),
    (lambda x: [["ans", "1"]], "solves"), (lambda x: 1 + "a", "unsupported operand")])
def test_a_strategy_that_leaves_no_proper_trace_stops_before_training(monkeypatch, steps, says):
    """It is a programmer's mistake, so that its place is shown. A sequence of tokens is no list of steps."""
    task = dataclasses.replace(train_base.TASKS["grid_pathfinding"], distinct=False)
    task = dataclasses.replace(task, steps={**task.steps, "new": steps})
    monkeypatch.setitem(train_base.TASK_FUNCTIONS, "grid_pathfinding", lambda: task)
    cfg = config.load(train_base, [*BASE, "--task_sizes={}", "--name=odd_task"])
    with pytest.raises((AssertionError, TypeError, KeyError), match=says):
        train_base.make_task(vars(cfg))


def test_of_too_many_strategies_no_matrix_is_drawn(workplace, monkeypatch):
    """A file may have a label for every record."""
    run("labels")
    many = {f"strategy {i}": None for i in range(98)}
    load_run, drawn = evaluate.load_run, []
    monkeypatch.setattr(figures, "draw_matching", lambda *args: drawn.append(args))
    for more, n in ((98, 0), (97, 1)):
        def labelled(folder):
            checkpoint, base, task, *rest = load_run(folder)
            names = dict(itertools.islice(many.items(), more))
            weights = len(task.strategies) * [1.0] + more * [0.0]
            return checkpoint, base, dataclasses.replace(task, steps=task.steps | names, weights=weights), *rest

        monkeypatch.setattr(evaluate, "load_run", labelled)
        evaluate.evaluate("out/labels")
        assert len(drawn) == n


def test_evaluation_leaves_a_folder_that_is_no_runs_as_it_is(tmp_path):
    (tmp_path / "pid").write_text("my notes")
    fails(lambda: evaluate.answer([str(tmp_path)]), "ckpt.pt' does not exist")
    assert (tmp_path / "pid").read_text() == "my notes" and os.listdir(tmp_path) == ["pid"]


def test_too_little_memory_is_one_line(workplace):
    flags = [*BASE, "--name=large", "--n_embd=400000000", "--n_head=2"]
    fails(lambda: train_base.train(config.load(train_base, flags)), "large: there is not enough memory")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_base, "make_optimizers", lambda *args: exec("raise RuntimeError('std::bad_alloc')"))
        fails(lambda: train_base.train(config.load(train_base, [*BASE, "--name=small"])), "there is not enough memory")


@pytest.mark.parametrize("flags, says", [
    (["--task_sizes={'side': -8}"], "'task_sizes': a size is at least 0"),
    (["--strategy_weights={0: [1, 1, 1]}"], "a row for every kind of input: tall or square, wide"),
])
def test_sizes_and_weights_that_make_no_sense_are_named(workplace, flags, says):
    fails(lambda: train_base.train(config.load(train_base, [*BASE, "--name=odd", *flags])), says)


def test_a_weight_that_is_nothing_beside_the_others_is_no_weight(workplace):
    task = train_base.make_task({"task": "grid_pathfinding", "task_sizes": {}, "wordings": [], "distinct_inputs": True,
                                 "strategy_weights": [5e-324, 1e9, 1e9]})
    x = task.sample_input(random.Random(0))
    assert list(task.mixture(x).values()) == [0.5, 0.5] and len(task.solutions(x, random.Random(0))[0]) == 2


def test_a_comma_of_the_tasks_own_separates_no_steps(workplace, monkeypatch):
    own = {**train_base.TASKS, "commas": train_base.TASKS["grid_pathfinding"]}
    own["commas"] = train_base.dataclasses.replace(own["commas"], vocab=(*own["commas"].vocab, ","))
    monkeypatch.setattr(train_base, "TASKS", own)
    flags = [*BASE, "--name=odd", "--task=commas", "--wordings=['separators']"]
    fails(lambda: train_base.train(config.load(train_base, flags)), "'separators' needs the token ','")


def test_a_validation_loss_that_is_no_number_is_not_the_best(workplace, monkeypatch):
    """The weights before it are kept."""
    losses, validate = iter([3.0, float("nan")]), train_base.validate

    def some_nan(model, task, tokenizer, size, seed, split):
        found = validate(model, task, tokenizer, size, seed, split)
        return found | {"nll": next(losses, 3.0)}

    monkeypatch.setattr(train_base, "validate", some_nan)
    train_base.train(config.load(train_base, [*BASE, "--name=nan", "--eval_every=1"]))
    with open("out/nan/metrics.json") as f:
        assert json.load(f)["best_step"] == 1


def test_a_base_that_is_sure_of_every_solution_is_not_factorized(workplace):
    checkpoint = runs.load_checkpoint("out/tiny_base/ckpt.pt", "base") | {"c_base": 0.0}
    os.makedirs("out/sure", exist_ok=True)
    runs.save("out/sure/ckpt.pt", checkpoint)
    fails(lambda: run("of_sure", "--base=configs/tiny_base.py --steps=160 --name=sure"), "sure of every y")


def test_kinds_of_input_may_be_of_any_type_and_of_any_name():
    p, there = torch.rand(2, 3, 2), torch.ones(3, 2) > 0
    metrics = evaluate.exact_alignment(p, there, [0, 1], [0, None, "error"])
    assert {"exact_alignment_on_0", "exact_alignment_on_None", "exact_alignment_on_error"} < metrics.keys()
    _, names, *_ = evaluate.router_at_work(torch.rand(3, 2).log_softmax(1), p[0], p[1], [0, None, "error"])
    assert sorted(map(str, names)) == ["0", "None", "error"]


def test_one_input_alone_has_no_probe(workplace):
    """There would be nothing to score it on: nan."""
    task = train_base.TASKS["grid_pathfinding"]
    z, found = torch.randn(1, 4, 2), [*task.strategies, None]
    metrics = evaluate.semantics(torch.randn(6, 2), torch.arange(6) % 3, torch.zeros(6).long(), z, found, task, 0)
    assert "sampled_z_probe_accuracy" not in metrics and all(value == value for value in metrics.values())
