"""Comparisons for the page of results: what labels would give, what clustering finds, what two tasks in one base do.

    python tests/baselines.py supervised configs/grid_discrete.py --name=grid_supervised --seed=0
    python tests/baselines.py clusters configs/grid_discrete.py --seed=0 > out/grid_clusters.json
    python tests/baselines.py two_tasks tests/two_tasks_discrete.py --seed=0
    python tests/baselines.py unseen configs/sorting_discrete.py --seed=0 --name=sorting_unseen
    python tests/baselines.py smaller configs/sorting_discrete.py --seed=0 --name=sorting_smaller
    python tests/baselines.py export configs/grid_base.py > out/grid.jsonl

`supervised` is factorize.py with the true strategies as labels, in place of the clusters' and of responsibilities: what
the generator reaches in as many steps when somebody tells it. `clusters` needs no generator: it shares out the
recipe's own responses of the base, once by k-means on mean hidden states, raw or minus their mean over the responses to
the same x, and once as the recipe does, for several mixtures of the strategies that nothing tells. It prints how many
of the responses are in the right cluster, and which K is found.
`two_tasks` is factorize.py on a base of two tasks (`grids_and_equations`), measured on each of them apart.
`unseen` is factorize.py on lists of half of the order patterns, `smaller` on lists that are not of the greatest length;
both are measured on inputs of either kind apart, all of which the base has learned.
`export` writes 20,000 records of a base's task as a file of traces, each of a strategy drawn from the mixture.
"""
import dataclasses
import json
import os
import random
import sys
import zlib

import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import evaluate
import factorize
import train_base
from harness import config, parallel, runs
from harness.parallel import seeded
from model import in_chunks
from posterior import Posterior, start_posterior
from tasks import TASK_FUNCTIONS, TASKS, Task, Tokenizer
from train_base import get_base, make_task

TWO = {"grid": TASKS["grid_pathfinding"], "equation": TASKS["linear_equation_solving"]}


def nearest_strategies(task, tokenizer, pairs):
    """(N,) index of the strategy of every pair, the nearest one where y follows none."""
    rows = zip(pairs.ids.tolist(), pairs.starts.tolist())
    both = [(tokenizer.decode(ids[2:start - 2]), tokenizer.solution(ids[start:])) for ids, start in rows]
    return evaluate.indices(task, [task.nearest_strategy(x, y) for x, y in both])


def supervised(cfg):
    _, task, _ = get_base(factorize.load_base_config(cfg), cfg.base)
    tokenizer, label_pool = Tokenizer(task.vocab), factorize.label_pool

    def with_truth(model, q, pool, stage, *more):
        labels = label_pool(model, q, pool, "ELBO", *more)  # which has none of its own
        if stage != "ELBO":
            truth = F.one_hot(nearest_strategies(task, tokenizer, pool), len(task.strategies))
            labels["log_r"] = truth.float().log().clamp(min=-1e4)
        return labels

    factorize.label_pool = with_truth
    steps = cfg.fixed_label_steps + cfg.responsibility_steps
    cfg = dataclasses.replace(cfg, cluster_inputs=0, fixed_label_steps=0, responsibility_steps=steps)
    evaluate.evaluate(factorize.factorize(cfg))


def kmeans(u, K, generator, restarts=20, iterations=100):
    """Plain k-means of u (N, d), the best of some random starts: (N,) clusters."""
    def once():
        centroids = u[torch.randperm(len(u), generator=generator)[:K]]
        for _ in range(iterations):
            t = F.one_hot(torch.cdist(u, centroids).argmin(dim=1), K).float()
            centroids = (t.T @ u) / t.sum(dim=0)[:, None].clamp(min=1)
        distance, cluster = torch.cdist(u, centroids).min(dim=1)
        return distance.square().sum().item(), cluster
    return min((once() for _ in range(restarts)), key=lambda scatter_and_cluster: scatter_and_cluster[0])[1]


