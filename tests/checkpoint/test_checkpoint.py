"""Saving and loading: what comes back, what may be written by hand, foreign checkpoints, and bad ones."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor

import token_pruning as tp
from tests.tiny import HEADS, assert_close, assert_equal, ragged_batch, same_survivors, tiny_config, tiny_model
from token_pruning.checkpoint.ibert import as_roberta_weights
from token_pruning.runtime.prune import freeze_thresholds

LAYERS = 4
METHODS: dict[str, tp.Pruner] = {
    "learned": tp.LearnedThreshold(thresholds=[0.02, 0.03, 0.05, 0.0612345678], max_seq_length=16, temperature=0.01),
    "linear": tp.FixedThreshold(final_token_threshold=0.06, max_seq_length=16),
    "fixed": tp.FixedThreshold(thresholds=[0.02, 0.03, 0.05, 0.0612345678], scoring_mode="mean_norm"),
    "topk": tp.TopK(token_keep_rate=-0.2),
    "relative": tp.RelativeThreshold(token_threshold=0.3),
    "rising": tp.RisingThreshold(final_token_threshold=0.5),
}


def logits_of(model: Any, family: str = "bert") -> tuple[Tensor, tp.Trace]:
    batch = ragged_batch([30, 1, 17, 2], family=family)
    with torch.no_grad(), tp.record(model) as trace:
        return model(**batch).logits, trace


def dense_logits(model: Any, family: str = "bert") -> Tensor:
    with torch.no_grad():
        return model(**ragged_batch([30, 1, 17, 2], family=family)).logits


def read(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((path / "config.json").read_text())
    return config


def edit(path: Path, **keys: Any) -> Path:
    """Change keys of config.json as a user would; None removes one."""
    config = {key: value for key, value in {**read(path), **keys}.items() if value is not None}
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A dense checkpoint as anyone has one."""
    tiny_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# Round trips


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_a_saved_model_comes_back_as_it_was(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tp.prune(tiny_model().to(dtype), METHODS[method])
    expected, expected_trace = logits_of(model)
    model.save_pretrained(tmp_path)
    for arguments in ({}, {"dtype": dtype}):
        loaded = tp.from_pretrained(tmp_path, **arguments)
        assert type(loaded) is type(model)
        assert loaded.dtype == dtype
        assert not loaded.training
        logits, trace = logits_of(loaded)
        assert_equal(logits, expected)
        assert same_survivors(trace, expected_trace)
        assert type(loaded.token_pruner.pruner) is type(METHODS[method])
        thresholds = model.token_pruner.thresholds
        if thresholds is not None:
            assert loaded.token_pruner.thresholds.dtype == torch.float32
            assert torch.equal(loaded.token_pruner.thresholds, thresholds)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", ["roberta", "electra", "distilbert"])
def test_every_head_comes_back(family: str, head: str, tmp_path: Path) -> None:
    model = tp.prune(tiny_model(family, head), METHODS["learned"])
    model.save_pretrained(tmp_path)
    loaded = tp.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    batch = ragged_batch([9, 20], family=family)
    with torch.no_grad():
        assert_equal(loaded(**batch)[0], model(**batch)[0])


@pytest.mark.parametrize("method", METHODS)
def test_a_second_round_trip_changes_nothing(method: str, tmp_path: Path) -> None:
    tp.prune(tiny_model(), METHODS[method]).save_pretrained(tmp_path / "one")
    tp.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    assert read(tmp_path / "one") == read(tmp_path / "two")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_trained_thresholds_are_saved_and_not_the_initial_ones(tmp_path: Path) -> None:
    model = tp.prune(tiny_model(), METHODS["learned"])
    trained = [0.011, 0.022, -0.033, 0.044]
    with torch.no_grad():
        model.token_pruner.thresholds.copy_(torch.tensor(trained))
    model.save_pretrained(tmp_path)
    loaded = tp.from_pretrained(tmp_path)
    assert loaded.token_pruner.thresholds.tolist() == pytest.approx(trained, abs=1e-9)
    assert isinstance(loaded.token_pruner.pruner, tp.LearnedThreshold)
    assert loaded.token_pruner.pruner.temperature == 0.01
    assert load_file(tmp_path / "model.safetensors")["token_pruner.thresholds"].dtype == torch.float32


def test_config_json_holds_the_methods_keys_and_nothing_internal(tmp_path: Path) -> None:
    expected: dict[str, dict[str, Any]] = {
        "learned": {"prune_mode": "absolute_threshold", "masking_mode": "soft", "threshold_temperature": 0.01},
        "linear": {"prune_mode": "absolute_threshold", "masking_mode": "hard", "final_token_threshold": 0.06},
        "fixed": {"prune_mode": "absolute_threshold", "scoring_mode": "mean_norm"},
        "topk": {"prune_mode": "topk", "token_keep_rate": -0.2, "max_seq_length": 128},
        "relative": {"prune_mode": "threshold", "token_threshold": 0.3, "scoring_mode": "mean"},
        "rising": {"prune_mode": "rising_threshold", "final_token_threshold": 0.5},
    }
    for method, keys in expected.items():
        tp.prune(tiny_model(), METHODS[method]).save_pretrained(tmp_path / method)
        config = read(tmp_path / method)
        assert {key: config.get(key) for key in keys} == keys
        assert "token_pruning" not in (tmp_path / method / "config.json").read_text()


def test_a_directory_after_unprune_is_dense_again(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "before")
    model = tp.unprune(tp.prune(tiny_model(), METHODS["learned"]))
    model.save_pretrained(tmp_path / "after")
    assert read(tmp_path / "before") == read(tmp_path / "after")
    assert "token_pruner.thresholds" not in load_file(tmp_path / "after" / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_transformers_alone_loads_the_dense_model(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model().to(dtype)
    expected = dense_logits(model)
    tp.prune(model, METHODS[method]).save_pretrained(tmp_path)
    loaded = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert_equal(dense_logits(loaded), expected)
    assert loaded.config._attn_implementation == "sdpa"
    assert not hasattr(loaded, "token_pruner")


def test_a_pruner_can_be_given_in_place_of_the_saved_one(tmp_path: Path) -> None:
    tp.prune(tiny_model(), METHODS["learned"]).save_pretrained(tmp_path)
    loaded = tp.from_pretrained(tmp_path, tp.TopK(token_keep_rate=0.5), execution="masked")
    logits, trace = logits_of(loaded)
    expected, expected_trace = logits_of(tp.prune(tiny_model(), tp.TopK(token_keep_rate=0.5)))
    assert_close(logits, expected)
    assert same_survivors(trace, expected_trace)
    assert loaded.config.prune_mode == "topk"


def test_sharded_checkpoints_load(tmp_path: Path) -> None:
    model = tp.prune(tiny_model(), METHODS["learned"])
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_equal(logits_of(tp.from_pretrained(tmp_path))[0], logits_of(model)[0])


def test_arguments_go_on_to_transformers(tmp_path: Path) -> None:
    tiny_model("bert", "masked_lm").save_pretrained(tmp_path)
    edit(tmp_path, prune_mode="topk", token_keep_rate=0.5)
    for model_class in (hf.BertForTokenClassification, hf.AutoModelForTokenClassification):
        model = tp.from_pretrained(tmp_path, model_class=model_class, num_labels=7, dtype=torch.float16)
        assert type(model) is hf.BertForTokenClassification
        assert model.config.num_labels == 7
        assert model.dtype == torch.float16
    assert type(tp.from_pretrained(str(tmp_path), model_class=hf.BertModel)) is hf.BertModel
    assert type(tp.from_pretrained(str(tmp_path))) is hf.BertForMaskedLM


def test_loading_leaves_the_log_level_alone(plain: Path) -> None:
    level = hf.logging.get_verbosity()
    tp.from_pretrained(plain, tp.TopK())
    assert hf.logging.get_verbosity() == level
    with pytest.raises(tp.TokenPruningError):
        tp.from_pretrained(edit(plain, hidden_size=64), tp.TopK())
    assert hf.logging.get_verbosity() == level


def test_a_hub_name_is_found_in_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tp.prune(tiny_model(), METHODS["learned"])
    cached = tmp_path / "models--someone--a.model-1"
    model.save_pretrained(cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert_equal(logits_of(tp.from_pretrained("someone/a.model-1"))[0], logits_of(model)[0])


def test_thresholds_loaded_into_a_frozen_model_are_saved(tmp_path: Path) -> None:
    model = tp.prune(tiny_model(), METHODS["learned"])
    freeze_thresholds(model)
    loaded_later = torch.tensor([0.01, 0.02, 0.03, 0.04])  # as the best checkpoint of a mixed run's soft half
    model.load_state_dict(model.state_dict() | {"token_pruner.thresholds": loaded_later})
    freeze_thresholds(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(tp.from_pretrained(tmp_path).token_pruner.thresholds, loaded_later)


def test_frozen_thresholds_are_saved_as_fixed_ones(tmp_path: Path) -> None:
    model = tp.prune(tiny_model(), METHODS["learned"])
    with torch.no_grad():
        model.token_pruner.thresholds.copy_(torch.tensor([0.01, 0.0212345678, 0.03, 0.05]))
    expected, expected_trace = logits_of(model)
    freeze_thresholds(model)
    freeze_thresholds(model)  # nothing more to freeze
    assert type(model.token_pruner.pruner) is tp.FixedThreshold
    assert not model.token_pruner.thresholds.requires_grad
    model.save_pretrained(tmp_path)
    loaded = tp.from_pretrained(tmp_path)
    assert type(loaded.token_pruner.pruner) is tp.FixedThreshold
    assert torch.equal(loaded.token_pruner.thresholds, model.token_pruner.thresholds)
    for frozen in (model, loaded):
        logits, trace = logits_of(frozen)
        assert_equal(logits, expected)
        assert same_survivors(trace, expected_trace)
        frozen.train()  # the hard stage removes in training, too
        with tp.record(frozen) as trace:
            frozen(**ragged_batch([30, 17]))
        assert trace.ffn_lengths[-1].sum() < 47
    config = read(tmp_path)
    assert config["masking_mode"] == "hard"
    assert config["thresholds"] == model.token_pruner.thresholds.tolist()


def test_a_model_that_is_only_packed_is_saved_as_the_dense_model_it_is(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "dense")
    model = tp.prune(tiny_model(), tp.Unpruned())
    model.save_pretrained(tmp_path / "packed")
    assert read(tmp_path / "packed") == read(tmp_path / "dense")
    assert_close(logits_of(tp.from_pretrained(tmp_path / "dense", tp.Unpruned()))[0], dense_logits(tiny_model()), 1e-5)


# Keys written by hand


@pytest.mark.parametrize(
    ("keys", "pruner"),
    [
        (
            {"prune_mode": "absolute_threshold", "final_token_threshold": 0.01},
            tp.FixedThreshold(final_token_threshold=0.01),
        ),
        (
            {"prune_mode": "absolute_threshold", "final_token_threshold": 0.1, "scoring_mode": "mean_norm"},
            tp.FixedThreshold(final_token_threshold=0.1, scoring_mode="mean_norm"),
        ),
        (
            {"prune_mode": "absolute_threshold", "thresholds": [0.0, 0.01, 0.02, 0.03], "max_seq_length": 16},
            tp.FixedThreshold(thresholds=[0.0, 0.01, 0.02, 0.03], max_seq_length=16),
        ),
        (
            {"prune_mode": "absolute_threshold", "final_token_threshold": 0.01, "masking_mode": "soft"},
            tp.LearnedThreshold(final_token_threshold=0.01),
        ),
        (
            {"prune_mode": "absolute_threshold", "final_token_threshold": 0.01, "masking_mode": "hard"},
            tp.FixedThreshold(final_token_threshold=0.01),
        ),
        ({"prune_mode": "topk", "token_keep_rate": 0.3}, tp.TopK(token_keep_rate=0.3)),
        ({"prune_mode": "topk", "token_keep_rate": -1}, tp.TopK(token_keep_rate=-1)),
        ({"prune_mode": "threshold", "token_threshold": 0.2}, tp.RelativeThreshold(token_threshold=0.2)),
        (
            {"prune_mode": "rising_threshold", "final_token_threshold": 0.4},
            tp.RisingThreshold(final_token_threshold=0.4),
        ),
    ],
)
def test_keys_written_by_hand_into_a_plain_checkpoint(keys: dict[str, Any], pruner: tp.Pruner, plain: Path) -> None:
    loaded = tp.from_pretrained(edit(plain, **keys))
    assert loaded.token_pruner.pruner == pruner
    logits, trace = logits_of(loaded)
    expected, expected_trace = logits_of(tp.prune(tiny_model(), pruner))
    assert_equal(logits, expected)
    assert same_survivors(trace, expected_trace)


def test_an_edit_of_final_token_threshold_takes_effect(tmp_path: Path) -> None:
    tp.prune(tiny_model(), METHODS["linear"]).save_pretrained(tmp_path)
    loaded = tp.from_pretrained(edit(tmp_path, final_token_threshold=0.02))
    assert loaded.token_pruner.thresholds.tolist() == pytest.approx([0.005, 0.01, 0.015, 0.02])
    for edited, method in ((0.02, "linear"), (0.9, "rising")):
        tp.prune(tiny_model(), METHODS[method]).save_pretrained(tmp_path / method)
        pruner = tp.from_pretrained(edit(tmp_path / method, final_token_threshold=edited)).token_pruner.pruner
        assert pruner.final_token_threshold == edited


def test_prune_mode_edited_on_a_learned_checkpoint(tmp_path: Path) -> None:
    tp.prune(tiny_model(), METHODS["learned"]).save_pretrained(tmp_path)
    loaded = tp.from_pretrained(edit(tmp_path, prune_mode="topk", token_keep_rate=0.5))
    assert isinstance(loaded.token_pruner.pruner, tp.TopK)
    assert logits_of(loaded)[1].ffn_lengths.tolist() == [[30, 1, 17, 2]] * 3 + [[15, 1, 8, 1]]
    loaded = tp.from_pretrained(edit(tmp_path, prune_mode="rising_threshold", final_token_threshold=0.3))
    assert isinstance(loaded.token_pruner.pruner, tp.RisingThreshold)


def test_learned_thresholds_can_be_frozen_by_editing_masking_mode(tmp_path: Path) -> None:
    tp.prune(tiny_model(), METHODS["learned"]).save_pretrained(tmp_path)
    pruner = tp.from_pretrained(edit(tmp_path, masking_mode="hard")).token_pruner.pruner
    assert type(pruner) is tp.FixedThreshold
    assert list(pruner.thresholds) == pytest.approx([0.02, 0.03, 0.05, 0.0612345678])


def test_thresholds_listed_by_hand_win_over_learned_ones(tmp_path: Path) -> None:
    tp.prune(tiny_model(), METHODS["learned"]).save_pretrained(tmp_path)
    loaded = tp.from_pretrained(edit(tmp_path, thresholds=[0.1, 0.2, 0.3, 0.4]))
    assert loaded.token_pruner.thresholds.tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_a_null_in_config_json_means_absent(tmp_path: Path) -> None:
    tp.prune(tiny_model(), METHODS["learned"]).save_pretrained(tmp_path)
    config = {**read(tmp_path), "thresholds": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = tp.from_pretrained(tmp_path)
    assert loaded.token_pruner.thresholds.tolist() == pytest.approx([0.02, 0.03, 0.05, 0.0612345678])


# I-BERT and LTP


def save_ibert(path: Path, *, model_type: str = "ibert", head: str = "SequenceClassification", **keys: Any) -> Any:
    """A tiny float-mode I-BERT written by transformers' own class, the quantiser's buffers filled with numbers."""
    sizes = {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 64}
    config = hf.IBertConfig(vocab_size=200, max_position_embeddings=80, initializer_range=0.3, num_labels=3, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(hf, f"IBertFor{head}")(config).eval()
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.uniform_(-9, 9)
    model.save_pretrained(path)
    if model_type != "ibert":
        weights = load_file(path / "model.safetensors")
        renamed = {re.sub(r"^ibert\.", f"{model_type}.", name): tensor for name, tensor in weights.items()}
        save_file(renamed, path / "model.safetensors", {"format": "pt"})
        name = {"ltp": "LTP", "pibert": "PIBert"}[model_type]
        keys["architectures"] = [f"{name}For{head}"]
    edit(path, model_type=model_type, **keys)
    return model


ZERO = {"prune_mode": "absolute_threshold", "final_token_threshold": 0.0}


@pytest.mark.parametrize("model_type", ["ibert", "ltp", "pibert"])
def test_float_mode_ibert_loads_as_roberta_with_the_same_logits(model_type: str, tmp_path: Path) -> None:
    model = save_ibert(tmp_path, model_type=model_type, **ZERO)
    loaded = tp.from_pretrained(tmp_path)
    assert type(loaded) is hf.RobertaForSequenceClassification
    assert_close(logits_of(loaded, "roberta")[0], dense_logits(model, "roberta"))
    assert loaded.config.num_labels == 3


@pytest.mark.parametrize("head", ["TokenClassification", "MaskedLM"])
def test_other_heads_of_ibert_load(head: str, tmp_path: Path) -> None:
    model = save_ibert(tmp_path, head=head, **ZERO)
    loaded = tp.from_pretrained(tmp_path)
    assert type(loaded) is getattr(hf, f"RobertaFor{head}")
    mask = ragged_batch([30, 1, 17, 2])["attention_mask"].bool()
    assert_close(logits_of(loaded, "roberta")[0][mask], dense_logits(model, "roberta")[mask])


def test_an_auto_class_builds_from_an_ibert_checkpoint(tmp_path: Path) -> None:
    save_ibert(tmp_path)
    model = tp.from_pretrained(tmp_path, tp.Unpruned(), model_class=hf.AutoModelForTokenClassification, num_labels=5)
    assert isinstance(model, hf.RobertaForTokenClassification)
    assert model.classifier.out_features == 5


def test_a_new_head_on_an_ibert_checkpoint(tmp_path: Path) -> None:
    save_ibert(tmp_path, head="MaskedLM", **ZERO)
    model = tp.from_pretrained(tmp_path, model_class=hf.RobertaForSequenceClassification, num_labels=5)
    assert type(model) is hf.RobertaForSequenceClassification
    assert logits_of(model, "roberta")[0].shape == (4, 5)


def test_a_converted_ibert_can_be_saved_and_loaded_as_roberta(tmp_path: Path) -> None:
    save_ibert(tmp_path / "ibert", **{**ZERO, "final_token_threshold": 0.3})
    model = tp.from_pretrained(tmp_path / "ibert")
    model.save_pretrained(tmp_path / "saved")
    config = read(tmp_path / "saved")
    assert config["model_type"] == "roberta" and config["architectures"] == ["RobertaForSequenceClassification"]
    assert not {"quant_mode", "force_dequant"} & set(config)
    loaded = tp.from_pretrained(tmp_path / "saved")
    assert_equal(logits_of(loaded, "roberta")[0], logits_of(model, "roberta")[0])
    hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")


def test_every_weight_of_ibert_is_converted_and_every_buffer_left_out(tmp_path: Path) -> None:
    model = save_ibert(tmp_path, **ZERO)
    roberta = hf.RobertaForSequenceClassification(tiny_config("roberta", type_vocab_size=2))
    weights = load_file(tmp_path / "model.safetensors")
    weights["ibert.embeddings.position_ids"] = torch.arange(80)[None]  # older versions saved it
    converted = as_roberta_weights(weights, tmp_path)
    assert converted.keys() == roberta.state_dict().keys()
    parameters = {name.replace("ibert.", "roberta."): p for name, p in model.named_parameters()}
    assert all(torch.equal(parameters[name], tensor) for name, tensor in converted.items())


def test_thresholds_of_the_published_code_are_offsets_from_its_linear_rule(tmp_path: Path) -> None:
    save_ibert(tmp_path, model_type="ltp", prune_mode="absolute_threshold", final_token_threshold=0.04)
    weights = load_file(tmp_path / "model.safetensors")
    offsets = [0.005, -0.001, 0.0, 0.002]
    for layer, offset in enumerate(offsets):
        weights[f"ltp.encoder.layer.{layer}.attention.self.pruner.keep_threshold"] = torch.tensor([offset])
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    # It counts layers from 0: 0.04 · l / 4 plus the offset.
    expected = [0.005, 0.009, 0.02, 0.032]
    model = tp.from_pretrained(tmp_path)
    assert model.token_pruner.thresholds.tolist() == pytest.approx(expected, abs=1e-8)
    assert type(model.token_pruner.pruner) is tp.FixedThreshold
    soft = tp.from_pretrained(edit(tmp_path, masking_mode="soft"))
    assert isinstance(soft.token_pruner.pruner, tp.LearnedThreshold)
    assert soft.token_pruner.thresholds.tolist() == pytest.approx(expected, abs=1e-8)


# Bad input


def refused(path: Path | str, error: type[tp.TokenPruningError], *parts: str) -> str:
    """Loading fails with one line that has all the parts; the line is returned."""
    with pytest.raises(tp.TokenPruningError) as caught:
        tp.from_pretrained(path)
    message = str(caught.value)
    assert type(caught.value) is error, f"{caught.value!r}"
    assert "\n" not in message
    for part in parts:
        assert part in message, f"{part!r} is not in {message!r}"
    return message


def test_a_missing_directory(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", tp.CheckpointError, str(tmp_path / "nothing"), "not a folder", "config.json")
    refused("no-such-owner/no-such-model", tp.CheckpointError, "no-such-owner/no-such-model", "not a folder")


def test_a_file_in_place_of_a_directory(plain: Path) -> None:
    refused(plain / "config.json", tp.CheckpointError, "config.json is not a folder")


def test_a_directory_without_config(plain: Path) -> None:
    (plain / "config.json").unlink()
    refused(plain, tp.CheckpointError, str(plain / "config.json"), "does not exist")


@pytest.mark.parametrize("text", ["{", '{"a": }', "", "{'prune_mode': 'topk'}"])
def test_a_config_that_is_not_json(text: str, plain: Path) -> None:
    (plain / "config.json").write_text(text)
    refused(plain, tp.ConfigError, str(plain / "config.json"), "is not JSON", "line 1, column")


@pytest.mark.parametrize(("text", "found"), [("[]", "list"), ("3", "int"), ('"topk"', "str"), ("null", "NoneType")])
def test_a_config_that_is_no_object(text: str, found: str, plain: Path) -> None:
    (plain / "config.json").write_text(text)
    refused(plain, tp.ConfigError, str(plain / "config.json"), f"holds a {found}", "JSON object")


def test_a_config_that_is_not_text(plain: Path) -> None:
    (plain / "config.json").write_bytes(b"\xff\xfe\x00\x01")
    refused(plain, tp.CheckpointError, str(plain / "config.json"), "cannot be read")


def test_no_prune_mode(plain: Path) -> None:
    modes = ("absolute_threshold", "topk", "threshold", "rising_threshold")
    refused(plain, tp.ConfigError, str(plain / "config.json"), "prune_mode is missing", *modes)
    assert isinstance(tp.from_pretrained(plain, tp.TopK()).token_pruner.pruner, tp.TopK)
    (plain / "config.json").write_text(json.dumps({**read(plain), "prune_mode": None}))
    refused(plain, tp.ConfigError, str(plain / "config.json"), "prune_mode is ", *modes)


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"prune_mode": "random"}, ["prune_mode is 'random'", "absolute_threshold, threshold, rising_threshold, topk"]),
        ({"prune_mode": 3}, ["prune_mode is 3", "absolute_threshold"]),
        ({"prune_mode": ["topk"]}, ["prune_mode is ['topk']", "absolute_threshold"]),
        ({"prune_mode": "topk", "token_keep_rate": 1.5}, ["token_keep_rate is 1.5", "<= 1"]),
        ({"prune_mode": "topk", "token_keep_rate": "abc"}, ["token_keep_rate is 'abc'", "finite number", "<= 1"]),
        ({"prune_mode": "topk", "token_keep_rate": True}, ["token_keep_rate is True", "finite number"]),
        ({"prune_mode": "topk"}, ["token_keep_rate is missing", "'topk'"]),
        ({"prune_mode": "threshold"}, ["token_threshold is missing", "'threshold'"]),
        ({"prune_mode": "threshold", "token_threshold": -0.5}, ["token_threshold is -0.5", ">= 0 and <= 1"]),
        ({"prune_mode": "rising_threshold"}, ["final_token_threshold is missing", "'rising_threshold'"]),
        (
            {"prune_mode": "rising_threshold", "final_token_threshold": 2},
            ["final_token_threshold is 2", ">= 0 and <= 1"],
        ),
        ({"prune_mode": "absolute_threshold"}, ["final_token_threshold is missing", "'absolute_threshold'"]),
        (
            {"prune_mode": "absolute_threshold", "final_token_threshold": "abc"},
            ["final_token_threshold is 'abc'", "finite number >= 0"],
        ),
        (
            {"prune_mode": "absolute_threshold", "final_token_threshold": math.nan},
            ["final_token_threshold is nan", "finite number"],
        ),
        (
            {"prune_mode": "absolute_threshold", "final_token_threshold": 0.01, "scoring_mode": "median"},
            ["scoring_mode is 'median'", "mean, mean_norm"],
        ),
        (
            {"prune_mode": "absolute_threshold", "final_token_threshold": 0.01, "max_seq_length": 0},
            ["max_seq_length is 0", ">= 1"],
        ),
        ({"prune_mode": "absolute_threshold", "thresholds": "0.1"}, ["thresholds is '0.1'", "list"]),
        ({"prune_mode": "absolute_threshold", "thresholds": [0.1, "x", 0.1, 0.1]}, ["thresholds[1] is 'x'"]),
        (
            {
                "prune_mode": "absolute_threshold",
                "final_token_threshold": 0.01,
                "masking_mode": "soft",
                "threshold_temperature": 0,
            },
            ["temperature is 0", "> 0"],
        ),
        (
            {"prune_mode": "absolute_threshold", "final_token_threshold": 0.01, "masking_mode": "sfot"},
            ["masking_mode is 'sfot'", "soft", "hard"],
        ),
    ],
)
def test_wrong_keys_in_config_json(keys: dict[str, Any], parts: list[str], plain: Path) -> None:
    refused(edit(plain, **keys), tp.ConfigError, str(plain / "config.json"), *parts)


def test_a_wrong_number_of_thresholds(plain: Path) -> None:
    edit(plain, prune_mode="absolute_threshold", thresholds=[0.1, 0.2])
    refused(plain, tp.ConfigError, "thresholds has 2 values", "4 layers")


def test_learned_thresholds_for_another_number_of_layers(tmp_path: Path) -> None:
    tp.prune(tiny_model(), METHODS["learned"]).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["token_pruner.thresholds"] = torch.rand(6)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    refused(tmp_path, tp.ConfigError, "thresholds has 6 values", "4 layers")


@pytest.mark.parametrize("model_type", ["gpt2", "fnet", "nonsense", None, 7])
def test_an_unsupported_model_type(model_type: Any, plain: Path) -> None:
    edit(plain, prune_mode="topk", token_keep_rate=0.5, model_type=model_type)
    supported = ["bert", "camembert", "distilbert", "electra", "roberta", "xlm-roberta", "ibert"]
    refused(plain, tp.UnsupportedModelError, "config.json", f"model_type is {model_type!r}", *supported)


@pytest.mark.parametrize("architecture", ["BertForNothing", "LTPForNothing"])
def test_an_unknown_architecture(architecture: str, plain: Path) -> None:
    edit(plain, prune_mode="topk", token_keep_rate=0.5, architectures=[architecture])
    refused(plain, tp.UnsupportedModelError, "config.json", "architectures", repr(architecture))


def test_ibert_in_quantised_mode(tmp_path: Path) -> None:
    save_ibert(tmp_path, quant_mode=True, **ZERO)
    refused(tmp_path, tp.UnsupportedModelError, "config.json", "quant_mode is true", "float mode")


def test_ibert_with_integer_weights(tmp_path: Path) -> None:
    save_ibert(tmp_path, **ZERO)
    weights = load_file(tmp_path / "model.safetensors")
    name = "ibert.encoder.layer.0.attention.self.query.weight"
    weights[name] = weights[name].to(torch.int8)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    refused(tmp_path, tp.CheckpointError, str(tmp_path), "query.weight", "torch.int8", "float-mode")


def test_ibert_without_iberts_weights(tmp_path: Path) -> None:
    save_ibert(tmp_path, **ZERO)
    save_file({"something.else": torch.ones(2)}, tmp_path / "model.safetensors", {"format": "pt"})
    refused(tmp_path, tp.CheckpointError, str(tmp_path), "no encoder layers", "ibert.encoder.layer")


def test_no_weights_at_all(plain: Path) -> None:
    (plain / "model.safetensors").unlink()
    refused(edit(plain, prune_mode="topk", token_keep_rate=0.5), tp.CheckpointError, str(plain), "safetensors")


@pytest.mark.parametrize("size", [0, 5, 100, 2000, 60_000])
def test_truncated_weights(size: int, plain: Path) -> None:
    edit(plain, prune_mode="topk", token_keep_rate=0.5)
    weights = plain / "model.safetensors"
    assert weights.stat().st_size > size
    weights.write_bytes(weights.read_bytes()[:size])
    refused(plain, tp.CheckpointError, str(plain))


def test_weights_that_are_no_safetensors(plain: Path) -> None:
    (plain / "model.safetensors").write_text("<html>404</html>\n" * 50)
    refused(edit(plain, prune_mode="topk", token_keep_rate=0.5), tp.CheckpointError, "model.safetensors")


def test_weights_of_another_shape(plain: Path) -> None:
    edit(plain, prune_mode="topk", token_keep_rate=0.5, intermediate_size=96)
    refused(plain, tp.CheckpointError, str(plain), "encoder.layer.", "64", "96")


@pytest.mark.parametrize("missing", ["encoder.layer.2.", "bert.embeddings.word_embeddings"])
def test_weights_that_lack_part_of_the_encoder(missing: str, plain: Path) -> None:
    edit(plain, prune_mode="topk", token_keep_rate=0.5)
    weights = load_file(plain / "model.safetensors")
    left = {name: tensor for name, tensor in weights.items() if missing not in name}
    assert len(left) < len(weights)
    save_file(left, plain / "model.safetensors", {"format": "pt"})
    refused(plain, tp.CheckpointError, str(plain), missing)


@pytest.mark.parametrize(
    ("keys", "error", "part"),
    [
        ({"hidden_size": "wide"}, tp.ConfigError, "hidden_size is 'wide'; it must be a whole number"),
        ({"num_attention_heads": 5}, tp.CheckpointError, "5"),
        ({"num_hidden_layers": None}, tp.CheckpointError, "num_hidden_layers"),
        ({"intermediate_size": 10**6, "hidden_size": 10**5, "num_attention_heads": 4}, tp.ConfigError, "parameters"),
        ({"num_hidden_layers": 10**6}, tp.ConfigError, "num_hidden_layers is 1000000"),
    ],
)
def test_sizes_that_make_no_model(keys: dict[str, Any], error: Any, part: str, plain: Path) -> None:
    config = {**read(plain), "prune_mode": "topk", "token_keep_rate": 0.5, **keys}
    (plain / "config.json").write_text(json.dumps(config))
    refused(plain, error, str(plain), part)


# Pickles


def pickle_only(path: Path, *, beside: tuple[str, ...] = ()) -> Any:
    """The checkpoint as older tools wrote it: pytorch_model.bin, tied and non-contiguous tensors included."""
    model = tiny_model("bert", "masked_lm")
    model.save_pretrained(path)
    (path / "model.safetensors").unlink()
    weights = dict(model.state_dict())
    weights["bert.pooler.dense.weight"] = torch.randn(32, 32).T
    torch.save(weights, path / "pytorch_model.bin")
    for name in beside:
        torch.save({"lr": 0.1}, path / name)
    edit(path, **ZERO)
    return model


def test_a_pickle_is_refused_and_the_command_in_the_message_converts_it(tmp_path: Path) -> None:
    model = pickle_only(tmp_path)
    message = refused(tmp_path, tp.CheckpointError, str(tmp_path / "pytorch_model.bin"), "pickle", "python -c")
    command = message[message.index("python -c") :]
    shell = shutil.which("sh")
    assert shell is not None
    command = command.replace("python", f'"{sys.executable}"', 1)
    done = subprocess.run([shell, "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    loaded = tp.from_pretrained(tmp_path)
    mask = ragged_batch([30, 1, 17, 2])["attention_mask"].bool()
    assert_close(logits_of(loaded)[0][mask], dense_logits(model)[mask], 1e-4)


def test_the_weights_are_named_among_a_trainers_other_pickles(tmp_path: Path) -> None:
    pickle_only(tmp_path, beside=("aaa.bin", "optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state.pt"))
    refused(tmp_path, tp.CheckpointError, str(tmp_path / "pytorch_model.bin"))


def test_a_trainers_other_pickles_are_no_weights(tmp_path: Path) -> None:
    pickle_only(tmp_path, beside=("training_args.bin", "optimizer.pt"))
    (tmp_path / "pytorch_model.bin").unlink()
    message = refused(tmp_path, tp.CheckpointError, str(tmp_path))
    assert "training_args" not in message and "optimizer" not in message


def test_a_pickle_beside_another_safetensors_file_is_not_loaded(tmp_path: Path) -> None:
    pickle_only(tmp_path)
    save_file({"other": torch.ones(1)}, tmp_path / "adapter.safetensors", {"format": "pt"})
    refused(tmp_path, tp.CheckpointError, str(tmp_path))


def test_reading_never_runs_a_pickle(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "exploded",))

    pickle_only(tmp_path)
    torch.save({"weight": Bomb()}, tmp_path / "pytorch_model.bin")
    refused(tmp_path, tp.CheckpointError, "pickle")
    assert not (tmp_path / "exploded").exists()
