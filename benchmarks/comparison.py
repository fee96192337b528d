"""Rows of the embedding and reranking benchmarks: what a model scores and costs beside the dense one, and tables."""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import transformers
from measures import length_for, loss_interval, truncated
from numpy.typing import NDArray
from output import beside, command, write

import token_pruning as tp
from token_pruning.engine.machine import cpu_name, has_amx
from token_pruning.families import shape_of
from token_pruning.runtime.flops import layer_flops, relative_flops
from token_pruning.runtime.prune import hugging_face_model

# What a command shows in place of paths.
PLACES = (("FOLDER", "model"), ("KEPT", "calibrated"), ("TRAINED", "keep_trained"))

Command = Callable[[argparse.Namespace], None]

COSTS = (0.75, 0.6, 0.5, 0.45, 0.3)
PACKAGES = ("token-pruning", "sentence-transformers", "transformers", "torch", "onnxruntime", "openvino", "nncf")


class Scored(Protocol):
    """What outcomes, a number per item, are scored by."""

    @property
    def groups(self) -> Mapping[str, NDArray[np.int64]]: ...

    def score(self, outcome: NDArray[np.float64], items: NDArray[np.int64]) -> float: ...


class Rows:
    """One model's rows on one task.

    Args:
        task: what gives scores.
        dense: the dense model's outcome.
        intervals: the groups of items whose loss gets an interval.
    """

    def __init__(self, task: Scored, dense: NDArray[np.float64], intervals: Sequence[str]) -> None:
        self._task, self._dense, self._intervals = task, dense, intervals
        self.rows: list[dict[str, Any]] = []

    def add(self, what: str, cost: float, outcome: NDArray[np.float64], **more: Any) -> None:
        """A row, printed at once.

        Args:
            what: its name.
            cost: FLOPs relative to the dense model.
            outcome: a number per item.
            **more: further cells.
        """
        task, same = self._task, outcome is self._dense
        scores = {name: task.score(outcome, items) for name, items in task.groups.items()}
        losses = {
            name: {
                "loss": task.score(self._dense, task.groups[name]) - scores[name],
                "interval": loss_interval(task.score, self._dense, outcome, task.groups[name]),
            }
            for name in ([] if same else self._intervals)
        }
        self.rows.append({"what": what, "cost": cost, "scores": scores, "losses": losses, **more})
        cells = ", ".join(f"{name} {value:.2f}" for name, value in scores.items())
        rule = f"; {more['rule']}" if more.get("rule") else ""
        print(f"{what}: cost {cost:.3f}; {cells}{rule}", file=sys.stderr, flush=True)


@contextmanager
def cut_to(model: Any, length: int | None) -> Iterator[None]:
    """Let a SentenceTransformer or CrossEncoder truncate to ``length`` tokens; None leaves it as it is."""
    before = model.max_seq_length
    model.max_seq_length = length or before
    try:
        yield
    finally:
        model.max_seq_length = before


def flops_of(config: Any, lengths: Sequence[int]) -> float:
    """FLOPs per text of the dense model, as ``tp.count_flops`` counts them."""
    shape, counts = shape_of(config), torch.tensor(lengths)
    return shape.num_layers * layer_flops(shape, counts, counts).mean().item()


def truncation_cost(config: Any, lengths: Sequence[int], length: int, *, first_only: bool) -> float:
    """FLOPs with texts cut to ``length`` tokens, relative to the dense model.

    Args:
        config: the model's.
        lengths: the texts' tokens.
        length: what they are cut to.
        first_only: whether the last layer computes first tokens only, as this package does where a head reads no
            others. Truncation is granted that too.
    """
    shape = shape_of(config)
    left = torch.tensor(truncated(lengths, length)).expand(shape.num_layers + 1, -1)
    return relative_flops(shape, torch.tensor(lengths), left, first_only=first_only).item()


def truncation_lengths(config: Any, lengths: Sequence[int], costs: Sequence[float], *, first_only: bool) -> list[int]:
    """The lengths to truncate to that cost about as much, each once."""

    def cost(length: int) -> float:
        return truncation_cost(config, lengths, length, first_only=first_only)

    found = [length_for(target, cost, max(lengths)) for target in costs]
    return list(dict.fromkeys(found))


