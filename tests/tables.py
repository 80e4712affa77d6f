"""Fills the README's tables from the result files in assets/results.

    python tests/tables.py           # rewrites README.md between its <!-- table: ... --> marks
"""
import glob
import json
import os
import re

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TASKS = ("summation", "sorting", "grid", "equation", "base_conversion", "addition")


def results(pattern):
    """The result files that match, by name."""
    found = {}
    for path in sorted(glob.glob(os.path.join(ROOT, "assets", "results", pattern))):
        with open(path) as f:
            found[os.path.basename(path).removesuffix(".json")] = json.load(f)
    return found


def table(head, rows):
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def base_table():
    rows = []
    for name, result in results("*_base_seed*.json").items():
        m = result["metrics"]
        shares = [value for key, value in m.items() if key.startswith("share_")]
        rows.append([name.replace("_seed", ", seed "), f"{m['floor']:.3f}", f"{m['nll']:.3f}",
                     f"{m['valid_trace_rate']:.3f}", f"{max(abs(s - 1 / len(shares)) for s in shares):.3f}",
                     f"{m['final_answer_accuracy']:.3f}",
                     f"{m['minutes']:.1f}"])
    head = ["base", "log S", "held-out NLL", "valid traces", "largest share error", "answer right", "minutes"]
    return table(head, rows)


def discrete_rows(pattern):
    rows = []
    for name, result in results(pattern).items():
        m = result["metrics"]
        rows.append([name.replace("_seed", ", seed ").replace("ablations/", ""),
                     *(f"{m[key]:.3f}" for key in (
                         "alignment_one_to_one", "local_strategy_full_coverage_rate", "permutation_gap",
                         "controlled_final_answer_accuracy", "sampled_final_answer_accuracy",
                         "base_final_answer_accuracy", "nll", "base_nll", "sampled_strategy_total_variation")),
                     f"{m['minutes']:.1f}"])
    return table(["run", "alignment", "full coverage", "permutation gap", "answer right, z forced", "router", "base",
                  "NLL", "base NLL", "TV", "minutes"], rows)


TABLES = {"base": base_table, "discrete": lambda: discrete_rows("*_discrete_seed*.json"),
          "ablations": lambda: discrete_rows("ablations/*.json")}


def filled(readme):
    """README text with every marked table replaced by the one its result files give."""
    return re.sub(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)",
                  lambda match: match[1] + TABLES[match[2]]() + "\n" + match[3], readme, flags=re.S)


if __name__ == "__main__":
    path = os.path.join(ROOT, "README.md")
    with open(path) as f:
        text = filled(f.read())
    with open(path, "w") as f:
        f.write(text)
    print(text.count("<!-- table:"), "tables written")
