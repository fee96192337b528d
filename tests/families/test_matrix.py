"""Family × head × method × summary tokens × vocabulary gate × padding, on ragged batches.

`make test` runs cases that cover every pair of values; `make test-all` runs every combination.
"""

import os
from collections.abc import Iterator
from functools import cache
from itertools import combinations, product
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import token_pruning as tp
from tests.tiny import (
    FAMILIES,
    LONGEST,
    MORE_HEADS,
    ROTARY_AND_PRE_LN,
    SPECIAL_ATTENTION,
    VOCABULARY,
    assert_close,
    outputs,
    pruned,
    ragged_batch,
    same_survivors,
    tiny_config,
    tiny_model,
)

GATE = tp.VocabularyGate(torch.rand(VOCABULARY, generator=torch.Generator().manual_seed(0)), 0.3)
METHODS = ("learned", "fixed", "top-k", "relative", "rising")
LAYERS = 5


class Case(NamedTuple):
    family: str
    head: str
    method: str
    summary_tokens: Any
    gate: bool
    left: bool


VALUES = (
    (*FAMILIES, *SPECIAL_ATTENTION, *ROTARY_AND_PRE_LN),
    ("sequence", "token", "question", "masked_lm", "encoder", "multiple_choice"),
    METHODS,
    ("none", "shared", "segment"),
    (False, True),
    (False, True),
)


def every_case() -> list[Case]:
    """All combinations, but for heads that a family does not have."""
    there = {
        (family, head)
        for family in VALUES[0] for head in VALUES[1]
        if type(tiny_config(family)) in MORE_HEADS[head]._model_mapping
    }  # fmt: skip
    return [case for values in product(*VALUES) if (case := Case(*values))[:2] in there]


def pairs(case: Case) -> set[tuple[int, int, Any, Any]]:
    return {(i, j, case[i], case[j]) for i, j in combinations(range(len(case)), 2)}


def covering(cases: list[Case]) -> Iterator[Case]:
    """Few cases that have every pair of values that any case has: greedily, by far not the fewest."""
    wanted = set().union(*map(pairs, cases))
    while wanted:
        i, j, first, second = min(wanted, key=repr)
        best = max((c for c in cases if c[i] == first and c[j] == second), key=lambda c: len(pairs(c) & wanted))
        wanted -= pairs(best)
        yield best


ALL = every_case()
CASES = ALL if os.environ.get("TOKEN_PRUNING_TEST_ALL") else sorted(covering(ALL))


@cache
def model_of(family: str, head: str) -> Any:
    """Five layers, since top-k keeps everything in the first three."""
    return tiny_model(family, head, layers=LAYERS, initializer_range=0.2)


def pruner_of(case: Case) -> tp.Pruner:
    common: dict[str, Any] = {
        "summary_tokens": case.summary_tokens,
        "vocabulary": GATE if case.gate else None,
        "max_seq_length": 80,
    }
    thresholds = [0.55, 0.7, 0.8, 0.85, 0.9]
    if case.method == "learned":
        return tp.LearnedThreshold(thresholds=[value / 80 for value in thresholds], **common)
    if case.method == "fixed":
        return tp.FixedThreshold(thresholds=thresholds, scoring_mode="relative", **common)
    if case.method == "top-k":
        return tp.TopK(token_keep_rate=0.3, **common)
    if case.method == "relative":
        return tp.RelativeThreshold(token_threshold=0.7, **common)
    return tp.RisingThreshold(final_token_threshold=0.95, **common)


def batch_of(case: Case, *, left: bool) -> dict[str, Tensor]:
    lengths = [23, 1, LONGEST[case.family], 2]
    batch = ragged_batch(lengths, family=case.family, left=left, seed=3)
    return {name: x.view(2, 2, -1) for name, x in batch.items()} if case.head == "multiple_choice" else batch


def valid(output: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an output, those per token at valid tokens alone, whose order padding does not change."""
    mask = batch["attention_mask"].bool()
    return {n: x[mask] if x.shape[: mask.dim()] == mask.shape else x for n, x in outputs(output).items()}


def same(actual: dict[str, Tensor], expected: dict[str, Tensor], message: str) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(actual[name], value, 1e-4 * max(1.0, value.abs().max().item()), f"{message}: {name}")


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
@torch.no_grad()
def test_every_way_of_computing_it_gives_the_same(case: Case) -> None:
    model, pruner = model_of(case.family, case.head), pruner_of(case)
    batch = batch_of(case, left=case.left)
    with pruned(model, pruner, "masked"), tp.record(model) as reference:
        expected = valid(model(**batch), batch)
    with pruned(model, pruner), tp.record(model) as trace:
        packed = valid(model(**batch), batch)
    assert same_survivors(trace, reference)
    assert trace.ffn_lengths[-1].sum() < trace.input_lengths.sum()
    same(packed, expected, "packed and masked")
    with pruned(model, pruner):
        without_a_trace = valid(model(**batch), batch)
        engine = tp.compile(model, "float32")
        right = batch_of(case, left=False)
        on_the_right = valid(model(**right), right)
        alone = [valid(model(**row), row) for row in rows_of(batch)] if case.head != "multiple_choice" else []
    same(without_a_trace, packed, "recorded and not")
    same(valid(engine(**batch), batch), packed, "compiled and not")
    same(on_the_right, packed, "padding on the right and on the left")
    for name in packed if alone else ():
        same({name: torch.cat([row[name] for row in alone])}, {name: packed[name]}, "alone and in the batch")


def rows_of(batch: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Each sequence without its padding."""
    for row, mask in enumerate(batch["attention_mask"].bool()):
        yield {name: x[row][mask][None] for name, x in batch.items()}


def test_the_cases_cover_every_pair() -> None:
    assert set().union(*map(pairs, CASES)) == set().union(*map(pairs, ALL))
