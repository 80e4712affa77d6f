"""Learns a router p(z|x) and a generator p(y|x,z) from a base model p(y|x), without ever seeing a strategy label.

    python factorize.py configs/sorting_discrete.py

Trains the base first if its checkpoint is missing. Leaves out/sorting_discrete/ with ckpt.pt, config.json, log.jsonl,
metrics.json, result.json and figures. The recipe has four stages, of which a continuous z skips the third:
    clusters           label a few thousand responses of the base (posterior.cluster_responses), fit a linear posterior
    held               the generator learns to use z, the posterior's labels standing still
    responsibilities   labels T = Sinkhorn(log p(y|x,z) / tau + alpha log q(z|x,y)) [1]
    ELBO               the evidence lower bound [2], with a weight beta on its KL, everything trained together
[1] Asano et al. 2020, arXiv 1911.05371     [2] Kingma & Welling 2014, arXiv 1312.6114
"""
import dataclasses
import functools
import json
import math
import os
import random
import sys
import time

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import configs
import evaluate
import losses
import metrics
import parallel
import train_base
from configs import fail
from model import GPT, Pairs, gaussian, log_likelihood, sample_pairs, score_latents
from parallel import gather, in_threads, seeded, sum_in_threads
from posterior import Posterior, cluster_responses
from tasks import Tokenizer
from train_base import (check_finite, check_optimizer, find_state, finish, interruptible, load_base, make_optimizers,
                        make_task, open_run, restore, save_state, set_lr, stop, warmup_and_decay)


@dataclasses.dataclass(frozen=True)
class Config:
    base: str  # config file of the base model, which is trained first if its checkpoint is missing
    name: str = ""  # of the run; its folder is out/<name>; default: the config file's name
    n_latents: int = 0  # K, of clusters where z is continuous; 0: as many as the task has strategies
    z_dim: int = 0  # D, the size of a continuous z; 0: discrete latents
    prior: list | None = None  # share of the base's solutions that each latent should stand for; None: equal shares
    steps: int = 700  # gradient steps
    batch_size: int = 64  # pairs (x, y) a step, y sampled from the frozen base
    pool_size: int = 512  # pairs sampled at a time; each is used once
    chunks: int = 8  # pieces of a batch, sorted by length: little padding, and work for every thread; same gradient
    # stages; responsibility_steps, tau, held_alpha, alpha and router_support_weight play no part where z is continuous,
    # posterior_std, z_samples and tiling_weight none where it is discrete
    slot_steps: int = 60  # gradient steps that fit the embeddings of <z> z </z> to leave the base's p(y|x) as it was
    cluster_inputs: int = 768  # inputs whose responses are clustered; 0: no clusters, the posterior's head is random
    cluster_responses: int = 12  # responses to each of them
    cluster_restarts: int = 192  # starts of the clustering, of which the best counts
    held_steps: int = 300  # steps in which the posterior stands still and labels; a pool keeps its labels to its end
    responsibility_steps: int = 350  # further steps with balanced responsibilities; the remaining ones train the ELBO
    tau: float = 0.5  # temperature of log p(y|x,z) in the responsibilities
    held_alpha: float = 4.0  # power to which q(z|x,y) is raised in the held labels
    alpha: float = 2.0  # weight of log q(z|x,y) in the responsibilities
    posterior: str = "linear"  # "linear": frozen backbone, trained head; "full": both trained
    posterior_std: float = 0.3  # standard deviation of a continuous posterior as it starts
    z_samples: int = 1  # S, samples of a continuous z a pair, from the posterior
    # objective J = R + beta KL + sum_i weight_i L_i; a term of weight 0 takes no part in it
    normalize_reconstruction: bool = True  # divide R by c_base, the base's validation loss
    beta: float = 0.1  # of KL(q || p), in the ELBO
    # these, in every stage
    token_weighted_weight: float = 0.0  # of the token-weighted reconstruction
    posterior_entropy_weight: float = 0.0  # of H(q)
    router_support_weight: float = 0.1  # of the router's mass outside the latent tokens
    router_marginal_kl_weight: float = 0.0  # of KL(mean router || prior), or of one Gaussian for all x from N(0, I)
    jsd_weight: float = 0.0  # of minus the inter-latent Jensen-Shannon divergence
    posterior_variance_weight: float = 0.0  # of the mean variance of a continuous posterior
    # and these in one
    tiling_weight: float = 0.5  # in a continuous ELBO, of -log p(y|x,z), not normalised, z ~ N(0, I) in the pair's cell
    distillation_weight: float = 1.0  # before the ELBO, of posterior and router towards the labels, or of KL(q || p)
    # optimisation
    optimizer: str = "muon"  # "muon" (AdamW for embedding and head) or "adamw"
    lr: float = 0.003  # peak learning rate of Muon's matrices
    adamw_lr: float = 3e-3  # peak learning rate of AdamW's parameters
    posterior_lr: float = 3e-3  # peak learning rate of the posterior, by AdamW
    weight_decay: float = 0.0  # decoupled, as in AdamW
    warmup: int = 20  # steps of linear warm-up; over all steps the rate falls linearly to 0
    # evaluation
    eval_every: int = 100  # steps between looks at the alignment
    look_inputs: int = 64  # training inputs a look; of these at most 32 where z is continuous
    eval_inputs: int = 256  # different test inputs, as many as the task has
    eval_samples: int = 8  # router samples an input, or K if that is more; 16 where z is continuous
    seed: int = 0  # of weights, data and clusters
    threads: int = 2  # CPU threads
    device: str = "cpu"  # "cuda", "mps", "cpu", or "auto": the first of them that is there
    precision: str = "auto"  # of matrix products: "float32" or "bfloat16"; auto: bfloat16 on CUDA, where it is faster
    compile: bool = False  # fuse the blocks by torch.compile: faster, after slow first steps; takes a C++ compiler
    recompute: bool = False  # score a batch twice, the second time pair by pair: memory of a pair under K latents
    save_every: int = 100  # steps between saved states, from which an interrupted run can go on
    resume: bool = False  # go on from the last saved state, of the base's training too, if there is one
    overwrite: bool = False  # start again in a folder that holds a run


