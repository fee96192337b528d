"""Engines under sentence-transformers that take turns on the same texts."""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import comparison
from backends import (
    SETTINGS,
    Model,
    export_onnx,
    export_openvino,
    inputs_of,
    onnx_runtime,
    openvino_engine,
    put,
)
from measures import length_for
from output import spread

import token_pruning as tp
from token_pruning.engine.machine import cpu_flags

METHODS = ("onnxruntime", "openvino", "unpruned", "pruned", "truncated")
DTYPES = ("float32", "bfloat16", "int8")  # the most precise first
BATCH_SIZES = (2, 4, 8, 16, 32, 64)
INSTALLED_BATCH_SIZE = 32
INSTALLED, TUNED = "sentence-transformers, as installed", "sentence-transformers"
OWN = "token-pruning, "
UNPRUNED, PRUNED = f"{OWN}unpruned", f"{OWN}pruned"
PAUSE = 0.05  # seconds in which the threads of the engine before stop spinning

Run = Callable[[Model, int], Callable[[], Any]]
"""From a model and a batch size to what is timed."""


@dataclass
class Row:
    """An engine on the clock.

    Attributes:
        what: its name.
        dtype: its precision.
        model: what is called.
        batch_size: the texts or pairs of a batch.
        more: further cells.
        length: tokens to truncate texts to; None for the model's own.
    """

    what: str
    dtype: str
    model: Model
    batch_size: int
    more: dict[str, Any] = field(default_factory=dict)
    length: int | None = None

    @property
    def is_own(self) -> bool:
        return self.what.startswith(OWN)

    @property
    def name(self) -> str:
        cut = f", truncated to {self.length} tokens" if self.length else ""
        return f"{self.what}, {self.dtype}{cut}"

    def call(self, function: Callable[[], Any]) -> Any:
        """What a function of the model gives where texts are truncated as this row's are."""
        with comparison.cut_to(self.model, self.length):
            return function()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS), help="besides the dense model")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--passes", type=int, default=7)
    parser.add_argument("--target-flops", type=float, default=0.5, help="of the pruned rows")
    parser.add_argument("--trained", type=Path, nargs="+", default=[], help="models that `quality --keep-trained` kept")


