"""Writes the tables of the pages from the result files in assets/results, and the figure of all discrete runs.

    python tests/tables.py           # rewrites the pages between their <!-- table: ... --> and <!-- end --> marks

The pages are README.md, assets/results/README.md and tests/README.md. tests/test_readme.py fails while a page and the
result files differ.
"""
import dataclasses
import glob
import json
import os
import re
import statistics
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import factorize
import train_base
from harness import config
from tasks import TASKS

PAGES = ("README.md", os.path.join("assets", "results", "README.md"), os.path.join("tests", "README.md"),
         os.path.join("configs", "README.md"))
# Config keys of older result files, by their present names; None: the key is gone, and the default changes no result.
RENAMED = {"held_steps": "fixed_label_steps", "held_alpha": "fixed_label_power", "look_inputs": "validation_inputs",
           "tiling_weight": "cell_weight", "slot_steps": None, "section_steps": None, "recompute": None,
           "compile": None, "cluster_restarts": None, "prior": None}


def results(pattern):
    """The result files that match, by name."""
    found = {}
    for path in sorted(glob.glob(os.path.join(ROOT, "assets", "results", pattern))):
        with open(path) as f:
            found[os.path.basename(path).removesuffix(".json")] = json.load(f)
    return found


def settings(result):
    """The config of a result file, with the present names of its keys."""
    named = {RENAMED.get(key, key): value for key, value in result["config"].items()}
    return {key: value for key, value in named.items() if key is not None}


def strategies(base):
    """How many strategies the task of a base's config file has."""
    return len(TASKS[config.load(train_base, [os.path.join(ROOT, base.split(" --")[0])]).task].strategies)


def metrics_of(result):
    """The metrics of a result file, with the gaps between the NLLs."""
    m = result["metrics"]
    return m | {f"{name}_gap": m[name] - m["base_nll"] for name in ("nll", "nll_of_mean_router") if name in m}


def by_run(found):
    """The metrics of every seed of a run, by the run's name."""
    runs = {}
    for name, result in found.items():
        runs.setdefault(name.split("_seed")[0], []).append(metrics_of(result))
    return runs


def table(head, rows):
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def each_run(pattern, keys, **more):
    """A table with a row for every result file that matches: its metrics `keys`, empty where it has none, and `more`,
    title -> function of the metrics."""
    def number(m, key):
        digits = 1 if key == "minutes" else 3
        return f"{round(m[key], digits) + 0.0:.{digits}f}" if key in m else ""

    rows = [[name, result["commit"], *(f(result["metrics"]) for f in more.values()),
             *(number(metrics_of(result), key) for key in keys)] for name, result in results(pattern).items()]
    return table(["run", "commit", *more, *keys.values()], rows)


def base_table():
    rows = []
    for name, result in results("bases/*.json").items():
        m = result["metrics"]
        shares = [value for key, value in m.items() if key.startswith("share_")]
        weights = result["config"]["strategy_weights"] or len(shares) * [1]
        error = ("" if isinstance(weights, dict) else  # of every kind its own: pooled shares say nothing
                 f"{max(abs(s - w / sum(weights)) for s, w in zip(shares, weights)):.3f}")
        rows.append([name.replace("_seed", ", seed "), f"{m['floor']:.3f}", f"{m['nll']:.3f}",
                     f"{m['valid_trace_rate']:.3f}", error, f"{m['final_answer_accuracy']:.3f}",
                     f"{m['minutes']:.1f}"])
    head = ["base", "entropy of the mixture", "NLL, test inputs", "valid traces", "largest share error",
            "answer right", "minutes"]
    return table(head, rows)


def mean_and_std(values, digits=3):
    """"0.991 ± 0.002"; a deviation that rounds to 0 is left out."""
    spread = round(statistics.stdev(values), digits) if len(values) > 1 else 0
    mean = round(statistics.mean(values), digits) + 0.0  # no minus before a zero
    return f"{mean:.{digits}f}" + (f" ± {spread:.{digits}f}" if spread else "")


