"""One checkpoint for three budgets beside three checkpoints: elastic.md and elastic.json, out of the runs of runs.py.

python results/glue/runs.py GLUE_FOLDER RUNS --tasks STSB --seeds 0 --methods dense budget elastic --dtype float32
python results/glue/elastic.py RUNS
"""

import json
import sys
from pathlib import Path
from typing import Any

from table import BUDGETS, HERE, TASKS, points


def result(folder: Path) -> dict[str, Any] | None:
    file = folder / "eval_results.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def gather(runs: Path) -> list[dict[str, Any]]:
    """Per task and seed, points and relative FLOPs of every run."""
    found = []
    for task in TASKS:
        for folder in sorted((runs / task).glob("seed*")):
            names = ["dense", *(f"{method}-{budget}" for budget in BUDGETS for method in ("budget", "elastic"))]
            results = {name: each for name in names if (each := result(folder / name)) is not None}
            if any(name.startswith("elastic") for name in results):
                cells = {name: [points(task, each), each["relative_flops"]] for name, each in results.items()}
                found.append({"task": task, "seed": folder.name.removeprefix("seed"), "runs": cells})
    return found


def table(found: list[dict[str, Any]]) -> str:
    lines = ["| task | seed | dense | budget | trained for it alone | one checkpoint for all | difference |"]
    lines.append("|" + "---|" * 7)
    for each in found:
        for budget in BUDGETS:
            alone, elastic = each["runs"].get(f"budget-{budget}"), each["runs"].get(f"elastic-{budget}")
            cells = [f"{run[0]:.1f} ({run[1]:.3f})" if run else "–" for run in (alone, elastic)]
            difference = f"{elastic[0] - alone[0]:+.1f}".replace("-", "−") if alone and elastic else "–"
            dense = f"{each['runs']['dense'][0]:.1f}"
            lines.append(
                f"| {each['task']} | {each['seed']} | {dense} | {budget} | {' | '.join(cells)} | {difference} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    everything = gather(Path(sys.argv[1]))
    (HERE / "elastic.json").write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    (HERE / "elastic.md").write_text(table(everything), encoding="utf-8")
