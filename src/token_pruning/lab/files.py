"""Writing files whole or not at all, and trying their places before the work starts."""

import json
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from safetensors.torch import save
from torch import Tensor

from token_pruning.errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows: what a killed process left under a temporary name stays there
    fcntl = None  # type: ignore[assignment]

STAGING_PREFIX = "incomplete-"
_LEFT_OVER = re.compile(STAGING_PREFIX + "[0-9a-f]{32}")
_ROOM = 2**20  # bytes without which no command begins


def write_text(path: Path, text: str) -> Path:
    """Write UTF-8 text; see :func:`write_files`.

    Args:
        path: the final name.
        text: the content.

    Returns:
        ``path``.
    """
    write_files(path.parent, {path.name: text})
    return path


def write_json(path: Path, value: Any) -> Path:
    """Write what JSON can hold as :func:`write_text` writes text."""
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """Write a safetensors file as :func:`write_text` writes text, also where several runs write it at once.

    Args:
        path: the final name.
        tensors: the content, by name.
        metadata: goes into the file's header.

    Returns:
        ``path``.
    """
    write_files(path.parent, {path.name: save(dict(tensors), dict(metadata))})
    return path


def write_files(folder: Path, contents: Mapping[str, str | bytes]) -> None:
    """Write files that belong together: all under temporary names and to the disk, then all renamed.

    An older file stays as it is until every new one is complete; its mode and owner are kept. A link is followed. Pipes
    and character devices are written to as they are.

    Args:
        folder: made if missing, with its parents.
        contents: text (written as UTF-8) or bytes by name.

    Raises:
        ConfigError: if a file cannot be written.
    """
    path = folder
    try:
        make_folder(folder)
        with ExitStack() as stack:
            publish = []
            for name, content in contents.items():
                path = folder / name
                # Names that are no UTF-8 become escapes, which JSON reads back.
                data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
                publish.append((path, stack.enter_context(_staged(path, data))))
            for path, rename in publish:  # noqa: B007 - for the message
                rename()
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {_reason(error)}") from error


def move_file(source: Path, path: Path) -> None:
    """Give a complete file its final name as :func:`write_files` does; both are in one file system but for links.

    Raises:
        OSError: if it cannot be written.
    """
    target = Path(os.path.realpath(path))
    with suppress(FileNotFoundError):
        _like(target, source)
    if target.parent != Path(os.path.realpath(path.parent)):  # a link: perhaps to another disk
        with _staged(target, source.read_bytes()) as rename:
            rename()
        source.unlink()
        return
    source.replace(target)


def make_folder(folder: Path) -> None:
    """Make a folder and its parents; also where a link names one that is not there yet."""
    Path(os.path.realpath(folder)).mkdir(parents=True, exist_ok=True)


def sync(path: Path) -> None:
    """Bring to the disk what a folder or a file holds, with everything below; where the system can."""
    if path.is_dir():
        for entry in path.iterdir():
            sync(entry)
        sync_names(path)
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_names(folder: Path) -> None:
    """Bring a folder's names to the disk, where the system can."""
    if os.name == "nt":
        return
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def try_folder(flag: str, path: Path, room: int = 0, file: Path | None = None) -> None:
    """Refuse a folder that cannot be written to, before any work; nothing stays that was made to find out.

    Args:
        flag: for the message.
        path: may be missing, with its parents.
        room: bytes that are to be written at least.
        file: what is to be written there, where the message is to name it.

    Raises:
        ConfigError: if it is no folder, cannot be made or written to, or has no room.
    """
    made: list[Path] = []
    try:
        folder = Path(os.path.realpath(path))
        for missing in reversed([place for place in (folder, *folder.parents) if not place.exists()]):
            missing.mkdir()
            made.append(missing)
        if file is not None:
            (folder / file.name).exists()  # raises for a name that is too long
        probe, descriptor = _new_file(folder)
        os.close(descriptor)
        probe.unlink()
        free = shutil.disk_usage(folder).free
    except (OSError, ValueError) as error:
        raise ConfigError(f"{flag} {_quoted(file or path)} cannot be written to: {_why_not(path, error)}") from None
    finally:
        for empty in reversed(made):
            with suppress(OSError):
                empty.rmdir()
    if free < max(room, _ROOM):
        raise ConfigError(
            f"{flag} {_quoted(file or path)} cannot be written to: {free:,} bytes are free there, "
            f"{max(room, _ROOM):,} needed"
        )