def mixtures(S):
    """name -> (how often each of S strategies is drawn for input i, as weights; draws an input)."""
    rare = [0.9, 0.07, 0.03] if S == 3 else [0.9, *((S - 1) * [0.1 / (S - 1)])]
    falling = [0.6, 0.3, 0.1] if S == 3 else [0.4, 0.25, 0.2, 0.1, 0.05]
    own = [torch.distributions.Exponential(torch.ones(S)).sample().tolist() for _ in range(2 ** 10)]
    return {"equal": (lambda i: S * [1.0], 12), "falling": (lambda i: falling, 12), "own": (lambda i: own[i], 12),
            "reversed": (lambda i: falling if i % 2 else falling[::-1], 12),
            "missing": (lambda i: S * [1.0] if i % 2 else [0.0, *((S - 1) * [1.0])], 12), "rare": (lambda i: rare, 36)}


def clusters(cfg):
    """Mixtures are made by drawing, for every input, from 36 samples of an evenly mixed base."""
    parallel.start(cfg.threads)
    base, task, _ = get_base(factorize.load_base_config(cfg), cfg.base)
    S, n, most = len(task.strategies), cfg.cluster_responses, 36
    pairs = factorize.sample_responses(base, task, cfg.cluster_inputs, most, f"clusters {cfg.seed}")
    truth = nearest_strategies(task, Tokenizer(task.vocab), pairs)
    torch.manual_seed(cfg.seed)
    q = Posterior(base)

    def pooled(chunk):
        h, _, mask = q.states(chunk)
        return (mask[:, None] / mask.sum(dim=1)[:, None, None] @ h)[:, 0]

    def right(found, truth):
        C = F.one_hot(found, max(S, int(found.max()) + 1)).float().T @ F.one_hot(truth, S).float() / len(truth)
        return evaluate.one_to_one_matching(C)[0]

    few = (torch.arange(cfg.cluster_inputs)[:, None] * most + torch.arange(n)).flatten()
    features = in_chunks(pooled, pairs.rows(few))
    centred = features - features.view(-1, n, features.shape[1]).mean(dim=1).repeat_interleave(n, dim=0)
    found = {f"kmeans_{name}": right(kmeans(u / u.std(dim=0).clamp(min=1e-6), S, seeded(cfg.seed)), truth[few])
             for name, u in (("raw", features - features.mean(dim=0)), ("centred", centred))}
    of_input = torch.arange(len(truth)).view(-1, most)
    for name, (weights, draws) in mixtures(S).items():
        rng, rows = random.Random(f"{name} {cfg.seed}"), []
        for i, own in enumerate(of_input.tolist()):
            there = {s: [row for row in own if truth[row] == s] for s in range(S)}
            some = [s for s in there if there[s] and weights(i)[s]]
            drawn = rng.choices(some, [weights(i)[s] for s in some], k=draws) if some else []
            rows += [rng.choice(there[s]) for s in drawn]
        rows = torch.tensor(rows)

        def start(K):
            return start_posterior(q, pairs.rows(rows), rows // most, K, cfg.seed, cfg.cluster_searches,
                                   cfg.posterior_std)

        try:
            share, clusters = start(0)
        except SystemExit:  # no K is right
            share = ()
        found[f"{name}_k"] = len(share)
        if len(share) != S:  # else they are what it finds if S is told
            share, clusters = start(S)
        labels = q.read(q.all_features(pairs.rows(rows))).argmax(dim=1)
        found |= {f"{name}_right": right(labels, truth[rows]), f"{name}_collisions": clusters.collisions,
                  f"{name}_agreement": clusters.agreement, f"{name}_halves": clusters.halves}
        print(name, {key: value for key, value in found.items() if key.startswith(name)}, file=sys.stderr, flush=True)
    print(json.dumps({"config": dataclasses.asdict(cfg), "seed": cfg.seed, **runs.provenance(), "metrics": found},
                     indent=1))


