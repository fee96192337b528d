"""Weights that come in packages of the Python Package Index: found without importing anything, and checked."""

import hashlib
from importlib import metadata
from pathlib import Path

from token_pruning.errors import CheckpointError


def package_file(package: str, path: str, install: str) -> Path:
    """A file or folder of an installed package.

    Args:
        package: its distribution's name.
        path: within it.
        install: how to get it, for the error.

    Raises:
        CheckpointError: if the package is not installed.
    """
    try:
        return Path(str(metadata.distribution(package).locate_file(path)))
    except metadata.PackageNotFoundError:
        raise CheckpointError(f"the package {package} is not installed: {install}") from None


def check_sha256(file: Path, expected: str) -> None:
    """Raises CheckpointError unless the file can be read and has this SHA-256, in hexadecimal digits."""
    try:
        with file.open("rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from None
    if found != expected:
        raise CheckpointError(f"{file}: sha256 is {found}; expected {expected}")
