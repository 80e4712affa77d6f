"""Learns a router p(z|x) and a generator p(y|x,z) from a base model p(y|x), without labels.

    python factorize.py configs/sorting_discrete.py

Trains the base first if its checkpoint is missing. Leaves out/sorting_discrete/ with ckpt.pt,
config.json, log.jsonl, metrics.json, result.json and figures. The recipe:
    clusters           label some responses of the base, fit the posterior q(z|x,y) to the labels
                       (posterior.py)
    fixed labels       the posterior stands still and labels; the generator learns to use z
    responsibilities   (discrete z) labels r = Sinkhorn(log p(y|x,z) / tau + alpha log q(z|x,y)) [1]
    ELBO               the evidence lower bound [2], its KL weighted by beta; everything is trained
[1] Asano et al. 2020, arXiv 1911.05371     [2] Kingma & Welling 2014, arXiv 1312.6114
"""
import dataclasses
import math
import random
import re
import signal
import sys
from typing import Literal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while torch loads, and until runs.Run listens

import torch
import torch.nn.functional as F

import evaluate
import losses
import train_base
from harness import config, parallel, runs
from harness.config import Count, Weight, at_least, between, fail, say
from harness.optim import make_optimizers, set_learning_rates, update
from harness.parallel import seeded, sum_chunks
from model import (Pairs, gaussian, in_chunks, log_likelihood, sample_pairs, score_latents,
                   score_router)
from posterior import Posterior, start_posterior
from tasks import Tokenizer


@dataclasses.dataclass(frozen=True)
class Config:
    base: str  # config file of the base, and flags; trained first if its checkpoint is missing
    name: str = ""  # of the run; its folder is out/<name>; default: the config file's name
    z_dim: int = 0  # D, the size of a continuous z; 0: discrete latents
    n_latents: int = 0  # K, the number of clusters, and of discrete latents; 0: found by clustering
    steps: Count = 700  # gradient steps
    batch_size: Count = 32  # pairs (x, y) a step, y sampled from the frozen base
    pool_size: Count = 512  # pairs sampled and labelled at a time; each is used once
    chunks: Count = 4  # parts of a batch, at least; more take less memory
    # clusters
    cluster_inputs: int = 768  # inputs whose responses are clustered; 0: q's head stays random
    cluster_responses: at_least(2) = 12  # responses to each of them
    cluster_searches: Count = 6  # searches for clusters, at most, of which the best counts
    posterior: Literal["linear", "full"] = "linear"  # q trains its head; or its backbone, too
    # stages where z is discrete; the ELBO takes the steps that remain
    fixed_label_steps: int = 300  # steps in which q stands still and labels
    fixed_label_power: float = 4.0  # power to which q(z|x,y) is raised in these labels
    responsibility_steps: int = 380  # further steps, with balanced responsibilities as labels
    tau: at_least(0.001, float) = 0.5  # temperature of log p(y|x,z) in the responsibilities
    alpha: float = 2.0  # weight of log q(z|x,y) in the responsibilities
    # stages where z is continuous; the ELBO takes the steps that remain
    cell_steps: int = 600  # steps in which q stands still, z ~ N(0, I) in the cell of a pair
    posterior_std: between(0.1, 0.9) = 0.3  # standard deviation of q as it starts
    z_samples: Count = 1  # samples of q a pair, in the ELBO
    # objective J = R + beta KL + sum_i weight_i L_i; a term of weight 0 takes no part in it
    normalize_reconstruction: bool = True  # divide R by c_base, the base's validation loss
    token_weighted_weight: Weight = 0.0  # of the token-weighted reconstruction
    beta: float = 0.1  # of KL(q || p), in the ELBO
    distillation_weight: Weight = 1.0  # of router and q towards their labels, before the ELBO
    # ... where z is discrete
    posterior_entropy_weight: Weight = 0.0  # of H(q)
    router_support_weight: Weight = 0.1  # of the router's mass outside the latent tokens
    router_marginal_kl_weight: Weight = 0.0  # of KL(mean router || shares of the clusters)
    jsd_weight: Weight = 0.0  # of minus the inter-latent Jensen-Shannon divergence, in the ELBO
    # ... where z is continuous
    cell_weight: Weight = 0.5  # of -log p(y|x,z), z ~ N(0, I) in the cell of the pair, in the ELBO
    router_moment_kl_weight: Weight = 1.0  # of KL(moments of the batch's routers || N(0, I))
    posterior_variance_weight: Weight = 0.0  # of the mean variance of q
    # optimisation
    optimizer: Literal["muon", "adamw"] = "muon"  # Muon, AdamW for embedding and head; or all AdamW
    lr: float = 0.003  # peak learning rate of Muon's matrices
    adamw_lr: float = 3e-3  # peak learning rate of AdamW's parameters
    posterior_lr: float = 3e-3  # peak learning rate of the posterior, by AdamW
    weight_decay: float = 0.0  # decoupled, as in AdamW
    dropout: between(0.0, 0.9) = 0.0  # of the generator, against learning the inputs by heart
    warmup: int = 20  # steps of linear warm-up; over all steps the rate falls linearly to 0
    # evaluation
    eval_every: Count = 100  # steps between evaluations during training
    validation_inputs: at_least(2) = 64  # inputs they take; at most 32 where z is continuous
    eval_inputs: at_least(2) = 256  # different test inputs, as many as the task has
    # ... where z is discrete
    eval_samples: Count = 8  # samples of the router an input, or K if that is more
    # running
    seed: int = 0  # of weights, data and clusters
    threads: int = 0  # CPU threads; 0: as many as there are cores
    device: str = "cpu"  # "cuda", "cpu", or "auto": CUDA if it is there
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # of products; bfloat16 if on CUDA
    save_every: Count = 100  # steps between saved states, from which an interrupted run can go on
    resume: bool = False  # go on from the last saved state, of the base's training, too
    overwrite: bool = False  # start again in a folder that holds a run


