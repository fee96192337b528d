"""Two processes with the same global batch end where one process ends."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.workspace import assert_same_training, write_checkpoint, write_sst2
from token_pruning.lab.cli import main

ROOT = Path(__file__).parents[2]
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node=2"],
    "accelerate": [
        "accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no",
        "--dynamo_backend=no", "--main_process_port=0",
    ],
}  # fmt: skip


@pytest.mark.parametrize(("launcher", "mode"), [("torchrun", "soft"), ("torchrun", "mixed"), ("accelerate", "soft")])
def test_two_processes_equal_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launcher: str, mode: str) -> None:
    write_sst2(tmp_path / "glue")
    write_checkpoint(tmp_path / "CKPT", prune_mode="absolute_threshold", final_token_threshold=0.01)
    options = (
        f"--task SST2 --masking_mode {mode} --lambda 0.1 --lr_threshold 1e-2 --epoch 2 --save_step 3 --lr 1e-4 --bs 8 "
        f"--no_load --data_dir {tmp_path / 'glue'} --restore {tmp_path / 'CKPT'} --output_dir"
    ).split()
    monkeypatch.chdir(tmp_path)
    assert main(["train", *options, "one"]) == 0
    command = [sys.executable, "-m", *LAUNCHERS[launcher], str(ROOT / "run.py"), *options, "two"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (load_file(tmp_path / folder / "model.safetensors") for folder in ("one", "two"))
    assert_same_training(one, two)
    start = torch.tensor([0.0025, 0.005, 0.0075, 0.01])
    assert (two["token_pruner.thresholds"] - start).abs().min() > 1e-3  # they were trained, not only carried along


def test_a_mistake_ends_every_process(tmp_path: Path) -> None:
    write_sst2(tmp_path / "glue")
    write_checkpoint(tmp_path / "CKPT", prune_mode="absolute_threshold", final_token_threshold=0.01)
    options = ["--task=SST2", "--lr=1e-4", "--bs=7", "--data_dir=glue", "--restore=CKPT"]
    command = [sys.executable, "-m", *LAUNCHERS["torchrun"], str(ROOT / "run.py"), *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode != 0
    assert "--bs is 7" in done.stderr
