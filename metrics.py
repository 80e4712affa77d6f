"""What the numbers of a factorization mean: alignment, coverage, likelihood, and how strategies sit in a continuous z.

    python evaluate.py out/sorting_discrete      # computes them on test inputs; factorize.py, in training, on others

Strategy names are read here, to say what each latent turned out to mean, and by train_base.py, never by factorize.py.
"""
import math
import random

import torch
import torch.nn.functional as F

import losses
from model import Pairs, gaussian, in_pieces, log_likelihood, pad, sample_pairs, score_base
from parallel import seeded
from posterior import one_to_one_matching
from train_base import check_lengths, sample_ys, score_answers

SAMPLES = 16  # z of the router for every x, where z is continuous


def different_inputs(task, n, test):
    """Up to n different inputs, the same ones on every call; fewer where the task has no more."""
    rng, found = random.Random("inputs"), {}
    for _ in range(20 * n):
        x = task.sample_input(rng, test)
        found[tuple(x)] = x
        if len(found) == n:
            break
    return list(found.values())


def indices(task, found):
    """Strategies -> their indices (n,), -1 for None."""
    return torch.tensor([-1 if s is None else task.strategies.index(s) for s in found])


def local_coverage(found, n, K, S):
    """found: a strategy or None for each of n solutions to every x in turn. Distinct strategies among the first K of an
    x, over min(K, S): (mean over x, share of x where it is 1)."""
    shares = [len(set(found[i:i + K]) - {None}) / min(K, S) for i in range(0, len(found), n)]
    return sum(shares) / len(shares), sum(share == 1 for share in shares) / len(shares)


@torch.no_grad()
def controlled(model, task, tokenizer, xs, seed):
    """Forces every z on every x and decodes one y. Returns (metrics, C), C[z][s]: share of x on which z gave s."""
    K, S = model.config.n_latents, len(task.strategies)
    prompts = [tokenizer.prompt(x, k) for x in xs for k in range(K)]
    ys = sample_ys(model, tokenizer, prompts, seeded(seed))
    all_xs = [x for x in xs for _ in range(K)]
    found = [task.attribute(x, y) for x, y in zip(all_xs, ys)]
    C = torch.tensor([[found[k::K].count(s) / len(xs) for s in task.strategies] for k in range(K)])
    coverage, full_coverage = local_coverage(found, K, K, S)
    answers = score_answers(task, all_xs, ys)
    alignment = one_to_one_matching(C)[0] / max(K, S)
    return {"alignment_one_to_one": alignment, "local_strategy_coverage_mean": coverage,
            "local_strategy_full_coverage_rate": full_coverage,
            "permutation_gap": coverage - alignment, "latent_purity": C.max(dim=1).values.min().item(),
            "controlled_parse_success": answers["parse_success"],
            "controlled_final_answer_accuracy": answers["final_answer_accuracy"]}, C


@torch.no_grad()
def router(model, tokenizer, xs):
    """What the router says about every input: log p_phi(z|x) (N, K), or mean and log variance (N, D) each."""
    prompts = [tokenizer.router_prompt(x) for x in xs]
    rows = []
    for i in range(0, len(prompts), 256):
        part = prompts[i:i + 256]
        last = torch.tensor([len(p) - 1 for p in part])
        rows.append(model.route(model.hidden_states(pad(part))[-1][torch.arange(len(part)), last]))
    rows = torch.cat(rows)
    return gaussian(rows) if model.config.z_dim else F.log_softmax(rows[:, -model.config.n_latents:], dim=1)