class Bench:
    """All rows of one table.

    Args:
        make: gives the dense model, a new one at every call.
        calibration: texts or pairs to calibrate and to quantise on.
        folder: where exported models go.
        arguments: what :func:`add_arguments` declares, and ``threads``.
    """

    def __init__(
        self, make: Callable[[], Model], calibration: Sequence[Any], folder: Path, arguments: argparse.Namespace
    ) -> None:
        self._make, self._calibration, self._folder, self._arguments = make, list(calibration), folder, arguments

    def measure(self, run: Run, facts: Callable[[Model], dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows with seconds and with what ``facts`` says of a model."""
        rows = [Row(INSTALLED, "float32", self._make(), INSTALLED_BATCH_SIZE)]
        rows += [_fastest(forms, run) for forms in self._candidates()]
        if "truncated" in self._arguments.methods:
            rows += _truncated(rows, run)
        seconds = take_turns(rows, run, self._arguments.passes)
        best = {dtype: fastest_other(rows, seconds, dtype) for dtype in DTYPES}
        found = []
        for row in rows:
            own = seconds[row.name]
            found.append(
                {
                    "what": row.name,
                    "dtype": row.dtype,
                    "batch_size": None if row.is_own else row.batch_size,
                    "seconds": spread(own),
                    "passes": own,
                    "to_installed": ratio(seconds[rows[0].name], own),
                    "to_best": ratio(seconds[best[row.dtype]], own) if best[row.dtype] else None,
                    **row.more,
                    **row.call(partial(facts, row.model)),
                }
            )
        return found

    def _candidates(self) -> list[list[Row]]:
        """The forms of every row to choose from: files and batch sizes."""
        wanted, threads, dtypes = self._arguments.methods, self._arguments.threads, self._arguments.dtypes
        if not {"amx_bf16", "avx512_bf16", "bf16"} & cpu_flags():
            dtypes = [dtype for dtype in dtypes if dtype != "bfloat16"]  # it is no faster on this processor
        forms: list[tuple[str, str, list[Model], dict[str, Any]]] = [(TUNED, "float32", [self._make()], {})]
        if "onnxruntime" in wanted:
            files = self._export(export_onnx)
            for dtype in (dtype for dtype in dtypes if dtype != "bfloat16"):  # which it has not
                names = [f"{form}{'-int8' if dtype == 'int8' else ''}.onnx" for form in ("plain", "fused")]
                forms.append(("ONNX Runtime", dtype, [files(name, onnx_runtime) for name in names], {}))
        if "openvino" in wanted:
            files = self._export(export_openvino)
            half = partial(openvino_engine, precision="bf16")
            for dtype in dtypes:
                engines = {"float32": [openvino_engine], "bfloat16": [half], "int8": [openvino_engine, half]}[dtype]
                name = f"{'int8' if dtype == 'int8' else 'float32'}.xml"
                forms.append(("OpenVINO", dtype, [files(name, engine) for engine in engines], {}))
        if "unpruned" in wanted:
            model = self._make()
            forms += [(UNPRUNED, dtype, [tp.compile(model, dtype=dtype, threads=threads)], {}) for dtype in dtypes]
        if "pruned" in wanted:
            model, target = self._make(), self._arguments.target_flops
            tp.calibrate(model, self._calibration, target_flops=target)
            more = {"target_flops": target}
            forms += [(PRUNED, dtype, [tp.compile(model, dtype=dtype, threads=threads)], more) for dtype in dtypes]
        for folder in self._arguments.trained:
            model, name = tp.from_pretrained(folder), f"{OWN}{folder.name}"
            forms += [(name, dtype, [tp.compile(model, dtype=dtype, threads=threads)], {}) for dtype in dtypes]
        return [
            [Row(what, dtype, model, size, more) for model in models for size in _batch_sizes(what)]
            for what, dtype, models, more in forms
        ]

    def _export(self, export: Callable[[Model, Sequence[Any], Path], None]) -> Callable[[str, Any], Model]:
        model = self._make()
        export(model, self._calibration, self._folder)
        names = tuple(inputs_of(model, self._calibration[:1]))

        def files(name: str, engine: Callable[[Path, int], Any]) -> Model:
            return put(self._make(), engine(self._folder / name, self._arguments.threads), names)

        return files


def _batch_sizes(what: str) -> Sequence[int]:
    """Those to try; a compiled model makes batches of its own, by tokens."""
    return BATCH_SIZES if not what.startswith(OWN) else BATCH_SIZES[:1]


def _fastest(forms: Sequence[Row], run: Run) -> Row:
    """The quickest of an engine's forms, by the better of two calls each."""
    chosen = min(forms, key=lambda row: clock(row, run))
    print(f"{chosen.name}: batch size {chosen.batch_size}", file=sys.stderr, flush=True)
    return chosen


def _truncated(rows: Sequence[Row], run: Run) -> list[Row]:
    """The fastest dense engine of others, and this package's, on texts cut until they take as long as pruned."""
    own = {row.what: row for row in rows if row.dtype == "float32" and row.what in (UNPRUNED, PRUNED)}
    if PRUNED not in own:
        return []
    goal = clock(own.pop(PRUNED), run)
    others = [row for row in rows if row.dtype == "float32" and not row.is_own]
    quickest = min(others, key=lambda row: clock(row, run))
    return [
        replace(
            row,
            length=length_for(
                goal, lambda length, row=row: clock(replace(row, length=length), run), row.model.max_seq_length
            ),
        )
        for row in (quickest, *own.values())
    ]


def clock(row: Row, run: Run, calls: int = 2) -> float:
    """The shortest of a few calls, in seconds, after one that is not counted."""
    function = partial(row.call, run(row.model, row.batch_size))
    function()
    return min(_seconds(function) for _ in range(calls))


def take_turns(rows: Sequence[Row], run: Run, passes: int) -> dict[str, list[float]]:
    """Seconds of every row in every pass, in the order A B C A B C; a first pass is not counted."""
    seconds: dict[str, list[float]] = {row.name: [] for row in rows}
    for number in range(passes + 1):
        for row in rows:
            time.sleep(PAUSE)
            took = _seconds(partial(row.call, run(row.model, row.batch_size)))
            if number:
                seconds[row.name].append(took)
        print(f"pass {number} of {passes}", file=sys.stderr, flush=True)
    return seconds


def _seconds(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def fastest_other(rows: Sequence[Row], seconds: Mapping[str, Sequence[float]], dtype: str) -> str | None:
    """The name of the fastest engine of others that is as precise or more so, whole texts only."""
    precise = DTYPES[: DTYPES.index(dtype) + 1]
    names = [row.name for row in rows if row.dtype in precise and not row.length and not row.is_own]
    return min(names, key=lambda name: statistics.median(seconds[name])) if names else None


def ratio(theirs: Sequence[float], own: Sequence[float]) -> float:
    """How many times as fast, the median of the passes' ratios."""
    return statistics.median(other / mine for other, mine in zip(theirs, own, strict=True))


def lines(found: Mapping[str, Any]) -> list[str]:
    """A section for a reader."""
    header = [
        "",
        "batch size",
        "seconds (fastest – slowest)",
        "× as installed",
        "× the fastest other, as precise or more so",
        found["measure"],
        found["agreement"],
    ]
    rows = []
    for row in found["rows"]:
        took = row["seconds"]
        rows.append(
            [
                row["what"] + (f", relative FLOPs {row['target_flops']}" if "target_flops" in row else ""),
                str(row["batch_size"] or ""),
                f"{took['median']:.3f} ({took['lowest']:.3f} – {took['highest']:.3f})",
                f"{row['to_installed']:.2f}",
                f"{row['to_best']:.2f}" if row["to_best"] else "",
                f"{row['score']:.1f}" if "score" in row else "",
                f"{row['agreement']:.4f}",
            ]
        )
    commands = ["```bash", *found["commands"], "```"]
    return [f"## {found['title']}", "", found["about"], "", *comparison.table_lines(header, rows), "", *commands, ""]


def settings() -> list[str]:
    """What the engines of others run with, for a reader."""
    return [*(f"- {name}: {text}." for name, text in SETTINGS.items()), ""]
