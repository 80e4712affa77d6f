"""Scores a factorization on test inputs and draws its figures, from its run folder alone.

    python evaluate.py out/sorting_discrete                     # metrics.json, result.json and figures
    python evaluate.py out/sorting_discrete --show=3            # three test inputs, the trace under every z abreast
    python evaluate.py out/sorting_discrete --x="4 2 7 1 3"     # the same for an input of your own

Strategy names are read here and by train_base.py alone. A glossary of all metrics is in assets/results/README.md.
"""
import math
import os
import random
import re
import signal
import sys
import textwrap
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it, also while torch loads

import torch
import torch.nn.functional as F
from torch.distributions import Normal

import losses
from harness import figures, parallel, runs
from harness.config import any_terminal, drop_stdout, fail
from harness.parallel import seeded
from model import (GPT, GPTConfig, as_pairs, gaussian, in_chunks, log_likelihood, sample_pairs, score_base,
                   score_router)
from posterior import Posterior
from tasks import Tokenizer
from train_base import build_base, check_lengths, sample_ys, score_answers

SAMPLES = 16  # z of the router for every x, where z is continuous


def different_inputs(task, n, split, labelled=False):
    """Up to n different inputs, the same ones on every call; fewer where the task has no more. labelled: of a file,
    those for which it labels a solution."""
    rng, found, in_vain = random.Random("inputs"), {}, 0
    if task.records is not None:
        xs = [x for x in map(task.tokens, task.records) if task.split(x) == split]
        return [x for x in rng.sample(xs, len(xs)) if task.mixture(x) or not labelled][:n]
    while len(found) < n and in_vain < 10 * len(found) + 100:
        x = task.sample_input(rng, split)
        in_vain = in_vain + 1 if tuple(x) in found else 0
        found[tuple(x)] = x
    return list(found.values())


def indices(task, found):
    """Strategies -> their indices (n,), -1 for None."""
    return torch.tensor([-1 if s is None else task.strategies.index(s) for s in found])


