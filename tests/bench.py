"""Speed and memory of sampling, training and factorizing, each beside something that does the same work.

    python tests/bench.py                             # about 11 minutes; tests/tables.py reads what it writes
    python tests/bench.py configs/grid_discrete.py    # another run, with a trained base, in the rows about factorizing
    python tests/bench.py profile                     # where the time goes, operation by operation

Alternatives take turns in one process, so that whatever else the machine does meets all of them. A ratio is the median
over the rounds, its spread the least and the largest. Each alternative says how much work it did, and all must agree.
Weights are untrained where only time counts. Without transformers, which nothing else here needs, its rows are missing.
"""
import contextlib
import copy
import dataclasses
import io
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import time
import types

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import configs
import factorize
import losses
import parallel
from model import GPT, GPTConfig, Pairs, pad, sample_in_batches, score_base
from parallel import in_threads, sum_pieces
from posterior import Posterior
from tables import bench_table, profile_table
from tasks import BOS, EOS, PAD, SPECIALS, TASKS, Tokenizer
from train_base import current_commit, load_base, record_batch, write_json

try:
    import transformers
    transformers.logging.set_verbosity_error()
except ImportError:
    transformers = None

THREADS, CHUNKS, K = 2, 8, 5  # as by default, and as sorting has strategies
SMALL, LARGE = "0.6M", "6.3M"  # parameters: the default model, and ten times as many
SIZES = {SMALL: {}, LARGE: dict(n_layer=8, n_head=8, n_embd=256)}
ROUNDS, NEW_TOKENS, BATCH = 5, 64, 256  # tokens sampled after every prompt, prompts a batch
TASK = TASKS["sorting_algorithms"]
TOKENIZER = Tokenizer(TASK.vocab)


def side_by_side(alternatives, rounds=None):
    """{name: function that returns how much work it did} -> {name: seconds of every round}."""
    work = {name: f() for name, f in alternatives.items()}  # a first time, which does not count
    assert len(set(work.values())) == 1, f"not the same work: {work}"
    seconds = {name: [] for name in alternatives}
    for i in range(rounds or ROUNDS):
        for name in list(alternatives)[::-1 if i % 2 else 1]:
            start = time.perf_counter()
            alternatives[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def row(ours, against, bar, unit="s", amount=None):
    """What the table shows of the seconds of every round, or of the amounts a second. The bar is for ours / against."""
    if amount:
        ours, against = ([amount / s for s in seconds] for seconds in (ours, against))
    ratios = [a / b for a, b in zip(ours, against)]
    return {"ours": statistics.median(ours), "against": statistics.median(against), "unit": unit, "bar": bar,
            "ratio": statistics.median(ratios), "min": min(ratios), "max": max(ratios), "rounds": len(ratios)}


def on_cores(n, f):
    """f() with n cores for every operation: parallel.start left one, which is not how others use torch."""
    torch.set_num_threads(n)
    result = f()
    torch.set_num_threads(1)
    return result


def linear_weights(model):
    return [m.weight for m in model.modules() if isinstance(m, nn.Linear)]


def gpt2(model):
    """The GPT-2 of transformers with as many layers, heads and tokens, as wide.

    It differs in biases, learned positions, LayerNorm, and queries and keys without norm. Made alike: its head is no
    copy of the embedding, nothing is dropped, and its GELU is the exact one, not a formula of seven operations.
    """
    c = model.config
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, activation_function="gelu", tie_word_embeddings=False,
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, loss_type="ForCausalLM"))
    embeddings = (theirs.transformer.wte.weight, theirs.transformer.wpe.weight)
    count = sum(p.numel() for p in theirs.parameters() if p.dim() == 2 and not any(p is e for e in embeddings))
    assert count == sum(w.numel() for w in linear_weights(model)), f"not the same matrices: {count} numbers"
    return theirs


class Endless(GPT):
    """Never says <eos>, so that all samples are equally long."""
    def logits(self, hidden):
        logits = super().logits(hidden)
        logits[..., EOS] = -math.inf
        return logits


@torch.no_grad()
def sample_uncached(model, prompts):
    """What model.sample does, with the whole prefix again for every token."""
    ids, generator = torch.tensor(prompts), torch.Generator().manual_seed(0)
    for _ in range(NEW_TOKENS):
        logp = F.log_softmax(model.logits(model.hidden_states(ids)[-1][:, -1]), dim=-1)
        uniform = torch.rand(logp.shape, generator=generator)
        token = (logp - torch.log(-torch.log(uniform.clamp(min=1e-20)))).argmax(dim=-1)
        ids = torch.cat((ids, token[:, None]), dim=1)
    return ids[:, len(prompts[0]):].numel()