def draw_pairs(base, task, tokenizer, n_inputs, n_responses, key):
    """n_responses samples y ~ p_theta(y|x) for each of n_inputs training inputs: a function of `key` (str) alone."""
    rng = random.Random(key)
    xs = [x for x in (task.sample_input(rng, test=False) for _ in range(n_inputs)) for _ in range(n_responses)]
    return sample_pairs(base, [tokenizer.prompt(x) for x in xs], seeded(rng.getrandbits(48)))


def compare_to_base(model, pairs):
    """max_k |NLL of y given (x, z_k) - base NLL of y| / base NLL of y, over samples of the base; z ~ N(0, I) where
    it is continuous."""
    z = [torch.randn(len(pairs.ids), 3, model.config.z_dim)] if model.config.z_dim else []
    nll = -log_likelihood(model, pairs, *z).mean(dim=0)  # (K,)
    base_nll = pairs.b.sum(dim=1).mean()
    return ((nll - base_nll).abs().max() / base_nll).item()


def start_posterior(q, base, task, tokenizer, cfg, log_prior):
    """Clusters responses of the base, fits the posterior's head to the clusters; returns the share of restarts that
    agree on them."""
    pairs = draw_pairs(base, task, tokenizer, cfg.cluster_inputs, cfg.cluster_responses, f"clusters {cfg.seed}")
    first = {}  # a response that came up several times is one response, weighted by its probability
    for i, row in enumerate(pairs.ids.tolist()):
        first.setdefault((i // cfg.cluster_responses, *row), i)
    index = torch.tensor(list(first.values()))
    distinct = pairs.rows(index)
    if len(index) < 2 * len(log_prior):
        fail(f"config key 'cluster_inputs': {len(index)} different responses are too few for {len(log_prior)} clusters")
    features, log_p = q.fit_statistics(distinct), -distinct.b.sum(dim=1)
    width = base.config.n_embd
    # the last two layers, pooled with equal weights: earlier layers and other weights say more about x than about z
    evenly = features[:, :base.config.n_layer * width][:, -2 * width:]
    log_t, agreement = cluster_responses(evenly, index // cfg.cluster_responses, log_p, log_prior,
                                         seeded(cfg.seed), cfg.cluster_restarts)
    weight = log_p.softmax(dim=0)  # here an x counts by how much of what the base says to it was sampled
    if cfg.z_dim:
        q.place_corners(weight @ log_t.exp(), cfg.posterior_std)
        if q.cell(q.corners).tolist() != list(range(len(log_prior))):
            fail("config key 'z_dim': clusters of such unequal shares have no cells of their own in a continuous z; "
                 "discrete latents (z_dim = 0) have")
    q.fit_head(features, log_t, weight)
    return agreement


def score_batch(model, batch, z, w, chunks, recompute=False):
    """Everything the objective needs of the generator; z (B, n), or (B, n, D), to score; w (B, T) token weights.

    Returns [logp_y (B, n), weighted_nll (B, n), jsd (B,), router (B, V) or (B, 2 D)] and a function `backward`. Pieces
    of similar length are scored side by side. The objective is about the whole batch, so its gradient is taken in two
    steps: objective.backward() stops at what is returned here, and `backward` goes on from there into the model. With
    `recompute` nothing is kept between the two but what is returned, and pieces of one pair are scored once more:
    memory is that of the pairs in work.
    """
    n_pieces = len(batch.ids) if recompute else max(chunks, parallel.processes)
    order, parameters = batch.by_length(n_pieces), list(model.parameters())
    back = torch.cat(order).argsort()
    mine = parallel.mine(order)  # the pieces of this process
    zs = [z[rows].detach().requires_grad_(z.requires_grad) for rows in mine]

    def score(rows, z):
        piece = batch.rows(rows)
        latents = z if model.config.z_dim else model.config.vocab_size - model.config.n_latents + z
        token_nll, logits, router = score_latents(model, piece.ids, piece.starts, latents)
        weights = w[rows][:, :piece.ids.shape[1]]
        jsd = losses.inter_latent_jsd(F.log_softmax(logits, dim=-1), weights)
        return -token_nll.sum(dim=2), losses.token_weighted_nll(token_nll, weights), jsd, router

    again = functools.partial(checkpoint, score, use_reentrant=False, preserve_rng_state=False)
    parts = in_threads(again if recompute else score, mine, zs)
    whole = gather([[output.detach() for output in part] for part in parts])
    outputs = [torch.cat(part)[back].requires_grad_() for part in zip(*whole)]

    def backward():
        def gradient(rows, part, z):  # a term of weight 0 sends no gradient
            used = [(value, output.grad[rows]) for value, output in zip(part, outputs) if output.grad is not None]
            values, gradients = zip(*used)
            wanted = parameters + ([z] if z.requires_grad else [])
            found = torch.autograd.grad(values, wanted, gradients, allow_unused=True)
            if z.requires_grad:
                z.grad = found[-1]
            return found[:len(parameters)]

        for parameter, total in zip(parameters, sum_in_threads(gradient, mine, parts, zs)):
            parameter.grad = total
        if z.requires_grad:
            z.backward(torch.cat(gather([piece.grad for piece in zs]))[back])

    return outputs, backward


@torch.no_grad()
def tile(q, pool, cfg, generator):
    """Labels of a pool where z is continuous: mean and log variance of the posterior, and a z ~ N(0, I) out of the cell
    that the mean is in (Posterior.cell), (N, D) each. So the whole space is taken, in the same way for every x."""
    mean, log_var = q(pool)
    z = torch.randn(8 * len(mean), cfg.z_dim, generator=generator)
    same = q.cell(mean)[:, None] == q.cell(z)  # (N, 8 N)
    same |= ~same.any(dim=1, keepdim=True)  # no draw in a cell: any will do
    return mean, log_var, z[torch.multinomial(same.float(), 1, generator=generator)[:, 0]]


@torch.no_grad()
def label(model, q, pool, cfg, step, log_prior):
    """Labels T of a pool: (log q, log T), both (N, K). While held, they are those of the posterior, sharpened."""
    logq = q(pool)
    if step < cfg.held_steps:
        return logq, F.log_softmax(cfg.held_alpha * logq, dim=1)
    return logq, losses.balanced_responsibilities(log_likelihood(model, pool) / cfg.tau + cfg.alpha * logq, log_prior)


@interruptible
def factorize(cfg, signals):
    """Runs the recipe of cfg and leaves its run folder; returns the path of the folder."""
    base_cfg = load_base_config(cfg)
    K = cfg.n_latents or len(make_task(base_cfg.task, base_cfg.task_sizes).strategies)
    check(cfg, K)  # whatever is wrong is said before a base is trained
    parallel.start(cfg.threads, cfg.device, cfg.precision)
    state = find_state(cfg)
    base, task, base_checkpoint = get_base(cfg)
    n_tokens = 0 if cfg.z_dim else K  # a continuous z needs no token of its own
    torch.manual_seed(cfg.seed)  # after the base, which may or may not have been trained just now
    c_base, made_with = base_checkpoint["c_base"], train_base.provenance()
    tokenizer = Tokenizer(task.vocab, n_tokens)
    log_prior = torch.tensor(cfg.prior or K * [1.0]).log().log_softmax(dim=0)
    folder, log = open_run(cfg, state)
    start, first_step, pool, labels = time.time(), 0, None, None
    if state:
        model = GPT(dataclasses.replace(base.config, vocab_size=len(tokenizer), n_latents=n_tokens, z_dim=cfg.z_dim))
    else:
        slot_pairs, other_pairs = (draw_pairs(base, task, tokenizer, cfg.pool_size, 1, f"{name} {cfg.seed}")
                                   for name in ("slot", "start"))
        model = base.with_latents(n_tokens, slot_pairs, cfg.slot_steps, z_dim=cfg.z_dim)
        start_nll_error = compare_to_base(model, other_pairs)
        what = f"a latent in {cfg.z_dim} dimensions" if cfg.z_dim else f"{K} latents"
        print(f"{cfg.name}: {what} for {task.name}, base at {c_base:.3f} nats a solution; inserted, this changes by at "
              f"most {start_nll_error:.1%}", flush=True)
    q = Posterior(base, K, cfg.posterior, cfg.z_dim)
    optimizers = make_optimizers(model, cfg) + [torch.optim.AdamW(q.parameters(), cfg.posterior_lr, weight_decay=0.0)]
    if state:
        if state["c_base"] != c_base:
            fail(f"'{folder}' was begun with another base than that of {cfg.base}: start again by --overwrite=True")
        restore(state, model, optimizers)
        q.load_state_dict(state["posterior"])
        first_step, start, start_nll_error = state["step"], start - 60 * state["minutes"], state["start_nll_error"]
        pool, labels = Pairs(*state["pool"]), state["labels"]
    elif cfg.cluster_inputs:
        agreement = start_posterior(q, base, task, tokenizer, cfg, log_prior)
        print(f"{cfg.name}: {agreement:.0%} of {cfg.cluster_restarts} restarts found the same clusters, "
              f"{(time.time() - start) / 60:.1f} min", flush=True)
    else:
        q.fit_statistics(other_pairs)  # without them every feature is 0
    if cfg.compile:
        model.compile()
    elbo_step = cfg.held_steps + (0 if cfg.z_dim else cfg.responsibility_steps)
    shown, score = {}, "sampled_z_probe_accuracy" if cfg.z_dim else "alignment_one_to_one"
    score_name = "probe" if cfg.z_dim else "alignment"
    bar = tqdm(range(first_step, cfg.steps), desc=cfg.name, disable=not sys.stdout.isatty(), file=sys.stdout)
    for step in bar:
        set_lr(optimizers, warmup_and_decay(step, cfg.steps, cfg.warmup))
        generator = seeded(cfg.seed * 10**6 + step)
        # pairs are sampled from the frozen base as they are needed, and never twice
        used = step * cfg.batch_size % cfg.pool_size
        rows = slice(used, used + cfg.batch_size)
        if used == 0:
            pool = draw_pairs(base, task, tokenizer, cfg.pool_size, 1, f"pool {cfg.seed} {step}")
            if cfg.z_dim:
                labels = tile(q, pool, cfg, generator)
            elif step < elbo_step:
                labels = label(model, q, pool, cfg, step, log_prior)
        batch = pool.rows(rows)

        # Before the ELBO the generator learns from labels, which no gradient flows through: from T, of which one z an
        # example estimates the reconstruction without bias and costs a K-th, or from a continuous z in the pair's cell.
        held, elbo = step < cfg.held_steps, float(step >= elbo_step)
        if cfg.z_dim:
            mean, log_var, tiled = (part[rows] for part in labels)  # (B, D) each
            z, assignment = tiled[:, None], torch.zeros(cfg.batch_size, 1)
            if elbo:
                mean, log_var = q(batch)
                noise = torch.randn(cfg.batch_size, cfg.z_samples, cfg.z_dim, generator=generator)
                samples = mean[:, None] + (0.5 * log_var).exp()[:, None] * noise  # (B, S, D), reparameterised
                z, assignment = torch.cat([samples, z], dim=1), torch.full(noise.shape[:2], -math.log(cfg.z_samples))
        else:
            logq = labels[0][rows] if held else q(batch)  # (B, K)
            if elbo:  # every sum over z is exact
                z, assignment, log_t = torch.arange(K).expand(cfg.batch_size, K), logq, logq
            else:
                log_t = labels[1][rows]
                z = torch.multinomial(log_t.exp(), 1, generator=generator)
                assignment = torch.zeros(cfg.batch_size, 1)  # log 1, of the z that was drawn
        w = losses.token_weights(batch.b)
        (logp_y, weighted_nll, jsd, router), backward = score_batch(model, batch, z, w, cfg.chunks, cfg.recompute)
        if cfg.z_dim:
            n = assignment.shape[1]  # the last z is always that of the cell
            logp_y, logp_tile, weighted_nll = logp_y[:, :n], logp_y[:, -1], weighted_nll[:, :n]
        terms = {  # name: (weight, value in nats); a weight of 0 leaves the term out of the objective, but in the log
            "reconstruction": (1 / c_base if cfg.normalize_reconstruction else 1.0,
                               losses.reconstruction(logp_y, assignment).mean()),
            "token_weighted": (cfg.token_weighted_weight, losses.expected(weighted_nll, assignment).mean())}
        if cfg.z_dim:
            router = gaussian(router)  # mean and log variance (B, D)
            terms |= {
                "kl": (cfg.beta if elbo else cfg.distillation_weight,
                       losses.gaussian_kl(mean, log_var, *router).mean()),
                "tiling": (elbo * cfg.tiling_weight, -logp_tile.mean()),
                "posterior_variance": (cfg.posterior_variance_weight, losses.posterior_variance(log_var).mean()),
                "router_marginal_kl": (cfg.router_marginal_kl_weight, losses.router_moment_kl(*router))}
        else:
            logp_z, learns_t = F.log_softmax(router[:, -K:], dim=1), cfg.distillation_weight * (1 - elbo)  # (B, K)
            terms |= {
                "kl": (elbo * cfg.beta, losses.categorical_kl(logq, logp_z).mean()),
                "posterior_entropy": (cfg.posterior_entropy_weight, losses.posterior_entropy(logq).mean()),
                "router_support": (cfg.router_support_weight, losses.router_support(router, K).mean()),
                "router_marginal_kl": (cfg.router_marginal_kl_weight, losses.router_marginal_kl(logp_z, log_prior)),
                "jsd": (-cfg.jsd_weight, jsd.mean()),
                "posterior_distillation": (learns_t * (not held), losses.distillation(log_t, logq).mean()),
                "router_distillation": (learns_t, losses.distillation(log_t, logp_z).mean())}
        J = sum(weight * value for weight, value in terms.values() if weight)
        J.backward(retain_graph=bool(cfg.z_dim))  # z is differentiated after the generator
        backward()
        parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        check_finite(J, parameters, step, terms, folder)
        in_threads(lambda optimizer: optimizer.step(), optimizers)
        for optimizer in optimizers:
            optimizer.zero_grad()

        entry = {"step": step + 1, "objective": J.item(), **{name: value.item() for name, (_, value) in terms.items()}}
        size = sum(abs(weight * value.item()) for weight, value in terms.values())
        entry |= {f"loss_fraction_{name}": abs(weight * value.item()) / size for name, (weight, value) in terms.items()}
        entry["normalized_reconstruction"] = entry["reconstruction"] / c_base
        entry["minutes"] = (time.time() - start) / 60
        if (step + 1) % cfg.eval_every == 0 or step + 1 == cfg.steps:
            xs = metrics.different_inputs(task, cfg.look_inputs, test=False)  # recipes are chosen by these looks
            if cfg.z_dim:
                shown = metrics.look(model, q, task, tokenizer, pool, xs, seed=step)
            else:
                shown, C = metrics.controlled(model, task, tokenizer, xs, seed=step)
                entry["strategy_by_latent"] = C.tolist()
            entry |= shown
            if bar.disable:
                print(f"{cfg.name} step {step + 1}/{cfg.steps}: R/c {entry['normalized_reconstruction']:.3f}, KL "
                      f"{entry['kl']:.3f}, {score_name} {shown[score]:.3f}, coverage "
                      f"{shown['local_strategy_coverage_mean']:.3f}, {entry['minutes']:.1f} min", flush=True)
        log.write(json.dumps(entry) + "\n")
        bar.set_postfix_str(f"R/c {entry['normalized_reconstruction']:.3f} KL {entry['kl']:.3f} {score_name} "
                            f"{shown.get(score, 0):.3f}")
        received = parallel.union(signals)
        if (received or (step + 1) % cfg.save_every == 0) and step + 1 < cfg.steps:
            save_state(folder, log, cfg, step + 1, model, optimizers, posterior=q.state_dict(), c_base=c_base,
                       pool=list(pool), labels=labels, start_nll_error=start_nll_error,
                       minutes=(time.time() - start) / 60)
            stop(received, cfg, step + 1)
    finish(folder, log, {
        "kind": "factorization", "config": dataclasses.asdict(cfg), "base": base_checkpoint,
        "model_config": vars(model.config), "model": model.state_dict(), "posterior": q.state_dict(),
        "minutes": (time.time() - start) / 60, "last_log": entry, "start_nll_error": start_nll_error,
        "made_with": made_with})
    return folder


def load_base_config(cfg):
    shared = ("threads", "device", "precision", "compile", "resume")
    return configs.load(train_base, [cfg.base, *(f"--{key}={getattr(cfg, key)}" for key in shared)])


def get_base(cfg):
    """The frozen base model, its task and its checkpoint; trains it if the checkpoint is missing."""
    base_cfg = load_base_config(cfg)
    path = os.path.join("out", base_cfg.name, "ckpt.pt")
    if not os.path.exists(path):
        if os.path.exists(os.path.join(os.path.dirname(path), "log.jsonl")) and not cfg.resume:
            fail(f"the base's run in '{os.path.dirname(path)}' is not finished: --resume=True goes on with it, "
                 f"python train_base.py {cfg.base} --overwrite=True starts it again")
        print(f"{path} is missing: training the base model first (python train_base.py {cfg.base})", flush=True)
        train_base.train(base_cfg)
    base, task, checkpoint = load_base(path)
    another_model = ("task", "task_sizes", "strategy_weights", "n_layer", "n_head", "n_embd", "block_size")
    another_run = ("steps", "batch_size", "crop", "optimizer", "lr", "adamw_lr", "weight_decay", "warmup", "seed")
    for key in another_model + another_run:
        if checkpoint["config"][key] != getattr(base_cfg, key):
            differs = (f"'{path}' was trained with {key} = {checkpoint['config'][key]!r}, but {cfg.base} says "
                       f"{getattr(base_cfg, key)!r}")
            if key in another_model:
                fail(f"{differs}; remove the checkpoint or change the config")
            print(f"{differs}: used as it is", flush=True)
    return base.requires_grad_(False).eval(), task, checkpoint


def check(cfg, K):
    """Stops with one line, before any training, on values that make no sense together."""
    if K < 2:
        fail(f"config key 'n_latents': a factorization needs at least 2 latents, got {K}")
    if K > cfg.pool_size:
        fail(f"config key 'n_latents': {K} latents cannot share the {cfg.pool_size} pairs of a pool (pool_size)")
    if cfg.prior is not None and (len(cfg.prior) != K or min(cfg.prior) < 1e-4 * sum(cfg.prior) or not sum(cfg.prior)):
        fail(f"config key 'prior' takes {K} positive shares, each at least 0.0001 of their sum, got {cfg.prior}")
    if cfg.posterior not in ("linear", "full"):
        fail(f"config key 'posterior' is 'linear' or 'full', got '{cfg.posterior}'")
    check_optimizer(cfg)
    for key in ("steps", "batch_size", "pool_size", "chunks", "cluster_responses", "cluster_restarts", "eval_every",
                "look_inputs", "eval_inputs", "eval_samples", "threads", "save_every", "z_samples"):
        # a probe learns from one half of the inputs; clusters are of how the responses to an input differ
        least = 2 if key in ("look_inputs", "eval_inputs", "cluster_responses") else 1
        if getattr(cfg, key) < least:
            fail(f"config key '{key}' must be at least {least}, got {getattr(cfg, key)}")
    if cfg.pool_size % cfg.batch_size:
        fail(f"config key 'pool_size' ({cfg.pool_size}) must be a multiple of batch_size ({cfg.batch_size})")
    if cfg.z_dim and not cfg.cluster_inputs:
        fail("config key 'cluster_inputs': a continuous z needs clusters, around which it begins, got 0")
    if cfg.z_dim and cfg.z_dim < K - 1:
        fail(f"config key 'z_dim': {K} clusters need at least {K - 1} dimensions, got {cfg.z_dim}")
    if not 0.1 <= cfg.posterior_std < 1:
        fail(f"config key 'posterior_std' is at least 0.1 and less than 1, got {cfg.posterior_std}")
    for key in ("posterior_entropy_weight", "jsd_weight") if cfg.z_dim else ("posterior_variance_weight",):
        if getattr(cfg, key):
            fail(f"config key '{key}' has no meaning where latents are {'continuous' if cfg.z_dim else 'discrete'}")
    if not cfg.tau:
        fail("config key 'tau' must not be 0")


if __name__ == "__main__":
    run_folder = factorize(configs.load(sys.modules["__main__"], sys.argv[1:]))
    if parallel.leave():
        evaluate.main([run_folder])
