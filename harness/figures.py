"""The figures of a run, one function each, from arrays that evaluate.py hands over."""
import math
import textwrap

import torch
import torch.nn.functional as F


def new_figure(width, height, columns=1, **layout):
    from matplotlib.figure import Figure  # here, because training needs no figures
    figure = Figure((width, height), layout="constrained")
    return figure, figure.subplots(1, columns, **layout)


def draw_matching(C, matching, strategies, path):
    """Heat map of C[z, s], the share of test inputs on which forced z gives strategy s; matching[z], a strategy or
    None, is framed."""
    figure, axis = new_figure(1.6 + 1.1 * len(strategies), 1.6 + 0.6 * len(C))
    axis.imshow(C.cpu().numpy(), vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for k, match in enumerate(matching):
        for s in range(len(strategies)):
            axis.text(s, k, f"{C[k, s]:.2f}", ha="center", va="center", color="white" if C[k, s] > 0.6 else "black")
        if match is not None:
            left, right, top, bottom = match - 0.48, match + 0.48, k - 0.48, k + 0.48
            axis.plot([left, right, right, left, left], [top, top, bottom, bottom, top], color="crimson", linewidth=2)
    axis.set_xticks(range(len(strategies)), strategies, rotation=30, ha="right")
    axis.set_yticks(range(len(C)), [f"<z{k + 1}>" for k in range(len(C))])
    axis.set_title("share of test inputs solved by each strategy, z forced", fontsize=10)
    figure.savefig(path, dpi=120)


def plane(means):
    """(n, D) -> (D, min(D, 2)): the directions of their first two principal components."""
    return torch.linalg.eigh(torch.atleast_2d(means.T.cov()))[1].flip(1)[:, :2]


def project(points, directions):
    """(n, D) -> (n, 2), the second coordinate 0 where z has one dimension."""
    return F.pad(points @ directions, (0, 2 - directions.shape[1]))


def draw_prior(axis):
    """Circles of one and two standard deviations of N(0, I)."""
    angle = torch.linspace(0, 2 * math.pi, 100)
    for radius in (1, 2):
        axis.plot((radius * angle.cos()).tolist(), (radius * angle.sin()).tolist(), color="gray", linewidth=0.8)
    axis.set_aspect("equal")


def draw_latent_space(means, labels, z, found, strategies, path):
    """Posterior means (n, D) of base samples of strategies `labels` (n,), and router samples z (N, D) that gave `found`
    (N,), -1 for none: the first two principal components of the means, with circles of one and two standard deviations
    of N(0, I)."""
    figure, axes = new_figure(10, 4.8, 2)
    directions = plane(means)
    for axis, points, strategy, title in ((axes[0], means, labels, "posterior means of base samples"),
                                          (axes[1], z, found, "z from the router, by what it gives")):
        points = project(points, directions)
        for s, name in [*enumerate(strategies), (-1, "none")]:
            axis.scatter(*points[strategy == s].T.tolist(), s=4, alpha=0.5, label=name,
                         color="black" if s < 0 else f"C{s}")
        draw_prior(axis)
        axis.set_title(title, fontsize=10)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def draw_centroids(means, labels, z, found, strategies, path):
    """The posterior-to-sampled gap: for every strategy a line from the mean of its posterior means (n, D), of base
    samples of strategies `labels` (n,), to the mean of the router's z (N, D) that gave it (`found`, -1 for none), in
    the plane of draw_latent_space."""
    figure, axis = new_figure(6.6, 4.6)
    directions = plane(means)
    draw_prior(axis)
    for s, name in enumerate(strategies):
        if (labels == s).any() and (found == s).any():
            ends = torch.stack([means[labels == s].mean(dim=0), z[found == s].mean(dim=0)])
            ends = project(ends, directions)
            axis.plot(*ends.T.tolist(), color=f"C{s}", linewidth=2, label=name)
            axis.plot(*ends[0].tolist(), "o", color=f"C{s}", markersize=9)
            axis.plot(*ends[1].tolist(), "o", color=f"C{s}", markersize=9, markerfacecolor="white", markeredgewidth=2)
    axis.plot([], [], "ko", markersize=9, label="posterior means")
    axis.plot([], [], "ko", markersize=9, markerfacecolor="white", markeredgewidth=2, label="z from the router")
    axis.set_title("mean z of each strategy; circles: N(0, I)", fontsize=10)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)


def draw_maps(maps, titles, strategies, path):
    """The plane of a z of two dimensions, from -3 to 3, coloured by strategy, a map for every x: maps are (n, n)
    indices, len(strategies) for none. Stable semantics is the same map for every x."""
    from matplotlib.colors import ListedColormap
    figure, axes = new_figure(3 * len(maps), 3.2, len(maps), squeeze=False)
    colours = [f"C{s}" for s in range(len(strategies))] + ["black"]
    for axis, strategy, title in zip(axes[0], maps, titles):
        axis.imshow(strategy.T.cpu().numpy(), origin="lower", extent=(-3, 3, -3, 3), vmin=0, vmax=len(strategies),
                    cmap=ListedColormap(colours))
        axis.set_title(title, fontsize=9)
    figure.savefig(path, dpi=120)