def bench_sampling(size, rows):
    """A batch for every thread. Prompts are equally long: without padding, transformers needs no mask."""
    rng = random.Random(0)
    xs = [x for x in (TASK.sample_input(rng) for _ in range(10 * BATCH)) if len(x) == 6]
    prompts = [TOKENIZER.prompt(x) for x in xs[:THREADS * BATCH]]
    batches, length, n = [prompts[:BATCH], prompts[BATCH:]], len(prompts[0]), THREADS * BATCH * NEW_TOKENS
    # sampling ends where the context is full: after NEW_TOKENS tokens
    model = Endless(GPTConfig(len(TOKENIZER), block_size=length + NEW_TOKENS, **SIZES[size]))

    def ours():
        return sum(len(tokens) for tokens, _ in sample_in_batches(model, prompts, torch.Generator(), batch=BATCH))

    def uncached():
        return sum(in_threads(lambda batch: sample_uncached(model, batch), batches))

    def generate(batch):  # top_k=0: from the whole softmax
        ids = torch.tensor(batch)
        out = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, use_cache=True, top_k=0,
                              min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS)
        return out[:, length:].numel()

    if size == SMALL:  # the larger model would take minutes a round
        seconds = side_by_side({"ours": ours, "uncached": uncached})
        rows[f"sampling, {size}: without a cache"] = row(
            seconds["ours"], seconds["uncached"], ">= 20", "tokens/s", n)
    if transformers:
        theirs = gpt2(model).eval()
        seconds = side_by_side({"ours": ours, **{
            cores: lambda cores=cores: on_cores(cores, lambda: sum(map(generate, batches))) for cores in (1, THREADS)}})
        best = min((1, THREADS), key=lambda cores: statistics.median(seconds[cores]))
        rows[f"sampling, {size}: transformers' generate"] = row(
            seconds["ours"], seconds[best], ">= 2", "tokens/s", n) | {"their_cores": best}


def records(n, length):
    """n records of sorting, cut to the same length."""
    rng, found = random.Random(0), []
    while len(found) < n:
        ids, starts = record_batch(TASK, TOKENIZER, TASK.strategies, rng, 1, test=False)
        found += [(r[:length], s) for r, s in zip(ids, starts) if len(r) >= length]
    ids, starts = zip(*found[:n])
    return Pairs(pad(ids), torch.tensor(starts), torch.zeros(n, length))


def base_gradient(model, pairs):
    """The gradient of train_base.py, pieces side by side, without the optimizer; returns the number of records."""
    parameters = list(model.parameters())

    def gradient(rows):
        piece = pairs.rows(rows)
        nll = score_base(model, piece.ids, piece.starts).sum() / len(pairs.ids)
        return torch.autograd.grad(nll, parameters)

    for parameter, total in zip(parameters, sum_pieces(gradient, pairs.by_length(CHUNKS))):
        parameter.grad = total
    return len(pairs.ids)


def with_autocast(model, pairs):
    """base_gradient as --precision=bfloat16 has it."""
    parallel.bfloat16 = True
    n = base_gradient(model, pairs)
    parallel.bfloat16 = False
    return n


def products_alone(model, pairs):
    """A function that does the matrix products of base_gradient, forward and both of backward, and nothing else."""
    n = len(pairs.ids) // CHUNKS  # records a piece
    positions = n * pairs.ids.shape[1]
    layers = [(w.detach(), torch.randn(positions, w.shape[1]), torch.randn(positions, w.shape[0]))
              for w in linear_weights(model)]

    def piece(_):
        for w, x, _ in layers:
            x @ w.T
        for w, x, g in reversed(layers):
            g @ w, g.T @ x
        return n

    return lambda: sum(in_threads(piece, range(CHUNKS)))