DISCRETE_ONLY = ("fixed_label_steps", "fixed_label_power", "responsibility_steps", "tau", "alpha",
                 "posterior_entropy_weight", "router_support_weight", "router_marginal_kl_weight",
                 "jsd_weight", "eval_samples")
CONTINUOUS_ONLY = ("cell_steps", "posterior_std", "z_samples", "cell_weight",
                   "router_moment_kl_weight", "posterior_variance_weight")


def stage_of(cfg, step):
    first = cfg.cell_steps if cfg.z_dim else cfg.fixed_label_steps
    second = 0 if cfg.z_dim else cfg.responsibility_steps
    if step < first:
        return "fixed labels"
    return "responsibilities" if step < first + second else "ELBO"


def term_weights(cfg, stage, c_base):
    """The terms of J in a stage, name -> weight. One of weight 0 is in the log alone, or, where it
    is costly, left out."""
    table = {"reconstruction": 1 / c_base if cfg.normalize_reconstruction else 1.0,
             "token_weighted": cfg.token_weighted_weight,
             "kl": cfg.beta if stage == "ELBO" else 0.0}
    if stage != "ELBO":
        table["router_distillation"] = cfg.distillation_weight
    if cfg.z_dim:
        table["posterior_variance"] = cfg.posterior_variance_weight
        table["router_moment_kl"] = cfg.router_moment_kl_weight
        if stage == "ELBO":
            table["cell_reconstruction"] = cfg.cell_weight
    else:
        table["posterior_entropy"] = cfg.posterior_entropy_weight
        table["router_support"] = cfg.router_support_weight
        table["router_marginal_kl"] = cfg.router_marginal_kl_weight
        if stage == "responsibilities":
            table["posterior_distillation"] = cfg.distillation_weight
        if stage == "ELBO":
            table["jsd"] = -cfg.jsd_weight
    costly = ("router_moment_kl", "router_marginal_kl", "cell_reconstruction", "jsd")
    return {name: weight for name, weight in table.items() if weight or name not in costly}


