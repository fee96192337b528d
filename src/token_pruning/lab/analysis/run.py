"""Evaluating checkpoints side by side, and writing what was found."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from token_pruning.checkpoint import Checkpoint, read_checkpoint
from token_pruning.checks import number, positive_integer
from token_pruning.errors import ConfigError
from token_pruning.families import shape_of
from token_pruning.lab.analysis.page import markdown, trajectories
from token_pruning.lab.analysis.plots import layer_plot, length_plot, outcome_plot
from token_pruning.lab.analysis.quantities import (
    Array,
    correlation,
    kept_fractions,
    quantile_groups,
    spread,
    spread_over_lengths,
)
from token_pruning.lab.data import Task, TaskData
from token_pruning.lab.evaluation import length_order, predict
from token_pruning.lab.files import write_files
from token_pruning.lab.metrics import compute_metrics
from token_pruning.lab.report.page import load_template
from token_pruning.lab.training.features import collator
from token_pruning.lab.training.load import load_split, other_architecture
from token_pruning.pruners import Pruner, Unpruned
from token_pruning.runtime.flops import flops_from_lengths
from token_pruning.runtime.prune import record
from token_pruning.runtime.state import ComputedLengths

_THIRDS = ("smallest errors", "middle errors", "largest errors")


def analyze(
    restore: Sequence[str],
    load_data: Callable[[Checkpoint], TaskData],
    output_dir: Path,
    *,
    command: str,
    names: Sequence[str] | None = None,
    quantiles: int = 4,
    samples: int = 8,
    batch_size: int = 32,
    max_length: int = 128,
    bf16: bool = False,
) -> Path:
    """Write ``analysis.json``, ``analysis.md``, its plots and ``trajectories.html``: all of them or none.

    Kim et al. (2022) compare methods by the length of their inputs, by layer, and over single texts. Every checkpoint
    is evaluated on the first validation split, pruned as its ``config.json`` says, dense if it names no
    ``prune_mode``. Quantiles of length and samples are the first checkpoint's where tokenizers differ.

    Args:
        restore: checkpoints with a sequence-classification or regression head.
        load_data: gives the task's examples, from the checkpoint (whose labels may matter).
        output_dir: where to write; an older analysis is replaced.
        command: stands above the tables.
        names: what to call the checkpoints; the shortest ends of their paths that differ unless given.
        quantiles: groups by length.
        samples: texts whose tokens are shown, spread over the lengths; with 0 no text is written anywhere.
        batch_size: examples per forward pass.
        max_length: longer texts are truncated; tokens.
        bf16: bfloat16 autocast.

    Returns:
        The path of ``analysis.md``.

    Raises:
        TokenPruningError: for a bad checkpoint, data set or value.
    """
    for flag, value in (
        ("--quantiles", quantiles), ("--bs", batch_size), ("--max-length", max_length),
    ):  # fmt: skip
        positive_integer(flag, value)
    number("--samples", samples, low=0)
    names = _names(restore, names)
    if output_dir.exists() and not output_dir.is_dir():
        raise ConfigError(f"--output-dir is {output_dir}, a file; it must be a folder, or not exist yet")
    load_template("trajectories.html")  # says what is missing before minutes of work
    checkpoints = [read_checkpoint(path) for path in restore]
    pruners = [_pruner(checkpoint) for checkpoint in checkpoints]

    data = [load_data(checkpoint) for checkpoint in checkpoints]
    task = data[0].task
    for path, other in zip(restore, data, strict=True):
        if other.task.is_regression != task.is_regression:
            kinds = ["a regression" if is_regression else "a classification"
                     for is_regression in (other.task.is_regression, task.is_regression)]  # fmt: skip
            raise ConfigError(f"--restore {path} is {kinds[0]}, {restore[0]} {kinds[1]}; they must be of one kind")
    split, examples = next(iter(data[0].validation.items()))
    methods: list[dict[str, Any]] = []
    groups: list[Array] = []
    chosen: list[int] = []
    for name, path, checkpoint, pruner, loaded in zip(names, restore, checkpoints, pruners, data, strict=True):
        model, tokenizer, features = load_split(checkpoint, loaded.task, loaded.validation[split], max_length)
        if torch.cuda.is_available():
            model.to("cuda")
        # A dense one too: it is packed and recorded then.
        checkpoint.prune(model, pruner)
        with record(model) as trace:
            found = predict(model, features, collator(tokenizer, bf16), batch_size=batch_size, bf16=bf16)
        logits, computed, left = found.logits, found.computed, found.ffn_lengths - found.summary_lengths
        if isinstance(pruner, Unpruned):  # a dense model computes every token of the last layer too
            computed = ComputedLengths(left, left, left, left)
        order = length_order(features)
        back = np.argsort(order)
        survived = dict(zip(order, trace.survived_layers, strict=True))
        lengths = np.array([len(feature["input_ids"]) for feature in features])
        groups = groups or quantile_groups(lengths, quantiles)
        chosen = chosen or spread_over_lengths(lengths, samples)
        method = {
            "name": name,
            "checkpoint": path,
            "prune_mode": None if isinstance(pruner, Unpruned) else pruner.prune_mode,
            "layers": len(left),
            "seconds": found.seconds,
            **figures(
                loaded.task,
                logits,
                np.array([feature["labels"] for feature in features]),
                ComputedLengths(*(lengths[:, back] for lengths in computed)),
                left[:, back],
                groups,
                shape_of(model.config),
            ),
        }
        shown = _shown(loaded.task, model.config.id2label, logits, features)
        method["samples"] = [
            {
                "tokens": tokenizer.convert_ids_to_tokens(features[i]["input_ids"]),
                "survived_layers": survived[i].tolist(),
                "label": shown["labels"][i],
                "prediction": shown["predictions"][i],
            }
            for i in chosen
        ]
        method["examples"] |= shown
        methods.append(method)
        print(
            f"{name}: {task.best_metric} {method['metrics'][task.best_metric]:.4f}, "
            f"kept {method['kept_fraction']:.3f}, relative FLOPs {method['relative_flops']:.3f}"
        )

    analysis = {
        "command": command,
        "task": task.name,
        "split": split,
        "regression": task.is_regression,
        "metric": task.best_metric,
        "examples": len(examples),
        "quantiles": quantiles,
        "samples": chosen,
        "batch_size": batch_size,
        "max_length": max_length,
        "dtype": "bfloat16 autocast" if bf16 else "float32",
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "checkpoints": methods,
    }
    contents: dict[str, str | bytes] = {
        "analysis.json": json.dumps(analysis, ensure_ascii=False) + "\n",
        "length.png": length_plot(methods, task.best_metric),
        "layers.png": layer_plot(methods),
        "outcome.png": outcome_plot(methods),
        "analysis.md": markdown(analysis),
    }
    if chosen:
        contents["trajectories.html"] = trajectories(analysis)
    try:
        write_files(output_dir, contents)
    except OSError as error:
        raise ConfigError(f"--output-dir {output_dir} cannot be written: {error}") from None
    print(f"written to {output_dir / 'analysis.md'}")
    return output_dir / "analysis.md"


def figures(
    task: Task,
    logits: Array,
    labels: Array,
    computed: ComputedLengths,
    left: torch.Tensor,
    groups: Sequence[Array],
    shape: Any,
) -> dict[str, Any]:
    """Everything that is counted of one checkpoint.

    Args:
        task: whose metrics.
        logits: ``[examples, labels]`` float32.
        labels: ``[examples]`` class ids in the order of the outputs, or scores.
        computed: the rows computed in each layer, each ``[layers, examples]`` int64.
        left: tokens after each layer's pruning, the same.
        groups: the examples of each quantile of length.
        shape: the model's sizes, a :class:`token_pruning.families.ModelShape`.

    Returns:
        What ``analysis.json`` holds of it.
    """
    tokens, remaining = computed.dense[0].numpy(), left.numpy()
    kept = kept_fractions(tokens, remaining)

    def relative(which: Array) -> float:
        return flops_from_lengths(shape, ComputedLengths(*(lengths[:, which] for lengths in computed)), 1).relative

    def group(which: Array, name: str) -> dict[str, Any]:
        return {"group": name, "examples": len(which), **spread(kept[which])}

    result: dict[str, Any] = {
        "metrics": compute_metrics(task, logits, labels),
        "kept_fraction": float(kept.mean()),
        "relative_flops": relative(np.arange(len(tokens))),
        "by_length": [
            {
                "shortest": int(tokens[which].min()),
                "longest": int(tokens[which].max()),
                "examples": len(which),
                "metrics": compute_metrics(task, logits[which], labels[which]),
                "kept_fraction": float(kept[which].mean()),
                "relative_flops": relative(which),
            }
            for which in groups
        ],
        "by_layer": [
            {"layer": layer, **spread(row / np.maximum(tokens, 1))} for layer, row in enumerate(remaining, start=1)
        ],
        "examples": {"tokens": tokens.tolist(), "tokens_left": remaining.tolist(), "kept_fraction": kept.tolist()},
    }
    if task.is_regression:
        error = np.abs(logits[:, 0] - labels)
        thirds = quantile_groups(error, 3)
        result["by_outcome"] = [
            {**group(which, name), "mean_absolute_error": float(error[which].mean())}
            for name, which in zip(_THIRDS, thirds, strict=False)
        ]
        result["error_correlation"] = correlation(kept, error)
    else:
        right = logits.argmax(axis=1) == labels
        result["by_outcome"] = [group(np.flatnonzero(right), "right"), group(np.flatnonzero(~right), "wrong")]
    return result


def _shown(
    task: Task, names: Mapping[int, str], logits: Array, features: Sequence[Mapping[str, Any]]
) -> dict[str, list[Any]]:
    """Labels and predictions for a reader: names of classes, or scores."""
    labels = [feature["labels"] for feature in features]
    if task.is_regression:
        return {"labels": labels, "predictions": [round(score, 4) for score in logits[:, 0].tolist()]}
    return {
        "labels": [names[label] for label in labels],
        "predictions": [names[label] for label in logits.argmax(axis=1).tolist()],
    }


def _pruner(checkpoint: Checkpoint) -> Pruner:
    if (other := other_architecture(checkpoint)) is not None:
        raise ConfigError(
            f"--restore {checkpoint.path} is {other}; it must be a sequence-classification or regression model"
        )
    return Unpruned() if checkpoint.config.get("prune_mode") is None else checkpoint.pruner()


def _names(restore: Sequence[str], names: Sequence[str] | None) -> list[str]:
    if names is not None:
        if len(names) != len(restore):
            raise ConfigError(
                f"--names gives {len(names)} ({', '.join(names)}); it must give one for each of the {len(restore)} "
                "checkpoints of --restore"
            )
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"--names gives {name!r} twice; every checkpoint needs a name of its own")
        return list(names)
    parts = [Path(path).resolve().parts for path in restore]
    for path, own in zip(restore, parts, strict=True):
        if parts.count(own) > 1:
            raise ConfigError(f"--restore gives {path} twice; every checkpoint is analyzed once")
    for count in range(1, max(map(len, parts))):
        ends = ["/".join(own[-count:]) for own in parts]
        if len(set(ends)) == len(ends):
            return ends
    return list(restore)
