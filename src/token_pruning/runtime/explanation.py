"""Which tokens of a text left where, and why."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from token_pruning.errors import ConfigError
from token_pruning.families import shape_of
from token_pruning.pruners import LayerTokens, Pruner
from token_pruning.ragged import PackedTokens, layout_from_mask
from token_pruning.runtime.adapters import adapter_of
from token_pruning.runtime.drawing import STYLE, ExplainedToken, fate, layers, legend, words
from token_pruning.runtime.prune import hugging_face_model, record, token_pruner_of
from token_pruning.runtime.roles import protected
from token_pruning.runtime.selection import select
from token_pruning.runtime.token_pruner import TokenPruner
from token_pruning.runtime.trace import PassRecord

_WIDTH = 100  # of the text form


@dataclass(frozen=True)
class Explanation:
    """Which tokens of a text left where, and why.

    ``str()`` of it is text for a terminal, a notebook shows it coloured, and :attr:`html` is a page for a browser.

    Attributes:
        tokens: the text's, in their order, special ones included.
        num_layers: of the model.
        pruner: the method.
        truncated: tokens that were cut off before the model saw the text.
    """

    tokens: tuple[ExplainedToken, ...]
    num_layers: int
    pruner: Pruner
    truncated: int = 0

    @property
    def summary(self) -> str:
        """How many tokens there are, and how many stay, in words."""
        stay = sum(token.left_after is None for token in self.tokens)
        cut = f"; {self.truncated} more were truncated" if self.truncated else ""
        return f"{len(self.tokens)} tokens, {self.num_layers} layers: {stay} stay to the end{cut}"

    def __str__(self) -> str:
        """Who left where, and by which numbers."""
        parts = groupby(self.tokens, key=lambda token: token.left_after is None)
        left = " ".join(" ".join(token.text for token in some) if stay else "…" for stay, some in parts)
        lines = [self.summary, *_wrapped(left)]

        def decision(token: ExplainedToken) -> tuple[Any, ...]:
            where = self.num_layers + 1 if token.left_after is None else token.left_after
            return where, token.decided_in is None, token.decided_in or 0, token.decided_by, token.threshold or 0.0

        for _, group in groupby(sorted(self.tokens, key=decision), key=decision):
            found = list(group)
            shown = " ".join(
                text if token.value is None else f"{text} {token.value:.3g}"
                for token, text in ((token, token.text.strip() or "␣") for token in found)
            )
            lines += _wrapped(f"{fate(found[0].left_after)} ({found[0].rule}): {shown}")
        return "\n".join(lines)

    @property
    def html(self) -> str:
        """A page of its own, which needs no network: the text in colour, and every decision; light and dark."""
        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            '<meta name="color-scheme" content="light dark"><title>Which tokens left, and why</title><style>'
            ":root { color-scheme: light dark; } "
            "body { margin: 1.5rem auto; padding: 0 1rem; max-width: 60rem; font: 16px/1.55 system-ui, sans-serif; "
            "background: light-dark(#fff, #1b2026); color: light-dark(#1c2228, #e6eaee); }"
            f"</style></head><body>{self._repr_html_()}</body></html>\n"
        )

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><td>{escape(token.text)}</td><td>{escape(token.why)}</td></tr>" for token in self.tokens)
        return (
            f'<div class="token-pruning"><style>{STYLE}</style><p>{escape(self.summary)}</p>'
            f"{legend(self.tokens, self.num_layers)}{words(self.tokens, self.num_layers)}"
            f"<details><summary>Layer by layer</summary>{layers(self.tokens, self.num_layers)}</details>"
            f"<details><summary>Why</summary><table><caption>Every token’s last decision</caption><tbody>{rows}"
            "</tbody></table></details></div>"
        )


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)


def explain(model: Any, text: str | Sequence[str], tokenizer: Any = None) -> Explanation:
    """Which tokens of a text leave after which layer, and why.

    The model, or engine, is run on the text once, in evaluation mode.

    Args:
        model: a pruned model of transformers; a ``SentenceTransformer`` or ``CrossEncoder`` with one; or what
            :func:`token_pruning.compile` made of any of these.
        text: or a pair of texts, such as a reranker's query and passage. It is truncated as the model would do it, or
            to the model's positions; not where the method has ``max_tokens``. A sentence-transformers model's default
            prompt is put before it.
        tokenizer: the model's, which a model or engine of transformers does not know; sentence-transformers' have it.

    Returns:
        An :class:`Explanation`: text, HTML, and data. Where the head reads the first token only, the last layer's
        decision is shown though nothing depends on it any more.

    Raises:
        ConfigError: if the model is not pruned, or takes no text, for a missing tokenizer, or a single text for a pair.
    """
    adapter = adapter_of(model)
    whole = token_pruner_of(model).pruner.max_tokens is not None
    parts = [text] if isinstance(text, str) else list(text) if isinstance(text, Sequence) else []
    if len(parts) not in (1, 2) or not all(isinstance(part, str) for part in parts):
        raise ConfigError(f"text is {text!r}; it must be a text, or a pair of texts")
    if adapter is not None:
        pairs = adapter.takes_pairs(model)
        if pairs != (len(parts) == 2):
            wanted = "a pair of texts, such as (query, passage)" if pairs else "one text"
            raise ConfigError(f"text is {text!r}; a {type(model).__name__} takes {wanted}")
        given = tuple(parts) if pairs else parts[0]
        encoded, everything = (adapter.tokenized(model, [given], whole=cut)[0] for cut in (whole, True))
        tokenizer = tokenizer or model.tokenizer
    else:
        if tokenizer is None:
            raise ConfigError(f"tokenizer is missing; a {type(model).__name__} does not know its own")
        longest = shape_of(_config_of(model)).max_positions
        everything = tokenizer(*parts, verbose=False)
        encoded = everything
        if not whole and longest is not None and len(everything["input_ids"]) > longest:
            encoded = tokenizer(*parts, truncation=True, max_length=longest)
    cut_off = len(everything["input_ids"]) - len(encoded["input_ids"])
    return explain_tokens(model, encoded, tokenizer, truncated=cut_off)


def explain_tokens(model: Any, encoded: Mapping[str, Any], tokenizer: Any, *, truncated: int = 0) -> Explanation:
    """:func:`explain` of a text that is tokenized.

    Args:
        model: see :func:`explain`.
        encoded: ``input_ids``, and ``token_type_ids`` where the model has such; lists of integers.
        tokenizer: what names the tokens.
        truncated: tokens that were cut off.
    """
    token_pruner = token_pruner_of(model)
    ids = torch.tensor(encoded["input_ids"], dtype=torch.int64, device="cpu")
    names = [name for name in ("input_ids", "token_type_ids") if name in encoded]
    inputs = {name: torch.tensor([encoded[name]], dtype=torch.int64, device="cpu") for name in names}
    with record(model) as trace:
        _run(model, inputs)
    [done] = trace.passes
    texts = tokenizer.convert_ids_to_tokens(ids.tolist())
    tokens = tuple(
        ExplainedToken(text, *found) for text, found in zip(texts, _fates(done, token_pruner, ids), strict=True)
    )
    return Explanation(tokens, token_pruner.num_layers, token_pruner.pruner, truncated)


def _config_of(model: Any) -> Any:
    inner = model if not isinstance(model, nn.Module) else hugging_face_model(model).base_model
    return inner.config


def _run(model: Any, inputs: dict[str, Tensor]) -> None:
    adapter = adapter_of(model)
    runs = model if adapter is None else adapter.engine(model) or adapter.inner(model)
    inner = hugging_face_model(runs) if isinstance(runs, nn.Module) else None
    head = runs._model_class if inner is None else type(inner)
    if head.__name__.endswith("ForMultipleChoice"):  # of one choice
        inputs = {name: ids[None] for name, ids in inputs.items()}
    if inner is None:  # an engine
        runs(**inputs)
        return
    if inner.main_input_name != "input_ids":
        raise ConfigError(f"a {type(inner).__name__} takes {inner.main_input_name}; only texts can be explained")
    with _evaluating(runs), torch.no_grad():
        runs(**{name: ids.to(inner.device) for name, ids in inputs.items()})


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


_Fate = tuple[int | None, str, int | None, float | None, float | None]
"""The fields of an :class:`ExplainedToken` after its text."""


def _fates(done: PassRecord, token_pruner: TokenPruner, ids: Tensor) -> list[_Fate]:
    """What became of each token of one text.

    Args:
        done: the text's pass; of a text in windows they are its sequences.
        token_pruner: the method and its tensors.
        ids: ``[tokens]`` int64, on the CPU.
    """
    pruner = token_pruner.pruner
    layout = layout_from_mask(torch.ones(1, len(ids), dtype=torch.bool, device="cpu"))
    tokens = PackedTokens(ids, torch.arange(len(ids), device="cpu"), None, layout)
    selection = select(tokens, pruner)
    chosen = tokens if selection is None else selection.tokens
    rows = range(len(ids)) if selection is None else selection.rows.tolist()
    fates = _fates_of_chosen(done, token_pruner, chosen)
    found: list[_Fate] = [(0, "max_tokens", None, None, None)] * len(ids)
    for row, its_fate in zip(rows, fates, strict=True):  # of a token in several windows the last one counts
        found[row] = its_fate
    return found


def _fates_of_chosen(done: PassRecord, token_pruner: TokenPruner, tokens: PackedTokens) -> list[_Fate]:
    """What became of each token that ``max_tokens`` chose, of all where there is no such limit."""
    pruner, valid = token_pruner.pruner, done.valid
    row_of = {place: row for row, place in enumerate(valid.indices.tolist())}
    fates: list[_Fate] = [(None, "nothing", None, None, None)] * valid.total
    there = set(row_of.values())

    def decide(layer: int, by: str, entered: Tensor, left: Tensor, values: Tensor, limits: Tensor | None) -> None:
        staying = {row_of[place] for place in left.tolist()}
        numbers = values.tolist()
        below = [None] * len(numbers) if limits is None else limits.tolist()
        for place, value, limit in zip(entered.tolist(), numbers, below, strict=True):
            row = row_of[place]
            if row in there:  # not a summary in the place of a token that left before
                where = None if row in staying else layer
                fates[row] = (where, by, layer, _finite(value), _finite(limit))
        there.intersection_update(staying)

    if pruner.vocabulary_threshold:
        assert token_pruner.vocabulary_scores is not None and tokens.ids is not None
        values = token_pruner.vocabulary_scores.cpu()[tokens.ids]
        limits = values.new_full(values.shape, pruner.vocabulary_threshold)
        decide(0, "vocabulary gate", valid.indices, done.entering.indices, values, limits)
    can_drop = token_pruner.dropping_layers()
    before = None
    for layer, each in sorted(done.layers.items()):
        if each.scores is not None and can_drop[layer - 1]:
            compared = pruner.compared(
                LayerTokens(
                    layer=layer,
                    num_layers=token_pruner.num_layers,
                    layout=each.entering,
                    scores=each.scores,
                    input_lengths=done.entering.lengths_tensor,
                    threshold=None if token_pruner.thresholds is None else token_pruner.thresholds[layer - 1],
                    summaries=None if before is None else before.present,
                )
            )
            by = "importance" if token_pruner.probe(layer) is None else "probe"
            decide(layer, by, each.entering.indices, each.leaving.indices[each.token_rows], *compared)
        before = each.summaries
    stays = protected(tokens, pruner)
    for row in [] if stays is None else stays.nonzero().flatten().tolist():
        fates[row] = (None, "protected", None, None, None)
    for row in valid.first_rows.tolist():
        fates[row] = (None, "first token", None, None, None)
    return fates


def _finite(value: float | None) -> float | None:
    return value if value is not None and abs(value) < float("inf") else None
