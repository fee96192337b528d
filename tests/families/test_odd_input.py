"""Masks, batches, arguments and surroundings that nobody expects: the right numbers, or an error that says what."""

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import token_pruning as tp
from tests.families.shared import PRUNERS, assert_same, batch_of, kept_model, model_of, run, valid
from tests.tiny import (
    EVERY_FAMILY,
    PAD,
    VOCABULARY,
    assert_close,
    assert_equal,
    decision_margin,
    outputs,
    pruned,
    same_survivors,
)

every_family = pytest.mark.parametrize("family", EVERY_FAMILY)
RELATIVE = tp.RelativeThreshold(token_threshold=0.4)


@cache
def engine_of(family: str, method: str) -> tp.Engine:
    with pruned(kept_model(family, "token"), PRUNERS[method]) as model:
        return tp.compile(model, "float32")


@st.composite
def masks(draw: Any) -> Tensor:
    """Padding on either side, holes, and sequences of nothing."""
    width = draw(st.sampled_from([1, 2, 7, 33, 60]))
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        start, end = sorted(draw(st.tuples(st.integers(0, width), st.integers(0, width))))
        row = torch.zeros(width, dtype=torch.long)
        row[start:end] = 1
        row[draw(st.lists(st.integers(0, width - 1), max_size=4))] = 0
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("family", ["bert", "deberta-v2", "modernbert", "mpnet"])
@settings(max_examples=15)
@given(mask=masks(), seed=st.integers(0, 99), method=st.sampled_from(list(PRUNERS)))
def test_any_mask_is_packed_as_it_is_masked(family: str, mask: Tensor, seed: int, method: str) -> None:
    """And what is valid of a sequence is what Hugging Face says where nothing is dropped."""
    model = kept_model(family, "token")
    ids = torch.randint(5, VOCABULARY, mask.shape, generator=torch.Generator().manual_seed(seed))
    first = mask.argmax(1, keepdim=True)  # padding in front has the padding's id, and moves no position
    columns = torch.arange(mask.shape[1])
    batch = {"input_ids": ids.where(columns >= first, torch.tensor(PAD[family])), "attention_mask": mask}
    masked, masked_trace = run(model, PRUNERS[method], batch, "masked")
    if decision_margin(masked_trace, 4) > 2e-5:
        packed, trace = run(model, PRUNERS[method], batch)
        assert same_survivors(trace, masked_trace)
        assert_same(valid(packed, batch), valid(masked, batch), 1e-4)
        assert_same(valid(engine_of(family, method)(**batch), batch), valid(packed, batch), 1e-4)
    begun = mask[:, 0].bool()  # others have their positions from their first token here
    if begun.any():
        whole = {name: x[begun] for name, x in batch.items()}
        with torch.no_grad():
            expected = valid(model(**whole), whole)
        assert_same(valid(run(model, tp.Unpruned(), whole)[0], whole), expected, 2e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@every_family
def test_the_default_dtype_changes_nothing(family: str, dtype: torch.dtype) -> None:
    model, batch = kept_model(family, "token"), batch_of(family)
    gate = tp.VocabularyGate(torch.linspace(0, 1, VOCABULARY), threshold=0.2)
    pruners = (
        tp.LearnedThreshold(final_token_threshold=0.04, scoring_mode="mean_norm", vocabulary=gate),
        PRUNERS["fixed"],
    )
    for pruner in pruners:
        expected, trace = run(model, pruner, batch)
        torch.set_default_dtype(dtype)
        try:
            for execution in ("packed", "masked"):
                actual, other = run(model, pruner, batch, execution)
                assert same_survivors(trace, other)
                assert actual.logits.dtype == torch.float32
                assert_same(valid(actual, batch), valid(expected, batch), 5e-5)
            with pruned(model, pruner):
                engine = tp.compile(model, "float32")
            with tp.record(engine) as trace:
                compiled = engine(**batch)
            assert_same(valid(compiled, batch), valid(expected, batch), 5e-5)
        finally:
            torch.set_default_dtype(torch.float32)


def test_thresholds_made_in_inference_mode_can_be_trained() -> None:
    model = model_of("bert", "sequence")
    with torch.inference_mode():
        tp.prune(model, tp.LearnedThreshold(temperature=0.05, vocabulary=tp.VocabularyGate(torch.ones(VOCABULARY))))
        model(**batch_of("bert"))
    model.train()(**batch_of("bert")).logits.sum().backward()
    assert model.token_pruner.thresholds.grad.abs().max() > 0


@every_family
def test_attention_set_on_a_pruned_model(family: str) -> None:
    model, batch = model_of(family, "token"), batch_of(family)
    expected, _ = run(model, RELATIVE, batch)
    tp.prune(model, RELATIVE)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        assert_same(valid(model(**batch), batch), valid(expected, batch), 1e-6)
        assert_same(valid({"logits": model(**batch, return_dict=False)[0]}, batch), valid(expected, batch), 1e-6)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int32, torch.uint8, torch.float16])