def grids_and_equations():
    """A task whose x is a grid or an equation, with three strategies of its own each."""
    def kind(x):
        return "grid" if "to" in x else "equation"

    def draw(rng):  # as often of the one as of the other, of which a draw may fail
        task = rng.choice(list(TWO.values()))
        return next(x for x in iter(lambda: task.draw(rng), "") if x)

    steps = {strategy: f for task in TWO.values() for strategy, f in task.steps.items()}
    return Task("grids_and_equations", tuple(dict.fromkeys(t for task in TWO.values() for t in task.vocab)),
                draw, check=lambda x: TWO[kind(x)].check(x),
                answer=lambda x: TWO[kind(x)].answer(x), steps=steps, kind=kind,
                weights={name: [float(s in task.steps) for s in steps] for name, task in TWO.items()})


def two_tasks(cfg):
    folder = factorize.factorize(cfg)
    checkpoint, _, task, tokenizer, model, _ = evaluate.load_run(folder)
    xs = evaluate.different_inputs(task, 2 * cfg.eval_inputs, "test")
    metrics, C = evaluate.controlled(task, xs, evaluate.forced(model, tokenizer, xs, seed=0))
    served = {s: C[z, s].item() for z, s in enumerate(evaluate.one_to_one_matching(C)[1]) if s is not None}
    for name, one in TWO.items():  # a strategy that no z is matched to counts as 0
        own = [served.get(task.strategies.index(s), 0.0) for s in one.steps]
        metrics[f"alignment_{name}"] = sum(own) / len(own)
    runs.write_result(folder, checkpoint["config"], checkpoint["made_with"], metrics | checkpoint["clusters"])
    print(json.dumps(metrics, indent=1))


def pattern_is_even(x):
    """Whether a hash of the order of the numbers is even: 4 2 7 and 5 1 9 have the same."""
    values = list(map(int, x))
    return zlib.crc32(bytes(sorted(values).index(value) for value in values)) % 2 == 0


def unseen(cfg):
    on_some(cfg, pattern_is_even)


def smaller(cfg):
    on_some(cfg, lambda x: len(x) < 6)


def on_some(cfg, seen):
    """Factorizes on inputs x for which seen(x) alone, and measures on test inputs of both kinds."""
    sample_responses = factorize.sample_responses

    def of_seen(base, task, *more):
        def draw(rng):
            return x if seen(x := task.draw(rng)) else None
        return sample_responses(base, dataclasses.replace(task, draw=draw), *more)

    factorize.sample_responses = of_seen
    folder = factorize.factorize(cfg)
    checkpoint, base, task, tokenizer, model, _ = evaluate.load_run(folder)
    xs = evaluate.different_inputs(task, 2 * cfg.eval_inputs, "test")
    _, C = evaluate.controlled(task, xs, evaluate.forced(model, tokenizer, xs, seed=0))
    metrics, *_ = evaluate.not_sampled(
        model, base, dataclasses.replace(task, kind=lambda x: "seen" if seen(x) else "unseen"), tokenizer, xs,
        evaluate.router(model, tokenizer, xs), evaluate.one_to_one_matching(C)[1])
    runs.write_result(folder, checkpoint["config"], checkpoint["made_with"], metrics | checkpoint["clusters"])
    print(json.dumps(metrics, indent=1))


def export(cfg, n=20_000):
    task, rng = make_task(vars(cfg)), random.Random(f"export {cfg.seed}")
    for _ in range(n):
        x = task.sample_input(rng)
        (strategy,) = rng.choices(*zip(*task.mixture(x).items()))
        y = task.word(task.trace(x, strategy), rng)[0]
        texts = {"x": x, "y": y, "answer": task.answer(x)}
        print(json.dumps({key: " ".join(tokens) for key, tokens in texts.items()} | {"strategy": strategy}))


if __name__ == "__main__":
    TASK_FUNCTIONS["grids_and_equations"], TASKS["grids_and_equations"] = grids_and_equations, grids_and_equations()
    what, *flags = sys.argv[1:]
    script = train_base if what == "export" else factorize
    functions = {f.__name__: f for f in (supervised, clusters, two_tasks, unseen, smaller, export)}
    functions[what](config.load(script, flags))
