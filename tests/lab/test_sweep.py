"""Sweeps: every method, the report, killed and shared studies, the rules as pure functions."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from tests.workspace import edit_config, write_checkpoint, write_sst2
from token_pruning.errors import ConfigError
from token_pruning.lab.cli import main
from token_pruning.lab.data import TaskData, TextExamples, glue_task
from token_pruning.lab.sweep import report as sweep_report
from token_pruning.lab.sweep import study as sweep_study
from token_pruning.lab.sweep.methods import METHODS, Space
from token_pruning.lab.sweep.report import Row, TaskResults, pareto_plot
from token_pruning.lab.sweep.rules import hopeless, pareto_front
from token_pruning.lab.sweep.study import validate_on_training_set
from token_pruning.lab.training.options import TrainOptions
from token_pruning.lab.training.run_dir import RunDir

LINE = "sweep --restore CKPT --task SST2 --data-dir glue --output-dir out --bs 16 --lr 1e-4"

KILLED_IN_THE_THIRD_EPOCH = """
import os, signal, sys
from token_pruning.lab.cli import main
from token_pruning.lab.training.trainer import PruningTrainer
original = PruningTrainer.training_step
def step(self, *args, **kwargs):
    if self.state.epoch > 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *args, **kwargs)
PruningTrainer.training_step = step
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep_report, "pareto_plot", lambda tasks: b"")  # it takes longer than a trial
    write_sst2(tmp_path / "glue", train=80, dev=12)
    write_checkpoint(tmp_path / "CKPT")
    return tmp_path


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial without a heartbeat for a second counts as killed. Live ones beat often enough: others' grace is long."""
    for name, value in (("HEARTBEAT_SECONDS", 1), ("GRACE_SECONDS", 1), ("_POLL_SECONDS", 0.2)):
        monkeypatch.setattr(sweep_study, name, value)


class Killed(BaseException):
    """As sudden as a signal, but in this process."""


def sweep(*more: Any) -> int:
    return main([*LINE.split(), *map(str, more)])


