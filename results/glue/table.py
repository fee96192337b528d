"""Gather the runs of runs.py into JSON, and make README.md's tables and the figure from that.

    python results/glue/table.py RUNS_FOLDER     (gather, then tables and figure)
    python results/glue/table.py                 (tables and figure from the JSON files)

One JSON per task and seed: every run's command, options and evaluation on the official development set.
"""

import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from runs import finished

from token_pruning.lab.data import glue_task
from token_pruning.lab.sweep.report import Row, TaskResults, pareto_plot

HERE = Path(__file__).parent
TASKS = ("RTE", "MRPC", "STSB", "SST2")
BUDGETS = ("0.50", "0.35", "0.25")
OVER = 0.01  # a budget and so much more is within it
METHODS = {
    "budget": "budget (ours)",
    "budget-all": "the same, all tokens enter",
    "topk": "top-k",
    "manual": "manual thresholds",
    "manual-within": "the same, within the budget",
    "ltp": "published LTP",
}
CALIBRATED = ("0.70", "0.50")
UNTRAINED = {
    "calibrated-{}": "calibrated (ours)",
    "calibrated-all-{}": "the same, all tokens enter",
    "topk-{}-untrained": "top-k",
    "manual-{}-untrained": "manual thresholds",
    "budget-{}": "budget (ours), trained",
    "ltp-{}": "published LTP, trained",
}
Runs = dict[str, dict[str, Any]]


def gather(runs: Path) -> None:
    """Runs that the folder lacks stay as they are where its dense model is the one they started from."""
    for task in TASKS:
        for folder in sorted((runs / task).glob("seed*")):
            found = {}
            for evaluation in sorted(folder.glob("*/eval_results.json")):
                run = evaluation.parent
                command = (run / "command.txt").read_text(encoding="utf-8").strip()
                result = json.loads(evaluation.read_text(encoding="utf-8"))
                for name in ("checkpoint", "other_splits"):
                    result.pop(name, None)
                if not finished(run):
                    continue
                command = re.sub(r"--data-dir \S+", "--data-dir GLUE", command.replace(str(runs), "RUNS"))
                command = re.sub(r"--restore (?!RUNS)\S+", "--restore MINILM", command)
                found[run.name] = {"command": command, **result}
            if "dense" not in found:
                continue
            file = HERE / f"{task}-{folder.name}.json"
            before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else found
            if before["dense"]["metrics"] == found["dense"]["metrics"]:
                found = before | found
            file.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def load() -> dict[str, list[Runs]]:
    """Per task, the runs of each seed by name."""
    return {
        task: [json.loads(file.read_text(encoding="utf-8")) for file in sorted(HERE.glob(f"{task}-seed*.json"))]
        for task in TASKS
    }


def points(task: str, run: dict[str, Any]) -> float:
    return 100 * float(run["metrics"][glue_task(task).best_metric])


def drops(task: str, seeds: list[Runs], name: str) -> list[tuple[float, float]]:
    """Points lost against the dense model of the same seed, and relative FLOPs.

    Of LTP the best run in budget; of manual thresholds "within" the second try where the first costs too much.
    """
    found = []
    for runs in seeds:
        run = runs.get(name) or best_ltp(task, runs, name) or manual_within(runs, name)
        if run is not None:
            found.append((points(task, runs["dense"]) - points(task, run), run["relative_flops"]))
    return found


def manual_within(runs: Runs, name: str) -> dict[str, Any] | None:
    """The first of a budget's two runs that costs no more than it."""
    method, _, budget = name.rpartition("-")
    if method != "manual-within":
        return None
    tries = [runs[key] for key in (f"manual-{budget}", f"manual-{budget}-again") if key in runs]
    return next((run for run in tries if run["relative_flops"] <= float(budget) + OVER), None)


def best_ltp(task: str, runs: Runs, name: str) -> dict[str, Any] | None:
    """LTP cannot be asked for a budget: the best run of its grid that is within it, best on the development set."""
    method, _, budget = name.rpartition("-")
    within = [
        run
        for key, run in runs.items()
        if method == "ltp" and key.startswith("ltp-") and not key.endswith("soft")
        if run["relative_flops"] <= float(budget) + OVER
    ]
    return max(within, key=lambda run: points(task, run), default=None)


def cell(found: list[tuple[float, float]], seeds: int) -> str:
    if not found:
        return "–"
    lost = [drop for drop, _ in found]
    spread = f" ± {statistics.stdev(lost):.1f}" if len(lost) > 1 else ""
    of = f", {len(found)} of {seeds}" if len(found) < seeds else ""
    cost = statistics.mean(cost for _, cost in found)
    return f"{statistics.mean(lost):+.1f}{spread} ({cost:.3f}{of})".replace("-", "−")


