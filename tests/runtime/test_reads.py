"""What is read of the last states: said by a family, or by a user."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import token_pruning as tp
from tests.tiny import FAMILIES, HEADS, assert_close, pruned, ragged_batch, shared_model, tiny_config, tiny_model
from tests.workspace import write_checkpoint
from token_pruning.runtime.prune import reads_of

PRUNER = tp.RelativeThreshold(token_threshold=0.3)
LENGTHS = [30, 1, 17, 2]


@pytest.mark.parametrize("execution", ["packed", "masked"])
@torch.no_grad()
def test_an_encoder_whose_first_token_is_read_computes_no_other(execution: Any) -> None:
    model, batch = tiny_model(head="encoder"), ragged_batch(LENGTHS)
    with pruned(model, PRUNER):
        expected = model(**batch)
    tp.prune(model, PRUNER, execution=execution, reads="first")
    with tp.record(model) as trace:
        output = model(**batch)
    assert output.last_hidden_state.shape == (4, 1, 32)
    assert_close(output.last_hidden_state[:, 0], expected.last_hidden_state[:, 0], 1e-5)
    assert_close(output.pooler_output, expected.pooler_output, 1e-5)
    assert trace.computed_lengths.feed_forward[-1].tolist() == [1] * 4
    assert_close(tp.compile(model, "float32")(**batch).last_hidden_state, output.last_hidden_state, 1e-5)


@torch.no_grad()
def test_a_classifier_may_compute_every_state() -> None:
    model, batch = tiny_model(), ragged_batch(LENGTHS, left=True)
    tp.prune(model, PRUNER, reads="all")
    with tp.record(model) as trace:
        logits = model(**batch).logits
    assert torch.equal(trace.computed_lengths.feed_forward, trace.ffn_lengths)
    tp.unprune(model)
    with pruned(model, PRUNER):
        assert_close(model(**batch).logits, logits, 1e-5)


@torch.no_grad()
def test_an_unpruned_encoder_is_compiled_for_what_is_read() -> None:
    model, batch = tiny_model(head="encoder"), ragged_batch(LENGTHS)
    expected = model(**batch).last_hidden_state
    engine = tp.compile(model, "float32", reads="first")
    assert_close(engine(**batch).last_hidden_state[:, 0], expected[:, 0], 1e-5)
    assert "first tokens only" in engine.explain()
    with pytest.raises(tp.ConfigError, match=r"reads is 'first'; for a pruned model it is prune\(\) that says so"):
        tp.compile(tp.prune(model, PRUNER), reads="first")


def test_calibration_takes_it() -> None:
    model, examples = tiny_model(head="encoder"), ragged_batch([9, 12, 7, 20] * 10)
    found = tp.calibrate(model, examples, target_flops=0.7, reads="first")
    assert len(found.chosen.schedule.weights) == 3  # the last layer of four computes first tokens alone
    assert model(**ragged_batch(LENGTHS)).last_hidden_state.shape == (4, 1, 32)


@torch.no_grad()
def test_it_is_saved_and_comes_back(tmp_path: Path) -> None:
    model, batch = tiny_model(head="encoder"), ragged_batch(LENGTHS)
    tp.prune(model, PRUNER, reads="first").save_pretrained(tmp_path)
    loaded = tp.from_pretrained(tmp_path)
    assert reads_of(loaded) == "first"
    assert_close(loaded(**batch).last_hidden_state, model(**batch).last_hidden_state, 1e-6)
    assert not hasattr(tp.unprune(model).config, "reads")


def test_what_is_not_allowed_is_named(tmp_path: Path) -> None:
    with pytest.raises(tp.ConfigError, match=r"reads is 'last'; it must be one of first, mean, all"):
        tp.prune(tiny_model(), PRUNER, reads="last")  # type: ignore[arg-type]
    folder = write_checkpoint(tmp_path, prune_mode="threshold", token_threshold=0.1, reads=3)
    with pytest.raises(tp.ConfigError, match=r"config\.json: reads is 3; it must be one of first, mean, all"):
        tp.from_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["reads"] == 3


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_padding_on_the_left_is_padding_on_the_right(family: str, head: str) -> None:
    model = shared_model(family, head)
    right, left = (ragged_batch([30, 1, 17, 2], family=family, left=side) for side in (False, True))
    dense = model(**right)[0]
    for pruner in (tp.Unpruned(), PRUNER):
        with pruned(model, pruner):
            expected, actual = model(**right)[0], model(**left)[0]
            compiled = tp.compile(model, "float32")(**left)[0]
        valid = right["attention_mask"].bool(), left["attention_mask"].bool()
        per_token = expected.shape[:2] == valid[0].shape
        for found in (actual, compiled):
            assert_close(found[valid[1]] if per_token else found, expected[valid[0]] if per_token else expected, 2e-5)
        if isinstance(pruner, tp.Unpruned):
            assert_close(expected[valid[0]] if per_token else expected, dense[valid[0]] if per_token else dense, 2e-5)


@pytest.mark.parametrize("head", [hf.BertForNextSentencePrediction, hf.BertForMultipleChoice])
@torch.no_grad()
def test_pooled_heads_find_the_first_token_behind_padding(head: Any) -> None:
    torch.manual_seed(0)
    model = head(tiny_config("bert")).eval()
    right, left = (ragged_batch([30, 1, 17, 2], left=side) for side in (False, True))
    if head is hf.BertForMultipleChoice:
        right, left = ({name: x.view(2, 2, -1) for name, x in batch.items()} for batch in (right, left))
    expected = model(**right).logits
    for reads in ("first", "all"):
        tp.prune(model, tp.Unpruned(), reads=reads)  # type: ignore[arg-type]
        assert_close(model(**left).logits, expected, 1e-5)
        tp.unprune(model)


@pytest.mark.parametrize("family", ["distilbert", "modernbert"])
@torch.no_grad()
def test_multiple_choice_without_token_types_takes_no_notice_of_them(family: str) -> None:
    """Such heads do not flatten them, as they do ids: the dense model never looks."""
    model = tiny_model(family, "multiple_choice")
    batch = {name: x.view(2, 2, -1) for name, x in ragged_batch([30, 1, 17, 2]).items()}
    expected = model(**batch).logits
    types = torch.zeros_like(batch["input_ids"])
    for run in (tp.prune(model, tp.Unpruned()), tp.compile(model, "float32")):
        assert_close(run(**batch, token_type_ids=types).logits, expected, 1e-5)
