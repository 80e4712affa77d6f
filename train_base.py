"""Trains the base model p(y|x) on traces of all strategies mixed.

    python train_base.py configs/sorting_base.py

Leaves out/sorting_base/ with ckpt.pt, config.json, log.jsonl, metrics.json and result.json. The lowest loss anybody can
reach is the entropy of the mixture, log S nats a sequence for S equally likely strategies, since a trace is a function
of x and the strategy. Inputs are split three ways by a hash of x: the loss of training is of training inputs, log.jsonl
and c_base are of validation inputs, metrics.json is of test inputs.
"""
import dataclasses
import math
import os
import random
import sys
from typing import Literal

import torch

from harness import config, parallel, runs
from harness.config import Count, fail
from harness.optim import make_optimizers, set_learning_rates, update
from harness.parallel import seeded, sum_chunks
from model import GPT, GPTConfig, as_pairs, sample_in_batches, score_base
from tasks import TASK_FUNCTIONS, TASKS, Tokenizer


@dataclasses.dataclass(frozen=True)
class Config:
    task: str  # a name in tasks.TASKS
    name: str = ""  # of the run; its folder is out/<name>; default: the config file's name
    task_sizes: dict = dataclasses.field(default_factory=dict)  # arguments of the task's function: {"max_len": 6}
    strategy_weights: list | None = None  # mixture of strategies in the data, in the task's order; None: uniform
    n_layer: Count = 3  # transformer blocks
    n_head: Count = 4  # attention heads
    n_embd: Count = 128  # width
    block_size: Count = 160  # longest record, in tokens
    steps: Count = 3000  # gradient steps
    batch_size: Count = 64  # records a step, at most: every input comes with one record of each strategy
    crop: int = 0  # tokens of y to which the records of 3 in 4 training inputs are cut; 0: none is cut
    chunks: Count = 8  # parts of a batch, of records of similar length; the gradient is the same
    optimizer: Literal["muon", "adamw"] = "muon"  # Muon with AdamW for embedding and head, or AdamW for all
    lr: float = 0.01  # peak learning rate of Muon's matrices
    adamw_lr: float = 0.01  # peak learning rate of AdamW's parameters
    weight_decay: float = 0.01  # decoupled, as in AdamW
    warmup: int = 50  # steps of linear warm-up; over all steps the rate falls linearly to 0
    eval_every: Count = 500  # steps between validations
    eval_size: Count = 256  # held-out records and samples a validation
    final_eval_size: Count = 2000  # the same, after training
    seed: int = 0  # of weights and data
    threads: Count = 2  # CPU threads
    device: str = "cpu"  # "cuda", "mps", "cpu", or "auto": the first of them that is there
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # of matrix products; auto: bfloat16 on CUDA alone
    save_every: Count = 500  # steps between saved states, from which an interrupted run can go on
    resume: bool = False  # go on from the last saved state, if there is one
    overwrite: bool = False  # start again in a folder that holds a run


def make_task(name, sizes):
    if name not in TASKS:
        fail(f"config key 'task': unknown task '{name}', known: {', '.join(TASKS)}")
    try:
        task = TASK_FUNCTIONS[name](**sizes)
        for split in ("train", "validation", "test"):  # sizes may leave no inputs, or numbers that the vocabulary lacks
            records, starts = record_batch(task, Tokenizer(task.vocab), task.strategies, random.Random(0), 20, split)
            if len({tuple(record[:start]) for record, start in zip(records, starts)}) < 2:
                raise ValueError(f"{name} of these sizes has a single {split} input")
        return task
    except KeyError as e:
        fail(f"config key 'task_sizes': {e} is not in the vocabulary of {name}")
    except (TypeError, ValueError, OverflowError) as e:
        fail(f"config key 'task_sizes': {e}")


def record_batch(task, tokenizer, strategies, rng, n_inputs, split):
    """The canonical records of n_inputs inputs, as id lists, one of each strategy in turn, and their prompts' lengths.
    Weighted by the mixture, the records of an input have its exact loss: which strategy was drawn makes no noise."""
    records, starts = [], []
    for _ in range(n_inputs):
        x = task.sample_input(rng, split)
        for strategy in strategies:
            records.append(tokenizer.record(x, task.trace(x, strategy)))
            starts.append(len(x) + 4)  # <bos> <x> x </x> <y>
    return records, starts


