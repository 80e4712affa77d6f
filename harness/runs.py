"""The folder of a run: its log, the state to go on from, its checkpoint and its results.

    python factorize.py configs/sorting_discrete.py --resume=True

A file is replaced only by one that is complete and safe on disk. A signal ends a run after its next step, with all that
it needs to go on; a crash loses the steps since the last saved state.
"""
import contextlib
import dataclasses
import fcntl
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time

import torch
from tqdm import tqdm

from harness import parallel
from harness.config import fail, say

VERSIONS = {"base": 3, "factorization": 5, "state": 6}  # of what a checkpoint of each kind holds; no other is read
KEYS = {"base": {"config", "model_config", "model", "vocab", "c_base"},
        "factorization": {"config", "model_config", "model", "base", "posterior", "last_log", "clusters", "made_with",
                          "minutes"},
        "state": {"config", "step", "log_lines", "minutes", "made_with", "data", "model", "optimizers"}}
OF_STATE = {"base": {"best"}, "factorization": {"posterior", "c_base", "pool", "labels", "clusters"}}


class Run:
    """The run of a config in out/<name>. `with Run(cfg) as run:` refuses a folder that holds another run, unless cfg
    says to go on with it or to start again, and listens for signals until the end. run.state is what an interrupted run
    saved, or None. run.begin(data) comes first, run.end_of_step(...) after every step, run.finish(...) last."""

    def __init__(self, cfg):
        self.cfg, self.folder, self.signals, self.stepping = cfg, os.path.join("out", cfg.name), [], False
        self.state_path, self.log_file = self.path("state.pt"), None
        self.made_with = provenance()  # now: another commit may be checked out when the run is evaluated

    def path(self, name):
        return os.path.join(self.folder, name)

    def __enter__(self):
        self.lock = claim(self.folder)
        try:
            self.state = self.find_state()
            before = self.state["made_with"]["commit"] if self.state else ""
            if before and not before.endswith(self.made_with["commit"]):  # the code has changed since
                self.made_with["commit"] = f"{before}, {self.made_with['commit']}"
        except BaseException:
            self.lock.close()
            raise
        listening = threading.current_thread() is threading.main_thread()  # no other thread is told of signals
        self.handlers = {s: signal.signal(s, self.note) for s in (signal.SIGINT, signal.SIGTERM) if listening}
        return self

    def __exit__(self, kind, error, trace):
        with contextlib.suppress(OSError):  # the disk may be full
            if self.log_file:
                self.log_file.close()
        self.lock.close()
        for s, handler in self.handlers.items():
            signal.signal(s, handler)
        if isinstance(error, OSError):  # the log, on a full disk
            fail(f"{self.cfg.name}: {error}; what was saved before is as it was")
        no_memory = re.search("t allocate memory|bad_alloc", str(error))
        if no_memory or isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            fail(f"{self.cfg.name}: there is not enough memory; more chunks, or a smaller model, need less")
        if kind is None and self.signals:  # during the last step
            sys.exit(128 + self.signals[0])

    def note(self, number, frame):
        """Notes a first signal, whose step is finished. A second, or one before any step, ends the program at once."""
        if (self.signals or not self.stepping) and parallel.processes == 1:  # torchrun repeats a signal at once
            sys.exit(128 + number)
        self.signals.append(number)
        if sys.stderr:  # else descriptor 2 may be a file of the run
            with contextlib.suppress(OSError):  # whoever read it may be gone
                os.write(2, b"stopping after the next step; once more: at once\n")

    def find_state(self):
        for path in map(self.path, ("state.pt", "ckpt.pt", "config.json")):
            other = config_in(path)
            if other and ("task" in other) != hasattr(self.cfg, "task"):
                fail(f"'{path}' is of a {'base' if 'task' in other else 'factorization'}: give this run another --name")
        if self.cfg.resume and os.path.exists(self.state_path):
            state = load_checkpoint(self.state_path, "state")
            for key, value in dataclasses.asdict(self.cfg).items():
                if key not in ("threads", "save_every", "resume", "overwrite") and value != state["config"].get(key):
                    fail(f"'{self.folder}' was begun with {key} = {state['config'].get(key)!r}, but goes on with "
                         f"{value!r}; --overwrite=True starts again")
            return state
        if self.cfg.resume and not self.cfg.overwrite and os.path.exists(self.path("ckpt.pt")):
            evaluates = "" if hasattr(self.cfg, "task") else f"python evaluate.py {self.folder} evaluates it, "
            fail(f"'{self.folder}' holds a checkpoint and no saved state to go on from: {evaluates}--overwrite=True "
                 "starts again")
        there = any(map(os.path.exists, map(self.path, ("log.jsonl", "ckpt.pt", "state.pt", "result.json"))))
        if there and not self.cfg.resume and not self.cfg.overwrite:
            fail(f"'{self.folder}' holds a run already; --resume=True goes on with it, --overwrite=True starts again")

    def begin(self, data):
        """Makes the folder, or takes its log back to the saved state, which must be of the same data (tasks.Task)."""
        self.data = data
        if self.state and self.state["data"] != data:
            fail(f"'{self.folder}' was begun with other records than the file has now: --overwrite=True starts again")
        self.started = time.time() - 60 * (self.state["minutes"] if self.state else 0)
        parallel.barrier()  # until every process has seen what was there
        if parallel.rank:
            self.log_file = open(os.devnull, "a")
            return
        if not self.state and os.path.exists(self.state_path):  # of the run that is overwritten
            os.remove(self.state_path)
        lines = []
        if self.state:
            with open(self.path("log.jsonl"), "rb") as f:
                lines = f.readlines()[:self.state["log_lines"]]
        write(self.path("log.jsonl"), lambda f: f.writelines(lines))
        write_json(self.path("config.json"), dataclasses.asdict(self.cfg))
        self.log_file = open(self.path("log.jsonl"), "a")

    @property
    def minutes(self):
        return (time.time() - self.started) / 60

    def steps(self):
        """The steps that are left, with a progress bar where stdout is a terminal."""
        first, self.stepping = self.state["step"] if self.state else 0, True
        return tqdm(range(first, self.cfg.steps), desc=self.cfg.name, file=sys.stdout, disable=None)

    def due(self, step):
        """Whether `step` is the last one, or one after which cfg wants an evaluation."""
        return (step + 1) % self.cfg.eval_every == 0 or step + 1 == self.cfg.steps

    def log(self, entry):
        self.log_file.write(json.dumps(entry) + "\n")

    def check_finite(self, step, terms, gradients):
        """Stops the run in one line when a term, name -> value, or a gradient is not finite; the last state stays."""
        bad = [f"term {name}" for name, value in terms.items() if not math.isfinite(value)]
        if bad or not all(g is None or g.isfinite().all() for g in gradients):
            saved = os.path.exists(self.state_path)
            kept = f"'{self.state_path}' holds the last steps saved" if saved else "nothing was saved"
            fail(f"step {step + 1}: {(bad or ['a gradient'])[0]} is not finite; {kept}")

    def end_of_step(self, step, content):
        """Saves all that the rest of the run depends on, content() and the place in the log, every save_every steps and
        when a signal asked any process to stop; then ends the program."""
        received, done = parallel.union(self.signals), step + 1
        if done == self.cfg.steps or not (received or done % self.cfg.save_every == 0):
            return
        self.log_file.flush()
        with open(self.log_file.name, "rb") as f:
            log_lines = len(f.readlines())
        save(self.state_path, {"kind": "state", "config": dataclasses.asdict(self.cfg), "step": done,
                               "log_lines": log_lines, "minutes": self.minutes, "made_with": self.made_with,
                               "data": self.data, **content()})
        if received:
            say(f"{self.cfg.name}: stopped after step {done} of {self.cfg.steps}; the same command with "
                "--resume=True goes on")
            sys.exit(128 + received[0])

    def finish(self, checkpoint, metrics=None):
        """The run is complete: its checkpoint, and its result if there are metrics, take the place of its state."""
        self.log_file.close()
        save(self.path("ckpt.pt"), checkpoint)
        if metrics:
            write_result(self.folder, dataclasses.asdict(self.cfg), self.made_with, metrics)
        if parallel.rank == 0 and os.path.exists(self.state_path):
            os.remove(self.state_path)
        parallel.barrier()  # until the checkpoint is there for every process


