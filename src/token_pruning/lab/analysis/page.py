"""The analysis for a reader: tables in Markdown, and the sampled texts as one self-contained HTML page."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from token_pruning.lab.analysis.plots import pruning
from token_pruning.lab.report.page import arrange_sample, load_template
from token_pruning.lab.tables import escape, table

_NOTHING = "–"


def markdown(analysis: Mapping[str, Any]) -> str:
    """``analysis.md`` from the content of ``analysis.json``; whatever a data set or a user named is escaped."""
    methods, metric = analysis["checkpoints"], analysis["metric"]
    others = [name for name in methods[0]["metrics"] if name != metric]
    parts = [
        f"# Where the tokens go: {escape(analysis['task'])}",
        f"    {analysis['command']}",
        f"{analysis['examples']} examples of the split {escape(analysis['split'])}, {analysis['dtype']}, batches of "
        f"{analysis['batch_size']}, at most {analysis['max_length']} tokens. *Kept* is the mean over the layers of "
        "tokens in the feed-forward ÷ tokens at the input. Relative FLOPs are against the dense model on valid tokens. "
        "Every figure, and those of every example: [analysis.json](analysis.json).",
        _table(
            ["method", "checkpoint", "prune_mode", metric, *others, "kept", "relative FLOPs"],
            [
                [
                    m["name"], m["checkpoint"], m["prune_mode"] or "dense",
                    *(_number(m["metrics"][name]) for name in (metric, *others)),
                    _number(m["kept_fraction"]), _number(m["relative_flops"]),
                ]
                for m in methods
            ],
        ),
        *_by_length(analysis),
        *_by_layer(methods),
        *_by_outcome(methods, regression=analysis["regression"]),
    ]  # fmt: skip
    if analysis["samples"]:
        parts += ["## Samples", "In colour: [trajectories.html](trajectories.html)."]
    for number, sample in enumerate(_samples(analysis), start=1):
        parts += _sample(number, sample)
    return "\n\n".join(parts) + "\n"


def _by_length(analysis: Mapping[str, Any]) -> list[str]:
    methods, metric = analysis["checkpoints"], analysis["metric"]
    rows = [
        [
            f"{row['shortest']} to {row['longest']}", str(row["examples"]), m["name"],
            _number(row["metrics"][metric]), _number(row["kept_fraction"]), _number(row["relative_flops"]),
        ]
        for i in range(len(methods[0]["by_length"]))
        for m in methods
        for row in [m["by_length"][i]]
    ]  # fmt: skip
    return [
        "## By length",
        f"Examples in quantiles of their number of tokens; {analysis['quantiles']} were asked for, and examples of one "
        "length are never split.",
        "![metric and tokens kept by length](length.png)",
        _table(["tokens", "examples", "method", metric, "kept", "relative FLOPs"], rows),
    ]


def _by_layer(methods: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [
        [str(layer + 1), *(_box(m["by_layer"][layer]) if layer < m["layers"] else _NOTHING for m in methods)]
        for layer in range(max(m["layers"] for m in methods))
    ]
    return [
        "## By layer",
        "The fraction of its tokens that an example has left after each layer: median, and quartiles in brackets. In "
        "the plot boxes are quartiles, whiskers the 5th and 95th percentiles, dots the mean; dense models are left "
        "out.",
        "![tokens left after each layer](layers.png)",
        _table(["layer", *(m["name"] for m in methods)], rows),
    ]


def _by_outcome(methods: Sequence[Mapping[str, Any]], *, regression: bool) -> list[str]:
    rows = [
        [
            m["name"], row["group"], str(row["examples"]),
            *([_number(row["mean_absolute_error"])] if regression else []),
            _number(row["mean"]), _box(row),
        ]
        for m in methods
        for row in m["by_outcome"]
    ]  # fmt: skip
    error = ["mean error"] if regression else []
    parts = [
        "## By error" if regression else "## Right against wrong",
        "The fraction of tokens kept of examples "
        + ("in thirds of their absolute error." if regression else "predicted right and wrong."),
        "![tokens kept by outcome](outcome.png)",
        _table(["method", "group", "examples", *error, "mean kept", "median (quartiles)"], rows),
    ]
    if regression:
        parts.append("Pearson correlation of the fraction kept and the absolute error:")
        parts.append(_table(["method", "correlation"], [[m["name"], _number(m["error_correlation"])] for m in methods]))
    return parts


def _sample(number: int, sample: Mapping[str, Any]) -> list[str]:
    shown = sample["methods"]
    rows = [["prediction", *(str(m["prediction"]) for m in shown)]]
    if any(token["left_after"] == 0 for m in shown for token in m["tokens"]):
        rows.append(["never entered", *(_tokens(m, 0) for m in shown)])
    rows += [
        [f"left after layer {layer}", *(_tokens(m, layer) for m in shown)]
        for layer in range(1, max(m["layers"] for m in shown) + 1)
    ]
    rows.append(["stays to the end", *(_tokens(m, None) for m in shown)])
    return [
        f"**Sample {number}**: example {sample['index']}, {sample['length']} tokens, label "
        f"{escape(str(sample['label']))}",
        _table(["", *(m["name"] for m in shown)], rows),
    ]


def trajectories(analysis: Mapping[str, Any]) -> str:
    """``trajectories.html``: the sampled texts, each token coloured by the layer it left at.

    Raises:
        ConfigError: without the report extra.
    """
    samples = [
        {
            **sample,
            "methods": [
                {"name": method["name"], "layers": method["layers"], **arrange_sample(method)}
                for method in sample["methods"]
            ],
        }
        for sample in _samples(analysis)
    ]
    text: str = load_template("trajectories.html").render(
        title=f"Where the tokens go: {analysis['task']}",
        command=analysis["command"],
        samples=samples,
    )
    return text


def _samples(analysis: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    """Sample by sample what the checkpoints hold, those that prune, or all if none does."""
    shown = pruning(analysis["checkpoints"])
    for i, index in enumerate(analysis["samples"]):
        first = shown[0]["samples"][i]
        yield {
            "index": index,
            "length": len(first["tokens"]),
            "label": first["label"],
            "methods": [{"name": m["name"], "layers": m["layers"], **m["samples"][i]} for m in shown],
        }


def _tokens(method: Mapping[str, Any], left_after: int | None) -> str:
    """The tokens that left after a layer, 0 for those that never entered, or that stayed."""
    return " ".join(token["text"] for token in method["tokens"] if token["left_after"] == left_after) or _NOTHING


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of names and texts that are not ours."""
    return table([escape(cell) for cell in header], [[escape(cell) for cell in row] for row in rows])


def _number(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.3f}"


def _box(row: Mapping[str, Any]) -> str:
    if row["median"] is None:
        return _NOTHING
    return f"{row['median']:.2f} ({row['p25']:.2f} to {row['p75']:.2f})"