def check_lengths(records, block_size):
    longest = max(map(len, records))
    if longest > block_size:
        fail(f"config key 'block_size': a record of {longest} tokens exceeds {block_size}")


@torch.no_grad()
def validate(model, task, tokenizer, mixture, size, seed, split):
    """Held-out NLL (nats a sequence) and what `size` sampled solutions look like to the task's own validator."""
    rng, n_inputs = random.Random(f"validation {seed}"), math.ceil(size / len(mixture))
    records, starts = record_batch(task, tokenizer, mixture, rng, n_inputs, split)
    weights = torch.tensor([*mixture.values()]).repeat(n_inputs) / n_inputs
    nll = (weights @ score_base(model, as_pairs(records, starts)).sum(dim=1)).item()
    xs = [task.sample_input(rng, split) for _ in range(size)]
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


def training_batch(task, tokenizer, mixture, cfg, step):
    """The records of a step, as model.Pairs: a function of (seed, step) alone."""
    rng, n_inputs = random.Random(f"base {cfg.seed} {step}"), cfg.batch_size // len(mixture)
    records, starts = record_batch(task, tokenizer, mixture, rng, n_inputs, "train")
    check_lengths(records, cfg.block_size)
    if cfg.crop:  # strategies part in the first steps of a trace, and the later ones are soon learned
        records = [record[:start + cfg.crop] if i // len(mixture) % 4 else record
                   for i, (record, start) in enumerate(zip(records, starts))]
    return as_pairs(records, starts)


def gradient(model, pairs, weights, n_chunks):
    """The cross-entropy of y (nats a sequence), summed over pairs with `weights` (N,), and its gradient, a tensor for
    every parameter; computed in chunks of similar length, side by side."""
    parameters = list(model.parameters())

    def of_chunk(rows):
        nll = weights[rows] @ score_base(model, pairs.rows(rows)).sum(dim=1)
        return nll.detach(), *torch.autograd.grad(nll, parameters)

    nll, *gradients = sum_chunks(of_chunk, pairs.by_length(n_chunks))
    return nll.item(), gradients


def check(cfg, task):
    """Stops with one line, before any training, on values that make no sense together. Returns the mixture, strategy ->
    its share of the data, without those of share 0."""
    if cfg.n_embd % (2 * cfg.n_head):
        fail(f"config key 'n_embd' ({cfg.n_embd}) must be an even multiple of n_head ({cfg.n_head})")
    weights = [1.0] * len(task.strategies) if cfg.strategy_weights is None else cfg.strategy_weights
    if len(weights) != len(task.strategies) or sum(weights) <= 0:
        fail(f"config key 'strategy_weights' takes {len(task.strategies)} weights, not all 0: {task.strategies}")
    mixture = {strategy: w / sum(weights) for strategy, w in zip(task.strategies, weights) if w}
    if cfg.batch_size < len(mixture):
        fail(f"config key 'batch_size' must hold one record of each strategy, at least {len(mixture)}")
    for split in ("train", "validation", "test"):  # of the last two those inputs that `validate` draws
        rng, n_inputs = random.Random(f"validation {cfg.seed}"), math.ceil(cfg.final_eval_size / len(mixture))
        check_lengths(record_batch(task, Tokenizer(task.vocab), mixture, rng, n_inputs, split)[0], cfg.block_size)
    return mixture