def local_coverage(found, n, K, S, prefix=""):
    """found: a strategy or None for each of n solutions to every x in turn. Distinct strategies among the first K of an
    x, over min(K, S), S being how many there are on each x: its mean over x, and the share of x where it is 1."""
    shares = [len(set(found[i:i + K]) - {None}) / min(K, S[i // n]) for i in range(0, len(found), n)]
    return {f"{prefix}local_strategy_coverage_mean": sum(shares) / len(shares),
            f"{prefix}local_strategy_full_coverage_rate": sum(share == 1 for share in shares) / len(shares)}


def forced(model, tokenizer, xs, seed):
    """One y (list of tokens) under every z for every x: N K of them, those of an x side by side."""
    prompts = [tokenizer.prompt(x, k) for x in xs for k in range(model.config.n_latents)]
    return sample_ys(model, tokenizer, prompts, seeded(seed))


def controlled(task, xs, ys):
    """What `forced` y tell of their z. Returns (metrics, C), C[z][s]: share of x on which z gave s, of those on which
    the data has s; None where nobody knows strategies. A y that is the trace of several strategies is that which its z
    is matched to."""
    K, S = len(ys) // len(xs), len({s for x in xs for s in task.mixture(x)})
    all_xs = [x for x in xs for _ in range(K)]
    metrics = {f"controlled_{key}": value for key, value in score_answers(task, all_xs, ys).items()}
    if not S:
        return metrics, None
    found, there = [task.all_strategies(x, y) for x, y in zip(all_xs, ys)], [task.mixture(x) for x in xs]
    C = torch.tensor([[sum(s in own for own in found[k::K]) / max(sum(s in has for has in there), 1)
                       for s in task.strategies] for k in range(K)])
    total, matching = one_to_one_matching(C)
    meant = [None if s is None else task.strategies[s] for s in matching]
    found = [meant[i % K] if meant[i % K] in own else next(iter(own), None) for i, own in enumerate(found)]
    coverage, alignment = local_coverage(found, K, K, list(map(len, there))), total / max(K, S)
    return {"alignment_one_to_one": alignment, **coverage,
            "permutation_gap": coverage["local_strategy_coverage_mean"] - alignment,
            "latent_purity": C.max(dim=1).values.min().item(),
            "attributed": 1 - found.count(None) / len(found), **metrics}, C


def router(model, tokenizer, xs):
    """What the router says about every input: log p_phi(z|x) (N, K), or mean and log variance (N, D) each."""
    prompts = [tokenizer.prompt(x) for x in xs]
    pairs = as_pairs(prompts, map(len, prompts))
    out = in_chunks(lambda chunk: score_router(model, chunk), pairs, size=256)
    return gaussian(out) if model.config.z_dim else F.log_softmax(out[:, -model.config.n_latents:], dim=1)


def router_sampled(model, task, tokenizer, xs, samples, generator):
    """z ~ p(z|x), then y ~ p(y|x,z), `samples` times for every x in turn. Returns z (N, samples) or (N, samples, D),
    the y, and the strategy of each, or None."""
    if model.config.z_dim:
        mean, log_var = (part[:, None] for part in router(model, tokenizer, xs))
        z = mean + (0.5 * log_var).exp() * torch.randn(len(xs), samples, mean.shape[2], generator=generator)
        prompts, vectors = [tokenizer.prompt(x, continuous=True) for x in xs for _ in range(samples)], z.flatten(0, 1)
    else:
        z = torch.multinomial(router(model, tokenizer, xs).exp(), samples, replacement=True, generator=generator)
        prompts, vectors = [tokenizer.prompt(x, k) for x, ks in zip(xs, z.tolist()) for k in ks], None
    ys = sample_ys(model, tokenizer, prompts, generator, z=vectors)
    return z, ys, [task.attribute(xs[i // samples], y) for i, y in enumerate(ys)]


def against_base(model, base, task, tokenizer, xs, samples, seed):
    """Router samples next to as many of the base. Returns (metrics, shares of the factorization's strategies, shares of
    the base's, both over all inputs and samples, z, the strategies found under them)."""
    generator = seeded(seed)
    all_xs = [x for x in xs for _ in range(samples)]
    z, ys, found = router_sampled(model, task, tokenizer, xs, samples, generator)
    base_ys = sample_ys(base, tokenizer, [tokenizer.prompt(x) for x in all_xs], generator)
    base_found = [task.attribute(x, y) for x, y in zip(all_xs, base_ys)]
    metrics = {f"sampled_{key}": value for key, value in score_answers(task, all_xs, ys).items()}
    metrics |= {f"base_{key}": value for key, value in score_answers(task, all_xs, base_ys).items()}
    shares, base_shares = ([each.count(s) / len(all_xs) for s in (*task.strategies, None)]
                           for each in (found, base_found))
    S, K = [len(task.mixture(x)) for x in xs], model.config.n_latents or samples
    if all(S):  # else nobody knows strategies
        metrics["sampled_strategy_total_variation"] = sum(abs(a - b) for a, b in zip(shares, base_shares)) / 2
        metrics |= local_coverage(base_found, samples, K, S, "base_")  # what K samples of the base show
        if model.config.z_dim:
            metrics |= local_coverage(found, samples, K, S)
    return metrics, shares, base_shares, z, found


def strategy_probabilities(model, base, task, tokenizer, xs):
    """The probability of the trace of every strategy on every x, in all its wordings (of many, estimated from some), or
    of all y that a file labels so, not sampled: p(y|x) of the base and p(y|x,z) of the generator under every z,
    (1 + K, N, S), 0 for a strategy that the data does not have there. Twice: as it is, and with equal parts of a trace
    for strategies that coincide."""
    rng, S, rows = random.Random(0), len(task.strategies), []
    for i, x in enumerate(xs):
        traces = [(s, y) for s, y in task.traces(x) if s]
        for s, y in traces:
            place, alike = i * S + task.strategies.index(s), [other for _, other in traces].count(y)
            rows += [(place, (n, n / alike), tokenizer.record(x, worded), len(tokenizer.prompt(x)))
                     for worded, n in task.wordings(y, rng)]
    place, weights, records, starts = zip(*rows)
    check_lengths(records, model.config.block_size)
    pairs = as_pairs(records, starts)
    log_base = in_chunks(lambda chunk: -score_base(base, chunk).sum(dim=1, keepdim=True), pairs)
    p = torch.cat((log_base, log_likelihood(model, pairs)), dim=1).exp()  # (records, 1 + K)
    found = torch.zeros(len(xs) * S, 2, p.shape[1])
    found.index_add_(0, torch.tensor(place), torch.tensor(weights)[:, :, None] * p[:, None])
    return found.permute(1, 2, 0).reshape(2, -1, len(xs), S)


def exact_alignment(p, there, matching, kinds):
    """Alignment and full coverage, not sampled: from p (K, N, S) of `strategy_probabilities`, on inputs that have the
    strategies `there` (N, S), z being matched to strategy matching[z] or None; the standard error over inputs, and the
    mean over inputs of each kind."""
    own = torch.zeros(p.shape[1:])
    for z, s in enumerate(matching):
        if s is not None:
            own[:, s] = p[z, :, s]
    left_over = max(0, len(matching) - int(there.any(dim=0).sum()))
    alignment = (own * there).sum(dim=1) / (there.sum(dim=1) + left_over)
    by_kind = {kind: [i for i, each in enumerate(kinds) if each == kind] for kind in sorted(set(kinds), key=str)}
    return {"exact_alignment": alignment.mean().item(),
            "exact_alignment_error": alignment.std(correction=0).item() / math.sqrt(max(1, len(alignment) - 1)),
            "exact_full_coverage": own.where(there, 1.0).prod(dim=1).mean().item(),
            **{f"exact_alignment_on_{str(kind).replace(' ', '_')}": alignment[rows].mean().item()
               for kind, rows in by_kind.items() if len(by_kind) > 1}}


def not_sampled(model, base, task, tokenizer, xs, logp_z, matching):
    """What `exact_alignment` and `router_at_work` say, from log p(z|x) (N, K) and the probabilities of all traces."""
    kinds, mixtures = list(map(task.kind, xs)), list(map(task.mixture, xs))
    there = torch.tensor([[s in own for s in task.strategies] for own in mixtures])
    p, parts = strategy_probabilities(model, base, task, tokenizer, xs)
    p_model = torch.einsum("nk,kns->ns", logp_z.exp(), parts[1:])
    at_work, *by_kind = router_at_work(logp_z, p_model, parts[0], kinds)
    return at_work | exact_alignment(p[1:], there, matching, kinds), *by_kind


def router_at_work(logp_z, p_model, p_base, kinds):
    """What the router knows of x, in nats: I(x; z) of log p(z|x) (N, K), and I(kind; z); and what the base's strategies
    say of the input's kind, I(kind; strategy), from p(y|x) of every trace (N, S). kinds: the kind of every x. Returns
    (metrics, names of the kinds, p(z|kind), p(strategy|kind))."""
    names = sorted(set(kinds), key=str)
    of_kind = F.one_hot(torch.tensor([names.index(kind) for kind in kinds]), len(names)).float()  # (N, kinds)
    p_z, p_s = logp_z.exp(), p_base / p_base.sum(dim=1, keepdim=True).clamp(min=1e-30)
    router, base = ((of_kind / of_kind.sum(dim=0)).T @ p for p in (p_z, p_s))
    with_none = [torch.cat((p, 1 - p.sum(dim=1, keepdim=True)), dim=1) for p in (p_base, p_model)]
    metrics = {"strategy_total_variation_per_input": torch.sub(*with_none).abs().sum(dim=1).mean().item() / 2}
    if len(names) > 1:
        metrics |= {"base_kind_information": information(of_kind @ base),
                    "router_kind_information": information(of_kind @ router)}
    return metrics, names, router, base


def information(p):
    """I(row; column) in nats of p(column|row) (N, K), the rows equally likely."""
    mean = p.mean(dim=0).clamp(min=1e-12)
    return max(0.0, (p * (p.clamp(min=1e-12) / mean).log()).sum(dim=1).mean().item())


def without_labels(model, q, base, task, tokenizer, xs, ys):
    """What `forced` y tell where nobody knows the strategies: the share of different ones among the K of an x; how
    often q finds from y, without padding and tokens that no base has, the z that it was made under; and how often the
    base finds y plausible, -log p(y|x) being less than a nat above the factorization's -log p(z|x) p(y|x,z)."""
    K = len(ys) // len(xs)
    z = torch.arange(len(ys)) % K
    different = sum(len(set(map(tuple, ys[i:i + K]))) for i in range(0, len(ys), K)) / len(ys)
    pairs = known_to_base(base, task, [x for x in xs for _ in range(K)], ys)
    right = q.read(q.all_features(pairs)).argmax(dim=1) == z
    logp = log_likelihood(model, pairs, model.config.vocab_size - K + z[:, None])[:, 0]
    plausible = router(model, tokenizer, xs).flatten() + logp + pairs.b.sum(dim=1) < 1
    return {"distinct_outputs": different, "consistency": right.float().mean().item(),
            "plausible_outputs": plausible.float().mean().item()}


def known_to_base(base, task, xs, ys):
    """Inputs and solutions as the base would have said them: model.Pairs, without tokens that it does not have."""
    plain = Tokenizer(task.vocab)
    records = [plain.record(x, filter(plain.ids.get, y))[:base.config.block_size] for x, y in zip(xs, ys)]
    pairs = as_pairs(records, [len(plain.prompt(x)) for x in xs])
    return pairs._replace(b=score_base(base, pairs))


@torch.enable_grad()
def linear_probe(z, labels, group, S, permute=None):
    """Accuracy of multinomial logistic regression from z (N, D) to labels (N,), -1 for no strategy, trained where
    group (N,) is even and scored where it is odd; a z without a strategy counts as wrong. With `permute`, a
    torch.Generator, labels are permuted before: what a probe finds in nothing."""
    if permute:
        labels = labels[torch.randperm(len(labels), generator=permute)]
    z = (z - z.mean(dim=0)) / (z.std(dim=0) + 1e-6)
    train, test = (group % 2 == 0) & (labels >= 0), group % 2 == 1
    weight, bias = torch.zeros(S, z.shape[1], requires_grad=True), torch.zeros(S, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def penalised_nll():
        optimizer.zero_grad()
        nll = F.cross_entropy(F.linear(z[train], weight, bias), labels[train], reduction="sum") / len(z)
        loss = nll + 1e-4 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(penalised_nll)
    return (F.linear(z[test], weight, bias).argmax(dim=1) == labels[test]).float().mean().item()


def centroids(z, labels, strategies):
    """Mean of z (N, D) for every strategy in the list, (S, D), and root mean square distance of a z from its own."""
    centre = torch.stack([z[labels == s].mean(dim=0) for s in strategies])
    distance = torch.cat([z[labels == s] - own for s, own in zip(strategies, centre)])
    return centre, distance.square().sum(dim=1).mean().sqrt()


@torch.no_grad()
def held_out(model, q, base, task, tokenizer, xs, n, c_base, seed):
    """Likelihood and posterior on n base samples y ~ p_theta(y|x) at test inputs: in nats a solution; exact, or where z
    is continuous an importance-weighted bound. Returns (metrics, labels (n,), what q says of the pairs)."""
    xs = [xs[i % len(xs)] for i in range(n)]
    pairs = sample_pairs(base, [tokenizer.prompt(x) for x in xs], seeded(seed))
    labels = strategies_of(task, tokenizer, pairs)[1]
    posterior, p = q.read(q.all_features(pairs)), router(model, tokenizer, xs)
    if model.config.z_dim:
        metrics = continuous_fidelity(model, pairs, posterior, p, seed)
    else:
        counted = torch.ones_like(labels) if task.records is None else labels >= 0  # a file does not know all
        metrics = discrete_fidelity(model, pairs, posterior, p, labels, counted, len(task.strategies))
    base_nll, nll = pairs.b.sum(dim=1), metrics.pop("nll")
    valid = labels >= 0
    metrics |= {"nll": nll.mean().item(), "base_nll": base_nll.mean().item(),
                "normalized_reconstruction": metrics["reconstruction"] / c_base}
    if valid.any():
        metrics["nll_gap_of_valid"] = (nll - base_nll)[valid].mean().item()
    return metrics, labels, posterior


def discrete_fidelity(model, pairs, logq, logp_z, labels, counted, S):
    logp_y = log_likelihood(model, pairs)  # (n, K)
    mean_router = logp_z.logsumexp(dim=0) - math.log(len(logp_z))
    choice = F.one_hot(logq.argmax(dim=1), logq.shape[1]).float()
    joint = choice.T @ F.one_hot(labels + 1, S + 1)[:, 1:].float() / counted.sum().clamp(min=1)
    return {"nll": -(logp_z + logp_y).logsumexp(dim=1),
            "nll_of_mean_router": -(mean_router + logp_y).logsumexp(dim=1).mean().item(),
            "reconstruction": losses.reconstruction(logp_y, logq).mean().item(),
            "kl": losses.categorical_kl(logq, logp_z).mean().item(),
            **({"posterior_alignment": one_to_one_matching(joint)[0]} if counted.any() else {}),
            "posterior_entropy": losses.posterior_entropy(logq).mean().item(),
            "posterior_mutual_information": information(logq.exp())}


def continuous_fidelity(model, pairs, posterior, p, seed, of_posterior=8, of_router=56):
    """The importance-weighted bound takes samples of posterior and router, each weighted as one of their mixture. Most
    are of the router: many z outside the posterior give y, too. A few of the posterior ensure that some z gives y."""
    generator, samples = seeded(seed), of_posterior + of_router
    gaussians = [Normal(mean[:, None], (0.5 * log_var[:, None]).exp()) for mean, log_var in (posterior, p)]
    z = torch.cat([each.mean + each.stddev * torch.randn(len(each.mean), some, each.mean.shape[2], generator=generator)
                   for each, some in zip(gaussians, (of_posterior, of_router))], dim=1)  # (n, samples, D)
    logp_y = log_likelihood(model, pairs, z)  # (n, samples)
    log_q, log_p = (each.log_prob(z).sum(dim=2) for each in gaussians)
    mixture = torch.logaddexp(log_q + math.log(of_posterior / samples), log_p + math.log(of_router / samples))
    return {"nll": -losses.importance_weighted_bound(logp_y, log_p - mixture),
            "reconstruction": -logp_y[:, :of_posterior].mean().item(), "importance_samples": samples,
            "kl": losses.gaussian_kl(*posterior, *p).mean().item(),
            "posterior_variance": losses.posterior_variance(posterior[1]).mean().item()}


def semantics(means, labels, x_index, z, found, task, seed):
    """How the strategy sits in a continuous z: in the posterior means (n, D) of base samples of strategies `labels`
    (n,), to inputs x_index (n,), and in z (N, samples, D) from the router with the strategies `found` under it."""
    S, permute, metrics = len(task.strategies), seeded(seed), {}
    sampled_x, z, found = torch.arange(len(z)).repeat_interleave(z.shape[1]), z.flatten(0, 1), indices(task, found)
    for name, *rows in ("posterior_mu", means, labels, x_index), ("sampled_z", z, found, sampled_x):
        if task.records is not None:  # of a file, nobody knows of the others whether they follow a strategy
            rows = [part[rows[1] >= 0] for part in rows]
        if len((rows[2] % 2).unique()) == 2:  # else none is left to fit or to score them on
            metrics[f"{name}_probe_accuracy"] = linear_probe(*rows, S)
            metrics[f"{name}_probe_accuracy_control"] = linear_probe(*rows, S, permute)
    both = sorted(set(labels.tolist()) & set(found.tolist()) - {-1})
    if len(both) < 2:  # nothing to compare
        return metrics
    (centre, spread), (sampled_centre, sampled_spread) = centroids(means, labels, both), centroids(z, found, both)
    between = (centre - sampled_centre).norm(dim=1).mean()
    return metrics | {
        "centroid_separation": (torch.pdist(centre).mean() / spread).item(),
        "sampled_centroid_separation": (torch.pdist(sampled_centre).mean() / sampled_spread).item(),
        "centroid_distance": (between / ((spread ** 2 + sampled_spread ** 2) / 2).sqrt()).item()}


@torch.no_grad()
def during_training(model, q, task, pool, n_inputs, seed):
    """What the log says of a run in training, on validation inputs: a discrete z is forced. Of a continuous one, the
    semantics of router samples for at most 32 inputs, and of the posterior on the pool of *training* pairs."""
    tokenizer = Tokenizer(task.vocab, model.config.n_latents)
    xs = different_inputs(task, n_inputs, "validation")
    ys = forced(model, tokenizer, xs, seed)  # none of a continuous z
    if not all(map(task.mixture, xs)):  # nobody knows strategies
        return without_labels(model, q, q.backbone, task, tokenizer, xs, ys) if ys else {}
    if ys:
        metrics, C = controlled(task, xs, ys)
        return metrics | {"strategy_by_latent": C.tolist()}
    z, _, found = router_sampled(model, task, tokenizer, xs[:32], SAMPLES, seeded(seed))
    pool_xs, labels = strategies_of(task, tokenizer, pool)
    index = {tuple(x): i for i, x in enumerate(pool_xs)}  # an input drawn twice is one input
    x_index = torch.tensor([index[tuple(x)] for x in pool_xs])
    return {**local_coverage(found, SAMPLES, SAMPLES, [len(task.mixture(x)) for x in xs[:32]]),
            **semantics(q.read(q.all_features(pool))[0], labels, x_index, z, found, task, seed)}


def strategies_of(task, tokenizer, pairs):
    """model.Pairs -> the x of every pair, as tokens, and the index of the strategy that its y follows, -1 for none."""
    rows = list(zip(pairs.ids.tolist(), pairs.starts.tolist()))
    xs = [tokenizer.decode(ids[2:start - 2]) for ids, start in rows]
    ys = [tokenizer.solution(ids[start:]) for ids, start in rows]
    return xs, indices(task, map(task.attribute, xs, ys))


def one_to_one_matching(C):
    """C (K, S) -> (score, matching): the largest sum of C[z, matching[z]] over matchings in which no column serves two
    rows; matching[z] is None for a row left over where K > S. The Hungarian method by shortest augmenting paths (Crouse
    2016): one row after the other is served, and others move to the columns where that costs least."""
    cost = -(C if len(C) <= C.shape[1] else C.T).double()
    (n, m), owner = cost.shape, cost.shape[1] * [-1]  # owner: the row that a column serves
    u, v = cost.new_zeros(n), cost.new_zeros(m)  # potentials
    for row in range(n):
        least, before, done = cost.new_full((m,), math.inf), m * [-1], cost.new_zeros(m).bool()
        i, j, reached = row, -1, 0.0
        while i >= 0:
            step = (reached + cost[i] - u[i] - v).where(~done, math.inf)
            for column in (step < least).nonzero()[:, 0].tolist():
                least[column], before[column] = step[column], j
            j = int(least.where(~done, math.inf).argmin())
            done[j], i, reached = True, owner[j], least[j].item()
        u[row] += reached
        for column in done.nonzero()[:, 0].tolist():
            v[column] -= reached - least[column]
            if owner[column] >= 0:
                u[owner[column]] += reached - least[column]
        while j >= 0:
            owner[j], j = (row if before[j] < 0 else owner[before[j]]), before[j]
    pairs = [(i, j) if cost.shape == C.shape else (j, i) for j, i in enumerate(owner) if i >= 0]
    matching = dict(pairs)
    return sum(C[z, s].item() for z, s in pairs), [matching.get(z) for z in range(len(C))]


def load_run(folder):
    """Run folder -> (checkpoint, base, task, tokenizer, model, posterior), with the threads of its config in use."""
    checkpoint = runs.load_checkpoint(os.path.join(folder, "ckpt.pt"), "factorization")
    cfg = checkpoint["config"]
    parallel.start(cfg["threads"], "cpu" if cfg["device"] == "cpu" else "auto")
    base, task = build_base(checkpoint["base"])
    model = GPT(GPTConfig(**checkpoint["model_config"]))
    model.load_state_dict(checkpoint["model"])
    K = len(checkpoint["posterior"].get("cells.centres", ())) or model.config.n_latents
    q = Posterior(base, K, z_dim=model.config.z_dim)
    q.load_state_dict(checkpoint["posterior"])
    return checkpoint, base, task, Tokenizer(task.vocab, model.config.n_latents), model, q


SHOWN = ("alignment_one_to_one", "local_strategy_full_coverage_rate", "permutation_gap", "exact_alignment",
         "exact_full_coverage",
         "controlled_final_answer_accuracy", "sampled_final_answer_accuracy", "base_final_answer_accuracy",
         "posterior_mu_probe_accuracy", "sampled_z_probe_accuracy", "sampled_z_probe_accuracy_control",
         "centroid_distance", "sampled_strategy_total_variation", "strategy_total_variation_per_input", "nll",
         "base_nll", "nll_of_mean_router", "router_information", "base_kind_information", "posterior_alignment",
         # what is known without strategy names
         "cluster_collisions", "cluster_agreement", "cluster_halves", "posterior_mutual_information",
         "distinct_outputs", "consistency", "plausible_outputs", "test_inputs", "minutes")


def evaluate(folder, seed=0):
    """Writes metrics.json, result.json and the figures of a run folder; returns the metrics."""
    checkpoint, base, task, tokenizer, model, q = run = load_run(folder)
    cfg, D = checkpoint["config"], model.config.z_dim
    xs = different_inputs(task, cfg["eval_inputs"], "test")
    named = different_inputs(task, cfg["eval_inputs"], "test", labelled=True)  # but of some files the same
    ys = forced(model, tokenizer, xs, seed)  # none of a continuous z
    named_ys = ys if named == xs else forced(model, tokenizer, named, seed)
    metrics, C = ({}, None) if D else controlled(task, named or xs, named_ys or ys)
    samples = SAMPLES if D else max(cfg["eval_samples"], model.config.n_latents)
    router_metrics, shares, base_shares, z, found = against_base(model, base, task, tokenizer, xs, samples, seed)
    n = 4 * min(cfg["eval_inputs"], 10 * len(xs))
    likelihood, labels, posterior = held_out(model, q, base, task, tokenizer, xs, n, checkpoint["base"]["c_base"], seed)
    metrics |= router_metrics | likelihood
    if D and named == xs:
        metrics |= semantics(posterior[0], labels, torch.arange(len(labels)) % len(xs), z, found, task, seed)
    if not D:
        metrics |= without_labels(model, q, base, task, tokenizer, xs, ys)
        metrics["router_information"] = information(router(model, tokenizer, xs).exp())
    if C is not None:
        matching = one_to_one_matching(C)[1]
        exact, *by_kind = not_sampled(model, base, task, tokenizer, named, router(model, tokenizer, named), matching)
        metrics |= exact
    metrics |= {key: value for key, value in checkpoint["last_log"].items() if key.startswith("loss_fraction_")}
    metrics |= checkpoint["clusters"] | {"test_inputs": len(xs), "minutes": checkpoint["minutes"]}
    made_with = checkpoint["made_with"] | {"evaluated_by": runs.current_commit(), "base": checkpoint["base"]["config"]}
    runs.write_result(folder, cfg, made_with, metrics)
    titles = [f"{s}\nrouter {share:.0%}, base {base_share:.0%}"  # shares of the samples of either
              for s, share, base_share in zip(task.strategies, shares, base_shares)]
    png = {name: Path(folder, f"{name}.png") for name in ("training", "latent_space", "traces", "matching", "router")}
    for path in png.values():
        path.unlink(missing_ok=True)  # of an earlier run, or with other labels
    log = runs.read_log(folder)
    if log and log[-1]["minutes"] == checkpoint["last_log"]["minutes"]:
        figures.draw_training(log, png["training"])
    else:
        print(f"no training.png: {folder}/log.jsonl is of another run than ckpt.pt")
    if D:
        z, found = z.flatten(0, 1), indices(task, found)
        figures.draw_latent_space(posterior[0], labels, z, found, titles, png["latent_space"])
    else:
        figures.draw_traces(task.text(xs[0]), *sample_traces(run, xs[0], seed), task.strategies, png["traces"])
    if C is not None and len(task.strategies) <= 100:  # no figure is wide enough for more
        figures.draw_matching(C, matching, titles, png["matching"])
        figures.draw_router(*by_kind, matching, task.strategies, png["router"])
    for name in SHOWN:
        if name in metrics:
            print(f"{name:36s} {metrics[name]:z.3f}")  # z: no -0.000
    if C is not None:
        meanings = [f"<z{k + 1}> {'none' if s is None else f'{task.strategies[s]} ({C[k, s]:.2f})'}"
                    for k, s in enumerate(matching)]
        print("z and the strategy it means:", ", ".join(meanings))
    if C is not None and named != xs:
        print("z and the strategy whose labelled y its y are nearest to:",
              ", ".join(f"<z{k + 1}> {s}" for k, s in enumerate(nearest(task, named, named_ys))))
    print(f"wrote {folder}/metrics.json and the figures beside it", flush=True)
    return metrics


def nearest(task, xs, ys):
    """For every z the strategy of whose labelled y its `forced` y have the largest part, on average over the x that it
    labels: for files in which few y have labels."""
    K, part = len(ys) // len(xs), {s: [] for s in task.strategies}
    for x, i in zip(xs, range(0, len(ys), K)):
        for s in task.mixture(x):
            part[s].append([task.nearness(x, y, s) for y in ys[i:i + K]])
    mean = {s: torch.tensor(rows).mean(dim=0) for s, rows in part.items() if rows}  # strategy -> (K,)
    return [max(mean, key=lambda s: mean[s][k]) for k in range(K)]


def sample_traces(run, x, seed):
    """K samples of the base, and one under each z, for one x: lists of (strategy, lines)."""
    _, base, task, tokenizer, model, _ = run
    K, generator = model.config.n_latents, seeded(seed)
    ys = sample_ys(base, tokenizer, K * [tokenizer.prompt(x)], generator)
    ys += sample_ys(model, tokenizer, [tokenizer.prompt(x, k) for k in range(K)], generator)
    traces = [(task.attribute(x, y) or "no strategy", trace_lines(task, y)) for y in ys]
    return traces[:K], traces[K:]


def trace_lines(task, y):
    """A solution y as lines of text, a step each; where tokens are characters, as it is."""
    if task.tokens is list:
        return [task.text(y[i:i + 60]) for i in range(0, len(y), 60)] or [""]
    lines = task.text(y).replace(" ans", "\nans").replace(" ; ", "\n").split("\n")
    return [part for line in lines for part in textwrap.wrap(line.strip(" ;"), 60) or [""]]


def show(run, xs):
    """Prints, for every x, the trace under every z side by side, the likeliest token at a time, with the strategy it
    follows. A continuous z takes the places at which the router's samples have each strategy on average."""
    _, base, task, tokenizer, model, q = run
    names, z = [f"<z{k + 1}>" for k in range(model.config.n_latents)], None
    if model.config.z_dim:
        some = different_inputs(task, 32, "test")
        found_z, _, found = router_sampled(model, task, tokenizer, some, SAMPLES, seeded(0))
        there = [s for s in task.strategies if s in found]
        names, z = [f"cell {k + 1}:" for k in range(len(q.cells.centres))], q.cells.centres
        if there:
            z, _ = centroids(found_z.flatten(0, 1), indices(task, found), indices(task, there).tolist())
            names = [f"z of {s}:" for s in there]
    for x in xs:
        prompts = [tokenizer.prompt(x, k, continuous=z is not None) for k in range(len(names))]
        ys = sample_ys(model, tokenizer, prompts, seeded(0), temperature=0, z=z)
        p_base = known_to_base(base, task, len(ys) * [x], ys).b.sum(dim=1).neg().exp().tolist()
        found = [followed(task, x, y) for y in ys]
        columns = [[f"{name} {strategy}", f"p(y|x) of the base: {p:.3g}", *trace_lines(task, y)]
                   for name, strategy, p, y in zip(names, found, p_base, ys)]
        widths = [max(map(len, column)) for column in columns]
        print(f"\nx = {task.text(x)}")
        for i in range(max(map(len, columns))):
            print("  " + " | ".join((c[i] if i < len(c) else "").ljust(w) for c, w in zip(columns, widths)).rstrip())


def followed(task, x, y):
    if strategy := task.attribute(x, y):
        return strategy
    if task.is_trace(x, y):
        return "in the file, without a label"
    nearest = task.nearest_strategy(x, y)
    return f"no strategy (nearest: {nearest})" if nearest else "not in the file"


def typed_input(run, text):
    """The input a user typed, as tokens, or one line that says what the task expects."""
    _, _, task, tokenizer, _, _ = run
    try:
        x = tokenizer.split(text, task.tokens)
    except ValueError as e:
        fail(f"--x: {e}")
    problem = task.check(x) or (None if task.is_valid_input(x) else "some of its strategies coincide on it")
    most = run[4].config.block_size - 5  # besides <bos> <x> </x> <y> and one token of y
    if not 0 < len(x) <= most:
        problem = problem or f"it has {len(x)} tokens, not 1 to {most}"
    if problem:
        fail(f"--x: '{text}' is no input of {task.name}: {problem}")
    return x


def answer(argv):
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        sys.exit(0 if argv else 2)
    folder, *flags = argv
    if not os.path.isdir(folder):
        fail(f"run folder '{folder}' does not exist; python factorize.py makes one")
    for flag in flags:
        if not re.fullmatch(r"--show=[1-9][0-9]{0,11}|--x=.+", flag, re.DOTALL):
            fail(f"unknown or incomplete flag '{flag}'; known: --show=N, --x=\"...\"")
    if not flags:
        if not os.path.exists(checkpoint := os.path.join(folder, "ckpt.pt")):
            runs.load_checkpoint(checkpoint, "factorization")  # says so, and claims no folder that is not a run's
        with runs.claim(folder):  # no other program replaces the checkpoint meanwhile
            evaluate(folder)
    for key, value in (flag.split("=", 1) for flag in flags):
        run = load_run(folder)
        xs = [typed_input(run, value)] if key == "--x" else different_inputs(run[2], int(value), "test")
        if key == "--show" and len(xs) < int(value):
            print(f"{run[2].name} has {len(xs)} test inputs:")
        show(run, xs)


def main(argv):
    try:
        any_terminal()
        answer(argv)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has seen enough, such as `| head`
        drop_stdout()
    except OSError as e:  # a full disk
        fail(str(e))


if __name__ == "__main__":
    main(sys.argv[1:])
