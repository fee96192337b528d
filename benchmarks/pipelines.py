"""Seconds of transformers pipelines with the dense model, the pruned model and engines inside.

    python benchmarks/pipelines.py --threads 1 --output results/pipelines/pipelines

The model is all-MiniLM-L6-v2 with a head of random weights, on which speed does not depend, calibrated to
--target-flops. The texts are docstrings of Python's library, put together and cut to lengths between --shortest and
--longest tokens, evenly spread. All rows of a table take turns in one process (A B C A B C) on the same texts;
tokenizing and what a pipeline makes of logits are included. Medians, and medians of the passes' ratios.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import comparison
import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from output import spread

import token_pruning as tp
from token_pruning.engine.machine import has_amx
from token_pruning.lab.data import find_minilm
from token_pruning.lab.data.docstrings import load_docstrings

HEADS = {
    "text-classification": transformers.AutoModelForSequenceClassification,
    "token-classification": transformers.AutoModelForTokenClassification,
    "feature-extraction": transformers.AutoModel,
}
OPTIONS: dict[str, dict[str, Any]] = {"text-classification": {"top_k": None}}
DENSE, PRUNED, ENGINE = "dense model", "pruned model", "engine, pruned"


def make_texts(tokenizer: Any, count: int, shortest: int, longest: int) -> list[str]:
    """Docstrings, one after the other, cut such that lengths are spread evenly."""
    words = iter("\n".join(load_docstrings().train.first).split())
    made = []
    for length in np.random.default_rng(0).permutation(np.linspace(shortest, longest, count)).astype(int):
        text = " ".join(word for _, word in zip(range(length), words, strict=False))  # a word is a token at least
        ends = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False, verbose=False)["offset_mapping"]
        made.append(text[: ends[: length - 2][-1][1]])
    return made


def labels_and_numbers(found: Any) -> tuple[list[str], NDArray[np.float64]]:
    """What a pipeline says of one text: the best label, or each token's, and the scores, or features."""
    if not isinstance(found[0], dict):
        return [], np.array(found)
    if "entity" in found[0]:
        return [each["entity"] for each in found], np.array([each["score"] for each in found])
    return [found[0]["label"]], np.array([each["score"] for each in sorted(found, key=lambda each: each["label"])])


def agreement(found: Sequence[Any], expected: Sequence[Any]) -> dict[str, float]:
    """The largest difference, relative to the largest number, and the share of labels that are the same."""
    pairs = [tuple(map(labels_and_numbers, both)) for both in zip(found, expected, strict=True)]
    largest = max(np.abs(numbers).max() for _, (_, numbers) in pairs)
    same = [one == other for (ours, _), (theirs, _) in pairs for one, other in zip(ours, theirs, strict=True)]
    return {
        "difference": float(max(np.abs(ours - theirs).max() for (_, ours), (_, theirs) in pairs) / largest),
        "same_labels": statistics.mean(same or [True]),
    }