COLUMNS = {"alignment_one_to_one": "alignment", "local_strategy_coverage_mean": "coverage",
           "local_strategy_full_coverage_rate": "full coverage",
           "base_local_strategy_full_coverage_rate": "full coverage, K base samples",
           "permutation_gap": "permutation gap", "latent_purity": "purity",
           "controlled_final_answer_accuracy": "answer right, z forced",
           "sampled_final_answer_accuracy": "answer right, z of router",
           "base_final_answer_accuracy": "answer right, base", "base_nll": "NLL of base", "nll_gap": "NLL gap",
           "nll_gap_of_valid": "NLL gap, valid y", "sampled_strategy_total_variation": "TV", "minutes": "minutes"}
NOT_IN_DISCRETE = {"local_strategy_coverage_mean", "latent_purity"}  # where alignment is near 1 they are, too
NOT_IN_ABLATIONS = {"controlled_final_answer_accuracy", "sampled_final_answer_accuracy", "base_final_answer_accuracy",
                    "base_nll", "nll_gap_of_valid"}
DISCRETE = {"alignment_one_to_one": "alignment", "local_strategy_full_coverage_rate": "full coverage",
            "base_local_strategy_full_coverage_rate": "full coverage, K base samples",
            "exact_alignment": "exact alignment", "exact_alignment_error": "standard error",
            "exact_full_coverage": "exact full coverage", "controlled_final_answer_accuracy": "answer right, z forced",
            "base_final_answer_accuracy": "answer right, base", "base_nll": "NLL of base", "nll_gap": "NLL gap",
            "nll_gap_of_valid": "NLL gap, valid y", "minutes": "minutes"}
FRONT = {"alignment_one_to_one": "alignment", "local_strategy_full_coverage_rate": "full coverage",
         "exact_alignment": "exact alignment", "exact_full_coverage": "exact full coverage",
         "controlled_final_answer_accuracy": "answer right, z forced", "nll_gap": "NLL gap", "minutes": "minutes"}
CUDA_KEYS = ("alignment_one_to_one", "local_strategy_full_coverage_rate", "controlled_final_answer_accuracy", "nll_gap",
             "minutes")
CONTINUOUS = {"posterior_mu_probe_accuracy": "probe, posterior mean", "sampled_z_probe_accuracy": "probe, sampled z",
              "sampled_z_probe_accuracy_control": "probe, permuted labels",
              "local_strategy_full_coverage_rate": "full coverage of 16 z", "centroid_distance": "centroid distance",
              "sampled_final_answer_accuracy": "answer right, z of router",
              "base_final_answer_accuracy": "answer right, base", "base_nll": "NLL of base", "nll_gap": "NLL gap",
              "kl": "KL", "sampled_strategy_total_variation": "TV", "minutes": "minutes"}


VARIED = ("base_conversion", "equation", "grid", "sorting")  # the tasks on which the recipe is taken apart
VARIANTS = {"discrete": "the recipe", "held": "no responsibilities", "full": "backbone of q trained",
            "no_clusters": "no clusters", "no_clusters_full": "no clusters, backbone of q trained",
            "elbo": "the ELBO alone", "elbo_beta_0.03": "the same, beta 0.03", "elbo_beta_0.3": "the same, beta 0.3",
            "elbo_beta_1": "the same, beta 1", "elbo_token_weighted": "the same, tokens weighted",
            "elbo_jsd": "the same, JSD", "elbo_entropy": "the same, entropy of q",
            "elbo_support": "the same, router support", "elbo_marginal": "the same, mean router",
            "elbo_all": "the same, all five losses"}


def variant_of(name):
    """(variant, task) of a result file's name, <task>_<variant>_seed<n>, or None."""
    match = re.fullmatch(rf"({'|'.join(VARIED)})_(.+)_seed\d+", name)
    return (match[2], match[1]) if match and match[2] in VARIANTS else None


