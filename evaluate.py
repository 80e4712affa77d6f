"""Scores a factorization on test inputs and draws its figures, from its run folder alone.

    python evaluate.py out/sorting_discrete                     # metrics.json, result.json and figures
    python evaluate.py out/sorting_discrete --show=3            # three test inputs, the trace under every z abreast
    python evaluate.py out/sorting_discrete --x="4 2 7 1 3"     # the same for an input of your own
    python evaluate.py out/sorting_discrete --figures           # more figures: traces, training, where the base decides

What is measured is in metrics.py, how it is drawn in figures.py.
"""
import json
import os
import signal
import sys

import torch

import figures
import parallel
from configs import fail
from metrics import (SAMPLES, against_base, centroids, controlled, decodability, different_inputs, held_out, indices,
                     router_sampled, semantics, solutions, strategy_probabilities, total_variation)
from model import GPT, GPTConfig, sample_pairs
from parallel import seeded
from posterior import Posterior, one_to_one_matching
from tasks import Tokenizer
from train_base import build_base, load_checkpoint, sample_ys, write_result


def load_run(folder):
    """Run folder -> (checkpoint, base, task, tokenizer, model, posterior), with the threads of its config in use."""
    checkpoint = load_checkpoint(os.path.join(folder, "ckpt.pt"), "factorization")
    cfg = checkpoint["config"]
    parallel.start(cfg["threads"], "cpu" if cfg["device"] == "cpu" else "auto")
    base, task = build_base(checkpoint["base"])
    model = GPT(GPTConfig(**checkpoint["model_config"]))
    model.load_state_dict(checkpoint["model"])
    K = len(checkpoint["posterior"].get("corners", ())) or model.config.n_latents
    q = Posterior(base, K, z_dim=model.config.z_dim)
    q.load_state_dict(checkpoint["posterior"])
    return checkpoint, base, task, Tokenizer(task.vocab, model.config.n_latents), model, q


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
    samples = SAMPLES if D else max(cfg["eval_samples"], model.config.n_latents)
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
    write_result(folder, cfg, checkpoint["made_with"] | {"base": checkpoint["base"]["config"]}, metrics)
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
        z, _, found = router_sampled(model, task, tokenizer, xs, SAMPLES, generator)
        figures.draw_centroids(q(pairs)[0], labels, z.flatten(0, 1), indices(task, found), task.strategies,
                               path("centroids.png"))
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


def show(run, xs):
    """Prints, for every x, the trace under every z side by side, the likeliest token at a time, with the strategy it
    follows. A continuous z takes the places at which the router's samples have each strategy on average, then those on
    the way between two. run: what load_run returns."""
    _, _, task, tokenizer, model, _ = run
    K = model.config.n_latents
    names, z = [f"<z{k + 1}>" for k in range(K)], None
    if model.config.z_dim:
        found_z, _, found = router_sampled(model, task, tokenizer, different_inputs(task, 32, test=True), SAMPLES,
                                           seeded(0))
        there = [s for s in task.strategies if s in found]
        if not there:
            fail("no z of the router gives any strategy: there is nothing to show")
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


def typed_input(run, text):
    """The input a user typed, as tokens, or one line that says what the task expects."""
    _, _, task, tokenizer, _, _ = run
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
    asked = [flag.partition("=")[::2] for flag in flags]
    for flag, (key, value) in zip(flags, asked):
        complete = {"--show": value.isdecimal() and int(value) > 0, "--x": value, "--figures": not value}
        if not complete.get(key):
            fail(f"unknown or incomplete flag '{flag}'; known: --show=N, --x=\"...\", --figures")
    if not asked:
        evaluate(folder)
    for key, value in asked:
        if key == "--figures":
            draw(folder)
        else:
            run = load_run(folder)
            show(run, [typed_input(run, value)] if key == "--x" else different_inputs(run[2], int(value), test=True))


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
