"""Trains the base model p(y|x) on traces of all strategies mixed.

    python train_base.py configs/sorting_base.py

Leaves out/sorting_base/ with ckpt.pt, config.json, log.jsonl, metrics.json and result.json. The lowest loss anybody can
reach is the entropy of the mixture, log S nats a sequence for S equally likely strategies: traces are deterministic
given one.
"""
import dataclasses
import functools
import json
import math
import os
import platform
import random
import signal
import subprocess
import sys
import time

import torch
from tqdm import tqdm

import configs
import parallel
from configs import fail
from model import GPT, GPTConfig, pad, sample_in_batches, score_base
from parallel import in_threads, seeded, sum_pieces
from tasks import TASK_FUNCTIONS, TASKS, Tokenizer

VERSIONS = {"base": 1, "factorization": 3, "state": 2}  # of what a checkpoint of each kind holds; no other is read


@dataclasses.dataclass(frozen=True)
class Config:
    task: str  # a name in tasks.TASKS
    name: str = ""  # of the run; its folder is out/<name>; default: the config file's name
    task_sizes: dict = dataclasses.field(default_factory=dict)  # arguments of the task's function: {"max_len": 6}
    strategy_weights: list | None = None  # mixture of strategies in the data, in the task's order; None: uniform
    n_layer: int = 3  # transformer blocks
    n_head: int = 4  # attention heads
    n_embd: int = 128  # width
    block_size: int = 160  # longest record, in tokens
    steps: int = 3000  # gradient steps
    batch_size: int = 64  # records a step, at most: every input comes with one record of each strategy
    crop: int = 0  # tokens of y to which the records of 3 in 4 training inputs are cut; 0: none is cut
    chunks: int = 8  # pieces of a batch, sorted by length: little padding, and work for every thread; same gradient
    optimizer: str = "muon"  # "muon" (AdamW for embedding and head) or "adamw"
    lr: float = 0.01  # peak learning rate of Muon's matrices
    adamw_lr: float = 0.01  # peak learning rate of AdamW's parameters
    weight_decay: float = 0.01  # decoupled, as in AdamW
    warmup: int = 50  # steps of linear warm-up; over all steps the rate falls linearly to 0
    eval_every: int = 500  # steps between validations
    eval_size: int = 256  # held-out records and samples a validation
    final_eval_size: int = 2000  # the same, after training
    seed: int = 0  # of weights and data
    threads: int = 2  # CPU threads
    device: str = "cpu"  # "cuda", "mps", "cpu", or "auto": the first of them that is there
    precision: str = "auto"  # of matrix products: "float32" or "bfloat16"; auto: bfloat16 on CUDA, where it is faster
    compile: bool = False  # fuse the blocks by torch.compile: faster, after slow first steps; takes a C++ compiler
    save_every: int = 500  # steps between saved states, from which an interrupted run can go on
    resume: bool = False  # go on from the last saved state, if there is one
    overwrite: bool = False  # start again in a folder that holds a run


def make_task(name, sizes):
    if name not in TASKS:
        fail(f"config key 'task': unknown task '{name}', known: {', '.join(TASKS)}")
    try:
        task = TASK_FUNCTIONS[name](**sizes)
        for test in (False, True):  # sizes may leave no inputs, or numbers that the vocabulary cannot write
            records, starts = record_batch(task, Tokenizer(task.vocab), task.strategies, random.Random(0), 20, test)
            if len({tuple(record[:start]) for record, start in zip(records, starts)}) < 2:
                raise ValueError(f"{name} of these sizes has a single {'test' if test else 'training'} input")
        return task
    except KeyError as e:
        fail(f"config key 'task_sizes': {e} is not in the vocabulary of {name}")
    except (TypeError, ValueError, OverflowError) as e:
        fail(f"config key 'task_sizes': {e}")


def check_optimizer(cfg):
    if cfg.optimizer not in ("muon", "adamw"):
        fail(f"config key 'optimizer' is 'muon' or 'adamw', got '{cfg.optimizer}'")


