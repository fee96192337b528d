"""Distillation: the loss, what is kept of the teacher and when it is refused, and whole runs from the command line."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import token_pruning as tp
from tests.tiny import assert_equal, ragged_batch, tiny_model
from tests.workspace import assert_same_training, edit_config, write_checkpoint, write_sst2, write_stsb
from token_pruning.checkpoint import read_checkpoint
from token_pruning.errors import ConfigError
from token_pruning.lab.cli import main, paper_main
from token_pruning.lab.training import distillation, train
from token_pruning.lab.training.distillation import Distillation, distillation_loss
from token_pruning.lab.training.options import TrainOptions
from token_pruning.lab.training.run_dir import RunDir
from token_pruning.lab.training.trainer import PruningTrainer

LINE = "--arch pibert-base --task SST2 --lr 1e-3 --bs 8 --epoch 1 --data_dir glue --restore CKPT --teacher TEACHER"
MODES = {
    "none": "--masking_mode none",
    "soft": "--masking_mode soft --lambda 0.1 --lr_threshold 1e-2",
    "hard": "--masking_mode hard",
    "mixed": "--masking_mode mixed --lambda 0.1 --lr_threshold 1e-2",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_sst2(tmp_path / "glue")
    write_checkpoint(tmp_path / "CKPT", prune_mode="absolute_threshold", final_token_threshold=0.01)
    teacher = write_checkpoint(tmp_path / "TEACHER")
    change_weights(teacher)
    return tmp_path


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One entry for every time that a teacher ran."""
    original, calls = distillation._compute, []

    def count(*args: Any) -> Any:
        calls.append(original(*args))
        return calls[-1]

    monkeypatch.setattr(distillation, "_compute", count)
    return calls


def change_weights(checkpoint: Path, scale: float = 30.0) -> None:
    """Make the teacher sure of itself."""
    weights = load_file(checkpoint / "model.safetensors")
    weights["classifier.weight"] = weights["classifier.weight"] * scale
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})


def run(mode: str, output: str, *more: object) -> int:
    return paper_main([*LINE.split(), *MODES[mode].split(), "--output_dir", output, *map(str, more)])


def fails(capsys: pytest.CaptureFixture[str], status: int, *words: object) -> None:
    error = capsys.readouterr().err.strip().splitlines()
    assert status == 2
    assert error[-1].startswith("token-pruning: error: ")
    for word in words:
        assert str(word) in error[-1]


def cached(place: str = "TEACHER") -> list[Path]:
    return sorted(Path(place, "teacher_logits").iterdir())


def weights_of(output: str) -> dict[str, torch.Tensor]:
    return load_file(Path(output, "model.safetensors"))


# The loss


def probabilities(logits: list[float], temperature: float) -> list[float]:
    powers = [math.exp(logit / temperature) for logit in logits]
    return [power / sum(powers) for power in powers]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_loss_is_the_papers_formula(temperature: float) -> None:
    student, teacher = [[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]], [[0.2, 0.1, -1.0], [2.0, 0.0, -3.0]]
    total = 0.0
    for ours, theirs in zip(student, teacher, strict=True):
        p, q = probabilities(theirs, temperature), probabilities(ours, temperature)
        total += temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    loss = distillation_loss(torch.tensor(student), torch.tensor(teacher), temperature)
    assert loss.item() == pytest.approx(total / 2, rel=1e-5)
    mixed = Distillation(0.3, temperature).mix(torch.tensor(5.0), torch.tensor(student), torch.tensor(teacher))
    assert mixed.item() == pytest.approx(0.7 * 5 + 0.3 * total / 2, rel=1e-5)


def test_the_loss_of_a_regression_is_the_squared_error() -> None:
    student, teacher = torch.tensor([[1.0], [4.0]]), torch.tensor([[3.0], [3.5]])
    assert distillation_loss(student, teacher, None).item() == pytest.approx((4 + 0.25) / 2)


def test_the_loss_is_zero_and_flat_at_the_teacher_and_float32_for_half_precision() -> None:
    teacher = torch.tensor([[4.0, -4.0]], dtype=torch.bfloat16)
    student = teacher.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = distillation_loss(student, teacher, 2.0)
    assert loss.dtype == torch.float32
    assert loss.item() == 0
    loss.backward()
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-6


