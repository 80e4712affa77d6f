"""Speed and memory of sampling, training and factorizing, each beside something that does the same work.

    python tests/bench.py                             # about 11 minutes; tests/tables.py reads what it writes
    python tests/bench.py configs/grid_discrete.py    # another run, with a trained base, in the rows about factorizing
    python tests/bench.py optimizer                   # a step of Muon in float32, as here, and in bfloat16
    python tests/bench.py profile                     # where the time goes, operation by operation
    python tests/bench.py steps ../other out/grid_base/ckpt.pt    # seconds a step, beside another checkout's

Alternatives take turns in one process, so that whatever else the machine does meets all of them. A ratio is the median
over the rounds, its spread the least and the largest. Each alternative says how much work it did, and all must agree.
Weights are untrained where only time counts. Without transformers, which nothing else here needs, its rows are missing.
"""
import contextlib
import copy
import dataclasses
import glob
import io
import json
import math
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import types

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import factorize
import train_base
from harness import config, parallel
from harness.optim import make_optimizers, update
from harness.parallel import in_threads
from harness.runs import current_commit, write_json
from model import GPT, GPTConfig, Pairs, as_pairs, sample_in_batches
from posterior import Posterior
from tables import RENAMED, bench_table, profile_table
from tasks import BOS, EOS, PAD, SPECIALS, TASKS, Tokenizer

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
    """n records of sorting, cut to the same length, as model.Pairs."""
    rng, found = random.Random(0), []
    while len(found) < n:
        ids, starts, *_ = train_base.record_batch(TASK, TOKENIZER, rng, 1, "train")
        found += [(r[:length], s) for r, s in zip(ids, starts) if len(r) >= length]
    return as_pairs(*zip(*found[:n]))


def base_gradient(model, pairs):
    """The gradient of train_base.py, without the optimizer; returns the number of records."""
    n = len(pairs.ids)
    _, gradients = train_base.gradient(model, pairs, torch.full((n,), 1 / n), CHUNKS)
    for parameter, gradient in zip(model.parameters(), gradients):
        parameter.grad = gradient
    return n


def with_autocast(model, pairs):
    """base_gradient as --precision=bfloat16 has it."""
    parallel.bfloat16 = True
    n = base_gradient(model, pairs)
    parallel.bfloat16 = False
    return n


def products_alone(model, ids):
    """A function that does the matrix products of base_gradient, forward and both of backward, and nothing else."""
    n = len(ids) // CHUNKS  # records a chunk
    positions = n * len(ids[0])
    layers = [(w.detach(), torch.randn(positions, w.shape[1]), torch.randn(positions, w.shape[0]))
              for w in linear_weights(model)]

    def chunk(_):
        for w, x, _ in layers:
            x @ w.T
        for w, x, g in reversed(layers):
            g @ w, g.T @ x
        return n

    return lambda: sum(in_threads(chunk, range(CHUNKS)))


def bench_base(size, rows):
    """The base's gradient of 128 records of 64 tokens."""
    pairs, model = records(128, 64), GPT(GPTConfig(len(TOKENIZER), **SIZES[size]))
    half, compiled = copy.deepcopy(model).to(torch.bfloat16), copy.deepcopy(model)
    half.head.register_forward_hook(lambda module, hidden, logits: logits.float())  # the loss needs float32
    for block in compiled.blocks:
        block.compile(dynamic=True)
    alternatives = {"ours": lambda: base_gradient(model, pairs), "products": products_alone(model, pairs.ids),
                    "bfloat16 autocast": lambda: with_autocast(model, pairs),
                    "a copy in bfloat16": lambda: base_gradient(half, pairs),
                    "torch.compile": lambda: base_gradient(compiled, pairs)}
    if transformers:
        theirs, their_ids = gpt2(model).train(), pairs.ids

        def their_gradient():
            theirs.zero_grad()
            theirs(input_ids=their_ids, labels=their_ids).loss.backward()
            return len(their_ids)

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