# Results


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What every measurement takes."""
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    parser.add_argument("--add", action="store_true", help="keep what OUTPUT.json has besides what is measured")


def add_training(parser: argparse.ArgumentParser) -> None:
    """What a measurement of trained models takes besides."""
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the training of distilled models")
    parser.add_argument("--epochs", type=float, default=1.0, help="of that training")
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 2], help="that shallow models have")
    parser.add_argument("--bf16", action="store_true", help="train them in bfloat16 autocast")
    parser.add_argument("--device", default="cpu", help="train and score there; on cuda without an engine")
    parser.add_argument("--calibrated", type=Path, help="keep models as they are before that, for runs of other seeds")
    parser.add_argument("--keep-trained", type=Path, help="keep trained models, for `speed --trained`")


def distilled(
    load: Callable[[], Any], task: Any, target: float, seed: int, name: str, arguments: argparse.Namespace
) -> tuple[Any, dict[str, Any]]:
    """A model calibrated to a budget on a task's calibration texts, then trained on others; and cells about that.

    Args:
        load: gives the dense one.
        task: with ``calibration`` and ``distillation``.
        target: relative FLOPs.
        seed: of the training.
        name: what the model is kept under.
        arguments: with what :func:`add_training` adds.
    """
    kept = None if arguments.calibrated is None else arguments.calibrated / f"{name}-{target}"
    if kept is not None and kept.exists():
        model = tp.from_pretrained(kept)
    else:
        model = load()
        tp.calibrate(model, task.calibration, target_flops=target)
        if kept is not None:
            model.save_pretrained(str(kept))
    started = time.perf_counter()
    _train(model, task, f"{name}-{target}", seed, arguments, target_flops=target)
    return model, {"training_seconds": time.perf_counter() - started}


def training(task: Any, kind: str, seed: int, arguments: argparse.Namespace) -> str:
    """What a trained model's row says of its training."""
    passes = "" if arguments.epochs == 1 else f", {arguments.epochs:g} passes"
    return f"on {len(task.distillation):,} {kind}{passes}, seed {seed}"


def shallow(
    load: Callable[[], Any], task: Any, layers: int, seed: int, name: str, arguments: argparse.Namespace
) -> Any:
    """A model's first layers, trained to give what all of them give as a distilled model is; nothing is dropped.

    Args:
        load: gives the dense one.
        task: with ``distillation``.
        layers: how many stay.
        seed: of the training.
        name: what the model is kept under.
        arguments: with what :func:`add_training` adds.
    """
    model = load()
    inner = hugging_face_model(model).base_model
    inner.encoder.layer = inner.encoder.layer[:layers]
    inner.config.num_hidden_layers = layers
    tp.prune(model, tp.FixedThreshold(thresholds=[0.0] * layers, scoring_mode="relative"))
    _train(model, task, f"{name}-first-{layers}", seed, arguments, teacher=load().to(arguments.device))
    return model


def _train(model: Any, task: Any, name: str, seed: int, arguments: argparse.Namespace, **how: Any) -> None:
    how |= {"epochs": arguments.epochs, "bf16": arguments.bf16, "seed": seed}
    tp.distill(model.to(arguments.device), task.distillation, **how)
    if arguments.keep_trained is not None:
        model.save_pretrained(str(arguments.keep_trained / f"{name}-seed{seed}"))


def fastest(model: Any) -> Any:
    """What a pruned model is scored with: the engine, or on a GPU the model itself."""
    if model.device.type != "cpu":
        return model.eval()
    return tp.compile(model, dtype="float32", threads=torch.get_num_threads())


def machine_of(threads: int) -> dict[str, Any]:
    """The machine and what ran on it."""
    installed = {}
    for package in PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "cpu": cpu_name(),
        "amx": has_amx(),
        "processors": os.cpu_count(),
        "threads": threads,
        "versions": installed,
    }


def machine_line(machine: Mapping[str, Any]) -> str:
    """For a reader."""
    installed = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    return (
        f"{machine['cpu']}, {'with' if machine['amx'] else 'without'} AMX, {machine['processors']} processors, "
        f"{threads_line(machine['threads'])}. {installed}."
    )


def threads_line(threads: int) -> str:
    return f"{threads} thread{'s' if threads > 1 else ''}"