def test_at_full_weight_the_labels_do_not_matter(tmp_path: Path) -> None:
    batch = ragged_batch([5, 9, 3])
    taught = torch.tensor([[1.0, -1.0, 0.5], [0.0, 2.0, -2.0], [1.0, 1.0, -1.0]])
    gradients = []
    for labels in ([0, 1, 2], [2, 2, 0]):
        model = tiny_model().eval()
        trainer = PruningTrainer(
            model,
            hf.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"),
            run_dir=RunDir(tmp_path),
            evaluate_splits=lambda *_: {},
            distillation=Distillation(1.0, 2.0),
        )
        inputs = batch | {"labels": torch.tensor(labels), "teacher_logits": taught}
        trainer.compute_loss(model, inputs).backward()
        assert "teacher_logits" not in inputs
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert gradients[0]
    assert any(gradient.abs().max() > 0 for gradient in gradients[0])
    for one, two in zip(*gradients, strict=True):
        assert_equal(one, two)


# Options


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"distillation_weight": 0.5}, "--distillation-weight is 0.5; it applies to training with --teacher"),
        ({"distillation_temperature": 2.0}, "--distillation-temperature is 2.0; it applies to training with --teacher"),
        ({"teacher": "T", "distillation_weight": 0.0}, "--distillation-weight is 0.0; .* > 0 and <= 1"),
        ({"teacher": "T", "distillation_weight": 1.1}, "--distillation-weight is 1.1; .* > 0 and <= 1"),
        ({"teacher": "T", "distillation_temperature": 0.0}, "--distillation-temperature is 0.0; .* > 0"),
    ],
)
def test_options(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainOptions(restore="CKPT", masking_mode="hard", task="SST2", **values)


def test_the_teacher_is_part_of_a_runs_identity() -> None:
    options = TrainOptions(restore="CKPT", masking_mode="hard", task="SST2", teacher="T", distillation_weight=1)
    names = ("teacher", "distillation_weight", "distillation_temperature")
    assert {name: options.identity()[name] for name in names} == dict(zip(names, ("T", 1, None), strict=True))


# Whole runs


@pytest.mark.parametrize("mode", MODES)
def test_every_masking_mode_learns_from_the_teacher(folder: Path, mode: str) -> None:
    assert run(mode, "alone", "--distillation_weight", "1e-9") == 0
    assert run(mode, "taught", "--distillation_weight", 1, "--save_step", 2) == 0
    alone, taught = weights_of("alone"), weights_of("taught")
    assert alone.keys() == taught.keys()
    assert (alone["classifier.weight"] - taught["classifier.weight"]).abs().max() > 1e-4
    history = json.loads(Path("taught/trainer_state.json").read_text())["log_history"]
    assert all(math.isfinite(entry["loss"]) for entry in history if "loss" in entry)
    assert "teacher_logits" not in Path("taught/eval_results.json").read_text()


def test_a_student_comes_closer_to_its_teacher(folder: Path) -> None:
    """At α = 1 without a regularizer the logged loss is the distance itself."""
    more = ("--distillation_weight", 1, "--epoch", 6, "--save_step", 4)
    assert run("none", "out", *more) == 0
    history = json.loads(Path("out/trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[-1] < 0.2 * losses[0]


def test_the_loss_that_is_logged_is_the_total(folder: Path) -> None:
    """One step over all examples: both parts can be had from the saved logits and the model before the step."""
    assert run("hard", "out", "--bs", 32, "--distillation_weight", 0.25, "--distillation_temperature", 3) == 0
    history = json.loads(Path("out/trainer_state.json").read_text())["log_history"]
    logged = next(entry["loss"] for entry in history if "loss" in entry)
    rows = [line.split("\t") for line in Path("glue/SST-2/train.tsv").read_text().splitlines()[1:]]
    tokenizer = hf.AutoTokenizer.from_pretrained("CKPT")
    batch = tokenizer([text for text, _ in rows], padding=True, return_tensors="pt")
    model = tp.from_pretrained("CKPT").train()
    with torch.no_grad():
        output = model(**batch, labels=torch.tensor([int(label) for _, label in rows]))
    taught = load_file(cached()[0])["logits"]
    expected = 0.75 * output.loss + 0.25 * distillation_loss(output.logits, taught, 3.0)
    assert logged == pytest.approx(expected.item(), abs=1e-4)


def test_a_regression(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_stsb(folder / "glue")
    for name in ("ONE", "ONE_TEACHER"):
        write_checkpoint(folder / name, labels=1, prune_mode="absolute_threshold", final_token_threshold=0.01)
    options = ("--task", "STSB", "--restore", "ONE", "--teacher", "ONE_TEACHER")
    assert run("hard", "out", *options) == 0
    assert load_file(cached("ONE_TEACHER")[0])["logits"].shape == (24, 1)
    status = run("hard", "other", *options, "--distillation_temperature", 2)
    fails(capsys, status, "--distillation-temperature is 2.0", "STSB", "regression")
    assert not Path("other").exists()


# What is kept of the teacher


def test_the_teacher_runs_once_for_all_runs(folder: Path, computed: list[Any]) -> None:
    edit_config(folder / "CKPT", hidden_dropout_prob=0.1)
    assert run("hard", "first") == 0
    assert run("hard", "second") == 0
    assert len(computed) == len(cached()) == 1
    # Having computed them leaves no trace, in no random state.
    assert_same_training(weights_of("first"), weights_of("second"), 2e-4)
    rows = [line.split("\t")[0] for line in Path("glue/SST-2/train.tsv").read_text().splitlines()[1:]]
    model = hf.AutoModelForSequenceClassification.from_pretrained("TEACHER").eval()
    tokenizer = hf.AutoTokenizer.from_pretrained("TEACHER")
    with torch.no_grad():
        expected = torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in rows])
    assert torch.allclose(load_file(cached()[0])["logits"], expected, atol=1e-3)  # in the examples' order

    edit_config(folder / "TEACHER", prune_mode="topk", token_keep_rate=0.5)  # still the same dense model
    assert run("hard", "edited") == 0
    assert len(computed) == len(cached()) == 1
    assert run("hard", "half", "--bf16") == 0  # other outputs, another file
    assert len(computed) == len(cached()) == 2
    file = folder / "glue" / "SST-2" / "train.tsv"
    file.write_text(file.read_text().replace("good", "fine"))
    assert run("hard", "third") == 0
    assert len(computed) == len(cached()) == 3
    model = hf.AutoModelForSequenceClassification.from_pretrained("TEACHER")  # nothing there is taken for weights
    assert main(["eval", "--task=SST2", "--data-dir=glue", "--restore=TEACHER", "--masking-mode=none"]) == 0


@pytest.mark.parametrize("change", ["weights", "config", "header", "shape", "bytes"])
def test_what_another_teacher_said_is_refused(folder: Path, capsys: pytest.CaptureFixture[str], change: str) -> None:
    assert run("hard", "first") == 0
    (file,) = cached()
    words = {"weights": "other weights", "config": "another config.json", "header": "None", "shape": "[3, 2]"}
    if change == "weights":
        change_weights(Path("TEACHER"), 2.0)
    elif change == "config":
        edit_config(Path("TEACHER"), layer_norm_eps=1e-3)
    elif change == "header":
        save_file(load_file(file), file)
    elif change == "shape":
        with safe_open(file, "pt") as content:
            metadata = content.metadata()
        save_file({"logits": torch.zeros(3, 2)}, file, metadata)
    else:
        file.write_bytes(file.read_bytes()[:-8])
    status = run("hard", "second")
    fails(capsys, status, file.name, "delete it", words.get(change, "cannot be read"))
    assert cached() == [file]
    file.unlink()
    assert run("hard", "second") == 0


def test_a_half_written_file_is_never_read(folder: Path, computed: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    def die(path: Path, target: Path) -> None:
        if path.suffix == ".safetensors":
            raise Killed
        original(path, target)

    original = Path.replace
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", die)
        with pytest.raises(Killed):
            run("hard", "out")
    (folder / "TEACHER" / "teacher_logits" / "incomplete-0-rest.safetensors").write_bytes(b"half")  # as SIGKILL leaves
    assert run("hard", "out") == 0
    assert len(computed) == 2
    assert len(cached()) == 2


def test_where_the_teachers_folder_cannot_be_written(
    folder: Path, computed: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "TEACHER" / "teacher_logits").write_text("in the way")  # also root cannot write below it
    assert run("hard", "out") == 0
    assert len(cached("out")) == 1
    assert run("hard", "out", "--overwrite_output_dir") == 0  # what a replaced run has left goes with it
    assert len(cached("out")) == 1
    assert len(computed) == 2


def test_a_killed_run_continues_without_the_teacher(
    folder: Path, computed: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Killed(BaseException):
        pass

    more = ("--save_step", 2, "--no_load")
    assert run("soft", "whole", *more) == 0
    original, calls = PruningTrainer._save_rng_state, []

    def die_the_second_time(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise Killed
        original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(PruningTrainer, "_save_rng_state", die_the_second_time)
        with pytest.raises(Killed):
            run("soft", "killed", *more)
    capsys.readouterr()
    fails(capsys, run("soft", "killed", *more, "--distillation_weight", 0.9), "distillation_weight", "0.9", "None")
    assert run("soft", "killed", *more) == 0
    assert "continuing from killed/checkpoint-2" in capsys.readouterr().out
    assert len(computed) == 1
    assert_same_training(weights_of("whole"), weights_of("killed"), 2e-4)


# Which teachers


def test_teachers_that_cannot_teach(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(folder / "THREE", labels=3)
    fails(capsys, run("hard", "out", "--teacher", "THREE"), "--teacher THREE has 3 outputs", "CKPT", "2")
    write_checkpoint(folder / "ENCODER", head="encoder")
    fails(capsys, run("hard", "out", "--teacher", "ENCODER"), "--teacher ENCODER is BertModel")
    fails(capsys, run("hard", "out", "--teacher", "NOWHERE"), "NOWHERE")
    fails(capsys, run("hard", "TEACHER", "--overwrite_output_dir"), "--teacher", "--output-dir")
    assert not Path("out").exists()
    edit_config(write_checkpoint(folder / "SHORT"), max_position_embeddings=4)
    weights = load_file("SHORT/model.safetensors")
    name = "bert.embeddings.position_embeddings.weight"
    save_file(weights | {name: weights[name][:4].clone()}, "SHORT/model.safetensors", {"format": "pt"})
    fails(capsys, run("hard", "out", "--teacher", "SHORT"), "SHORT", "at most 4", "--max-length")


@pytest.mark.parametrize(
    ("teacher", "student", "swapped"),
    [
        ({"0": "negative", "1": "positive"}, {"0": "Positive", "1": "Negative"}, True),
        ({"0": "POSITIVE", "1": "NEGATIVE"}, {}, True),
        ({"0": "POSITIVE", "1": "NEGATIVE"}, {"0": "positive", "1": "negative"}, False),
        ({}, {"0": "positive", "1": "negative"}, True),  # outputs without names are in the task's order
        ({"0": "no", "1": "yes"}, {}, False),
        ({}, {}, False),
    ],
)
def test_the_teachers_outputs_take_the_students_order(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    teacher: dict[str, str],
    student: dict[str, str],
    swapped: bool,
) -> None:
    for name, labels in (("TEACHER", teacher), ("CKPT", student)):
        if labels:
            edit_config(folder / name, id2label=labels, label2id={label: int(n) for n, label in labels.items()})
    features: list[Any] = []

    class Seen(Exception):
        pass

    def stop(*args: Any, train_dataset: Any, **kwargs: Any) -> None:
        features.extend(train_dataset)
        raise Seen

    monkeypatch.setattr(train, "PruningTrainer", stop)
    with pytest.raises(Seen):
        run("hard", "out")
    given = np.array([feature["teacher_logits"] for feature in features], dtype=np.float32)
    said = load_file(cached()[0])["logits"].numpy()
    assert np.array_equal(given, said[:, ::-1] if swapped else said)
    assert ("they are taken for" in caplog.text) == ("no" in teacher.values())


@pytest.mark.parametrize("key", ["teacher", "restore"])
def test_the_default_teacher_is_never_a_pruned_one(folder: Path, key: str) -> None:
    def ran(name: str, **options: Any) -> None:
        (folder / name / "run.json").write_text(json.dumps({"options": {"masking_mode": "hard", **options}}))

    write_checkpoint(folder / "PRUNED")
    ran("CKPT", **{key: "PRUNED"})
    ran("PRUNED", restore="TEACHER")
    assert distillation.default_teacher(read_checkpoint("CKPT")) == "TEACHER"
    for options in ({}, {"restore": 3}, {"restore": "PRUNED"}):
        ran("PRUNED", **options)
        with pytest.raises(ConfigError, match="does not say by which dense model"):
            distillation.default_teacher(read_checkpoint("CKPT"))