def claim(folder):
    """Makes a run's folder and returns a lock on it, which ends with the process; none where a file system has none."""
    if parallel.rank:
        return open(os.devnull)
    try:
        os.makedirs(folder, exist_ok=True)
        lock = open(os.path.join(folder, "pid"), "a+", errors="replace")
        lock.seek(0)
        holder = lock.read()
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"process {holder or 'of another program'} is at work in '{folder}'")
        except OSError:
            pass
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        return lock
    except OSError as e:
        fail(f"cannot work in '{folder}': {e}")


def config_in(path):
    """The config in a checkpoint, a state or config.json; None where there is none that can be read."""
    try:
        if path.endswith(".json"):
            with open(path) as f:
                return dict(json.load(f))
        return dict(torch.load(path, map_location="cpu", weights_only=True)["config"])
    except Exception:
        return None


def training_state(model, optimizers):
    return {"model": model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers]}


def restore(state, model, optimizers):
    model.load_state_dict(state["model"])
    for optimizer, content in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(content)


def write(path, fill):
    """Writes a file atomically: what stood at `path` is replaced only by all that `fill(file)` writes, safe on disk."""
    if parallel.rank:
        return
    try:
        with open(path + ".tmp", "wb") as f:
            fill(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + ".tmp", path)
    except (OSError, RuntimeError) as e:  # a full disk, for example, of which torch makes a RuntimeError
        if os.path.exists(path + ".tmp"):
            os.remove(path + ".tmp")
        fail(f"cannot write '{path}' ({' '.join(str(e).split())}); what stood there before is as it was")


