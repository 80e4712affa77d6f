"""Scores a factorization on test inputs and draws its figures, from its run folder alone.

    python evaluate.py out/sorting_discrete                     # metrics.json, result.json and figures
    python evaluate.py out/sorting_discrete --show=3            # three test inputs, the trace under every z abreast
    python evaluate.py out/sorting_discrete --x="4 2 7 1 3"     # the same for an input of your own

Strategy names are read here and nowhere else: to say what each latent turned out to mean.
"""
import json
import math
import os
import random
import sys

import torch
import torch.nn.functional as F

import losses
from configs import fail
from model import GPT, GPTConfig, log_likelihood, pad, sample_pairs, set_threads
from posterior import Posterior, one_to_one_matching
from tasks import PAD, Tokenizer, Y_END
from train_base import build_base, load_checkpoint, sample_ys, score_answers, write_result


def load_run(folder):
    """Run folder -> (checkpoint, base, task, tokenizer, model, posterior)."""
    checkpoint = load_checkpoint(os.path.join(folder, "ckpt.pt"), "factorization")
    base, task = build_base(checkpoint["base"])
    model = GPT(GPTConfig(**checkpoint["model_config"]))
    model.load_state_dict(checkpoint["model"])
    q = Posterior(base, model.config.n_latents)
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
    ys = sample_ys(model, tokenizer, prompts, torch.Generator().manual_seed(seed))
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
def router_log_probs(model, tokenizer, xs):
    """log p_phi(z|x) (N, K) of every input."""
    prompts = [tokenizer.router_prompt(x) for x in xs]
    rows = []
    for i in range(0, len(prompts), 256):
        part = prompts[i:i + 256]
        rows.append(model(pad(part))[torch.arange(len(part)), torch.tensor([len(p) - 1 for p in part])])
    return F.log_softmax(torch.cat(rows)[:, -model.config.n_latents:], dim=1)


