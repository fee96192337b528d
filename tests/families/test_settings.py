"""Settings and inputs of single families: relative positions, windows, grouped keys, pooling, and what is refused."""

from typing import Any

import pytest
import torch

import token_pruning as tp
from tests.families.shared import (
    CASES,
    PRUNERS,
    assert_dense,
    assert_packed_equals_masked,
    batch_of,
    kept_model,
    model_of,
    run,
)
from tests.tiny import LONGEST, assert_close, ragged_batch, tiny_config, tiny_model
from token_pruning.families import family_of, shape_of

SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "albert, two layers per group": ("albert", {"inner_group_num": 2, "layers": 3}),
    "albert, groups that do not divide": ("albert", {"num_hidden_groups": 3, "layers": 5}),
    "ernie without tasks": ("ernie", {"use_task_id": False}),
    "deberta without relative attention": ("deberta", {"relative_attention": False}),
    "deberta without terms": ("deberta", {"pos_att_type": None}),
    "deberta c2p": ("deberta", {"pos_att_type": "c2p"}),
    "deberta p2c": ("deberta", {"pos_att_type": "p2c"}),
    "deberta with a term that is none": ("deberta", {"pos_att_type": "c2p|p2p"}),
    "deberta, all distances": ("deberta", {"max_relative_positions": -1}),
    "deberta, no positions": ("deberta", {"position_biased_input": False, "embedding_size": 16}),
    "deberta-v2, own projections": ("deberta-v2", {"share_att_key": False}),
    "deberta-v2 c2p": ("deberta-v2", {"share_att_key": False, "pos_att_type": "c2p"}),
    "deberta-v2 p2c": ("deberta-v2", {"share_att_key": False, "pos_att_type": "p2c"}),
    "deberta-v2 c2p, shared": ("deberta-v2", {"pos_att_type": ["c2p"]}),
    "deberta-v2 without terms": ("deberta-v2", {"pos_att_type": None}),
    "deberta-v2 with a term that is none": ("deberta-v2", {"pos_att_type": "c2p|p2p"}),
    "deberta-v2 without buckets": ("deberta-v2", {"position_buckets": -1, "max_relative_positions": 20}),
    "deberta-v2, all distances": ("deberta-v2", {"max_relative_positions": -1, "norm_rel_ebd": "none"}),
    "deberta-v2 without relative attention": ("deberta-v2", {"relative_attention": False}),
    "deberta-v2, BERT's embeddings": (
        "deberta-v2",
        {"position_biased_input": True, "embedding_size": 16, "type_vocab_size": 2},
    ),
    "gte without token types": ("gte", {"type_vocab_size": 0}),
    "modernbert, windows first": (
        "modernbert",
        {"layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]},
    ),
    "modernbert, a window of one": ("modernbert", {"local_attention": 1, "norm_bias": True}),
    "eurobert, one head of keys": ("eurobert", {"num_key_value_heads": 1, "attention_bias": True}),
    "nomic_bert, wide heads": ("nomic_bert", {"head_dim": 12}),
    "mpnet, more buckets": ("mpnet", {"relative_attention_num_buckets": 64}),
    "bert in chunks": ("bert", {"chunk_size_feed_forward": 1}),
    "roberta, padding 5": ("roberta", {"pad_token_id": 5, "max_position_embeddings": 100}),
    "electra, no projection": ("electra", {"embedding_size": 32}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_further_settings(name: str) -> None:
    family, settings = SETTINGS[name]
    for head in ("encoder", "sequence") if family in ("albert", "ernie", "deberta") else ("encoder",):
        if (family, head) in CASES:
            model, batch = model_of(family, head, **settings), batch_of(family)
            if settings.get("type_vocab_size") == 0:
                batch.pop("token_type_ids", None)
            assert_dense(model, batch)
            assert_packed_equals_masked(model, batch, PRUNERS["relative"])


@pytest.mark.parametrize("act", ["gelu_new", "silu", "relu"])
@pytest.mark.parametrize(
    "family", ["bert", "roberta", "albert", "deberta-v2", "mpnet", "gte", "eurobert", "modernbert"]
)
def test_further_activations(family: str, act: str) -> None:
    name = "hidden_activation" if family == "modernbert" else "hidden_act"
    assert_dense(model_of(family, "encoder", **{name: act}), batch_of(family))


# Positions


@pytest.mark.parametrize("family", ["deberta", "deberta-v2", "modernbert", "mpnet"])
def test_relative_positions_and_windows_are_those_of_the_columns(family: str) -> None:
    """Whatever position ids are given, and wherever the mask has holes."""
    batch = batch_of(family)
    batch["attention_mask"][0, [3, 4, 20]] = 0
    generator = torch.Generator().manual_seed(0)
    batch["position_ids"] = torch.randint(2, LONGEST[family], batch["input_ids"].shape, generator=generator)
    model = model_of(family, "encoder", position_biased_input=True)
    assert_dense(model, batch)
    assert_packed_equals_masked(model, batch, PRUNERS["relative"])
    packed, _ = run(model, PRUNERS["relative"], batch)
    tp.prune(model, PRUNERS["relative"])
    compiled = tp.compile(model, "float32")(**batch)
    mask = batch["attention_mask"].bool()
    assert_close(compiled.last_hidden_state[mask], packed.last_hidden_state[mask])


def test_without_absolute_positions_a_text_may_be_longer_than_the_table() -> None:
    for settings in ({}, {"max_relative_positions": 12}, {"position_buckets": 2}):
        assert_dense(model_of("deberta-v2", "token", **settings), ragged_batch([200, 90], family="deberta-v2"))


def test_windows_and_angles_are_of_the_original_text() -> None:
    """What is left of a text sees what it saw there: dropping what nobody attends to changes nothing."""
    model = model_of("modernbert", "encoder").double()
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
    assert [family.terms(layer).window for layer in family.layers] == [None, 8, None, 8]
    assert family.shape(model.config).windows == (None, 8, None, 8)


@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
@pytest.mark.parametrize("family", ["gte", "eurobert", "modernbert"])
def test_fixed_stretches_of_the_angles_are_the_models_own(family: str, kind: str) -> None:
    model = model_of(family, "encoder", rope_parameters=stretched(family, kind))
    assert_dense(model, ragged_batch((3, 70), family=family))


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


def test_rotary_models_take_longer_texts_than_their_configs_say() -> None:
    for family in ("modernbert", "nomic_bert", "gte", "eurobert", "jina_embeddings_v3"):
        assert shape_of(tiny_config(family)).max_positions is None
        assert_dense(kept_model(family, "encoder"), ragged_batch([100], family=family))


# Pooling


@pytest.mark.parametrize(
    ("family", "head", "pooling", "first"),
    [
        ("eurobert", "sequence", "bos", True),
        ("eurobert", "sequence", "mean", False),
        ("eurobert", "sequence", "late", False),
        ("modernbert", "sequence", "cls", True),
        ("modernbert", "sequence", "mean", False),
        ("modernbert", "multiple_choice", "cls", False),
        ("modernbert", "multiple_choice", "mean", False),
    ],
)
def test_heads_pool_as_they_are_told(family: str, head: str, pooling: str, first: bool) -> None:
    model, batch = model_of(family, head, classifier_pooling=pooling), batch_of(family, head)
    assert family_of(model.config).reads(model) == ("first" if first else "all")
    assert_dense(model, batch)
    for pruner in PRUNERS.values():
        assert_packed_equals_masked(model, batch, pruner)


# FLOPs


def test_flops_of_windows_and_grouped_keys_by_hand() -> None:
    model = tp.prune(tiny_model("modernbert", "token"), tp.Unpruned())  # hidden 32, intermediate 64
    with torch.no_grad(), tp.record(model) as trace:
        model(**ragged_batch([50], family="modernbert"))
    rest = 50 * (4 * 32 * 32 + 3 * 32 * 64)
    assert tp.count_flops(model, trace).dense == 2 * 2 * (2 * rest + 2 * 50 * 32 * (50 + 17))
    shape = shape_of(tiny_config("eurobert"))
    assert (shape.query_size, shape.key_size, shape.ffn_matrices) == (48, 24, 3)


# What is refused


@pytest.mark.parametrize(
    ("family", "settings", "said"),
    [
        ("deberta", {"talking_head": True}, "talking_head True"),
        ("deberta-v2", {"conv_kernel_size": 3}, "conv_kernel_size 3"),
        ("deberta-v2", {"position_buckets": 7}, "position_buckets 7"),
        ("deberta-v2", {"position_buckets": 80}, "position_buckets 80 for max_relative_positions 40"),
    ],
)
def test_what_cannot_be_pruned_is_refused_by_name(family: str, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(tp.UnsupportedModelError, match=said):
        tp.prune(tiny_model(family, "encoder", **settings), tp.Unpruned())


def test_a_repeated_last_layer_is_refused() -> None:
    model = tiny_model("deberta-v2", "token")
    model.deberta.z_steps = 2
    with pytest.raises(tp.UnsupportedModelError, match="z_steps 2"):
        tp.prune(model, tp.Unpruned())


def test_task_types_are_refused() -> None:
    model, batch = tiny_model("ernie", "sequence"), batch_of("ernie")
    batch["task_type_ids"] = torch.ones_like(batch["input_ids"])
    engine = tp.compile(model, dtype="float32")
    for call in (tp.prune(model, tp.Unpruned()), engine):
        with pytest.raises(tp.ConfigError, match="task_type_ids is given"):
            call(**batch)


def test_a_hook_on_the_task_embeddings_keeps_a_model_off_the_native_kernels() -> None:
    model = tiny_model("ernie", "sequence")
    model.ernie.embeddings.task_type_embeddings.register_forward_hook(lambda *_: None)
    assert "has forward hooks" in tp.compile(model, dtype="float32").explain()


@pytest.mark.parametrize("family", ["xlm-roberta-xl", "megatron-bert"])
def test_decoders_and_texts_without_positions_are_not_supported(family: str) -> None:
    with pytest.raises(tp.UnsupportedModelError, match="as a decoder"):
        family_of(tiny_config(family, is_decoder=True))
    model = kept_model(family, "encoder")
    with pytest.raises(tp.ConfigError, match=f"positions for at most {LONGEST[family]}"):
        run(model, tp.Unpruned(), ragged_batch([LONGEST[family] + 1], family=family))