def draw_training(log, path):
    """Entries of log.jsonl: R / c_base and KL, every term's share of J, alignment and coverage, against the step."""
    figure, axes = new_figure(13, 3.6, 3)
    steps = [e["step"] for e in log]
    axes[0].plot(steps, [e["normalized_reconstruction"] for e in log], label="R / c_base")
    axes[0].plot(steps, [e["kl"] for e in log], label="KL(q || p), nats")
    keys = dict.fromkeys(key for e in log for key in e if key.startswith("loss_fraction_"))
    names = [key for key in keys if any(e.get(key, 0) > 0 for e in log)]  # a term may play no part in a stage
    axes[1].stackplot(steps, [[e.get(key, 0) for e in log] for key in names],
                      labels=[key.removeprefix("loss_fraction_").replace("_", " ") for key in names])
    axes[1].set_title("share of the objective", fontsize=10)
    evaluated = [e for e in log if "local_strategy_coverage_mean" in e]
    for key, label in (("alignment_one_to_one", "alignment"), ("local_strategy_coverage_mean", "local coverage"),
                       ("posterior_mu_probe_accuracy", "probe, posterior mean"),
                       ("sampled_z_probe_accuracy", "probe, sampled z"), ("centroid_distance", "centroid distance")):
        found = [(e["step"], e[key]) for e in evaluated if key in e]
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


def draw_dynamics(entries, matching, strategies, path):
    """Entries of the log with an evaluation: alignment, coverage and their gap at each. At five of them, the first and
    the last included, C[z, s]: the share of validation inputs on which forced z gave strategy s. Latents are ordered
    by matching[z], the strategy of each in the end, or None."""
    n = min(5, len(entries))
    mapped = [entries[i * (len(entries) - 1) // max(n - 1, 1)] for i in range(n)]
    K, S = len(matching), len(strategies)
    order = sorted(range(K), key=lambda k: S if matching[k] is None else matching[k])  # latents left over come last
    figure, (curves, *maps) = new_figure(4 + 1.9 * n, 3, 1 + n, width_ratios=[2, *n * [1]])
    for key, label in (("local_strategy_coverage_mean", "coverage"), ("alignment_one_to_one", "alignment"),
                       ("permutation_gap", "permutation gap")):
        curves.plot([entry["step"] for entry in entries], [entry[key] for entry in entries], marker=".", label=label)
    curves.set_ylim(-0.03, 1.05)
    curves.set_xlabel("step")
    curves.legend(fontsize=8, loc="center right")
    for axis, entry in zip(maps, mapped):
        C = torch.tensor(entry["strategy_by_latent"])[order]
        axis.imshow(C.cpu().numpy(), vmin=0, vmax=1, cmap="Blues", aspect="auto")
        axis.set_xticks(range(S), strategies, rotation=40, ha="right", rotation_mode="anchor", fontsize=8)
        axis.set_yticks(range(K), [f"<z{k + 1}>" for k in order] if axis is maps[0] else K * [""], fontsize=8)
        axis.set_title(f"step {entry['step']}", fontsize=10)
    figure.suptitle("how z came to mean a strategy: share of validation inputs on which forced z gives it", fontsize=10)
    figure.savefig(path, dpi=120)


def draw_traces(x, of_base, of_latents, strategies, path):
    """The idea in one picture: for one x, independent samples of the base beside one sample under each of z1 ... zK.
    of_base, of_latents: for every sample its strategy, by which it is coloured, and its lines of text."""
    samples, K = of_base + of_latents, len(of_base)
    columns = [[part for line in lines for part in textwrap.wrap(line, 30)] for _, lines in samples]
    # places are in characters and lines of a monospaced font, from the top left corner
    widths = [max(14, *map(len, (*column, name))) + 2 for column, (name, _) in zip(columns, samples)]
    total, bottom = sum(widths) + 2 * K + 8, max(map(len, columns)) + 7.5
    figure, axis = new_figure(0.084 * total, 0.18 * bottom)
    axis.set_position([0, 0, 1, 1])
    axis.set(xlim=(0, total), ylim=(bottom + 0.5, 0))
    axis.axis("off")

    def write(left, row, text, **style):
        axis.text(left, row, text, va="center", **{"family": "monospace", "fontsize": 10, **style})

    left = 2
    for i, (column, (name, _), width) in enumerate(zip(columns, samples, widths)):
        left += 4 * (i == K)
        if i in (0, K):
            title = ("the base: whichever comes up", "the factorization: z decides")[i == K]
            write(left, 2.7, title, family="sans-serif", fontsize=12, weight="bold")
        colour = f"C{strategies.index(name)}" if name in strategies else "gray"
        axis.fill_between([left, left + width], 4, bottom, color=colour, alpha=0.13, linewidth=0)
        axis.fill_between([left, left + width], 4, 6.4, color=colour, linewidth=0)
        for row, text in enumerate((f"sample {i + 1}" if i < K else f"<z{i - K + 1}>", name)):
            write(left + 1, row + 4.7, text, color="white", weight="bold")
        for row, text in enumerate(column):
            write(left + 1, row + 7.1, text)
        left += width + 1
    write(2, 1, f"x = {x}")
    figure.savefig(path, dpi=150)
