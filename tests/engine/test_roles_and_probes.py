"""The engine with tokens that stay, tokens whose attention counts, probes, and tokens that leave without a trace."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import token_pruning as tp
from tests.engine.test_engine import (
    DTYPES,
    FAMILIES,
    LENGTHS,
    NATIVE,
    WORST,
    KeepEven,
    levels,
    own_levels,
    tiled_model,
)
from tests.tiny import assert_close, decision_margin, pruned, ragged_batch, same_survivors
from token_pruning.engine import native
from token_pruning.engine.library import KERNELS_VARIABLE

SEPARATOR = 4
HIDDEN = 128


def probes(layers: Sequence[int], seed: int = 0) -> tp.Probes:
    """Random ones, whose scores are about as large as 1."""
    weights = torch.randn(len(layers), HIDDEN + 1, generator=torch.Generator().manual_seed(seed))
    return tp.Probes(layers, weights / HIDDEN**0.5)


def maps(layers: Sequence[int], seed: int = 0) -> tp.DepartureMaps:
    """Random ones, whose vectors are about as long as states."""
    weights = torch.randn(len(layers), HIDDEN, HIDDEN + 1, generator=torch.Generator().manual_seed(seed))
    return tp.DepartureMaps(layers, weights / HIDDEN**0.5)


RELATIVE: dict[str, Any] = {"thresholds": [0.89, 0.9, 0.93, 0.97], "scoring_mode": "relative"}
BY_PROBE: dict[str, Any] = {"thresholds": [-0.8, 0.92, -0.7, -0.4], "scoring_mode": "relative"}
PRUNERS: dict[str, tp.Pruner] = {
    "protected": tp.FixedThreshold(protect=("separators", "first_segment"), **RELATIVE),
    "separators": tp.TopK(token_keep_rate=0.15, keep_all_layers=1, scoring_mode="relative", protect=("separators",)),
    "first_segment": tp.FixedThreshold(received_from="first_segment", **RELATIVE),
    "first": tp.FixedThreshold(received_from="first", **RELATIVE),
    "first_segment_topk": tp.TopK(token_keep_rate=0.2, keep_all_layers=1, received_from="first_segment"),
    "summaries": tp.FixedThreshold(
        received_from="first_segment", summary_tokens="segment", protect=("separators",), **RELATIVE
    ),
    "probes": tp.FixedThreshold(probes=probes([1, 3, 4]), **BY_PROBE),
    "probes_topk": tp.TopK(token_keep_rate=0.2, keep_all_layers=1, probes=probes([2, 4])),
    "probes_relative": tp.RelativeThreshold(token_threshold=0.1, probes=probes([2])),
    "probes_and_roles": tp.FixedThreshold(
        probes=probes([1, 4]), received_from="first_segment", protect=("separators",), **BY_PROBE
    ),
    "survivors": tp.FixedThreshold(departed="survivors", **RELATIVE),
    "maps": tp.FixedThreshold(departed="map", maps=maps(range(5)), **RELATIVE),
    "maps_with_summaries": tp.FixedThreshold(departed="map", maps=maps(range(5)), summary_tokens="segment", **RELATIVE),
    "survivors_by_probe": tp.FixedThreshold(departed="survivors", probes=probes([1, 3]), **BY_PROBE),
    "survivors_topk": tp.TopK(token_keep_rate=0.2, keep_all_layers=1, departed="survivors"),
    "survivors_with_summaries": tp.FixedThreshold(departed="survivors", summary_tokens="shared", **RELATIVE),
}


def pairs(lengths: Sequence[int], *, family: str = "bert", seed: int = 0) -> dict[str, Tensor]:
    """Two texts in each sequence, as far as there is room, with separators between and after them."""
    batch = ragged_batch(lengths, family=family, seed=seed)
    for row, length in enumerate(lengths):
        batch["input_ids"][row, [*{length // 3, length - 1} - {0, -1}]] = SEPARATOR
    return batch


@pytest.fixture(params=["torch", *NATIVE])
def any_level(request: Any, monkeypatch: Any) -> str:
    monkeypatch.setenv(KERNELS_VARIABLE, request.param)
    return str(request.param)


@pytest.fixture(params=levels("float32"))
def level(request: Any, monkeypatch: Any) -> str:
    monkeypatch.setenv(KERNELS_VARIABLE, request.param)
    return str(request.param)


def main_output(result: Any) -> Tensor:
    output: Tensor = result.last_hidden_state if "last_hidden_state" in result else result.logits
    return output


@pytest.mark.parametrize("head", ["sequence", "token", "encoder"])
@pytest.mark.parametrize("name", PRUNERS)
def test_engine_equals_the_masked_reference(name: str, head: str, level: str) -> None:
    model, batch, pruner = tiled_model(head=head), pairs(LENGTHS), PRUNERS[name]
    valid = batch["attention_mask"].bool()
    with pruned(model, pruner, "masked"), tp.record(model) as expected, torch.no_grad():
        reference = main_output(model(**batch))
    assert decision_margin(expected, 4) > 1e-6, "choose another threshold"
    assert 0.1 < expected.ffn_lengths[-1].sum() / sum(LENGTHS) < 0.9, "choose another threshold"
    with pruned(model, pruner):
        engine = tp.compile(model, "float32", threads=1)
    with tp.record(engine) as actual:
        found = main_output(engine(**batch))
    assert same_survivors(actual, expected)
    assert torch.equal(actual.attention_lengths, expected.attention_lengths)
    assert tp.count_flops(engine, actual) == tp.count_flops(model, expected)
    for done, wanted in zip(actual.passes, expected.passes, strict=True):
        for layer, record in done.layers.items():
            scores = wanted.layers[layer].scores
            assert (record.scores is None) == (scores is None)
            if record.scores is not None and scores is not None:
                assert_close(record.scores, scores, 1e-4, f"layer {layer}")
    if head != "sequence":
        found, reference = found[valid], reference[valid]
    assert_close(found, reference, 1e-4, name)
    again = main_output(engine(**batch))
    assert_close(again if head == "sequence" else again[valid], found, 1e-5 if level == "torch" else 0, "recording")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_with_a_probe(family: str, level: str) -> None:
    model, batch, pruner = tiled_model(family), pairs(LENGTHS, family=family), PRUNERS["probes_and_roles"]
    with pruned(model, pruner, "masked"), tp.record(model) as expected, torch.no_grad():
        reference = model(**batch).logits
    with pruned(model, pruner):
        engine = tp.compile(model, "float32", threads=2)
    with tp.record(engine) as actual:
        assert_close(engine(**batch).logits, reference, 1e-4)
    assert decision_margin(expected, 4) > 1e-6, "choose another threshold"
    assert same_survivors(actual, expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("name", ["first_segment", "probes"])
def test_half_precision_is_near_the_reference(name: str, dtype: str, any_level: str) -> None:
    if any_level not in levels(dtype):
        return
    model, batch = tiled_model(), pairs(LENGTHS)
    with pruned(model, PRUNERS[name], "masked"), tp.record(model) as expected, torch.no_grad():
        reference = model(**batch).logits
    with pruned(model, PRUNERS[name]):
        engine = tp.compile(model, dtype, threads=1)
    with tp.record(engine) as actual:
        logits = engine(**batch).logits
    both = [*zip(actual.survived_layers, expected.survived_layers, strict=True)]
    assert sum((a == b).sum() for a, b in both) / sum(LENGTHS) > 0.95
    same = torch.tensor([torch.equal(a, b) for a, b in both])
    assert (logits - reference).abs().amax(-1)[same].max() <= WORST[dtype] * reference.abs().max()


@pytest.mark.parametrize(("level", "dtype"), [(level, dtype) for dtype in DTYPES for level in own_levels(dtype)])
def test_the_same_to_the_last_bit_in_any_batch_and_with_any_threads(level: str, dtype: str, monkeypatch: Any) -> None:
    monkeypatch.setenv(KERNELS_VARIABLE, level)
    lengths = (3, 33, 1, 70, 16, 120)
    batch = pairs(lengths)
    for name, head in (
        ("first_segment_topk", "token"),
        ("probes_and_roles", "sequence"),
        ("survivors_by_probe", "token"),
    ):
        with pruned(tiled_model(head=head, max_position_embeddings=130), PRUNERS[name]) as model:
            engines = [tp.compile(model, dtype, threads=threads) for threads in (1, 2)]
        together = engines[0](**batch).logits
        assert torch.equal(engines[1](**batch).logits, together)
        for row, length in enumerate(lengths):
            for engine in engines:
                alone = engine(**{name: x[row : row + 1, :length] for name, x in batch.items()}).logits[0]
                assert torch.equal(alone, together[row] if head == "sequence" else together[row, :length])


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    threads=st.integers(1, 3),
    seed=st.integers(0, 3),
    name=st.sampled_from(sorted(PRUNERS)),
)
def test_ragged_batches_equal_the_packed_model(lengths: list[int], threads: int, seed: int, name: str) -> None:
    if not max(lengths):
        return
    batch = pairs(lengths, seed=seed)
    valid = batch["attention_mask"].bool()
    with pruned(tiled_model(head="token"), PRUNERS[name]) as model, torch.no_grad():
        with tp.record(model) as expected:
            reference = model(**batch).logits
        engine = tp.compile(model, "float32", threads=threads)
    with tp.record(engine) as actual:
        logits = engine(**batch).logits
    if decision_margin(expected, 4) > 1e-5:
        assert same_survivors(actual, expected)
        assert_close(logits[valid], reference[valid], 1e-4)


def test_what_a_pruner_of_ones_own_is_given(level: str) -> None:
    """A probe's scores are no importance: they may be below 0, and nothing divides them."""

    class Watching(KeepEven, registered=False):
        def keep(self, tokens: Any) -> Tensor:
            seen.append(tokens.scores.clone())
            return (tokens.layout.indices % tokens.layout.width) % (2**tokens.layer) == 0

    seen: list[Tensor] = []
    pruner = Watching(probes=probes([1, 2, 3]), protect=("separators",))
    model, batch = tiled_model(head="token"), pairs(LENGTHS)
    with pruned(model, pruner, "masked"), torch.no_grad(), tp.record(model) as expected:
        model(**batch)
    with pruned(model, pruner):
        engine = tp.compile(model, "float32", threads=1)
    by_reference, seen = seen, []
    with tp.record(engine) as actual:
        engine(**batch)
    assert same_survivors(actual, expected)
    assert min(scores.min().item() for scores in by_reference) < 0
    for found, wanted in zip(seen, by_reference, strict=True):
        assert_close(found, wanted, 1e-4)


