"""Trains the base model p(y|x) on traces of all strategies mixed.

    python train_base.py configs/sorting_base.py

Leaves out/sorting_base/ with ckpt.pt, config.json, log.jsonl, metrics.json and result.json. The lowest loss anybody can
reach is the entropy of the mixture and of the wording: log S nats a sequence for S equally likely strategies of one
wording, since a trace is a function of x and the strategy. Inputs are split three ways by a hash of x: the loss of
training is of training inputs, log.jsonl and c_base are of validation inputs, metrics.json is of test inputs.
"""
import copy
import dataclasses
import itertools
import math
import os
import random
import signal
import sys
from typing import Literal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it, while torch loads and until runs.Run listens

import torch

from harness import config, parallel, runs
from harness.config import Count, between, fail, say
from harness.optim import make_optimizers, set_learning_rates, update
from harness.parallel import seeded, sum_chunks
from model import GPT, GPTConfig, as_pairs, in_chunks, sample_in_batches, score_base
from tasks import TASK_FUNCTIONS, TASKS, Tokenizer, traces_task


@dataclasses.dataclass(frozen=True)
class Config:
    task: str  # a name in tasks.TASKS, or the path of a file of traces (harness/traces.py)
    name: str = ""  # of the run; its folder is out/<name>; default: the config file's name
    task_sizes: dict = dataclasses.field(default_factory=dict)  # arguments of the task's function: {"max_len": 6}
    strategy_weights: list | dict | None = None  # of the task's strategies, or such a list for every kind of input
    wordings: list = dataclasses.field(default_factory=list)  # "separators": ; or , ends a step; "operands": b + a, too
    distinct_inputs: bool = True  # leave out inputs on which two strategies leave the same trace
    n_layer: Count = 3  # transformer blocks
    n_head: Count = 4  # attention heads
    n_embd: Count = 128  # width
    block_size: Count = 160  # longest record, in tokens
    steps: Count = 3000  # gradient steps
    batch_size: Count = 32  # records a step, at most: every input comes with one record of each strategy
    crop: int = 0  # tokens of y to which the records of 3 in 4 training inputs are cut; 0: none is cut
    chunks: Count = 4  # parts of a batch, of records of similar length; the gradient is the same
    optimizer: Literal["muon", "adamw"] = "muon"  # Muon with AdamW for embedding and head, or AdamW for all
    lr: float = 0.01  # peak learning rate of Muon's matrices
    adamw_lr: float = 0.01  # peak learning rate of AdamW's parameters
    weight_decay: float = 0.01  # decoupled, as in AdamW
    dropout: between(0.0, 0.9) = 0.0  # part of what attention and MLP add that is left out, against learning by heart
    warmup: int = 50  # steps of linear warm-up; over all steps the rate falls linearly to 0
    eval_every: Count = 500  # steps between validations
    eval_size: Count = 256  # held-out records and samples a validation
    final_eval_size: Count = 2000  # the same, after training
    seed: int = 0  # of weights and data
    threads: int = 0  # CPU threads; 0: as many as there are cores
    device: str = "cpu"  # "cuda", "cpu", or "auto": CUDA if it is there
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # of matrix products; auto: bfloat16 on CUDA alone
    save_every: Count = 500  # steps between saved states, from which an interrupted run can go on
    resume: bool = False  # go on from the last saved state, if there is one
    overwrite: bool = False  # start again in a folder that holds a run


