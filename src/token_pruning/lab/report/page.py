"""The report's page: numbers in, one self-contained HTML file out."""

import math
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from token_pruning.errors import ConfigError
from token_pruning.lab.files import write_text
from token_pruning.lab.report import plots

_NOTHING = "–"
_SPECIAL = re.compile(r"\[[A-Z]+\]|</?[a-z]+>")
_WORD_START = ("Ġ", "▁")  # how byte-level BPE and SentencePiece mark a token that begins a word


def write_report(results: Mapping[str, Any], path: Path) -> Path:
    """Write the results as one self-contained HTML page and return its path.

    The page makes no request of any kind: its style and its plots stand inside it.  It is rendered first, then
    written under a temporary name and moved into place, so a failure leaves an older report as it was.
    Without Jinja2 or matplotlib this raises :class:`~token_pruning.errors.ConfigError`.

    ``results`` holds what JSON can hold: ``title``, ``summary``, ``environment``, ``metric``, ``stages`` (the
    dense model first), ``tokens_entering``, ``curve``, ``samples`` and ``num_layers``.
    """
    return write_text(Path(path), _render(results))


def load_template(name: str) -> Any:
    """A page's Jinja2 template; whatever it is given is escaped.

    Without Jinja2 or matplotlib this raises :class:`~token_pruning.errors.ConfigError`.
    """
    try:
        import jinja2
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
    environment.filters |= {"fixed": _fixed, "significant": _significant, "times": _times}
    return environment.get_template(name)


def _render(results: Mapping[str, Any]) -> str:
    template = load_template("page.html")
    import markupsafe

    stages, metric, num_layers = results["stages"], results["metric"], results["num_layers"]
    dense = stages[0]["metrics"].get(metric)
    points = [p for p in results["curve"] if _is_number(p["metric"]) and _is_number(p["relative_flops"])]
    tokens = plots.tokens_plot(stages, results["tokens_entering"])
    text: str = template.render(
        results=results,
        metrics=list(dict.fromkeys([metric, *(name for stage in stages for name in stage["metrics"])])),
        rows=[_row(stage, stages[0], metric) for stage in stages],
        tokens_plot=markupsafe.Markup(tokens),  # nosec B704  # matplotlib escapes the texts of its SVG
        curve_plot=markupsafe.Markup(plots.curve_plot(points, metric, dense)) if points else None,  # nosec B704  # likewise
        samples=[arrange_sample(sample, num_layers) for sample in results["samples"]],
        palette=palette(num_layers + 1),
    )
    return text


def _row(stage: Mapping[str, Any], dense: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """Add to a stage what the table compares: points of the metric lost or won, and the speed-up."""
    value, reference = stage["metrics"].get(metric), dense["metrics"].get(metric)
    seconds, dense_seconds = stage["seconds"], dense["seconds"]
    points = None
    if stage is not dense and _is_number(value) and _is_number(reference):
        points = f"{100 * (value - reference):+.2f}".replace("-", "−")
    speed_up = dense_seconds / seconds if seconds and dense_seconds else None
    return {**stage, "points": points, "speed_up": speed_up}


def arrange_sample(sample: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """Arrange one text for the page: words of coloured pieces, then what is left of it after every layer."""
    survived = sample["survived_layers"]
    pieces = [
        {"text": text, "joined": joined, "level": level, "token": token}
        for (text, joined), token, level in zip(_pieces(sample["tokens"]), sample["tokens"], survived, strict=True)
    ]
    words: list[list[dict[str, Any]]] = []
    for piece in pieces:
        if piece["joined"] and words:
            words[-1].append(piece)
        else:
            words.append([piece])
    layers = [
        {"number": layer, "kept": sum(level >= layer for level in survived), "runs": _runs(pieces, layer)}
        for layer in range(1, num_layers + 1)
    ]
    label, prediction = sample.get("label"), sample.get("prediction")
    comparable = isinstance(label, str) and isinstance(prediction, str)
    correct = label == prediction if comparable else None
    return {"words": words, "layers": layers, "label": label, "prediction": prediction, "correct": correct}


def _pieces(tokens: Sequence[str]) -> list[tuple[str, bool]]:
    """Turn a tokenizer's tokens into the text to show, and whether it continues the word before it."""
    marked = any(token.startswith(_WORD_START) for token in tokens)
    pieces = []
    after_special = True
    for token in tokens:
        special = _SPECIAL.fullmatch(token) is not None
        if token.startswith("##") and len(token) > 2:
            text, joined = token[2:], not after_special
        elif marked and not special:
            text, joined = token.lstrip("".join(_WORD_START)), not token.startswith(_WORD_START) and not after_special
        else:
            text, joined = token, False
        pieces.append((text if text.strip() else "␣", joined))
        after_special = special
    return pieces


def _runs(pieces: Sequence[Mapping[str, Any]], layer: int) -> list[tuple[bool, str]]:
    """Join neighbouring tokens of one fate, ``(still there after this layer, text)``, to keep the page small."""
    runs: list[tuple[bool, str]] = []
    for piece in pieces:
        kept = piece["level"] >= layer
        gap = "" if piece["joined"] or not runs else " "
        if runs and runs[-1][0] == kept:
            runs[-1] = (kept, runs[-1][1] + gap + piece["text"])
        else:
            if gap:
                runs.append((True, gap))
            runs.append((kept, piece["text"]))
    return runs


def palette(levels: int) -> dict[str, list[tuple[str, str]]]:
    """Give a background and a text colour for every level, for the light and the dark scheme.

    Yellow–green–blue runs evenly from light to dark, so it also reads without colour vision.
    A token that stays longer stands out more from the page, so the dark scheme runs the other way.
    """
    import matplotlib
    from matplotlib.colors import to_hex

    light = []
    for level in range(levels):
        rgb = matplotlib.colormaps["YlGnBu"](0.04 + 0.96 * level / max(levels - 1, 1))[:3]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
        luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        light.append((str(to_hex(rgb)), "#000" if luminance > 0.179 else "#fff"))
    return {"light": light, "dark": light[::-1]}


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
