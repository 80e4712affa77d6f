"""The figures of a run, one function each; evaluate.py draws them."""
import json
import math

import torch
import torch.nn.functional as F

from parallel import seeded
from posterior import one_to_one_matching
from train_base import sample_ys


def new_figure(width, height, columns=1):
    from matplotlib.figure import Figure  # here, because training needs no figures
    figure = Figure((width, height), layout="constrained")
    return figure, figure.subplots(1, columns)


def draw_matching(C, strategies, path):
    """Heat map of C[z, s], the share of test inputs on which forced z gives strategy s; the matching is framed."""
    figure, axis = new_figure(1.6 + 1.1 * len(strategies), 1.6 + 0.6 * len(C))
    axis.imshow(C.cpu().numpy(), vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for k, match in enumerate(one_to_one_matching(C)[1]):
        for s in range(len(strategies)):
            axis.text(s, k, f"{C[k, s]:.2f}", ha="center", va="center", color="white" if C[k, s] > 0.6 else "black")
        if match is not None:
            left, right, top, bottom = match - 0.48, match + 0.48, k - 0.48, k + 0.48
            axis.plot([left, right, right, left, left], [top, top, bottom, bottom, top], color="crimson", linewidth=2)
    axis.set_xticks(range(len(strategies)), strategies, rotation=30, ha="right")
    axis.set_yticks(range(len(C)), [f"<z{k + 1}>" for k in range(len(C))])
    axis.set_title("share of test inputs solved by each strategy, z forced", fontsize=10)
    figure.savefig(path, dpi=120)


def draw_latent_space(means, labels, z, found, strategies, path):
    """Posterior means (n, D) of base samples of strategies `labels` (n,), and router samples z (N, D) that gave `found`
    (N,), -1 for none: the first two principal components of the means, with circles of one and two standard deviations
    of N(0, I)."""
    figure, axes = new_figure(10, 4.8, 2)
    directions = torch.linalg.eigh(torch.atleast_2d(means.T.cov()))[1].flip(1)[:, :2]
    angle = torch.linspace(0, 2 * math.pi, 100)
    for axis, points, strategy, title in ((axes[0], means, labels, "posterior means of base samples"),
                                          (axes[1], z, found, "z from the router, by what it gives")):
        points = F.pad(points @ directions, (0, 2 - directions.shape[1]))
        for s, name in [*enumerate(strategies), (-1, "none")]:
            axis.scatter(*points[strategy == s].T.tolist(), s=4, alpha=0.5, label=name,
                         color="black" if s < 0 else f"C{s}")
        for radius in (1, 2):
            axis.plot((radius * angle.cos()).tolist(), (radius * angle.sin()).tolist(), color="gray", linewidth=0.8)
        axis.set_title(title, fontsize=10)
        axis.set_aspect("equal")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def draw_maps(model, task, tokenizer, xs, path, points=25):
    """The plane of a z of two dimensions, coloured by the strategy of the likeliest y, for every x: stable semantics is
    the same map for every x."""
    from matplotlib.colors import ListedColormap
    side = torch.linspace(-3, 3, points)
    z = torch.cartesian_prod(side, side)
    figure, axes = new_figure(3 * len(xs), 3.2, len(xs))
    for axis, x in zip(axes, xs):
        ys = sample_ys(model, tokenizer, len(z) * [tokenizer.prompt(x, continuous=True)], seeded(0), 0, z)
        found = [task.attribute(x, y) for y in ys]
        cells = torch.tensor([task.strategies.index(s) if s else len(task.strategies) for s in found])
        colours = [f"C{s}" for s in range(len(task.strategies))] + ["black"]
        axis.imshow(cells.view(points, points).T.cpu().numpy(), origin="lower", extent=(-3, 3, -3, 3), vmin=0,
                    vmax=len(task.strategies), cmap=ListedColormap(colours))
        axis.set_title(" ".join(x), fontsize=9)
    figure.savefig(path, dpi=120)


def draw_training(log_path, path):
    """R / c_base and KL, every term's share of the objective, alignment and coverage, against the step."""
    with open(log_path) as f:
        log = [json.loads(line) for line in f]
    figure, axes = new_figure(13, 3.6, 3)
    steps = [e["step"] for e in log]
    axes[0].plot(steps, [e["normalized_reconstruction"] for e in log], label="R / c_base")
    axes[0].plot(steps, [e["kl"] for e in log], label="KL(q || p), nats")
    names = [key for key in log[0] if key.startswith("loss_fraction_") and any(e[key] > 0 for e in log)]
    axes[1].stackplot(steps, [[e[key] for e in log] for key in names],
                      labels=[key.removeprefix("loss_fraction_").replace("_", " ") for key in names])
    axes[1].set_title("share of the objective", fontsize=10)
    looks = [e for e in log if "local_strategy_coverage_mean" in e]
    for key, label in (("alignment_one_to_one", "alignment"), ("local_strategy_coverage_mean", "local coverage"),
                       ("posterior_mu_probe_accuracy", "probe, posterior mean"),
                       ("sampled_z_probe_accuracy", "probe, sampled z"), ("centroid_distance", "centroid distance")):
        found = [(e["step"], e[key]) for e in looks if key in e]
        if found:
            axes[2].plot(*zip(*found), marker=".", label=label)
    axes[2].set_ylim(bottom=0)
    for axis in axes:
        axis.set_xlabel("step")
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def draw_shares(shares, base_shares, strategies, path):
    """How often router samples follow each strategy, next to samples of the base."""
    figure, axis = new_figure(2 + 1.1 * len(strategies), 3.4)
    place = range(len(strategies) + 1)
    axis.bar([p - 0.2 for p in place], base_shares, 0.4, label="base")
    axis.bar([p + 0.2 for p in place], shares, 0.4, label="router, then generator")
    axis.set_xticks(place, (*strategies, "none"), rotation=30, ha="right")
    axis.set_ylabel("share of samples")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)
