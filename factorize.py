"""Learns a router p(z|x) and a generator p(y|x,z) from a base model p(y|x), without ever seeing a strategy label.

    python factorize.py configs/sorting_discrete.py

Trains the base first if its checkpoint is missing. Leaves out/sorting_discrete/ with ckpt.pt, config.json, log.jsonl,
metrics.json and figures.
"""
import dataclasses
import json
import math
import os
import random
import sys
import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

import configs
import losses
import train_base
from configs import fail
from model import GPT, GPTConfig, sample_pairs, score_latents
from posterior import Posterior
from tasks import Tokenizer
from train_base import make_optimizers, make_task, save, set_lr, trapezoid


@dataclasses.dataclass(frozen=True)
class Config:
    base: str  # config file of the base model; trained first if its checkpoint is missing
    name: str = ""  # of the run; its folder is out/<name>; default: the config file's name
    n_latents: int = 0  # K; 0: as many as the task has strategies
    steps: int = 400  # gradient steps
    batch_size: int = 64  # pairs (x, y) a step, y sampled from the base
    pool_size: int = 512  # pairs sampled from the base at a time; each is used once
    chunks: int = 4  # pieces of a batch, sorted by length, so that little is spent on padding; same gradient
    # balanced responsibilities, in place of q, for the first steps
    responsibility_steps: int = 300  # 0: the plain ELBO from the start
    held_steps: int = 0  # of these, steps in which the responsibilities follow the posterior as it was initialised
    tau: float = 0.5  # temperature of log p(y|x,z) in the responsibilities
    alpha: float = 4.0  # weight of log q in them
    # objective: J = R + beta K + sum_i weight_i L_i; a weight of 0 is not computed
    beta: float = 0.1  # of KL(q || p)
    normalize_reconstruction: bool = True  # divide R by c_base, the base's validation loss
    token_weighted_weight: float = 0.0
    posterior_entropy_weight: float = 0.0
    router_support_weight: float = 0.0
    router_marginal_kl_weight: float = 0.0
    jsd_weight: float = 0.0
    distillation_weight: float = 1.0  # of posterior and router towards the responsibilities
    posterior: str = "linear"  # "linear": frozen backbone, "full": trained with its head
    optimizer: str = "muon"  # "muon" (AdamW for embedding and head) or "adamw"
    lr: float = 0.01
    adamw_lr: float = 1e-3
    posterior_lr: float = 1e-3
    weight_decay: float = 0.0
    warmup: int = 20
    eval_every: int = 50
    eval_inputs: int = 64
    seed: int = 0
    threads: int = 2


def factorize(cfg):
    torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)
    ckpt = torch.load(f"{os.environ.get('BASES','out')}/{os.path.basename(cfg.base)[:-3]}/ckpt.pt")
    task = make_task(ckpt["config"]["task"], ckpt["config"]["task_sizes"])
    base = GPT(GPTConfig(**ckpt["model_config"])); base.load_state_dict(ckpt["model"]); base.requires_grad_(False)
    c_base = ckpt["c_base"]
    K = cfg.n_latents or len(task.strategies)
    tokenizer = Tokenizer(task.vocab, K)
    model = base.with_latents(K)
    q = Posterior(base, K, cfg.posterior)
    optimizers = make_optimizers(model, cfg) + [torch.optim.AdamW([p for p in q.parameters() if p.requires_grad], cfg.posterior_lr, weight_decay=0)]
    log_prior = torch.full((K,), -math.log(K))

    def draw(n, tag, test=False):
        rng = random.Random(f"{tag} {cfg.seed}")
        xs = [task.sample_input(rng, test) for _ in range(n)]
        g = torch.Generator().manual_seed(rng.randrange(2**31))
        return xs, sample_pairs(base, [tokenizer.prompt(x) for x in xs], g)
    from train_base import until_end
    xt, pt = draw(512, "test", True)
    lab = torch.tensor([task.strategies.index(s) if (s := task.attribute(x, until_end(tokenizer, r[st:].tolist()))) else -1 for x, r, st in zip(xt, pt.ids, pt.starts.tolist())])
    q.fit_standardisation(draw(1024, "std")[1])
    from lab_align import align
    t0 = time.time(); ts = 0
    for step in range(cfg.steps):
        set_lr(optimizers, trapezoid(step, cfg.steps, cfg.warmup))
        i = step * cfg.batch_size % cfg.pool_size
        if i == 0:
            t = time.time(); _, pool = draw(cfg.pool_size, f"pool {step}"); ts += time.time() - t
        batch = pool.rows(slice(i, i + cfg.batch_size))
        logq = q(batch)
        order = (batch.ids != 0).sum(1).argsort().chunk(cfg.chunks)
        out = []
        w = losses.token_weights(batch.b)
        for rows in order:
            c = batch.rows(rows)
            token_nll, logits, router_logits = score_latents(model, c.ids, c.starts)
            out.append((-token_nll.sum(2), router_logits))
        back = torch.cat(order).argsort()
        logp_y, router_logits = (torch.cat(t)[back] for t in zip(*out))
        logp_z = F.log_softmax(router_logits[:, -K:], dim=1)
        terms = {}
        if step < cfg.responsibility_steps:
            scores = logp_y.detach() / cfg.tau + cfg.alpha * logq.detach() if step >= cfg.held_steps else cfg.alpha * logq.detach()
            log_t = losses.balanced_responsibilities(scores, log_prior)
            R = losses.reconstruction(logp_y, log_t).mean() / c_base
            J = R + cfg.distillation_weight * ((losses.distillation(log_t, logq) if step >= cfg.held_steps else 0 * logq[:, 0]) + losses.distillation(log_t, logp_z)).mean()
        else:
            R = losses.reconstruction(logp_y, logq).mean() / c_base
            KL = losses.categorical_kl(logq, logp_z).mean()
            J = R + cfg.beta * KL + cfg.router_marginal_kl_weight * losses.router_marginal_kl(logp_z, log_prior) + cfg.posterior_entropy_weight * losses.posterior_entropy(logq).mean()
        J.backward()
        for o in optimizers:
            o.step(); o.zero_grad()
        if (step + 1) % cfg.eval_every == 0:
            with torch.no_grad():
                lp = torch.cat([-score_latents(model, c.ids, c.starts)[0].sum(2) for c in (pt.rows(slice(i, i + 128)) for i in range(0, 512, 128))])
                lq = q(pt)
                a, C = align(lp.argmax(1), lab, len(task.strategies), K)
                aq, _ = align(lq.argmax(1), lab, len(task.strategies), K)
                ll = lp + lq * 0
                print(f"{cfg.name} s{cfg.seed} {step+1} R {R.item()*c_base:.3f} best {-lp.max(1).values.mean():.3f} mixnll {-(lp.logsumexp(1)-math.log(K)).mean():.3f} align p {a:.3f} q {aq:.3f} Hq {losses.posterior_entropy(lq).mean():.2f} Ht {losses.posterior_entropy(log_t).mean():.2f} {time.time()-t0:.0f}s samp {ts:.0f}s", flush=True)
    print(C)


if __name__ == "__main__":
    factorize(configs.load(sys.modules["__main__"], sys.argv[1:]))