def table(
    title: str, about: str, measure: str, rows: list[dict[str, Any]], arguments: argparse.Namespace, **more: Any
) -> dict[str, Any]:
    """A table as it goes into the JSON file, with the machine and the command that are measuring it."""
    machine = machine_of(arguments.threads)
    places = {"DATA": arguments.data, **{word: getattr(arguments, name, None) for word, name in PLACES}}
    places |= {f"TRAINED/{folder.name}": folder for folder in getattr(arguments, "trained", [])}
    if (device := getattr(arguments, "device", "cpu")) != "cpu":
        about = f"{about} On {torch.cuda.get_device_name(device)}, beside:"
    return {
        "title": title,
        "about": f"{about} {machine_line(machine)}",
        "measure": measure,
        "machine": machine,
        "commands": [command(places)],
        "rows": rows,
        **more,
    }


def publish(
    done: dict[str, Any],
    arguments: argparse.Namespace,
    lines: Callable[[Mapping[str, Any]], list[str]],
    head: Sequence[str] = (),
    *,
    whole: bool = False,
) -> None:
    """Print a table, and write it to ``OUTPUT.json`` and ``OUTPUT.md``.

    Args:
        done: from :func:`table`.
        arguments: with ``output``, and ``add`` if what the file has is to stay.
        lines: a table for a reader.
        head: what stands above the tables.
        whole: whether its rows were measured together, so that none of an earlier run may stand among them.
    """
    print("\n".join(lines(done)), flush=True)
    if arguments.output is None:
        return
    path, tables = beside(arguments.output, ".json"), []
    if arguments.add and path.exists():
        tables = json.loads(path.read_text(encoding="utf-8"))
    merge(tables, done, whole=whole)
    write(tables, "\n".join([*head, *(line for each in tables for line in lines(each))]), arguments.output)


def merge(tables: list[dict[str, Any]], done: dict[str, Any], *, whole: bool = False) -> None:
    """Put a table among others, in place. Of one with the same title those rows stay that the new one has not.

    With ``whole`` none of them does.
    """
    for place, old in enumerate(tables):
        if old["title"] == done["title"]:
            if not whole:
                new = {row["what"]: row for row in done["rows"]}
                rows = [new.pop(row["what"], row) for row in old["rows"]] + list(new.values())
                commands = list(dict.fromkeys([*old["commands"], *done["commands"]]))
                done = {**done, "rows": rows, "commands": commands}
            tables[place] = done
            return
    tables.append(done)


def table_lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    head, *body = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    return [head, "|" + "---|" * len(header), *body]


def quality_lines(table: Mapping[str, Any]) -> list[str]:
    """A section for a reader: the scores of every row, and what it loses."""
    groups = list(table["rows"][0]["scores"])
    lossy = list(dict.fromkeys(name for row in table["rows"] for name in row["losses"]))
    header = [
        "",
        "relative FLOPs",
        "tokens",
        *(table["measure"] if name == "all" else name for name in groups),
        *("loss, 95 % interval" if name == "all" else f"{name}: loss" for name in lossy),
    ]
    rows = []
    for row in table["rows"]:
        tokens = f"{row['tokens']:.1f}" if "tokens" in row else ""
        scores = [f"{row['scores'][name]:.1f}" for name in groups]
        losses = [_loss(row["losses"].get(name)) for name in lossy]
        rows.append([row["what"], f"{row['cost']:.2f}", tokens, *scores, *losses])
    commands = ["```bash", *table["commands"], "```"]
    return [f"## {table['title']}", "", table["about"], "", *table_lines(header, rows), "", *commands, ""]


def _loss(found: Mapping[str, Any] | None) -> str:
    if not found:
        return ""
    low, high = found["interval"]
    return f"{found['loss']:.1f} ({low:.1f} to {high:.1f})"


def carry_out(arguments: argparse.Namespace, commands: Mapping[str, Command]) -> None:
    """Run the command that was given, without transformers' bars; what a user got wrong ends in one line."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if "threads" in arguments:
        torch.set_num_threads(arguments.threads)
    try:
        commands[arguments.command](arguments)
    except tp.TokenPruningError as error:
        sys.exit(f"error: {error}")
