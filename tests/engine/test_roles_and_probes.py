"""The engine with tokens that stay, tokens whose attention counts, probes, and what tokens that left count as."""

import copy
import pickle
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
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
from tests.tiny import VOCABULARY, assert_close, decision_margin, pruned, ragged_batch, same_survivors, topk_count
from token_pruning.budget.comparison import _NativePass
from token_pruning.budget.fitting import using
from token_pruning.engine import native
from token_pruning.engine.library import KERNELS_VARIABLE
from token_pruning.runtime.prune import attachment_of

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


def context(layers: Sequence[int], rank: int = 20, seed: int = 0) -> tp.LinearContext:
    """Keys and values about as large as the model's own; a rank that is no multiple of anything."""
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(len(layers), rank, HIDDEN + 1, generator=generator) / HIDDEN**0.5
    return tp.LinearContext(layers, down, torch.randn(4, 2 * HIDDEN, rank + 1, generator=generator) / rank**0.5)


GATE = tp.VocabularyGate(torch.rand(VOCABULARY, generator=torch.Generator().manual_seed(0)), 0.3)
RELATIVE: dict[str, Any] = {"thresholds": [0.89, 0.9, 0.93, 0.97], "scoring_mode": "relative"}
# Of attention that context tokens receive nothing is left for others.
LESS: dict[str, Any] = {"thresholds": [0.66, 0.62, 0.6, 0.55], "scoring_mode": "relative"}
LESS_LATER: dict[str, Any] = {"thresholds": [0.89, 0.8, 0.75, 0.7], "scoring_mode": "relative"}
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
    "context": tp.FixedThreshold(context=context(range(5)), vocabulary=GATE, **LESS),
    "context_of_what_entered": tp.FixedThreshold(context=context([1, 3]), vocabulary=GATE, **LESS_LATER),
    "context_and_roles": tp.FixedThreshold(
        context=context([1, 2], rank=1), received_from="first_segment", protect=("separators",), **LESS_LATER
    ),
    "context_by_probe": tp.FixedThreshold(
        context=context([0, 1, 3], rank=64), vocabulary=GATE, probes=probes([1, 3]), departed="survivors",
        **{**BY_PROBE, "thresholds": [-0.8, 0.6, -0.7, 0.2]},
    ),
    "context_topk": tp.TopK(
        token_keep_rate=0.2, keep_all_layers=1, scoring_mode="relative", context=context([0, 2, 3]), vocabulary=GATE
    ),
    "context_and_maps": tp.RelativeThreshold(
        token_threshold=0.5, context=context([0, 1], rank=HIDDEN), vocabulary=GATE, departed="map", maps=maps(range(5))
    ),
}  # fmt: skip
CONTEXT = [name for name in PRUNERS if name.startswith("context")]


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


