"""Commands that are killed at random moments and started again until they are done.

``python -m tests.fuzz.kills --seconds 600 --seed 0`` kills for so long and prints one line per kind of command. After
every kill nothing half-written has a final name; in the end the results are those of a run that was left alone.

Half of the kills come after a random time, half at a random operation on a file. This process imports everything once
and forks a child per start, so that a kill costs about a second.
"""

import argparse
import gc
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import scipy.stats
import sklearn.metrics
import torch
import torch.utils.tensorboard
from safetensors import safe_open
from safetensors.torch import load_file

import token_pruning.lab.predict
import token_pruning.lab.sweep.study
import token_pruning.lab.training.calibrated
from tests.workspace import write_checkpoint, write_sst2
from token_pruning.lab.cli import main
from token_pruning.lab.files import STAGING_PREFIX
from token_pruning.lab.sweep import report as sweep_report
from token_pruning.lab.training.run_dir import RunDir

IMPORTED = (scipy, sklearn, torch.utils.tensorboard, token_pruning)  # here, not in every child
SAVED_EVERY = 2  # steps
_TRAIN = f"--task SST2 --data-dir glue --lr 1e-4 --bs 8 --save-step {SAVED_EVERY} --output-dir out"
_SWEEP = "--task SST2 --data-dir glue --restore DENSE --output-dir out --trials 3 --epoch 1 --bs 16 --lr 1e-4"
COMMANDS = {
    "dense": f"train --restore DENSE --masking-mode none --epoch 1 {_TRAIN}",
    "soft": f"train --restore CKPT --masking-mode soft --target-flops 0.6 --epoch 1 --no-load {_TRAIN}",
    "hard": f"train --restore CKPT --masking-mode hard --epoch 1 {_TRAIN}",
    "mixed": f"train --restore CKPT --masking-mode mixed --target-flops 0.6 --epoch 1 --no-load {_TRAIN}",
    "sweep": f"sweep {_SWEEP} --methods calibrated manual --summary-tokens none --prune-margin 100",
    "calibrate": "calibrate --restore DENSE --task SST2 --data-dir glue --target-flops 0.6 --output-dir out",
    "predict": "predict --restore CKPT --input in.txt --output out/found.jsonl",
    "eval": "eval --restore CKPT --task SST2 --data-dir glue --output-dir out",
}
_SHARES = {
    "soft": 2,
    "mixed": 2,
    "hard": 2,
    "dense": 2,
    "sweep": 2,
    "calibrate": 1,
    "predict": 1,
    "eval": 1,
}  # how often
_WRITES = os.O_WRONLY | os.O_RDWR


@dataclass
class Ended:
    """One process: how it ended, and what it said."""

    signal: int
    status: int
    out: str
    err: str
    seconds: float


@dataclass
class Tally:
    """What happened to one kind of command."""

    kills: Counter[str] = field(default_factory=Counter)
    finished: int = 0
    failures: list[str] = field(default_factory=list)


def prepare(folder: Path) -> Path:
    """What the commands read."""
    write_sst2(folder / "glue", train=64, dev=12)
    write_checkpoint(folder / "CKPT", prune_mode="absolute_threshold", final_token_threshold=0.01)
    write_checkpoint(folder / "DENSE")
    (folder / "in.txt").write_text("good cat\nbad dog on the mat\n" * 20, encoding="utf-8")
    return folder


def start(command: str, folder: Path, kill: tuple[int, float] | tuple[int, int] | None = None) -> Ended:
    """Run a command in a child of this process.

    Args:
        command: the command line.
        folder: where it runs.
        kill: a signal, and the second (float) or the number of the file operation (int) at which it is sent.
    """
    out, err = folder / "stdout", folder / "stderr"
    for file in (out, err):
        file.write_text("")
    began = time.monotonic()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # a child that has not begun would not know what to say
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # other threads: those of pytest-xdist
        pid = os.fork()
    if pid == 0:
        _child(command.split(), folder, out, err, kill)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    if kill is not None and isinstance(kill[1], float):
        waited = 0
        while waited == 0 and time.monotonic() - began < kill[1]:
            time.sleep(0.005)
            waited, status = os.waitpid(pid, os.WNOHANG)
        if waited == 0:
            os.kill(pid, kill[0])
            _, status = os.waitpid(pid, 0)
    else:
        _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    seconds = time.monotonic() - began
    return Ended(max(0, -code), code, out.read_text("utf-8"), err.read_text("utf-8"), seconds)