@torch.no_grad()
def router_sampled(model, task, tokenizer, xs, samples, generator):
    """z ~ p(z|x), then y ~ p(y|x,z), `samples` times for every x in turn. Returns z (N, samples) or (N, samples, D),
    the y, and the strategy of each, or None."""
    if model.config.z_dim:
        mean, log_var = (part[:, None] for part in router(model, tokenizer, xs))
        noise = torch.randn(len(xs), samples, model.config.z_dim, generator=generator)
        z = mean + (0.5 * log_var).exp() * noise
        prompts, vectors = [tokenizer.prompt(x, continuous=True) for x in xs for _ in range(samples)], z.flatten(0, 1)
    else:
        z = torch.multinomial(router(model, tokenizer, xs).exp(), samples, replacement=True, generator=generator)
        prompts, vectors = [tokenizer.prompt(x, k) for x, ks in zip(xs, z.tolist()) for k in ks], None
    ys = sample_ys(model, tokenizer, prompts, generator, z=vectors)
    return z, ys, [task.attribute(xs[i // samples], y) for i, y in enumerate(ys)]


@torch.no_grad()
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
    metrics["sampled_strategy_total_variation"] = sum(abs(a - b) for a, b in zip(shares, base_shares)) / 2
    S = len(task.strategies)
    K = samples if model.config.z_dim else model.config.n_latents
    coverage, full_coverage = local_coverage(base_found, samples, K, S)  # what K samples of the base show
    metrics |= {"base_local_strategy_coverage_mean": coverage, "base_local_strategy_full_coverage_rate": full_coverage}
    if model.config.z_dim:
        coverage, full_coverage = local_coverage(found, samples, K, S)
        metrics |= {"local_strategy_coverage_mean": coverage, "local_strategy_full_coverage_rate": full_coverage}
    return metrics, shares, base_shares, z, found


@torch.no_grad()
def strategy_probabilities(model, base, task, tokenizer, xs):
    """p(y|x) of the trace of every strategy on every x, not sampled: of the base and of the factorization, (N, S)
    each."""
    S = len(task.strategies)
    records = [tokenizer.record(x, task.trace(x, s)) for x in xs for s in task.strategies]
    check_lengths(records, model.config.block_size)
    starts = torch.tensor([len(tokenizer.prompt(x)) for x in xs for _ in task.strategies])
    pairs = Pairs(pad(records), starts, torch.zeros(len(records), max(map(len, records))))
    log_base = in_pieces(lambda piece: -score_base(base, piece.ids, piece.starts).sum(dim=1), pairs)
    logp_z = router(model, tokenizer, xs).repeat_interleave(S, dim=0)
    log_model = (logp_z + log_likelihood(model, pairs)).logsumexp(dim=1)
    return log_base.exp().view(-1, S), log_model.exp().view(-1, S)


def total_variation(p, q):
    """Between the strategies' shares p and q of every x: (N, S), (N, S) -> (N,). What a row lacks of 1 is the share of
    no strategy."""
    return ((p - q).abs().sum(dim=1) + (p.sum(dim=1) - q.sum(dim=1)).abs()) / 2


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
    labels = indices(task, [task.attribute(x, y) for x, y in zip(xs, solutions(tokenizer, pairs))])
    posterior, p = q(pairs), router(model, tokenizer, xs)
    if model.config.z_dim:
        metrics = continuous_fidelity(model, pairs, posterior, p, seed)
    else:
        metrics = discrete_fidelity(model, pairs, posterior, p, labels, len(task.strategies))
    base_nll, nll = pairs.b.sum(dim=1), metrics.pop("nll")
    valid = labels >= 0
    metrics |= {"nll": nll.mean().item(), "base_nll": base_nll.mean().item(),
                "normalized_reconstruction": metrics["reconstruction"] / c_base}
    if valid.any():
        metrics["nll_gap_of_valid"] = (nll - base_nll)[valid].mean().item()
    return metrics, labels, posterior


def discrete_fidelity(model, pairs, logq, logp_z, labels, S):
    logp_y, n = log_likelihood(model, pairs), len(pairs.ids)  # (n, K)
    marginal_q, entropy = logq.logsumexp(dim=0) - math.log(n), losses.posterior_entropy(logq).mean()
    choice = F.one_hot(logq.argmax(dim=1), logq.shape[1]).float()
    joint = choice.T @ F.one_hot(labels.clamp(min=0), S).float().mul((labels >= 0)[:, None]) / n
    return {"nll": -(logp_z + logp_y).logsumexp(dim=1),
            "reconstruction": losses.reconstruction(logp_y, logq).mean().item(),
            "kl": losses.categorical_kl(logq, logp_z).mean().item(),
            "posterior_alignment": one_to_one_matching(joint)[0], "posterior_entropy": entropy.item(),
            "posterior_mutual_information": (-(marginal_q.exp() * marginal_q).sum() - entropy).item()}


def continuous_fidelity(model, pairs, posterior, p, seed, of_posterior=8, of_router=56):
    """The samples behind the importance-weighted bound are those of posterior and router together, and every one is
    weighted as a sample of this mixture. Most come from the router: many z outside the posterior give y, too, and while
    few of them are met, the bound is loose. A few of the posterior see to it that some z gives y."""
    generator, samples = seeded(seed), of_posterior + of_router
    q, p = ([part[:, None] for part in gauss] for gauss in (posterior, p))
    z = torch.cat([mean + (0.5 * log_var).exp() * torch.randn(len(mean), some, mean.shape[2], generator=generator)
                   for (mean, log_var), some in ((q, of_posterior), (p, of_router))], dim=1)  # (n, samples, D)
    logp_y = log_likelihood(model, pairs, z)  # (n, samples)
    log_q, log_p = (-0.5 * ((z - mean).square() / log_var.exp() + log_var + math.log(2 * math.pi)).sum(dim=2)
                    for mean, log_var in (q, p))
    mixture = torch.logaddexp(log_q + math.log(of_posterior / samples), log_p + math.log(of_router / samples))
    return {"nll": -losses.importance_weighted_bound(logp_y, log_p - mixture),
            "reconstruction": -logp_y[:, :of_posterior].mean().item(), "importance_samples": samples,
            "kl": losses.gaussian_kl(*posterior, *(part[:, 0] for part in p)).mean().item(),
            "posterior_variance": losses.posterior_variance(posterior[1]).mean().item()}


def semantics(means, labels, x_index, z, found, task, seed):
    """How the strategy sits in a continuous z: in the posterior means (n, D) of base samples of strategies `labels`
    (n,), to inputs x_index (n,), and in z (N, samples, D) from the router with the strategies `found` under it."""
    S, permute, metrics = len(task.strategies), seeded(seed), {}
    sampled_x, z, found = torch.arange(len(z)).repeat_interleave(z.shape[1]), z.flatten(0, 1), indices(task, found)
    for name, args in (("posterior_mu", (means, labels, x_index, S)), ("sampled_z", (z, found, sampled_x, S))):
        metrics[f"{name}_probe_accuracy"] = linear_probe(*args)
        metrics[f"{name}_probe_accuracy_control"] = linear_probe(*args, permute)
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
def look(model, q, task, tokenizer, pool, xs, seed):
    """Semantics of a continuous z in the middle of training: the posterior's on a pool of base samples, the router's in
    samples for each of the first 32 xs."""
    z, _, found = router_sampled(model, task, tokenizer, xs[:32], SAMPLES, seeded(seed))
    coverage, full_coverage = local_coverage(found, SAMPLES, SAMPLES, len(task.strategies))
    pool_xs = inputs(tokenizer, pool)
    labels = indices(task, [task.attribute(x, y) for x, y in zip(pool_xs, solutions(tokenizer, pool))])
    index = {tuple(x): i for i, x in enumerate(pool_xs)}  # an input drawn twice is one input
    return {"local_strategy_coverage_mean": coverage, "local_strategy_full_coverage_rate": full_coverage,
            **semantics(q(pool)[0], labels, torch.tensor([index[tuple(x)] for x in pool_xs]), z, found, task, seed)}


def decodability(base, task, tokenizer, xs, responses, seed):
    """When does the base decide on a strategy? Accuracy of a linear probe of the strategy of y, from the base's hidden
    state when it has read the first t tokens of y: `responses` samples y for each of xs, those of no strategy left out;
    fitted on half of the inputs, scored on the others.

    Returns the positions t (a list), accuracy (L + 1, len(t)) for the embedding and every layer, and chance (len(t),):
    the share of the commonest strategy among what is scored. Position 0 is <y> itself, before anything is sampled, so a
    base that mixes its strategies alike on every x is at chance there; if it is not, the probe has seen what it should
    not. Positions are left out that fewer than half of the solutions reach.
    """
    all_xs = [x for x in xs for _ in range(responses)]
    pairs = sample_pairs(base, [tokenizer.prompt(x) for x in all_xs], seeded(seed))
    ys, S = solutions(tokenizer, pairs), len(task.strategies)
    labels = indices(task, [task.attribute(x, y) for x, y in zip(all_xs, ys)])
    length, half = torch.tensor([len(y) for y in ys]), torch.arange(len(all_xs)) // responses % 2

    def reach(t):  # which solutions are compared at t
        return (labels >= 0) & (length >= t)

    enough = [t for t in range(int(length.max()) + 1)
              if reach(t).sum() >= reach(0).sum() / 2 and half[reach(t)].bincount(minlength=2).min() >= 2 * S]
    positions = [t for t in enough if t <= 12 or t % 4 == 0]  # strategies part early
    place = torch.tensor(positions, dtype=torch.long)

    def states(piece):  # (B, len(t), L + 1, C)
        h = torch.stack(base.hidden_states(piece.ids), dim=2)
        return h[torch.arange(len(h))[:, None], (piece.starts[:, None] - 1 + place).clamp(max=h.shape[1] - 1)]

    h, accuracy, chance = in_pieces(states, pairs), torch.zeros(len(base.blocks) + 1, len(positions)), []
    for i, t in enumerate(positions):
        there = reach(t)
        for layer in range(len(accuracy)):
            accuracy[layer, i] = linear_probe(h[there, i, layer], labels[there], half[there], S)
        scored = labels[there & (half == 1)]
        chance.append(scored.bincount().max().item() / len(scored))
    return positions, accuracy, torch.tensor(chance)


def inputs(tokenizer, pairs):
    """The x of every pair, as tokens."""
    return [tokenizer.decode(row[2:start - 2]) for row, start in zip(pairs.ids.tolist(), pairs.starts.tolist())]


def solutions(tokenizer, pairs):
    """The y of every pair, as tokens without </y>."""
    return [tokenizer.solution(row[start:]) for row, start in zip(pairs.ids.tolist(), pairs.starts.tolist())]
