"""The report's plots, drawn by matplotlib as SVG text that stands inside the page.

The colours are stand-ins that become CSS variables (``var(--ink)``, ``var(--series-1)``, …), so that one
drawing is legible in the page's light and dark scheme.  Ids get a prefix, because two drawings share one page.
Nothing here touches ``pyplot`` and the same numbers give the same text.
"""

import html
import io
import itertools
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

INK, MUTED, GRID = "#010101", "#020202", "#030303"
SERIES = ("#040400", "#040401", "#040402", "#040403", "#040404", "#040405")
"""Stand-in colours: the first series is the dense model's, and the page has one CSS variable for each."""

_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--line"} | {c: f"--series-{i}" for i, c in enumerate(SERIES)}
_MARKERS = ("D", "o", "s", "^", "v", "P")
_SIZE = (4.3, 3.4)  # inches of 72 units each; the page scales the drawing to its column, on a phone to 300 units
_DIRECTIONS = [  # where a point's label may stand: horizontal and vertical step, and how the text is then aligned
    (1, 0, "left", "center"),
    (-1, 0, "right", "center"),
    (0, 1, "center", "bottom"),
    (0, -1, "center", "top"),
    (0.8, 0.8, "left", "bottom"),
    (0.8, -0.8, "left", "top"),
    (-0.8, 0.8, "right", "bottom"),
    (-0.8, -0.8, "right", "top"),
]
_DISTANCES = (7, 18, 30, 44, 60)  # in points, tried in this order; the far ones get a thin line to their point


def tokens_plot(stages: Sequence[Mapping[str, Any]], tokens_entering: float) -> str:
    """Draw the mean number of kept tokens in every layer, one bar per stage, as an ``<svg>`` element."""
    with style("tokens"):
        figure, (axes,) = new_figure()
        drawn = [stage for stage in stages if stage["tokens_kept_per_layer"]]
        layers = max((len(stage["tokens_kept_per_layer"]) for stage in drawn), default=0)
        width = 0.82 / max(len(drawn), 1)
        for i, stage in enumerate(drawn):
            kept = stage["tokens_kept_per_layer"]
            offset = (i - (len(drawn) - 1) / 2) * width
            places = [layer + 1 + offset for layer in range(len(kept))]
            axes.bar(places, kept, width=width * 0.92, color=SERIES[i % len(SERIES)], label=stage["name"])
        axes.axhline(tokens_entering, color=INK, linewidth=1, linestyle=(0, (4, 3)), label="at the input")
        axes.set_xticks(range(1, layers + 1))
        axes.set_ylim(0, None)
        axes.set_xlabel("layer")
        axes.set_ylabel("mean tokens kept")
        axes.grid(axis="y")
        legend(figure)
        listed = "; ".join(
            f"{stage['name']}: " + ", ".join(f"{kept:.1f}" for kept in stage["tokens_kept_per_layer"])
            for stage in drawn
        )
        text = f"Bars of the mean number of tokens kept in each layer, of {tokens_entering:.1f} at the input. {listed}."
        return _svg(figure, "tokens", text)


def length_plot(groups: Sequence[Mapping[str, Any]]) -> str:
    """Draw the share of tokens left at the entry and after each layer, a line for each group of lengths."""
    with style("length"):
        figure, (axes,) = new_figure()
        for i, group in enumerate(groups):
            color, marker = SERIES[(i + 1) % len(SERIES)], _MARKERS[(i + 1) % len(_MARKERS)]
            places = range(len(group["kept"]))
            axes.plot(places, group["kept"], color=color, marker=marker, markersize=5, label=token_range(group))
        layers = len(groups[0]["kept"])
        axes.set_xticks(range(layers), ["entry", *range(1, layers)])
        axes.set_ylim(0, 1.04)
        axes.set_xlabel("after layer")
        axes.set_ylabel("share of tokens left")
        axes.grid(axis="y")
        legend(figure)
        listed = "; ".join(
            f"texts of {token_range(group)}: " + ", ".join(f"{kept:.2f}" for kept in group["kept"]) for group in groups
        )
        return _svg(figure, "length", f"Lines of the share of tokens left at the entry and after each layer. {listed}.")


def token_range(group: Mapping[str, Any]) -> str:
    """A group of lengths, in words."""
    shortest, longest = group["shortest"], group["longest"]
    return f"{shortest} tokens" if shortest == longest else f"{shortest}–{longest} tokens"


_AXES = {
    "relative_flops": "FLOPs relative to dense on valid tokens",
    "milliseconds": "milliseconds per text, in batches",
}


