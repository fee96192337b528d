"""Killed runs: what is on disk is always whole, and the same command continues it."""

import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from tests.workspace import assert_same_training, write_checkpoint, write_sst2
from token_pruning.errors import ConfigError
from token_pruning.lab.cli import main
from token_pruning.lab.training.run_dir import RunDir
from token_pruning.lab.training.trainer import PruningTrainer

OPTIONS = (
    "--task SST2 --masking_mode soft --lambda 0.1 --lr_threshold 1e-2 --epoch 3 --save_step 2 --lr 1e-4 --bs 8 "
    "--no_load --data_dir glue --restore CKPT"
)
COUNTS = ("global_step", "max_steps", "epoch", "eval_steps", "save_steps", "train_batch_size")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_sst2(tmp_path / "glue")
    write_checkpoint(tmp_path / "CKPT", prune_mode="absolute_threshold", final_token_threshold=0.01)
    return tmp_path


class Killed(BaseException):
    """As sudden as a signal, but in this process."""


def train(output: str) -> int:
    return main(["train", *OPTIONS.split(), "--output_dir", output])


@pytest.mark.parametrize("moment", ["while writing a checkpoint", "before publishing it", "while removing an old one"])
def test_a_killed_run_continues_to_the_same_result(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], moment: str
) -> None:
    assert train("whole") == 0

    killed_at = {
        "while writing a checkpoint": (PruningTrainer, "_save_rng_state"),
        "before publishing it": (RunDir, "publish"),
        "while removing an old one": (RunDir, "keep_only"),
    }[moment]
    original, calls = getattr(*killed_at), []

    def die_the_third_time(*args: object, **kwargs: object) -> object:
        calls.append(args)
        if len(calls) == 3:
            raise Killed
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(*killed_at, die_the_third_time)
        with pytest.raises(Killed):
            train("killed")
    published = 3 if moment == "while removing an old one" else 2
    assert [p.name for p in RunDir(Path("killed")).checkpoints()] == [
        f"checkpoint-{2 * n}" for n in range(1, published + 1)
    ]
    for checkpoint in RunDir(Path("killed")).checkpoints():
        assert {"config.json", "model.safetensors", "optimizer.pt", "trainer_state.json"} <= {
            p.name for p in checkpoint.iterdir()
        }

    assert json.loads(Path("killed/eval_results.json").read_text())["step"] == 6  # every evaluation is on disk

    capsys.readouterr()
    assert train("killed") == 0
    assert f"continuing from killed/checkpoint-{2 * published}" in capsys.readouterr().out
    assert not list(Path("killed").glob("incomplete-*"))
    assert_same_training(load_file("whole/model.safetensors"), load_file("killed/model.safetensors"))
    whole, resumed = (json.loads(Path(run, "trainer_state.json").read_text()) for run in ("whole", "killed"))
    assert [whole[name] for name in COUNTS] == [resumed[name] for name in COUNTS]
    for one, two in zip(whole["log_history"], resumed["log_history"], strict=True):
        assert (one["step"], one.keys()) == (two["step"], two.keys())
        assert one.get("learning_rate") == pytest.approx(two.get("learning_rate"))


def test_a_full_disk_is_one_line_and_the_run_continues(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original, free = PruningTrainer._save_optimizer_and_scheduler, [2**30]

    def fill_the_disk(self: PruningTrainer, output_dir: str) -> None:
        if self.state.global_step == 4:
            free[0] = 0
            raise RuntimeError("basic_ios::clear: iostream error")  # as torch.save puts it
        original(self, output_dir)

    with monkeypatch.context() as patch:
        patch.setattr(PruningTrainer, "_save_optimizer_and_scheduler", fill_the_disk)
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free[0]))
        assert train("out") == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert "checkpoint-4 cannot be written to out: the disk is full" in line
        assert {file.name for file in (folder / "out").glob("*checkpoint*")} == {"checkpoint-2"}
        free[0] = 2**30
        with pytest.raises(RuntimeError, match="iostream"):  # not for want of room
            patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**30))
            train("out")
        assert {file.name for file in (folder / "out").glob("*checkpoint*")} == {"checkpoint-2"}
    assert train("out") == 0
    assert "continuing from" in capsys.readouterr().out


def test_a_different_run_is_not_continued(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "finish", lambda self, identity: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            train("out")
    assert main(["train", *OPTIONS.split(), "--output_dir", "out", "--seed", "1"]) == 2
    error = capsys.readouterr().err
    assert "seed" in error
    assert "42" in error
    assert "--overwrite-output-dir" in error
    assert main(["train", *OPTIONS.split(), "--output_dir", "out", "--seed", "1", "--overwrite_output_dir"]) == 0


def test_a_run_folder_with_a_broken_file_is_refused(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "run.json").write_text("{")
    with pytest.raises(ConfigError, match=r"run\.json"):
        RunDir(folder / "out").check({}, overwrite=False)


def test_replacing_a_run_leaves_later_stages_alone(folder: Path) -> None:
    assert train("out") == 0
    (folder / "out" / "hard" / "lr_1e-05").mkdir(parents=True)
    assert main(["train", *OPTIONS.split(), "--output_dir", "out", "--overwrite_output_dir"]) == 0
    assert (folder / "out" / "hard" / "lr_1e-05").is_dir()
    assert len(list((folder / "out" / "runs").iterdir())) == 1


def test_files_that_no_run_wrote_are_not_deleted(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "thesis.tex").write_text("precious")
    assert main(["train", *OPTIONS.split(), "--output_dir", "out", "--overwrite_output_dir"]) == 0
    assert (folder / "out" / "thesis.tex").read_text() == "precious"


def test_a_checkpoint_that_is_broken_or_bent_is_not_continued_from(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "exploded",))

    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "keep_only", die)
        with pytest.raises(Killed):
            train("killed")
    folder = Path("killed/checkpoint-2")
    bomb = io.BytesIO()
    torch.save({"state": Bomb()}, bomb)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors", "trainer_state.json"):
        good = (folder / name).read_bytes()
        (folder / name).write_bytes(bomb.getvalue() if name.startswith(("sch", "rng")) else good[: len(good) // 2])
        capsys.readouterr()
        assert train("killed") == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
        assert len(errors) == 1 and f"{folder} cannot be continued" in errors[0]
        (folder / name).write_bytes(good)
    assert not (tmp_path / "exploded").exists()
    assert train("killed") == 0