def make_task(cfg):
    """The task of a base's config (dict)."""
    name, sizes, wordings = cfg["task"], cfg["task_sizes"], cfg["wordings"]
    if os.path.isfile(name):
        for key in ("task_sizes", "strategy_weights", "wordings"):
            if cfg[key]:
                fail(f"config key '{key}' plays no part where the task is a file: '{name}' is used as it is")
        return traces_task(name)
    if name not in TASKS:
        fail(f"config key 'task': there is neither a file nor a task '{name}'; tasks: {', '.join(TASKS)}")
    if not all(wording in ("separators", "operands") for wording in wordings):
        fail(f"config key 'wordings' is a list of 'separators' and 'operands', got {wordings!r}")
    if "separators" in wordings and "," in TASKS[name].vocab:
        fail(f"config key 'wordings': 'separators' needs the token ',', which {name} has already")
    try:
        if any(size < 0 for size in sizes.values() if isinstance(size, int)):
            raise ValueError("a size is at least 0")
        task = dataclasses.replace(TASK_FUNCTIONS[name](**sizes), commute="operands" in wordings,
                                   distinct=cfg["distinct_inputs"])
        if "separators" in wordings:
            task = dataclasses.replace(task, separators=(";", ","), vocab=(*task.vocab, ","))
        task = with_weights(task, cfg["strategy_weights"])
        for split in ("train", "validation", "test"):  # sizes may leave no inputs, or numbers that the vocabulary lacks
            records, starts, *_ = record_batch(task, Tokenizer(task.vocab), random.Random(0), 20, split)
            if len({tuple(record[:start]) for record, start in zip(records, starts)}) < 2:
                raise ValueError(f"{name} of these sizes has a single {split} input")
    except ValueError as e:
        fail(f"config key 'task_sizes': {e}")
    except (KeyError, TypeError, OverflowError) as e:
        if not sizes:  # a mistake in the code of the task
            raise
        fail(f"config key 'task_sizes': {e}" + f" is not in the vocabulary of {name}" * isinstance(e, KeyError))
    for x in (task.sample_input(random.Random(i)) for i in range(20)):
        for s, y in task.traces(x):
            assert task.parse(y)[1:] == (task.answer(x), None), f"{name}: {s} solves {x} by {y}: {task.parse(y)}"
            assert task.trace(x, s) == y, f"{name}: {s} solves {x} in another way each time"
    return task


def with_weights(task, weights):
    """The task with a mixture of its own: `strategy_weights` of a base's config."""
    S, rng = len(task.strategies), random.Random(0)
    if isinstance(weights, dict) and set(weights) != (kinds := {task.kind(task.sample_input(rng)) for _ in range(500)}):
        fail(f"config key 'strategy_weights' has a row for every kind of input: {', '.join(sorted(map(str, kinds)))}")
    for row in weights.values() if isinstance(weights, dict) else [] if weights is None else [weights]:
        if (type(row) is not list or len(row) != S
                or not all(type(w) in (int, float) and 0 <= w <= 1e9 for w in row) or sum(row) <= 0):
            fail(f"config key 'strategy_weights' takes {S} weights from 0 on, not all 0: {task.strategies}")
    return task if weights is None else dataclasses.replace(task, weights=weights)


def record_batch(task, tokenizer, rng, n_inputs, split, crop=0):
    """The canonical records of n_inputs inputs x, as id lists, one of each strategy in the mixture of x; their prompts'
    lengths; their weights (N,), which sum to 1; and the entropy of the mixture, in nats a solution (`Task.solutions`).
    With a crop, y is cut to so many tokens for 3 in 4 inputs."""
    records, starts, shares, entropy = [], [], [], 0.0
    for i in range(n_inputs):
        x = task.sample_input(rng, split)
        solutions, nats = task.solutions(x, rng)
        start, entropy = len(tokenizer.prompt(x)), entropy + nats / n_inputs
        for y, share in solutions:
            record = tokenizer.record(x, y)
            records.append(record[:start + crop] if crop and i % 4 else record)
            starts.append(start)
            shares.append(share)
    return records, starts, torch.tensor(shares) / n_inputs, entropy


def check_lengths(records, block_size):
    longest = max(map(len, records))
    if longest > block_size:
        fail(f"config key 'block_size': a record of {longest} tokens exceeds {block_size}")


def check_file(task, block_size):
    for row in itertools.chain(*(task.records or {}).values()):
        if (length := len(task.tokens(row.x)) + len(task.tokens(row.y)) + 6) > block_size:
            fail(f"{task.name}, line {row.line}: a record of {length} tokens exceeds block_size {block_size}")


