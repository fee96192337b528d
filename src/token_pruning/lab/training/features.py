"""Texts as features: tokenized, labelled in the order of a model's outputs, padded to batches."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import DataCollatorWithPadding

from token_pruning.errors import ConfigError
from token_pruning.families import shape_of
from token_pruning.lab.data import Task, TextExamples
from token_pruning.lab.training.options import flag
from token_pruning.runtime.prune import attachment_of, is_pruned


def tokenize(tokenizer: Any, examples: TextExamples, model: Any, max_length: int | None) -> list[dict[str, Any]]:
    """Tokenized texts, one dictionary of lists each.

    Args:
        tokenizer: the model's.
        examples: texts.
        model: dense or pruned; ``max_tokens`` of its pruner chooses among all of a text's tokens: nothing is truncated.
        max_length: at most so many tokens; None for all.

    Raises:
        ConfigError: if ``max_length`` is more than the model's positions, or leaves no room for text.
    """
    if is_pruned(model) and attachment_of(model).token_pruner.pruner.max_tokens is not None:
        max_length = None
    longest = shape_of(model.config).max_positions
    if max_length is not None and longest is not None and max_length > longest:
        raise ConfigError(f"{flag('max_length')} is {max_length}; the model has positions for at most {longest} tokens")
    return encode(tokenizer, examples, max_length)


def encode(tokenizer: Any, examples: TextExamples, max_length: int | None) -> list[dict[str, Any]]:
    """As :func:`tokenize`, for no model in particular."""
    if max_length is not None:
        _check_room(tokenizer, examples, max_length)
    cut = {"truncation": max_length is not None, "max_length": max_length, "verbose": False}
    encoded = tokenizer(examples.first, examples.second, **cut)
    return [{name: encoded[name][i] for name in encoded} for i in range(len(examples))]


def _check_room(tokenizer: Any, examples: TextExamples, max_length: int) -> None:
    special = tokenizer.num_special_tokens_to_add(pair=examples.second is not None)
    needed = special + (1 if examples.second is None else 2)
    if max_length < needed:
        texts = "text" if examples.second is None else "pair"
        raise ConfigError(
            f"{flag('max_length')} is {max_length}; the tokenizer adds {special} tokens to a {texts}, so at least "
            f"{needed} are needed"
        )


def labelled_features(
    tokenizer: Any, examples: TextExamples, task: Task, model: Any, max_length: int | None
) -> list[dict[str, Any]]:
    """Tokenized examples; label ids in the order of the model's outputs."""
    features = tokenize(tokenizer, examples, model, max_length)
    if examples.labels is not None:
        labels: list[Any] = list(examples.labels)
        if task.labels is not None and (order := label_order(output_names(model.config), task.labels)):
            labels = [order.index(task.labels[label]) for label in labels]
        for feature, label in zip(features, labels, strict=True):
            feature["labels"] = label
    return features


def output_names(config: Any) -> list[str]:
    """A model's own names of its outputs, in their order."""
    return [name for _, name in sorted(config.id2label.items())]


def label_order(names: Iterable[str], labels: tuple[str, ...]) -> list[str]:
    """The task's labels in the order of the model's outputs; empty if the model has other ``names`` for them."""
    by_name = {label.lower(): label for label in labels}
    lowered = [name.lower() for name in names]
    return [by_name[name] for name in lowered] if sorted(lowered) == sorted(by_name) else []


def length_quantile(values: Sequence[int] | npt.NDArray[Any], q: float) -> Any:
    """The smallest of the values that at least the fraction ``q`` (0 < q ≤ 1) of them do not exceed."""
    rank = math.ceil(round(q * len(values), 6))  # 0.1 · 30 is a little more than 3 in floating point
    return np.sort(np.asarray(values))[max(rank, 1) - 1]


def shorter(features: list[dict[str, Any]], quantile: float | None, *, say: bool) -> list[dict[str, Any]]:
    """The examples that are at most as long as the given quantile of all lengths; all of them for None."""
    if quantile is None:
        return features
    longest = length_quantile([len(feature["input_ids"]) for feature in features], quantile)
    chosen = [feature for feature in features if len(feature["input_ids"]) <= longest]
    if say:
        print(f"training on {len(chosen)} of {len(features)} examples; the longest has {longest} tokens")
    return chosen


def hold_out(total: int, count: int, seed: int) -> tuple[list[int], list[int]]:
    """The places of ``total`` examples without ``count`` of them, and these, each in ascending order."""
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[count:]), sorted(order[:count])


def collator(tokenizer: Any, bf16: bool) -> DataCollatorWithPadding:
    """Makes padded batches of tokenized texts."""
    # Half-precision products on a CPU must not meet a fresh shape in every batch.
    return DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8 if bf16 else None)