def make_optimizers(model, cfg):
    """Muon [Jordan et al. 2024] for the matrices inside the blocks, AdamW for everything else, or AdamW for all. Each
    matrix has a Muon of its own, so that they can take their steps side by side."""
    matrices = [p for name, p in model.named_parameters() if name.startswith("blocks.") and p.requires_grad]
    others = [p for name, p in model.named_parameters() if not name.startswith("blocks.") and p.requires_grad]
    adamw = {"lr": cfg.adamw_lr, "betas": (0.9, 0.95), "weight_decay": cfg.weight_decay,
             "fused": parallel.kind == "cuda"}
    if cfg.optimizer == "adamw":
        return [torch.optim.AdamW(matrices + others, **adamw)]
    return [*(torch.optim.Muon([matrix], cfg.lr, weight_decay=cfg.weight_decay) for matrix in matrices),
            torch.optim.AdamW(others, **adamw)]


def set_lr(optimizers, fraction):
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("peak_lr", group["lr"]) * fraction


def warmup_and_decay(step, steps, warmup):
    """Share of the peak learning rate at `step`: linear warm-up, under a linear decay to 0."""
    return min((step + 1) / warmup if warmup else 1.0, 1.0) * (1 - step / steps)


def record_batch(task, tokenizer, strategies, rng, n_inputs, test):
    """The canonical records of n_inputs inputs, as id lists, one of each strategy in turn, and their prompts' lengths.
    Weighted by the mixture, the records of an input have its exact loss: which strategy was drawn makes no noise."""
    records, starts = [], []
    for _ in range(n_inputs):
        x = task.sample_input(rng, test)
        for strategy in strategies:
            records.append(tokenizer.record(x, task.trace(x, strategy)))
            starts.append(len(x) + 4)  # <bos> <x> x </x> <y>
    return records, starts


def check_lengths(records, block_size):
    longest = max(map(len, records))
    if longest > block_size:
        fail(f"config key 'block_size': a record of {longest} tokens exceeds {block_size}")


@torch.no_grad()
def validate(model, task, tokenizer, mixture, size, seed):
    """Held-out NLL (nats a sequence) and what `size` sampled solutions look like to the task's own validator."""
    rng, n_inputs = random.Random(f"validation {seed}"), math.ceil(size / len(mixture))
    records, starts = record_batch(task, tokenizer, mixture, rng, n_inputs, test=True)
    weights = torch.tensor([*mixture.values()]).repeat(n_inputs) / n_inputs
    nll = (weights @ score_base(model, pad(records), torch.tensor(starts)).sum(dim=1)).item()
    xs = [task.sample_input(rng, test=True) for _ in range(size)]
    ys = sample_ys(model, tokenizer, [tokenizer.prompt(x) for x in xs], seeded(seed))
    found = [task.attribute(x, y) for x, y in zip(xs, ys)]
    return {"nll": nll, "valid_trace_rate": 1 - found.count(None) / size,
            **{f"share_{s}": found.count(s) / size for s in task.strategies}, **score_answers(task, xs, ys)}


def score_answers(task, xs, ys):
    """Shares of solutions that parse, and that also end in the true answer."""
    parsed = [task.parse(y) for y in ys]
    return {"parse_success": sum(p.reason is None for p in parsed) / len(xs),
            "final_answer_accuracy": sum(p.answer == task.answer(x) for p, x in zip(parsed, xs)) / len(xs)}


def sample_ys(model, tokenizer, prompts, generator, temperature=1.0, z=None):
    """One sampled y (list of tokens, without </y>) for every prompt."""
    samples = sample_in_batches(model, prompts, generator, temperature, z)
    return [tokenizer.solution(ids.tolist()) for ids, _ in samples]


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


def interruptible(train):
    """Calls train(cfg, signals): SIGINT and SIGTERM only note themselves in the list `signals`, so that the loop can
    finish its step and save; a second one ends the program at once."""
    @functools.wraps(train)
    def wrapper(cfg):
        signals = []

        def note(number, frame):
            if signals and parallel.processes == 1:  # torchrun repeats a signal at once
                sys.exit(128 + number)
            signals.append(number)
            os.write(2, b"stopping after the next step; once more: at once\n")

        before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            result = train(cfg, signals)
        except OSError as e:  # the log, on a full disk
            fail(f"{cfg.name}: {e}; the last saved state is as it was")
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)
        if signals:  # during the last step
            sys.exit(128 + signals[0])
        return result
    return wrapper