def bench_optimizer():
    """The optimizers' step beside the same with Muon as torch has it, and beside a gradient of a sorting base."""
    cfg = config.load(train_base, [os.path.join(ROOT, "configs", "sorting_base.py")])
    pairs, weights = train_base.training_batch(TASK, TOKENIZER, cfg, 0)
    models = [GPT(GPTConfig(len(TOKENIZER))) for _ in range(2)]
    optimizers = [make_optimizers(model, cfg) for model in models]
    gradients = train_base.gradient(models[0], pairs, weights, CHUNKS)[1]
    for parameter, gradient in zip(models[1].parameters(), gradients):
        parameter.grad = gradient

    seconds = side_by_side({
        "ours": lambda: update(optimizers[0], list(models[0].parameters()), gradients),
        "bfloat16": lambda: in_threads(lambda optimizer: optimizer.step(), optimizers[1]) and None,
        "gradient": lambda: train_base.gradient(models[0], pairs, weights, CHUNKS) and None}, 4 * ROUNDS)
    rows = {f"optimizers' step, {SMALL}: Muon in bfloat16": row(seconds["ours"], seconds["bfloat16"], ""),
            f"optimizers' step, {SMALL}: gradient of a batch of sorting's base": row(
                seconds["ours"], seconds["gradient"], "")}
    result = {"machine": machine(), "commit": current_commit(), "rows": rows}
    write_json(os.path.join(ROOT, "assets", "results", "optimizer.json"), result)
    print(bench_table(result))


def elbo_gradient(model, q, batch, cfg, c_base=1.0):
    """The gradient of factorize.py in its last stage, with what is prepared for it; returns how many records go through
    a model: K a pair through the generator, and one, without gradient, through the posterior."""
    n_latents, terms = model.config.n_latents, factorize.term_weights(cfg, "ELBO", c_base)
    share = torch.full((n_latents,), 1 / n_latents)
    labels = factorize.label_pool(model, q, batch, "ELBO", cfg, share, None)
    batch, labels = factorize.take_batch(model, batch, labels, slice(None), "ELBO", cfg, terms, share, None)
    parameters = [p for p in (*model.parameters(), *q.parameters()) if p.requires_grad]
    factorize.gradient(model, q, batch, labels, "ELBO", terms, parameters, cfg.chunks)
    return len(batch.ids) * (n_latents + 1)


def bench_elbo(cfg, path, rows):
    """Beside the base's gradient of as many records of the same lengths; the generator's have '<z> z </z>' besides. The
    base is trained, for the lengths of its samples."""
    base, task, checkpoint = train_base.load_base(path)
    pool = factorize.sample_responses(base, task, cfg.pool_size, 1, "pool")
    model, q, batch = base.with_latents(K), Posterior(base, K), pool.rows(slice(cfg.batch_size))
    copy_of_base = copy.deepcopy(base).requires_grad_(True)
    copies = Pairs(*(torch.cat((K + 1) * [tensor]) for tensor in batch))
    seconds = side_by_side({"elbo": lambda: elbo_gradient(model, q, batch, cfg, checkpoint["c_base"]),
                            "base": lambda: base_gradient(copy_of_base, copies)}, 2 * ROUNDS)
    rows[f"ELBO gradient, K = {K}: base gradient of as many records"] = row(
        seconds["elbo"], seconds["base"], "<= 1.1")


def bench_pools(cfg, rows):
    """Seconds that the loop of a run spends on sampling pairs. A round is a short run, a pool in every stage, whose log
    says when each step was over; the stages then count as the run's own. Clusters and evaluations are left out."""
    stages = {"fixed labels": cfg.fixed_label_steps, "responsibilities": cfg.responsibility_steps}
    stages["ELBO"] = cfg.steps - sum(stages.values())
    a_pool, sample_responses, sampling, whole = cfg.pool_size // cfg.batch_size, factorize.sample_responses, [], []
    flags = {"name": "bench", "overwrite": True, "n_latents": K, "cluster_inputs": 0,
             "validation_inputs": 2, "steps": 4 * a_pool, "fixed_label_steps": 2 * a_pool,  # the first pool: warm-up
             "responsibility_steps": a_pool}
    for _ in range(ROUNDS):
        draws = []

        def timed(*args):
            start = time.time()
            pairs = sample_responses(*args)
            draws.append(time.time() - start)
            return pairs

        factorize.sample_responses = timed
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                folder = factorize.factorize(dataclasses.replace(cfg, **flags))
        finally:
            factorize.sample_responses = sample_responses
        with open(os.path.join(folder, "log.jsonl")) as f:
            ends = [60 * json.loads(line)["minutes"] for line in f][a_pool - 1::a_pool]  # of every pool
        pools = [n / a_pool for n in stages.values()]
        sampling.append(sum(n * s for n, s in zip(pools, draws[-3:])))
        whole.append(sum(n * (end - start) for n, start, end in zip(pools, ends, ends[1:])))
    rows[f"sampling pairs in {cfg.steps} steps: the whole loop"] = row(sampling, whole, "<= 0.15")


