"""What a sweep writes: every trial, the Pareto fronts as tables, and the figure of metric against relative FLOPs."""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from token_pruning.lab.analysis.plots import DENSE, GRID, INK, MARKERS, MUTED, SERIES, png
from token_pruning.lab.files import write_files
from token_pruning.lab.report.plots import legend, new_figure, style
from token_pruning.lab.sweep.methods import METHODS
from token_pruning.lab.sweep.rules import pareto_front
from token_pruning.lab.tables import table

_SHOWN_DROP = 0.12  # below dense: what lies further down is drawn at the lower edge


@dataclass(frozen=True)
class Row:
    """One trial.

    Attributes:
        number: in its study.
        method: its name.
        state: ``complete``, ``pruned`` (stopped as hopeless; its figures are the last ones), ``failed``, ``running``
            or ``continued`` (killed; a later trial went on with it).
        metric: a fraction, or None before the first evaluation.
        relative_flops: pruned ÷ dense, or None.
        seconds: on the clock, or None.
        parameters: what was chosen, by name.
    """

    number: int
    method: str
    state: str
    metric: float | None
    relative_flops: float | None
    seconds: float | None
    parameters: dict[str, Any]


@dataclass(frozen=True)
class TaskResults:
    """One task's trials: a panel of the figure.

    Attributes:
        task: its name.
        metric: the metric's name.
        dense: the dense model's metric, a fraction.
        rows: all trials.
        note: what the metric was measured on, one sentence.
    """

    task: str
    metric: str
    dense: float
    rows: Sequence[Row]
    note: str = ""


def write_results(folder: Path, results: TaskResults) -> None:
    """Write ``trials.csv``, ``pareto.csv``, ``pareto.md`` and ``pareto.png``, all or none of them."""
    contents: dict[str, str | bytes] = {
        "trials.csv": trials_csv(results),
        "pareto.csv": pareto_csv(results),
        "pareto.md": pareto_markdown(results),
        "pareto.png": pareto_plot([results]),
    }
    write_files(folder, contents)


def front(rows: Iterable[Row]) -> list[Row]:
    """The complete trials that no other one dominates, cheapest first."""
    complete = [row for row in rows if row.state == "complete"]
    return [complete[place] for place in pareto_front([_point(row) for row in complete])]


def trials_csv(results: TaskResults) -> str:
    """Every trial in the order of their numbers."""
    names = _parameter_names(results.rows)
    lines: list[Sequence[Any]] = [("trial", "method", "state", results.metric, "relative_flops", "seconds", *names)]
    for row in results.rows:
        seconds = None if row.seconds is None else round(row.seconds, 1)
        values = [row.parameters.get(name) for name in names]
        lines.append((row.number, row.method, row.state, row.metric, row.relative_flops, seconds, *values))
    return _csv(lines)


def pareto_csv(results: TaskResults) -> str:
    """The dense model, then the front over all methods, then that of each."""
    fronts = _fronts(results.rows)
    names = _parameter_names([row for _, rows in fronts for row in rows])
    lines: list[Sequence[Any]] = [
        ("front", "trial", "method", results.metric, "drop_points", "relative_flops", *names),
        ("dense", None, "dense", results.dense, 0.0, 1.0, *[None] * len(names)),
    ]
    for front_name, rows in fronts:
        for row in rows:
            metric, flops = _point(row)
            values = [row.parameters.get(name) for name in names]
            drop = round(100 * (results.dense - metric), 4)
            lines.append((front_name, row.number, row.method, metric, drop, flops, *values))
    return _csv(lines)


def pareto_markdown(results: TaskResults) -> str:
    """The same as tables to be read."""
    states = [row.state for row in results.rows]
    counts = [f"{count} {state}" for state in ("complete", "pruned", "failed") if (count := states.count(state))]
    text = f"# Sweep of {results.task}\n\nTrials: {', '.join(counts) or 'none finished'}. {results.note}\n"
    header = ["trial", "method", results.metric, "drop, points", "relative FLOPs", "parameters"]
    dense = ["–", "dense", f"{100 * results.dense:.2f}", "0.00", "1.000", ""]
    for name, rows in _fronts(results.rows):
        title = "All methods" if name == "all" else f"`{name}`"
        text += f"\n## {title}\n\n{table(header, [dense, *(_cells(row, results.dense) for row in rows)])}\n"
    return text


def _cells(row: Row, dense: float) -> list[str]:
    metric, flops = _point(row)
    drop = f"{100 * (dense - metric):.2f}"
    return [str(row.number), row.method, f"{100 * metric:.2f}", drop, f"{flops:.3f}", describe(row.parameters)]