def curve_plot(
    points: Sequence[Mapping[str, Any]], metric: str, dense: float | None, along: str = "relative_flops"
) -> str:
    """Draw a metric against relative FLOPs, or ``along`` milliseconds, as an ``<svg>`` element.

    ``dense`` is the dense model's metric: a dashed line stands one point (0.01) below it.
    """
    with style(along):
        figure, (axes,) = new_figure()
        kinds = list(dict.fromkeys(["dense", "learned", *(point["kind"] for point in points)]))
        for i, kind in enumerate(kinds):
            drawn = sorted((p[along], p["metric"]) for p in points if p["kind"] == kind)
            if drawn:
                color, marker = SERIES[i % len(SERIES)], _MARKERS[i % len(_MARKERS)]
                axes.plot(*zip(*drawn, strict=True), color=color, linewidth=0.8, alpha=0.5, zorder=2)
                axes.scatter(*zip(*drawn, strict=True), color=color, marker=marker, s=38, label=kind, zorder=3)
        if dense is not None:
            line = {"color": INK, "linewidth": 1, "linestyle": (0, (4, 3))}
            axes.axhline(dense - 0.01, label="dense − 1 point", zorder=1, **line)
        axes.margins(0.14, 0.16)
        axes.ticklabel_format(useOffset=False)
        axes.set_xlabel(_AXES[along])
        axes.set_ylabel(metric)
        axes.grid()
        legend(figure)
        _label(figure, axes, points, along, None if dense is None else dense - 0.01)
        listed = "; ".join(f"{p['label']}: {p['metric']:.4f} at {p[along]:.3f}" for p in points)
        return _svg(figure, along, f"Points of {metric} against {_AXES[along]}. {listed}.")


def style(salt: str, ink: str = INK, muted: str = MUTED, grid: str = GRID) -> Any:
    """The look of every plot, as a context; ``salt`` makes an SVG's ids the same on every run."""
    import matplotlib

    return matplotlib.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": salt,
            "text.usetex": False,
            "text.parse_math": False,
            "font.family": ["DejaVu Sans"],
            "font.size": 9.5,
            "text.color": ink,
            "axes.labelcolor": ink,
            "axes.edgecolor": muted,
            "axes.linewidth": 0.8,
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "xtick.color": muted,
            "ytick.color": muted,
            "xtick.labelcolor": ink,
            "ytick.labelcolor": ink,
            "grid.color": grid,
            "grid.linewidth": 0.8,
            "grid.alpha": 1,
            "legend.frameon": False,
        }
    )


def new_figure(size: tuple[float, float] = _SIZE, panels: int = 1, lines: int = 1) -> tuple[Any, list[Any]]:
    """A figure of ``size`` inches, and its axes: ``panels`` side by side, in ``lines`` below each other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=72, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(lines, panels, squeeze=False).flat)


def legend(figure: Any) -> None:
    """Name the first axes' series above the figure, in as many columns as fit."""
    names = figure.axes[0].get_legend_handles_labels()[1]
    columns = max(1, min(len(names), int(14 * figure.get_figwidth()) // (max(map(len, names), default=0) + 6)))
    figure.legend(loc="outside upper left", ncols=columns, columnspacing=1.4, handletextpad=0.5, handlelength=1.8)


def _label(figure: Any, axes: Any, points: Sequence[Mapping[str, Any]], along: str, line: float | None) -> None:
    """Write every point's label where it covers no point, no other label and not the dashed line, if it can."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    leader = {"arrowstyle": "-", "color": MUTED, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4}
    notes = [
        axes.annotate(p["label"], (p[along], p["metric"]), (0, 0), textcoords="offset points", arrowprops=leader)
        for p in points
    ]
    for note in notes:
        note.set_in_layout(False)
    with quiet():
        figure.draw_without_rendering()  # lays the axes out, so that points have their final places
        figure.set_layout_engine("none")
        centres = [axes.transData.transform(note.xy) for note in notes]
        taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in centres]
        frame = axes.get_window_extent()
        if line is not None:
            height = axes.transData.transform((0, line))[1]
            taken.append(Bbox.from_extents(frame.x0, height - 1, frame.x1, height + 1))
        for note in notes:
            tried: list[tuple[int, int, dict[str, Any], Any, int]] = []
            for distance, (x, y, horizontal, vertical) in itertools.product(_DISTANCES, _DIRECTIONS):
                place = {
                    "position": (x * distance, y * distance),
                    "horizontalalignment": horizontal,
                    "verticalalignment": vertical,
                }
                note.set(**place)
                box = Text.get_window_extent(note)
                inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
                tried.append((box.count_overlaps(taken) + 3 * (not inside), len(tried), place, box, distance))
                if tried[-1][0] == 0:
                    break
            *_, place, box, distance = min(tried, key=lambda attempt: attempt[:2])
            note.set(**place)
            note.arrow_patch.set_visible(distance > _DISTANCES[0])
            taken.append(box)


def quiet() -> AbstractContextManager[object]:
    """Keep matplotlib from warning of letters its own font lacks: the browser draws the text."""
    return warnings.catch_warnings(action="ignore", category=UserWarning)


def _svg(figure: Any, name: str, text: str) -> str:
    """Give the figure as an ``<svg>`` element fit for an HTML page, with ``text`` as its spoken description."""
    buffer = io.StringIO()
    with quiet():
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    for unwanted in (r"<metadata>.*?</metadata>", r"<style.*?</style>", r"<!--.*?-->", r"\n\s*(?=<)"):
        svg = re.sub(unwanted, "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    width, height = (72 * inches for inches in _SIZE)
    start = f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{html.escape(text)}">'
    return re.sub(r"^<svg[^>]*>", lambda _: start, svg)