def bench_factorization(path, rows):
    cfg = config.load(factorize, [path])
    path = os.path.join("out", factorize.load_base_config(cfg).name, "ckpt.pt")
    if not os.path.exists(path):
        print(f"no rows about factorizing: '{path}' is missing (python train_base.py {cfg.base})")
        return
    bench_elbo(cfg, path, rows)
    bench_pools(cfg, rows)


def print_memory(n_latents, length, chunks):
    """By how many GiB one ELBO gradient, of a batch of records of this length, grows the most that this process had.
    VmHWM is the process's own; ru_maxrss would begin with that of the parent which started this process."""
    def most():
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) for line in f if line.startswith("VmHWM")) / 2 ** 20

    cfg, V = factorize.Config(base="", chunks=chunks), len(TOKENIZER)
    ids = torch.randint(len(SPECIALS), V, (cfg.batch_size, length))  # what they say makes no difference
    batch = Pairs(ids, torch.full((cfg.batch_size,), 10), torch.ones(ids.shape))
    model, q = GPT(GPTConfig(V + n_latents, n_latents)), Posterior(GPT(GPTConfig(V)), n_latents)
    before = most()
    elbo_gradient(model, q, batch, cfg)
    print(most() - before)


def bench_memory(rows):
    """A fresh process for every number."""
    cfg = factorize.Config(base="")
    for n_latents in (5, 16, 32):
        for length in (64, 128):
            ours, one_pair = ([float(subprocess.run(
                [sys.executable, __file__, "memory", *map(str, (n_latents, length, chunks))], check=True,
                stdout=subprocess.PIPE).stdout)] for chunks in (cfg.chunks, cfg.batch_size))
            rows[f"memory, K = {n_latents}, {length} tokens: one pair a chunk"] = row(
                ours, one_pair, "ours <= 1 GiB" if n_latents == 32 else "", "GiB")


A_STAGE = 16  # steps: two pools
STAGES = {"discrete": ["fixed labels", "responsibilities", "ELBO"], "continuous": ["fixed labels", "ELBO"]}