@every_family
def test_any_type_of_mask_means_the_same(family: str, dtype: torch.dtype) -> None:
    model, batch = kept_model(family, "token"), batch_of(family)
    expected, _ = run(model, RELATIVE, batch)
    actual, _ = run(model, RELATIVE, {**batch, "attention_mask": batch["attention_mask"].to(dtype)})
    assert_equal(actual.logits, expected.logits)


@pytest.mark.parametrize("name", ["past_key_values", "encoder_hidden_states"])
@every_family
def test_what_a_pruned_encoder_has_no_use_for_is_refused(family: str, name: str) -> None:
    """Prefixes that others put in front of all keys would be left out without a word."""
    with pruned(kept_model(family, "encoder"), RELATIVE) as model, pytest.raises(tp.ConfigError, match=name):
        model(**batch_of(family), **{name: object()})


def test_arguments_by_position_are_not_lost() -> None:
    batch = batch_of("bert")
    with pruned(kept_model("bert", "encoder"), RELATIVE) as model:
        with pytest.raises(TypeError, match="too many positional"):
            model(*batch.values(), *[None] * 20)
        with pytest.raises(TypeError, match="multiple values for argument 'input_ids'"):
            model(batch["input_ids"], **batch)


@torch.no_grad()
def test_records_inside_records_each_see_their_own() -> None:
    batch = batch_of("modernbert")
    with pruned(kept_model("modernbert", "token"), RELATIVE) as model, tp.record(model) as outer:
        model(**batch)
        with tp.record(model) as inner:
            model(**batch)
        model(**batch)
    assert (len(outer.passes), len(inner.passes)) == (3, 1)


@every_family
def test_labels_give_the_loss_of_the_logits(family: str) -> None:
    model, batch = kept_model(family, "token"), batch_of(family)
    labels = (batch["input_ids"] % 3).masked_fill(batch["attention_mask"] == 0, -100)
    for execution in ("packed", "masked"):
        output, _ = run(model, RELATIVE, {**batch, "labels": labels}, execution)
        expected = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
        assert_close(output.loss, expected, 1e-5)
        assert set(outputs(output)) == {"loss", "logits"}


@pytest.mark.parametrize("family", ["electra", "roberta", "deberta-v2", "modernbert"])
def test_a_first_token_is_found_where_every_state_is_computed(family: str) -> None:
    """By the model and by the engine, behind padding and in a batch without any."""
    model, lengths = kept_model(family, "sequence"), (30, 1, 17)
    expected, _ = run(model, RELATIVE, batch_of(family, lengths=lengths))
    tp.prune(model, RELATIVE, reads="all")
    try:
        engine = tp.compile(model, "float32")
        left = batch_of(family, lengths=lengths, left=True)
        with torch.no_grad():
            assert_close(model(**left).logits, expected.logits, 5e-5)
    finally:
        tp.unprune(model)
    assert_close(engine(**left).logits, expected.logits, 5e-5)
    mask = left.pop("attention_mask").bool()
    packed = {name: x[mask] for name, x in left.items()}
    ends = torch.tensor([0, 30, 31, 48])
    assert_close(engine.run_packed(cu_seqlens=ends, **packed).logits, expected.logits, 5e-5)