def trials(output: str = "out") -> list[dict[str, str]]:
    with Path(output, "trials.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def stored(output: str = "out") -> list[Any]:
    file = Path(output, "study.db").resolve()
    return list(optuna.load_study(study_name="SST2", storage=f"sqlite:///{file}").trials)


def finished(output: str = "out") -> list[Any]:
    return [trial for trial in stored(output) if trial.state.name in ("COMPLETE", "PRUNED")]


def process(*more: Any, start: Sequence[str] = ("-m", "token_pruning")) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *start, *LINE.split(), *map(str, more)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_every_method_runs(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sweep_report, "pareto_plot", pareto_plot)
    assert sweep("--trials", 5, "--epoch", 2, "--prune-margin", 100) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 7  # the dense model, a line for every trial, where the report is
    assert [line.split(":")[1].split(",")[0].strip() for line in out[1:6]] == list(METHODS)

    rows = trials()
    assert [row["method"] for row in rows] == list(METHODS)
    assert {row["state"] for row in rows} == {"complete"}
    for row, trial in zip(rows, stored(), strict=True):
        assert [float(row["accuracy"]), float(row["relative_flops"])] == trial.values
        assert 0 < trial.values[1] < 1
        assert float(row["seconds"]) > 0
    by_method = {row["method"]: row for row in rows}
    assert 0.01 <= float(by_method["ltp"]["lambda"]) <= 1
    assert 1e-4 <= float(by_method["ltp"]["temperature"]) <= 1e-2
    assert by_method["ltp"]["target_flops"] == ""
    for method in ("budget", "calibrated"):
        assert abs(float(by_method[method]["target_flops"]) - float(by_method[method]["relative_flops"])) < 0.1
    assert by_method["budget"]["schedule"]
    directions = optuna.load_study(study_name="SST2", storage=f"sqlite:///{Path('out/study.db').resolve()}").directions
    assert [direction.name for direction in directions] == ["MAXIMIZE", "MINIMIZE"]

    with Path("out/pareto.csv").open(newline="") as file:
        dense, *front = csv.DictReader(file)
    assert (dense["front"], dense["relative_flops"], dense["drop_points"]) == ("dense", "1.0", "0.0")
    assert Counter(row["front"] for row in front if row["front"] != "all") == dict.fromkeys(METHODS, 1)
    assert all(
        float(row["drop_points"]) == pytest.approx(100 * (float(dense["accuracy"]) - float(row["accuracy"])), abs=1e-3)
        for row in front
    )
    assert "| – | dense |" in Path("out/pareto.md").read_text()
    assert Path("out/pareto.png").read_bytes().startswith(b"\x89PNG")
    assert not list(Path("out").rglob("*.safetensors"))
    assert not list(Path("out").glob("incomplete-*"))

    before = [trial.values for trial in stored()]  # more trials go on; what was not asked for again is refused
    assert sweep("--trials", 7, "--epoch", 2, "--methods", "calibrated", "--keep-checkpoints") == 0
    assert [trial.values for trial in stored()][:5] == before
    assert [row["method"] for row in trials()][5:] == ["calibrated"] * 2
    capsys.readouterr()
    assert main(["eval", *LINE.split()[3:7], "--restore", "out/trials/0005-calibrated"]) == 0
    capsys.readouterr()
    assert sweep("--trials", 8, "--epoch", 3) == 2
    error = capsys.readouterr().err
    assert "--epoch 2.0, not 3.0" in error
    assert "--study-name" in error


def test_first_trials_are_spread_over_the_strengths(folder: Path) -> None:
    assert sweep("--trials", 4, "--epoch", 1, "--methods", "topk", "--prune-margin", 100) == 0
    parts = sorted((float(row["token_keep_rate"]) + 3) / 3.9 for row in trials())
    gaps = [b - a for a, b in pairwise([*parts, parts[0] + 1])]
    assert min(gaps) > 0.2


@pytest.mark.parametrize("saved", [0.0, 0.5, 1.0])
def test_tokens_kept_out_of_the_first_layer_save_no_more_than_the_budget_asks_for(saved: float) -> None:
    choices = {"budget.summary_tokens": "none", "budget.target_flops": 0.6, "budget.saved_before_layers": saved}
    trial = optuna.trial.FixedTrial({**choices, "budget.schedule": "drain"})
    space = Space(TrainOptions(restore="CKPT", task="SST2", masking_mode="none"), 5, {"none": 0.1}, 0.8, None)
    options = METHODS["budget"](trial, space)
    assert isinstance(options, TrainOptions) and options.vocabulary_keep_rate == pytest.approx(1 - saved / 4)


def test_settings_for_all_methods(folder: Path) -> None:
    assert sweep("--trials", 2, "--epoch", 1, "--methods", "budget", "calibrated", "--summary-tokens", "shared",
                 "--validate-on", "dev", "--study-name", "SST2", "--keep-checkpoints") == 0  # fmt: skip
    assert "validation set" in Path("out/pareto.md").read_text()
    for row in trials():
        assert row.get("summary_tokens", "") == ""  # no choice
        name = f"{int(row['trial']):04d}-{row['method']}"
        assert '"summary_tokens": "shared"' in Path("out/trials", name, "config.json").read_text()
        assert '"examples": 12' in Path("out/trials", name, "eval_results.json").read_text()


def test_a_killed_sweep_continues(folder: Path, impatient: None, capsys: pytest.CaptureFixture[str]) -> None:
    more = (
        "--storage",
        f"sqlite:///{folder}/out/study.db",  # as if other processes might be there
        "--trials",
        3,
        "--epoch",
        4,
        "--prune-margin",
        100,
        "--methods",
        "calibrated",
        "manual",
    )
    killed = process(*more, start=("-c", KILLED_IN_THE_THIRD_EPOCH))
    killed.communicate(timeout=240)
    assert killed.returncode == -signal.SIGKILL
    before = stored()
    assert [trial.state.name for trial in before] == ["COMPLETE", "RUNNING"]
    run = RunDir(folder / "out/trials/0001-manual")
    checkpoints = run.checkpoints()
    assert len(checkpoints) == 2
    for checkpoint in checkpoints:  # whole
        json.loads((checkpoint / "trainer_state.json").read_text())
        load_file(checkpoint / "model.safetensors")
    assert not (run.path / "model.safetensors").exists()
    assert run.check(json.loads((run.path / "run.json").read_text())["options"], overwrite=False)

    assert sweep(*more) == 0
    after = stored()
    assert after[0].values == before[0].values
    assert after[1].state.name == "FAIL"
    assert len(finished()) == 3
    assert Counter(trial.user_attrs["method"] for trial in finished()) == {"calibrated": 2, "manual": 1}
    assert sum(trial.params == before[1].params for trial in finished()) == 1
    assert "continuing from" in Path("out/trials/0001-manual.log").read_text()
    assert Counter(row["state"] for row in trials()) == {"complete": 3, "continued": 1}
    assert "3 complete. " in Path("out/pareto.md").read_text()
    assert "(3 of 3)" in capsys.readouterr().out
    assert sweep(*more) == 0  # nothing is left to do
    assert len(stored()) == len(after)


def test_two_processes_share_a_study(folder: Path) -> None:
    storage = f"sqlite:///{folder / 'shared.db'}"
    more = ("--trials", 5, "--epoch", 1, "--methods", "calibrated", "topk", "--storage", storage)
    other = process(*more, "--output-dir", "other")
    while not (folder / "shared.db").exists() and other.poll() is None:
        time.sleep(0.01)
    assert sweep(*more) == 0
    out, _ = other.communicate(timeout=120)
    assert other.returncode == 0, out
    everything = optuna.load_study(study_name="SST2", storage=storage).trials
    complete = [trial for trial in everything if trial.state.name == "COMPLETE"]
    assert len(complete) == 5
    assert Counter(trial.user_attrs["method"] for trial in complete) == {"calibrated": 3, "topk": 2}
    assert [row["trial"] for row in trials()] == [row["trial"] for row in trials("other")]


def test_hopeless_trials_are_stopped(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sweep_study, "hopeless", lambda point, done, margin: bool(list(done)) and margin == 0.02)
    assert sweep("--trials", 3, "--epoch", 3, "--methods", "manual", "--prune-margin", 2) == 0
    assert [trial.state.name for trial in stored()] == ["COMPLETE", "PRUNED", "PRUNED"]
    assert all({"metric", "relative_flops", "seconds"} <= trial.user_attrs.keys() for trial in stored())
    assert [(row["state"], row["accuracy"] != "") for row in trials()] == [("complete", True), *[("pruned", True)] * 2]
    assert capsys.readouterr().out.count("after 2 epochs, stopped") == 2
    assert "1 complete, 2 pruned" in Path("out/pareto.md").read_text()


@pytest.mark.parametrize("moment", ["interrupted", "interrupted, then killed", "killed"])
def test_a_trial_that_was_stopped_is_continued_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], moment: str
) -> None:
    def interrupt(*args: Any) -> None:
        raise Killed if moment == "killed" else KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sweep_study._Sweep, "_run", interrupt)
        if moment != "interrupted":
            patch.setattr(sweep_study, "_requeue", lambda *_: None)
        with pytest.raises(Killed) if moment == "killed" else nullcontext():
            assert sweep("--trials", 1, "--methods", "calibrated") == 130
    expected = {"interrupted": ["FAIL", "WAITING"], "killed": ["RUNNING"]}.get(moment, ["FAIL"])
    assert [trial.state.name for trial in stored()] == expected
    assert sweep("--trials", 1, "--methods", "calibrated") == 0
    first, second = stored()
    assert (second.state.name, second.params) == ("COMPLETE", first.params)
    assert "waiting" not in capsys.readouterr().out