def variants_table():
    """The recipe and its variants: how many seeds, what is set otherwise, and on each task alignment and coverage."""
    runs, rows = {}, []
    for name, result in results("earlier/*.json").items():
        if variant_of(name):
            variant, task = variant_of(name)
            runs.setdefault(variant, {}).setdefault(task, []).append(result)

    recipe = {field.name: field.default for field in dataclasses.fields(factorize.Config)}
    no_part = {"base", "name", "seed", "threads", "device", "chunks", "eval_every",  # in what a run finds
               "n_latents"}  # the task's own in every variant

    def flags(variant, result):  # a variant of the ELBO is compared to the ELBO alone
        other = settings(runs["elbo"]["grid"][0]) if variant.startswith("elbo_") else {}
        return " ".join(f"--{key}={value}" for key, value in settings(result).items()
                        if key not in no_part and value != other.get(key, recipe.get(key, value)))

    def cell(found):
        """Alignment, coverage: of one seed after the other, or the means of more than two."""
        both = [[result["metrics"][key] for key in ("alignment_one_to_one", "local_strategy_coverage_mean")]
                for result in found]
        both = [map(statistics.mean, zip(*both))] if len(both) > 2 else both
        return "; ".join(", ".join(f"{value:.2f}" for value in pair) for pair in both)

    for variant, label in VARIANTS.items():
        of_task = runs[variant]
        (flag,) = {flags(variant, result) for found in of_task.values() for result in found}  # a row is of one setting
        seeds = sorted({len(found) for found in of_task.values()})
        rows.append([label, f"`{flag}`" if flag else "", " to ".join(map(str, sorted({seeds[0], seeds[-1]}))),
                     *(cell(of_task.get(task, [])) for task in VARIED)])
    return table(["what", "set otherwise", "seeds", *VARIED], rows)


def of_tasks(kind):
    """The earlier runs of the recipe on the six tasks, by name."""
    return {name: result for name, result in results(f"earlier/*_{kind}_seed*.json").items() if "skewed" not in name}


def runs_table(found, keys):
    """A row for every run: means over its seeds."""
    rows = [[name, str(len(seeds)),
             *(mean_and_std([m[key] for m in seeds], 1 if key == "minutes" else 3) for key in keys)]
            for name, seeds in by_run(found).items()]
    return table(["run", "seeds", *keys.values()], rows)


def front_table():
    """The front page's: a row for every task, what matters most of its discrete runs by the present recipe."""
    of_task = {}
    for name, result in results("tasks/*_discrete_*.json").items():
        of_task.setdefault(name.split("_discrete")[0], []).append(result)
    rows = []
    for task, found in of_task.items():
        ms = [result["metrics"] for result in found]
        ms = [m | {"nll_gap": m["nll"] - m["base_nll"]} for m in ms]
        rows.append([task, str(strategies(found[0]["config"]["base"])), str(len(ms)),
                     *(mean_and_std([m[key] for m in ms], 1 if key == "minutes" else 3) for key in FRONT)])
    return table(["task", "strategies", "runs", *FRONT.values()], rows)


def clusters_table():
    """Share of the responses in the right cluster, K told; which K is found; on how many responses halves agree."""
    mixtures, rows = ("equal", "falling", "own", "reversed", "missing", "rare"), []
    for name, result in results("clusters/*.json").items():
        m = result["metrics"]
        rows.append([name.replace("_seed", ", seed "), *(f"{m[f'kmeans_{key}']:.3f}" for key in ("raw", "centred")),
                     *(f"{m[f'{key}_right']:.3f}, {m[f'{key}_k'] or 'none'}, {m[f'{key}_halves']:.0%}"
                       for key in mixtures)])
    return table(["task", "k-means", "k-means, centred within x", *mixtures], rows)