def save(path, content):
    """Writes a checkpoint or a state, of content["kind"], which load_checkpoint reads."""
    write(path, lambda f: torch.save(content | {"version": VERSIONS[content["kind"]]}, f))


def write_json(path, content):
    write(path, lambda f: f.write(json.dumps(content, indent=1).encode()))


def write_result(folder, config, made_with, metrics):
    """metrics.json, and result.json: the same with all that is needed to repeat the run."""
    write_json(os.path.join(folder, "metrics.json"), metrics)
    write_json(os.path.join(folder, "result.json"),
               {"config": config, "seed": config["seed"], **made_with, "metrics": metrics})


def read_log(folder):
    """The entries of log.jsonl; none where there is no log, or where a run is in the middle of writing it."""
    try:
        with open(os.path.join(folder, "log.jsonl")) as f:
            return [json.loads(line) for line in f]
    except (FileNotFoundError, ValueError):
        return []


def load_checkpoint(path, kind):
    """Reads a checkpoint of the given kind, or says in one line why it cannot."""
    if not os.path.exists(path):
        begun = os.path.exists(os.path.join(os.path.dirname(path), "log.jsonl"))
        fail(f"checkpoint '{path}' does not exist" + "; its run is not finished: --resume=True goes on with it" * begun)
    try:
        checkpoint = torch.load(path, map_location=torch.get_default_device(), weights_only=True)
    except OSError as e:
        fail(f"checkpoint '{path}' cannot be read: {e}")
    except Exception as e:  # truncated, not a checkpoint, or holding something other than tensors and plain types
        fail(f"checkpoint '{path}' cannot be read ({type(e).__name__}): truncated, or no checkpoint; without it, "
             "it is trained again")
    got = checkpoint.get("kind") if isinstance(checkpoint, dict) else None
    if got != kind:
        fail(f"'{path}' is no {kind} checkpoint" + f", but a {got} checkpoint" * bool(got))
    if checkpoint.get("version") != VERSIONS[kind]:
        fail(f"'{path}' has format version {checkpoint.get('version')}, this code reads version {VERSIONS[kind]}; "
             "without it, it is trained again")
    keys = KEYS[kind]
    if kind == "state":
        keys = keys | OF_STATE["base" if "task" in checkpoint.get("config", ()) else "factorization"]
    if lacking := sorted(keys - set(checkpoint)):
        fail(f"'{path}' is no {kind} checkpoint that is whole: it lacks {', '.join(lacking)}")
    return checkpoint


def current_commit():
    """The short hash of the commit checked out, "-dirty" if code is changed; "unknown" without git or repository."""
    def git(*args):
        return subprocess.run(["git", *args], capture_output=True, text=True,
                              cwd=os.path.dirname(__file__),  # this folder's, whatever repository a hook is at work in
                              env={key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
                              ).stdout.strip()
    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/*.py")  # no result files, say
        return (git("rev-parse", "--short", "HEAD") or "unknown") + "-dirty" * bool(changed)
    except OSError:
        return "unknown"


def provenance():
    """What a run is made with."""
    versions = {"python": platform.python_version(), "torch": str(torch.__version__), "machine": platform.machine()}
    return {"commit": current_commit(), "versions": versions}
