"""Texts whose tokens left on the way, as HTML: coloured by the layer, greyed, or line by line.

A fragment needs :data:`STYLE` once on its page, and stands inside an element of the class ``token-pruning``. Nothing is
asked of a network; every text is escaped. Colours follow the page's colour scheme, light or dark.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

from transformers.convert_slow_tokenizer import bytes_to_unicode

_SPECIAL = re.compile(r"\[[A-Z]+\]|</?[a-z]+>")
_WORD_START = ("Ġ", "▁")  # how byte-level BPE and SentencePiece mark a token that begins a word
_BYTES = {letter: byte for byte, letter in bytes_to_unicode().items()}

_WITHOUT_NUMBERS = {
    "max_tokens": "not among those that max_tokens chose",
    "first token": "the first token never leaves",
    "nothing": "no layer could drop it",
}

# ColorBrewer's YlGnBu: even from light to dark, so that it reads without colour vision too.
_COLORS = ("ffffd9", "edf8b1", "c7e9b4", "7fcdbb", "41b6c4", "1d91c0", "225ea8", "253494", "081d58")
_STEPS = 32


@dataclass(frozen=True)
class ExplainedToken:
    """Why a token left, or stayed.

    Attributes:
        text: the token as its tokenizer writes it.
        left_after: the layer (1-based) after whose attention it left; 0 before the first; None if it stayed.
        decided_by: ``"max_tokens"``, ``"vocabulary gate"``, ``"probe"`` or ``"importance"``; of tokens that never leave
            ``"first token"`` or ``"protected"``; ``"nothing"`` where no layer could drop it.
        decided_in: the layer of that comparison, for a token that stayed the last one it passed; 0 before the first;
            None where nothing was compared.
        value: what was compared: its vocabulary entry's score, what the probe said, its importance as the method
            compares it; None where nothing was, or for an infinite number.
        threshold: what it leaves below; for top-k the lowest importance that stayed; None where there is none.
    """

    text: str
    left_after: int | None
    decided_by: str
    decided_in: int | None = None
    value: float | None = None
    threshold: float | None = None

    @property
    def why(self) -> str:
        """What became of it and why, in words."""
        return f"{fate(self.left_after)}: {self._reason('' if self.value is None else f' {self.value:.3g}')}"

    @property
    def rule(self) -> str:
        """Why, in words, but for its own value."""
        return self._reason("")

    def _reason(self, found: str) -> str:
        if self.decided_in is None:
            return _WITHOUT_NUMBERS.get(self.decided_by, self.decided_by)
        where = f" in layer {self.decided_in}" if self.left_after is None and self.decided_in else ""
        limit = ""
        if self.threshold is not None:
            limit = f", {'at least' if self.left_after is None else 'below'} {self.threshold:.3g}"
        return f"{self.decided_by}{found}{where}{limit}"


def fate(left_after: int | None) -> str:
    """What becomes of a token, in words."""
    if left_after is None:
        return "stays to the end"
    return f"left after layer {left_after}" if left_after else "never entered"


def legend(tokens: Iterable[ExplainedToken], num_layers: int) -> str:
    """A list of the colours that occur."""
    found = {_level(token.left_after, num_layers) for token in tokens}
    left = [level if level <= num_layers else None for level in sorted(found)]
    items = [f'<li class="piece {_color(level, num_layers)}">{fate(level)}</li>' for level in left]
    return f'<ul class="legend">{"".join(items)}</ul>'


def words(tokens: Sequence[ExplainedToken], num_layers: int) -> str:
    """The text, each token coloured by where it left, with the reason as its title."""
    parts = []
    for word in _words(tokens):
        pieces = [
            f'<span class="piece {_color(token.left_after, num_layers)}" title="{escape(f"{token.text} {token.why}")}">'
            f"{escape(text)}</span>"
            for token, text in word
        ]
        parts.append(f'<span class="word">{"".join(pieces)}</span>')
    return f'<p class="words">{" ".join(parts)}</p>'


def greyed(tokens: Sequence[ExplainedToken]) -> str:
    """The text, with what left in grey."""
    parts = [
        "".join(
            f"<span>{escape(text)}</span>" if token.left_after is None else f'<span class="gone">{escape(text)}</span>'
            for token, text in word
        )
        for word in _words(tokens)
    ]
    return f'<p class="greyed">{" ".join(parts)}</p>'


def layers(tokens: Sequence[ExplainedToken], num_layers: int) -> str:
    """A table of what is left at the entry and after each layer, without colour: what is gone is struck out.

    Layers after which nothing more has left share a row.
    """
    rows: list[tuple[int, int, list[bool]]] = []
    for layer in range(num_layers + 1):
        gone = [token.left_after is not None and token.left_after <= layer for token in tokens]
        if layer == 0 and not any(gone):
            continue
        if rows and rows[-1][2] == gone and layer > 1:  # the entry is no layer
            rows[-1] = (rows[-1][0], layer, gone)
        else:
            rows.append((layer, layer, gone))
    lines = []
    for first, last, gone in rows:
        name = f"layers {first}–{last}" if last > first else f"layer {first}" if first else "entry"
        lines.append(
            f'<tr><th scope="row">{name} <span>{gone.count(False)} left</span></th>'
            f"<td>{''.join(_runs(tokens, gone))}</td></tr>"
        )
    caption = "What is left after each layer"
    return f'<table class="layers"><caption>{caption}</caption><tbody>{"".join(lines)}</tbody></table>'


def _words(tokens: Sequence[ExplainedToken]) -> list[list[tuple[ExplainedToken, str]]]:
    """Tokens with the text to show, those of one word together."""
    found: list[list[tuple[ExplainedToken, str]]] = []
    for token, (text, joined) in zip(tokens, pieces([token.text for token in tokens]), strict=True):
        if joined and found:
            found[-1].append((token, text))
        else:
            found.append([(token, text)])
    return found


def pieces(tokens: Sequence[str]) -> list[tuple[str, bool]]:
    """A tokenizer's tokens as the text to show, and whether each continues the word before it."""
    marked = any(token.startswith(_WORD_START) for token in tokens)
    in_bytes = any(token.startswith("Ġ") for token in tokens)
    found = []
    after_special = True
    for token in tokens:
        special = _SPECIAL.fullmatch(token) is not None
        if token.startswith("##") and len(token) > 2:
            text, joined = token[2:], not after_special
        elif marked and not special:
            text, joined = token.lstrip("".join(_WORD_START)), not token.startswith(_WORD_START) and not after_special
            if in_bytes and all(letter in _BYTES for letter in text):
                text = bytes(_BYTES[letter] for letter in text).decode(errors="replace")
        else:
            text, joined = token, False
        found.append((text if text.strip() else "␣", joined))
        after_special = special
    return found