def shares_table():
    """Runs on bases of unequal shares, which nothing told."""
    return each_run(
        "shares/*_discrete_seed*.json",
        {"alignment_one_to_one": "alignment", "local_strategy_full_coverage_rate": "full coverage",
         "exact_alignment": "exact alignment", "base_kind_information": "information, base",
         "router_kind_information": "information, router", "strategy_total_variation_per_input": "TV per input",
         "nll_gap": "NLL gap", "nll_of_mean_router_gap": "NLL gap, mean router"},
        **{"shares of the clusters": lambda m: " ".join(f"{s:.2f}" for s in m["cluster_shares"]),
           "collide": lambda m: f"{m['cluster_collisions']:.1%}",
           "halves agree": lambda m: f"{m['cluster_halves']:.1%}"})


def traces_table():
    """Runs on files of traces, and what their bases are like."""
    rows, bases = [], {name: result["metrics"] for name, result in results("traces/*_base_seed*.json").items()}
    for name, result in results("traces/*_discrete*_seed*.json").items():
        m, base = result["metrics"], bases[result["base"]["name"] + "_seed0"]
        keys = ("alignment_one_to_one", "local_strategy_full_coverage_rate", "consistency")
        rows.append([name.replace("_seed", ", seed "), f"{base['valid_trace_rate']:.3f}", f"{m['cluster_halves']:.1%}",
                     *(f"{m[key]:.3f}" for key in keys),
                     f"{m['exact_alignment']:.3f} ± {m['exact_alignment_error']:.3f}",
                     f"{round(m['nll'] - m['base_nll'], 3) + 0.0:.3f}", f"{base['minutes']:.0f} + {m['minutes']:.0f}"])
    return table(["run", "valid traces of the base", "halves agree", "alignment", "full coverage", "consistency",
                  "exact alignment, standard error", "NLL gap", "minutes, base + run"], rows)


def draw_alignment_against_coverage(path):
    """Every discrete run, a point: on the diagonal, a latent means the same for every x; below it, latents swap."""
    from harness import figures
    figure, axis = figures.new_figure(6, 4.6)
    axis.plot([0, 1], [0, 1], color="lightgray", zorder=0)
    for label, pattern, color in (("an earlier program", "earlier/*.json", "tab:orange"),
                                  ("other shares, wordings", "shares/*_discrete_*.json", "tab:green"),
                                  ("six tasks, traces from files", "t[ar]*/*_discrete_*.json", "tab:blue")):
        runs = [m for m in map(metrics_of, results(pattern).values()) if "alignment_one_to_one" in m]
        axis.scatter([m["local_strategy_coverage_mean"] for m in runs], [m["alignment_one_to_one"] for m in runs],
                     s=24, alpha=0.7, color=color, label=f"{label} ({len(runs)} runs)")
    axis.set_xlim(0, 1.02)
    axis.set_ylim(0, 1.02)
    axis.set_xlabel("local coverage: strategies shown on an x, over min(K, S)")
    axis.set_ylabel("alignment: the same one for every x")
    axis.legend(fontsize=8, loc="upper left")
    figure.savefig(path, dpi=120)


CHANGES = {"6d471fe": "6400 + 700 steps of 64 records", "1f3e5b1": "9600 + 1700 steps of 32 records"}


def time_table():
    """From nothing to a factorized sorting base: what it took, and what came out, at some commits."""
    rows = []
    for commit, change in CHANGES.items():
        found = results(f"time/{commit}_*.json")
        b, r = (found[f"{commit}_{part}"]["metrics"] for part in ("base", "discrete"))
        rows.append([commit, change, f"{b['minutes']:.1f} + {r['minutes']:.1f}", f"{b['valid_trace_rate']:.3f}",
                     f"{r['alignment_one_to_one']:.3f}", f"{r['local_strategy_full_coverage_rate']:.3f}"])
    return table(["commit", "change", "minutes, base + run", "valid traces", "alignment", "full coverage"], rows)


def faults_table():
    with open(os.path.join(ROOT, "assets", "results", "faults.json")) as f:
        tried = json.load(f)  # written only by a run of tests/kill.py in which nothing was lost
    return table(["fault", "times", "lost"], [[name, str(times), "nothing"] for name, times in tried.items()])