def bench_base(size, rows):
    """The base's gradient of 128 records of 64 tokens."""
    pairs, model = records(128, 64), GPT(GPTConfig(len(TOKENIZER), **SIZES[size]))
    half, compiled = copy.deepcopy(model).to(torch.bfloat16), copy.deepcopy(model)
    compiled.compile()
    alternatives = {"ours": lambda: base_gradient(model, pairs), "products": products_alone(model, pairs),
                    "bfloat16 autocast": lambda: with_autocast(model, pairs),
                    "a copy in bfloat16": lambda: base_gradient(half, pairs),
                    "torch.compile": lambda: base_gradient(compiled, pairs)}
    if transformers:
        theirs = gpt2(model).train()

        def their_gradient():
            theirs.zero_grad()
            theirs(input_ids=pairs.ids, labels=pairs.ids).loss.backward()
            return len(pairs.ids)

        alternatives["transformers"] = lambda: on_cores(THREADS, their_gradient)
    seconds = side_by_side(alternatives, 3 * ROUNDS if size == SMALL else ROUNDS)
    ours, n = seconds["ours"], len(pairs.ids)
    rows[f"base gradient, {size}: its matrix products alone"] = row(ours, seconds["products"], "<= 1.15")
    if transformers:
        bar = ">= 1.6" if size == SMALL else ">= 1.08"
        rows[f"base gradient, {size}: transformers' GPT-2"] = row(ours, seconds["transformers"], bar, "records/s", n)
    for name in ("bfloat16 autocast", "a copy in bfloat16"):
        rows[f"{name}, {size}: float32"] = row(seconds[name], ours, ">= 1.4", "records/s", n)
    rows[f"torch.compile, {size}: not compiled"] = row(seconds["torch.compile"], ours, "", "records/s", n)


def elbo_gradient(model, q, batch, cfg, c_base=1.0, recompute=False):
    """The gradient of factorize.py in its last stage, the terms that have a weight by default; returns how many records
    go through a model: K a pair through the generator, and one, without gradient, through the posterior."""
    logq = q(batch)  # (B, K)
    n, n_latents = logq.shape
    z, w = torch.arange(n_latents).expand(n, -1), losses.token_weights(batch.b)
    (logp_y, _, _, router), backward = factorize.score_batch(model, batch, z, w, cfg.chunks, recompute)
    J = (losses.reconstruction(logp_y, logq).mean() / c_base
         + cfg.beta * losses.categorical_kl(logq, F.log_softmax(router[:, -n_latents:], dim=1)).mean()
         + cfg.router_support_weight * losses.router_support(router, n_latents).mean())
    J.backward()
    backward()
    return n * (n_latents + 1)


def bench_elbo(cfg, path, rows):
    """Beside the base's gradient of as many records of the same lengths; the generator's have '<z> z </z>' besides. The
    base is trained, for the lengths of its samples."""
    base, task, checkpoint = load_base(path)
    pool = factorize.draw_pairs(base, task, Tokenizer(task.vocab), cfg.pool_size, 1, "pool")
    model, q, batch = base.with_latents(K, pool, steps=0), Posterior(base, K), pool.rows(slice(cfg.batch_size))
    copies = Pairs(*(torch.cat((K + 1) * [tensor]) for tensor in batch))
    seconds = side_by_side({"elbo": lambda: elbo_gradient(model, q, batch, cfg, checkpoint["c_base"]),
                            "base": lambda: base_gradient(base, copies)}, 2 * ROUNDS)
    rows[f"ELBO gradient, K = {K}: base gradient of as many records"] = row(
        seconds["elbo"], seconds["base"], "<= 1.1")


def bench_pools(cfg, rows):
    """Seconds that the loop of a run spends on sampling pairs. A round is a short run, a pool in every stage, whose log
    says when each step was over; the stages then count as the run's own. Clusters and looks are left out."""
    stages = {"held": cfg.held_steps, "responsibilities": cfg.responsibility_steps}
    stages["ELBO"] = cfg.steps - sum(stages.values())
    a_pool, draw_pairs, sampling, whole = cfg.pool_size // cfg.batch_size, factorize.draw_pairs, [], []
    flags = {"name": "bench", "overwrite": True, "n_latents": K, "cluster_inputs": 0, "slot_steps": 1, "look_inputs": 2,
             "steps": 4 * a_pool, "held_steps": 2 * a_pool, "responsibility_steps": a_pool}  # the first pool: warm-up
    for _ in range(ROUNDS):
        draws = []

        def timed(*args):
            start = time.time()
            pairs = draw_pairs(*args)
            draws.append(time.time() - start)
            return pairs

        factorize.draw_pairs = timed
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                folder = factorize.factorize(dataclasses.replace(cfg, **flags))
        finally:
            factorize.draw_pairs = draw_pairs
        with open(os.path.join(folder, "log.jsonl")) as f:
            ends = [60 * json.loads(line)["minutes"] for line in f][a_pool - 1::a_pool]  # of every pool
        pools = [n / a_pool for n in stages.values()]
        sampling.append(sum(n * s for n, s in zip(pools, draws[-3:])))
        whole.append(sum(n * (end - start) for n, start, end in zip(pools, ends, ends[1:])))
    rows[f"sampling pairs in {cfg.steps} steps: the whole loop"] = row(sampling, whole, "<= 0.15")