# ------------------------------------------------------------- the terms of J
def discrete_terms(model, q, pairs, labels, stage, weights):
    """The terms of J that `weights` names, for B pairs: name -> (B,) nats. labels: name -> (B, ...)
    of label_pool and take_batch."""
    with torch.set_grad_enabled(stage != "fixed labels"):  # there q stands still: it is the label
        logq = q(pairs, labels.get("features"))  # (B, K)
    K = logq.shape[1]
    if stage == "ELBO":  # z ~ q: sums over z are exact
        z, log_weight = torch.arange(K).expand(logq.shape), logq
    else:  # z ~ r: one draw estimates the sum without bias, at a K-th of its cost
        z, log_weight = labels["z"], torch.zeros(len(logq), 1)
    latents = model.config.vocab_size - K + z  # token ids of <z1> ... <zK>
    # (B, n, T), (B, n, T, V), (B, V)
    token_nll, logits, router = score_latents(model, pairs, latents, labels.get("keep"))
    logp_z, w = F.log_softmax(router[:, -K:], dim=1), losses.token_weights(pairs.b)
    found = {"reconstruction": losses.reconstruction(-token_nll.sum(dim=2), log_weight),
             "token_weighted": losses.token_weighted_reconstruction(token_nll, w, log_weight),
             "kl": losses.categorical_kl(logq, logp_z),
             "posterior_entropy": losses.posterior_entropy(logq),
             "router_support": losses.router_support(router, K)}
    if "router_marginal_kl" in weights:
        found["router_marginal_kl"] = losses.router_marginal_kl(
            logp_z, labels["log_marginal"], labels["log_prior"])
    if "jsd" in weights:
        found["jsd"] = losses.inter_latent_jsd(F.log_softmax(logits, dim=-1), w)
    if stage != "ELBO":
        found["router_distillation"] = losses.distillation(labels["log_r"], logp_z)
    if stage == "responsibilities":
        found["posterior_distillation"] = losses.distillation(labels["log_r"], logq)
    return found


def continuous_terms(model, q, pairs, labels, stage, weights):
    """The same where z is continuous."""
    with torch.set_grad_enabled(stage != "fixed labels"):
        mean, log_var = q(pairs, labels.get("features"))  # (B, D) each
    if stage == "ELBO":  # z ~ q, reparameterised: n samples
        z = mean[:, None] + (0.5 * log_var).exp()[:, None] * labels["noise"]  # (B, n, D)
    else:  # z ~ N(0, I) in the cell of the pair
        z = labels["z"]  # (B, 1, D)
    n = z.shape[1]
    log_weight = torch.full(z.shape[:2], -math.log(n), dtype=z.dtype)  # the mean over samples
    if "cell_reconstruction" in weights:
        z = torch.cat((z, labels["z"]), dim=1)
    # (B, n, T) or (B, n + 1, T)
    token_nll, _, router = score_latents(model, pairs, z, labels.get("keep"))
    router, w = gaussian(router), losses.token_weights(pairs.b)  # mean, log variance (B, D)
    kl = losses.gaussian_kl(mean, log_var, *router)
    of_q = token_nll[:, :n]
    found = {"reconstruction": losses.reconstruction(-of_q.sum(dim=2), log_weight),
             "token_weighted": losses.token_weighted_reconstruction(of_q, w, log_weight),
             "kl": kl,
             "posterior_variance": losses.posterior_variance(log_var)}
    if "router_moment_kl" in weights:
        found["router_moment_kl"] = losses.router_moment_kl(*router, labels["m"], labels["v"])
    if "cell_reconstruction" in weights:
        found["cell_reconstruction"] = token_nll[:, -1].sum(dim=1)
    if stage != "ELBO":
        found["router_distillation"] = kl  # q is the label
    return found


