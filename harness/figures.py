"""The figures of a run, one function each, from arrays that evaluate.py hands over."""
import math
import os
import textwrap
import warnings

import torch
import torch.nn.functional as F

from harness import runs


def new_figure(width, height, columns=1, **layout):
    os.environ["MPLBACKEND"] = "agg"  # no window, whatever a notebook's shell asks for
    import matplotlib  # here, because training needs no figures
    from matplotlib.figure import Figure
    matplotlib.rcParams["text.parse_math"] = matplotlib.rcParams["text.usetex"] = False  # a $ is a $
    warnings.filterwarnings("ignore", "Glyph")  # a character that the font lacks is drawn as a box
    figure = Figure((width, height), layout="constrained")
    return figure, figure.subplots(1, columns, **layout)


def save(figure, path):
    runs.write(os.fspath(path), lambda f: figure.savefig(f, dpi=120, format="png"))


def draw_matching(C, matching, strategies, path):
    """Heat map of C[z, s], the share of test inputs on which forced z gives strategy s; matching[z], a strategy or
    None, is framed."""
    figure, axis = new_figure(1.6 + 1.1 * len(strategies), 1.6 + 0.6 * len(C))
    axis.imshow(C.cpu().numpy(), vmin=0, vmax=1, cmap="Blues", aspect="auto")
    axis.set_xticks(range(len(strategies)), strategies, rotation=40, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(C)), [f"<z{k + 1}>" for k in range(len(C))])
    axis.set_title("share of test inputs solved by each strategy, z forced", fontsize=10)
    for k, match in enumerate(matching):
        for s in range(len(strategies)):
            axis.text(s, k, f"{C[k, s]:.2f}", ha="center", va="center", color="white" if C[k, s] > 0.6 else "black")
        if match is not None:
            left, right, top, bottom = match - 0.48, match + 0.48, k - 0.48, k + 0.48
            axis.plot([left, right, right, left, left], [top, top, bottom, bottom, top], color="crimson", linewidth=2)
    save(figure, path)


def draw_router(kinds, router, base, matching, strategies, path):
    """For each kind of input a bar of p(strategy|kind) of the base (kinds, S) and one of p(z|kind) of the router
    (kinds, K), in the colour of the strategy matching[z], black for None."""
    figure, axis = new_figure(3.5 + 1.5 * len(kinds), 3.4)
    for shift, shares, meant in ((-0.2, base, range(len(strategies))), (0.2, router, matching)):
        bottom = torch.zeros(len(kinds))
        for z in sorted(range(len(meant)), key=lambda z: (meant[z] is None, meant[z] or 0)):
            axis.bar([i + shift for i in range(len(kinds))], shares[:, z].tolist(), 0.36, bottom.tolist(),
                     color="black" if meant[z] is None else f"C{meant[z]}", edgecolor="white",
                     label=f" {strategies[meant[z]]}" if shift < 0 else None)  # a label in "_" would be left out
            bottom += shares[:, z].cpu()
    axis.set_xticks(range(len(kinds)), [f"{kind}\nbase | router" for kind in kinds], fontsize=8)
    figure.legend(loc="outside right upper", fontsize=8)
    save(figure, path)


def draw_latent_space(means, labels, z, found, strategies, path):
    """Posterior means (n, D) of base samples of strategies `labels` (n,), and router samples z (N, D) that gave `found`
    (N,), -1 for none, along the first two principal components of the means; circles are one and two standard
    deviations of N(0, I). In both, the mean z of each strategy: their distance is the posterior-to-sampled gap."""
    figure, axes = new_figure(10, 4.8, 2, sharex=True, sharey=True)
    directions = torch.linalg.eigh(torch.atleast_2d(means.T.cov()))[1].flip(1)[:, :2]
    angle = torch.linspace(0, 2 * math.pi, 100)
    for axis, points, strategy, title in ((axes[0], means, labels, "posterior means of base samples"),
                                          (axes[1], z, found, "z from the router, by what it gives")):
        points = F.pad(points @ directions, (0, 2 - directions.shape[1]))  # (n, 2), also where z has one dimension
        for s, name in [*enumerate(strategies), (-1, "none")]:
            own, colour = points[strategy == s], "black" if s < 0 else f"C{s}"
            axis.scatter(*own.T.tolist(), s=4, alpha=0.3, label=f" {name}", color=colour)
            if s >= 0 and len(own):
                for panel in axes:  # filled in its own panel, hollow in the other
                    face, edge = (colour, "black") if panel is axis else ("none", colour)
                    panel.scatter(*own.mean(dim=0).tolist(), s=90, facecolor=face, edgecolor=edge, lw=2, zorder=3)
        for radius in (1, 2):
            axis.plot((radius * angle.cos()).tolist(), (radius * angle.sin()).tolist(), color="gray", linewidth=0.8)
        axis.set_aspect("equal")
        axis.set_title(title, fontsize=10)
    axes[0].legend(fontsize=8)
    save(figure, path)