def _child(argv: list[str], folder: Path, out: Path, err: Path, kill: tuple[int, float] | None) -> None:
    """The process of a command; it never returns."""
    status = 1
    try:
        os.chdir(folder)
        for file, descriptor in ((out, 1), (err, 2)):
            os.dup2(os.open(file, os.O_WRONLY), descriptor)
        sys.stdout, sys.stderr = (os.fdopen(os.dup(n), "w", encoding="utf-8", buffering=1) for n in (1, 2))
        sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
        warnings.simplefilter("default")
        _count_file_operations(folder, kill)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        status = main(argv)
        sys.stdout.flush()
    except KeyboardInterrupt as stop:
        status = 130
        if any(frame.f_code is main.__code__ for frame, _ in traceback.walk_tb(stop.__traceback__)):
            traceback.print_exc()  # it came out of the command
        else:
            print("interrupted", file=sys.stderr)  # before it
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _count_file_operations(folder: Path, kill: tuple[int, float] | None) -> None:
    """Send the signal at the operation that was asked for; else say how many there were."""
    count = 0
    wanted = kill[1] if kill is not None and not isinstance(kill[1], float) else None

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITES
        if not opened and event not in ("os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            return
        count += 1
        if wanted is None:
            os.pwrite(counted, f"{count:9}".encode(), 0)
        elif count == wanted:
            assert kill is not None
            os.kill(os.getpid(), kill[0])

    counted = os.open(folder / "operations", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    sys.addaudithook(hook)


class Fuzzer:
    """Kinds of commands, each with what it does when it is left alone."""

    def __init__(self, folder: Path, seed: int) -> None:
        """Nothing is run yet."""
        self.folder, self.random = folder, random.Random(seed)
        self.given = prepare(folder / "given")
        self.alone: dict[str, tuple[dict[str, Any], float, int]] = {}
        self.tallies = {kind: Tally() for kind in COMMANDS}

    def undisturbed(self, kind: str) -> tuple[dict[str, Any], float, int]:
        """The command's results, its seconds, and how many operations on files it takes."""
        if kind not in self.alone:
            folder = self.workspace()
            ended = start(COMMANDS[kind], folder)
            assert ended.status == 0, ended.err
            operations = int((folder / "operations").read_text())
            self.alone[kind] = results(kind, folder), ended.seconds, operations
            shutil.rmtree(folder)
        return self.alone[kind]

    def workspace(self) -> Path:
        """A fresh folder."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        shutil.copytree(self.given, folder, dirs_exist_ok=True)
        return folder

    def episode(self, kind: str, kills: int, *, by_time: bool = True, signals: tuple[int, ...] = ()) -> None:
        """One command from its first start to its end, with so many kills at most."""
        expected, seconds, operations = self.undisturbed(kind)
        tally, folder = self.tallies[kind], self.workspace()
        done, history = 0, []
        reached: list[int] = []
        while True:
            kill: tuple[int, Any] | None = None
            if done < kills:
                sent = self.random.choice(signals or (signal.SIGKILL, signal.SIGINT, signal.SIGINT))
                timed = by_time and self.random.random() < 0.5
                at = self.random.uniform(0, 1.05 * seconds) if timed else self.random.randint(1, operations + 1)
                kill = (sent, at)
            before = RunDir(folder / "out").checkpoints()
            ended = start(COMMANDS[kind], folder, kill)
            hit = ended.signal == signal.SIGKILL or ended.status in (130, 143)
            history.append(f"{signal.Signals(kill[0]).name if kill else 'no signal'} at {kill[1] if kill else '-'}"
                           f"{'' if hit or not kill else ' (too late)'}")  # fmt: skip
            finished = ended.status == 0 or (ended.status == 2 and "holds a finished run" in ended.err)
            problems = list(self._problems(kind, folder, ended, hit, finished, before, reached))
            if finished and not problems:
                found = results(kind, folder)
                problems += [f"{key}: {found.get(key)!r:.300} is not {expected.get(key)!r:.300}"
                             for key in expected | found if found.get(key) != expected.get(key)]  # fmt: skip
            if problems:
                tally.failures.append(f"{kind}, {', '.join(history)}: {'; '.join(problems)}\n  in {folder}")
                return
            if hit:
                done += 1
                tally.kills[signal.Signals(kill[0]).name if kill else "?"] += 1
            if finished:
                tally.finished += 1
                shutil.rmtree(folder)
                return

    def _problems(
        self, kind: str, folder: Path, ended: Ended, hit: bool, finished: bool, before: list[Path], reached: list[int]
    ) -> Iterator[str]:
        if not hit and not finished:
            yield f"it ended with {ended.status}: {ended.err[-2000:]}"
        if "Traceback" in ended.err or "Exception ignored" in ended.err:
            yield f"a traceback: {ended.err[-3000:]}"
        if ended.status == 130:
            (*_, last) = ended.err.strip().splitlines() or [""]
            if not last.startswith("interrupted") and ended.err:
                yield f"it did not say that it was interrupted: {ended.err[-500:]!r}"
            if "continues from" in last and not (folder / last.split("continues from ")[1]).is_dir():
                yield f"it cannot continue: {last}"
        yield from half_written(folder)
        if finished:
            yield from (f"left over: {path}" for path in folder.rglob(STAGING_PREFIX + "*"))
        if kind in ("dense", "soft", "hard", "mixed"):
            # At most one interval is lost: what was logged before is in a checkpoint.
            last = int(before[-1].name.split("-")[1]) if before else 0
            if reached and last < max(reached) - SAVED_EVERY:
                yield f"step {max(reached)} was reached, and {last} is the last checkpoint"
            if before and "step " in ended.out and f"continuing from out/{before[-1].name}\n" not in ended.out:
                yield f"it did not continue from {before[-1]}"
            steps = [line.split()[1] for line in ended.out.splitlines() if line.startswith("step ")]
            reached += [int(step) for step in steps if step.isdigit()]


def half_written(folder: Path) -> Iterator[str]:
    """Files with a final name that are not whole."""
    for path in folder.rglob("*"):
        if any(part.startswith(STAGING_PREFIX) for part in path.relative_to(folder).parts) or not path.is_file():
            continue
        try:
            if path.suffix == ".json":
                json.loads(path.read_text("utf-8"))
            elif path.suffix == ".jsonl":
                [json.loads(line) for line in path.read_text("utf-8").splitlines()]
            elif path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as file:
                    [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118 - no mapping
        except Exception as error:
            yield f"{path} is half-written: {error}"
    for checkpoint in folder.rglob("checkpoint-*"):
        names = {"config.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"}
        if not checkpoint.is_dir() or any(part.startswith(STAGING_PREFIX) for part in checkpoint.parts):
            continue
        if missing := {*names, "trainer_state.json"} - {path.name for path in checkpoint.iterdir()}:
            yield f"{checkpoint} lacks {', '.join(sorted(missing))}"


def results(kind: str, folder: Path) -> dict[str, Any]:
    """What must not depend on kills, by file."""
    found: dict[str, Any] = {}
    if kind == "sweep":
        lines = (folder / "out/trials.csv").read_text("utf-8").splitlines()
        names = lines[0].split(",")
        rows = [dict(zip(names, line.split(","), strict=True)) for line in lines[1:]]
        kept = [[value for name, value in row.items() if name not in ("trial", "seconds")] for row in rows]
        return {"finished trials": sorted(row for row in kept if "complete" in row)}
    for path in sorted((folder / "out").iterdir()):
        if path.name in ("eval_results.json", "calibration.json", "config.json", "run.json"):
            found[path.name] = _without_seconds(json.loads(path.read_text("utf-8")))
        elif path.suffix == ".jsonl":
            found[path.name] = path.read_text("utf-8")
        elif path.suffix == ".safetensors":
            found[path.name] = {name: tensor.tolist() for name, tensor in load_file(path).items()}
    return found


def _without_seconds(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_seconds(item) for key, item in value.items() if key != "seconds"}
    return value


@contextmanager
def fork_server() -> Iterator[None]:
    """What children find: one thread, and a sweep that does not draw and does not wait."""
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["HF_HUB_OFFLINE"] = "1"
    gc.collect()
    gc.freeze()
    plot: Callable[..., bytes] = sweep_report.pareto_plot
    sweep_report.pareto_plot = lambda tasks: b""
    try:
        yield
    finally:
        sweep_report.pareto_plot = plot


def fuzz(seconds: float, seed: int, kinds: list[str]) -> dict[str, Tally]:
    """Episodes one after the other until the time is over."""
    until = time.monotonic() + seconds
    place = Path(tempfile.mkdtemp(prefix="kills-"))
    with fork_server():
        fuzzer = Fuzzer(place, seed)
        turn = [kind for kind in kinds for _ in range(_SHARES[kind])]
        while time.monotonic() < until:
            fuzzer.random.shuffle(turn)
            for kind in turn:
                if time.monotonic() < until:
                    failures = fuzzer.tallies[kind].failures
                    known = len(failures)
                    fuzzer.episode(kind, kills=fuzzer.random.randint(1, 8))
                    print(*failures[known:], sep="\n", end="\n" * (len(failures) > known), flush=True)
    if not any(tally.failures for tally in fuzzer.tallies.values()):
        shutil.rmtree(place)  # else it may be looked at
    return {kind: fuzzer.tallies[kind] for kind in kinds}


def _main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    arguments = parser.parse_args()
    tallies = fuzz(arguments.seconds, arguments.seed, arguments.kinds)
    for kind, tally in tallies.items():
        print(f"{kind}: {tally.kills['SIGKILL']} SIGKILL, {tally.kills['SIGINT']} SIGINT, {tally.finished} finished, "
              f"{len(tally.failures)} failures")  # fmt: skip
    return int(any(tally.failures for tally in tallies.values()))


if __name__ == "__main__":
    sys.exit(_main())
