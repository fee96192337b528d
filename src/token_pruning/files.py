"""Writing files whole or not at all."""

from pathlib import Path

STAGING_PREFIX = "incomplete-"


def write_text(path: Path, text: str) -> Path:
    """Write UTF-8 text under a temporary name, then rename it; missing parent folders are made.

    Args:
        path: the final name. An older file there stays as it is until the new one is complete.
        text: the content.

    Returns:
        ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(STAGING_PREFIX + path.name)
    try:
        staging.write_text(text, encoding="utf-8")
        return staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)
