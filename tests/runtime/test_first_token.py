"""Heads that read the first token only: the last layer computes its row alone, and nobody can tell from the outputs."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertForSequenceClassification, BertModel, BertPreTrainedModel

import token_pruning as tp
from tests.tiny import FAMILIES, assert_close, pruned, ragged_batch, shared_model, tiny_config, tiny_model
from token_pruning.families import shape_of
from token_pruning.runtime.flops import layer_flops
from token_pruning.runtime.prune import reads_of

LENGTHS = [30, 1, 17, 2]
PRUNER = tp.FixedThreshold(final_token_threshold=0.0119)
SUMMARIES = tp.FixedThreshold(final_token_threshold=1.52, scoring_mode="relative", summary_tokens="segment")


class MeanPooled(BertPreTrainedModel):
    """Named like a first-token head, but not one."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask[..., None] / attention_mask.sum(1)[:, None, None]
        logits: Tensor = self.classifier((states * weights).sum(1))
        return logits


class MeanPooledForSequenceClassification(MeanPooled):
    """By its name alone."""


@pytest.mark.parametrize("pruner", [tp.Unpruned(), PRUNER, SUMMARIES])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_full_computation(family: str, pruner: tp.Pruner) -> None:
    model, batch = shared_model(family, "sequence"), ragged_batch(LENGTHS, family=family)
    with torch.no_grad():
        with pruned(model, pruner, "masked"):
            full = model(**batch).logits
        with pruned(model, pruner):
            only = model(**batch).logits
            with tp.record(model) as trace:
                recorded = model(**batch).logits
    assert_close(only, full, 1e-5)
    assert_close(recorded, full, 1e-5)
    assert trace.computed_lengths.queries[-1].tolist() == trace.computed_lengths.feed_forward[-1].tolist() == [1] * 4
    assert torch.equal(trace.computed_lengths.keys, trace.attention_lengths)


@pytest.mark.parametrize("pruner", [tp.Unpruned(), PRUNER, SUMMARIES])
@pytest.mark.parametrize("family", FAMILIES)
def test_counted_flops_are_those_computed(family: str, pruner: tp.Pruner) -> None:
    model, batch = shared_model(family, "sequence"), ragged_batch([37], family=family)
    with pruned(model, pruner):
        with tp.record(model) as trace:
            model(**batch)
        with FlopCounterMode(display=False) as counter:
            model(**batch)  # with gradients on: fused attention is no matrix product to the counter
    everything = counter.get_flop_counts()
    outside = ("bert.pooler", "classifier", "pre_classifier", "electra.embeddings_project")
    not_counted = sum(sum(everything.get(f"{type(model).__name__}.{name}", {}).values()) for name in outside)
    assert tp.count_flops(model, trace).pruned == sum(everything["Global"].values()) - not_counted


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_full_computation(family: str) -> None:
    model, batch = shared_model(family, "sequence"), ragged_batch(LENGTHS, family=family)
    gradients = []
    for execution in ("packed", "masked"):
        with pruned(model, PRUNER, execution):
            model.zero_grad()
            model(**batch, labels=torch.tensor([0, 1, 0, 1])).loss.backward()
            gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    model.zero_grad()
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert_close(gradient, gradients[1][name], 1e-5, name)


def test_soft_stage_has_the_thresholds_of_every_layer_to_learn() -> None:
    model = tp.prune(tiny_model(), tp.LearnedThreshold(final_token_threshold=0.01)).train()
    with tp.record(model) as trace:
        loss = model(**ragged_batch(LENGTHS), labels=torch.tensor([0, 1, 0, 1])).loss
    (loss + trace.soft_rates.sum()).backward()
    assert (model.token_pruner.thresholds.grad != 0).all()


def test_the_encoder_called_by_itself_gives_every_state() -> None:
    model, batch = shared_model("bert", "sequence"), ragged_batch(LENGTHS)
    with torch.no_grad():
        with pruned(model, PRUNER, "masked"):
            expected = model.base_model(**batch).last_hidden_state
        with pruned(model, PRUNER):
            model(**batch)
            assert_close(model.base_model(**batch).last_hidden_state, expected, 1e-5)


@pytest.mark.parametrize("head", ["token", "encoder"])
def test_heads_that_read_other_tokens_get_them(head: str) -> None:
    model = shared_model("bert", head)
    assert reads_of(model) == "all"
    with pruned(model, PRUNER), tp.record(model) as trace:
        model(**ragged_batch(LENGTHS))
    assert torch.equal(trace.computed_lengths.feed_forward, trace.ffn_lengths)


def test_a_class_that_is_not_transformers_own_is_not_trusted_by_its_name() -> None:
    assert reads_of(BertForSequenceClassification(tiny_config("bert"))) == "first"
    torch.manual_seed(0)
    model = MeanPooledForSequenceClassification(tiny_config("bert")).eval()
    assert reads_of(model) == "all"
    batch = ragged_batch(LENGTHS)
    with torch.no_grad():
        with pruned(model, PRUNER, "masked"):
            expected = model(**batch)
        with pruned(model, PRUNER):
            assert_close(model(**batch), expected, 1e-5)


def test_what_is_left_out_is_most_of_the_last_layer() -> None:
    shape = shape_of(tiny_config("bert"))
    n, one = torch.tensor(20), torch.tensor(1)
    macs = 2 * 20 * 32**2 + 2 * 32**2 + 2 * 20 * 32 + 2 * 32 * 64
    assert layer_flops(shape, n, one, one).item() == 2 * macs < layer_flops(shape, n, n).item() / 2
