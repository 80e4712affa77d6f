"""Comparisons for the page of results: what labels would give, what clustering finds, what two tasks in one base do.

    python tests/baselines.py supervised configs/grid_discrete.py --name=grid_supervised --seed=0
    python tests/baselines.py clusters configs/grid_discrete.py --seed=0 > assets/results/clusters/grid_seed0.json
    python tests/baselines.py two_tasks tests/two_tasks_discrete.py --seed=0

`supervised` is factorize.py with the true strategies as labels, in place of the clusters' and of responsibilities: what
the generator reaches in as many steps when somebody tells it. `clusters` needs no generator: it shares out the
recipe's own responses of the base, once by k-means on mean hidden states, raw or minus their mean over the responses to
the same x, and once as the recipe does, and prints how much of the responses' probability is in the right cluster; and,
for 2 to 7 clusters, which share of the recipe's restarts agree.
`two_tasks` is factorize.py on a base of two tasks (`grids_and_equations`), measured on each of them apart.
"""
import dataclasses
import json
import os
import sys

import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import evaluate
import factorize
from harness import config, parallel, runs
from harness.parallel import seeded
from model import in_chunks
from posterior import Posterior, start_posterior
from tasks import TASK_FUNCTIONS, TASKS, Task, Tokenizer
from train_base import get_base

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


def clusters(cfg):
    parallel.start(cfg.threads)
    base, task, _ = get_base(factorize.load_base_config(cfg), cfg.base)
    K, n, generator = len(task.strategies), cfg.cluster_responses, seeded(cfg.seed)
    pairs = factorize.sample_responses(base, task, cfg.cluster_inputs, n, f"clusters {cfg.seed}")
    truth = nearest_strategies(task, Tokenizer(task.vocab), pairs)
    torch.manual_seed(cfg.seed)
    q = Posterior(base, K)

    def pooled(chunk):
        h, _, mask = q.states(chunk)
        return (mask[:, None] / mask.sum(dim=1)[:, None, None] @ h)[:, 0]

    def right(found):
        C = F.one_hot(found, K).float().T @ F.one_hot(truth, K).float() / len(truth)
        return evaluate.one_to_one_matching(C)[0]

    features = in_chunks(pooled, pairs)
    centred = features - features.view(-1, n, features.shape[1]).mean(dim=1).repeat_interleave(n, dim=0)
    shares = {f"kmeans_{name}": right(kmeans(u / u.std(dim=0).clamp(min=1e-6), K, generator))
              for name, u in (("raw", features - features.mean(dim=0)), ("centred", centred))}
    for n_clusters in sorted({*range(2, 8), K}):
        posterior = q if n_clusters == K else Posterior(base, n_clusters)
        shares[f"agreement_{n_clusters}"] = start_posterior(
            posterior, pairs, torch.arange(len(pairs.ids)) // n, torch.zeros(n_clusters).log_softmax(dim=0),
            seeded(cfg.seed), cfg.cluster_restarts, cfg.posterior_std)
    shares["linear_posterior"] = right(q.read(q.all_features(pairs)).argmax(dim=1))
    print(json.dumps({"config": dataclasses.asdict(cfg), "seed": cfg.seed, **runs.provenance(), "metrics": shares},
                     indent=1))


def grids_and_equations():
    """A task whose x is a grid or an equation. Its strategy i is the i-th of either: which strategy of one goes with
    which of the other is arbitrary."""
    def kind(x):
        return "grid" if "to" in x else "equation"

    def steps(i):
        return lambda x: list(TWO[kind(x)].steps.values())[i](x)

    return Task("grids_and_equations", tuple(dict.fromkeys(t for task in TWO.values() for t in task.vocab)),
                draw=lambda rng: rng.choice(list(TWO.values())).draw(rng), check=lambda x: TWO[kind(x)].check(x),
                answer=lambda x: TWO[kind(x)].answer(x), steps={f"strategy {i + 1}": steps(i) for i in range(3)})


def two_tasks(cfg):
    folder = factorize.factorize(cfg)
    checkpoint, _, task, tokenizer, model, _ = evaluate.load_run(folder)
    xs = evaluate.different_inputs(task, 2 * cfg.eval_inputs, "test")
    found = {name: evaluate.controlled(model, task, tokenizer, [x for x in xs if not one.check(x)], seed=0)[0]
             for name, one in TWO.items()}
    runs.write_result(folder, checkpoint["config"], checkpoint["made_with"], found)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    TASK_FUNCTIONS["grids_and_equations"], TASKS["grids_and_equations"] = grids_and_equations, grids_and_equations()
    what, *flags = sys.argv[1:]
    {"supervised": supervised, "clusters": clusters, "two_tasks": two_tasks}[what](config.load(factorize, flags))
