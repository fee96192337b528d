"""The folder of a training run: what may be written there, and how, so that a kill never leaves half a checkpoint."""

import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from token_pruning.errors import CheckpointError, ConfigError
from token_pruning.lab.files import STAGING_PREFIX, make_folder, move_file, sync, sync_names, try_folder, write_json

RUN_FILE = "run.json"
LOCK_FILE = "run.lock"
_FULL = 16 * 2**20  # bytes left free by a write that failed for want of room
TEACHER_LOGITS = "teacher_logits"  # the folder of what was computed with a model as the teacher, or for a run


@contextmanager
def held(folder: Path, flag: str = "--output-dir", room: int = 0) -> Iterator[None]:
    """Keep a folder to this process; the system frees it when the process ends, however that happens.

    The folder is made if missing, and removed again if nothing was written into it. Of several processes that train
    together the first one holds it for all.

    Args:
        folder: of a run.
        flag: for messages.
        room: bytes that are to be written at least.

    Raises:
        ConfigError: if the folder cannot be written to, or another process holds it.
    """
    if int(os.environ.get("RANK", "0")) > 0:
        yield
        return
    try_folder(flag, folder, room)
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    make_folder(folder)
    file = folder / LOCK_FILE
    was_there = file.exists()
    holder = _holder(file)  # read now: some versions of filelock empty the file when they try it
    lock = FileLock(file, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ConfigError(
            f"output directory {folder} is in use by {holder}; wait until it ends, or give another --output-dir"
        ) from None
    try:
        about = {"pid": os.getpid(), "host": socket.gethostname(), "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}
        with suppress(OSError):  # Windows lets nobody write into a locked file
            file.write_text(json.dumps(about) + "\n", encoding="utf-8")
        yield
    finally:
        others = {entry.name for entry in folder.iterdir()} - {LOCK_FILE}
        if not others or (not was_there and RUN_FILE not in others):
            with suppress(OSError):
                file.unlink()
        lock.release()
        for empty in made:
            with suppress(OSError):
                empty.rmdir()


def _holder(file: Path) -> str:
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        return f"process {about['pid']} on {about['host']} since {about['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


class RunDir:
    """One run's folder. Its ``run.json`` says what the run was asked for and whether it is finished."""

    def __init__(self, path: Path) -> None:
        """Nothing is touched yet."""
        self.path = path

    def check(self, identity: dict[str, Any], *, overwrite: bool) -> bool:
        """Whether the run that is asked for may be written here.

        Args:
            identity: what the run is asked for.
            overwrite: replace whatever is there.

        Returns:
            True if an unfinished run with the same identity is there, to be continued.

        Raises:
            ConfigError: if another run or another model is there.
        """
        if overwrite or not self.path.exists():
            return False
        if not self.path.is_dir():
            raise ConfigError(f"output directory {self.path} is a file; give another --output-dir")
        try:
            run = json.loads((self.path / RUN_FILE).read_text(encoding="utf-8"))
            found, finished = run["options"], run["finished"]
        except FileNotFoundError:
            if (self.path / "config.json").exists() or self.checkpoints():
                raise ConfigError(
                    f"output directory {self.path} holds another model; use --overwrite-output-dir "
                    "or another --output-dir"
                ) from None
            return False
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{self.path / RUN_FILE} cannot be read: {error}; use --overwrite-output-dir") from None
        if finished:
            raise ConfigError(
                f"output directory {self.path} holds a finished run; use --overwrite-output-dir or another --output-dir"
            )
        identity = json.loads(json.dumps(identity))
        different = [key for key in sorted({*found, *identity}) if found.get(key) != identity.get(key)]
        if different:
            key = different[0]
            raise ConfigError(
                f"output directory {self.path} holds an unfinished run with {key} {found.get(key)!r}, not "
                f"{identity.get(key)!r}; use the same options to continue it, --overwrite-output-dir to replace it"
            )
        return True

    def finished(self, identity: dict[str, Any]) -> bool:
        """Whether the same run is there, complete."""
        try:
            run = json.loads((self.path / RUN_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return bool(run == {"options": json.loads(json.dumps(identity)), "finished": True})

    def start(self, identity: dict[str, Any], *, resume: bool) -> None:
        """Make the folder ready: what a run that is replaced has left is removed.

        Folders of other runs inside it stay, and so do files where no run was: they are not ours to delete.
        """
        ours = not resume and (self.path / RUN_FILE).exists()
        entries = list(self.path.iterdir()) if self.path.is_dir() else []
        for entry in entries:
            replaced = not resume and entry.is_dir() and entry.name.startswith(("checkpoint-", "runs", TEACHER_LOGITS))
            if replaced:
                self.remove(entry)
            elif entry.name.startswith(STAGING_PREFIX):
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        # Now no checkpoint of another run is left to be continued from.
        write_json(self.path / RUN_FILE, {"options": identity, "finished": False})
        for entry in sorted(entries, key=lambda entry: entry.name != "config.json"):
            if ours and entry.name not in (RUN_FILE, LOCK_FILE) and entry.is_file():
                entry.unlink()

    def finish(self, identity: dict[str, Any]) -> None:
        """Mark the run as complete."""
        write_json(self.path / RUN_FILE, {"options": identity, "finished": True})

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        found = [p for p in self.path.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
        return sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")))

    def last_checkpoint(self, identity: dict[str, Any]) -> Path | None:
        """Where an unfinished run goes on when the same is asked for again; None from the beginning, or not at all."""
        try:
            checkpoints = self.checkpoints() if self.check(identity, overwrite=False) else []
        except ConfigError:
            return None
        return checkpoints[-1] if checkpoints else None

    def staging(self, name: str) -> Path:
        """Where to write a folder that is to be published under ``name``."""
        folder = self.path / (STAGING_PREFIX + name)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    @contextmanager
    def whole_or_removed(self, staging: Path) -> Iterator[None]:
        """Around writing what :meth:`staging` gave: a folder that could not be written whole takes no room.

        Raises:
            CheckpointError: if it could not be written; other errors are passed on.
        """
        try:
            yield
        except BaseException as error:
            full = shutil.disk_usage(self.path).free < _FULL
            shutil.rmtree(staging, ignore_errors=True)
            if not isinstance(error, Exception):
                raise
            # As torch.save puts it: "basic_ios::clear: iostream error", "PytorchStreamWriter failed".
            by_torch = isinstance(error, RuntimeError) and "stream" in str(error).lower()
            if not full and not by_torch and not isinstance(error, OSError | SafetensorError):
                raise
            reason = "the disk is full" if full else " ".join(str(error).split())
            last = self.checkpoints()
            then = f"; once it can, the same command continues from {last[-1].name}" if last else ""
            raise CheckpointError(
                f"{staging.name.removeprefix(STAGING_PREFIX)} cannot be written to {self.path}: {reason}{then}"
            ) from error

    def publish(self, staging: Path) -> Path:
        """Give a written folder its final name."""
        final = staging.with_name(staging.name.removeprefix(STAGING_PREFIX))
        if final.exists():
            self.remove(final)
        staging.replace(final)
        sync_names(self.path)
        return final

    def save_model(self, *parts: Any) -> None:
        """Write a model's files into the run's folder, ``config.json`` last: without it nothing loads.

        Args:
            parts: what has ``save_pretrained``: a model and its tokenizer, or a model that holds both.
        """
        staging = self.staging("model")
        with self.whole_or_removed(staging):
            for part in parts:
                part.save_pretrained(str(staging))
            sync(staging)
        files = [path.relative_to(staging) for path in staging.rglob("*") if path.is_file()]
        for file in sorted(files, key=lambda path: (path.name == "config.json", -len(path.parts))):
            make_folder((self.path / file).parent)
            move_file(staging / file, self.path / file)
            sync_names((self.path / file).parent)
        sync_names(self.path)
        shutil.rmtree(staging)

    def remove(self, folder: Path) -> None:
        """Delete a checkpoint; it loses its name before its first file."""
        doomed = folder.with_name(STAGING_PREFIX + folder.name)
        shutil.rmtree(doomed, ignore_errors=True)
        folder.replace(doomed)
        shutil.rmtree(doomed)

    def keep_only(self, count: int, best: str | None) -> None:
        """Delete the oldest checkpoints until ``count`` are left, never the best."""
        checkpoints = self.checkpoints()
        removable = [p for p in checkpoints if best is None or p.name != Path(best).name]
        for folder in removable[: max(0, len(checkpoints) - count)]:
            self.remove(folder)