def find_state(cfg):
    """The state from which the run of cfg goes on; None: it begins at step 0. Refuses a folder in which a run has
    begun, unless told to go on or to start again."""
    folder = os.path.join("out", cfg.name)
    path = os.path.join(folder, "state.pt")
    if cfg.resume and os.path.exists(path):
        state = load_checkpoint(path, "state")
        for key, value in dataclasses.asdict(cfg).items():
            if key not in ("threads", "save_every", "resume", "overwrite") and value != state["config"].get(key):
                fail(f"'{folder}' was begun with {key} = {state['config'].get(key)!r}, but goes on with {value!r}; "
                     "--overwrite=True starts again")
        return state
    if cfg.resume and not cfg.overwrite and os.path.exists(os.path.join(folder, "ckpt.pt")):
        fail(f"'{folder}' holds a finished run and no saved state to go on from: python evaluate.py {folder} evaluates "
             "a factorization, --overwrite=True starts again")
    if os.path.exists(os.path.join(folder, "log.jsonl")) and not cfg.resume and not cfg.overwrite:
        fail(f"'{folder}' holds a run already; --resume=True goes on with it, --overwrite=True starts again")


def open_run(cfg, state):
    """Makes the folder out/<name>, or takes it back to where the state was saved; returns it and the log file."""
    folder = os.path.join("out", cfg.name)
    log_path, state_path = os.path.join(folder, "log.jsonl"), os.path.join(folder, "state.pt")
    parallel.barrier()  # until every process has seen what was there
    if parallel.rank:
        return folder, open(os.devnull, "a")
    os.makedirs(folder, exist_ok=True)
    if not state and os.path.exists(state_path):  # of the run that is overwritten
        os.remove(state_path)
    lines = []
    if state:
        with open(log_path) as f:
            lines = f.readlines()[:state["log_lines"]]
    write(log_path, lambda f: f.write("".join(lines).encode()))
    write_json(os.path.join(folder, "config.json"), dataclasses.asdict(cfg))
    return folder, open(log_path, "a")


def save_state(folder, log, cfg, step, model, optimizers, **more):
    """Saves all that the rest of a run depends on after `step` steps."""
    log.flush()
    with open(log.name) as f:
        log_lines = len(f.readlines())
    save(os.path.join(folder, "state.pt"), {
        "kind": "state", "config": dataclasses.asdict(cfg), "step": step, "log_lines": log_lines,
        "model": model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers], **more})


def restore(state, model, optimizers):
    model.load_state_dict(state["model"])
    for optimizer, content in zip(optimizers, state["optimizers"]):
        optimizer.load_state_dict(content)


def stop(signals, cfg, step):
    """Ends the program after `step` steps, if a signal asked any process for it."""
    if signals:
        print(f"{cfg.name}: stopped after step {step} of {cfg.steps}; the same command with --resume=True goes on",
              flush=True)
        sys.exit(128 + signals[0])


def finish(folder, log, checkpoint):
    """The run is complete: its checkpoint takes the place of the state to go on from."""
    log.close()
    save(os.path.join(folder, "ckpt.pt"), checkpoint)
    if parallel.rank == 0 and os.path.exists(os.path.join(folder, "state.pt")):
        os.remove(os.path.join(folder, "state.pt"))
    parallel.barrier()  # until the checkpoint is there for every process


def load_checkpoint(path, kind):
    """Reads a checkpoint of the given kind, or says in one line why it cannot."""
    if not os.path.exists(path):
        begun = os.path.exists(os.path.join(os.path.dirname(path), "log.jsonl"))
        fail(f"checkpoint '{path}' does not exist" + "; its run is not finished: --resume=True goes on with it" * begun)
    try:
        checkpoint = torch.load(path, map_location=torch.get_default_device(), weights_only=True)
    except Exception as e:  # truncated, not a checkpoint, or holding something other than tensors and plain types
        fail(f"checkpoint '{path}' cannot be read ({type(e).__name__}): truncated, or no checkpoint; without it, "
             "it is trained again")
    got = checkpoint.get("kind") if isinstance(checkpoint, dict) else None
    if got != kind:
        fail(f"'{path}' is no {kind} checkpoint" + f", but a {got} checkpoint" * bool(got))
    if checkpoint["version"] != VERSIONS[kind]:
        fail(f"'{path}' has format version {checkpoint['version']}, this code reads version {VERSIONS[kind]}")
    return checkpoint