def _runs(tokens: Sequence[ExplainedToken], gone: Sequence[bool]) -> Iterator[str]:
    """Neighbouring tokens of one fate together, to keep the page small."""
    before: bool | None = None
    open_run: list[str] = []
    for (text, joined), left in zip(pieces([token.text for token in tokens]), gone, strict=True):
        gap = "" if joined or before is None else " "
        if left == before:
            open_run.append(gap + escape(text))
            continue
        yield _run(open_run, struck=before is True)
        yield gap
        before, open_run = left, [escape(text)]
    yield _run(open_run, struck=before is True)


def _run(texts: Sequence[str], *, struck: bool) -> str:
    return f"<s>{''.join(texts)}</s>" if struck else "".join(texts)


def _level(left_after: int | None, num_layers: int) -> int:
    return num_layers + 1 if left_after is None else left_after


def _color(left_after: int | None, num_layers: int) -> str:
    """The class of the colour: from the first of the scale, never entered, to the last, stays."""
    return f"s{round(_STEPS * _level(left_after, num_layers) / (num_layers + 1))}"


def _scale() -> list[tuple[str, str]]:
    """A background and a text colour for each step, for light pages."""
    found = []
    for step in range(_STEPS + 1):
        whole, part = divmod(step * (len(_COLORS) - 1), _STEPS)
        low, high = (bytes.fromhex(_COLORS[min(place, len(_COLORS) - 1)]) for place in (whole, whole + 1))
        rgb = [round(a + (b - a) * part / _STEPS) for a, b in zip(low, high, strict=True)]
        linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
        luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        found.append(("#" + bytes(rgb).hex(), "#000" if luminance > 0.179 else "#fff"))
    return found