@torch.no_grad()
def router_sampled(model, base, task, tokenizer, xs, samples, seed):
    """z ~ p(z|x), then y ~ p(y|x,z), `samples` (at least K) times, against y from the base. Returns (metrics, shares of
    the factorization's strategies, shares of the base's), both over all inputs and samples."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.multinomial(router_log_probs(model, tokenizer, xs).exp(), samples, replacement=True, generator=generator)
    all_xs = [x for x in xs for _ in range(samples)]
    prompts = [tokenizer.prompt(x, k) for x, k in zip(all_xs, z.flatten().tolist())]
    metrics, shares = {}, []
    for name, ys in (("sampled", sample_ys(model, tokenizer, prompts, generator)),
                     ("base", sample_ys(base, tokenizer, [tokenizer.prompt(x) for x in all_xs], generator))):
        found = [task.attribute(x, y) for x, y in zip(all_xs, ys)]
        shares.append([found.count(s) / len(found) for s in (*task.strategies, None)])
        metrics |= {f"{name}_{key}": value for key, value in score_answers(task, all_xs, ys).items()}
    # `found` is the base's: what K of its samples show, in place of K latents
    coverage, full_coverage = local_coverage(found, samples, model.config.n_latents, len(task.strategies))
    metrics |= {"base_local_strategy_coverage_mean": coverage, "base_local_strategy_full_coverage_rate": full_coverage}
    metrics["sampled_strategy_total_variation"] = sum(abs(a - b) for a, b in zip(*shares)) / 2
    return metrics, *shares


@torch.no_grad()
def held_out(model, q, base, task, tokenizer, xs, n, c_base, seed):
    """Likelihood and posterior on n base samples y ~ p_theta(y|x) at test inputs: exact, in nats a solution."""
    xs = [xs[i % len(xs)] for i in range(n)]
    pairs = sample_pairs(base, [tokenizer.prompt(x) for x in xs], torch.Generator().manual_seed(seed))
    logp_y, logq = log_likelihood(model, pairs), q(pairs)  # (N, K)
    logp_z = router_log_probs(model, tokenizer, xs)
    marginal_q = logq.logsumexp(dim=0) - math.log(n)
    reconstruction = losses.reconstruction(logp_y, logq).mean().item()
    strategies = [task.attribute(x, y) for x, y in zip(xs, solutions(tokenizer, pairs))]
    nll, base_nll = -(logp_z + logp_y).logsumexp(dim=1), pairs.b.sum(dim=1)
    valid = torch.tensor([strategy is not None for strategy in strategies])
    choice = logq.argmax(dim=1).tolist()
    both = list(zip(choice, strategies))
    joint = torch.tensor([[both.count((k, s)) / n for s in task.strategies] for k in range(logq.shape[1])])
    return {"nll": nll.mean().item(), "base_nll": base_nll.mean().item(),
            "nll_gap_of_valid": (nll - base_nll)[valid].sum().item() / max(int(valid.sum()), 1),
            "reconstruction": reconstruction, "normalized_reconstruction": reconstruction / c_base,
            "kl": losses.categorical_kl(logq, logp_z).mean().item(),
            "posterior_alignment": one_to_one_matching(joint)[0],
            "posterior_entropy": losses.posterior_entropy(logq).mean().item(),
            "posterior_mutual_information": (-(marginal_q.exp() * marginal_q).sum()
                                             - losses.posterior_entropy(logq).mean()).item()}


def solutions(tokenizer, pairs):
    """The y of every pair, as tokens without </y>."""
    rows = [row[start:] for row, start in zip(pairs.ids.tolist(), pairs.starts.tolist())]
    return [tokenizer.decode(row[:row.index(Y_END)] if Y_END in row else [i for i in row if i != PAD]) for row in rows]


def evaluate(folder, seed=0):
    """Writes metrics.json, result.json and the figures of a run folder; returns the metrics."""
    checkpoint, base, task, tokenizer, model, q = load_run(folder)
    cfg = checkpoint["config"]
    set_threads(cfg["threads"])
    xs = different_inputs(task, cfg["eval_inputs"], test=True)
    metrics, C = controlled(model, task, tokenizer, xs, seed)
    samples = max(cfg["eval_samples"], model.config.n_latents)
    router_metrics, shares, base_shares = router_sampled(model, base, task, tokenizer, xs, samples, seed)
    metrics |= router_metrics
    metrics |= held_out(model, q, base, task, tokenizer, xs, 1024, checkpoint["base"]["c_base"], seed)
    metrics |= {key: value for key, value in checkpoint["last_log"].items() if key.startswith("loss_fraction_")}
    metrics |= {"test_inputs": len(xs), "minutes": checkpoint["minutes"],
                "start_nll_error": checkpoint["start_nll_error"]}
    write_result(folder, cfg, metrics)
    draw_matching(C, task.strategies, os.path.join(folder, "matching.png"))
    draw_training(os.path.join(folder, "log.jsonl"), os.path.join(folder, "training.png"))
    draw_shares(shares, base_shares, task.strategies, os.path.join(folder, "shares.png"))
    for name in ("alignment_one_to_one", "local_strategy_full_coverage_rate", "permutation_gap",
                 "controlled_final_answer_accuracy", "sampled_final_answer_accuracy", "base_final_answer_accuracy",
                 "sampled_strategy_total_variation", "nll", "base_nll", "posterior_alignment", "minutes"):
        print(f"{name:36s} {metrics[name]:.3f}")
    print("z and the strategy it means:", ", ".join(
        f"<z{k + 1}> {'none' if s is None else f'{task.strategies[s]} ({C[k, s]:.2f})'}"
        for k, s in enumerate(one_to_one_matching(C)[1])))
    print(f"wrote {folder}/metrics.json, matching.png, training.png, shares.png", flush=True)
    return metrics


def new_figure(width, height, columns=1):
    from matplotlib.figure import Figure  # here, because training needs no figures
    figure = Figure((width, height), layout="constrained")
    return figure, figure.subplots(1, columns)


def draw_matching(C, strategies, path):
    """Heat map of C[z, s], the share of test inputs on which forced z gives strategy s; the matching is framed."""
    figure, axis = new_figure(1.6 + 1.1 * len(strategies), 1.6 + 0.6 * len(C))
    axis.imshow(C.numpy(), vmin=0, vmax=1, cmap="Blues", aspect="auto")
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
    looks = [e for e in log if "alignment_one_to_one" in e]
    for key, label in (("alignment_one_to_one", "alignment"), ("local_strategy_coverage_mean", "local coverage")):
        axes[2].plot([e["step"] for e in looks], [e[key] for e in looks], marker=".", label=label)
    axes[2].set_ylim(0, 1.02)
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


def show(folder, xs):
    """Prints, for every x, the likeliest trace under every z side by side, with the strategy it follows."""
    _, _, task, tokenizer, model, _ = load_run(folder)
    K = model.config.n_latents
    for x in xs:
        ys = sample_ys(model, tokenizer, [tokenizer.prompt(x, k) for k in range(K)], torch.Generator(), temperature=0)
        columns = [[f"<z{k + 1}> {task.attribute(x, y) or 'no strategy'}"] for k, y in enumerate(ys)]
        for column, y in zip(columns, ys):
            lines = " ".join(y).replace(" ans", "\nans").replace(" ; ", "\n").split("\n")
            column += [line.strip(" ;") for line in lines]
        widths = [max(map(len, column)) for column in columns]
        print(f"\nx = {' '.join(x)}")
        for i in range(max(map(len, columns))):
            print("  " + " | ".join((c[i] if i < len(c) else "").ljust(w) for c, w in zip(columns, widths)).rstrip())


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


def main(argv):
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        sys.exit(0 if argv else 2)
    folder, *flags = argv
    if not os.path.isdir(folder):
        fail(f"run folder '{folder}' does not exist")
    if not flags:
        evaluate(folder)
    for flag in flags:
        key, _, value = flag.partition("=")
        if key == "--x" and value:
            show(folder, [typed_input(folder, value)])
        elif key == "--show" and value.isdigit() and int(value) > 0:
            show(folder, different_inputs(load_run(folder)[2], int(value), test=True))
        else:
            fail(f"unknown or incomplete flag '{flag}'; known: --show=N, --x=\"...\"")


if __name__ == "__main__":
    main(sys.argv[1:])