def train(cfg):
    """Trains the base of cfg and leaves its run folder, with ckpt.pt written last."""
    parallel.start(cfg.threads, cfg.device, cfg.precision)
    torch.manual_seed(cfg.seed)
    task = make_task(cfg.task, cfg.task_sizes)
    mixture, tokenizer = check(cfg, task), Tokenizer(task.vocab)
    floor = -sum(w * math.log(w) for w in mixture.values())
    n_inputs = cfg.batch_size // len(mixture)
    weights = torch.tensor([*mixture.values()]).repeat(n_inputs) / n_inputs  # of the records of a batch
    model = GPT(GPTConfig(len(tokenizer), 0, cfg.block_size, cfg.n_layer, cfg.n_head, cfg.n_embd))
    parameters, optimizers = list(model.parameters()), make_optimizers(model, cfg)
    with runs.Run(cfg) as run:
        run.begin()
        if run.state:
            runs.restore(run.state, model, optimizers)
        bar = run.steps()
        for step in bar:
            set_learning_rates(optimizers, step, cfg)
            pairs = training_batch(task, tokenizer, mixture, cfg, step)
            loss, gradients = gradient(model, pairs, weights, cfg.chunks)
            run.check_finite(step, {"cross-entropy": loss}, gradients)
            update(optimizers, parameters, gradients)
            if run.due(step):
                size = cfg.final_eval_size if step + 1 == cfg.steps else cfg.eval_size
                scores = {"floor": floor, **validate(model, task, tokenizer, mixture, size, cfg.seed, "validation"),
                          "minutes": run.minutes}
                run.log({"step": step + 1, "loss": loss, **scores})
                bar.write(f"{cfg.name} step {step + 1}/{cfg.steps}: loss {loss:.3f}, held-out {scores['nll']:.3f}, "
                          f"floor {floor:.3f}, valid traces {scores['valid_trace_rate']:.3f}, "
                          f"{scores['minutes'] * (cfg.steps / (step + 1) - 1):.1f} min left")
                sys.stdout.flush()
            bar.set_postfix_str(f"loss {loss:.3f}, floor {floor:.3f}", refresh=False)
            run.end_of_step(step, lambda: runs.training_state(model, optimizers))
        c_base = scores["nll"]
        scores |= validate(model, task, tokenizer, mixture, cfg.final_eval_size, cfg.seed, "test") | {"c_base": c_base}
        runs.write_result(run.folder, dataclasses.asdict(cfg), run.made_with, scores)
        run.finish({"kind": "base", "config": dataclasses.asdict(cfg), "model_config": vars(model.config),
                    "model": model.state_dict(), "vocab": list(task.vocab), "c_base": c_base})


def load_base(path):
    """The base model of a checkpoint, its task, and the checkpoint."""
    checkpoint = runs.load_checkpoint(path, "base")
    return *build_base(checkpoint), checkpoint


def build_base(checkpoint):
    """Base checkpoint -> (frozen model, task)."""
    task = make_task(checkpoint["config"]["task"], checkpoint["config"]["task_sizes"])
    if list(task.vocab) != checkpoint["vocab"]:
        fail(f"the base was trained on another vocabulary than that of {task.name}")
    model = GPT(GPTConfig(**checkpoint["model_config"]))
    model.load_state_dict(checkpoint["model"])
    return model.requires_grad_(False).eval(), task


def get_base(cfg, config_path):
    """The base of cfg, which was read from config_path: frozen model, task and checkpoint. Trains it if the checkpoint
    is missing."""
    path = os.path.join("out", cfg.name, "ckpt.pt")
    if not os.path.exists(path):
        if os.path.exists(os.path.join(os.path.dirname(path), "log.jsonl")) and not cfg.resume:
            fail(f"the base's run in '{os.path.dirname(path)}' is not finished: --resume=True goes on with it, "
                 f"python train_base.py {config_path} --overwrite=True starts it again")
        print(f"{path} is missing: training the base model first (python train_base.py {config_path})", flush=True)
        train(cfg)
    base, task, checkpoint = load_base(path)
    for key in ("task", "task_sizes", "strategy_weights", "n_layer", "n_head", "n_embd", "block_size", "steps",
                "batch_size", "crop", "optimizer", "lr", "adamw_lr", "weight_decay", "warmup", "seed"):
        was, is_now = checkpoint["config"][key], getattr(cfg, key)
        differs = f"'{path}' was trained with {key} = {was!r}, but {config_path} says {is_now!r}"
        if was != is_now and key in ("task", "task_sizes", "strategy_weights", *checkpoint["model_config"]):
            fail(f"{differs}; remove the checkpoint or change the config")
        if was != is_now:
            print(f"{differs}: used as it is", flush=True)
    return base, task, checkpoint


if __name__ == "__main__":
    train(config.load(sys.modules["__main__"], sys.argv[1:]))
    parallel.leave()