def test_a_trial_that_another_process_took_over_is_left_to_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a suspension: its heartbeats stopped, but it lives."""
    original, stolen = sweep_study._Sweep._run, []

    def steal(self: Any, run: Any, where: Path) -> Any:
        if not stolen:
            stolen.append(self.study.get_trials()[-1])
            storage = self.study._storage
            storage.set_trial_state_values(stolen[0]._trial_id, optuna.trial.TrialState.FAIL)
            sweep_study._requeue(self.study, stolen[0])
        return original(self, run, where)

    monkeypatch.setattr(sweep_study._Sweep, "_run", steal)
    assert sweep("--trials", 2, "--methods", "calibrated") == 0
    assert [trial.state.name for trial in stored()] == ["FAIL", "COMPLETE", "COMPLETE"]
    assert stored()[1].params == stolen[0].params


def test_trials_that_fail_end_the_sweep_after_three(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ConfigError("cannot be trained")

    monkeypatch.setattr(sweep_study, "train", fail)
    assert sweep("--trials", 9, "--methods", "manual") == 2
    captured = capsys.readouterr()
    assert captured.out.count("failed: cannot be trained") == 3
    assert captured.err.strip().splitlines()[-1] == "token-pruning: error: cannot be trained"
    assert [row["state"] for row in trials()][:2] == ["failed", "failed"]


# Bad input


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--methods", "ltp", "magic"], ["--methods is 'magic'", "ltp, budget, calibrated, topk, manual"]),
        (["--trials", "0"], ["--trials is 0", ">= 1"]),
        (["--validate-on", "test"], ["--validate-on is 'test'", "train, dev"]),
        (["--prune-margin", "-1"], ["--prune-margin is -1.0", ">= 0"]),
        (["--summary-tokens", "all"], ["--summary-tokens is 'all'", "none, shared, segment"]),
        (["--epoch", "0"], ["--epoch is 0.0"]),
        (["--storage", "nonsense"], ["--storage 'nonsense' cannot be opened", "sqlite:///FILE"]),
        (["--storage", "postgresql+nodriver://u:secret@h/x"], ["u:***@h", "cannot be opened"]),
        (["--storage", "sqlite:////nowhere/at/all.db"], ["--storage sqlite:////nowhere/at/all.db cannot be opened"]),
        (["--output-dir", "CKPT/config.json"], ["--output-dir is CKPT/config.json, a file"]),
        (["--restore", "nowhere"], ["nowhere"]),
        (["--train-file", "x.csv"], ["give either --task"]),
    ],
)
def test_mistakes_are_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], more: list[str], words: list[str]
) -> None:
    assert sweep(*more) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    for word in [*words, "token-pruning: error: "]:
        assert word in line
    assert "secret" not in line


def test_a_pruned_checkpoint_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_config(folder / "CKPT", prune_mode="absolute_threshold", thresholds=[0.1] * 4)
    assert sweep() == 2
    assert "pruned already" in capsys.readouterr().err


def test_without_optuna(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.delitem(sys.modules, "token_pruning.lab.sweep.study")
    assert sweep() == 2
    error = capsys.readouterr().err
    assert error == "token-pruning: error: optuna is missing; pip install 'token-pruning[sweep]'\n"


# Pure functions

POINTS = st.lists(st.tuples(st.integers(0, 6).map(float), st.integers(0, 6).map(float)), max_size=12)


@given(POINTS)
def test_the_front_is_what_nothing_dominates(points: list[tuple[float, float]]) -> None:
    def dominated(a: tuple[float, float]) -> bool:
        return any(b[0] >= a[0] and b[1] <= a[1] and b != a for b in points)

    found = pareto_front(points)
    assert sorted(found) == [place for place, point in enumerate(points) if not dominated(point)]
    assert [points[place][1] for place in found] == sorted(points[place][1] for place in found)


@given(st.tuples(st.integers(0, 6), st.integers(0, 6)), POINTS, st.integers(0, 4))
def test_the_rule_that_stops_trials(point: tuple[float, float], done: list[tuple[float, float]], margin: int) -> None:
    expected = False
    for metric, flops in done:
        no_dearer = not flops > point[1]
        better = metric > point[0] + margin
        expected = expected or (no_dearer and better)
    assert hopeless(point, done, margin) == expected


def test_the_rule_waits_for_the_middle_and_spares_the_last_evaluation() -> None:
    stop = sweep_study._StopHopeless("accuracy", lambda point: point == (0.5, 0.4))
    metrics = {"eval_accuracy": 0.5, "eval_relative_flops": 0.4}
    stopped = []
    for step in range(1, 6):
        state = type("State", (), {"global_step": step, "max_steps": 5, "epoch": float(step)})
        try:
            stop.on_evaluate(None, state, None, metrics)
        except sweep_study._Hopeless:
            stopped.append(step)
    assert stopped == [3, 4]


def test_the_held_out_slice() -> None:
    texts = [f"text {number}" for number in range(53)]
    data = TaskData(glue_task("SST2"), TextExamples(texts, None, [number % 2 for number in range(53)]), {})
    first, again, other = (validate_on_training_set(data, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert first.train is not None
    held = first.validation["held_out"]
    assert (len(first.train), len(held)) == (43, 10)
    assert sorted(first.train.first + held.first) == sorted(texts)
    few = TaskData(data.task, data.train.select(range(4)) if data.train else None, {})
    with pytest.raises(ConfigError, match="4 training examples"):
        validate_on_training_set(few, 0)


@pytest.mark.parametrize("tasks", [1, 2, 4])
def test_the_figure_takes_several_tasks_and_any_trials(tasks: int) -> None:
    rows = [
        Row(number, method, state, metric, 0.1 * number + 0.2, 1.0, {})
        for number, (method, state, metric) in enumerate(
            [("ltp", "complete", 0.8), ("ltp", "complete", 0.1), ("topk", "pruned", 0.7), ("manual", "failed", None)]
        )
    ]
    results = [TaskResults("A", "accuracy", 0.81, rows), *[TaskResults("B", "f1", 0.5, [])] * (tasks - 1)]
    assert pareto_plot(results) == pareto_plot(results)
