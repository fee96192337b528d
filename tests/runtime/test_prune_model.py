"""Pruning whole models: packed against masked, both against a second writing, and what is left after unprune."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import token_pruning as tp
from tests.tiny import (
    FAMILIES,
    HEADS,
    LONGEST,
    BertByTheBook,
    assert_close,
    assert_equal,
    decision_margin,
    divisor_by_the_book,
    keep_by_the_book,
    outputs,
    pruned,
    ragged_batch,
    same_survivors,
    shared_model,
    tiny_config,
    tiny_model,
)
from token_pruning.families import family_of
from token_pruning.pruners.importance import SCORING_MODES
from token_pruning.pruners.summary import SUMMARY_TOKENS

LAYERS = 4
METHODS = ("learned", "fixed", "topk", "relative", "rising")
MODEL_TYPES = ["bert", "camembert", "distilbert", "electra", "roberta", "xlm-roberta"]
LENGTHS = st.lists(st.one_of(st.sampled_from([1, 2, 80]), st.integers(1, 80)), min_size=1, max_size=6)
STRENGTHS = st.floats(0, 1)


def pruner_of(method: str, strength: float, scoring_mode: Any = "mean", summary_tokens: Any = "none") -> tp.Pruner:
    """A pruner that drops next to nothing at strength 0 and nearly everything at strength 1."""
    shared: dict[str, Any] = {
        "scoring_mode": scoring_mode, "max_seq_length": 16, "summary_tokens": summary_tokens
    }  # fmt: skip
    final = strength * {"mean": 0.15, "mean_norm": 0.1, "relative": 2.4}[scoring_mode]
    return {
        "learned": lambda: tp.LearnedThreshold(final_token_threshold=final, **shared),
        "fixed": lambda: tp.FixedThreshold(thresholds=[final, final / 2, final, 2 * final], **shared),
        "topk": lambda: tp.TopK(token_keep_rate=1 - strength, **shared),
        "relative": lambda: tp.RelativeThreshold(token_threshold=strength, **shared),
        "rising": lambda: tp.RisingThreshold(final_token_threshold=strength, **shared),
    }[method]()


def run(model: Any, pruner: tp.Pruner, batch: dict[str, Tensor], execution: str = "packed") -> tuple[Any, tp.Trace]:
    with pruned(model, pruner, execution), torch.no_grad(), tp.record(model) as trace:
        return model(**batch), trace


# Packed equals masked


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=5)
@given(
    lengths=LENGTHS,
    strength=STRENGTHS,
    mode=st.sampled_from(SCORING_MODES),
    summaries=st.sampled_from(SUMMARY_TOKENS),
    seed=st.integers(0, 9),
)
@example(lengths=[1, 80, 2, 33], strength=0.4, mode="mean", summaries="none", seed=0)
@example(lengths=[30, 30, 30], strength=0.4, mode="mean_norm", summaries="none", seed=0)
@example(lengths=[40, 2, 33], strength=0.4, mode="relative", summaries="segment", seed=0)
def test_packed_equals_masked(
    family: str, head: str, lengths: list[int], strength: float, mode: str, summaries: str, seed: int
) -> None:
    model = shared_model(family, head)
    batch = ragged_batch([min(n, LONGEST[family]) for n in lengths], family=family, seed=seed)
    for method in METHODS:
        pruner = pruner_of(method, strength, mode, summaries)
        packed, packed_trace = run(model, pruner, batch)
        masked, masked_trace = run(model, pruner, batch, "masked")
        if decision_margin(masked_trace, LAYERS) < 1e-6:
            continue  # rounding may decide
        assert same_survivors(packed_trace, masked_trace), method
        assert torch.equal(packed_trace.attention_lengths, masked_trace.attention_lengths)
        assert torch.equal(packed_trace.ffn_lengths, masked_trace.ffn_lengths)
        assert torch.equal(packed_trace.summary_lengths, masked_trace.summary_lengths)
        expected = outputs(masked)
        assert outputs(packed).keys() == expected.keys()
        for name, value in outputs(packed).items():
            assert_close(value, expected[name], message=f"{method} {name}")


@pytest.mark.parametrize("execution", ["packed", "masked"])
def test_the_strengths_of_these_tests_prune_some_and_not_all(execution: str) -> None:
    batch = ragged_batch([80, 33, 60, 12])
    for method in METHODS:
        _, trace = run(shared_model("bert", "encoder"), pruner_of(method, 0.4), batch, execution)
        left = trace.ffn_lengths[-1].sum().item() / batch["attention_mask"].sum().item()
        assert 0.02 < left < 0.98, method


# A second writing of the rules, sequence by sequence, head by head, in float64


@pytest.mark.parametrize("execution", ["packed", "masked"])
@pytest.mark.parametrize(
    ("mode", "summaries"),
    [("mean", "none"), ("mean_norm", "none"), ("relative", "none"), ("mean", "shared"), ("mean_norm", "segment")],
)
@pytest.mark.parametrize("method", METHODS)
def test_both_executions_equal_a_second_writing_of_the_rules(
    method: str, mode: str, summaries: str, execution: str
) -> None:
    model = shared_model("bert", "sequence")
    pruner = pruner_of(method, 0.45, mode, summaries)
    lengths = [23, 1, 40, 2, 9]
    batch = ragged_batch(lengths, seed=3)
    book = BertByTheBook(model, pruner)
    with torch.no_grad():
        expected = [book.sequence(batch["input_ids"][row, :n].tolist()) for row, n in enumerate(lengths)]
        assert book.margin > 1e-7  # else rounding may decide, and this batch is a bad example
        with pruned(model, pruner, execution):
            with tp.record(model) as trace:
                states = model.base_model(**batch).last_hidden_state
            logits = model(**batch).logits
        pooled = torch.stack([states[0] for states, _, _ in expected]).float()
        pooled = model.bert.pooler.dense(pooled).tanh()
        assert_close(logits, model.classifier(pooled))
    for row, (length, (expected_states, survived, _)) in enumerate(zip(lengths, expected, strict=True)):
        assert trace.survived_layers[row].tolist() == survived
        assert_close(states[row, :length], expected_states, message=f"sequence {row}")
        assert not states[row, length:].any()
    kept = [sum(s > 0 for s in survived) for _, survived, _ in expected]
    assert trace.attention_lengths[0].tolist() == lengths
    left = (trace.ffn_lengths[0] - trace.summary_lengths[0]).tolist()
    assert left == kept
    assert torch.equal(trace.attention_lengths[1], trace.ffn_lengths[0])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_decisions_follow_from_the_attentions_the_masked_reference_returns(family: str, method: str) -> None:
    lengths = [25, 3, 14]
    pruner = pruner_of(method, 0.4)
    batch = ragged_batch(lengths, family=family, seed=1)
    with pruned(shared_model(family, "token"), pruner, "masked") as model, torch.no_grad(), tp.record(model) as trace:
        attentions = model(**batch, output_attentions=True).attentions
    for row, length in enumerate(lengths):
        alive, survived = list(range(length)), [0] * length
        for layer, attention in enumerate(attentions, start=1):
            present = attention[row].double()[:, alive][:, :, alive]
            assert_close(present.sum(-1), torch.ones(present.shape[:2]), 1e-5)  # nothing else is attended to
            divisor = divisor_by_the_book(pruner, len(alive))
            scores = (present.sum((0, 1)) / present.shape[0] / divisor).tolist()
            keep, margin = keep_by_the_book(pruner, layer, LAYERS, scores, length)
            assert margin > 1e-7
            alive = [token for token, stays in zip(alive, keep, strict=True) if stays]
            for token in alive:
                survived[token] += 1
        assert trace.survived_layers[row].tolist() == survived


# Independence of the batch


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sequence_does_not_depend_on_its_batch_or_its_padding(family: str, method: str) -> None:
    model = shared_model(family, "token")
    pruner = pruner_of(method, 0.4)
    lengths = [21, 5, 60, 1]
    wide = ragged_batch(lengths, family=family, width=LONGEST[family])
    tight = ragged_batch(lengths, family=family)
    left = ragged_batch(lengths, family=family, width=70, left=True)
    if "roberta" not in family and family != "camembert":  # those count positions from the padding
        left["position_ids"] = (left["attention_mask"].cumsum(1) - 1).clamp(min=0)
    reverse = {name: value.flip(0) for name, value in tight.items()}
    expected, expected_trace = run(model, pruner, tight)
    kept = [survived.tolist() for survived in expected_trace.survived_layers]
    from_wide, from_left, from_reverse = (run(model, pruner, batch) for batch in (wide, left, reverse))
    assert [t.tolist() for t in from_wide[1].survived_layers] == kept
    assert [t.tolist() for t in from_left[1].survived_layers] == kept
    assert [t.tolist() for t in from_reverse[1].survived_layers] == kept[::-1]
    for row, length in enumerate(lengths):
        alone = {name: value[row : row + 1, :length] for name, value in tight.items()}
        logits, trace = run(model, pruner, alone)
        assert trace.survived_layers[0].tolist() == kept[row]
        reference = expected.logits[row, :length]
        assert_close(logits.logits[0], reference, message="alone")
        assert_close(from_wide[0].logits[row, :length], reference, message="more padding")
        assert_close(from_left[0].logits[row, 70 - length :], reference, message="left padding")
        assert_close(from_reverse[0].logits[-1 - row, :length], reference, message="another order")


@pytest.mark.parametrize("execution", ["packed", "masked"])
def test_a_batch_without_mask_is_all_valid(execution: str) -> None:
    model, pruner = shared_model("bert", "token"), pruner_of("fixed", 0.4)
    batch = ragged_batch([12, 12])
    expected, _ = run(model, pruner, batch, execution)
    actual, trace = run(model, pruner, {"input_ids": batch["input_ids"]}, execution)
    assert_equal(actual.logits, expected.logits)
    assert trace.attention_lengths[0].tolist() == [12, 12]


@pytest.mark.parametrize("execution", ["packed", "masked"])
@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_a_row_of_nothing_but_padding_changes_no_other(family: str, execution: str) -> None:
    model, pruner = shared_model(family, "token"), pruner_of("relative", 0.4)
    batch = ragged_batch([9, 20], family=family)
    expected, _ = run(model, pruner, batch, execution)
    padded = {name: torch.cat([value, torch.zeros_like(value[:1])]) for name, value in batch.items()}
    actual, trace = run(model, pruner, padded, execution)
    assert_close(actual.logits[:2], expected.logits)
    assert actual.logits.isfinite().all()
    assert trace.ffn_lengths[:, 2].tolist() == [0] * LAYERS
    assert trace.survived_layers[2].numel() == 0


@pytest.mark.parametrize("execution", ["packed", "masked"])
def test_a_batch_of_nothing_but_padding_gives_the_heads_zeros(execution: str) -> None:
    batch = ragged_batch([4, 4])
    batch["attention_mask"] = torch.zeros_like(batch["attention_mask"])
    output, trace = run(shared_model("bert", "encoder"), pruner_of("fixed", 0.4), batch, execution)
    assert not output.last_hidden_state.any()
    assert not trace.ffn_lengths.any()


@pytest.mark.parametrize("execution", ["packed", "masked"])
@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_can_be_given_in_place_of_ids(family: str, execution: str) -> None:
    model, pruner = shared_model(family, "token"), pruner_of("rising", 0.5)
    batch = ragged_batch([11, 30], family=family)
    expected, _ = run(model, pruner, batch, execution)
    embedded = {"inputs_embeds": model.get_input_embeddings()(batch["input_ids"])}
    actual, _ = run(model, pruner, {**embedded, "attention_mask": batch["attention_mask"]}, execution)
    assert_close(actual.logits[1], expected.logits[1])
    assert_close(actual.logits[0, :11], expected.logits[0, :11])


def test_arguments_can_be_given_by_position() -> None:
    model = shared_model("bert", "token")
    batch = ragged_batch([11, 30])
    with pruned(model, pruner_of("fixed", 0.4)), torch.no_grad():
        assert_equal(model(*batch.values()).logits, model(**batch).logits)
        assert_equal(model(**batch, return_dict=False)[0], model(**batch).logits)
        base = model.base_model
        assert_equal(base(*batch.values())[0], base(**batch).last_hidden_state)


# What pruning means for outputs


@pytest.mark.parametrize("execution", ["packed", "masked"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_thresholds_of_zero_and_no_pruning_give_the_dense_model(family: str, head: str, execution: str) -> None:
    model = shared_model(family, head)
    batch = ragged_batch([1, 26, LONGEST[family], 2], family=family)
    with torch.no_grad():
        dense = outputs(model(**batch))
    mask = batch["attention_mask"].bool()
    for pruner in (tp.FixedThreshold(final_token_threshold=0), tp.Unpruned()):
        output, trace = run(model, pruner, batch, execution)
        assert [survived.tolist() for survived in trace.survived_layers] == [[LAYERS] * n for n in mask.sum(1)]
        assert trace.ffn_lengths.tolist() == [mask.sum(1).tolist()] * LAYERS
        for name, value in outputs(output).items():
            expected = dense[name]
            if value.shape[:2] == mask.shape:  # what a token-level head says of padding means nothing
                value, expected = value[mask], expected[mask]
            assert_close(value, expected, 1e-5 * max(1.0, expected.abs().max().item()), name)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_token_is_never_dropped(family: str, method: str) -> None:
    huge = {
        "learned": tp.LearnedThreshold(final_token_threshold=9),
        "fixed": tp.FixedThreshold(thresholds=[9] * LAYERS),
        "topk": tp.TopK(token_keep_rate=-9),
        "relative": tp.RelativeThreshold(token_threshold=1),
        "rising": tp.RisingThreshold(final_token_threshold=1),
    }[method]
    for left in (False, True):
        batch = ragged_batch([17, 1, 30, 2], family=family, left=left)
        for execution in ("packed", "masked"):
            _, trace = run(shared_model(family, "encoder"), huge, batch, execution)
            assert [survived[0].item() for survived in trace.survived_layers] == [LAYERS] * 4
            assert (trace.ffn_lengths[-1] <= 2).all()  # and next to nothing else is left


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_token_keeps_its_last_computed_hidden_state(family: str) -> None:
    """Everything but the first token leaves in layer 1: its output is the attention block's, seen by a hook."""
    model = shared_model(family, "encoder")
    batch = ragged_batch([15], family=family)
    layer = model.transformer.layer[0] if family == "distilbert" else model.encoder.layer[0]
    block = layer.sa_layer_norm if family == "distilbert" else layer.attention
    seen = []
    handle = block.register_forward_hook(
        lambda module, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    try:
        with torch.no_grad():
            model(**batch)  # dense: the first layer's attention is the same
    finally:
        handle.remove()
    output, trace = run(model, tp.FixedThreshold(thresholds=[9] * LAYERS), batch)
    assert trace.survived_layers[0].tolist() == [LAYERS] + [0] * 14
    assert_close(output.last_hidden_state[0, 1:], seen[0][0, 1:], 1e-5)
    assert (output.last_hidden_state[0, 0] - seen[0][0, 0]).abs().max() > 0.1


def test_positions_that_are_padding_are_zero_before_the_head() -> None:
    batch = ragged_batch([4, 9])
    for execution in ("packed", "masked"):
        output, _ = run(shared_model("bert", "encoder"), pruner_of("fixed", 0.4), batch, execution)
        assert not output.last_hidden_state[0, 4:].any()


# The trace


def test_the_trace_joins_batches_and_agrees_with_itself() -> None:
    model = shared_model("roberta", "sequence")
    batches = [ragged_batch(lengths, family="roberta", seed=seed) for seed, lengths in enumerate([[9, 30], [50], [3]])]
    with pruned(model, pruner_of("relative", 0.3)), torch.no_grad(), tp.record(model) as trace:
        for batch in batches:
            model(**batch)
    assert trace.attention_lengths.dtype == trace.ffn_lengths.dtype == torch.long
    assert trace.attention_lengths.shape == trace.ffn_lengths.shape == (LAYERS, 4)
    assert trace.attention_lengths[0].tolist() == [9, 30, 50, 3]
    assert torch.equal(trace.attention_lengths[1:], trace.ffn_lengths[:-1])
    for sequence, survived in enumerate(trace.survived_layers):
        for layer in range(LAYERS):
            assert (survived > layer).sum().item() == trace.ffn_lengths[layer, sequence].item()


def test_an_empty_trace_says_so() -> None:
    with pruned(shared_model("bert", "encoder"), tp.TopK()) as model, tp.record(model) as trace:
        pass
    for name in ("attention_lengths", "ffn_lengths", "soft_lengths", "soft_rates"):
        with pytest.raises(RuntimeError, match="trace is empty"):
            getattr(trace, name)
    assert trace.survived_layers == []


def test_nothing_is_recorded_outside_the_block() -> None:
    batch = ragged_batch([5])
    with pruned(shared_model("bert", "encoder"), tp.TopK()) as model, torch.no_grad():
        model(**batch)
        with tp.record(model) as trace:
            model(**batch)
        model(**batch)
    assert trace.attention_lengths.shape == (LAYERS, 1)


# Taking it off


HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def everything_attached(model: nn.Module) -> list[Any]:
    """Every hook, attribute name and config of every module."""
    return [
        (
            name,
            type(module),
            sorted(vars(module)),
            id(getattr(module, "config", None)),
            *(dict(getattr(module, h)) for h in HOOKS),
        )
        for name, module in model.named_modules()
    ]


@pytest.mark.parametrize("execution", ["packed", "masked"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_unprune_restores_the_model_bit_for_bit(family: str, method: str, execution: str) -> None:
    model = tiny_model(family, "token")
    batch = ragged_batch([5, 20, 1], family=family)
    with torch.no_grad():
        before = outputs(model(**batch))
    config, config_before = model.config, model.config.to_dict()
    attached, keys = everything_attached(model), list(model.state_dict())
    assert tp.prune(model, pruner_of(method, 0.5), execution=execution) is model
    assert everything_attached(model) != attached
    assert model.config.to_dict() != config_before
    with torch.no_grad():
        changed = outputs(model(**batch))
    assert not torch.equal(changed["logits"], before["logits"])
    assert tp.unprune(model) is model
    assert everything_attached(model) == attached
    assert not hasattr(model, "token_pruner")
    assert model.config is config
    assert config.to_dict() == config_before
    assert config._attn_implementation == "sdpa"
    assert list(model.state_dict()) == keys
    with torch.no_grad():
        after = outputs(model(**batch))
    for name, value in before.items():
        assert_equal(after[name], value)


def test_prune_leaves_weights_class_and_call_alone() -> None:
    model = tiny_model("roberta")
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    tp.prune(model, tp.LearnedThreshold())
    assert type(model) is hf.RobertaForSequenceClassification
    assert set(model.state_dict()) - set(weights) == {"token_pruner.thresholds"}
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())


def test_prune_again_after_unprune_uses_the_new_method() -> None:
    model, batch = tiny_model(), ragged_batch([30, 8])
    with torch.no_grad():
        tp.prune(model, tp.LearnedThreshold(final_token_threshold=9))
        model(**batch)
        tp.unprune(model)
        tp.prune(model, tp.TopK(token_keep_rate=0.5))
        with tp.record(model) as trace:
            model(**batch)
    assert trace.ffn_lengths.tolist() == [[30, 8]] * 3 + [[15, 4]]
    assert model.config.prune_mode == "topk"
    assert not hasattr(model.config, "final_token_threshold")


def test_pruning_one_model_leaves_another_with_the_same_config_alone(tmp_path: Path) -> None:
    config = tiny_config("bert")
    first, second = (hf.BertForSequenceClassification(config).eval() for _ in range(2))
    assert first.config is second.config is second.bert.config
    batch = ragged_batch([14, 6])
    with torch.no_grad():
        expected = second(**batch).logits
        tp.prune(first, pruner_of("fixed", 0.5))
        first(**batch)
        assert_equal(second(**batch).logits, expected)
        assert second(**batch, output_hidden_states=True).hidden_states is not None
    second.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "prune_mode" not in written and "scoring_mode" not in written
    tp.unprune(first)
    assert first.config is second.config


def test_two_pruned_models_with_one_config_each_keep_their_method() -> None:
    config = tiny_config("bert")
    first, second = (hf.BertForSequenceClassification(config).eval() for _ in range(2))
    tp.prune(first, tp.TopK(token_keep_rate=0.5))
    tp.prune(second, tp.FixedThreshold(thresholds=[9] * LAYERS))
    batch = ragged_batch([10])
    with torch.no_grad(), tp.record(first) as one, tp.record(second) as two:
        first(**batch)
        second(**batch)
    assert one.ffn_lengths.flatten().tolist() == [10, 10, 10, 5]
    assert two.ffn_lengths.flatten().tolist() == [1, 1, 1, 1]


def test_unprune_keeps_what_else_has_changed_in_the_config(tmp_path: Path) -> None:
    model = tiny_model("bert")
    tp.prune(model, tp.FixedThreshold(thresholds=[0.0] * LAYERS), reads="all")
    model.resize_token_embeddings(210)
    model.config.id2label = {0: "a", 1: "b", 2: "c"}
    model.set_attn_implementation("eager")
    tp.unprune(model)
    assert model.config is model.bert.config is model.bert.encoder.layer[0].attention.self.config
    assert not {"reads", "prune_mode", "thresholds", "masking_mode", "scoring_mode"} & model.config.to_dict().keys()
    assert model.config._attn_implementation == "eager"
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config.vocab_size == 210 and loaded.config.id2label[1] == "b"


def test_thresholds_and_scores_that_are_loaded_are_saved(tmp_path: Path) -> None:
    def made(thresholds: list[float], seed: int) -> Any:
        scores = torch.rand(200, generator=torch.Generator().manual_seed(seed))
        gate = tp.VocabularyGate(scores, threshold=0.2)
        return tp.prune(tiny_model("bert"), tp.FixedThreshold(thresholds=thresholds, vocabulary=gate))

    trained, model = made([0.01, 0.02, 0.04, 0.06], 1), made([0.0] * LAYERS, 2)
    model.load_state_dict(trained.state_dict())
    model.save_pretrained(tmp_path)
    batch = ragged_batch([18, 9])
    with torch.no_grad():
        expected = trained(**batch).logits
        for same in (model, tp.from_pretrained(tmp_path)):
            assert_equal(same(**batch).logits, expected)
            assert_close(torch.tensor(same.config.thresholds), torch.tensor([0.01, 0.02, 0.04, 0.06]), 1e-6)
    own = model.token_pruner.pruner
    assert torch.equal(own.vocabulary.scores, trained.token_pruner.pruner.vocabulary.scores)


# Attentions and hidden states


@pytest.mark.parametrize("name", ["output_attentions", "output_hidden_states"])
@pytest.mark.parametrize("where", ["call", "config"])
@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_packed_execution_refuses_outputs_it_cannot_give(family: str, where: str, name: str) -> None:
    model = tiny_model(family, attn_implementation="eager")
    if where == "config":
        setattr(model.config, name, True)
    tp.prune(model, tp.TopK())
    arguments = {name: True} if where == "call" else {}
    with pytest.raises(tp.UnsupportedModelError, match=f'{name}=True.*execution="masked"'):
        model(**ragged_batch([5]), **arguments)


@pytest.mark.parametrize("asked_before", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_masked_execution_gives_attentions_and_hidden_states(family: str, asked_before: bool) -> None:
    model = tiny_model(family, "token", attn_implementation="eager")
    lengths = [18, 7]
    batch = ragged_batch(lengths, family=family)
    both = {"output_attentions": True, "output_hidden_states": True}
    if asked_before:  # transformers installs its own hooks at the first such call
        model(**batch, **both)
    tp.prune(model, pruner_of("relative", 0.5), execution="masked")
    with torch.no_grad(), tp.record(model) as trace:
        output = model(**batch, **both)
        plain = model(**batch)
    assert_equal(output.logits, plain.logits)
    assert plain.attentions is None and plain.hidden_states is None
    assert [tuple(a.shape) for a in output.attentions] == [(2, 4, 18, 18)] * LAYERS
    assert [tuple(h.shape) for h in output.hidden_states] == [(2, 18, 32)] * (LAYERS + 1)
    for row, survived in enumerate(trace.survived_layers[:2]):
        for layer in range(LAYERS):
            gone = (survived < layer).nonzero().flatten()
            assert not output.attentions[layer][row, :, :, gone].any()
            assert not output.attentions[layer][row, :, :, lengths[row] :].any()
            # Gone tokens stand still.
            assert torch.equal(output.hidden_states[layer + 1][row, gone], output.hidden_states[layer][row, gone])
            there = (survived >= layer).nonzero().flatten()
            moved = output.hidden_states[layer + 1][row, there] - output.hidden_states[layer][row, there]
            assert (moved.abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize("asked", [2, [0, -1], (1, -2, 99)])
@pytest.mark.parametrize("where", ["call", "config"])
def test_masked_execution_gives_the_hidden_states_that_are_asked_for(where: str, asked: Any) -> None:
    model, batch = tiny_model("bert", "token"), ragged_batch([5, 3])
    tp.prune(model, pruner_of("relative", 0.5), execution="masked")
    with torch.no_grad():
        every = model(**batch, output_hidden_states=True).hidden_states
        if where == "config":
            model.config.output_hidden_states = asked
        some = model(**batch, **({"output_hidden_states": asked} if where == "call" else {})).hidden_states
    kept = {i % (LAYERS + 1) for i in ([asked] if isinstance(asked, int) else asked) if i <= LAYERS}
    assert [i for i, state in enumerate(some) if state is not None] == sorted(kept)
    for i in kept:
        assert_equal(some[i], every[i])


def test_gradients_reach_the_hidden_states_and_attentions_of_masked_execution() -> None:
    model = tiny_model("bert", "token")
    tp.prune(model, tp.Unpruned(), execution="masked")
    output = model(**ragged_batch([5, 3]), output_hidden_states=True, output_attentions=True)
    for kept in (*output.hidden_states, *output.attentions):
        kept.retain_grad()
    output.logits[0, 0, 0].backward()
    for kept in (*output.hidden_states, *output.attentions):
        assert kept.grad is not None and kept.grad.abs().sum() > 0


# Errors


def test_a_sequence_longer_than_the_position_table_is_refused() -> None:
    for family in FAMILIES:
        longest = LONGEST[family]
        model = tp.prune(tiny_model(family), tp.TopK())
        with torch.no_grad():
            model(**ragged_batch([longest], family=family))
        with pytest.raises(tp.ConfigError, match=f"{longest + 1} tokens.* at most {longest}"):
            model(**ragged_batch([longest + 1], family=family))


@pytest.mark.parametrize("shape", [(2, 5), (2, 1, 6, 6), (1, 6), (2,)])
def test_an_attention_mask_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    model = tp.prune(tiny_model(), tp.TopK())
    with pytest.raises(tp.ConfigError) as caught:
        model(input_ids=ragged_batch([6, 6])["input_ids"], attention_mask=torch.ones(shape))
    assert str(list(shape)) in str(caught.value) and "[2, 6]" in str(caught.value)


@pytest.mark.parametrize("name", ["encoder_hidden_states", "past_key_values"])
def test_what_only_decoders_take_is_refused(name: str) -> None:
    model, batch = shared_model("bert", "encoder"), ragged_batch([4, 3])
    with (
        pruned(model, tp.TopK()),
        pytest.raises(tp.ConfigError, match=f"{name} is given; a pruned or compiled"),
    ):
        model(**batch, **{name: torch.zeros(2, 4, 32)})


def test_a_subclass_without_model_types_takes_over_no_family() -> None:
    bert = family_of(tiny_config("bert"))
    type("Other", (bert,), {})
    assert family_of(tiny_config("bert")) is bert


def test_pruning_twice_is_refused() -> None:
    model = tp.prune(tiny_model(), tp.TopK())
    for again in (model, model.bert):
        with pytest.raises(tp.ConfigError, match=r"pruned already.*unprune"):
            tp.prune(again, tp.TopK())
    tp.unprune(model)


def test_unpruning_and_recording_an_unpruned_model_are_refused() -> None:
    model = tiny_model()
    with pytest.raises(tp.ConfigError, match=r"not pruned; call prune\(model, pruner\) first"):
        tp.unprune(model)
    with pytest.raises(tp.ConfigError, match="not pruned"), tp.record(model):
        pass


def unsupported_models() -> dict[str, Any]:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
    return {
        "fnet": lambda: hf.FNetModel(hf.FNetConfig(vocab_size=99, **sizes)),  # mixes tokens without attention
        "gpt2": lambda: hf.GPT2Model(hf.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4)),
    }


@pytest.mark.parametrize("model_type", unsupported_models())
def test_an_unsupported_model_is_named_with_the_supported_ones(model_type: str) -> None:
    model = unsupported_models()[model_type]()
    before = everything_attached(model)
    with pytest.raises(tp.UnsupportedModelError) as caught:
        tp.prune(model, tp.TopK())
    assert repr(model_type) in str(caught.value)
    for supported in MODEL_TYPES:
        assert supported in str(caught.value)
    assert everything_attached(model) == before


def test_thresholds_that_are_no_list_are_refused() -> None:
    model = tp.prune(tiny_model("bert"), tp.FixedThreshold(thresholds=[0.1] * LAYERS))
    for wrong in (None, 0.5):
        with pytest.raises(tp.ConfigError, match=f"thresholds is {wrong}; it must be a list"):
            tp.set_thresholds(model, wrong)


def test_what_is_no_module_is_not_pruned_either() -> None:
    engine = tp.compile(tp.prune(tiny_model("bert"), tp.TopK()))
    for wrong, name in ((engine, "Engine"), (None, "NoneType"), ("bert", "str")):
        for call in (tp.unprune, tp.freeze_thresholds):
            with pytest.raises(tp.ConfigError, match=f"a {name} is given"):
                call(wrong)
    with pytest.raises(tp.ConfigError, match="a NoneType is given"), tp.record(None):
        pass


def test_a_decoder_is_refused() -> None:
    model = hf.BertModel(tiny_config("bert", is_decoder=True))
    with pytest.raises(tp.UnsupportedModelError, match="'bert' as a decoder"):
        tp.prune(model, tp.TopK())


def test_a_module_that_is_no_hugging_face_model_is_refused() -> None:
    with pytest.raises(tp.UnsupportedModelError, match="Linear is not a Hugging Face model; supported are albert"):
        tp.prune(nn.Linear(2, 2), tp.TopK())


def test_what_is_no_pruner_or_no_execution_is_refused() -> None:
    model = tiny_model()
    with pytest.raises(tp.ConfigError, match=r"pruner is 'topk'.*instance"):
        tp.prune(model, "topk")
    with pytest.raises(tp.ConfigError, match="execution is 'fast'; it must be one of packed, masked"):
        tp.prune(model, tp.TopK(), execution="fast")


def test_a_wrong_number_of_thresholds_leaves_the_model_alone() -> None:
    model = tiny_model()
    before = everything_attached(model)
    with pytest.raises(tp.ConfigError, match="thresholds has 3 values; the model has 4 layers"):
        tp.prune(model, tp.FixedThreshold(thresholds=[0.1, 0.2, 0.3]))
    assert everything_attached(model) == before


@torch.no_grad()
def test_forward_called_as_a_method_prunes_too() -> None:
    """As sentence-transformers calls it."""
    model, batch = tiny_model(), ragged_batch([20, 9])
    with pruned(model, pruner_of("relative", 0.4)):
        assert_equal(model.forward(**batch).logits, model(**batch).logits)
        expected = model.bert(**batch).last_hidden_state
        assert_equal(model.bert.forward(batch["input_ids"], batch["attention_mask"])[0], expected)


def test_an_error_inside_a_pass_leaves_the_next_pass_right() -> None:
    model = shared_model("bert", "sequence")
    batch = ragged_batch([20, 9])
    with pruned(model, pruner_of("relative", 0.4)), torch.no_grad(), tp.record(model) as trace:
        expected = model(**batch).logits

        def fail(*_: Any) -> None:
            raise KeyboardInterrupt

        handle = model.bert.encoder.layer[2].attention.output.register_forward_hook(fail)
        try:
            with pytest.raises(KeyboardInterrupt):
                model(**batch)
        finally:
            handle.remove()
        assert_equal(model(**batch).logits, expected)
    assert trace.attention_lengths.shape == (LAYERS, 4)


def test_any_mask_dtype_means_the_same() -> None:
    batch = ragged_batch([20, 9])
    with pruned(shared_model("bert", "sequence"), pruner_of("relative", 0.4)) as model, torch.no_grad():
        expected = model(**batch).logits
        for dtype in (torch.bool, torch.float32, torch.int32, torch.uint8):
            mask = batch["attention_mask"].to(dtype)
            assert_equal(model(input_ids=batch["input_ids"], attention_mask=mask).logits, expected)


def test_loss_of_a_pruned_model_is_the_heads_own() -> None:
    batch = ragged_batch([20, 9])
    labels = torch.tensor([2, 0])
    with pruned(shared_model("bert", "sequence"), pruner_of("relative", 0.4)) as model, torch.no_grad():
        output = model(**batch, labels=labels)
    assert output.loss.item() == pytest.approx(nn.functional.cross_entropy(output.logits, labels).item(), abs=1e-6)


@settings(max_examples=25)
@given(lengths=LENGTHS, strength=STRENGTHS, method=st.sampled_from(METHODS), seed=st.integers(0, 99))
def test_a_deep_copy_and_a_masked_twin_agree(lengths: list[int], strength: float, method: str, seed: int) -> None:
    """Two models alive at once, one packed and one masked, do not disturb one another."""
    packed = tp.prune(copy.deepcopy(shared_model("bert", "question")), pruner_of(method, strength))
    masked = tp.prune(copy.deepcopy(shared_model("bert", "question")), pruner_of(method, strength), execution="masked")
    batch = ragged_batch(lengths, seed=seed)
    with torch.no_grad(), tp.record(packed) as one, tp.record(masked) as two:
        first, second = packed(**batch), masked(**batch)
    assume(decision_margin(two, LAYERS) > 1e-6)
    assert same_survivors(one, two)
    assert_close(first.start_logits, second.start_logits)
    assert_close(first.end_logits, second.end_logits)
