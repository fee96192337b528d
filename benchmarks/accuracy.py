"""The engine's metrics on GLUE development sets, by dtype, beside the model in float32.

    python benchmarks/accuracy.py GLUE RUNS

RUNS has folders TASK/dense and, of the same task, TASK/hard (LTP, as run.sh of results/core makes it) or
TASK/calibrated.

It writes ``accuracy.json`` and ``accuracy.md`` to this machine's folder in ``results/cpu``.

*Kept alike*: the part of all (layer, token) decisions on which the engine and the float32 model agree, over tokens that
entered the layer in both.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from hardware import RESULTS, refuse_others, this_machine
from output import command, write

import token_pruning as tp
from token_pruning.checkpoint import load_model, read_checkpoint
from token_pruning.lab.data import glue_task, load_glue_folder
from token_pruning.lab.metrics import compute_metrics
from token_pruning.lab.training.features import collator, tokenize
from token_pruning.lab.training.load import load_tokenizer

TASKS = ("RTE", "MRPC", "STSB", "SST2")
STAGES = {"dense": "dense", "hard": "pruned (LTP)", "calibrated": "pruned (calibrated)"}
DTYPES = ("float32", "bfloat16", "int8")


def run(call: Any, batches: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and the layers each token survived."""
    with torch.inference_mode(), tp.record(call) as trace:
        logits = torch.cat([call(**batch).logits.float() for batch in batches])
    return logits, torch.cat(trace.survived_layers)


def agreement(ours: torch.Tensor, theirs: torch.Tensor, layers: int) -> float:
    alike = entered = 0
    for layer in range(layers):
        both = (ours >= layer) & (theirs >= layer)
        entered += int(both.sum())
        alike += int((both & ((ours > layer) == (theirs > layer))).sum())
    return alike / entered


def measure(task_name: str, glue: Path, runs: Path) -> dict[str, Any]:
    task = glue_task(task_name)
    examples = load_glue_folder(task, glue, need_train=False).validation["validation"]
    result: dict[str, Any] = {"metric": task.best_metric, "examples": len(examples.labels or [])}
    for stage in STAGES:
        if not (runs / task_name / stage).is_dir():
            continue
        checkpoint = read_checkpoint(runs / task_name / stage)
        tokenizer = load_tokenizer(checkpoint)
        model = load_model(checkpoint)
        features = tokenize(tokenizer, examples, model, 128)
        checkpoint.prune(model, tp.Unpruned() if stage == "dense" else None)
        collate = collator(tokenizer, False)
        batches = [dict(collate(features[i : i + 32])) for i in range(0, len(features), 32)]

        def score(logits: torch.Tensor) -> float:
            return compute_metrics(task, logits.numpy(), examples.labels)[task.best_metric] * 100

        logits, survived = run(model, batches)
        rows = {"model, float32": {"metric": score(logits)}}
        for dtype in DTYPES:
            ours, kept = run(tp.compile(model, dtype), batches)
            rows[f"engine, {dtype}"] = {
                "metric": score(ours),
                "kept_alike": agreement(kept, survived, model.config.num_hidden_layers),
                "logit_difference": ((ours - logits).abs().max() / logits.abs().max()).item(),
            }
        result[stage] = rows
    return result


def table(result: dict[str, Any]) -> str:
    about = result["about"]
    lines = [
        f"{about['cpu']}, {'with' if about['amx'] else 'without'} AMX; torch {about['torch']}, transformers "
        f"{about['transformers']}. Change of the metric in points against the model in float32.",
        "",
        "| task | checkpoint | model, float32 | engine, float32 | bfloat16 | int8 | kept alike, same order |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, task in result["tasks"].items():
        for stage in filter(task.get, STAGES):
            rows = task[stage]
            reference = rows["model, float32"]["metric"]
            ours = [rows[f"engine, {dtype}"] for dtype in DTYPES]
            changes = [f"{row['metric']:.2f} ({row['metric'] - reference:+.2f})" for row in ours]
            alike = ", ".join(f"{row['kept_alike']:.2%}" for row in ours) if stage != "dense" else ""
            lines.append(f"| {name} | {STAGES[stage]} | {reference:.2f} | {' | '.join(changes)} | {alike} |")
    return "\n".join([*lines, "", "```bash", about["command"], "```", ""])


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    output = RESULTS / this_machine()["machine"] / "accuracy"
    path = output.with_suffix(".json")
    if path.exists():
        refuse_others(json.loads(path.read_text(encoding="utf-8"))["about"], path)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    glue, runs = Path(sys.argv[1]), Path(sys.argv[2])
    tasks = [name for name in TASKS if (runs / name / "dense").is_dir()]
    if not tasks:
        sys.exit(f"error: {runs} has no folder TASK/dense; TASK is one of {', '.join(TASKS)}")
    result = {
        "about": {
            **this_machine(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "command": command({"GLUE": glue, "RUNS": runs}),
        },
        "tasks": {name: measure(name, glue, runs) for name in tasks},
    }
    write(result, table(result), output)
    print(table(result))


if __name__ == "__main__":
    try:
        main()
    except tp.TokenPruningError as error:
        sys.exit(f"error: {error}")
