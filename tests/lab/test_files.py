"""Outputs: written whole or not at all, tried before the work starts, and held by one process."""

import errno
import io
import json
import os
import resource
import shutil
import signal
import stat
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.workspace import write_checkpoint, write_sst2
from token_pruning.errors import ConfigError
from token_pruning.lab import predict
from token_pruning.lab.cli import main
from token_pruning.lab.files import try_folder, write_files, write_json, write_text
from token_pruning.lab.training.run_dir import LOCK_FILE, RunDir, held

DATA = "--task SST2 --data-dir glue --restore CKPT"
TRAIN = f"train {DATA} --masking-mode hard --epoch 1 --bs 8 --save-step 2 --lr 1e-4 --output-dir out"
PREDICT = "predict --restore CKPT --input in.txt"
COMMANDS = {
    "train": f"train {DATA} --output-dir",
    "calibrate": f"calibrate {DATA} --target-flops 0.6 --output-dir",
    "eval": f"eval {DATA} --output-dir",
    "analyze": f"analyze {DATA} --output-dir",
    "sweep": f"sweep {DATA} --output-dir",
    "demo": "demo --output-dir",
    "predict": f"{PREDICT} --output",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_sst2(tmp_path / "glue", train=32, dev=4)
    write_checkpoint(tmp_path / "CKPT", prune_mode="absolute_threshold", final_token_threshold=0.01)
    (tmp_path / "in.txt").write_text("good cat\nbad dog\n")
    return tmp_path


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    capsys.readouterr()
    try:
        status = main(argv)
    except SystemExit as end:  # argparse
        status = int(end.code or 0)
    error = capsys.readouterr().err
    assert status == 2 and "Traceback" not in error, error
    said = [line for line in error.splitlines() if "%|" not in line and line.strip()]  # progress bars
    (line,) = [line for line in said if "one per line" not in line]  # what was taken for what in a file
    return line


# Writing


def test_an_older_file_keeps_its_mode_and_new_ones_follow_the_umask(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("old")
    (tmp_path / "old").chmod(0o640)
    before = os.umask(0o027)
    try:
        write_files(tmp_path, {"old": "new", "new": "new"})
    finally:
        os.umask(before)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("old", "new")] == [0o640, 0o640]
    (tmp_path / "old").chmod(0o600)
    write_text(tmp_path / "old", "newer")
    assert stat.S_IMODE((tmp_path / "old").stat().st_mode) == 0o600
    assert files(tmp_path) == {"old": b"newer", "new": b"new"}


def test_links_are_followed_also_where_nothing_is_yet(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to("target")
    (tmp_path / "dangling").symlink_to(tmp_path / "far" / "target")
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    write_text(tmp_path / "link", "new")
    write_text(tmp_path / "dangling", "new")
    write_text(tmp_path / "out" / "file", "new")
    assert all((tmp_path / name).is_symlink() for name in ("link", "dangling", "out"))
    assert [(tmp_path / name).read_text() for name in ("target", "far/target", "elsewhere/file")] == ["new"] * 3


def test_a_pipe_is_written_to(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((folder / "pipe").read_text()))
    reader.start()
    assert main([*PREDICT.split(), "--output", "pipe"]) == 0
    reader.join(timeout=20)
    assert [json.loads(line)["label"][:5] for line in read[0].splitlines()] == ["LABEL"] * 2
    assert stat.S_ISFIFO((folder / "pipe").stat().st_mode)


def test_everything_is_on_the_disk_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (events.append("sync"), fsync(descriptor)))
    monkeypatch.setattr(Path, "replace", lambda *paths: (events.append("rename"), replace(*paths)))
    write_files(tmp_path, {"a": "1", "b": "2"})
    assert events == ["sync", "sync", "rename", "sync", "rename", "sync"]


def test_a_failure_leaves_the_older_files_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path, {"a": "old", "b": "old"})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ConfigError, match="a cannot be written: No space left on device"):
            write_files(tmp_path, {"a": "new", "b": "new"})
    assert files(tmp_path) == {"a": b"old", "b": b"old"}


def test_what_a_killed_writer_left_is_removed_and_a_living_ones_file_is_not(tmp_path: Path) -> None:
    from token_pruning.lab import files as module

    living, descriptor = module._new_file(tmp_path)
    _, closed = module._new_file(tmp_path)
    os.close(closed)
    (tmp_path / "incomplete-thesis").write_text("mine")
    write_text(tmp_path / "a", "new")
    os.close(descriptor)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "incomplete-thesis", living.name}


