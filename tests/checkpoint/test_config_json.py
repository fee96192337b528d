"""What config.json and the files beside it may say, and that whatever else they say is one line."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import token_pruning as tp
from tests.checkpoint.test_checkpoint import refused
from tests.tiny import ragged_batch, tiny_model
from token_pruning.checkpoint import load_model, read_checkpoint
from token_pruning.pruners import check_keys

TOPK = {"prune_mode": "topk", "token_keep_rate": 0.5}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path / "model")
    return edit(tmp_path / "model", **TOPK)


def edit(path: Path, **keys: Any) -> Path:
    """Write keys into config.json, null too."""
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))
    return path


def edit_weights(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("hidden_size", 0, "whole number >= 1"),
        ("num_hidden_layers", True, "whole number >= 1"),
        ("num_attention_heads", 2.0, "whole number >= 1"),
        ("intermediate_size", [64], "whole number >= 1"),
        ("vocab_size", -1, "whole number >= 1"),
        ("max_position_embeddings", "80", "whole number >= 1"),
        ("type_vocab_size", -1, "whole number >= 0"),
        ("pad_token_id", -1, "whole number >= 0"),
        ("pad_token_id", 200, "below vocab_size"),
        ("architectures", "BertModel", "list of class names"),
        ("architectures", [3], "list of class names"),
        ("hidden_act", "gelou", "gelu"),
        ("pooler_hidden_act", "GELU", "gelu"),
        ("dtype", "float17", "float32, float16, bfloat16, float64"),
        ("torch_dtype", 32, "float32, float16, bfloat16, float64"),
        ("problem_type", "ranking", "regression, single_label"),
        ("quant_mode", "true", "true or false"),
        ("is_decoder", 1, "true or false"),
        ("output_attentions", "yes", "true or false"),
        ("return_dict", False, "true or left out"),
        ("reads", "last", "first, mean, all"),
        ("chunk_size_feed_forward", 7, "0 or left out"),
        ("position_embedding_type", "relative_key", "absolute"),
        ("transformers_weights", "x.bin", "left out"),
        ("id2label", ["a", "b"], "a text for each output"),
        ("id2label", {}, "a text for each output"),
        ("id2label", {"0": 0, "1": 1}, "a text for each output"),
        ("id2label", {"0": "a", "2": "b"}, "1 is missing"),
        ("id2label", {"a": 0, "b": 1}, "0 is missing"),
        ("label2id", {"a": "0"}, "whole number for each label"),
        ("label2id", ["a"], "whole number for each label"),
        ("num_labels", 0, "whole number >= 1"),
        ("layer_norm_eps", math.nan, "finite number"),
        ("task_specific_params", {"a": [1, math.inf]}, "finite number"),
        ("bos_token_id", 10**30, "2**63"),
        ("finetuning_task", "\ud800", "surrogate"),
        ("masking_mode", 1, "soft, hard"),
        ("thresholds", [0.1], "0.1"),
        ("token_keep_rates", 0.5, "did you mean token_keep_rate?"),
        ("final_token_treshold", 0.5, "did you mean final_token_threshold?"),
        ("scoringmode", "mean", "did you mean scoring_mode?"),
        ("Prune-Layers", [1], "did you mean prune_layers?"),
    ],
)
def test_a_value_that_is_not_allowed(key: str, value: Any, part: str, folder: Path) -> None:
    if key == "thresholds":  # an absolute method's, so that the number of layers decides
        edit(folder, prune_mode="absolute_threshold")
        part = "thresholds has 1 values"
    message = refused(edit(folder, **{key: value}), tp.ConfigError, key if key != "thresholds" else "", part)
    assert key == "thresholds" or message.startswith(f"{folder / 'config.json'}: ")


def test_outputs_that_disagree(folder: Path) -> None:
    edit(folder, num_labels=3, id2label={"0": "a", "1": "b"})
    refused(folder, tp.ConfigError, "num_labels is 3", "id2label names 2")


def test_labels_may_stand_in_any_order_and_be_alike(folder: Path) -> None:
    edit(folder, id2label={"2": "wing", "1": "crane", "0": "crane"}, label2id={"crane": 0})  # as ImageNet's
    assert read_checkpoint(folder).label_names() == ["crane", "crane", "wing"]
    assert tp.from_pretrained(folder).config.id2label == {0: "crane", 1: "crane", 2: "wing"}


def test_quantised_weights_and_adapters(folder: Path) -> None:
    edit(folder, quantization_config={"quant_method": "bitsandbytes"})
    refused(folder, tp.UnsupportedModelError, "quantization_config")
    edit(folder, quantization_config=None)
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, tp.UnsupportedModelError, "adapter_config.json", "merge_and_unload")


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_kernels_of_the_hub_are_not_fetched_for_a_checkpoint(folder: Path, key: str) -> None:
    edit(folder, **{key: "somebody/kernels"})
    refused(folder, tp.ConfigError, key, "somebody/kernels", "no code is run")
    edit(folder, **{key: "eager"})
    tp.from_pretrained(folder)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('{"model_type": "bert", "model_type": "roberta"}', ["model_type is given twice"]),
        ('{"a": {"b": 1, "b": 1}}', ["b is given twice"]),
        ("\ufeff{}", ["not JSON", "BOM"]),
        ('{"a": ' + "[" * 100_000, ["nested too deeply"]),
        ('{"hidden_size": ' + "1" * 5000 + "}", ["not JSON"]),
    ],
)
def test_json_that_cannot_be_meant(text: str, parts: list[str], folder: Path) -> None:
    (folder / "config.json").write_text(text)
    refused(folder, tp.ConfigError, str(folder / "config.json"), *parts)


@pytest.mark.parametrize("name", ["AutoTokenizer", "BertTokenizer", "pipeline", "TrainingArguments", ""])
def test_an_architecture_that_is_no_model(name: str, folder: Path) -> None:
    refused(edit(folder, architectures=[name]), tp.UnsupportedModelError, f"architectures names {name!r}")


def test_an_architecture_of_another_family(folder: Path) -> None:
    edit(folder, architectures=["RobertaModel"])
    refused(folder, tp.UnsupportedModelError, "'RobertaModel'", "type 'roberta'", "model_type is 'bert'")


def test_what_transformers_refuses_is_one_line_with_its_words(folder: Path) -> None:
    with pytest.raises(tp.CheckpointError, match=r"hidden_dropout_prob.*'half'") as caught:
        tp.from_pretrained(edit(folder, hidden_dropout_prob="half"))
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is not None


def test_roberta_without_a_pad_token(tmp_path: Path) -> None:
    tiny_model("roberta").save_pretrained(tmp_path)
    refused(edit(tmp_path, pad_token_id=None, **TOPK), tp.UnsupportedModelError, "pad_token_id null")


def test_modernbert_with_heads_of_another_width(tmp_path: Path) -> None:
    tiny_model("modernbert").save_pretrained(tmp_path)
    refused(edit(tmp_path, head_dim=1, **TOPK), tp.UnsupportedModelError, "head_dim 1")


def test_keys_of_another_method_are_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    tp.from_pretrained(edit(folder, final_token_threshold=0.1, token_threshold=None, keep_all_layers=1))
    assert caplog.messages == [
        f"{folder / 'config.json'}: final_token_threshold without effect: not of prune_mode 'topk'"
    ]
    caplog.clear()
    edit(folder, prune_mode="absolute_threshold", token_keep_rate=None, threshold_temperature=0.1, keep_all_layers=None)
    tp.from_pretrained(folder)  # the hard stage after a soft one
    assert caplog.messages == []


def test_keys_are_checked_one_by_one() -> None:
    check_keys({"scoring_mode": "mean", "token_keep_rate": -1.0, "final_token_threshold": 7.0})  # an absolute one
    with pytest.raises(tp.ConfigError, match=r"final_token_threshold is 7\.0"):
        check_keys({"prune_mode": "rising_threshold", "final_token_threshold": 7.0})
    with pytest.raises(tp.ConfigError, match=r"vocabulary_threshold is -1"):
        check_keys({"vocabulary_threshold": -1})


# Weights


def test_a_head_that_is_not_there(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit_weights(folder, lambda weights: weights.pop("classifier.weight"))
    refused(folder, tp.CheckpointError, "weight classifier.weight is missing")
    assert caplog.messages == []
    tp.from_pretrained(folder, model_class=hf.AutoModelForTokenClassification)  # another, to be trained
    assert "has no weights for classifier.weight: they are new" in caplog.text


def test_layers_that_config_json_leaves_out(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    tp.from_pretrained(edit(folder, num_hidden_layers=3))
    assert "config.json leaves out 16 of the encoder's weights, such as bert.encoder.layer.3." in caplog.text


def test_parameters_that_are_integers(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.update({"classifier.bias": torch.tensor([1, 2])}))
    refused(folder, tp.CheckpointError, "weight classifier.bias is I64", "F32")


@pytest.mark.parametrize(
    "values", [torch.tensor([0.1, math.nan, 0.1, 0.1]), torch.ones(4, dtype=torch.int64), torch.ones(2, 2)]
)
def test_thresholds_that_are_none(values: torch.Tensor, folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.update({"token_pruner.thresholds": values}))
    refused(folder, tp.CheckpointError, "weight token_pruner.thresholds", "finite numbers")


@pytest.mark.parametrize("name", ["../model.safetensors", "pytorch_model.bin", 3])
def test_an_index_may_only_name_safetensors_of_its_folder(name: Any, folder: Path) -> None:
    index = {"weight_map": {"classifier.bias": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, tp.CheckpointError, "index.json", "weight_map", repr(name))


# Arguments


def test_code_and_pickles_are_refused_by_name(folder: Path) -> None:
    for load in (tp.from_pretrained, lambda path, **more: load_model(read_checkpoint(path), **more)):
        with pytest.raises(tp.ConfigError, match=r"trust_remote_code is True.*never run"):
            load(folder, trust_remote_code=True)
        with pytest.raises(tp.ConfigError, match=r"use_safetensors is False.*never loaded"):
            load(folder, use_safetensors=False)
    assert hasattr(tp.from_pretrained(folder, trust_remote_code=False, use_safetensors=True), "token_pruner")


def test_a_checkpoints_own_code_is_never_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = tmp_path / "ran"
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # yes | token-pruning …
    (folder / "own.py").write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\nOwn = object\n")
    own = {"AutoConfig": "own.Own", "AutoModel": "own.Own", "AutoModelForSequenceClassification": "own.Own"}
    edit(folder, auto_map={**own, "AutoTokenizer": ["own.Own", None]})
    for kind in (None, hf.AutoModelForSequenceClassification):
        assert type(tp.from_pretrained(folder, model_class=kind)) is hf.BertForSequenceClassification
    edit(folder, model_type="own")
    refused(folder, tp.UnsupportedModelError, "model_type is 'own'")
    edit(folder, model_type="bert", architectures=["Own"])
    refused(folder, tp.UnsupportedModelError, "architectures names 'Own'")
    assert not marker.exists()


def test_output_loading_info_is_given_as_transformers_does(folder: Path) -> None:
    model = tp.prune(tiny_model(), tp.LearnedThreshold())
    model.save_pretrained(folder)
    loaded, info = tp.from_pretrained(folder, output_loading_info=True)
    assert hasattr(loaded, "token_pruner")
    assert {name: len(info[name]) for name in ("missing_keys", "unexpected_keys", "mismatched_keys")} == {
        "missing_keys": 0, "unexpected_keys": 0, "mismatched_keys": 0,
    }  # fmt: skip


def test_ignore_mismatched_sizes_is_passed_on(folder: Path) -> None:
    with pytest.raises(tp.CheckpointError, match=r"classifier.* has shape \[3"):
        tp.from_pretrained(folder, num_labels=5)
    assert tp.from_pretrained(folder, num_labels=5, ignore_mismatched_sizes=True).classifier.weight.shape[0] == 5


def test_config_and_dtype_and_subfolder_are_passed_on(folder: Path) -> None:
    config = hf.AutoConfig.from_pretrained(folder, hidden_dropout_prob=0.25)
    assert tp.from_pretrained(folder, config=config).config.hidden_dropout_prob == 0.25
    for name in ("dtype", "torch_dtype"):
        assert tp.from_pretrained(folder, **{name: torch.bfloat16}).dtype == torch.bfloat16
    assert hasattr(tp.from_pretrained(folder.parent, subfolder=folder.name), "token_pruner")


def test_revision_goes_to_the_hub(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(
        "token_pruning.checkpoint.loading.snapshot_download", lambda name, **more: asked.update(more) or str(folder)
    )
    tp.from_pretrained("someone/model", revision="v1", local_files_only=True)
    assert asked["revision"] == "v1" and asked["local_files_only"] is True


def test_half_precision_weights_keep_their_dtype_unless_asked(folder: Path) -> None:
    tiny_model().half().save_pretrained(folder)
    edit(folder, **TOPK)
    assert tp.from_pretrained(folder).dtype == torch.float16
    with torch.no_grad():
        upcast = tp.from_pretrained(folder, dtype=torch.float32)(**ragged_batch([9, 4])).logits
    assert upcast.dtype == torch.float32 and upcast.isfinite().all()


def test_an_empty_path_is_no_checkpoint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    refused("", tp.CheckpointError, "'' is not a folder")
    refused("a\0b", tp.CheckpointError, "is not a folder")
