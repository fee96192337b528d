"""The report's page: numbers in, one self-contained HTML file out."""

import math
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from token_pruning.errors import ConfigError
from token_pruning.lab.files import write_text
from token_pruning.lab.report import plots
from token_pruning.runtime import drawing
from token_pruning.runtime.drawing import ExplainedToken

_NOTHING = "–"


def write_report(results: Mapping[str, Any], path: Path) -> Path:
    """Write the results as one self-contained HTML page and return its path.

    The page makes no request of any kind: its style and its plots stand inside it.  It is rendered first, then
    written under a temporary name and moved into place, so a failure leaves an older report as it was.
    Without Jinja2 or matplotlib this raises :class:`~token_pruning.errors.ConfigError`.

    ``results`` holds what JSON can hold: ``title``, ``summary``, ``command`` (or none), ``environment``, ``metric``,
    ``note`` (what the metrics are), ``stages`` (the dense model first; each has a ``name``, ``metrics``,
    ``gflops_per_example``, ``relative_flops`` and ``times``, and may have ``tokens_kept_per_layer``,
    ``summaries_per_layer`` and ``thresholds``), ``tokens_entering`` for these, ``curve``, ``by_length`` (or none),
    ``samples`` and ``num_layers``.
    """
    return write_text(Path(path), _render(results))


def load_template(name: str) -> Any:
    """A page's Jinja2 template; whatever it is given is escaped.

    Without Jinja2 or matplotlib this raises :class:`~token_pruning.errors.ConfigError`.
    """
    try:
        import jinja2
        import markupsafe
        import matplotlib  # noqa: F401 - only to know that it is there
    except ImportError as error:
        raise ConfigError("the report needs the report extra: pip install token-pruning[report]") from error

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda file: resources.files(__package__).joinpath(file).read_text("utf-8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # They escape the texts that they are given.
    environment.globals |= {
        f.__name__: lambda *given, f=f: markupsafe.Markup(f(*given))  # nosec B704
        for f in (drawing.words, drawing.legend, drawing.layers, drawing.greyed)
    }
    environment.globals["drawing_style"] = markupsafe.Markup(drawing.STYLE)  # nosec B704
    environment.filters |= {"fixed": _fixed, "significant": _significant, "times": _times}
    return environment.get_template(name)


def _render(results: Mapping[str, Any]) -> str:
    template = load_template("page.html")
    import markupsafe

    stages, metric = results["stages"], results["metric"]
    dense = stages[0]["metrics"].get(metric)
    text: str = template.render(
        results=results,
        metrics=list(dict.fromkeys([metric, *(name for stage in stages for name in stage["metrics"])])),
        gflops=list(stages[0]["gflops_per_example"]),
        times=list(stages[0]["times"]),
        rows=[_row(stage, stages[0], metric) for stage in stages],
        plots=[
            {"svg": markupsafe.Markup(svg), "caption": caption}  # nosec B704  # matplotlib escapes the texts of its SVG
            for svg, caption in _plots(results, dense)
        ],
        layer_rows=_layer_rows(results),
        samples=[arrange_sample(sample) for sample in results["samples"]],
    )
    return text


def _plots(results: Mapping[str, Any], dense: float | None) -> Iterator[tuple[str, str]]:
    """Each plot as SVG, and what it shows."""
    metric = results["metric"]
    points = [p for p in results["curve"] if _is_number(p["metric"]) and _is_number(p["relative_flops"])]
    if points:
        yield (
            plots.curve_plot(points, metric, dense),
            f"The metric, {metric}, against FLOPs relative to the dense model on valid tokens; further up and further "
            "left is better. The dashed line is one point below the dense model.",
        )
    timed = [p for p in points if _is_number(p.get("milliseconds"))]
    if timed:
        yield (
            plots.curve_plot(timed, metric, dense, along="milliseconds"),
            f"The same, {metric}, against milliseconds per text of the engine, in batches.",
        )
    if results.get("by_length"):
        yield (
            plots.length_plot(results["by_length"]),
            "The mean share of a text’s tokens that are left at the entry of the model and after each layer, for texts "
            "of different lengths.",
        )
    if any(stage.get("tokens_kept_per_layer") for stage in results["stages"]):
        yield (
            plots.tokens_plot(results["stages"], results["tokens_entering"]),
            "Mean number of tokens that enter the feed-forward of each layer. The dashed line is the mean number of "
            "valid tokens at the input.",
        )


def _layer_rows(results: Mapping[str, Any]) -> list[tuple[str, str, list[str]]]:
    """What is known of each layer: a name, what it is, and a figure for each layer."""
    found = []
    for stage in results["stages"]:
        for key, what, digits in (
            ("tokens_kept_per_layer", "tokens", 1),
            ("summaries_per_layer", "summary tokens", 1),
            ("thresholds", "threshold", None),
        ):
            if values := stage.get(key):
                shown = [_significant(value) if digits is None else _fixed(value, digits) for value in values]
                found.append((stage["name"], what, shown))
    for group in results.get("by_length") or ():
        shown = [f"{100 * kept:.0f} %" for kept in group["kept"]]
        found.append((plots.token_range(group), f"{group['texts']} texts", shown))
    return found


def _row(stage: Mapping[str, Any], dense: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """Add to a stage what the table compares: points of the metric lost or won, and speed-ups."""
    value, reference = stage["metrics"].get(metric), dense["metrics"].get(metric)
    points = None
    if stage is not dense and _is_number(value) and _is_number(reference):
        points = f"{100 * (value - reference):+.2f}".replace("-", "−")
    speed_ups = {
        name: dense["times"][name] / taken for name, taken in stage["times"].items() if taken and dense["times"][name]
    }
    return {**stage, "points": points, "speed_ups": speed_ups}


def arrange_sample(sample: Mapping[str, Any]) -> dict[str, Any]:
    """One text for the page, from what JSON holds of it: ``tokens``, as :class:`token_pruning.Explanation` has them."""
    label, prediction = sample.get("label"), sample.get("prediction")
    comparable = isinstance(label, str) and isinstance(prediction, str)
    tokens = [ExplainedToken(**token) for token in sample["tokens"]]
    return {
        "tokens": tokens,
        "kept": sum(token.left_after is None for token in tokens),
        "label": label,
        "prediction": prediction,
        "correct": label == prediction if comparable else None,
    }


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _fixed(value: Any, digits: int) -> str:
    return f"{value:.{digits}f}" if _is_number(value) else _NOTHING


def _significant(value: Any) -> str:
    """Write three significant digits, never an exponent for numbers of everyday size."""
    if not _is_number(value):
        return _NOTHING
    if value == 0:
        return "0"
    if abs(value) < 1e-4:
        return f"{value:.2e}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def _times(value: Any) -> str:
    return f"{value:.2f}×" if _is_number(value) else _NOTHING