def test_names_that_are_no_utf8_survive_in_json(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    assert json.loads(write_json(tmp_path / "a.json", {"path": name}).read_text("utf-8")) == {"path": name}


def test_a_disk_that_gets_full_is_one_line_and_the_older_file_stays(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "found.jsonl").write_text("old")
    before, limits = files(folder), resource.getrlimit(resource.RLIMIT_FSIZE)
    (folder / "long.txt").write_text("good\n" * 100)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        line = refused(capsys, [*PREDICT.replace("in.txt", "long.txt").split(), "--output", "found.jsonl"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "found.jsonl cannot be written: File too large" in line
    (folder / "long.txt").unlink()
    assert files(folder) == before


# Trying the place first


@contextmanager
def bad_place(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    """A path that cannot be written to, and what the message says."""
    with monkeypatch.context() as patch:
        if name == "below a file":
            yield "in.txt/a/b", "in.txt is a file"
        elif name == "too long":
            yield "new/" + "x" * 300, "File name too long"
        elif name == "no room":
            patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
            yield "new/a", "1,000 bytes are free there"
        elif name == "NUL":
            yield "new/a\0b", "a\\x00b"
        elif name == "read-only":

            def refuse(path: Any, mode: int = 0o777) -> None:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

            patch.setattr(os, "mkdir", refuse)
            yield "new/a", "Read-only file system"
        else:
            yield "", "empty"


@pytest.mark.parametrize("place", ["below a file", "too long", "no room", "NUL", "read-only", "empty"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_place_that_cannot_be_written_to_is_refused_before_any_work(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    checkpoint: Path,
    command: str,
    place: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "CKPT").symlink_to(checkpoint)  # without tokenizer; and there is no data
    (tmp_path / "in.txt").write_text("good\n")
    with bad_place(place, monkeypatch) as (path, reason):
        line = refused(capsys, [*COMMANDS[command].split(), path])
    flag = COMMANDS[command].split()[-1]
    assert flag in line and reason in line and (place == "too long" or repr(path).strip("'") in line)
    assert {entry.name for entry in tmp_path.iterdir()} == {"CKPT", "in.txt"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder, prune_mode="absolute_threshold", final_token_threshold=0.01)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        (folder / name).unlink(missing_ok=True)
    return folder


@pytest.mark.parametrize(
    ("make", "reason"), [(Path.mkdir, "it is a folder"), (lambda path: path.symlink_to(path.name), "Too many levels")]
)
def test_an_output_that_is_no_file(folder: Path, capsys: pytest.CaptureFixture[str], make: Any, reason: str) -> None:
    make(folder / "found")
    line = refused(capsys, [*PREDICT.split(), "--output", "found"])
    assert "--output found cannot be written" in line and reason in line


def test_missing_folders_are_made_and_those_of_a_refused_command_are_not(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*PREDICT.split(), "--output", "a/b/found.jsonl"]) == 0
    assert [path.name for path in (folder / "a/b").iterdir()] == ["found.jsonl"]
    (folder / "glue/SST-2/dev.tsv").unlink()
    refused(capsys, TRAIN.replace("--output-dir out", "--output-dir c/d").split())
    assert not (folder / "c").exists()
    (folder / "empty").mkdir()
    refused(capsys, TRAIN.replace("--output-dir out", "--output-dir empty").split())
    assert list((folder / "empty").iterdir()) == []


def test_a_model_needs_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**22))
    try_folder("--output-dir", tmp_path / "new", room=2**22)
    with pytest.raises(ConfigError, match=r"new cannot be written to: 4,194,304 bytes are free there, 4,194,305"):
        try_folder("--output-dir", tmp_path / "new", room=2**22 + 1)


# One process in a folder


def test_a_second_process_is_refused_and_named_the_first(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with held(folder / "out"):
        before = files(folder)
        for command in ("train", "calibrate", "sweep", "demo"):
            line = refused(capsys, [*COMMANDS[command].split(), "out"])
            assert "output directory out is in use by process" in line
            assert f"{os.getpid()} on {os.uname().nodename} since 20" in line
        assert files(folder) == before
    assert not (folder / "out").exists()
    assert main(TRAIN.split()) == 0
    assert "finished run" in refused(capsys, TRAIN.split())  # the lock's file is no other model
    assert main([*TRAIN.split(), "--overwrite-output-dir"]) == 0


def test_a_killed_holder_holds_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ready, written = os.pipe()
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # of forking beside pytest's threads
        pid = os.fork()
    if pid == 0:
        with held(folder / "out"):
            os.write(written, b"x")
            time.sleep(60)
        os._exit(1)
    os.read(ready, 1)
    assert f"in use by process {pid} on" in refused(capsys, TRAIN.split())
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert (folder / "out" / LOCK_FILE).exists()
    assert main(TRAIN.split()) == 0


def test_only_the_first_of_several_processes_holds_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with held(tmp_path / "out"):
        monkeypatch.setenv("RANK", "1")
        with held(tmp_path / "out"):
            pass


# What is said at the end


@contextmanager
def standard_output(stream: Any) -> Iterator[None]:
    before, sys.stdout = sys.stdout, stream
    try:
        yield
    finally:
        if stream is None:
            sys.stdout.close()  # what stood in for it
        sys.stdout = before


def test_predictions_are_utf8_whatever_the_terminals_encoding(folder: Path) -> None:
    write_checkpoint(
        folder / "CKPT", prune_mode="absolute_threshold", final_token_threshold=0.01, id2label={0: "gut", 1: "schön"}
    )
    written = io.BytesIO()
    terminal = io.TextIOWrapper(written, encoding="ascii")
    with standard_output(terminal):
        assert main(PREDICT.split()) == 0
        found = [json.loads(line)["label"] for line in written.getvalue().decode().splitlines()]
    assert len(found) == 2 and set(found) <= {"gut", "schön"}
    with standard_output(terminal):
        assert main(f"eval {DATA}".split()) == 0
        with pytest.raises(SystemExit) as end:
            main(["train", "--help"])
        assert end.value.code == 0
        assert "\\u03bb" in written.getvalue().decode("ascii", errors="ignore")


def test_nobody_reads_standard_output(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read, written = os.pipe()
    os.close(read)
    with os.fdopen(written, "w") as stream, standard_output(stream):
        assert main(PREDICT.split()) == 141
    assert capsys.readouterr().err.splitlines()[-1].strip() == ""  # after the progress bar


def test_a_closed_standard_output(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "__stdout__", None)
    with standard_output(None):
        assert "standard output is closed; give --output" in refused(capsys, PREDICT.split())
    with standard_output(None):
        assert main([*PREDICT.split(), "--output", "found"]) == 0
    with standard_output(None):
        assert main(f"eval {DATA}".split()) == 0


@pytest.mark.parametrize(
    ("number", "status", "said"), [(signal.SIGINT, 130, "interrupted\n"), (signal.SIGTERM, 143, "terminated\n")]
)
def test_signals_are_one_line_also_in_a_callback_that_cannot_raise(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    status: int,
    said: str,
) -> None:
    def stop(options: Any) -> None:
        class Thing:
            pass

        thing = Thing()
        reference = weakref.ref(thing, lambda _: signal.raise_signal(number))
        del thing
        time.sleep(20)
        assert reference is None

    monkeypatch.setattr(predict, "predict_file", stop)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        assert main(PREDICT.split()) == status
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == said
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_any_error_of_the_system_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(options: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), "somewhere")

    monkeypatch.setattr(predict, "predict_file", fail)
    assert refused(capsys, PREDICT.split()) == "token-pruning: error: somewhere: Input/output error"


@pytest.mark.parametrize("more", [[], ["--overwrite-output-dir"]])
def test_it_is_said_only_where_a_run_continues(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    publish, published = RunDir.publish, []

    def interrupt(self: RunDir, staging: Path) -> Path:
        if len(published) == 1:
            raise KeyboardInterrupt
        published.append(staging)
        return publish(self, staging)

    monkeypatch.setattr(RunDir, "publish", interrupt)
    assert main([*TRAIN.split(), *more]) == 130
    without = " without --overwrite-output-dir" if more else ""
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"interrupted; the same command{without} continues from out/checkpoint-2"
    shutil.rmtree(folder / "out")
    assert main([*TRAIN.split(), *more]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"
