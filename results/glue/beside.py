"""Methods beside each other from the same dense models: METHOD.md and METHOD.json, out of the runs of runs.py.

python results/glue/beside.py METHOD [RUNS]     (METHOD is elastic, context or mpnet; without RUNS from METHOD.json)
"""

import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

from runs import finished
from table import BUDGETS, HERE, TASKS, points

ALL_BUDGETS = ("0.70", *BUDGETS)
COLUMNS = {
    "elastic": {"budget": "trained for it alone", "elastic": "one checkpoint for all"},
    "context": {
        "searched": "nothing trained",
        "budget": "trained, summary tokens",
        "context": "trained, context",
        "states": "and the teacher's states",
        "continued": "calibrated, then trained",
        "shallow": "the first layers, trained",
    },
    "mpnet": {"context": "trained, context", "topk": "top-k"},
}


def gather(runs: Path, methods: list[str]) -> list[dict[str, Any]]:
    """Per task and seed, points of every run, and its FLOPs relative to the dense model's."""
    found = []
    for task in TASKS:
        for folder in sorted((runs / task).glob("seed*")):
            results = {
                file.parent.name: json.loads(file.read_text(encoding="utf-8"))
                for file in folder.glob("*/eval_results.json")
                if finished(file.parent)
            }
            if "dense" not in results:
                continue
            whole = results["dense"]["gflops_per_example"]["dense"]
            wanted = ["dense", *(f"{method}-{budget}" for budget in ALL_BUDGETS for method in methods)]
            cells = {
                name: [points(task, results[name]), results[name]["gflops_per_example"]["pruned"] / whole]
                for name in wanted
                if name in results
            }
            if cells.keys() - {"dense"}:
                seed, dtype = folder.name.removeprefix("seed"), results["dense"]["dtype"].partition(" ")[0]
                found.append({"task": task, "seed": seed, "dtype": dtype, "runs": cells})
    return found


def means(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows over the seeds of a task, where there are several: the mean of each run that all of them have."""
    kinds: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for each in found:
        kinds.setdefault((each["task"], each["dtype"]), []).append(each)
    rows = []
    for (task, dtype), own in kinds.items():
        if len(own) > 1:
            shared = set.intersection(*(set(each["runs"]) for each in own))
            runs = {name: [mean(each["runs"][name][i] for each in own) for i in (0, 1)] for name in shared}
            rows.append({"task": task, "seed": f"mean of {len(own)}", "dtype": dtype, "runs": runs})
    return rows


def table(found: list[dict[str, Any]], columns: dict[str, str]) -> str:
    """Points lost, and in brackets relative FLOPs."""
    head = ["task", "seed", "trained in", "dense", "budget", *columns.values()]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for each in [*found, *means(found)]:
        dense = each["runs"]["dense"][0]
        for budget in ALL_BUDGETS:
            runs = [each["runs"].get(f"{method}-{budget}") for method in columns]
            if any(runs):
                cells = [f"{dense - run[0]:+.1f} ({run[1]:.3f})".replace("-", "−") if run else "–" for run in runs]
                what = f"{each['task']} | {each['seed']} | {each['dtype']} | {dense:.1f} | {budget}"
                lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    method, *runs = sys.argv[1:]
    data = HERE / f"{method}.json"
    if runs:
        new = gather(Path(runs[0]), list(COLUMNS[method]))
        kept = json.loads(data.read_text(encoding="utf-8")) if data.exists() else []
        rows = {(each["task"], each["dtype"], each["seed"]): each for each in [*kept, *new]}
        data.write_text(json.dumps([rows[key] for key in sorted(rows)], indent=1) + "\n", encoding="utf-8")
    everything = json.loads(data.read_text(encoding="utf-8"))
    (HERE / f"{method}.md").write_text(table(everything, COLUMNS[method]), encoding="utf-8")
