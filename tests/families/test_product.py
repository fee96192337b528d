"""Every combination of family, head, method and settings; `make test` runs as many as show every pair of values."""

import random
from collections.abc import Iterator
from itertools import combinations, product
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import token_pruning as tp
from tests.families.shared import CASES, READING_FIRST, assert_same, batch_of, kept_model, valid
from tests.tiny import EVERY_FAMILY, LONGEST, VOCABULARY, decision_margin, outputs, same_survivors

METHODS: dict[str, Any] = {
    "learned": lambda **shared: tp.LearnedThreshold(final_token_threshold=0.9, scoring_mode="relative", **shared),
    "fixed": lambda **shared: tp.FixedThreshold(thresholds=[0.02, 0.03, 0.01, 0.03], max_seq_length=32, **shared),
    "topk": lambda **shared: tp.TopK(token_keep_rate=0.4, **shared),
    "relative": lambda **shared: tp.RelativeThreshold(token_threshold=0.45, **shared),
    "rising": lambda **shared: tp.RisingThreshold(final_token_threshold=0.5, **shared),
}
HEADS = tuple(dict.fromkeys(head for _, head in CASES))
ROUNDING = 2e-5  # a decision nearer than this may go either way


class Case(NamedTuple):
    family: str
    head: str
    method: str
    summary_tokens: str
    gate: bool
    reads: str | None
    left: bool


VALUES: tuple[tuple[Any, ...], ...] = (
    EVERY_FAMILY, HEADS, tuple(METHODS), ("none", "shared", "segment"), (False, True), (None, "first", "all"),
    (False, True),
)  # fmt: skip


def possible(case: Case) -> bool:
    """Whether the head is there, and there is a head or user that reads first tokens."""
    if (case.family, case.head) not in CASES:
        return False
    return case.reads != "first" or case.head == "encoder" or (case.family, case.head) in READING_FIRST


def pairs_of(case: Case) -> set[tuple[int, Any, int, Any]]:
    return {(i, case[i], j, case[j]) for i, j in combinations(range(len(case)), 2)}


def pairwise(cases: list[Case]) -> Iterator[Case]:
    """Greedily, cases that between them show each pair of values that any case shows."""
    pairs = {case: pairs_of(case) for case in cases}
    missing = set().union(*pairs.values())
    for enough in range(len(VALUES) * (len(VALUES) - 1) // 2, 0, -1):
        for case, shown in list(pairs.items()):
            new = len(shown & missing)
            if new >= enough:
                missing -= shown
                yield case
            if new == 0:
                del pairs[case]


POSSIBLE = {at: [c for c in (Case(*at, *rest) for rest in product(*VALUES[2:])) if possible(c)] for at in CASES}
EVERY = [case for cases in POSSIBLE.values() for case in cases]
random.Random(0).shuffle(EVERY)
CHOSEN = list(pairwise(EVERY))


def by_sequence(output: Any, batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """A sequence's own part of the outputs, those per token at its valid tokens."""
    mask = batch["attention_mask"].flatten(0, -2).bool()
    found = {n: x.flatten() if batch["attention_mask"].dim() == 3 else x for n, x in outputs(output).items()}
    return [
        {name: x[row][mask[row]] if x.shape[:2] == mask.shape else x[row] for name, x in found.items()}
        for row in range(len(mask))
    ]


def check(case: Case) -> None:
    """Packed is masked, a sequence alone is itself in the batch, and compiled is packed."""
    family, head = case.family, case.head
    model = kept_model(family, head)
    scores = torch.rand(VOCABULARY, generator=torch.Generator().manual_seed(0))
    vocabulary = tp.VocabularyGate(scores, threshold=0.2) if case.gate else None
    pruner = METHODS[case.method](summary_tokens=case.summary_tokens, vocabulary=vocabulary)

    def run(batch: dict[str, Tensor], execution: Any) -> tuple[Any, tp.Trace]:
        tp.prune(model, pruner, execution=execution, reads=case.reads)  # type: ignore[arg-type]
        try:
            with torch.no_grad(), tp.record(model) as trace:
                return model(**batch), trace
        finally:
            tp.unprune(model)

    lengths = (19, 1, LONGEST[family], 2)
    for seed in range(9):
        batch = batch_of(family, head, lengths, seed=seed, left=case.left)
        masked, masked_trace = run(batch, "masked")
        if decision_margin(masked_trace, 4) > ROUNDING:
            break
    else:
        raise AssertionError("rounding may decide in all batches")
    packed, trace = run(batch, "packed")
    assert same_survivors(trace, masked_trace)
    left = trace.ffn_lengths[-1].sum() / sum(lengths)
    assert left < 0.95, f"{left} left"
    assert_same(valid(packed, batch), valid(masked, batch), 1e-4, "packed")
    tp.prune(model, pruner, reads=case.reads)  # type: ignore[arg-type]
    try:
        compiled = tp.compile(model, "float32")(**batch)
    finally:
        tp.unprune(model)
    assert_same(valid(compiled, batch), valid(packed, batch), 1e-4, "compiled")
    right = batch_of(family, head, lengths, seed=seed)
    flat = {name: x.flatten(0, -2) for name, x in right.items()}
    for row, (length, expected) in enumerate(zip(lengths, by_sequence(packed, batch), strict=True)):
        own = {name: x[row : row + 1, :length] for name, x in flat.items()}
        own = {name: x[None] for name, x in own.items()} if head == "multiple_choice" else own
        alone, alone_trace = run(own, "packed")
        assert alone_trace.survived_layers[0].tolist() == trace.survived_layers[row].tolist()
        assert_same(by_sequence(alone, own)[0], expected, 1e-4, f"sequence {row} alone")


def test_the_chosen_cases_show_every_pair() -> None:
    assert set().union(*map(pairs_of, CHOSEN)) == set().union(*map(pairs_of, EVERY))
    assert len(CHOSEN) < 300


@pytest.mark.parametrize("case", CHOSEN, ids=lambda case: "-".join(map(str, case)))
def test_pairs_of_settings(case: Case) -> None:
    check(case)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("family", "head"), CASES)
def test_every_combination(family: str, head: str) -> None:
    for case in POSSIBLE[family, head]:
        try:
            check(case)
        except Exception as error:
            raise AssertionError(f"{case}") from error
