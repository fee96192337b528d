"""Evaluate the checkpoints of run.sh in turn and write one JSON per task, then README.md's table from them.

    python results/core/measure.py GLUE_FOLDER OUTPUT_FOLDER     (run.sh's)
    python results/core/measure.py                               (only the table, from the JSON files)

Every method is evaluated on the official development set in float32, batch size 32, batches sorted by length, methods
taking turns; seconds are the median of five turns after one that warms up. Thresholds, FLOPs and metrics are those of
the same evaluation.
"""

import json
import statistics
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from token_pruning.checkpoint import load_model, read_checkpoint
from token_pruning.lab.data import glue_task, load_glue_folder
from token_pruning.lab.evaluation import evaluate
from token_pruning.lab.metrics import compute_metrics
from token_pruning.lab.training.features import collator, tokenize
from token_pruning.lab.training.load import load_tokenizer

HERE = Path(__file__).parent
TASKS = ("RTE", "MRPC", "STSB")
METHODS = {
    "dense": "dense",
    "hard": "LTP, soft then hard",
    "topk": "top-k, keep rate −1",
    "manual": "manual threshold 0.008",
}
TURNS = 5


def measure(task_name: str, glue: Path, runs: Path) -> dict[str, Any]:
    task = glue_task(task_name)
    examples = load_glue_folder(task, glue, need_train=False).validation["validation"]
    models: dict[str, Any] = {}
    for method in METHODS:
        checkpoint = read_checkpoint(runs / task_name / method)
        models[method] = load_model(checkpoint)
        if method != "dense":
            checkpoint.prune(models[method])
    tokenizer = load_tokenizer(checkpoint)
    features = tokenize(tokenizer, examples, models["dense"], 128)
    for feature, label in zip(features, examples.labels or [], strict=True):
        feature["labels"] = label
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    evaluations = {}
    for turn in range(TURNS + 1):
        for method, model in models.items():
            evaluation = evaluate(
                model,
                features,
                collator(tokenizer, False),
                partial(compute_metrics, task),
                batch_size=32,
                progress=False,
            )
            evaluations[method] = evaluation
            if turn:
                seconds[method].append(evaluation.seconds)
    return {
        "task": task_name,
        "best_metric": task.best_metric,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "methods": {
            method: asdict(evaluation) | {"seconds": statistics.median(seconds[method]), "all_seconds": seconds[method]}
            for method, evaluation in evaluations.items()
        },
    }


def table() -> str:
    lines = [
        "| task | method | metric | GFLOPs padded | dense | pruned | relative FLOPs | seconds | speed-up |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for task in TASKS:
        result = json.loads((HERE / f"{task}.json").read_text(encoding="utf-8"))
        dense = result["methods"]["dense"]
        for method, name in METHODS.items():
            row = result["methods"][method]
            gflops = row["gflops_per_example"]
            lines.append(
                f"| {task} | {name} | {100 * row['metrics'][result['best_metric']]:.1f} | {gflops['padded']:.2f} "
                f"| {gflops['dense']:.3f} | {gflops['pruned']:.3f} | {row['relative_flops']:.3f} "
                f"| {row['seconds']:.2f} | {dense['seconds'] / row['seconds']:.2f}× |"
            )
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> None:
    if arguments:
        glue, runs = map(Path, arguments)
        for task in TASKS:
            (HERE / f"{task}.json").write_text(json.dumps(measure(task, glue, runs), indent=2) + "\n", encoding="utf-8")
    page = HERE / "README.md"
    begin, end = "<!-- table -->\n", "<!-- end -->"
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    page.write_text(before + begin + table() + end + rest.partition(end)[2], encoding="utf-8")
    print(table())


if __name__ == "__main__":
    main(sys.argv[1:])