@torch.no_grad()
def mean_loss(model, task, tokenizer, size, rng, split):
    """The NLL of about `size` records of a split, and the entropy of the mixture: nats a sequence."""
    records, starts, weights, entropy = record_batch(
        task, tokenizer, rng, math.ceil(size / task.solutions_each), split)
    nll = in_chunks(lambda pairs: score_base(model, pairs).sum(dim=1), as_pairs(records, starts))
    return (weights @ nll).item(), entropy


def validate(model, task, tokenizer, size, seed, split):
    """`mean_loss`, and what `size` sampled solutions look like to the task's own validator."""
    rng = random.Random(f"validation {seed}")
    nll, entropy = mean_loss(model, task, tokenizer, size, rng, split)
    xs = [task.sample_input(rng, split) for _ in range(size)]
    ys = sample_ys(model, tokenizer, [tokenizer.prompt(x) for x in xs], seeded(seed))
    found, valid = [task.attribute(x, y) for x, y in zip(xs, ys)], [task.is_trace(x, y) for x, y in zip(xs, ys)]
    return {**({} if math.isnan(entropy) else {"floor": entropy}), "nll": nll, "valid_trace_rate": sum(valid) / size,
            **{f"share_{s}": found.count(s) / size for s in task.strategies}, **score_answers(task, xs, ys)}


def score_answers(task, xs, ys):
    """Shares of solutions that parse, and that also end in the true answer; of a file, the latter of those x of which
    it tells answers, any of which is right."""
    if task.records is not None:
        before = ["ans"] * ("ans" in task.vocab)  # else the answer 2 3 would be right where 1 2 3 is said
        ends = [[before + task.tokens(r.answer) for r in task.records_of(x) if r.answer] for x in xs]
        right = [any(([""] + y)[-len(end):] == end for end in own) for y, own in zip(ys, ends) if own]
        return {"final_answer_accuracy": sum(right) / len(right)} if right else {}
    parsed = [task.parse(y) for y in ys]
    return {"parse_success": sum(p.reason is None for p in parsed) / len(xs),
            "final_answer_accuracy": sum(p.answer == task.answer(x) for p, x in zip(parsed, xs)) / len(xs)}


def sample_ys(model, tokenizer, prompts, generator, temperature=1.0, z=None):
    """One sampled y (list of tokens, without </y>) for every prompt."""
    samples = sample_in_batches(model, prompts, generator, temperature, z)
    return [tokenizer.solution(ids.tolist()) for ids, _ in samples]


def training_batch(task, tokenizer, cfg, step):
    """The records of a step, as model.Pairs, and their weights: a function of (seed, step) alone. Cropped, because
    strategies part in the first steps of a trace, and the later ones are soon learned."""
    rng, n_inputs = random.Random(f"base {cfg.seed} {step}"), cfg.batch_size // task.solutions_each
    records, starts, weights, _ = record_batch(task, tokenizer, rng, n_inputs, "train", cfg.crop)
    check_lengths(records, cfg.block_size)
    return as_pairs(records, starts), weights


def dropout(model, B, T, p, generator):
    """Factors (B, L, 2, T, C) of what the blocks add to B records of T tokens: 0 in a part p, else 1 / (1 - p)."""
    uniform = torch.rand(len(model.blocks), 2, B, T, model.config.n_embd, generator=generator)
    return ((uniform >= p) / (1 - p)).movedim(2, 0)


def gradient(model, pairs, weights, n_chunks, keep=None):
    """The cross-entropy of y (nats a sequence), summed over pairs with `weights` (N,), and its gradient, a tensor for
    every parameter; computed in chunks of similar length, side by side. keep: of `dropout`."""
    parameters = list(model.parameters())

    def of_chunk(rows):
        chunk = pairs.rows(rows)
        kept = None if keep is None else keep[rows, :, :, :chunk.ids.shape[1]]
        nll = weights[rows] @ score_base(model, chunk, kept).sum(dim=1)
        return nll.detach(), *torch.autograd.grad(nll, parameters)

    nll, *gradients = sum_chunks(of_chunk, pairs.by_length(n_chunks))
    return nll.item(), gradients


