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


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (
            "train --task SST2 --data-dir glue --masking-mode soft --restore NOWHERE --lambda 0.1",
            "--seed=-1,--seed=4294967296,--lr=nan,--lr=inf,--lr=1e400,--epochs=0,--epochs=-1,--epochs=nan,--epochs=1e9,"
            "--lambda=-1,--temperature=0,--temperature=inf,--weight-decay=nan,--lr-threshold=-1,--save-steps=0,"
            "--train-length-quantile=0,--vocabulary-keep-rate=2,--bs=99999999999,--bs=1.5,--max-length=0,--output-dir=,"
            "--restore=,--teacher=,--data-dir=,--scoring-mode=x,--max-seq-length=0,--prune-mode=topp,--prune-layers=0,"
            "--token-keep-rate=nan,--final-token-threshold=-1,--summary-tokens=all,--vocabulary-threshold=-1,--thresholds=x",
        ),
        (
            "train --task SST2 --data-dir glue --restore NOWHERE --masking-mode hard",
            "--target-flops=0,--target-flops=1.5,--target-flops=nan,--schedule= --target-flops=0.5",
        ),
        ("predict --restore NOWHERE --input x.txt", "--bs=0,--bs=-1,--max-length=-3,--output=,--input=,--dens"),
        (
            "analyze --task SST2 --data-dir glue --restore NOWHERE --output-dir out",
            "--quantiles=0,--samples=-1,--samples=1.5,--names=,--output-dir=,--quan=2",
        ),
        (
            "sweep --task SST2 --data-dir glue --restore NOWHERE --output-dir out",
            "--trials=0,--methods=x,--methods=,--prune-margin=-1,--validate-on=x,--summary-tokens=x,--storage=,--seed=-1",
        ),
        (
            "calibrate --task SST2 --data-dir glue --restore NOWHERE --max-drop 1",
            "--max-drop=nan,--max-drop=0,--examples=31,--seed=-1,--summary-tokens=x,--prune-layers=0,--output-dir=",
        ),
        ("demo", "--output-dir=,--hu"),
    ],
)
def test_options_are_checked_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str], command: str, options: str
) -> None:
    name, *words = command.split()
    for option in options.split(","):
        flag = option.split("=")[0]
        # A key of config.json is named as it stands there; a flag with two spellings by the first.
        said = {"--save-steps": "--save-step", "--epochs": "--epoch"}.get(flag, flag.removeprefix("--"))
        capsys.readouterr()
        try:
            status = main([name, *words, *option.split()])
        except SystemExit as leaving:
            status = int(leaving.code or 0)
        error = capsys.readouterr().err
        assert status == 2 and len(error.splitlines()) == 1 and "NOWHERE" not in error, (option, error)
        assert said in error.replace("_", "-"), (option, error)


def test_the_last_of_an_option_counts_in_either_spelling(capsys: pytest.CaptureFixture[str]) -> None:
    fails(capsys, f"{HARD} --max_length 0 --max-length 500", "--max-length is 500")


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
