"""What holds for every family: dense equal to Hugging Face's own, packed equal to masked, and what a model is for."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import token_pruning as tp
from tests.families.shared import (
    CASES,
    PRUNERS,
    READING_FIRST,
    assert_dense,
    assert_packed_equals_masked,
    assert_same,
    batch_of,
    kept_model,
    model_of,
    run,
    valid,
    without_dropout,
    zero_thresholds,
)
from tests.tiny import (
    EVERY_FAMILY,
    LONGEST,
    ROTARY_AND_PRE_LN,
    VOCABULARY,
    assert_close,
    outputs,
    pruned,
    ragged_batch,
    same_survivors,
    tiny_config,
)
from token_pruning.families import family_of
from token_pruning.runtime.prune import reads_of

BIASED = ("deberta", "deberta-v2", "mpnet")  # a bias of the logits is float32, whatever the weights are
every_family = pytest.mark.parametrize("family", EVERY_FAMILY)
every_head = pytest.mark.parametrize(("family", "head"), CASES)


# Nothing dropped


@every_head
def test_nothing_dropped_equals_hugging_face(family: str, head: str) -> None:
    """In double precision too: then nothing but rounding is left of a difference."""
    model, batch = model_of(family, head), batch_of(family, head)
    assert_dense(model, batch)
    first = (family, head) in READING_FIRST
    assert reads_of(model) == ("first" if first else "all")
    assert run(model, tp.Unpruned(), batch)[1].passes[0].first_only == first
    if family not in ROTARY_AND_PRE_LN and head not in ("encoder", "sequence"):
        return
    model.double()
    with torch.no_grad():
        expected = valid(model(**batch), batch)
    output, _ = run(model, tp.Unpruned(), batch)
    assert_same(valid(output, batch), expected, 1e-6 if family in BIASED else 1e-12)


@every_family
def test_hidden_states_and_attentions_are_hugging_faces(family: str) -> None:
    model, batch = model_of(family, "encoder", attn_implementation="eager"), batch_of(family)
    mask = batch["attention_mask"].bool()
    asked: Any = {**batch, "output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        expected = model(**asked)
        with pruned(model, tp.Unpruned(), "masked"):
            actual = model(**asked)
    for name in ("hidden_states", "attentions"):
        assert len(actual[name]) == len(expected[name]) == 4 + (name == "hidden_states")
        for ours, theirs in zip(actual[name], expected[name], strict=True):
            ours, theirs = (x if x.dim() == 3 else x.transpose(1, 2) for x in (ours, theirs))
            assert_close(ours[mask], theirs[mask], 2e-5 * max(1.0, theirs.abs().max().item()), name)


@every_family
@pytest.mark.parametrize("head", ["encoder", "token"])
def test_outputs_as_tuples_are_hugging_faces(family: str, head: str) -> None:
    model, batch = model_of(family, head, attn_implementation="eager"), batch_of(family)
    asked: Any = {**batch, "output_hidden_states": True, "output_attentions": True, "return_dict": False}

    def places(outputs: Any) -> list[Any]:  # no cross attentions: that is an empty tuple
        there = [x for x in outputs if x is None or len(x)]
        return [x if x is None else x.shape if torch.is_tensor(x) else [y.shape for y in x] for x in there]

    with torch.no_grad():
        expected = places(model(**asked))
        with pruned(model, tp.Unpruned(), "masked"):
            assert places(model(**asked)) == expected


@every_family
def test_embeddings_and_positions_may_be_given(family: str) -> None:
    model, batch = model_of(family, "token"), batch_of(family)
    batch["inputs_embeds"] = model.get_input_embeddings()(batch.pop("input_ids")).detach()
    assert_dense(model, batch)
    if family != "distilbert":  # whose heads take none
        batch["position_ids"] = torch.arange(LONGEST[family]).expand(len(batch["attention_mask"]), -1) * 7 % 50 + 3
        assert_dense(model, batch)


@every_head
def test_padding_on_the_left_changes_nothing(family: str, head: str) -> None:
    model = kept_model(family, head)
    right, left = (batch_of(family, head, (30, 1, 2), width=40, left=side) for side in (False, True))
    more = PRUNERS if head in ("sequence", "token") else {"topk": PRUNERS["topk"]}
    for name, pruner in {"none": tp.Unpruned(), **more}.items():
        expected, trace = run(model, pruner, right)
        output, left_trace = run(model, pruner, left)
        assert same_survivors(trace, left_trace)
        assert_same(valid(output, left), valid(expected, right), 2e-5, name)


# Real drops


@every_head
def test_packed_and_compiled_equal_masked(family: str, head: str) -> None:
    model, batch = kept_model(family, head), batch_of(family, head)
    for name, pruner in PRUNERS.items():
        if name != "fixed" and head not in ("sequence", "token", "encoder"):
            continue  # those pairs are in the product of all settings
        packed, _ = assert_packed_equals_masked(model, batch, pruner)
        with pruned(model, pruner):
            engine = tp.compile(model, dtype="float32")
        assert_same(valid(engine(**batch), batch), valid(packed, batch), 5e-5)
        on_pytorch = "kernels: PyTorch, because the native ones have no" in engine.explain()
        assert on_pytorch != family_of(model.config).native


@pytest.mark.parametrize("method", PRUNERS)
@every_family
def test_a_sequence_alone_equals_it_in_the_batch(family: str, method: str) -> None:
    model, batch = kept_model(family, "token"), batch_of(family)
    together, trace = run(model, PRUNERS[method], batch)
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        alone, own = run(model, PRUNERS[method], {name: x[row : row + 1, :length] for name, x in batch.items()})
        assert own.survived_layers[0].tolist() == trace.survived_layers[row].tolist()
        assert_same(outputs(alone), {"logits": together.logits[row : row + 1, :length]}, 2e-5)


# Training


def gradients_of(
    model: Any, pruner: tp.Pruner, batch: dict[str, Tensor], execution: Any = "packed"
) -> dict[str, Tensor]:
    """Of some loss, in training mode; in the soft stage of one in which the thresholds take part."""
    tp.prune(model, pruner, execution=execution).train()
    with tp.record(model) as trace:
        logits = model(**batch).logits
    logits = logits if logits.dim() == 2 else logits[batch["attention_mask"].bool()]
    loss = (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).square().sum()
    (loss + (trace.soft_rates.sum() if pruner.learned else 0)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", [*PRUNERS, "learned"])
@every_family
def test_gradients_of_packed_and_masked_are_the_same(family: str, method: str) -> None:
    pruner = PRUNERS.get(method) or tp.LearnedThreshold(temperature=0.05, max_seq_length=80)
    batch = batch_of(family, lengths=(30, 1, 2, 17))
    for head in ("sequence", "token") if method in ("relative", "learned") else ("token",):
        packed, masked = (
            gradients_of(model_of(family, head, **without_dropout(family)), pruner, batch, execution)
            for execution in ("packed", "masked")
        )
        assert packed.keys() == masked.keys()
        assert pruner.learned == ("token_pruner.thresholds" in packed)
        assert not pruner.learned or masked["token_pruner.thresholds"][:2].abs().min() > 0
        largest = max(gradient.abs().max().item() for gradient in masked.values())
        for name, gradient in masked.items():  # some are zero but for rounding, such as those of keys' biases
            assert_close(packed[name], gradient, 1e-4 * max(1.0, gradient.abs().max().item(), largest / 100), name)


@pytest.mark.parametrize("method", ["relative", "fixed", "learned"])
@pytest.mark.parametrize("family", sorted({*EVERY_FAMILY} - {"albert", "mpnet"}))  # transformers has none for these
def test_gradient_checkpointing_changes_no_gradient(family: str, method: str) -> None:
    pruner = PRUNERS.get(method) or tp.LearnedThreshold(temperature=0.05, max_seq_length=80)
    plain, checkpointed = (model_of(family, "token", **without_dropout(family)) for _ in range(2))
    enable = getattr(checkpointed, "activation_checkpointing_enable", None)  # transformers' new name for it
    (enable or checkpointed.gradient_checkpointing_enable)({"use_reentrant": False})
    batch = batch_of(family, lengths=(30, 7))
    expected, actual = (gradients_of(model, pruner, batch) for model in (plain, checkpointed))
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(actual[name], gradient, 1e-5 * max(1.0, gradient.abs().max().item()), name)


@every_family
def test_every_dropout_is_hugging_faces(family: str) -> None:
    """Each set to one in turn: what then remains is the same, and no chance is left."""
    batch = ragged_batch([30, 12], family=family)
    model = model_of(family, "encoder", layers=2, **without_dropout(family)).train()
    sites = [(module, "p") for module in model.modules() if isinstance(module, nn.Dropout)]
    sites += [(module, "attention_dropout") for module in model.modules() if hasattr(module, "attention_dropout")]
    sites = [(module, name) for module, name in sites if isinstance(getattr(module, name), float)]
    changed = 0
    with torch.no_grad():
        dense = model(**batch)[0]
        for module, name in sites:
            setattr(module, name, 1.0)
            expected = model(**batch)
            changed += not torch.equal(dense, expected[0])
            with pruned(model, zero_thresholds(model)):
                assert_same(valid(model(**batch), batch), valid(expected, batch), 2e-5)
            setattr(module, name, 0.0)
    assert changed >= 2
    bound = family_of(model.config)(model)
    name = "attention_dropout" if hasattr(model.config, "attention_dropout") else "attention_probs_dropout_prob"
    bound = family_of(model.config)(model_of(family, "encoder", **{name: 0.25}))
    assert {bound.dropout(layer) for layer in bound.layers} == {0.25}


# FLOPs


@pytest.mark.parametrize("method", PRUNERS)
@every_family
def test_flops_equal_the_products_really_computed(family: str, method: str) -> None:
    """But for those that no token or no layer has a part in: projections of relative positions and of embeddings.

    Windows are as wide as the text, since plain packed attention computes what a window hides, too.
    """
    wide = {"local_attention": 2 * LONGEST[family]} if family == "modernbert" else {}
    model = model_of(family, "encoder", attn_implementation="eager", **wide)
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    length = 37
    batch = ragged_batch([length], family=family)
    projection = 2 * length * 32 * 16
    positions = 4 * 2 * (2 * 2 * 16) * 32**2  # layers · c2p and p2c · 2 · 32 positions
    uncounted = {"albert": projection, "electra": projection, "deberta": positions, "deberta-v2": positions}
    with FlopCounterMode(display=False) as dense:
        model(**batch)
    tp.prune(model, PRUNERS[method])
    with FlopCounterMode(display=False) as counter, tp.record(model) as trace:
        model(**batch)  # gradients are on: fused attention is no matrix product to the counter
    flops = tp.count_flops(model, trace)
    assert flops.dense == dense.get_total_flops() - uncounted.get(family, 0)
    assert flops.pruned == counter.get_total_flops() - uncounted.get(family, 0)
    assert flops.pruned < 0.95 * flops.dense


# From training to a file and back


@every_family
def test_training_calibration_a_checkpoint_and_an_engine(family: str, tmp_path: Path) -> None:
    model = model_of(family, "sequence", layers=3)
    scores = torch.rand(VOCABULARY, generator=torch.Generator().manual_seed(0))
    gate = tp.VocabularyGate(scores, threshold=0.2)
    pruner = tp.LearnedThreshold(final_token_threshold=0.5, temperature=0.5, scoring_mode="relative", vocabulary=gate)
    tp.prune(model, pruner).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    batch = batch_of(family)
    with tp.record(model) as trace:
        loss = model(**batch, labels=torch.arange(4) % 3).loss
    (loss + trace.soft_rates.mean()).backward()
    optimizer.step()
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert "token_pruner.thresholds" in changed and len(changed) > 20
    tp.freeze_thresholds(model)
    model.eval().save_pretrained(tmp_path)
    loaded = tp.from_pretrained(tmp_path)
    assert torch.equal(loaded.token_pruner.thresholds, model.token_pruner.thresholds)
    assert torch.equal(loaded.token_pruner.vocabulary_scores, scores)
    assert loaded.config.prune_mode == model.config.prune_mode
    with torch.no_grad(), tp.record(loaded) as trace:
        expected, actual = model(**batch), loaded(**batch)
    assert_close(actual.logits, expected.logits, 1e-5)
    assert tp.count_flops(loaded, trace).pruned < tp.count_flops(loaded, trace).dense
    assert_same(outputs(tp.compile(loaded, "float32")(**batch)), outputs(actual), 5e-5)
    tp.unprune(loaded)
    tp.calibrate(loaded, ragged_batch([9, 12, 7, 3] * 8, family=family), target_flops=0.7)
    with torch.no_grad(), tp.record(loaded) as trace:
        loaded(**ragged_batch([9, 12, 7, 3] * 8, family=family))
    flops = tp.count_flops(loaded, trace)
    assert 0.6 < flops.pruned / flops.dense < 0.8


@every_family
def test_unprune_leaves_nothing_behind(family: str) -> None:
    """And copies and pickles of a pruned model are pruned."""
    model, batch = model_of(family, "token"), batch_of(family)

    def traces() -> Any:
        return [(name, list(vars(module))) for name, module in model.named_modules()], model.config.to_dict()

    before, keys = traces(), list(model.state_dict())
    with torch.no_grad():
        expected = model(**batch).logits
        for method in PRUNERS.values():
            tp.prune(model, method)
            logits = model(**batch).logits
            assert not torch.equal(logits, expected)
            for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
                assert torch.equal(twin(**batch).logits, logits)
            tp.unprune(model)
            assert torch.equal(model(**batch).logits, expected)
    assert traces() == before and list(model.state_dict()) == keys


# Half precision


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "autocast"])
@every_family
def test_half_precision_keeps_near_and_to_its_dtype(family: str, kind: str) -> None:
    """Near is a third of the states' norm: wide random weights amplify rounding, and decisions may differ."""
    model, batch = model_of(family, "encoder"), batch_of(family)
    pruners = (tp.Unpruned(), PRUNERS["topk"])
    exact = [run(model, pruner, batch) for pruner in pruners]
    if kind != "autocast":
        model.to(getattr(torch, kind))
    for pruner, (expected, trace) in zip(pruners, exact, strict=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            actual, half_trace = run(model, pruner, batch)
        assert kind == "autocast" or actual.last_hidden_state.dtype == getattr(torch, kind)
        assert torch.equal(trace.ffn_lengths, half_trace.ffn_lengths)
        found, wanted = (valid(x, batch)["last_hidden_state"].float() for x in (actual, expected))
        assert found.isfinite().all()
        assert (found - wanted).norm() < wanted.norm() / 3


def test_the_tables_of_these_tests_are_complete() -> None:
    from token_pruning.families import supported_model_types

    assert {*EVERY_FAMILY, "vit", "deit"} == set(supported_model_types())
    assert all(tiny_config(family).model_type == family for family in EVERY_FAMILY)
