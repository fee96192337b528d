"""A checkpoint's tokenizer and dtype: what fits the model, and what is refused before any work."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from tests.workspace import assert_same_training, edit_config, write_checkpoint, write_sst2
from token_pruning.checkpoint import read_checkpoint
from token_pruning.errors import CheckpointError
from token_pruning.lab.cli import main
from token_pruning.lab.training.load import load_float32, load_tokenizer

THRESHOLDS = {"prune_mode": "absolute_threshold", "final_token_threshold": 0.01}
TRAIN = (
    "train --task SST2 --data-dir glue --masking-mode hard --epochs 1 --bs 8 --lr 1e-2 --max-length 16 "
    "--restore CKPT --output-dir out"
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_checkpoint(tmp_path / "CKPT", **THRESHOLDS)


def edit_tokenizer(folder: Path, change: Callable[[dict[str, Any]], object], name: str = "tokenizer.json") -> None:
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


def refused(folder: Path, *parts: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(read_checkpoint(folder))
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in (str(folder), *parts)), message


def test_tokenizer_files_that_are_broken(folder: Path) -> None:
    (folder / "vocab.txt").unlink()
    good = (folder / "tokenizer.json").read_text()
    for change in (
        lambda content: content.update(version="2.0"),
        lambda content: content["model"].update(type="Newer"),
        lambda content: content["model"].update(vocab={}),
        lambda content: content["model"].update(vocab=[1, 2]),
        lambda content: content.update(post_processor={"type": "Newer"}),
    ):
        edit_tokenizer(folder, change)
        refused(folder, "tokenizer")
        (folder / "tokenizer.json").write_text(good)
    (folder / "tokenizer.json").write_text(good[: len(good) // 2])
    refused(folder, "tokenizer")
    (folder / "tokenizer.json").unlink()
    refused(folder, "has no tokenizer")


def test_a_vocabulary_that_transformers_would_leave_out(folder: Path) -> None:
    (folder / "vocab.txt").unlink()
    edit_tokenizer(folder, lambda content: content["model"].update(vocab=None))
    refused(folder, "tokenizer.json", "model.vocab is None", "5 entries")


def test_no_pad_token(folder: Path) -> None:
    edit_tokenizer(folder, lambda content: content.update(pad_token=None), "tokenizer_config.json")
    refused(folder, "tokenizer_config.json: pad_token is missing")


def test_tokens_that_the_model_does_not_have(folder: Path) -> None:
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"new{number}" for number in range(23)])
    tokenizer.save_pretrained(folder)
    load_tokenizer(read_checkpoint(folder))  # 40 entries: as many as the embedding
    tokenizer.add_tokens(["one-more"])
    tokenizer.save_pretrained(folder)
    refused(folder, "token ids up to 40", "vocab_size is 40")


def test_pairs_on_a_model_with_one_token_type(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf.set_seed(0)
    config = hf.AutoConfig.from_pretrained(folder, type_vocab_size=1)
    hf.AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    Path("pairs.csv").write_text("a,b\ngood cat,bad dog\nfine,dull\n")
    for more in ([], ["--dense"]):
        assert main(["predict", "--restore", "CKPT", "--input", "pairs.csv", *more]) == 0
    assert "token_type_ids" not in load_tokenizer(read_checkpoint(folder))(["a"], ["b"])
    probability = json.loads(capsys.readouterr().out.splitlines()[2])["probability"]
    model = hf.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    batch = hf.AutoTokenizer.from_pretrained(folder)("good cat", "bad dog", return_tensors="pt")
    with torch.no_grad():
        logits = model(batch["input_ids"]).logits
    assert probability == pytest.approx(logits.softmax(-1).max().item(), rel=1e-4)


def test_a_tokenizers_own_code_is_never_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # yes | token-pruning …
    marker = folder.parent / "ran"
    (folder / "own.py").write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\nOwn = object\n")

    def own(content: dict[str, Any]) -> None:
        content.update(auto_map={"AutoTokenizer": ["own.Own", "own.Own"]}, tokenizer_class="Own")

    edit_tokenizer(folder, own, "tokenizer_config.json")
    edit_config(folder, auto_map={"AutoConfig": "own.Own", "AutoModel": "own.Own", "AutoTokenizer": ["own.Own", None]})
    Path("in.txt").write_text("good\n")
    assert main(["predict", "--restore", "CKPT", "--input", "in.txt"]) in (0, 2)
    assert not marker.exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_checkpoints_are_trained_as_their_upcast(folder: Path, dtype: torch.dtype) -> None:
    write_sst2(Path("glue"), train=16, dev=4)
    weights = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    results = []
    for kind in (dtype, torch.float32):
        save_file({k: v.to(kind) for k, v in weights.items()}, folder / "model.safetensors", {"format": "pt"})
        edit_config(folder, dtype=str(kind).removeprefix("torch."))
        assert load_float32(read_checkpoint(folder)).dtype == torch.float32
        assert main([*TRAIN.split(), "--overwrite-output-dir"]) == 0
        results.append(load_file("out/model.safetensors"))
        said = json.loads(Path("out/eval_results.json").read_text())
        assert said["dtype"] == json.loads(Path("out/config.json").read_text())["dtype"] == "float32"
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in results[0].values())
    assert_same_training(*results)


def test_only_classifiers_are_evaluated(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(folder.parent / "ENCODER", head="encoder", **THRESHOLDS)
    Path("dev.csv").write_text("text,label\ngood,1\nbad,0\n")
    assert main(["eval", "--restore", "ENCODER", "--validation-file", "dev.csv"]) == 2
    assert "ENCODER is BertModel; only sequence-classification" in capsys.readouterr().err
