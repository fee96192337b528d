"""The examples run offline, on tiny models, and are short."""

import runpy
import sys
from pathlib import Path

import pytest

from tests.pages import ROOT
from tests.workspace import write_checkpoint

COMMANDS = {
    "rerank.py reranker": "0.",
    "embed.py encoder --texts 80": "cosine to its vectors",
    "own_pruner.py": "the engine's logits differ",
    "mteb.py encoder --texts 40": "Spearman × 100",
}

ON_RAY = {"serve_ray.py": 410, "embed_ray_data.py": 150}  # lines; tests/integrations/test_ray.py runs them


@pytest.mark.usefixtures("nothing_stays_registered")
@pytest.mark.filterwarnings("ignore:.*(fill_missing|get_sentence_embedding_dimension)")  # mteb's
@pytest.mark.parametrize("command", COMMANDS)
def test_example_runs(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script, *_ = words = command.split()
    if script == "mteb.py":
        pytest.importorskip("mteb")
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "encoder", head="encoder")
    write_checkpoint(tmp_path / "reranker", labels=1)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")
    assert COMMANDS[command] in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"encoder", "reranker"}


def test_every_example_is_tested_and_short() -> None:
    scripts = [path for path in (ROOT / "examples").glob("*.py") if path.name != "toy.py"]
    assert {path.name for path in scripts} == {*ON_RAY, *(command.split()[0] for command in COMMANDS)}
    for path in scripts:
        assert len(path.read_text(encoding="utf-8").splitlines()) < ON_RAY.get(path.name, 80), path
