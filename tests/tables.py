"""Writes the tables of the three pages from the result files in assets/results, and the figure of all discrete runs.

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


def by_run(found):
    """The metrics of every seed of a run, by the run's name, with the gap between the two NLLs."""
    runs = {}
    for name, result in found.items():
        m = result["metrics"]
        runs.setdefault(name.split("_seed")[0], []).append(m | {"nll_gap": m["nll"] - m["base_nll"]})
    return runs


def table(head, rows):
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def base_table():
    rows = []
    for name, result in (results("*_base_seed*.json") | results("bases/*.json")).items():
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
           "nll_gap_of_valid": "NLL gap, valid y", "sampled_strategy_total_variation": "TV"}
NOT_IN_RESULTS = {"local_strategy_coverage_mean", "latent_purity"}  # where alignment is near 1 they are, too
NOT_IN_ABLATIONS = {"controlled_final_answer_accuracy", "sampled_final_answer_accuracy", "base_final_answer_accuracy",
                    "base_nll", "nll_gap_of_valid"}
FRONT = {"alignment_one_to_one": "alignment", "local_strategy_full_coverage_rate": "full coverage",
         "exact_alignment": "exact alignment", "exact_full_coverage": "exact full coverage",
         "controlled_final_answer_accuracy": "answer right, z forced", "nll_gap": "NLL gap", "minutes": "minutes"}
CUDA_KEYS = ("alignment_one_to_one", "local_strategy_full_coverage_rate", "controlled_final_answer_accuracy", "nll_gap")
CONTINUOUS = {"posterior_mu_probe_accuracy": "probe, posterior mean", "sampled_z_probe_accuracy": "probe, sampled z",
              "sampled_z_probe_accuracy_control": "probe, permuted labels",
              "local_strategy_full_coverage_rate": "full coverage of 16 z", "centroid_distance": "centroid distance",
              "sampled_final_answer_accuracy": "answer right, z of router",
              "base_final_answer_accuracy": "answer right, base", "base_nll": "NLL of base", "nll_gap": "NLL gap",
              "kl": "KL", "sampled_strategy_total_variation": "TV"}


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
    for name, result in (results("*_discrete_seed*.json") | results("ablations/*.json")).items():
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


def runs_table(found, keys):
    rows = [[name, str(len(seeds)), *(mean_and_std([m[key] for m in seeds]) for key in keys),
             mean_and_std([m["minutes"] for m in seeds], 1)] for name, seeds in by_run(found).items()]
    return table(["run", "seeds", *keys.values(), "minutes"], rows)


def tasks_table():
    """Runs of the present recipe."""
    rows = []
    for name, result in results("tasks/*_discrete_*.json").items():
        m = result["metrics"]
        values = [m[key] for key in ("alignment_one_to_one", "local_strategy_full_coverage_rate", "exact_alignment",
                                     "exact_alignment_error", "exact_full_coverage")]
        values += [m["nll"] - m["base_nll"], m["nll_gap_of_valid"]]
        rows.append([name, result["commit"], *(f"{round(value, 3) + 0.0:.3f}" for value in values),
                     f"{m['minutes']:.1f}"])
    return table(["run", "commit", "alignment", "full coverage", "exact alignment", "standard error",
                  "exact full coverage", "NLL gap", "NLL gap, valid y", "minutes"], rows)


def rewrite_table():
    """Runs of the program after its rewrite; a cell is empty where a number has no meaning for the kind of z."""
    keys = {"alignment_one_to_one": "alignment", "sampled_z_probe_accuracy": "probe, sampled z",
            "local_strategy_full_coverage_rate": "full coverage", "nll_gap": "NLL gap",
            "nll_gap_of_valid": "NLL gap, valid y"}
    found = results("rewrite/*_continuous_seed*.json") | results("rewrite/*_discrete_seed*.json")
    rows = [[name, found[f"{name}_seed0"]["commit"], *(f"{m[key]:.3f}" if key in m else "" for key in keys)]
            for name, (m,) in by_run(found).items()]
    return table(["run, seed 0", "commit", *keys.values()], rows)


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


def two_tasks_table():
    keys = ("alignment_one_to_one", "local_strategy_full_coverage_rate", "latent_purity",
            "controlled_final_answer_accuracy")
    rows = [[str(result["config"]["n_latents"] or 3), task, *(f"{m[key]:.3f}" for key in keys)]
            for result in results("two_tasks/*.json").values() for task, m in result["metrics"].items()]
    return table(["K", "inputs of", *(COLUMNS[key] for key in keys)], rows)


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
    rows = []
    for name, result in results("shares/*_discrete_seed*.json").items():
        m = result["metrics"]
        keys = ("alignment_one_to_one", "local_strategy_full_coverage_rate", "base_kind_information",
                "router_kind_information", "strategy_total_variation_per_input")
        rows.append([name.replace("_seed", ", seed "), " ".join(f"{s:.2f}" for s in m["cluster_shares"]),
                     f"{m['cluster_collisions']:.1%}", f"{m['cluster_halves']:.1%}",
                     *(f"{round(value, 3) + 0.0:.3f}" for value in (
                         *map(m.get, keys), m["nll"] - m["base_nll"], m["nll_of_mean_router"] - m["base_nll"]))])
    return table(["run", "shares of the clusters", "collide", "halves agree", "alignment", "full coverage",
                  "information, base", "information, router", "TV per input", "NLL gap", "NLL gap, mean router"], rows)


def traces_table():
    """Runs on files of traces, and what their bases are like."""
    rows, bases = [], {name: result["metrics"] for name, result in results("traces/*_base_seed*.json").items()}
    for name, result in results("traces/*_discrete*_seed*.json").items():
        m, base = result["metrics"], bases[name.split("_discrete")[0] + "_base_seed0"]
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
    for label, pattern, color in (("ablations, other K, skewed mixture", "ablations/*.json", "tab:orange"),
                                  ("default recipe, K = S", "*_discrete_seed*.json", "tab:blue")):
        runs = [result["metrics"] for result in results(pattern).values()]
        axis.scatter([m["local_strategy_coverage_mean"] for m in runs], [m["alignment_one_to_one"] for m in runs],
                     s=24, alpha=0.7, color=color, label=f"{label} ({len(runs)} runs)")
    axis.set_xlim(0, 1.02)
    axis.set_ylim(0, 1.02)
    axis.set_xlabel("local coverage: strategies shown on an x, over min(K, S)")
    axis.set_ylabel("alignment: the same one for every x")
    axis.legend(fontsize=8, loc="upper left")
    figure.savefig(path, dpi=120)


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


TABLES = {"front": front_table, "tasks": tasks_table, "rewrite": rewrite_table, "faults": faults_table,
          "bench": bench_table, "steps": steps_table, "optimizer": lambda: bench_table(name="optimizer"),
          "profile": profile_table,
          "base": base_table, "clusters": clusters_table, "shares": shares_table, "traces": traces_table,
          "variants": variants_table, "two_tasks": two_tasks_table,
          "discrete": lambda: runs_table(results("*_discrete_seed*.json"), without(NOT_IN_RESULTS)),
          "continuous": lambda: runs_table(results("*_continuous_seed*.json"), CONTINUOUS),
          "cuda": lambda: runs_table(results("cuda/*_discrete_*.json"), {key: COLUMNS[key] for key in CUDA_KEYS}),
          "ablations": lambda: runs_table({name: result for name, result in results("ablations/*.json").items()
                                           if not variant_of(name)}, without(NOT_IN_ABLATIONS))}


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