@pytest.mark.parametrize("level", own_levels("float32"))
@pytest.mark.parametrize("name", ["first_segment", "probes", "survivors_by_probe"])
def test_a_nan_stays_in_its_sequence(name: str, level: str, monkeypatch: Any) -> None:
    monkeypatch.setenv(KERNELS_VARIABLE, level)
    model, batch = tiled_model(head="token"), pairs(LENGTHS)
    with pruned(model, PRUNERS[name]):
        clean = tp.compile(model, "float32", threads=2)(**batch).logits
        model.base_model.embeddings.word_embeddings.weight.data[batch["input_ids"][1, 7]] = torch.nan
        found = tp.compile(model, "float32", threads=2)(**batch).logits
    others = [row for row in range(len(LENGTHS)) if not (batch["input_ids"][row] == batch["input_ids"][1, 7]).any()]
    valid = batch["attention_mask"].bool()
    assert len(others) >= 3
    assert found[1][valid[1]].isnan().all()
    assert torch.equal(found[others], clean[others])


def test_probes_need_one_more_matrix_of_states(monkeypatch: Any) -> None:
    asked: list[int] = []
    original = native.Workspace

    def measured(size: int) -> Any:
        asked.append(size)
        return original(size)

    monkeypatch.setattr(native, "Workspace", measured)
    model, batch = tiled_model(), pairs(LENGTHS)
    for pruner in (tp.FixedThreshold(**BY_PROBE), PRUNERS["probes"]):
        with pruned(model, pruner):
            tp.compile(model, "float32", threads=1)(**batch)
    if not asked:
        return  # without the library there is no such memory
    without, given = asked
    assert 0 <= given - without - 4 * HIDDEN * sum(LENGTHS) <= 128