def take_turns(calls: Mapping[str, Callable[[], Any]], passes: int) -> dict[str, list[float]]:
    """Seconds of every call in every pass; a first pass is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(passes + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if number:
                seconds[name].append(time.perf_counter() - started)
        print(f"pass {number} of {passes}", file=sys.stderr, flush=True)
    return seconds


def measure(arguments: argparse.Namespace) -> None:
    folder = str(arguments.model or find_minilm())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    count = arguments.texts + arguments.calibration
    everything = make_texts(tokenizer, count, arguments.shortest, arguments.longest)
    texts, calibration = everything[: arguments.texts], everything[arguments.texts :]
    for task in arguments.tasks:
        torch.manual_seed(0)
        dense = HEADS[task].from_pretrained(folder).eval()
        pruned = HEADS[task].from_pretrained(folder).eval()
        pruned.load_state_dict(dense.state_dict())  # heads are random
        tp.calibrate(pruned, [tokenizer(text) for text in calibration], target_flops=arguments.target_flops)
        models = {f"{DENSE}, float32": dense, f"{PRUNED}, float32": pruned}
        for dtype in arguments.dtypes:
            models[f"{ENGINE}, {dtype}"] = tp.compile(pruned, dtype=dtype, threads=arguments.threads)
        for batch_size in arguments.batch_sizes:
            found = time_pipelines(task, models, tokenizer, texts, batch_size, arguments)
            comparison.publish(found, arguments, lines, whole=True)
            arguments.add = True


def time_pipelines(
    task: str,
    models: Mapping[str, Any],
    tokenizer: Any,
    texts: list[str],
    batch_size: int,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """A table: one task, one batch size."""
    calls: dict[str, Callable[[], Any]] = {}
    for name, model in models.items():
        pipe = transformers.pipeline(task, model=model, tokenizer=tokenizer, device="cpu")
        calls[name] = lambda pipe=pipe: pipe(texts, batch_size=batch_size, **OPTIONS.get(task, {}))
    dense, pruned, *_ = models
    with tp.record(models[pruned]) as trace:
        expected = calls[pruned]()
    flops, lengths = tp.count_flops(models[pruned], trace).relative, trace.input_lengths.tolist()
    seconds = take_turns(calls, arguments.passes)
    rows = []
    for name, own in seconds.items():
        rows.append(
            {
                "what": name,
                "relative_flops": 1.0 if name == dense else flops,
                "seconds": spread(own),
                "passes": own,
                "to_dense": statistics.median(theirs / mine for theirs, mine in zip(seconds[dense], own, strict=True)),
                **(agreement(calls[name](), expected) if name != dense else {}),
            }
        )
    return comparison.table(
        f"{task}, batch size {batch_size}, {comparison.threads_line(arguments.threads)}",
        f"Seconds for {len(texts)} texts of {np.mean(lengths):.0f} tokens on average, {min(lengths)} to "
        f"{max(lengths)}; {arguments.passes} passes.",
        "seconds",
        rows,
        arguments,
    )


def lines(table: Mapping[str, Any]) -> list[str]:
    """A section for a reader."""
    header = [
        "",
        "relative FLOPs",
        "seconds (fastest – slowest)",
        "× dense",
        "largest difference to the pruned model",
        "same labels",
    ]
    rows = []
    for row in table["rows"]:
        took = row["seconds"]
        rows.append(
            [
                row["what"],
                f"{row['relative_flops']:.2f}",
                f"{took['median']:.3f} ({took['lowest']:.3f} – {took['highest']:.3f})",
                f"{row['to_dense']:.2f}",
                *([f"{row['difference']:.1e}", f"{row['same_labels']:.1%}"] if "difference" in row else ["", ""]),
            ]
        )
    commands = ["```bash", *table["commands"], "```"]
    return [f"## {table['title']}", "", table["about"], "", *comparison.table_lines(header, rows), "", *commands, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder with another encoder and its tokenizer")
    parser.add_argument("--tasks", nargs="*", choices=list(HEADS), default=list(HEADS))
    parser.add_argument("--batch-sizes", nargs="*", type=int, default=[1, 16])
    dtypes = ["float32", *(["bfloat16"] if has_amx() else []), "int8"]
    parser.add_argument("--dtypes", nargs="*", choices=["float32", "bfloat16", "int8"], default=dtypes)
    parser.add_argument("--target-flops", type=float, default=0.55)
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--calibration", type=int, default=128, help="texts to calibrate on")
    parser.add_argument("--shortest", type=int, default=64, help="tokens")
    parser.add_argument("--longest", type=int, default=256, help="tokens")
    parser.add_argument("--passes", type=int, default=7)
    comparison.add_arguments(parser)
    comparison.carry_out(
        argparse.Namespace(command="measure", data=None, **vars(parser.parse_args())), {"measure": measure}
    )


if __name__ == "__main__":
    main()
