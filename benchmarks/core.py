"""Dense against pruned on the clock: evaluation of a data set, and a training step.

    python benchmarks/core.py --pruned CKPT_HARD --task MRPC --data-dir GLUE --output results/core/speed-mrpc
    python benchmarks/core.py        # what `make demo` trained, on its docstrings

Everything computes with the same weights, those of the pruned checkpoint, on the same examples. Variants take turns
within one run; the first turn warms up and is not counted. Medians, with the fastest and slowest turn.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from output import write

import token_pruning as tp
from token_pruning.checkpoint import load_model, read_checkpoint
from token_pruning.engine.machine import cpu_name, has_amx
from token_pruning.lab.data import glue_task, load_docstrings, load_glue_folder
from token_pruning.lab.evaluation import predict
from token_pruning.lab.training.features import collator, tokenize
from token_pruning.lab.training.load import load_tokenizer

DTYPES = ("float32", "bfloat16 autocast", "bfloat16")


def variants(checkpoint: Any, dtype: str) -> dict[str, Any]:
    """The model dense as transformers runs it, dense without padding, and pruned."""
    weights = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    models = {name: load_model(checkpoint, dtype=weights) for name in ("dense", "dense, packed", "pruned")}
    tp.prune(models["dense, packed"], tp.Unpruned())
    checkpoint.prune(models["pruned"])
    return models


def measure(runs: dict[str, Callable[[int], float]], turns: int) -> dict[str, dict[str, float]]:
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns + 1):
        for name, run in runs.items():
            took = run(turn)
            if turn:
                seconds[name].append(took)
    reference = statistics.median(seconds["dense"])
    return {
        name: {
            "median": statistics.median(values),
            "fastest": min(values),
            "slowest": max(values),
            "speed_up": reference / statistics.median(values),
        }
        for name, values in seconds.items()
    }


def evaluation(checkpoint: Any, features: list[Any], tokenizer: Any, dtype: str, size: int, turns: int) -> Any:
    def run(model: Any) -> Callable[[int], float]:
        collate, bf16 = collator(tokenizer, dtype != "float32"), dtype == "bfloat16 autocast"
        return lambda turn: predict(model, features, collate, batch_size=size, bf16=bf16, progress=False).seconds

    return measure({name: run(model) for name, model in variants(checkpoint, dtype).items()}, turns)


def training(checkpoint: Any, features: list[Any], tokenizer: Any, dtype: str, size: int, turns: int) -> Any:
    """Seconds of one step (forward, backward, AdamW), each turn on the next batch of the shuffled training set."""
    collate = collator(tokenizer, dtype != "float32")

    def run(model: Any) -> Callable[[int], float]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
        model.train()

        def step(turn: int) -> float:
            start = turn * size % (len(features) - size)
            batch = collate(features[start : start + size])
            began = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16 autocast"):
                loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return time.perf_counter() - began

        return step

    return measure({name: run(model) for name, model in variants(checkpoint, dtype).items()}, turns)


def markdown(result: dict[str, Any]) -> str:
    about = result["about"]
    lines = [
        f"{about['examples']} examples of {about['data']}, {about['mean_tokens']:.1f} valid tokens on average; "
        f"relative FLOPs of the pruned model {about['relative_flops']:.3f}. "
        f"{about['cpu']}, {about['threads']} threads, batch size {about['batch_size']}, "
        f"torch {about['torch']}, transformers {about['transformers']}. Medians of {about['turns']} turns.",
        "",
        "| what | dtype | variant | seconds (fastest – slowest) | speed-up over dense |",
        "|---|---|---|---|---|",
    ]
    for what in ("evaluation", "training step"):
        for dtype, rows in result[what].items():
            lines += [
                f"| {what} | {dtype} | {name} | {row['median']:.3f} ({row['fastest']:.3f} – {row['slowest']:.3f}) "
                f"| {row['speed_up']:.2f}× |"
                for name, row in rows.items()
            ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pruned", type=Path, default=Path("demo_output/hard"), help="a hard-pruned checkpoint")
    parser.add_argument("--task", help="a GLUE task (default: the demo's docstrings)")
    parser.add_argument("--data-dir", type=Path, help="folder in the official GLUE layout")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    transformers.logging.disable_progress_bar()
    checkpoint = read_checkpoint(arguments.pruned)
    tokenizer = load_tokenizer(checkpoint)
    data = load_glue_folder(glue_task(arguments.task), arguments.data_dir) if arguments.task else load_docstrings()
    model = checkpoint.prune(load_model(checkpoint))
    held_out = tokenize(tokenizer, data.validation["validation"], model, 128)
    with tp.record(model) as trace:
        predict(model, held_out, collator(tokenizer, False), batch_size=32, progress=False)
    train = tokenize(tokenizer, data.train, model, 128)
    for feature, label in zip(train, data.train.labels, strict=True):
        feature["labels"] = label
    train = [train[i] for i in torch.randperm(len(train)).tolist()]

    sizes = {"size": arguments.batch_size, "turns": arguments.turns}
    result: dict[str, Any] = {
        "about": {
            "data": f"{arguments.task}'s development set" if arguments.task else "the docstring task's held-out part",
            "examples": len(held_out),
            "mean_tokens": sum(len(feature["input_ids"]) for feature in held_out) / len(held_out),
            "relative_flops": tp.count_flops(model, trace).relative,
            "cpu": cpu_name() + (", AMX" if has_amx() else ""),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "batch_size": arguments.batch_size,
            "turns": arguments.turns,
        },
        "evaluation": {dtype: evaluation(checkpoint, held_out, tokenizer, dtype, **sizes) for dtype in DTYPES},
        "training step": {dtype: training(checkpoint, train, tokenizer, dtype, **sizes) for dtype in DTYPES[:2]},
    }
    print(markdown(result))
    if arguments.output:
        write(result, markdown(result), arguments.output)


if __name__ == "__main__":
    try:
        main()
    except tp.TokenPruningError as error:
        sys.exit(f"error: {error}")
