"""Texts in batches by tokens: tokenised as the model does it, never padded."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.autonotebook import tqdm

BATCH_TOKENS = 8192
"""Tokens of one batch that enter the encoder, but for a longer text, which is a batch of its own."""

_TOKENIZED_AT_ONCE = 512  # texts: tokenizers spread a call over threads, and ids as Python integers take memory


@dataclass(frozen=True)
class Batch:
    """Some texts, one after the other.

    Attributes:
        places: where each text stands among the inputs.
        ids: ``[tokens]`` int64.
        cu_seqlens: ``[texts + 1]`` int64: where each text begins and ends.
        token_types: ``[tokens]`` int64, or None.
        features: what else the tokenisation says of all of them, such as ``prompt_length``.
    """

    places: list[int]
    ids: Tensor
    cu_seqlens: Tensor
    token_types: Tensor | None
    features: dict[str, Any]

    @property
    def lengths(self) -> Tensor:
        """``[texts]`` int64."""
        return self.cu_seqlens.diff()


def batches(
    model: Any, inputs: list[Any], prompt: str | None, show_progress_bar: bool, most: int | None, **options: Any
) -> Iterator[Batch]:
    """All inputs, the longest first.

    Args:
        model: a SentenceTransformer or CrossEncoder.
        inputs: texts, or pairs of texts.
        prompt: put before each text.
        show_progress_bar: of the texts that are done.
        most: tokens of a text that enter the encoder; None for all.
        options: for the model's ``preprocess``.
    """
    given = _unpadded(options.pop("processing_kwargs", None) or {})
    order = np.argsort([-model._input_length(text) for text in inputs], kind="stable").tolist()
    with tqdm(total=len(inputs), desc="Texts", disable=not show_progress_bar) as progress:
        for first in range(0, len(order), _TOKENIZED_AT_ONCE):
            places = order[first : first + _TOKENIZED_AT_ONCE]
            features = dict(
                model.preprocess([inputs[i] for i in places], prompt=prompt, processing_kwargs=given, **options)
            )
            ids, types = features.pop("input_ids"), features.pop("token_type_ids", None)
            features = {name: value for name, value in features.items() if not isinstance(value, list)}
            for some in _by_tokens([min(len(row), most or len(row)) for row in ids]):
                yield Batch(
                    places[some], _packed(ids[some]), _ends(ids[some]), types and _packed(types[some]), features
                )
                progress.update(some.stop - some.start)


def tokenized(model: Any, texts: Sequence[Any], prompt: str | None, *, whole: bool) -> list[dict[str, Any]]:
    """Each text's ``input_ids``, and ``token_type_ids`` where the model has such; without truncation if ``whole``."""
    options = _unpadded({"text": {"truncation": False, "verbose": False}} if whole else {})
    found = []
    for first in range(0, len(texts), _TOKENIZED_AT_ONCE):
        some = [*texts[first : first + _TOKENIZED_AT_ONCE]]
        features = model.preprocess(some, prompt=prompt, processing_kwargs=options)
        names = [name for name in ("input_ids", "token_type_ids") if name in features]
        found += [dict(zip(names, rows, strict=True)) for rows in zip(*(features[name] for name in names), strict=True)]
    return found


def _unpadded(given: dict[str, Any]) -> dict[str, Any]:
    """Settings of a tokenisation into lists, which need no padding; whatever the model or the caller would pad to."""
    return {
        **given,
        "text": {**given.get("text", {}), "padding": False},
        "common": {**given.get("common", {}), "return_tensors": None},
    }


def _by_tokens(lengths: list[int]) -> Iterator[slice]:
    """Runs of at most :data:`BATCH_TOKENS`, each at least one text."""
    first, total = 0, 0
    for place, length in enumerate(lengths):
        if place > first and total + length > BATCH_TOKENS:
            yield slice(first, place)
            first, total = place, 0
        total += length
    yield slice(first, len(lengths))


def _packed(rows: list[list[int]]) -> Tensor:
    return torch.tensor([value for row in rows for value in row], dtype=torch.int64)


def _ends(rows: list[list[int]]) -> Tensor:
    return torch.tensor([0, *accumulate(map(len, rows))], dtype=torch.int64)