def try_file(flag: str, path: Path) -> None:
    """Refuse a file that cannot be written, before any work; see :func:`try_folder`.

    Raises:
        ConfigError: if its folder cannot be written to, or it is a folder, read-only, or too long a name.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise ConfigError(f"{flag} {_quoted(path)} cannot be written: {_why_not(path, error)}") from None
    else:
        reason = None
        if stat.S_ISDIR(found.st_mode):
            reason = "it is a folder"
        elif not (stat.S_ISREG(found.st_mode) or _is_stream(path)):
            reason = "it is neither a file nor a pipe or a character device"
        elif not os.access(path, os.W_OK):
            reason = "it is read-only"
        if reason is not None:
            raise ConfigError(f"{flag} {_quoted(path)} cannot be written: {reason}")
        if not stat.S_ISREG(found.st_mode):
            return
    place = Path(os.path.realpath(path)) if path.is_symlink() else path
    try_folder(flag, place.parent, file=path)


def write_standard_output(text: str) -> None:
    """Write UTF-8 to standard output, whatever its encoding.

    Raises:
        ConfigError: if it is closed.
    """
    if sys.stdout is None or (sys.__stdout__ is None and getattr(sys.stdout, "name", None) == os.devnull):
        raise ConfigError("standard output is closed; give --output")
    sys.stdout.flush()
    buffer = getattr(sys.stdout, "buffer", None)  # a notebook's has none
    if buffer is None:
        sys.stdout.write(text)
    else:
        buffer.write(text.encode(errors="backslashreplace"))
    sys.stdout.flush()


@contextmanager
def _staged(path: Path, content: bytes) -> Iterator[Callable[[], object]]:
    """The content on the disk beside its place; what is given puts it there. Else it is removed."""
    if _is_stream(path):
        yield lambda: _write_stream(path, content)
        return
    target = Path(os.path.realpath(path))
    make_folder(target.parent)  # of a link's target
    _remove_left_overs(target.parent)
    staging, descriptor = _new_file(target.parent)

    def rename() -> None:
        staging.replace(target)
        sync_names(target.parent)

    try:
        with os.fdopen(descriptor, "wb") as file:
            with suppress(FileNotFoundError):
                _like(target, descriptor)
            file.write(content)
            file.flush()
            os.fsync(descriptor)
            if fcntl is None:
                file.close()  # Windows renames no open file
            yield rename
    finally:
        staging.unlink(missing_ok=True)


def _new_file(folder: Path) -> tuple[Path, int]:
    """An empty file with a new name, and its descriptor; locked, so that nobody takes it for a left-over."""
    while True:
        path = folder / (STAGING_PREFIX + uuid4().hex)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        if fcntl is not None:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        if path.exists():  # nobody was faster than the lock
            return path, descriptor
        os.close(descriptor)


def _remove_left_overs(folder: Path) -> None:
    """Remove what killed processes left under temporary names: nobody holds their locks."""
    if fcntl is None:
        return
    for path in folder.iterdir():
        if _LEFT_OVER.fullmatch(path.name) is None:
            continue
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(descriptor)


def _like(old: Path, new: Path | int) -> None:
    """Give a file another's owner, where that is allowed, and mode."""
    found = old.stat()
    if hasattr(os, "chown"):
        with suppress(OSError):
            os.chown(new, found.st_uid, found.st_gid)
    if isinstance(new, Path):
        new.chmod(stat.S_IMODE(found.st_mode))
    elif hasattr(os, "fchmod"):
        os.fchmod(new, stat.S_IMODE(found.st_mode))


def _is_stream(path: Path) -> bool:
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


def _write_stream(path: Path, content: bytes) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY), "wb") as file:
        file.write(content)


def _reason(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error)


def _why_not(path: Path, error: BaseException) -> str:
    """The reason, and the file where a folder should be."""
    if isinstance(error, NotADirectoryError | FileExistsError):
        for place in (path, *path.parents):
            if place.is_file():
                return f"{place} is a file"
    return _reason(error)


def _quoted(path: Path) -> str:
    text = str(path)
    return text if text.isprintable() and text.strip() == text else repr(text)
