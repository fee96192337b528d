"""The analyses' plots as PNG, in the report's style and its light colours."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from token_pruning.lab.report.plots import legend, new_figure, quiet, style

INK, MUTED, GRID = "#1c2228", "#59636e", "#dde1e6"
DENSE = "#7b8794"
SERIES = ("#1f6fb4", "#d9730d", "#12876a", "#b04a8c", "#8a6d00", "#c2413b", "#5b4fb8")
MARKERS = ("o", "s", "^", "v", "P", "X", "p")
_DPI = 160

Methods = Sequence[Mapping[str, Any]]


def length_plot(methods: Methods, metric: str) -> bytes:
    """The metric and the fraction of tokens kept in each quantile of length, side by side."""
    with style("length", INK, MUTED, GRID):
        figure, (quality, kept) = new_figure((9, 3.8), 2)
        groups = methods[0]["by_length"]
        for method, (color, marker) in zip(methods, _looks(methods), strict=True):
            rows = method["by_length"]
            line = {"color": color, "marker": marker, "markersize": 5, "linewidth": 1.4}
            quality.plot(range(len(rows)), [row["metrics"][metric] for row in rows], label=method["name"], **line)
            kept.plot(range(len(rows)), [row["kept_fraction"] for row in rows], **line)
        for axes, name in ((quality, metric), (kept, "mean fraction of tokens kept")):
            axes.set_xticks(range(len(groups)), [_range(row) for row in groups], rotation=45 if len(groups) > 6 else 0)
            axes.margins(x=0.08)
            axes.set_xlabel("tokens at the input")
            axes.set_ylabel(name)
            axes.ticklabel_format(axis="y", useOffset=False)
            axes.grid(axis="y")
        kept.set_ylim(0, 1.04)
        legend(figure)
        return png(figure)


def layer_plot(methods: Methods) -> bytes:
    """A box for every layer and method: the fraction of an example's tokens left after the layer."""
    methods = pruning(methods)
    layers = max(len(method["by_layer"]) for method in methods)
    with style("layers", INK, MUTED, GRID):
        figure, (axes,) = new_figure((min(max(6.0, 1.5 + 0.22 * layers * len(methods)), 16), 3.8))
        looks = _looks(methods)
        width = 0.8 / len(methods)
        for i, (method, (color, _)) in enumerate(zip(methods, looks, strict=True)):
            offset = (i - (len(methods) - 1) / 2) * width
            places = [row["layer"] + offset for row in method["by_layer"]]
            _boxes(axes, method["by_layer"], places, width * 0.8, color, method["name"])
        for layer in range(1, layers):
            axes.axvline(layer + 0.5, color=GRID, linewidth=0.8, zorder=0)
        axes.set_xlim(0.5, layers + 0.5)
        axes.set_xticks(range(1, layers + 1), range(1, layers + 1))
        axes.set_xlabel("layer")
        axes.set_ylabel("fraction of tokens left")
        axes.set_ylim(0, 1.04)
        axes.grid(axis="y")
        legend(figure)
        return png(figure)


def outcome_plot(methods: Methods) -> bytes:
    """A box for every method and outcome: the mean fraction of an example's tokens kept."""
    methods = pruning(methods)
    groups = list(dict.fromkeys(row["group"] for method in methods for row in method["by_outcome"]))
    with style("outcome", INK, MUTED, GRID):
        letters = max(len(method["name"]) for method in methods)  # of the tick labels
        figure, (axes,) = new_figure((min(max(6.0, 1 + max(1.2, 0.09 * letters) * len(methods)), 16), 3.8))
        width = 0.6 / len(groups)
        for i, group in enumerate(groups):
            offset = (i - (len(groups) - 1) / 2) * width
            found = [
                (place + offset, row)
                for place, method in enumerate(methods)
                for row in method["by_outcome"]
                if row["group"] == group and row["examples"]
            ]
            places, rows = [place for place, _ in found], [row for _, row in found]
            _boxes(axes, rows, places, width * 0.7, SERIES[i % len(SERIES)], group)
        axes.set_xlim(-0.6, len(methods) - 0.4)
        axes.set_xticks(range(len(methods)), [method["name"] for method in methods])
        axes.set_ylabel("mean fraction of tokens kept")
        low, high = axes.get_ylim()  # as narrow as the boxes, but no magnifying glass
        axes.set_ylim(max(0, min(low, (low + high) / 2 - 0.06)), min(1.04, max(high, (low + high) / 2 + 0.06)))
        axes.grid(axis="y")
        legend(figure)
        return png(figure)


def pruning(methods: Methods) -> Methods:
    """The methods that drop tokens; all of them if none does."""
    return [method for method in methods if method["prune_mode"] is not None] or methods


def _looks(methods: Methods) -> list[tuple[str, str]]:
    """A colour and a marker for each method: grey diamonds for a dense one."""
    looks = []
    drawn = 0
    for method in methods:
        if method["prune_mode"] is None:
            looks.append((DENSE, "D"))
        else:
            looks.append((SERIES[drawn % len(SERIES)], MARKERS[drawn % len(MARKERS)]))
            drawn += 1
    return looks


def _boxes(
    axes: Any, rows: Sequence[Mapping[str, Any]], places: Sequence[float], width: float, color: str, name: str
) -> None:
    """Quartiles as a box, the median as a line, the 5th and 95th percentiles as whiskers, the mean as a dot."""
    from matplotlib.colors import to_rgba

    stats = [
        {"whislo": r["p5"], "q1": r["p25"], "med": r["median"], "q3": r["p75"], "whishi": r["p95"], "mean": r["mean"]}
        for r in rows
    ]
    drawn = axes.bxp(
        stats,
        positions=places,
        widths=width,
        showfliers=False,
        showmeans=True,
        patch_artist=True,
        manage_ticks=False,
        boxprops={"facecolor": to_rgba(color, 0.35), "edgecolor": color},
        medianprops={"color": color, "linewidth": 1.8},
        whiskerprops={"color": color},
        capprops={"color": color},
        meanprops={"marker": "o", "markersize": 3, "markerfacecolor": INK, "markeredgecolor": INK},
    )
    if drawn["boxes"]:
        drawn["boxes"][0].set_label(name)


def _range(row: Mapping[str, Any]) -> str:
    shortest, longest = row["shortest"], row["longest"]
    return f"{shortest}" if shortest == longest else f"{shortest}–{longest}"


def png(figure: Any) -> bytes:
    """The figure as the bytes of a PNG file, the same for the same figure."""
    buffer = io.BytesIO()
    with quiet():
        figure.savefig(buffer, format="png", dpi=_DPI, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()