@pytest.mark.parametrize("name", ["probes_and_roles", "context_topk"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_with_probes_and_with_context(family: str, name: str, level: str) -> None:
    model, batch, pruner = tiled_model(family), pairs(LENGTHS, family=family), PRUNERS[name]
    with pruned(model, pruner, "masked"), tp.record(model) as expected, torch.no_grad():
        reference = model(**batch).logits
    with pruned(model, pruner):
        engine = tp.compile(model, "float32", threads=2)
    with tp.record(engine) as actual:
        assert_close(engine(**batch).logits, reference, 1e-4)
    assert decision_margin(expected, 4) > 1e-6, "choose another threshold"
    assert same_survivors(actual, expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("name", ["first_segment", "probes", "context", "context_by_probe"])
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
        ("context_topk", "sequence"),
        ("context_by_probe", "token"),
        ("context_and_maps", "encoder"),
    ):
        with pruned(tiled_model(head=head, max_position_embeddings=130), PRUNERS[name]) as model:
            engines = [tp.compile(model, dtype, threads=threads) for threads in (1, 2)]
        together = main_output(engines[0](**batch))
        assert torch.equal(main_output(engines[1](**batch)), together)
        for row, length in enumerate(lengths):
            for engine in engines:
                alone = main_output(engine(**{name: x[row : row + 1, :length] for name, x in batch.items()}))[0]
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
@pytest.mark.parametrize("name", ["first_segment", "probes", "survivors_by_probe", "context_and_roles"])
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


def memory_of(monkeypatch: Any, *pruners: tp.Pruner) -> list[int]:
    """Bytes that a call asks for by each method; none without the library."""
    asked: list[int] = []
    original = native.Workspace

    def measured(size: int) -> Any:
        asked.append(size)
        return original(size)

    monkeypatch.setattr(native, "Workspace", measured)
    model, batch = tiled_model(), pairs(LENGTHS)
    for pruner in pruners:
        with pruned(model, pruner):
            tp.compile(model, "float32", threads=1)(**batch)
    return asked


def test_probes_need_one_more_matrix_of_states(monkeypatch: Any) -> None:
    asked = memory_of(monkeypatch, tp.FixedThreshold(**BY_PROBE), PRUNERS["probes"])
    if not asked:
        return  # without the library there is no such memory
    without, given = asked
    assert 0 <= given - without - 4 * HIDDEN * sum(LENGTHS) <= 128


# Context


def test_context_needs_keys_and_values_of_all_that_left(monkeypatch: Any) -> None:
    """As encoder.h says."""
    asked = memory_of(monkeypatch, tp.FixedThreshold(**LESS), tp.FixedThreshold(context=context([1], rank=65), **LESS))
    if not asked:
        return  # without the library there is no such memory
    without, given = asked
    rank, rows, total = 128, -(-sum(LENGTHS) // 32) * 32, sum(LENGTHS)  # ranks are rounded up
    kept = total * (4 * rank + 20) + rows * (4 * rank + 2 * 2 * HIDDEN * 4)
    assert kept <= given - without <= kept + 16 * 64


@pytest.mark.parametrize("level", own_levels("float32"))
@pytest.mark.parametrize("name", CONTEXT)
def test_a_nan_in_context_stays_in_its_sequence(name: str, level: str, monkeypatch: Any) -> None:
    """Where the model itself has it, and nowhere else."""
    monkeypatch.setenv(KERNELS_VARIABLE, level)
    model, batch = tiled_model(head="token"), pairs(LENGTHS)
    ids, valid = batch["input_ids"], batch["attention_mask"].bool()
    special = int(ids[1][valid[1] & (GATE.scores[ids[1]] < GATE.threshold)][3])  # which the gates keep outside
    others = [row for row in range(len(LENGTHS)) if not (ids[row][valid[row]] == special).any()]
    assert len(others) >= 3
    with pruned(model, PRUNERS[name]):
        clean = tp.compile(model, "float32", threads=2)(**batch).logits
        model.base_model.embeddings.word_embeddings.weight.data[special] = torch.nan
        found = tp.compile(model, "float32", threads=2)(**batch).logits
        with torch.no_grad():
            wanted = model(**batch).logits
    context = PRUNERS[name].context
    assert context is not None
    if PRUNERS[name].vocabulary is None or 0 in context.layers:
        entered = valid[1] & ((GATE.scores[ids[1]] >= GATE.threshold) | (torch.arange(70) == 0))
        assert PRUNERS[name].departed == "survivors" or found[1][entered].isnan().all()
    assert torch.equal(found.isnan()[valid], wanted.isnan()[valid])
    assert found[1][valid[1]].isnan().any() and torch.equal(found[others], clean[others])


def alike(model: Any, name: str, **options: Any) -> tuple[Any, Tensor]:
    """An engine, and what the model itself gives."""
    with pruned(model, PRUNERS[name]), torch.no_grad():
        return tp.compile(model, "float32", **options), model(**pairs(LENGTHS)).logits


@pytest.mark.parametrize("name", ["context", "context_topk"])
def test_tensors_that_change_are_taken_anew(name: str, level: str) -> None:
    """Written to, loaded, and put in the place of others; and a copy has its own."""
    model, batch = tiled_model(head="token"), pairs(LENGTHS)
    valid = batch["attention_mask"].bool()
    engine, before = alike(model, name)
    assert_close(engine(**batch).logits[valid], before[valid], 1e-4)
    copied = copy.deepcopy(engine)
    assert copied.token_pruner.context_up is not engine.token_pruner.context_up
    for change in ("write", "load", "replace"):
        setting = engine.token_pruner.pruner.context
        other = tp.LinearContext(
            setting.layers, 0.7 * engine.token_pruner.context_down, -engine.token_pruner.context_up
        )
        with torch.no_grad():
            if change == "write":
                engine.token_pruner.context_down.copy_(other.down)
                engine.token_pruner.context_up.copy_(other.up)
            elif change == "load":
                tensors = engine.token_pruner.state_dict()
                engine.token_pruner.load_state_dict({**tensors, "context_down": other.down, "context_up": other.up})
            else:
                engine.token_pruner.context_down, engine.token_pruner.context_up = other.down, other.up
        wanted = replace(PRUNERS[name], context=other)
        with pruned(model, wanted), torch.no_grad(), tp.record(model) as expected:
            reference = model(**batch).logits
        assert decision_margin(expected, 4) > 1e-6, "choose another factor"
        assert (reference - before)[valid].abs().max() > 1e-2
        assert_close(engine(**batch).logits[valid], reference[valid], 1e-4, change)
        pickled = pickle.loads(pickle.dumps(engine))
        assert_close(pickled(**batch).logits[valid], reference[valid], 1e-4, change)
    assert_close(copied(**batch).logits[valid], before[valid], 1e-4)


@pytest.mark.parametrize("level", own_levels("float32"))
def test_two_methods_take_turns_on_one_encoder(level: str, monkeypatch: Any) -> None:
    """As a search compares rules: with other cuts, another rank, and without context."""
    monkeypatch.setenv(KERNELS_VARIABLE, level)
    model, batch = tiled_model(head="token"), pairs(LENGTHS)
    valid = batch["attention_mask"].bool()
    names = ("context", "context_and_roles", "probes", "context_by_probe", "context_of_what_entered")
    engines = [alike(model, name)[0] for name in names]
    alone = [engine(**batch).logits[valid] for engine in engines]
    shared = engines[-1]._encoder  # which has what never entered
    for engine in engines:
        engine._encoder = shared
    for _ in range(2):
        for engine, wanted in zip(engines, alone, strict=True):
            assert torch.equal(engine(**batch).logits[valid], wanted)


def test_a_calibration_compares_contexts_on_one_encoder(level: str) -> None:
    """What :class:`_NativePass` swaps the methods of."""
    model, batch = tiled_model(head="encoder"), pairs(LENGTHS)
    with pruned(model, tp.Unpruned(), reads="mean"):
        encoder = tp.compile(model, "float32")._encoder
        for other in (context([0, 1]), context([0, 1], seed=9), context([0], rank=3), None, context([1])):
            pruner = tp.FixedThreshold(context=other, vocabulary=GATE, departed="survivors", **LESS)
            with using(model, pruner), torch.no_grad():
                wanted = model(**batch).last_hidden_state
                attachment = attachment_of(model)
                attachment.loop, before = partial(_NativePass, encoder), attachment.loop
                try:
                    found = model(**batch).last_hidden_state
                finally:
                    attachment.loop = before
            assert_close(found, wanted, 1e-4, f"{other}")


@pytest.mark.parametrize("execution", ["masked", "engine"])
@pytest.mark.parametrize("layers", [(0,), (1,), (0, 1, 2, 3, 4)])
def test_topk_counts_what_entered(layers: tuple[int, ...], execution: str, level: str) -> None:
    """A part of the tokens that the gate lets in, whatever is attended to besides."""
    model, batch = tiled_model(), pairs(LENGTHS)
    ids, valid = batch["input_ids"], batch["attention_mask"].bool()
    entering = (valid & (GATE.scores[ids] >= GATE.threshold)).sum(1)
    entering += GATE.scores[ids[:, 0]] < GATE.threshold  # the first always does
    pruner = tp.TopK(token_keep_rate=0.4, keep_all_layers=1, context=context(layers), vocabulary=GATE)
    with pruned(model, pruner, "masked" if execution == "masked" else "packed"), torch.no_grad():
        one = model if execution == "masked" else tp.compile(model, "float32")
        with tp.record(one) as trace:
            one(**batch)
    assert (entering < valid.sum(1)).sum() >= 5
    wanted = [[topk_count(0.4, layer, 4, n, 1) for n in entering.tolist()] for layer in (1, 2, 3, 4)]
    assert trace.ffn_lengths.tolist() == wanted
