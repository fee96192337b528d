"""What ``predict`` says for every kind of head, and what the other commands say of heads that are not for them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.workspace import write_checkpoint, write_sst2
from token_pruning.lab.cli import main

TEXTS = ["good cat", "", "x", "the dog sat on the mat", "bad\0 שלום"]
ALL_KEPT = {"prune_mode": "absolute_threshold", "final_token_threshold": 0.0}
NAMES = {"id2label": {"0": "a", "1": "b", "2": "c"}}


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in.txt").write_bytes("\r\n".join(TEXTS).encode())


def predicted(capsys: pytest.CaptureFixture[str]) -> tuple[list[dict[str, Any]], torch.Tensor]:
    """What the command prints for the texts, and the logits of transformers alone, one text at a time."""
    capsys.readouterr()
    assert main(["predict", "--restore", "CKPT", "--input", "in.txt"]) == 0
    out, err = capsys.readouterr()
    assert "in.txt: 5 texts, one per line, 1 of them empty\n" in err
    model = AutoModelForSequenceClassification.from_pretrained("CKPT")
    tokenizer = AutoTokenizer.from_pretrained("CKPT")
    with torch.no_grad():
        logits = torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in TEXTS])
    return [json.loads(line) for line in out.splitlines()], logits


def close(found: list[Any], expected: torch.Tensor) -> None:
    torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-4, atol=1e-5)


def test_classes(capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(Path("CKPT"), labels=3, **ALL_KEPT, **NAMES)
    rows, logits = predicted(capsys)
    assert [row["label"] for row in rows] == ["abc"[place] for place in logits.argmax(-1).tolist()]
    close([row["probability"] for row in rows], logits.softmax(-1).amax(-1))


def test_several_labels(capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(Path("CKPT"), labels=3, problem_type="multi_label_classification", **ALL_KEPT, **NAMES)
    rows, logits = predicted(capsys)
    close([list(row["probabilities"].values()) for row in rows], logits.sigmoid())
    assert [row["labels"] for row in rows] == [["abc"[i] for i in range(3) if text[i] > 0] for text in logits]
    assert {tuple(row["probabilities"]) for row in rows} == {("a", "b", "c")}


@pytest.mark.parametrize("problem_type", [None, "regression"])
def test_a_score(capsys: pytest.CaptureFixture[str], problem_type: str | None) -> None:
    write_checkpoint(Path("CKPT"), labels=1, problem_type=problem_type, **ALL_KEPT)
    rows, logits = predicted(capsys)
    close([[row["score"]] for row in rows], logits)


@pytest.mark.parametrize("names", [NAMES, {}])
def test_several_scores(capsys: pytest.CaptureFixture[str], names: dict[str, Any]) -> None:
    write_checkpoint(Path("CKPT"), labels=3, problem_type="regression", **ALL_KEPT, **names)
    rows, logits = predicted(capsys)
    close([list(row["scores"].values()) if names else row["scores"] for row in rows], logits)
    assert not names or list(rows[0]["scores"]) == ["a", "b", "c"]


def refused(capsys: pytest.CaptureFixture[str], line: str) -> str:
    capsys.readouterr()
    assert main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err.split("\r")[-1].strip().splitlines()[-1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_outputs_that_are_no_numbers(capsys: pytest.CaptureFixture[str], bad: float) -> None:
    weights = load_file(write_checkpoint(Path("CKPT"), **ALL_KEPT) / "model.safetensors")
    weights["bert.embeddings.word_embeddings.weight"][9] = bad  # of "cat"
    save_file(weights, "CKPT/model.safetensors", {"format": "pt"})
    Path("in.txt").write_text("good\n\ncat\ndog\nthe cat\n")
    assert refused(capsys, "predict --restore CKPT --input in.txt --output out.jsonl").endswith(
        "CKPT: the model's outputs are NaN or infinite for 2 of 5 texts, first for text 3; nothing was written"
    )
    assert not Path("out.jsonl").exists()


def test_values_that_are_not_allowed(capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(Path("CKPT"), **ALL_KEPT)
    Path("pairs.csv").write_text("premise,hypothesis\na,b\n")
    command = "predict --restore CKPT --input in.txt"
    for words, message in {
        "--bs 0": "--bs is 0; it must be a whole number >= 1",
        "--bs -1": "--bs is -1; it must be a whole number >= 1",
        "--max-length -3": "--max-length is -3; it must be a whole number >= 1",
        "--max-length 0": "--max-length is 0; it must be a whole number >= 1",
        "--max-length 1": "--max-length is 1; the tokenizer adds 2 tokens to a text, so at least 3 are needed",
        "--max-length 4 --input pairs.csv": "--max-length is 4; the tokenizer adds 3 tokens to a pair, so at least 5",
        "--max-length 500": "--max-length is 500; the model has positions for at most 130 tokens",
    }.items():
        assert message in refused(capsys, f"{command} {words}")


def test_names_that_are_not_one_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    names = {"id2label": {"0": "a", "1": "b", "2": "a"}}
    write_checkpoint(Path("CKPT"), labels=3, problem_type="multi_label_classification", **ALL_KEPT, **names)
    assert "id2label names two outputs alike: a, b, a; " in refused(capsys, "predict --restore CKPT --input in.txt")


def test_a_dense_checkpoint_is_told_of_dense(capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(Path("CKPT"))
    assert "prune_mode is missing: the checkpoint is dense; --dense predicts with it" in refused(
        capsys, "predict --restore CKPT --input in.txt"
    )


@pytest.mark.parametrize(
    ("problem_type", "what"),
    [("multi_label_classification", "a multi-label classifier"), ("regression", "a regression")],
)
def test_other_commands_refuse_several_answers(
    capsys: pytest.CaptureFixture[str], problem_type: str, what: str
) -> None:
    write_sst2(Path("glue"))
    write_checkpoint(Path("CKPT"), labels=3, problem_type=problem_type, **ALL_KEPT)
    write_checkpoint(Path("GOOD"), **ALL_KEPT)
    data = "--task SST2 --data-dir glue"
    for line in (
        "eval --restore CKPT --masking-mode hard",
        "train --restore CKPT --masking-mode hard --output-dir out",
        "calibrate --restore CKPT --target-flops 0.7 --output-dir out",
        "sweep --restore CKPT --trials 1 --output-dir out",
        "analyze --restore CKPT --output-dir out",
        "train --restore GOOD --teacher CKPT --masking-mode hard --output-dir out",
    ):
        message = refused(capsys, f"{line} {data}")
        assert f"CKPT is {what} with 3 outputs; only one class or one score per text can be trained" in message
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("labels", "message"),
    [(1, "CKPT has 1 output; task SST2 has 2 classes"), (3, "CKPT has 3 outputs; task SST2 has 2 classes")],
)
def test_a_head_for_another_task(capsys: pytest.CaptureFixture[str], labels: int, message: str) -> None:
    write_sst2(Path("glue"))
    write_checkpoint(Path("CKPT"), labels=labels, **ALL_KEPT)
    assert message in refused(capsys, "eval --restore CKPT --masking-mode hard --task SST2 --data-dir glue")


def test_every_file_is_told_of_once(capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(Path("CKPT"), **ALL_KEPT)
    Path("a.csv").write_text("idx,text,label\n0,good,0\n1,bad,1\n2,cat,-1\n3,dog,0\n")
    Path("b.csv").write_text("text,label\ngood,0\nbad,1\n")
    files = "--train-file a.csv --validation-file b.csv"
    assert main(f"train --restore CKPT --masking-mode hard --output-dir out --epoch 1 {files}".split()) == 0
    err = capsys.readouterr().err
    classes = "label: label (2 classes: 0, 1)"
    left_out = "left out: idx (row numbers), 1 row without a label (-1)"
    assert err.count(f"a.csv: 4 rows; text: text; {classes}; {left_out}\n") == 1
    assert err.count(f"b.csv: 2 rows; text: text; {classes}\n") == 1
    assert err.count("rows; ") == 2


def test_glue_files_are_told_of(capsys: pytest.CaptureFixture[str]) -> None:
    write_sst2(Path("glue"), dev=4)
    write_checkpoint(Path("CKPT"), **ALL_KEPT)
    assert main(["eval", "--restore", "CKPT", "--masking-mode", "hard", "--task", "SST2", "--data-dir", "glue"]) == 0
    assert "dev.tsv: 4 rows; text: sentence; label: label (2 classes: negative, positive)\n" in capsys.readouterr().err