def draw_training(log, path):
    """Entries of log.jsonl: R / c_base and KL, every term's share of J, and what evaluations found, by step."""
    figure, axes = new_figure(13, 3.6, 3)
    steps = [e["step"] for e in log]
    axes[0].plot(steps, [e["normalized_reconstruction"] for e in log], label="R / c_base")
    axes[0].plot(steps, [e["kl"] for e in log], label="KL(q || p), nats")
    names = dict.fromkeys(key for e in log for key in e if key.startswith("loss_fraction_") and e[key] > 0)
    axes[1].stackplot(steps, [[e.get(key, 0) for e in log] for key in names],  # a term may play no part in a stage
                      labels=[key.removeprefix("loss_fraction_").replace("_", " ") for key in names])
    axes[1].set_title("share of the objective", fontsize=10)
    for key, label in (("alignment_one_to_one", "alignment"), ("local_strategy_coverage_mean", "local coverage"),
                       ("permutation_gap", "permutation gap"), ("posterior_mu_probe_accuracy", "probe, posterior mean"),
                       ("sampled_z_probe_accuracy", "probe, sampled z"), ("centroid_distance", "centroid distance"),
                       ("distinct_outputs", "distinct outputs"), ("consistency", "consistency")):
        found = [(e["step"], e[key]) for e in log if key in e]
        if found:
            axes[2].plot(*zip(*found), marker=".", label=label)
    axes[2].set_ylim(-0.03)
    for axis in axes:
        axis.set_xlabel("step")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    save(figure, path)


def draw_traces(x, of_base, of_latents, strategies, path):
    """The idea in one picture: for one x, independent samples of the base beside one sample under each of z1 ... zK.
    of_base, of_latents: for every sample its strategy, by which it is coloured, and its lines of text."""
    K, samples = len(of_base), of_base + of_latents
    columns = [[part for line in lines for part in textwrap.wrap(line, 30)] for _, lines in samples]
    height = max(map(len, columns))
    width = max(14, *(len(text) for (name, _), column in zip(samples, columns) for text in (name, *column)))
    # places are in characters and lines of a monospaced font, from the top left corner
    right, bottom = 8 + (width + 3.5) * len(samples), 9 + height
    figure, axis = new_figure(0.084 * right, 0.18 * bottom)
    axis.set(position=[0, 0, 1, 1], xlim=(0, right), ylim=(bottom, 0))
    axis.axis("off")
    axis.text(3, 1, f"x = {x}", family="monospace", va="center")
    for i, (column, (name, _)) in enumerate(zip(columns, samples)):
        left = 3 + (width + 3.5) * i + 4 * (i >= K)
        title = {0: "the base: whichever comes up", K: "the factorization: z decides"}.get(i, "")
        axis.text(left, 3, title, fontsize=12, weight="bold", va="center")
        colour = f"C{strategies.index(name)}" if name in strategies else "gray"
        head = [f"<z{i - K + 1}>" if i >= K else f"sample {i + 1}", name]
        for lines, top, alpha, style in ((head, 5, 1, {"color": "white", "weight": "bold"}),
                                         (column + [""] * (height - len(column)), 7.8, 0.13, {})):
            axis.text(left, top, "\n".join(line.ljust(width) for line in lines), family="monospace", va="top",
                      bbox={"facecolor": colour, "alpha": alpha, "linewidth": 0}, **style)
    save(figure, path)
