"""Tokenized texts as padded batches."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from token_pruning.errors import ConfigError

Batch = Mapping[str, Tensor]
Examples = Sequence[Mapping[str, Any]] | Batch
"""Tokenized texts, or a padded batch of them."""
Texts = Sequence[str] | Sequence[Sequence[str]]
"""Texts, or pairs of texts."""


def as_batch(examples: Examples | Texts, padding: int) -> dict[str, Tensor]:
    """One padded batch of tokenized texts.

    Args:
        examples: dictionaries of lists with ``input_ids``, or a padded batch of tensors already.
        padding: the id of the padding token.

    Raises:
        ConfigError: if there are no ``input_ids``, as in texts that are not tokenized, or an example has no tokens.
    """
    batch = _padded(examples, padding)
    without = (batch["attention_mask"].sum(1) == 0).nonzero()
    if len(without):
        raise ConfigError(f"examples[{int(without[0])}] has no tokens; every example needs one")
    return batch


def _padded(examples: Examples | Texts, padding: int) -> dict[str, Tensor]:
    if isinstance(examples, Mapping):
        batch = {name: value for name, value in examples.items() if isinstance(value, Tensor)}
        if "input_ids" not in batch:
            found = type(examples["input_ids"]).__name__ if "input_ids" in examples else "nothing"
            raise ConfigError(
                f"examples has {found} for input_ids; it must be a list of tokenized texts, or a batch of tensors "
                '(tokenizer(texts, padding=True, return_tensors="pt"))'
            )
        return {"attention_mask": torch.ones_like(batch["input_ids"]), **batch}
    if not hasattr(examples, "__len__"):
        raise ConfigError(f"examples is a {type(examples).__name__}; it must be a list of tokenized texts, or a batch")
    tokenized: list[Mapping[str, Any]] = []
    for example in examples:
        if not isinstance(example, Mapping) or "input_ids" not in example:
            raise ConfigError(f"examples[{len(tokenized)}] has no input_ids")
        tokenized.append(example)
    batch = {}
    for name, fill in (("input_ids", padding), ("token_type_ids", 0), ("attention_mask", 0)):
        if tokenized and name in tokenized[0]:
            rows = [
                _integers(f"examples[{i}]'s {name}", _value(example, i, name)) for i, example in enumerate(tokenized)
            ]
            lengths = [len(example["input_ids"]) for example in tokenized]
            for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
                if len(row) != length:
                    raise ConfigError(f"examples[{i}]'s {name} has {len(row)} values; its input_ids has {length}")
            batch[name] = pad_sequence(rows, batch_first=True, padding_value=fill)
    if "attention_mask" not in batch:
        rows = [torch.ones(len(example["input_ids"]), dtype=torch.long, device="cpu") for example in tokenized]
        batch["attention_mask"] = pad_sequence(rows, batch_first=True) if rows else torch.zeros(0, 0)
        batch.setdefault("input_ids", torch.zeros(0, 0, dtype=torch.long))
    if tokenized and "labels" in tokenized[0]:
        labels = [_value(example, i, "labels") for i, example in enumerate(tokenized)]
        try:
            batch["labels"] = torch.as_tensor(labels)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(f"examples' labels, such as {labels[0]!r}, cannot be a tensor: {error}") from None
    return batch


def _value(example: Mapping[str, Any], place: int, name: str) -> Any:
    if name not in example:
        raise ConfigError(f"examples[{place}] has no {name}; examples[0] has")
    return example[name]


def _integers(name: str, values: Any) -> Tensor:
    found = torch.as_tensor(values, device="cpu")
    if found.is_floating_point() and found.numel():  # an empty list, too, makes such a tensor
        raise ConfigError(f"{name} holds {found.flatten()[0]:g}, a {found.dtype} number; it must hold integers")
    return found.long()


def part_of(batch: Batch, rows: Any) -> dict[str, Tensor]:
    """Some rows of a batch, without the columns that are padding in all of them; ``rows`` is whatever indexes them."""
    filled = batch["attention_mask"][rows].any(0).nonzero()
    columns = slice(int(filled[0]), int(filled[-1]) + 1)
    return {name: x[rows][:, columns] if x.shape == batch["input_ids"].shape else x[rows] for name, x in batch.items()}


def model_inputs(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """What a model is called with: a batch without its labels, on the model's device."""
    names = ("input_ids", "attention_mask", "token_type_ids")
    return {name: batch[name].to(device) for name in names if name in batch}


def as_rows(examples: Examples) -> list[dict[str, Tensor]]:
    """One dictionary for each tokenized text, without padding; arguments and errors as :func:`as_batch`."""
    batch = as_batch(examples, 0)
    names = [name for name in ("input_ids", "token_type_ids") if name in batch]
    return [{name: batch[name][row][mask] for name in names} for row, mask in enumerate(batch["attention_mask"].bool())]