_LINE = "light-dark(#dde1e6, #353d46)"
_RULES = (
    ("p", "margin: 0 0 .75rem"),
    (".words", "max-width: none; line-height: 2"),
    (".word", "white-space: nowrap"),
    (
        ".piece",
        "display: inline-block; line-height: 1.4; padding: .05rem .3rem; font-size: .9375rem; white-space: pre-wrap; "
        "-webkit-print-color-adjust: exact; print-color-adjust: exact",
    ),
    (".piece:first-child", "border-radius: 4px 0 0 4px"),
    (".piece:last-child", "border-radius: 0 4px 4px 0"),
    (".piece:only-child", "border-radius: 4px"),
    (".piece + .piece", "padding-left: .1rem; margin-left: 1px"),
    (".piece:not(:last-child)", "padding-right: .1rem"),
    (".legend", "display: flex; flex-wrap: wrap; gap: .35rem; list-style: none; margin: 0 0 .75rem; padding: 0"),
    (".legend .piece", "padding: .05rem .5rem; margin: 0; border-radius: 4px; font-size: .8125rem"),
    (".greyed", "max-width: none"),
    (".gone", "color: light-dark(#69737d, #7f8a95)"),
    ("s", "color: light-dark(#69737d, #7f8a95); text-decoration-thickness: 1px"),
    ("table", "border-collapse: collapse; font-size: .8125rem; line-height: 1.5; width: 100%"),
    ("caption", "text-align: left; padding-bottom: .25rem; opacity: .75"),
    (
        "th",
        f"padding: .2rem .75rem .2rem 0; text-align: left; vertical-align: baseline; border-top: 1px solid {_LINE}; "
        "font-weight: 400; white-space: nowrap; font-variant-numeric: tabular-nums",
    ),
    (
        "td",
        f"padding: .2rem .75rem .2rem 0; text-align: left; vertical-align: baseline; border-top: 1px solid {_LINE}",
    ),
    (".layers th", "width: 1%"),
    (".layers th span", "display: inline-block; min-width: 4em; text-align: right"),
    ("summary", "cursor: pointer; font-size: .875rem"),
    ("details[open] > summary", "margin-bottom: .5rem"),
)


def _style() -> str:
    # A token that stays longer stands out more from the page, so the dark scheme runs the other way.
    light = _scale()
    colors = [
        (f".s{step}", f"background: light-dark({back}, {dark_back}); color: light-dark({front}, {dark_front})")
        for step, ((back, front), (dark_back, dark_front)) in enumerate(zip(light, light[::-1], strict=True))
    ]
    rules = "".join(f".token-pruning {selector} {{ {body}; }}\n" for selector, body in (*_RULES, *colors))
    # Notebooks say otherwise than the system whether they are light or dark.
    return f"""
.token-pruning {{ overflow-wrap: anywhere; line-height: 1.55; }}
[data-jp-theme-light="true"] .token-pruning, .vscode-light .token-pruning {{ color-scheme: light; }}
[data-jp-theme-light="false"] .token-pruning, .vscode-dark .token-pruning, html[theme="dark"] .token-pruning {{
  color-scheme: dark;
}}
{rules}@media (max-width: 36rem) {{ .token-pruning .layers th span {{ display: block; text-align: left; }} }}
"""


STYLE = _style()
"""CSS of the fragments, without ``<style>`` around it."""
