"""A user's mistake is one line that names what is wrong, and exit status 2."""

import json
from pathlib import Path

import pytest

from tests.workspace import edit_config, write_checkpoint, write_sst2
from token_pruning.lab.cli import main

THRESHOLDS = {"prune_mode": "absolute_threshold", "final_token_threshold": 0.01, "scoring_mode": "mean"}
HARD = "--task SST2 --masking_mode hard --epoch 1 --lr 1e-4 --bs 8 --data_dir glue --restore CKPT --output_dir out"
SOFT = HARD.replace("hard", "soft") + " --lambda 0.1"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_sst2(tmp_path / "glue", train=8, dev=4)
    write_checkpoint(tmp_path / "CKPT", **THRESHOLDS)
    return tmp_path


def fails(capsys: pytest.CaptureFixture[str], line: str, *words: str, command: str = "train") -> None:
    capsys.readouterr()
    try:
        status = main([command, *line.split()])
    except SystemExit as exit_:  # argparse
        status = int(exit_.code or 0)
    error = capsys.readouterr().err.strip()
    assert status == 2, error
    assert error.startswith("token-pruning")
    assert len(error.splitlines()) == 1, error
    for word in words:
        assert word in error
    assert not (Path("out") / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"prune_mode": "topp"}, ["prune_mode", "topp", "absolute_threshold, threshold, rising_threshold, topk"]),
        ({"prune_mode": 3}, ["prune_mode", "3"]),
        ({"prune_mode": "topk", "token_keep_rate": 1.5}, ["token_keep_rate", "1.5", "<= 1"]),
        ({"prune_mode": "topk"}, ["token_keep_rate is missing"]),
        ({"prune_mode": "threshold", "token_threshold": 2}, ["token_threshold", "2"]),
        ({"final_token_threshold": "abc"}, ["final_token_threshold", "'abc'", "number"]),
        ({"final_token_threshold": float("nan")}, ["final_token_threshold", "nan"]),
        ({"final_token_threshold": -1}, ["final_token_threshold", "-1", ">= 0"]),
        ({"scoring_mode": "max"}, ["scoring_mode", "'max'", "mean, mean_norm"]),
        ({"thresholds": [0.1, 0.2]}, ["thresholds", "2", "4 layers"]),
        ({"model_type": "gpt2"}, ["model_type", "gpt2", "bert", "distilbert", "roberta"]),
    ],
)
def test_configuration_keys(capsys: pytest.CaptureFixture[str], keys: dict[str, object], words: list[str]) -> None:
    edit_config(Path("CKPT"), **keys)
    fails(capsys, HARD, *words)


def test_configuration_without_prune_mode(capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(Path("PLAIN"))
    fails(capsys, HARD.replace("CKPT", "PLAIN"), "config.json", "prune_mode is missing")


def test_configuration_that_is_not_json(capsys: pytest.CaptureFixture[str]) -> None:
    Path("CKPT/config.json").write_text('{"prune_mode": "topk",}')
    fails(capsys, HARD, "config.json", "not JSON", "line 1")


def test_missing_and_unreadable_checkpoints(capsys: pytest.CaptureFixture[str]) -> None:
    fails(capsys, HARD.replace("CKPT", "NOWHERE"), "NOWHERE")
    Path("CKPT/model.safetensors").write_bytes(b"not a safetensors file")
    fails(capsys, HARD, "model.safetensors", "cannot be read")
    Path("CKPT/model.safetensors").rename("CKPT/pytorch_model.bin")
    fails(capsys, HARD, "pytorch_model.bin", "pickle", "convert", "save_file")
    Path("CKPT/pytorch_model.bin").unlink()
    fails(capsys, HARD, "CKPT", "safetensors")
    Path("CKPT/config.json").unlink()
    fails(capsys, HARD, "config.json", "does not exist")


def test_checkpoint_without_tokenizer(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        Path("CKPT", name).unlink(missing_ok=True)
    fails(capsys, HARD, "CKPT", "tokenizer")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--lambda 0", ["--lambda", "0.0", "> 0"]),
        ("--lambda nan", ["--lambda", "nan"]),
        ("--temperature -1", ["--temperature", "-1.0", "> 0"]),
        ("--lr 0", ["--lr", "> 0"]),
        ("--lr_threshold 0", ["--lr-threshold", "> 0"]),
        ("--weight_decay -0.1", ["--weight-decay", ">= 0"]),
        ("--epoch 0", ["--epoch", "> 0"]),
        ("--bs 0", ["--bs", ">= 1"]),
        ("--save_step 0", ["--save-step", ">= 1"]),
        ("--max_length 500", ["--max-length", "500", "130"]),
        ("--arch gpt", ["--arch", "gpt", "pibert-base"]),
        ("--masking_mode firm", ["--masking-mode", "firm", "none, soft, hard, mixed"]),
        ("--task COLA", ["COLA", "RTE", "MNLI"]),
        ("--lr fast", ["--lr", "fast"]),
        ("--speed 3", ["--speed"]),
        ("--prune_mode topk --token_keep_rate 0.5", ["prune_mode", "topk", "absolute_threshold"]),
    ],
)
def test_values(capsys: pytest.CaptureFixture[str], options: str, words: list[str]) -> None:
    fails(capsys, f"{SOFT} {options}", *words)