def load_base(path):
    """The base model of a checkpoint, its task, and the checkpoint."""
    checkpoint = load_checkpoint(path, "base")
    return *build_base(checkpoint), checkpoint


def build_base(checkpoint):
    """Base checkpoint -> (model, task)."""
    task = make_task(checkpoint["config"]["task"], checkpoint["config"]["task_sizes"])
    if list(task.vocab) != checkpoint["vocab"]:
        fail(f"the base was trained on another vocabulary than that of {task.name}")
    model = GPT(GPTConfig(**checkpoint["model_config"]))
    model.load_state_dict(checkpoint["model"])
    return model, task


def check_finite(loss, parameters, step, terms, folder):
    """Stops the run in one line when the loss or a gradient is not finite; what was saved before stays."""
    if not math.isfinite(loss.item()) or not all(p.grad is None or p.grad.isfinite().all() for p in parameters):
        bad = [name for name, (_, value) in terms.items() if not math.isfinite(value.item())]
        state = os.path.join(folder, "state.pt")
        kept = f"'{state}' holds the last steps saved" if os.path.exists(state) else "nothing was saved"
        fail(f"step {step + 1}: {'term ' + bad[0] if bad else 'a gradient'} is not finite; {kept}")


def current_commit():
    """The short hash of the commit that is checked out; "unknown" outside a repository, or without git."""
    try:
        git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
                             cwd=os.path.dirname(__file__) or ".")
    except OSError:
        return "unknown"
    return git.stdout.strip() or "unknown"


def provenance():
    """What a run is made with. Taken as it begins: another commit may be checked out when it is evaluated."""
    versions = {"python": platform.python_version(), "torch": str(torch.__version__), "machine": platform.machine()}
    return {"commit": current_commit(), "versions": versions}


def write_result(folder, config, made_with, metrics):
    """metrics.json, and result.json: the same with all that is needed to repeat the run."""
    write_json(os.path.join(folder, "metrics.json"), metrics)
    write_json(os.path.join(folder, "result.json"),
               {"config": config, "seed": config["seed"], **made_with, "metrics": metrics})


