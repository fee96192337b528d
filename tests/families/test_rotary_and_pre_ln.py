"""Families with rotary positions or pre-LN layers: dense equal to transformers' own, packed equal to masked."""

import copy
import inspect
import pickle
from functools import cache
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import token_pruning as tp
from tests.tiny import (
    HEADS,
    LONGEST,
    ROTARY_AND_PRE_LN,
    assert_close,
    assert_equal,
    outputs,
    pruned,
    ragged_batch,
    same_survivors,
    tiny_config,
    tiny_model,
)
from token_pruning.families import family_of, shape_of

CLASSES = {
    **{name: auto for name, auto in HEADS.items() if name != "regression"},
    "multiple_choice": hf.AutoModelForMultipleChoice,
    "next_sentence": hf.AutoModelForNextSentencePrediction,
}
CASES = [
    (family, head)
    for family in ROTARY_AND_PRE_LN
    for head, auto in CLASSES.items()
    if type(tiny_config(family)) in auto._model_mapping
]
PRUNERS: dict[str, tp.Pruner] = {
    "relative": tp.RelativeThreshold(token_threshold=0.5),
    "topk": tp.TopK(token_keep_rate=0.3),
    "summaries": tp.FixedThreshold(final_token_threshold=1.2, scoring_mode="relative", summary_tokens="segment"),
}
LENGTHS = (2, 40, 1, 23)
LAYERS = 5


