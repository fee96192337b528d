"""A teacher's hidden states: the loss against a loop over tokens, and whole runs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import token_pruning as tp
from tests.lab.test_distillation import fails, run, weights_of
from tests.lab.test_distillation import folder as folder  # a fixture
from tests.tiny import VOCABULARY, ragged_batch, tiny_model
from tests.workspace import assert_same_training, edit_config, killed_before_publishing, write_checkpoint, write_sst2
from token_pruning.errors import ConfigError
from token_pruning.lab.cli import main
from token_pruning.lab.training.options import TrainOptions
from token_pruning.lab.training.states import StatesLoss

GATE = tp.VocabularyGate(torch.rand(VOCABULARY, generator=torch.Generator().manual_seed(0)), 0.3)
PRUNERS = {
    "nothing dropped": tp.Unpruned(),
    "some in every layer": tp.TopK(token_keep_rate=0.4),
    "by entry, too": tp.FixedThreshold(thresholds=[0.8] * 4, scoring_mode="relative", vocabulary=GATE),
    "summary tokens": tp.TopK(token_keep_rate=0.4, summary_tokens="segment"),
}


def by_hand(student: Any, trace: Any, teacher: Any, batch: dict[str, Any], states: dict[int, Any]) -> torch.Tensor:
    """Token by token: the teacher's states are its own ``hidden_states``, over padding."""
    with torch.no_grad():
        theirs = teacher(**batch, output_hidden_states=True).hidden_states
    layers = []
    for number, (places, rows) in states.items():
        width = batch["input_ids"].shape[1]
        wanted = torch.stack([theirs[number][place // width, place % width] for place in places.tolist()])
        assert len(places) == sum(int(left >= number) for row in trace.survived_layers for left in row)
        layers.append(((rows - wanted) ** 2).mean() / wanted.var())
    return torch.stack(layers).mean()


@pytest.mark.parametrize("reads", ["all", "first"])
@pytest.mark.parametrize("name", PRUNERS)
def test_the_loss_is_that_of_a_loop_over_tokens(name: str, reads: Any) -> None:
    student, teacher = tiny_model("bert", "encoder", seed=1), tiny_model("bert", "encoder", seed=2)
    plain = tiny_model("bert", "encoder", seed=2)
    batch = ragged_batch((5, 17, 1, 9))
    tp.prune(student, PRUNERS[name], reads=reads)
    loss = StatesLoss(teacher, 2.0)
    with loss.watching(student) as passes, tp.record(student) as trace:
        student(**batch)
    [seen] = passes
    assert list(seen.states_after) == ([1, 2, 3] if reads == "first" else [1, 2, 3, 4])
    found = loss.of(seen, batch)
    torch.testing.assert_close(found, 2.0 * by_hand(student, trace, plain, batch, seen.states_after))
    found.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in student.parameters())
    with tp.record(student):
        student(**batch)
    assert len(passes) == 1  # nothing is watched outside


def test_a_copy_of_the_teacher_loses_nothing_where_nothing_is_dropped() -> None:
    student, batch = tp.prune(tiny_model("roberta", "encoder", seed=3), tp.Unpruned()), ragged_batch((4, 8))
    loss = StatesLoss(tiny_model("roberta", "encoder", seed=3), 1.0)
    with loss.watching(student) as passes:
        student(**batch)
    assert loss.of(passes[0], batch).item() < 1e-10


def test_a_run_learns_states_and_a_killed_one_goes_on(folder: Path) -> None:
    """Labels and logits say nothing here: what is learned is the teacher's states."""
    line = ("--distillation_weight", "1e-9", "--epoch", 2, "--save_step", 3)
    assert run("hard", "without", *line) == 0
    assert run("hard", "out", *line, "--teacher_states", 5) == 0
    assert (weights_of("out")["bert.encoder.layer.0.output.dense.weight"]
            - weights_of("without")["bert.encoder.layer.0.output.dense.weight"]).abs().max() > 1e-4  # fmt: skip
    history = json.loads(Path("out/trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[-1] < losses[0]
    with killed_before_publishing(2):
        run("hard", "killed", *line, "--teacher_states", 5)
    assert run("hard", "killed", *line, "--teacher_states", 5) == 0
    assert_same_training(weights_of("killed"), weights_of("out"))


def test_with_a_budget_the_dense_model_teaches(folder: Path) -> None:
    write_sst2(folder / "glue", train=96)
    line = "--task SST2 --data-dir glue --restore TEACHER --masking-mode hard --target-flops 0.7 --context --lr 1e-3"
    for name, more in (("plain", []), ("states", ["--teacher-states", "1"])):
        assert main(["train", *line.split(), "--epoch", "1", "--output-dir", name, *more]) == 0
    key = "bert.encoder.layer.1.output.dense.weight"
    assert (weights_of("plain")[key] - weights_of("states")[key]).abs().max() > 1e-5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"masking_mode": "hard"}, "--teacher-states is 1.0; it applies to training with --teacher"),
        ({"masking_mode": "soft", "regularization": 0.1, "teacher": "T"}, "masking mode hard, not to 'soft'"),
        ({"masking_mode": "none", "teacher": "T"}, "masking mode hard, not to 'none'"),
    ],
)
def test_options(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainOptions(restore="CKPT", task="SST2", teacher_states=1.0, **values)


def test_teachers_whose_states_cannot_be_learned(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    states = ("--teacher_states", 1)
    write_checkpoint(folder / "DEEP", num_hidden_layers=5)
    fails(capsys, run("hard", "out", *states, "--teacher", "DEEP"), "--teacher-states", "5 layers", "CKPT", "4")
    words = (folder / "TEACHER/vocab.txt").read_text().splitlines()
    (folder / "TEACHER/vocab.txt").write_text("\n".join([*words[:-1], "another"]) + "\n")
    tokenizer = folder / "TEACHER/tokenizer.json"
    if tokenizer.exists():
        tokenizer.write_text(tokenizer.read_text().replace(f'"{words[-1]}"', '"another"'))
    fails(capsys, run("hard", "out", *states), "--teacher-states", "TEACHER", "vocabulary")
    edit_config(folder / "CKPT", max_tokens=16)
    fails(capsys, run("hard", "out", *states), "--teacher-states", "max_tokens")
    assert not [*Path("out").glob("*")]