def bench_factorization(config, rows):
    cfg = configs.load(factorize, [config])
    path = os.path.join("out", factorize.load_base_config(cfg).name, "ckpt.pt")
    if not os.path.exists(path):
        print(f"no rows about factorizing: '{path}' is missing (python train_base.py {cfg.base})")
        return
    bench_elbo(cfg, path, rows)
    bench_pools(cfg, rows)


def print_memory(n_latents, length, recompute):
    """By how many GiB one ELBO gradient, of a batch of records of this length, grows the most that this process held.
    VmHWM is the process's own; ru_maxrss would begin with what the parent held when it started this process."""
    def most():
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) for line in f if line.startswith("VmHWM")) / 2 ** 20

    cfg, V = factorize.Config(base=""), len(TOKENIZER)
    ids = torch.randint(len(SPECIALS), V, (cfg.batch_size, length))  # what they say makes no difference
    batch = Pairs(ids, torch.full((cfg.batch_size,), 10), torch.ones(ids.shape))
    model, q = GPT(GPTConfig(V + n_latents, n_latents)), Posterior(GPT(GPTConfig(V)), n_latents)
    before = most()
    elbo_gradient(model, q, batch, cfg, recompute=bool(recompute))
    print(most() - before)


def bench_memory(rows):
    """A fresh process for every number."""
    for n_latents in (5, 16, 32):
        for length in (64, 128):
            kept, recomputed = ([float(subprocess.run(
                [sys.executable, __file__, "memory", *map(str, (n_latents, length, recompute))], check=True,
                stdout=subprocess.PIPE).stdout)] for recompute in (0, 1))
            rows[f"memory, K = {n_latents}, {length} tokens, --recompute=True: without"] = row(
                recomputed, kept, "ours <= 4 GiB" if n_latents == 32 else "", "GiB")


def profile(config="configs/sorting_discrete.py"):
    """Where the time of a base gradient and of sampling goes, operation by operation, in one thread: writes
    assets/results/profile.json."""
    parallel.threads = types.SimpleNamespace(map=map)  # the profiler sees this thread alone

    def shares(f):
        f()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            f()
        seconds = {event.key.removeprefix("aten::"): event.self_cpu_time_total for event in seen.key_averages()}
        return {name: value / sum(seconds.values()) for name, value in seconds.items()}

    model, pairs = GPT(GPTConfig(len(TOKENIZER))), records(128, 64)
    base, task, _ = load_base(os.path.join("out", factorize.load_base_config(configs.load(factorize, [config])).name,
                                           "ckpt.pt"))
    found = {"base gradient": shares(lambda: base_gradient(model, pairs)), "sampling pairs": shares(
        lambda: factorize.draw_pairs(base.requires_grad_(False), task, TOKENIZER, 512, 1, "pool"))}
    write_json(os.path.join(ROOT, "assets", "results", "profile.json"), {"machine": machine(), "shares": found})
    print(profile_table())


def machine():
    with open("/proc/cpuinfo") as f:
        cpu = next((line.split(":")[1].strip() for line in f if line.startswith("model name")), platform.machine())
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": THREADS, "torch": torch.__version__,
            "transformers": transformers and transformers.__version__}


def main(config="configs/sorting_discrete.py"):
    torch.manual_seed(0)
    if not transformers:
        print("no rows about transformers: it is not installed")
    sizes = [(f, size) for size in SIZES for f in (bench_sampling, bench_base)]
    rows, parts = {}, [*sizes, (bench_factorization, config), (bench_memory,)]
    for part, *more in tqdm(parts, disable=not sys.stdout.isatty()):
        part(*more, rows)
    result = {"machine": machine(), "commit": current_commit(), "rows": rows}
    write_json(os.path.join(ROOT, "assets", "results", "bench.json"), result)
    print(bench_table(result))


if __name__ == "__main__":
    parallel.start(THREADS, "cpu")
    if sys.argv[1:2] == ["profile"]:
        profile(*sys.argv[2:])
    elif sys.argv[1:2] == ["memory"]:
        print_memory(*map(int, sys.argv[2:]))
    else:
        main(*sys.argv[1:])
