"""Two processes with the same global batch end where one process ends."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.lab import test_distillation
from tests.workspace import assert_same_training, write_checkpoint, write_sst2
from token_pruning.lab.cli import paper_main

SCRIPT = Path(__file__).parents[2] / "run.py"
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node=2"]
ACCELERATE = [
    "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no",
    "--dynamo_backend=no", "--main_process_port=0",
]  # fmt: skip
MODE = (
    "--task SST2 --masking_mode {} --lambda 0.1 --lr_threshold 1e-2 --epoch 2 --save_step 3 --lr 1e-4 --bs 8 "
    "--no_load --data_dir glue --restore CKPT"
)
TAUGHT = f"{test_distillation.LINE} {test_distillation.MODES['soft']} --save_step 3 --no_load"
# A process takes longer to start than to train, so one launch runs several command lines, until one of them fails.
ONE_AFTER_ANOTHER = """
import json, runpy, sys
script, lines = sys.argv[1], json.loads(sys.argv[2])
for line in lines:
    sys.argv = [script, *line]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_sst2(tmp_path / "glue")
    write_checkpoint(tmp_path / "CKPT", prune_mode="absolute_threshold", final_token_threshold=0.01)
    test_distillation.change_weights(write_checkpoint(tmp_path / "TEACHER"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def launch(launcher: list[str], *command: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", *launcher, *map(str, command)]
    return subprocess.run(line, capture_output=True, text=True, timeout=480, check=False)


def assert_equals_one_process(options: str, two: str, atol: float = 2e-5) -> None:
    one = f"{two} of one process"
    assert paper_main([*options.split(), "--output_dir", one]) == 0
    weights = load_file(Path(two, "model.safetensors"))
    assert_same_training(weights, load_file(Path(one, "model.safetensors")), atol)
    start = torch.tensor([0.0025, 0.005, 0.0075, 0.01])
    assert (weights["token_pruner.thresholds"] - start).abs().min() > 1e-3  # they were trained, not only carried along


def test_two_processes_equal_one_and_a_mistake_ends_both(folder: Path) -> None:
    lines = [
        [*MODE.format("soft").split(), "--output_dir", "soft"],
        [*MODE.format("mixed").split(), "--output_dir", "mixed"],
        [*TAUGHT.split(), "--output_dir", "taught"],
        [*MODE.format("soft").split(), "--output_dir", "mistaken", "--bs", "7"],
    ]
    (folder / "several.py").write_text(ONE_AFTER_ANOTHER)
    done = launch(TORCHRUN, "several.py", SCRIPT, json.dumps(lines))
    assert done.returncode != 0 and "--bs is 7" in done.stderr, done.stderr[-3000:]
    assert not Path("mistaken").exists()
    assert done.stderr.count("teacher:   0%") == 1  # in one of the two processes
    assert len(test_distillation.cached()) == 1
    assert_equals_one_process(MODE.format("soft"), "soft")
    assert_equals_one_process(MODE.format("mixed"), "mixed")
    assert_equals_one_process(TAUGHT, "taught", 2e-4)
    assert len(test_distillation.cached()) == 1


def test_two_processes_of_accelerate() -> None:
    done = launch(ACCELERATE, SCRIPT, *MODE.format("soft").split(), "--output_dir", "two")
    assert done.returncode == 0, done.stderr[-3000:]
    assert_equals_one_process(MODE.format("soft"), "two")