def check(cfg, task):
    """Stops with one line, before any training, on values that make no sense together."""
    if cfg.n_embd % (2 * cfg.n_head):
        fail(f"config key 'n_embd' ({cfg.n_embd}) must be an even multiple of n_head ({cfg.n_head})")
    each = task.solutions_each
    if cfg.batch_size < each:
        fail(f"config key 'batch_size' must hold one record of each strategy, at least {each}")
    check_file(task, cfg.block_size)
    for split in ("train", "validation", "test"):  # of the last two those inputs that `validate` draws
        rng, n_inputs = random.Random(f"validation {cfg.seed}"), math.ceil(cfg.final_eval_size / each)
        check_lengths(record_batch(task, Tokenizer(task.vocab), rng, n_inputs, split)[0], cfg.block_size)


def train(cfg):
    """Trains the base of cfg and leaves its run folder."""
    parallel.start(cfg.threads, cfg.device, cfg.precision)
    torch.manual_seed(cfg.seed)
    task = make_task(vars(cfg))
    check(cfg, task)
    tokenizer = Tokenizer(task.vocab)
    with runs.Run(cfg) as run:
        run.begin(task.data)
        model = GPT(GPTConfig(len(tokenizer), 0, cfg.block_size, cfg.n_layer, cfg.n_head, cfg.n_embd))
        optimizers = make_optimizers(model, cfg)
        if run.state:
            runs.restore(run.state, model, optimizers)
        best = run.state["best"] if run.state else {"nll": math.inf}  # the weights of least validation loss
        bar = run.steps()
        for step in bar:
            set_learning_rates(optimizers, step, cfg)
            pairs, weights = training_batch(task, tokenizer, cfg, step)
            rng = seeded(cfg.seed * 10**6 + step)
            keep = dropout(model, *pairs.ids.shape, cfg.dropout, rng) if cfg.dropout else None
            loss, gradients = gradient(model, pairs, weights, cfg.chunks, keep)
            run.check_finite(step, {"cross-entropy": loss}, gradients)
            update(optimizers, model.parameters(), gradients)
            if run.due(step):
                scores = validate(model, task, tokenizer, cfg.eval_size, cfg.seed, "validation")
                entry = {"step": step + 1, "loss": loss, **scores, "minutes": run.minutes}
                run.log(entry)
                report(cfg, entry)
                if scores["nll"] < best["nll"] or "model" not in best:
                    best = {"nll": scores["nll"], "step": step + 1, "model": copy.deepcopy(model.state_dict())}
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            run.end_of_step(step, lambda: runs.training_state(model, optimizers) | {"best": best})
        model.load_state_dict(best["model"])
        known, c_base = (
            mean_loss(model, task, tokenizer, cfg.final_eval_size, random.Random(f"validation {cfg.seed}"), split)[0]
            for split in ("train", "validation"))
        final = validate(model, task, tokenizer, cfg.final_eval_size, cfg.seed, "test")
        final |= {"c_base": c_base, "training_nll": known, "minutes": run.minutes, "best_step": best["step"]}
        for doubt in doubts(final, best["nll"], scores["nll"]):
            say(f"{cfg.name}: {doubt}")
        run.finish({"kind": "base", "config": dataclasses.asdict(cfg), "model_config": vars(model.config),
                    "model": model.state_dict(), "vocab": list(task.vocab), "data": task.data, "c_base": c_base}, final)


def report(cfg, entry):
    """Says in one line what an entry of the log tells, and how long the rest takes."""
    floor = f", floor {entry['floor']:.3f}" if "floor" in entry else ""
    say(f"{cfg.name} step {entry['step']}/{cfg.steps}: loss {entry['loss']:.3f}, held-out {entry['nll']:.3f}{floor}, "
        f"valid traces {entry['valid_trace_rate']:.3f}, "
        f"{entry['minutes'] * (cfg.steps / entry['step'] - 1):.1f} min left")


