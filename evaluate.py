"""Scores a factorization on test inputs and draws its figures, from its run folder alone.

    python evaluate.py out/sorting_discrete                     # metrics.json, result.json and figures
    python evaluate.py out/sorting_discrete --show=3            # three test inputs, the trace under every z abreast
    python evaluate.py out/sorting_discrete --x="4 2 7 1 3"     # the same for an input of your own
    python evaluate.py out/sorting_discrete --figures           # more figures: traces, training, where the base decides

Strategy names are read here, to say what each latent turned out to mean, and by train_base.py, never by factorize.py.
"""
import json
import math
import os
import random
import signal
import sys

import torch
import torch.nn.functional as F

import figures
import losses
import parallel
from configs import fail
from model import GPT, GPTConfig, Pairs, gaussian, in_pieces, log_likelihood, pad, sample_pairs, score_base
from parallel import seeded
from posterior import Posterior, one_to_one_matching
from tasks import Tokenizer
from train_base import build_base, load_checkpoint, sample_ys, score_answers, write_result


def load_run(folder):
    """Run folder -> (checkpoint, base, task, tokenizer, model, posterior), with the threads of its config in use."""
    checkpoint = load_checkpoint(os.path.join(folder, "ckpt.pt"), "factorization")
    cfg = checkpoint["config"]
    parallel.start(cfg["threads"], "cpu" if cfg.get("device", "cpu") == "cpu" else "auto")
    base, task = build_base(checkpoint["base"])
    model = GPT(GPTConfig(**checkpoint["model_config"]))
    model.load_state_dict(checkpoint["model"])
    K = len(checkpoint["posterior"].get("corners", ())) or model.config.n_latents
    q = Posterior(base, K, z_dim=model.config.z_dim)
    q.load_state_dict(checkpoint["posterior"])
    return checkpoint, base, task, Tokenizer(task.vocab, model.config.n_latents), model, q


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
    and the y."""
    if model.config.z_dim:
        mean, log_var = (part[:, None] for part in router(model, tokenizer, xs))
        noise = torch.randn(len(xs), samples, model.config.z_dim, generator=generator)
        z = mean + (0.5 * log_var).exp() * noise
        prompts = [tokenizer.prompt(x, continuous=True) for x in xs for _ in range(samples)]
        return z, sample_ys(model, tokenizer, prompts, generator, z=z.flatten(0, 1))
    z = torch.multinomial(router(model, tokenizer, xs).exp(), samples, replacement=True, generator=generator)
    prompts = [tokenizer.prompt(x, k) for x, ks in zip(xs, z.tolist()) for k in ks]
    return z, sample_ys(model, tokenizer, prompts, generator)


@torch.no_grad()
def against_base(model, base, task, tokenizer, xs, samples, seed):
    """Router samples next to as many of the base. Returns (metrics, shares of the factorization's strategies, shares of
    the base's, both over all inputs and samples, z, the strategies found under them)."""
    generator = seeded(seed)
    all_xs = [x for x in xs for _ in range(samples)]
    z, sampled = router_sampled(model, task, tokenizer, xs, samples, generator)
    metrics, shares, strategies = {}, [], []
    for name, ys in (("sampled", sampled),
                     ("base", sample_ys(base, tokenizer, [tokenizer.prompt(x) for x in all_xs], generator))):
        strategies.append([task.attribute(x, y) for x, y in zip(all_xs, ys)])
        shares.append([strategies[-1].count(s) / len(all_xs) for s in (*task.strategies, None)])
        metrics |= {f"{name}_{key}": value for key, value in score_answers(task, all_xs, ys).items()}
    S = len(task.strategies)
    K = samples if model.config.z_dim else model.config.n_latents
    coverage, full_coverage = local_coverage(strategies[1], samples, K, S)  # what K samples of the base show
    metrics |= {"base_local_strategy_coverage_mean": coverage, "base_local_strategy_full_coverage_rate": full_coverage}
    if model.config.z_dim:
        coverage, full_coverage = local_coverage(strategies[0], samples, K, S)
        metrics |= {"local_strategy_coverage_mean": coverage, "local_strategy_full_coverage_rate": full_coverage}
    metrics["sampled_strategy_total_variation"] = sum(abs(a - b) for a, b in zip(*shares)) / 2
    return metrics, *shares, z, strategies[0]


@torch.no_grad()
def strategy_probabilities(model, base, task, tokenizer, xs):
    """p(y|x) of the trace of every strategy on every x, not sampled: of the base and of the factorization, (N, S)
    each."""
    S = len(task.strategies)
    records = [tokenizer.record(x, task.trace(x, s)) for x in xs for s in task.strategies]
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
    z = torch.cat([mean + (0.5 * log_var).exp() * torch.randn(len(mean), n, mean.shape[2], generator=generator)
                   for (mean, log_var), n in ((q, of_posterior), (p, of_router))], dim=1)  # (n, samples, D)
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
    16 samples for each of the first 32 xs."""
    xs = xs[:32]
    z, ys = router_sampled(model, task, tokenizer, xs, 16, seeded(seed))
    found = [task.attribute(x, y) for x, y in zip([x for x in xs for _ in range(16)], ys)]
    coverage, full_coverage = local_coverage(found, 16, 16, len(task.strategies))
    pool_xs = inputs(tokenizer, pool)
    labels = indices(task, [task.attribute(x, y) for x, y in zip(pool_xs, solutions(tokenizer, pool))])
    first = {tuple(x): i for i, x in enumerate(pool_xs)}  # an input drawn twice is one input
    return {"local_strategy_coverage_mean": coverage, "local_strategy_full_coverage_rate": full_coverage,
            **semantics(q(pool)[0], labels, torch.tensor([first[tuple(x)] for x in pool_xs]), z, found, task, seed)}


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


def read_log(folder):
    """The entries of log.jsonl; none where there is no log, or where a run is in the middle of writing it."""
    try:
        with open(os.path.join(folder, "log.jsonl")) as f:
            return [json.loads(line) for line in f]
    except (FileNotFoundError, json.JSONDecodeError):
        return []


def evaluate(folder, seed=0):
    """Writes metrics.json, result.json and the figures of a run folder; returns the metrics."""
    checkpoint, base, task, tokenizer, model, q = load_run(folder)
    cfg = checkpoint["config"]
    xs = different_inputs(task, cfg["eval_inputs"], test=True)
    D = model.config.z_dim
    metrics, C = ({}, None) if D else controlled(model, task, tokenizer, xs, seed)
    samples = 16 if D else max(cfg["eval_samples"], model.config.n_latents)
    router_metrics, shares, base_shares, z, found = against_base(model, base, task, tokenizer, xs, samples, seed)
    metrics |= router_metrics
    likelihood, labels, posterior = held_out(model, q, base, task, tokenizer, xs, 4 * cfg["eval_inputs"],
                                             checkpoint["base"]["c_base"], seed)
    metrics |= likelihood
    if not D:
        shares_by_x = strategy_probabilities(model, base, task, tokenizer, xs)
        metrics["strategy_total_variation_per_input"] = total_variation(*shares_by_x).mean().item()
    else:
        metrics |= semantics(posterior[0], labels, torch.arange(len(labels)) % len(xs), z, found, task, seed)
    metrics |= {key: value for key, value in checkpoint["last_log"].items() if key.startswith("loss_fraction_")}
    metrics |= {"test_inputs": len(xs), "minutes": checkpoint["minutes"],
                "start_nll_error": checkpoint["start_nll_error"]}
    write_result(folder, cfg, metrics)
    if D:
        figures.draw_latent_space(posterior[0], labels, z.flatten(0, 1), indices(task, found), task.strategies,
                                  os.path.join(folder, "latent_space.png"))
        if D == 2:
            figures.draw_maps(model, task, tokenizer, xs[:4], os.path.join(folder, "maps.png"))
    else:
        figures.draw_matching(C, task.strategies, os.path.join(folder, "matching.png"))
    log = read_log(folder)
    if log and log[-1]["minutes"] == checkpoint["last_log"]["minutes"]:
        figures.draw_training(log, os.path.join(folder, "training.png"))
    else:
        print(f"no training.png: {folder}/log.jsonl is of another run than ckpt.pt")
    figures.draw_shares(shares, base_shares, task.strategies, os.path.join(folder, "shares.png"))
    for name in ("alignment_one_to_one", "local_strategy_full_coverage_rate", "permutation_gap",
                 "controlled_final_answer_accuracy", "sampled_final_answer_accuracy", "base_final_answer_accuracy",
                 "posterior_mu_probe_accuracy", "sampled_z_probe_accuracy", "sampled_z_probe_accuracy_control",
                 "centroid_distance", "sampled_strategy_total_variation", "nll", "base_nll", "posterior_alignment",
                 "minutes"):
        if name in metrics:
            print(f"{name:36s} {metrics[name]:.3f}")
    if not D:
        print("z and the strategy it means:", ", ".join(
            f"<z{k + 1}> {'none' if s is None else f'{task.strategies[s]} ({C[k, s]:.2f})'}"
            for k, s in enumerate(one_to_one_matching(C)[1])))
    print(f"wrote {folder}/metrics.json and the figures beside it", flush=True)
    return metrics


def draw(folder, seed=0):
    """Draws the figures that no metric needs, those that apply to the run, and prints their paths."""
    checkpoint, base, task, tokenizer, model, q = load_run(folder)
    xs, drawn = different_inputs(task, checkpoint["config"]["eval_inputs"], test=True), []

    def path(name):
        drawn.append(os.path.join(folder, name))
        return drawn[-1]

    if model.config.z_dim:
        all_xs, generator = [x for x in xs for _ in range(4)], seeded(seed)
        pairs = sample_pairs(base, [tokenizer.prompt(x) for x in all_xs], generator)
        labels = indices(task, [task.attribute(x, y) for x, y in zip(all_xs, solutions(tokenizer, pairs))])
        z, ys = router_sampled(model, task, tokenizer, xs, 16, generator)
        found = indices(task, [task.attribute(x, y) for x, y in zip([x for x in xs for _ in range(16)], ys)])
        figures.draw_centroids(q(pairs)[0], labels, z.flatten(0, 1), found, task.strategies, path("centroids.png"))
    else:
        figures.draw_traces(base, model, task, tokenizer, xs[0], seed, path("traces.png"))
        looks = [entry for entry in read_log(folder) if "strategy_by_latent" in entry]
        if looks:
            figures.draw_dynamics(looks, task.strategies, path("dynamics.png"))
        else:
            print("no dynamics.png: log.jsonl says nothing about strategy_by_latent")
    found = decodability(base, task, tokenizer, xs, 6, seed)
    if found[0]:
        figures.draw_decodability(*found, path("decodability.png"))
    else:
        print("no decodability.png: too few solutions of the base follow a strategy")
    print("\n".join(drawn))


def show(folder, xs):
    """Prints, for every x, the likeliest trace under every z side by side, with the strategy it follows. A continuous z
    takes the places at which the router's samples have each strategy on average, then those on the way between two."""
    _, _, task, tokenizer, model, _ = load_run(folder)
    K = model.config.n_latents
    names, z = [f"<z{k + 1}>" for k in range(K)], None
    if model.config.z_dim:
        some = different_inputs(task, 32, test=True)
        found_z, ys = router_sampled(model, task, tokenizer, some, 16, seeded(0))
        found = [task.attribute(x, y) for x, y in zip([x for x in some for _ in range(16)], ys)]
        there = [s for s in task.strategies if s in found]
        z, _ = centroids(found_z.flatten(0, 1), indices(task, found), indices(task, there).tolist())
        names = [f"z of {s}:" for s in there]
    for x in xs:
        prompts = [tokenizer.prompt(x, k, continuous=z is not None) for k in range(len(names))]
        ys = sample_ys(model, tokenizer, prompts, seeded(0), temperature=0, z=z)
        columns = [[f"{name} {task.attribute(x, y) or 'no strategy'}"] for name, y in zip(names, ys)]
        for column, y in zip(columns, ys):
            column += figures.trace_lines(y)
        widths = [max(map(len, column)) for column in columns]
        print(f"\nx = {' '.join(x)}")
        for i in range(max(map(len, columns))):
            print("  " + " | ".join((c[i] if i < len(c) else "").ljust(w) for c, w in zip(columns, widths)).rstrip())
        if z is not None and len(z) > 1:
            way = torch.linspace(0, 1, 11)[:, None]
            line = z[0] + way * (z[1] - z[0])
            ys = sample_ys(model, tokenizer, 11 * [prompts[0]], seeded(0), temperature=0, z=line)
            print(f"  on the way from z of {there[0]} to z of {there[1]}:")
            for t, y in zip(way[:, 0].tolist(), ys):
                print(f"    {t:.1f} {task.attribute(x, y) or 'no strategy'}")


def typed_input(folder, text):
    """The input a user typed, as tokens, or one line that says what the task expects."""
    _, _, task, tokenizer, _, _ = load_run(folder)
    try:
        x = tokenizer.split(text)
    except ValueError as e:
        fail(f"--x: {e}")
    problem = task.check(x) or (None if task.is_valid_input(x) else "some of its strategies coincide on it")
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
    if not flags:
        evaluate(folder)
    for flag in flags:
        key, _, value = flag.partition("=")
        if key == "--x" and value:
            show(folder, [typed_input(folder, value)])
        elif key == "--show" and value.isdecimal() and int(value) > 0:
            show(folder, different_inputs(load_run(folder)[2], int(value), test=True))
        elif flag == "--figures":
            draw(folder)
        else:
            fail(f"unknown or incomplete flag '{flag}'; known: --show=N, --x=\"...\", --figures")


def main(argv):
    try:
        answer(argv)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has seen enough, such as `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as e:  # a full disk
        fail(str(e))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main(sys.argv[1:])