def gradient(model, q, batch, labels, stage, weights, parameters, n_chunks):
    """The terms of J, name -> mean over the batch, and the gradient of J, a tensor for every
    parameter, or None for one that J does not reach. Every term is a mean over pairs. So the
    batch is cut into chunks of pairs of similar length, whose gradients are computed side by side
    and added up: memory is that of the chunks in work."""
    terms_of = continuous_terms if model.config.z_dim else discrete_terms

    def of_chunk(rows):
        of_rows = {name: value[rows] for name, value in labels.items()}
        terms = terms_of(model, q, batch.rows(rows), of_rows, stage, weights)
        terms = {name: terms[name].sum() / len(batch.ids) for name in weights}
        J = sum(weight * terms[name] for name, weight in weights.items() if weight)
        values = torch.stack([term.detach() for term in terms.values()])
        return values, *torch.autograd.grad(J, parameters, allow_unused=True)

    # in the ELBO a pair is n records, one for every z: more chunks, of about 64 records or one pair
    n = model.config.n_latents or labels["noise"].shape[1] + 1 if stage == "ELBO" else 1
    chunks = batch.by_length(max(n_chunks, len(batch.ids) * n // 64))
    values, *gradients = sum_chunks(of_chunk, chunks)
    return dict(zip(weights, values.tolist())), gradients


# ------------------------------------------------------------- data and labels
def sample_responses(base, task, n_inputs, n_responses, key):
    """n_responses samples y ~ p_theta(y|x) for each of n_inputs training inputs, as model.Pairs: a
    function of `key` (str) alone."""
    rng, tokenizer = random.Random(key), Tokenizer(task.vocab)
    xs = [task.sample_input(rng, "train") for _ in range(n_inputs)]
    prompts = [tokenizer.prompt(x) for x in xs for _ in range(n_responses)]
    return sample_pairs(base, prompts, seeded(rng.getrandbits(48)))


@torch.no_grad()
def label_pool(model, q, pool, stage, cfg, share, rng):
    """Labels of N pairs in a stage, name -> (N, ...): log_r (N, K); or, where z is continuous,
    z (N, 1, D) ~ N(0, I) in the cell of the pair; and `features` of a frozen posterior."""
    features = q.all_features(pool)
    labels, out = {"features": features} if q.adaptation == "linear" else {}, q.read(features)
    if cfg.z_dim:
        labels["z"] = q.cells.sample(out[0], rng)[:, None]
    elif stage == "fixed labels":
        labels["log_r"] = F.log_softmax(cfg.fixed_label_power * out, dim=1)
    elif stage == "responsibilities":
        # the rest, of which the base is sure, tells little of z and takes most of the time
        scores = log_likelihood(model, pool.decided()) / cfg.tau + cfg.alpha * out
        labels["log_r"] = losses.balanced_responsibilities(scores, share.log())
    return labels


@torch.no_grad()
def take_batch(model, pool, labels, rows, stage, cfg, weights, share, rng):
    """Pairs of the pool and their labels, and among these what needs the whole batch, before it is
    cut into chunks: draws z (B, 1) ~ r, or noise (B, n, D) of q; `keep` of train_base.dropout; and,
    the same for all pairs, the mean router log_marginal (B, K) and log_prior (B, K), or the moments
    m, v (B, D) of the routers, which are constants in their KL (losses.router_marginal_kl,
    losses.router_moment_kl)."""
    batch, labels = pool.rows(rows), {name: value[rows] for name, value in labels.items()}
    B = len(batch.ids)
    if not cfg.z_dim and stage != "ELBO":
        labels["z"] = torch.multinomial(labels["log_r"].exp(), 1, generator=rng)
    if cfg.z_dim and stage == "ELBO":
        labels["noise"] = torch.randn(B, cfg.z_samples, cfg.z_dim, generator=rng)
    if cfg.dropout:
        T = batch.ids.shape[1] + 3  # <z> z </z> is inserted
        labels["keep"] = train_base.dropout(model, B, T, cfg.dropout, rng)
    if {"router_marginal_kl", "router_moment_kl"} & set(weights):
        keep = [labels["keep"]] if cfg.dropout else []
        router = in_chunks(lambda *chunk: score_router(model, *chunk), batch, *keep)
    if "router_marginal_kl" in weights:
        logp_z = F.log_softmax(router[:, -len(share):], dim=1)
        labels["log_marginal"] = (logp_z.logsumexp(dim=0) - math.log(B)).expand(B, -1)
        labels["log_prior"] = share.log().expand(B, -1)
    if "router_moment_kl" in weights:
        mean, log_var = gaussian(router)
        m = mean.mean(dim=0)
        v = (log_var.exp() + mean.square()).mean(dim=0) - m.square()
        labels["m"], labels["v"] = m.expand(B, -1), v.expand(B, -1)
    return batch, labels


# ------------------------------------------------------------- the loop
def factorize(cfg):
    """Runs the recipe of cfg and leaves its run folder; returns the path of the folder."""
    base_cfg = load_base_config(cfg)
    check(cfg)  # whatever is wrong is said before a base is trained
    if base_cfg.name == cfg.name:
        fail(f"config key 'name': the run and its base cannot share out/{cfg.name}")
    parallel.start(cfg.threads, cfg.device, cfg.precision)
    with runs.Run(cfg) as run:
        base, task, base_checkpoint = train_base.get_base(base_cfg, cfg.base)
        torch.manual_seed(cfg.seed)  # the base may have been trained just now, or long ago
        run.begin(task.data)
        q = Posterior(base, cfg.n_latents, cfg.posterior, cfg.z_dim)
        share, found = run.state["clusters"] if run.state else find_clusters(run, q, base, task)
        if run.state:
            q.make_head(len(share))
        model = base.with_latents(0 if cfg.z_dim else len(share), cfg.z_dim)
        optimizers = [*make_optimizers(model, cfg),
                      torch.optim.AdamW(q.parameters(), cfg.posterior_lr, weight_decay=0.0)]
        parameters = [p for each in optimizers for group in each.param_groups
                      for p in group["params"] if p.requires_grad]
        if run.state:
            pool, labels = resume(run, model, q, optimizers, base_checkpoint)
        c_base = base_checkpoint["c_base"]
        if c_base <= 0:
            fail("the base is sure of every y: there is nothing to factorize")
        bar = run.steps()
        for step in bar:
            set_learning_rates(optimizers, step, cfg)
            stage = stage_of(cfg, step)
            weights = term_weights(cfg, stage, c_base)
            rng = seeded(cfg.seed * 10**6 + step)  # all that is drawn is a function of (seed, step)
            offset = step * cfg.batch_size % cfg.pool_size
            if offset == 0:
                pool = sample_responses(base, task, cfg.pool_size, 1, f"pool {cfg.seed} {step}")
            if offset == 0 or stage != stage_of(cfg, step - 1):
                labels = label_pool(model, q, pool, stage, cfg, share, rng)
            rows = slice(offset, offset + cfg.batch_size)
            batch, batch_labels = take_batch(
                model, pool, labels, rows, stage, cfg, weights, share, rng)
            terms, gradients = gradient(
                model, q, batch, batch_labels, stage, weights, parameters, cfg.chunks)
            used = {name: value for name, value in terms.items() if weights[name]}
            run.check_finite(step, used, gradients)
            update(optimizers, parameters, gradients)
            entry = log_entry(step, stage, terms, weights, c_base) | {"minutes": run.minutes}
            if run.due(step):
                entry |= evaluate.during_training(model, q, task, pool, cfg.validation_inputs, step)
            run.log(entry)
            report(run, bar, entry)
            run.end_of_step(step, lambda: runs.training_state(model, optimizers) | {
                "posterior": q.state_dict(), "c_base": c_base, "pool": list(pool),
                "labels": labels, "clusters": (share, found)})
        run.finish({
            "kind": "factorization", "config": dataclasses.asdict(cfg), "base": base_checkpoint,
            "model_config": vars(model.config), "model": model.state_dict(),
            "posterior": q.state_dict(), "minutes": run.minutes, "last_log": entry,
            "clusters": found, "made_with": run.made_with})
    return run.folder


def find_clusters(run, q, base, task):
    """Clusters responses of the base and fits q to the clusters. Returns their shares of what the
    base says, (K,), and what there is to know about them, name -> value."""
    cfg, n = run.cfg, run.cfg.cluster_responses
    if not cfg.cluster_inputs:  # without statistics every feature is 0
        q.fit_statistics(sample_responses(base, task, cfg.pool_size, 1, f"start {cfg.seed}"))
        return torch.full((cfg.n_latents,), 1 / cfg.n_latents), {}
    say(f"{cfg.name}: clustering {n} responses of the base to each of {cfg.cluster_inputs} inputs")
    pairs = sample_responses(base, task, cfg.cluster_inputs, n, f"clusters {cfg.seed}")
    x_index = torch.arange(len(pairs.ids)) // n
    share, clusters = start_posterior(
        q, pairs, x_index, cfg.n_latents, cfg.seed, cfg.cluster_searches, cfg.posterior_std)
    found = {f"cluster_{name}": value for name, value in clusters._asdict().items() if name != "r"}
    say(f"{cfg.name}: {len(share)} clusters with shares {', '.join(f'{s:.2f}' for s in share)}; "
        f"{clusters.collisions:.1%} of the responses collide, {clusters.agreement:.0%} of "
        f"{clusters.searches} searches agree, halves of the inputs on {clusters.halves:.1%}; "
        f"{run.minutes:.1f} min")
    if clusters.halves < 0.9:
        say(f"{cfg.name}: clusters that half of the inputs do not confirm are not to be trusted: "
            "more cluster_inputs, or another n_latents, may help")
    return share, found | {"cluster_shares": share.tolist()}


def resume(run, model, q, optimizers, base_checkpoint):
    """Takes everything back to the saved state; returns the pool and its labels."""
    state = run.state
    if state["c_base"] != base_checkpoint["c_base"]:
        fail(f"'{run.folder}' was begun with another base than that of {run.cfg.base}: start again "
             "by --overwrite=True")
    runs.restore(state, model, optimizers)
    q.load_state_dict(state["posterior"])
    return Pairs(*state["pool"]), state["labels"]


def log_entry(step, stage, terms, weights, c_base):
    """A line of log.jsonl: the raw terms, and each weighted term's share of J by absolute value."""
    weighted = {name: weights[name] and weights[name] * value for name, value in terms.items()}
    size = sum(map(abs, weighted.values()))
    return {"step": step + 1, "stage": stage, "objective": sum(weighted.values()), **terms,
            **{f"loss_fraction_{name}": abs(value) / size for name, value in weighted.items()},
            "normalized_reconstruction": terms["reconstruction"] / c_base}


def report(run, bar, entry):
    """The numbers that a person watches: in the progress bar, and a line for every evaluation."""
    line = f"R/c {entry['normalized_reconstruction']:.3f}, KL {entry['kl']:.3f}"
    bar.set_postfix_str(line, refresh=False)
    shown = {"sampled_z_probe_accuracy": "probe", "alignment_one_to_one": "alignment",
             "local_strategy_coverage_mean": "coverage", "consistency": "consistency"}
    if run.due(entry["step"] - 1):
        line += "".join(f", {name} {entry[key]:.3f}" for key, name in shown.items() if key in entry)
        say(f"{run.cfg.name} step {entry['step']}/{run.cfg.steps}: {line}, "
            f"{entry['minutes']:.1f} min")


# ------------------------------------------------------------- the config
def load_base_config(cfg):
    path_and_flags = re.split(r"\s+(?=--)", cfg.base)  # no shell takes it apart
    return config.load(train_base, path_and_flags + [
        f"--{key}={getattr(cfg, key)}" for key in ("threads", "device", "precision", "resume")])


def check(cfg):
    """Stops with one line, before any training, on values that make no sense together."""
    unused, kind = (DISCRETE_ONLY, "continuous") if cfg.z_dim else (CONTINUOUS_ONLY, "discrete")
    for field in dataclasses.fields(cfg):
        if field.name in unused and getattr(cfg, field.name) != field.default:
            fail(f"config key '{field.name}' plays no part where z is {kind} (z_dim = {cfg.z_dim})")
    K = cfg.n_latents
    if K < 2 and (K or not cfg.cluster_inputs):
        fail(f"config key 'n_latents': a factorization needs at least 2 latents, got {K}" if K else
             "config key 'n_latents': without clusters (cluster_inputs = 0) nothing finds it")
    if K > cfg.pool_size:
        fail(f"config key 'n_latents': {K} latents cannot share the {cfg.pool_size} pairs of a "
             "pool (pool_size)")
    if cfg.pool_size % cfg.batch_size:
        fail(f"config key 'pool_size' must be a multiple of batch_size ({cfg.batch_size})")
    before = cfg.cell_steps if cfg.z_dim else cfg.fixed_label_steps + cfg.responsibility_steps
    if before > cfg.steps:
        say(f"{cfg.name}: {cfg.steps} steps end before the ELBO, which begins after {before}")
    if cfg.z_dim and not cfg.cluster_inputs:
        fail("config key 'cluster_inputs': a continuous z needs clusters to begin with, got 0")
    if cfg.z_dim and cfg.z_dim < K - 1:
        fail(f"config key 'z_dim': {K} clusters need at least {K - 1} dimensions, got {cfg.z_dim}")


if __name__ == "__main__":
    run_folder = factorize(config.load(sys.modules["__main__"], sys.argv[1:]))
    if parallel.leave():
        evaluate.main([run_folder])