@cache
def model_of(family: str, head: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """A tiny model that tests leave as they found it; five layers, since top-k keeps all in the first three."""
    labels = 2 if head == "question" else 3
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = tiny_config(family, layers=LAYERS, num_labels=labels, **overrides)
        return CLASSES[head].from_config(config).to(dtype).eval()


def batch_of(model: Any, head: str, lengths: tuple[int, ...], seed: int = 0, **options: Any) -> dict[str, Tensor]:
    """With token types where the model takes them; for multiple choice all sequences are one example's choices."""
    batch = ragged_batch(lengths, family=model.config.model_type, seed=seed, **options)
    if "token_type_ids" in inspect.signature(model.forward).parameters:
        batch["token_type_ids"] = batch["input_ids"] % 2
    return {name: value[None] for name, value in batch.items()} if head == "multiple_choice" else batch


def run(
    model: Any, batch: dict[str, Tensor], pruner: tp.Pruner, execution: str = "packed"
) -> tuple[dict[str, Tensor], tp.Trace]:
    with pruned(model, pruner, execution), torch.no_grad(), tp.record(model) as trace:
        return outputs(model(**batch)), trace


def valid(values: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """What belongs to valid tokens where there is something of every token, else all."""
    mask = batch["attention_mask"].bool()
    return values[mask] if values.shape[: mask.dim()] == mask.shape and mask.dim() == 2 else values


def assert_same(
    actual: dict[str, Tensor], expected: dict[str, Tensor], batch: dict[str, Tensor], relative: float, other: Any = None
) -> None:
    """Every output at valid tokens; ``other`` is the batch of ``actual`` where that is another one."""
    assert actual.keys() == expected.keys()
    for name, values in expected.items():
        reference = valid(values, batch)
        assert_close(valid(actual[name], other or batch), reference, relative * reference.abs().max().item(), name)


# Nothing dropped


@pytest.mark.parametrize("execution", ["packed", "masked"])
@pytest.mark.parametrize(("family", "head"), CASES)
def test_without_drops_it_computes_what_transformers_does(family: str, head: str, execution: str) -> None:
    model = model_of(family, head)
    batch = batch_of(model, head, (1, 2, 40, LONGEST[family], 17))
    with torch.no_grad():
        expected = outputs(model(**batch))
    for pruner in (tp.Unpruned(), tp.FixedThreshold(thresholds=[0.0] * LAYERS)):
        assert_same(run(model, batch, pruner, execution)[0], expected, batch, 2e-5)


@pytest.mark.parametrize(("family", "head"), CASES)
def test_in_double_precision_it_is_the_very_same_function(family: str, head: str) -> None:
    """These models' wide weights amplify rounding; nothing but rounding is what is left of a difference."""
    model = model_of(family, head, torch.float64)
    batch = batch_of(model, head, (1, 2, 40, LONGEST[family], 17))
    with torch.no_grad():
        expected = outputs(model(**batch))
    assert_same(run(model, batch, tp.Unpruned())[0], expected, batch, 1e-12)


@pytest.mark.parametrize("family", ROTARY_AND_PRE_LN)
def test_hidden_states_and_attentions_are_those_of_transformers(family: str) -> None:
    model = model_of(family, "encoder", attn_implementation="eager")
    batch = batch_of(model, "encoder", (5, 60))
    asked: Any = {**batch, "output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        expected = model(**asked)
        with pruned(model, tp.Unpruned(), "masked"):
            actual = model(**asked)
    assert len(actual.hidden_states) == len(expected.hidden_states) == LAYERS + 1
    for ours, theirs in zip(actual.hidden_states, expected.hidden_states, strict=True):
        assert_close(valid(ours, batch), valid(theirs, batch), 2e-5 * theirs.abs().max().item())
    for ours, theirs in zip(actual.attentions, expected.attentions, strict=True):
        assert_close(ours[1], theirs[1], 2e-5)


@pytest.mark.parametrize("family", ROTARY_AND_PRE_LN)
def test_embeddings_and_positions_may_be_given(family: str) -> None:
    model = model_of(family, "encoder")
    batch = batch_of(model, "encoder", (30, 60))
    batch.pop("token_type_ids", None)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    positions = torch.arange(60).expand(2, 60) * 7 % 50 + 3
    given: Any = {"inputs_embeds": embeds, "attention_mask": batch["attention_mask"]}
    if family != "modernbert":  # whose windows are by column there
        given["position_ids"] = positions
    with torch.no_grad():
        expected = outputs(model(**given))
    assert_same(run(model, given, tp.Unpruned())[0], expected, batch, 2e-5)


@pytest.mark.parametrize(("family", "head"), CASES)
def test_left_padding_changes_nothing(family: str, head: str) -> None:
    model = model_of(family, head)
    right, left = (batch_of(model, head, LENGTHS, width=45, left=side) for side in (False, True))
    for pruner in (tp.Unpruned(), PRUNERS["topk"]):
        expected, first = run(model, right, pruner)
        actual, second = run(model, left, pruner)
        assert same_survivors(first, second)
        assert_same(actual, expected, right, 1e-4, left)


# Real drops


@pytest.mark.parametrize("method", PRUNERS)
@pytest.mark.parametrize(("family", "head"), CASES)
def test_packed_equals_masked(family: str, head: str, method: str) -> None:
    model = model_of(family, head)
    batch = batch_of(model, head, (1, LONGEST[family], 2, 33))
    packed, trace = run(model, batch, PRUNERS[method])
    masked, reference = run(model, batch, PRUNERS[method], "masked")
    assert same_survivors(trace, reference)
    assert trace.attention_lengths[-1].sum() < 0.8 * trace.attention_lengths[0].sum()
    assert_same(packed, masked, batch, 1e-4)


@pytest.mark.parametrize("method", PRUNERS)
@pytest.mark.parametrize("family", ROTARY_AND_PRE_LN)
def test_a_sequence_alone_equals_itself_in_a_batch(family: str, method: str) -> None:
    model = model_of(family, "token")
    batch = batch_of(model, "token", LENGTHS)
    together, trace = run(model, batch, PRUNERS[method])
    for row, length in enumerate(LENGTHS):
        alone, own = run(model, {name: value[row : row + 1, :length] for name, value in batch.items()}, PRUNERS[method])
        assert own.survived_layers[0].tolist() == trace.survived_layers[row].tolist()
        expected = together["logits"][row, :length]
        assert_close(alone["logits"][0], expected, 1e-4 * expected.abs().max().item())


def test_windows_and_angles_are_of_the_original_text() -> None:
    """What is left of a text sees what it saw there: dropping what nobody attends to changes nothing."""
    model = model_of("modernbert", "encoder", torch.float64)
    family = family_of(model.config)(model)
    rows, positions = torch.randn(60, 32, dtype=torch.float64), torch.arange(60)
    stay = torch.tensor([0, 3, 4, 11, 30, 38, 39, 59])
    for layer in family.layers:
        query, key, _ = family.project(layer, rows, positions, None)
        some_query, some_key, _ = family.project(layer, rows[stay], positions[stay], None)
        assert_close(some_query, query[stay], 1e-12)
        assert_close(some_key, key[stay], 1e-12)
        asking = torch.tensor([0, 5])
        narrow_query, narrow_key, _ = family.project(layer, rows[stay], positions[stay], asking)
        assert_close(narrow_query, some_query[asking], 1e-12)
        assert_close(narrow_key, some_key, 1e-12)
    assert [family.terms(layer).window for layer in family.layers] == [None, 8, None, 8, None]
    assert family.shape(model.config).windows == (None, 8, None, 8, None)


# Training


@pytest.mark.parametrize("method", ["relative", "summaries", "soft"])
@pytest.mark.parametrize("family", ROTARY_AND_PRE_LN)
def test_packed_gradients_equal_masked_ones(family: str, method: str) -> None:
    still = {name: 0.0 for name in tiny_config(family).to_dict() if "dropout" in name}
    gradients = []
    for execution in ("packed", "masked"):
        model = tiny_model(family, "sequence", **still).train()
        soft = tp.LearnedThreshold(final_token_threshold=0.05, temperature=0.01, max_seq_length=40)
        tp.prune(model, soft if method == "soft" else PRUNERS[method], execution=execution)
        batch = batch_of(model, "sequence", (30, 7, 40))
        with tp.record(model) as trace:
            loss = model(**batch, labels=torch.tensor([0, 1, 2])).loss
        loss.backward()
        assert method == "soft" or trace.attention_lengths[-1].sum() < trace.attention_lengths[0].sum()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    packed, masked = gradients
    assert packed.keys() == masked.keys()
    assert method != "soft" or masked["token_pruner.thresholds"][:2].abs().min() > 0
    largest = max(gradient.abs().max().item() for gradient in masked.values())
    for name, gradient in masked.items():  # some are zero but for rounding, such as those of keys' biases
        assert_close(packed[name], gradient, 1e-4 * max(gradient.abs().max().item(), 1e-2 * largest), name)


@pytest.mark.parametrize("family", ROTARY_AND_PRE_LN)
def test_dropout_is_the_layers_own(family: str) -> None:
    config = tiny_config(family)
    name = "attention_dropout" if hasattr(config, "attention_dropout") else "attention_probs_dropout_prob"
    model = tiny_model(family, "encoder", **{name: 0.25})
    bound = family_of(model.config)(model)
    assert {bound.dropout(layer) for layer in bound.layers} == {0.25}


@pytest.mark.parametrize("family", ROTARY_AND_PRE_LN)
def test_gradient_checkpointing_changes_no_gradient(family: str) -> None:
    still = {name: 0.0 for name in tiny_config(family).to_dict() if "dropout" in name}
    gradients = []
    for checkpointing in (False, True):
        model = tp.prune(tiny_model(family, "token", **still), PRUNERS["relative"]).train()
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        model(**batch_of(model, "token", (30, 7))).logits.square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert_equal(*gradients)


# Which states are read


@pytest.mark.parametrize(("family", "head"), CASES)
def test_which_heads_read_first_tokens_only(family: str, head: str) -> None:
    model = model_of(family, head)
    reads = family_of(model.config).reads(model)
    one_vector = head in ("sequence", "next_sentence") or (head == "multiple_choice" and family != "modernbert")
    assert reads == ("first" if one_vector and family != "eurobert" else "all")
    batch = batch_of(model, head, LENGTHS)
    with pruned(model, tp.Unpruned()), torch.no_grad(), tp.record(model) as trace:
        model(**batch)
        assert trace.passes[0].first_only == (reads == "first")


@pytest.mark.parametrize("pooling", ["bos", "mean", "late"])
def test_eurobert_pools_as_it_is_told(pooling: str) -> None:
    check_pooling(tiny_model("eurobert", "sequence", classifier_pooling=pooling), "sequence", pooling == "bos")


@pytest.mark.parametrize("head", ["sequence", "multiple_choice"])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_modernbert_pools_as_it_is_told(pooling: str, head: str) -> None:
    model = model_of("modernbert", head, classifier_pooling=pooling)
    check_pooling(model, head, pooling == "cls" and head == "sequence")


def check_pooling(model: Any, head: str, first: bool) -> None:
    assert family_of(model.config).reads(model) == ("first" if first else "all")
    batch = batch_of(model, head, (1, 40, 2))
    with torch.no_grad():
        expected = outputs(model(**batch))
    assert_same(run(model, batch, tp.Unpruned())[0], expected, batch, 2e-5)
    for method in PRUNERS.values():
        packed, trace = run(model, batch, method)
        masked, reference = run(model, batch, method, "masked")
        assert same_survivors(trace, reference)
        assert_same(packed, masked, batch, 1e-4)


# FLOPs


def bare_encoder(family: str) -> Any:
    """No pooler; a window as wide as the text, since plain packed attention computes what a window hides, too."""
    wide = {"local_attention": 2 * LONGEST[family]} if family == "modernbert" else {}
    model = tiny_model(family, "encoder", attn_implementation="eager", **wide)
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    return model


@pytest.mark.parametrize("method", ["relative", "topk"])
@pytest.mark.parametrize("family", ROTARY_AND_PRE_LN)
def test_flops_equal_the_matrix_products_computed(family: str, method: str) -> None:
    model = bare_encoder(family)
    batch = ragged_batch([37], family=family)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**batch)
    dense = counter.get_total_flops()
    tp.prune(model, PRUNERS[method])
    with FlopCounterMode(display=False) as counter, tp.record(model) as trace:
        model(**batch)  # with gradients on: fused attention is no matrix product to the counter
    flops = tp.count_flops(model, trace)
    assert flops.dense == dense
    assert flops.pruned == counter.get_total_flops()
    assert flops.pruned < 0.95 * flops.dense


def test_flops_of_windows_and_grouped_keys_by_hand() -> None:
    model = tp.prune(tiny_model("modernbert", "token"), tp.Unpruned())  # hidden 32, intermediate 64
    with torch.no_grad(), tp.record(model) as trace:
        model(**ragged_batch([50], family="modernbert"))
    rest = 50 * (4 * 32 * 32 + 3 * 32 * 64)
    assert tp.count_flops(model, trace).dense == 2 * 2 * (2 * rest + 2 * 50 * 32 * (50 + 17))
    shape = shape_of(tiny_config("eurobert"))
    assert (shape.query_size, shape.key_size, shape.ffn_matrices) == (48, 24, 3)


# What is left behind, and what is not supported


@pytest.mark.parametrize("family", ROTARY_AND_PRE_LN)
def test_unprune_leaves_nothing_behind(family: str) -> None:
    model = tiny_model(family, "sequence")
    batch = batch_of(model, "sequence", (30, 7))
    with torch.no_grad():
        expected = outputs(model(**batch))
    before = (list(model.state_dict()), model.config.to_dict(), [sorted(vars(m)) for m in model.modules()])
    tp.prune(model, PRUNERS["topk"])
    run_copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    with torch.no_grad():
        logits = model(**batch).logits
        for twin in run_copies:
            assert_equal(twin(**batch).logits, logits)
    tp.unprune(model)
    assert (list(model.state_dict()), model.config.to_dict(), [sorted(vars(m)) for m in model.modules()]) == before
    with torch.no_grad():
        for name, value in outputs(model(**batch)).items():
            assert_equal(value, expected[name], message=name)


@pytest.mark.parametrize("family", ROTARY_AND_PRE_LN)
def test_an_engine_computes_the_same(family: str) -> None:
    for head in ("sequence", "token"):
        model = model_of(family, head)
        batch = batch_of(model, head, LENGTHS)
        expected, _ = run(model, batch, PRUNERS["relative"])
        with pruned(model, PRUNERS["relative"]):
            engine = tp.compile(model, dtype="float32")
        with torch.no_grad():
            assert_same(outputs(engine(**batch)), expected, batch, 1e-4)


@pytest.mark.parametrize("family", ROTARY_AND_PRE_LN)
def test_half_precision_keeps_to_its_dtype(family: str) -> None:
    model = model_of(family, "encoder", torch.bfloat16)
    batch = batch_of(model, "encoder", LENGTHS)
    with torch.no_grad():
        expected = valid(model(**batch).last_hidden_state, batch)
    bfloat, _ = run(model, batch, tp.Unpruned())
    assert bfloat["last_hidden_state"].dtype == torch.bfloat16
    single = model_of(family, "encoder")
    with torch.autocast("cpu", torch.bfloat16):
        mixed, _ = run(single, batch, tp.Unpruned())
    for actual in (bfloat, mixed):
        difference = (valid(actual["last_hidden_state"], batch).float() - expected.float()).norm()
        assert difference < 0.25 * expected.float().norm()


def test_gte_may_have_no_token_types() -> None:
    model = tiny_model("gte", "encoder", type_vocab_size=0)
    batch = ragged_batch((3, 30), family="gte")
    with torch.no_grad():
        expected = outputs(model(**batch))
    assert_same(run(model, batch, tp.Unpruned())[0], expected, batch, 2e-5)


@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
@pytest.mark.parametrize("family", ["gte", "eurobert", "modernbert"])
def test_fixed_stretches_of_the_angles_are_the_models_own(family: str, kind: str) -> None:
    model = tiny_model(family, "encoder", rope_parameters=stretched(family, kind))
    batch = ragged_batch((3, 70), family=family)
    with torch.no_grad():
        expected = outputs(model(**batch))
    assert_same(run(model, batch, tp.Unpruned())[0], expected, batch, 2e-5)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
@pytest.mark.parametrize("family", ["gte", "eurobert", "modernbert"])
def test_angles_that_depend_on_the_batch_are_not_supported(family: str, kind: str) -> None:
    with pytest.raises(tp.UnsupportedModelError, match=f"with rope_type '{kind}' cannot be pruned"):
        family_of(tiny_config(family, rope_parameters=stretched(family, kind)))


def stretched(family: str, kind: str) -> dict[str, Any]:
    parameters: dict[str, Any] = {
        "rope_type": kind,
        "rope_theta": 10000.0,
        "factor": 2.0,
        "original_max_position_embeddings": 40,
    }
    if kind == "llama3":
        parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if kind == "longrope":
        size = tiny_config(family).hidden_size // 8
        parameters |= {"short_factor": [1.0] * size, "long_factor": [2.0] * size}
    if family != "modernbert":
        return parameters
    return {"full_attention": parameters, "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}


@pytest.mark.parametrize("family", ["xlm-roberta-xl", "megatron-bert"])
def test_decoders_and_texts_without_positions_are_not_supported(family: str) -> None:
    with pytest.raises(tp.UnsupportedModelError, match="as a decoder"):
        family_of(tiny_config(family, is_decoder=True))
    model = model_of(family, "encoder")
    with pytest.raises(tp.ConfigError, match=f"positions for at most {LONGEST[family]}"):
        run(model, ragged_batch([LONGEST[family] + 1], family=family), tp.Unpruned())


def test_rotary_models_take_longer_texts_than_their_configs_say() -> None:
    for family in ("modernbert", "nomic_bert", "gte", "eurobert", "jina_embeddings_v3"):
        assert shape_of(tiny_config(family)).max_positions is None
        model = model_of(family, "encoder")
        batch = ragged_batch([100], family=family)
        with torch.no_grad():
            expected = outputs(model(**batch))
        assert_same(run(model, batch, tp.Unpruned())[0], expected, batch, 1e-4)