def bench_table(result=None, name="bench"):
    """The result of tests/bench.py; a row's name is 'what was measured: what it was measured against'."""
    if result is None:
        with open(os.path.join(ROOT, "assets", "results", f"{name}.json")) as f:
            result = json.load(f)

    def number(value):
        return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"

    rows = []
    for name, r in result["rows"].items():
        what, against = name.split(": ")
        alone = r["ours"] == r["against"]  # nothing to compare with
        rows.append([what, f"{number(r['ours'])} {r['unit']}", "" if alone else f"{against}: {number(r['against'])}",
                     "" if alone else number(r["ratio"]),
                     f"{number(r['min'])} to {number(r['max'])}" if r["rounds"] > 1 else "", r["bar"]])
    return table(["what", "ours", "against", "ratio", "spread", "bar"], rows)


def steps_table():
    """Seconds a step of factorize.py before the rewrite and after it, stage by stage."""
    with open(os.path.join(ROOT, "assets", "results", "steps.json")) as f:
        stages = json.load(f)["stages"]
    rows = [[name, f"{r['theirs']:.3f}", f"{r['seconds']:.3f}", f"{r['ratio']:.2f}",
             f"{r['min']:.2f} to {r['max']:.2f}"] for name, r in stages.items()]
    return table(["grid, stage", "c6332ee", "8a50f6e", "ratio", "spread"], rows)


def profile_table():
    """What takes 2% or more of a base gradient, or of sampling."""
    with open(os.path.join(ROOT, "assets", "results", "profile.json")) as f:
        shares = json.load(f)["shares"]
    most = {name: max(found.get(name, 0) for found in shares.values()) for found in shares.values() for name in found}
    rows = [[f"`{name}`", *(f"{found.get(name, 0):.0%}" for found in shares.values())]
            for name in sorted(most, key=most.get, reverse=True) if most[name] >= 0.02]
    return table(["operation", *shares], rows)


def without(keys):
    return {key: title for key, title in COLUMNS.items() if key not in keys}


TABLES = {"front": front_table, "tasks": lambda: each_run("tasks/*_discrete_*.json", DISCRETE),
          "continuous": lambda: each_run("tasks/*_continuous_*.json", CONTINUOUS),
          "splits": lambda: each_run("splits/*.json", {"exact_alignment_on_seen": "exact alignment, seen",
                                                       "exact_alignment_on_unseen": "unseen",
                                                       "exact_alignment_error": "standard error of both"}),
          "shares_continuous": lambda: each_run("shares/*_continuous_*.json", CONTINUOUS), "faults": faults_table,
          "bench": bench_table, "steps": steps_table, "optimizer": lambda: bench_table(name="optimizer"),
          "profile": profile_table,
          "base": base_table, "clusters": clusters_table, "shares": shares_table, "traces": traces_table,
          "variants": variants_table, "time": time_table,
          "cuda": lambda: runs_table(results("earlier/cuda/*_discrete_*.json"),
                                     {key: COLUMNS[key] for key in CUDA_KEYS}),
          "discrete": lambda: runs_table(of_tasks("discrete"), without(NOT_IN_DISCRETE)),
          "continuous_before": lambda: runs_table(of_tasks("continuous"), CONTINUOUS),
          "ablations": lambda: runs_table(
              {name: result for name, result in results("earlier/*.json").items()
               if not variant_of(name) and name not in of_tasks("discrete") | of_tasks("continuous")},
              without(NOT_IN_ABLATIONS))}


def filled(page):
    """The text of a page with every marked table replaced by the one its result files give."""
    return re.sub(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)",
                  lambda match: match[1] + TABLES[match[2]]() + "\n" + match[3], page, flags=re.S)


if __name__ == "__main__":
    for page in PAGES:
        path = os.path.join(ROOT, page)
        with open(path) as f:
            text = filled(f.read())
        with open(path, "w") as f:
            f.write(text)
        print(f"{page}: {text.count('<!-- table:')} tables")
    draw_alignment_against_coverage(os.path.join(ROOT, "assets", "alignment_against_coverage.png"))
