"""Milliseconds of engines that take turns."""

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from token_pruning.lab.quantities import spread_over_lengths

PASSES = 7
FEWEST_PASSES = 3
TIMED_TEXTS = 64
_SECONDS = 60.0  # after which no pass begins, but for the fewest

Rows = Sequence[Mapping[str, Any]]


def timed_texts(lengths: Sequence[int]) -> list[int]:
    """The texts to time: all, or some of every length."""
    return spread_over_lengths(torch.tensor(list(lengths)).numpy(), TIMED_TEXTS)


def milliseconds(
    variants: Mapping[str, tuple[Any, Rows]], *, batch_size: int, pools: bool
) -> tuple[dict[str, dict[str, float]], int]:
    """The time of each variant, per text: alone, and in batches sorted by length.

    Engines take turns, so that what else the machine does meets all of them alike.

    Args:
        variants: by name, an engine and the tokenized texts to run it on.
        batch_size: texts of a batch.
        pools: whether the engines are run for a pooled vector of each text.

    Returns:
        For each variant milliseconds by what was timed, the medians over the passes; and how many passes.
    """
    ways = {"ms alone": 1, "ms in batches": batch_size}
    prepared = {
        name: (engine, {way: _batches(rows, size) for way, size in ways.items()})
        for name, (engine, rows) in variants.items()
    }
    taken: dict[str, dict[str, list[float]]] = {name: {way: [] for way in ways} for name in variants}
    began, passes = time.perf_counter(), -1  # the first pass warms up
    while passes < FEWEST_PASSES or (passes < PASSES and time.perf_counter() - began < _SECONDS):
        for way in ways:
            for name, (engine, batches) in prepared.items():
                run = engine.run_pooled if pools else engine.run_packed
                start = time.perf_counter()
                for batch in batches[way]:
                    run(*batch)
                seconds = time.perf_counter() - start
                if passes >= 0:
                    taken[name][way].append(1000 * seconds / len(variants[name][1]))
        passes += 1
    return {name: {way: statistics.median(found) for way, found in own.items()} for name, own in taken.items()}, passes


def _batches(rows: Rows, size: int) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """``input_ids``, ``cu_seqlens`` and token types of each batch."""
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]), reverse=True)
    found = []
    for start in range(0, len(ordered), size):
        some = ordered[start : start + size]
        ends = torch.tensor([0, *(len(row["input_ids"]) for row in some)]).cumsum(0)
        types = _packed(some, "token_type_ids") if "token_type_ids" in some[0] else None
        found.append((_packed(some, "input_ids"), ends, types))
    return found


def _packed(rows: Rows, name: str) -> Tensor:
    return torch.tensor([number for row in rows for number in row[name]])