def doubts(final, best_nll, last_nll):
    """What speaks against a trained base, from its final scores and the best and the last validation loss."""
    if last_nll > 1.01 * best_nll:
        yield (f"the held-out loss rose from {best_nll:.3f} after step {final['best_step']} to {last_nll:.3f}: the "
               "former weights are kept")
    if final["c_base"] > 1.1 * final["training_nll"]:
        yield (f"a loss of {final['training_nll']:.3f} on training inputs, of {final['c_base']:.3f} on others: it "
               "learns its data by heart. More data may help, or --dropout=0.1 --weight_decay=0.2 and more steps")
    if final["valid_trace_rate"] < 0.9:
        yield (f"{1 - final['valid_trace_rate']:.0%} of its samples are not among the traces of its data. That is "
               "far, unless a file has only some of the solutions of an x")


def load_base(path, file=""):
    """The base model of a checkpoint, its task, and the checkpoint. file: where its traces are, if they have moved."""
    checkpoint = runs.load_checkpoint(path, "base")
    if os.path.isfile(file) and not os.path.exists(checkpoint["config"]["task"]):
        checkpoint["config"]["task"] = file
    return *build_base(checkpoint), checkpoint


def build_base(checkpoint):
    """Base checkpoint -> (frozen model, task)."""
    if checkpoint.get("data") is not None and not os.path.isfile(file := checkpoint["config"]["task"]):
        fail(f"the base was trained on the file '{file}', which is not there, seen from '{os.getcwd()}'")
    task = make_task(checkpoint["config"])
    if list(task.vocab) != checkpoint["vocab"]:
        fail(f"the base was trained on another vocabulary than that of {task.name}")
    if checkpoint.get("data") != task.data:
        say(f"the file '{task.name}' has other records than when the base was trained")
        check_file(task, checkpoint["config"]["block_size"])
    model = GPT(GPTConfig(**checkpoint["model_config"]))
    model.load_state_dict(checkpoint["model"])
    return model.requires_grad_(False).eval(), task


def get_base(cfg, config_path):
    """The base of cfg, read from config_path: frozen model, task, checkpoint. Trains it if there is none."""
    path = os.path.join("out", cfg.name, "ckpt.pt")
    if not os.path.exists(path):
        if os.path.exists(os.path.join(os.path.dirname(path), "log.jsonl")) and not cfg.resume:
            runs.claim(os.path.dirname(path)).close()  # says so if it is in training
            fail(f"the base's run in '{os.path.dirname(path)}' is not finished: --resume=True goes on with it, "
                 f"python train_base.py {config_path} --overwrite=True starts it again")
        say(f"{path} is missing: training the base model first (python train_base.py {config_path})")
        train(cfg)
    base, task, checkpoint = load_base(path, cfg.task)
    same = ("task", "task_sizes", "strategy_weights", "wordings", "distinct_inputs")
    for key in (*same, "n_layer", "n_head", "n_embd", "block_size", "steps",
                "batch_size", "crop", "optimizer", "lr", "adamw_lr", "weight_decay", "dropout", "warmup", "seed"):
        was, is_now = (vars(Config("")) | checkpoint["config"])[key], getattr(cfg, key)
        differs = f"'{path}' was trained with {key} = {was!r}, but {config_path} says {is_now!r}"
        if key == "task" and os.path.isfile(was) and os.path.isfile(is_now) and os.path.samefile(was, is_now):
            continue
        if was != is_now and key in (*same, *checkpoint["model_config"]):
            fail(f"{differs}; remove the checkpoint or change the config")
        if was != is_now:
            say(f"{differs}: used as it is")
    return base, task, checkpoint


if __name__ == "__main__":
    train(config.load(sys.modules["__main__"], sys.argv[1:]))
    parallel.leave()