def rows(everything: dict[str, list[Runs]], names: dict[str, str]) -> list[str]:
    lines = []
    for key, label in names.items():
        per_task = [drops(task, seeds, key) for task, seeds in everything.items()]
        means = [statistics.mean(drop for drop, _ in found) for found in per_task if found]
        mean = f"{statistics.mean(means):+.1f}".replace("-", "−") if means and len(means) == len(per_task) else "–"
        cells = [cell(found, len(seeds)) for found, seeds in zip(per_task, everything.values(), strict=True)]
        lines.append(f"| {label} | " + " | ".join(cells) + f" | {mean} |")
    return lines


def tables(everything: dict[str, list[Runs]]) -> str:
    rule = "|" + "---|" * (len(everything) + 2)
    text = ["| | " + " | ".join(everything) + " |", "|" + "---|" * (len(everything) + 1)]
    dense = []
    for task, seeds in everything.items():
        values = [points(task, runs["dense"]) for runs in seeds]
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        dense.append(f"{statistics.mean(values):.1f}{spread}")
    text += [
        "| dense | " + " | ".join(dense) + " |",
        "| seeds | " + " | ".join(str(len(seeds)) for seeds in everything.values()) + " |",
    ]
    head = "| method | " + " | ".join(everything) + " | mean loss |"
    for budget in CALIBRATED:
        named = {name.format(budget): label for name, label in UNTRAINED.items()}
        if budget in BUDGETS:  # its own table follows
            del named[f"budget-{budget}"]
        text += ["", f"Relative FLOPs ≤ {budget}, nothing trained:", "", head, rule, *rows(everything, named)]
    for budget in BUDGETS:
        named = {f"{method}-{budget}": label for method, label in METHODS.items()}
        text += ["", f"Relative FLOPs ≤ {budget}:", "", head, rule, *rows(everything, named)]
    columns = " | ".join(everything)
    text += ["", "Budgets asked, and what the development sets cost (lowest and highest of all seeds):", ""]
    text += [f"| budget | {columns} |", rule.removesuffix("---|"), *asked_and_found(everything)]
    text += ["", "Published LTP, by λ and temperature (seed 0; SST-2's seed is 42):", ""]
    text += [f"| λ, T | {columns} |", rule.removesuffix("---|"), *ltp_grid(everything)]
    return "\n".join(text)


def asked_and_found(everything: dict[str, list[Runs]]) -> list[str]:
    lines = []
    for name in (
        *(f"calibrated-{budget}" for budget in CALIBRATED),
        *(f"budget-{budget}" for budget in ("0.70", *BUDGETS)),
    ):
        cells, asked = [], ""
        for seeds in everything.values():
            found = [runs[name] for runs in seeds if name in runs]
            asked = next((re.findall(r"--target-flops (\S+)", run["command"])[0] for run in found), asked)
            costs = sorted(run["relative_flops"] for run in found)
            cells.append(f"{costs[0]:.3f} to {costs[-1]:.3f}" if len(costs) > 1 else "".join(f"{x:.3f}" for x in costs))
        lines.append(f"| {asked}, {name.partition('-')[0]} | " + " | ".join(cell or "–" for cell in cells) + " |")
    return lines


def ltp_grid(everything: dict[str, list[Runs]]) -> list[str]:
    first = {task: seeds[:1] for task, seeds in everything.items()}
    settings = {
        name: (float(strength), float(temperature or 1e-3))
        for seeds in first.values()
        for runs in seeds
        for name in runs
        for strength, temperature in re.findall(r"^ltp-([\d.]+)(?:-T([\d.]+))?$", name)
    }
    return [
        f"| {strength:g}, {temperature:g} | "
        + " | ".join(cell(drops(task, seeds, name), 1) for task, seeds in first.items())
        + " |"
        for name, (strength, temperature) in sorted(settings.items(), key=lambda item: item[1])
    ]


def figure(everything: dict[str, list[Runs]]) -> None:
    """Means over seeds, as the tables have them."""
    panels = []
    for task, seeds in everything.items():
        dense = statistics.mean(points(task, runs["dense"]) for runs in seeds)
        shown = sorted({name for runs in seeds for name in runs} - {"dense"})
        rows = []
        for number, name in enumerate(shown):
            if name.startswith("short") or name.endswith(("soft", "untrained")) or "-all-" in name:
                continue
            found = drops(task, seeds, name)
            metric, cost = dense - statistics.mean(x for x, _ in found), statistics.mean(x for _, x in found)
            rows.append(Row(number, name.split("-")[0], "complete", metric / 100, cost, None, {}))
        panels.append(TaskResults(task, glue_task(task).best_metric, dense / 100, rows))
    (HERE / "pareto.png").write_bytes(pareto_plot(panels))


def main() -> None:
    if len(sys.argv) > 1:
        gather(Path(sys.argv[1]))
    everything = {task: seeds for task, seeds in load().items() if seeds}
    readme = HERE / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition("<!-- tables -->")
    _, _, after = rest.partition("<!-- end -->")
    text = f"{before}<!-- tables -->\n{tables(everything)}\n<!-- end -->{after}"
    readme.write_text(text, encoding="utf-8")
    figure(everything)


if __name__ == "__main__":
    main()