@interruptible
def train(cfg, signals):
    """Trains the base of cfg and leaves its run folder, with ckpt.pt written last."""
    for key in ("n_layer", "n_head", "n_embd", "block_size", "steps", "batch_size", "chunks", "eval_every", "eval_size",
                "final_eval_size", "threads", "save_every"):
        if getattr(cfg, key) < 1:
            fail(f"config key '{key}' must be at least 1, got {getattr(cfg, key)}")
    if cfg.n_embd % (2 * cfg.n_head):
        fail(f"config key 'n_embd' ({cfg.n_embd}) must be an even multiple of n_head ({cfg.n_head})")
    check_optimizer(cfg)
    parallel.start(cfg.threads, cfg.device, cfg.precision)
    torch.manual_seed(cfg.seed)
    task = make_task(cfg.task, cfg.task_sizes)
    tokenizer, made_with = Tokenizer(task.vocab), provenance()
    weights = [1.0] * len(task.strategies) if cfg.strategy_weights is None else cfg.strategy_weights
    if len(weights) != len(task.strategies) or sum(weights) <= 0:
        fail(f"config key 'strategy_weights' takes {len(task.strategies)} weights, not all 0: {task.strategies}")
    mixture = {strategy: w / sum(weights) for strategy, w in zip(task.strategies, weights) if w}
    floor = -sum(w * math.log(w) for w in mixture.values())
    n_inputs = cfg.batch_size // len(mixture)
    if not n_inputs:
        fail(f"config key 'batch_size' must hold one record of each strategy, at least {len(mixture)}")
    weights = torch.tensor([*mixture.values()]).repeat(n_inputs) / n_inputs  # of the records of a batch
    n_pieces = min(max(cfg.chunks, parallel.processes), len(weights))
    model = GPT(GPTConfig(len(tokenizer), 0, cfg.block_size, cfg.n_layer, cfg.n_head, cfg.n_embd))
    if cfg.compile:
        model.compile()
    parameters, optimizers = list(model.parameters()), make_optimizers(model, cfg)
    for test in (False, True):  # of the test inputs those that `validate` draws
        check_lengths(record_batch(task, tokenizer, mixture, random.Random(f"validation {cfg.seed}"),
                                   math.ceil(cfg.final_eval_size / len(mixture)), test)[0], cfg.block_size)
    state = find_state(cfg)
    folder, log = open_run(cfg, state)
    first_step, start, scores = 0, time.time(), None
    if state:
        restore(state, model, optimizers)
        first_step, start = state["step"], start - 60 * state["minutes"]
    bar = tqdm(range(first_step, cfg.steps), desc=cfg.name, disable=not sys.stdout.isatty(), file=sys.stdout)
    for step in bar:
        set_lr(optimizers, warmup_and_decay(step, cfg.steps, cfg.warmup))
        # data are a function of (seed, step) alone
        records, starts = record_batch(task, tokenizer, mixture, random.Random(f"base {cfg.seed} {step}"), n_inputs,
                                       test=False)
        check_lengths(records, cfg.block_size)
        if cfg.crop:  # strategies part in the first steps of a trace, and the later ones are soon learned
            records = [r[:s + cfg.crop] if i // len(mixture) % 4 else r
                       for i, (r, s) in enumerate(zip(records, starts))]
        order = torch.tensor([len(record) for record in records]).argsort(descending=True)

        def gradient(rows):
            ids, first = pad([records[i] for i in rows]), torch.tensor([starts[i] for i in rows])
            nll = weights[rows] @ score_base(model, ids, first).sum(dim=1)
            return nll.detach(), *torch.autograd.grad(nll, parameters)

        nll, *gradients = sum_pieces(gradient, order.tensor_split(n_pieces))
        for parameter, total in zip(parameters, gradients):
            parameter.grad = total
        loss = nll.item()  # nats a sequence, to compare with the floor
        check_finite(nll, parameters, step, {"cross-entropy": (1.0, nll)}, folder)
        in_threads(lambda optimizer: optimizer.step(), optimizers)
        if (step + 1) % cfg.eval_every == 0 or step + 1 == cfg.steps:
            size = cfg.final_eval_size if step + 1 == cfg.steps else cfg.eval_size
            scores = {"floor": floor, **validate(model, task, tokenizer, mixture, size, cfg.seed),
                      "minutes": (time.time() - start) / 60}
            log.write(json.dumps({"step": step + 1, "loss": loss, **scores}) + "\n")
            log.flush()
            if bar.disable:
                print(f"{cfg.name} step {step + 1}/{cfg.steps}: loss {loss:.3f}, held-out {scores['nll']:.3f}, floor "
                      f"{floor:.3f}, valid traces {scores['valid_trace_rate']:.3f}, "
                      f"{scores['minutes'] * (cfg.steps / (step + 1) - 1):.1f} min left", flush=True)
        if scores:
            bar.set_postfix_str(f"loss {loss:.3f} floor {floor:.3f} valid traces {scores['valid_trace_rate']:.3f}")
        received = parallel.union(signals)
        if (received or (step + 1) % cfg.save_every == 0) and step + 1 < cfg.steps:
            save_state(folder, log, cfg, step + 1, model, optimizers, minutes=(time.time() - start) / 60)
            stop(received, cfg, step + 1)
    write_result(folder, dataclasses.asdict(cfg), made_with, scores)
    finish(folder, log, {
        "kind": "base", "config": dataclasses.asdict(cfg), "model_config": vars(model.config),
        "model": model.state_dict(), "vocab": list(task.vocab), "c_base": scores["nll"]})


if __name__ == "__main__":
    train(configs.load(sys.modules["__main__"], sys.argv[1:]))
    parallel.leave()