def test_options_that_would_be_ignored(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--lambda 0.1", "--temperature 1e-3", "--lr_threshold 1e-3", "--weight_decay_threshold 0"):
        fails(capsys, f"{HARD} {option}", option.split()[0].replace("_", "-"), "soft", "hard")
    fails(capsys, HARD.replace("hard", "none") + " --prune_mode topk", "--prune-mode", "none")
    fails(capsys, SOFT.replace("--lambda 0.1", ""), "--lambda is missing")


def test_no_task_or_two(capsys: pytest.CaptureFixture[str]) -> None:
    fails(capsys, HARD.replace("--task SST2", ""), "--task", "--train-file")
    fails(capsys, HARD + " --validation-file x.csv", "--task", "--validation-file")
    fails(capsys, HARD.replace("--restore CKPT", ""), "--restore is missing")
    fails(
        capsys, HARD.replace("--task SST2 ", "--validation_file x.csv ").replace("--data_dir glue", ""), "--train-file"
    )


def test_data_folder(capsys: pytest.CaptureFixture[str]) -> None:
    fails(capsys, HARD.replace("SST2", "RTE"), "RTE", "train.tsv")
    file = Path("glue/SST-2/train.tsv")
    good = file.read_text()
    file.write_text(good + "only one column\n")
    fails(capsys, HARD, "train.tsv", "10")
    file.write_text(good + "a sentence\tmaybe\n")
    fails(capsys, HARD, "train.tsv", "10", "maybe")
    file.write_text(good)
    Path("glue/SST-2/dev.tsv").unlink()
    fails(capsys, HARD, "dev.tsv")


def test_hub_data_that_cannot_be_had(capsys: pytest.CaptureFixture[str]) -> None:
    fails(capsys, HARD.replace("--data_dir glue", ""), "--data_dir")


def test_output_folder_of_a_finished_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *HARD.split()]) == 0
    before = Path("out/model.safetensors").read_bytes()
    model = Path("out/model.safetensors").rename("kept")
    fails(capsys, HARD, "out", "finished run", "--overwrite-output-dir")
    model.rename("out/model.safetensors")
    assert main(["train", *HARD.split(), "--overwrite_output_dir", "--seed", "7", "--lr", "1e-2"]) == 0
    assert Path("out/model.safetensors").read_bytes() != before
    assert json.loads(Path("out/run.json").read_text())["options"]["seed"] == 7


def test_output_folder_of_something_else(capsys: pytest.CaptureFixture[str]) -> None:
    other = write_checkpoint(Path("other"))
    fails(capsys, HARD.replace("--output_dir out", "--output_dir other"), "other", "another model")
    assert (other / "model.safetensors").exists()
    fails(capsys, HARD.replace("--output_dir out", "--output_dir CKPT --overwrite_output_dir"), "CKPT", "--restore")
    assert Path("CKPT/model.safetensors").exists()
    Path("file").write_text("")
    fails(capsys, HARD.replace("--output_dir out", "--output_dir file"), "file")


def test_prediction(capsys: pytest.CaptureFixture[str]) -> None:
    fails(capsys, "--restore CKPT --input nothing.txt", "nothing.txt", command="predict")
    write_checkpoint(Path("ENCODER"), head="encoder", **THRESHOLDS)
    Path("in.txt").write_text("good\n")
    fails(capsys, "--restore ENCODER --input in.txt", "ENCODER", "BertModel", command="predict")
