"""What the README and CONTRIBUTING show is what works."""

import re
from pathlib import Path

import pytest
import torch

import token_pruning as tp
from tests.tiny import ragged_batch, tiny_model
from token_pruning.lab.cli import main

ROOT = Path(__file__).parent.parent


def blocks(file: str, language: str) -> list[str]:
    text = (ROOT / file).read_text(encoding="utf-8")
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", text, re.S | re.M)
    return ["\n".join(line.removeprefix(indent) for line in code.splitlines()) for indent, code in found]


def test_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    many = ragged_batch([5, 9, 12, 7] * 10)
    names = {
        "batch": ragged_batch([5, 9]) | {"labels": torch.tensor([0, 2])},
        "examples": many,
        "labelled": many | {"labels": torch.arange(40) % 3},
    }
    for code in blocks("README.md", "python"):
        code = code.replace('AutoModelForSequenceClassification.from_pretrained("my-finetuned-roberta")', "stand_in()")
        exec(code, names | {"stand_in": tiny_model}, names)
    assert isinstance(names["trace"], tp.Trace)


def test_the_example_method_of_contributing_prunes() -> None:
    names: dict[str, object] = {}
    header = """
from dataclasses import dataclass
from typing import ClassVar
from torch import Tensor
from token_pruning.pruners import LayerTokens, Pruner
"""
    (code,) = blocks("CONTRIBUTING.md", "python")
    exec(header + code, names)
    model = tp.prune(tiny_model(), names["KeepHalf"]())  # type: ignore[operator]
    with tp.record(model) as trace, torch.no_grad():
        model(**ragged_batch([20, 30]))
    assert (trace.ffn_lengths[0] < torch.tensor([20, 30])).all()


@pytest.mark.parametrize("command", ["train", "eval", "predict", "analyze", "calibrate", "sweep", "demo"])
def test_every_option_is_explained(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for option in set(re.findall(r"--[a-z][a-z0-9-]+", text.split("\n\n")[0])):
        assert re.search(rf"^  .*{option}\b.*(\n +\S.*|  \S.*)", text, re.M), option