def describe(parameters: dict[str, Any]) -> str:
    """Parameters on one line, numbers short."""
    shown = {name: f"{value:.3g}" if isinstance(value, float) else value for name, value in parameters.items()}
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def pareto_plot(tasks: Sequence[TaskResults]) -> bytes:
    """The paper's figure as PNG: the metric against relative FLOPs, one panel for each task.

    Each method's front is a staircase: the best metric at a cost. Other complete trials are faint, and at the lower
    edge where they lie further down than the panel shows.
    """
    methods = [name for name in METHODS if any(front(_of(task.rows, name)) for task in tasks)]
    columns = min(3, len(tasks))
    lines = -(-len(tasks) // columns)
    with style("pareto", INK, MUTED, GRID):
        figure, panels = new_figure((6.9 if columns == 1 else 4.4 * columns, 4.2 * lines), columns, lines)
        for axes, task in zip(panels, tasks, strict=False):
            _panel(axes, task)
        for axes in panels[len(tasks) :]:
            axes.set_visible(False)
        for name, (color, marker) in [("dense", (DENSE, "D")), *((name, _look(name)) for name in methods)]:
            panels[0].plot([], [], color=color, marker=marker, markersize=6, linewidth=1.6, label=name)
        legend(figure)
        return png(figure)


def _panel(axes: Any, task: TaskResults) -> None:
    from matplotlib.markers import CARETDOWN  # its tip is its place

    complete = [row for row in task.rows if row.state == "complete"]
    metrics = [_point(row)[0] for row in complete]
    low = max(min([*metrics, task.dense - 0.02]), task.dense - _SHOWN_DROP)
    high = max([*metrics, task.dense])
    margin = 0.06 * (high - low)
    right = 1.03
    axes.set_ylim(100 * (low - margin), 100 * (high + margin))
    axes.set_xlim(max(0.0, min([_point(row)[1] for row in complete] or [0.5]) - 0.05), right)
    line = {"color": DENSE, "linewidth": 1.2, "zorder": 1}
    axes.axhline(100 * task.dense, **line)
    axes.axhline(100 * task.dense - 1, linestyle=(0, (4, 3)), **line)
    axes.annotate(
        "−1 point", (0, 100 * task.dense - 1), (4, -3), xycoords=("axes fraction", "data"), textcoords="offset points",
        horizontalalignment="left", verticalalignment="top", fontsize=8, color=MUTED,
    )  # fmt: skip
    for name in METHODS:
        rows = _of(complete, name)
        best = front(rows)
        color, marker = _look(name)
        dots = [_point(row) for row in rows if row not in best and _point(row)[0] >= low]
        look = {"color": color, "linewidths": 0, "zorder": 2}
        axes.scatter([f for _, f in dots], [100 * m for m, _ in dots], marker=marker, s=24, alpha=0.4, **look)
        under = [flops for metric, flops in map(_point, rows) if metric < low]
        floor = [100 * (low - margin)] * len(under)
        axes.scatter(under, floor, marker=CARETDOWN, s=36, alpha=0.8, clip_on=False, **look)
        shown = [_point(row) for row in best if _point(row)[0] >= low]
        if shown:
            heights, flops = [100 * metric for metric, _ in shown], [flops for _, flops in shown]
            axes.step([*flops, right], [*heights, heights[-1]], where="post", color=color, linewidth=1.6, zorder=3)
            axes.scatter(flops, heights, color=color, marker=marker, s=34, zorder=4)
    axes.scatter([1], [100 * task.dense], color=DENSE, marker="D", s=40, zorder=5)
    axes.set_title(task.task, fontsize=10.5, loc="left")
    axes.set_xlabel("FLOPs relative to dense on valid tokens")
    axes.set_ylabel(f"{task.metric}, %")
    axes.ticklabel_format(useOffset=False)
    axes.grid()


def _look(method: str) -> tuple[str, str]:
    place = list(METHODS).index(method)
    return SERIES[place % len(SERIES)], MARKERS[place % len(MARKERS)]


def _of(rows: Iterable[Row], method: str) -> list[Row]:
    return [row for row in rows if row.method == method]


def _fronts(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    found = [("all", front(rows)), *((name, front(_of(rows, name))) for name in METHODS)]
    return [(name, best) for name, best in found if best or name == "all"]


def _point(row: Row) -> tuple[float, float]:
    assert row.metric is not None
    assert row.relative_flops is not None
    return row.metric, row.relative_flops


def _parameter_names(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.parameters))


def _csv(lines: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()
