"""Writing files whole or not at all."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from safetensors.torch import save_file
from torch import Tensor

STAGING_PREFIX = "incomplete-"


def write_text(path: Path, text: str) -> Path:
    """Write UTF-8 text under a temporary name, then rename it; missing parent folders are made.

    Args:
        path: the final name. An older file there stays as it is until the new one is complete.
        text: the content.

    Returns:
        ``path``.
    """
    write_files(path.parent, {path.name: text})
    return path


def write_json(path: Path, value: Any) -> Path:
    """Write what JSON can hold as :func:`write_text` writes text."""
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_files(folder: Path, contents: Mapping[str, str | bytes]) -> None:
    """Write files that belong together: all under temporary names, then all renamed.

    Args:
        folder: made if missing, with its parents. Older files stay as they are until every new one is complete.
        contents: text (written as UTF-8) or bytes by name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    unique = STAGING_PREFIX + uuid4().hex  # several processes may write the same files at once
    staging = {name: folder / f"{unique}-{name}" for name in contents}
    try:
        for name, content in contents.items():
            staging[name].write_bytes(content.encode() if isinstance(content, str) else content)
        for name, file in staging.items():
            file.replace(folder / name)
    finally:
        for file in staging.values():
            file.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """Write a safetensors file as :func:`write_text` writes text, also where several runs write it at once.

    Args:
        path: the final name.
        tensors: the content, by name.
        metadata: goes into the file's header.

    Returns:
        ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f"{STAGING_PREFIX}{uuid4().hex}-{path.name}")
    try:
        save_file(dict(tensors), staging, dict(metadata))
        return staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)
