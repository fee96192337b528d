"""An option is declared once: what a dataclass's field says is what the command line has."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
from torch import Tensor

import token_pruning as tp
from token_pruning.checks import number
from token_pruning.errors import ConfigError
from token_pruning.lab.cli.parser import add_keys, add_options, build, command_line, given_keys
from token_pruning.lab.options import check_options, option
from token_pruning.lab.training.options import TrainOptions
from token_pruning.pruners import base


@dataclass(frozen=True, kw_only=True)
class Options:
    must: str = option(help="is needed")
    rate: float = option(
        0.5, help="a rate (default {default})", flags=("--rate", "--speed"), check=partial(number, low=0)
    )
    layers: Sequence[int] | None = option(None, help="some layers", metavar="L")
    costs: float | list[float] | None = option(None, help="one or several costs", metavar="C")
    folder: Path | None = option(None, help="a folder", group="places")
    loud: bool = option(False, help="say more")
    careful: bool = option(True, help="do not look twice", flags=("--careless",))
    inner: int = 3

    def __post_init__(self) -> None:
        check_options(self)


def parse(line: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_options(parser, Options)
    return parser.parse_args(line.split())


def test_what_was_not_given_is_the_fields_default() -> None:
    assert build(parse("--must x"), Options) == Options(must="x")
    assert build(parse("--must x"), Options, inner=4).inner == 4


def test_types_come_from_the_fields() -> None:
    found = build(parse("--must x --speed 2 --layers 1 2 --folder a/b --loud --careless"), Options)
    assert found == Options(must="x", rate=2.0, layers=[1, 2], folder=Path("a/b"), loud=True, careful=False)
    assert command_line("run", found) == "token-pruning run --must x --rate 2.0 --layers 1 2 --folder a/b --loud"


def test_one_value_is_no_list() -> None:
    for line, value in (("--costs 0.5", 0.5), ("--costs 0.5 0.7", [0.5, 0.7]), ("--loud", None)):
        found = build(parse(f"--must x {line}"), Options)
        assert found.costs == value
    assert "--costs 0.5 0.7 " in command_line("run", Options(must="x", costs=[0.5, 0.7]))


def test_checks_name_the_flag() -> None:
    with pytest.raises(ConfigError, match=r"--rate is -1\.0; it must be a finite number >= 0"):
        build(parse("--must x --speed -1"), Options)


def test_help_says_defaults_and_metavars(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--help")
    text = capsys.readouterr().out
    assert "a rate (default 0.5)" in text
    assert "--layers L [L ...]" in text
    assert "places:\n  --folder FOLDER" in text
    with pytest.raises(SystemExit):
        parse("")
    assert "required: --must" in capsys.readouterr().err


def test_a_commands_own_words_win() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser, TrainOptions, ("restore", "epochs"), restore={"required": False}, epochs={"help": "few"})
    text = parser.format_help()
    assert "[--restore CKPT]" in text and "few" in text and "--lr" not in text


def test_a_registered_methods_keys_are_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(base._METHODS, "nth", tp.TopK)  # gone again after the test

    @dataclass(frozen=True, kw_only=True)
    class Nth(tp.Pruner):
        prune_mode: ClassVar[str] = "nth"

        every: int = 2
        temperature: float = 1.0  # an option of training, which wins

        def keep(self, tokens: tp.pruners.LayerTokens) -> Tensor:
            return tokens.scores >= 0

    parser = argparse.ArgumentParser()
    add_keys(parser)
    line = "--prune-mode nth --every 3 --prune-layers 2 4 --summary-tokens shared --token-keep-rate -0.5"
    assert given_keys(parser.parse_args(line.split())) == {
        "prune_mode": "nth", "every": 3, "prune_layers": [2, 4], "summary_tokens": "shared", "token_keep_rate": -0.5,
    }  # fmt: skip
    assert "a key of prune_mode nth" in parser.format_help()
    assert "--temperature" not in parser.format_help()