def step_seconds(checkout, kind, base):
    """{stage: seconds a step}, sampling and labels included, of a short run of a checkout's own program and config, on
    the base that a checkpoint holds. The code says what its keys and the version of its checkpoints are."""
    code = "".join(open(path).read() for pattern in ("*.py", "harness/*.py")
                   for path in glob.glob(os.path.join(checkout, pattern)))
    stages, name, n = STAGES[kind], base["config"]["name"], 2 * A_STAGE  # the first stage begins with a warm-up
    first = {"cell_steps": n} if kind == "continuous" else {"fixed_label_steps": n, "responsibility_steps": A_STAGE}
    flags = first | {"steps": n + A_STAGE * (len(stages) - 1), "batch_size": 64, "pool_size": 512,
                     "cluster_inputs": 48, "cluster_searches": 2, "validation_inputs": 2, "eval_inputs": 16}
    before = {new: old for old, new in RENAMED.items()}
    before |= {"cell_steps": "held_steps", "cluster_searches": "cluster_restarts"}
    flags = [f"--{key if f'    {key}: ' in code else before[key]}={value}" for key, value in flags.items()]
    with tempfile.TemporaryDirectory() as folder:
        os.symlink(os.path.join(checkout, "configs"), os.path.join(folder, "configs"))
        os.makedirs(os.path.join(folder, "out", name))
        version = int(re.search(r'VERSIONS = {"base": (\d+)', code)[1])
        torch.save(base | {"version": version}, os.path.join(folder, "out", name, "ckpt.pt"))
        run = [os.path.join(checkout, "factorize.py"), f"configs/{name.removesuffix('base')}{kind}.py", "--name=steps"]
        subprocess.run([sys.executable, *run, *flags], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        with open(os.path.join(folder, "out", "steps", "log.jsonl")) as f:
            ends = [60 * json.loads(line)["minutes"] for line in f][A_STAGE - 1::A_STAGE]
    return {stage: (end - start) / A_STAGE for stage, start, end in zip(stages, ends, ends[1:])}


def compare_steps(other, checkpoint):
    """Prints the seconds of a step in this checkout and in another one, such as an earlier commit, taking turns."""
    base, checkouts = torch.load(checkpoint, weights_only=True), [ROOT, os.path.abspath(other)]
    for kind, stages in STAGES.items():
        found = {checkout: [] for checkout in checkouts}
        for i in range(ROUNDS):
            for checkout in checkouts[::-1 if i % 2 else 1]:
                found[checkout].append(step_seconds(checkout, kind, base))
        for stage in stages:
            ours, theirs = ([seconds[stage] for seconds in found[checkout]] for checkout in checkouts)
            r = row(ours, theirs, "")
            print(f"{kind}, {stage}: {r['ours']:.3f} s a step, theirs {r['against']:.3f}, ratio of the medians "
                  f"{r['ours'] / r['against']:.3f}, of rounds {r['min']:.3f} to {r['max']:.3f}", flush=True)


def profile(path="configs/sorting_discrete.py"):
    """Where the time of a base gradient and of sampling goes, operation by operation, in one thread: writes
    assets/results/profile.json."""
    parallel.threads = types.SimpleNamespace(map=map)  # the profiler sees this thread alone

    def shares(f):
        f()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            f()
        seconds = {event.key.removeprefix("aten::"): event.self_cpu_time_total for event in seen.key_averages()}
        return {name: value / sum(seconds.values()) for name, value in seconds.items()}

    pairs, model = records(128, 64), GPT(GPTConfig(len(TOKENIZER)))
    base_cfg = factorize.load_base_config(config.load(factorize, [path]))
    base, task, _ = train_base.load_base(os.path.join("out", base_cfg.name, "ckpt.pt"))
    found = {"base gradient": shares(lambda: base_gradient(model, pairs)),
             "sampling pairs": shares(lambda: factorize.sample_responses(base, task, 512, 1, "pool"))}
    write_json(os.path.join(ROOT, "assets", "results", "profile.json"), {"machine": machine(), "shares": found})
    print(profile_table())


def machine():
    with open("/proc/cpuinfo") as f:
        cpu = next((line.split(":")[1].strip() for line in f if line.startswith("model name")), platform.machine())
    return {"cpu": cpu, "instructions": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(), "threads": THREADS, "torch": torch.__version__,
            "transformers": transformers and transformers.__version__}


def main(path="configs/sorting_discrete.py"):
    torch.manual_seed(0)
    if not transformers:
        print("no rows about transformers: it is not installed")
    sizes = [(f, size) for size in SIZES for f in (bench_sampling, bench_base)]
    rows, parts = {}, [*sizes, (bench_factorization, path), (bench_memory,)]
    for part, *more in tqdm(parts, disable=not sys.stdout.isatty()):
        part(*more, rows)
    result = {"machine": machine(), "commit": current_commit(), "rows": rows}
    write_json(os.path.join(ROOT, "assets", "results", "bench.json"), result)
    print(bench_table(result))


if __name__ == "__main__":
    parallel.start(THREADS, "cpu")
    if sys.argv[1:2] == ["profile"]:
        profile(*sys.argv[2:])
    elif sys.argv[1:2] == ["optimizer"]:
        bench_optimizer()
    elif sys.argv[1:2] == ["memory"]:
        print_memory(*map(int, sys.argv[2:]))
    elif sys.argv[1:2] == ["steps"]:
        compare_steps(*sys.argv[2:])
    else:
        main(*sys.argv[1:])
