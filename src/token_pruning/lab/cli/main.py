"""Parsing and dispatch. A user's mistake is one line on standard error and exit status 2."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import transformers

from token_pruning.errors import TokenPruningError
from token_pruning.lab.cli.commands import (
    add_analyze,
    add_calibrate,
    add_demo,
    add_eval,
    add_predict,
    add_sweep,
    add_train,
)


class _Parser(argparse.ArgumentParser):
    def __init__(self, **settings: Any) -> None:  # an option is written out, or it is a mistake
        super().__init__(**settings, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """``token-pruning …``.

    Args:
        argv: the arguments, without the program's name; the process's by default.

    Returns:
        The exit status: 0, 2 for a user's mistake, 130 if interrupted.
    """
    parser = _Parser(
        prog="token-pruning", description="Train, evaluate and use encoders that drop the tokens they do not need."
    )
    commands = parser.add_subparsers(
        required=True, metavar="train | calibrate | eval | predict | analyze | sweep | demo", parser_class=_Parser
    )
    for add in (add_train, add_calibrate, add_eval, add_predict, add_analyze, add_sweep, add_demo):
        add(commands)
    return _run(parser, sys.argv[1:] if argv is None else argv)


def paper_main(argv: Sequence[str]) -> int:
    """``python run.py …``: training, or evaluation with ``--eval``. Arguments and result as for :func:`main`."""
    command = "eval" if "--eval" in argv else "train"
    return main([command, *(argument for argument in argv if argument != "--eval")])


def _run(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int:
    arguments = parser.parse_args([_dashed(argument) for argument in argv])
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    transformers.logging.disable_progress_bar()  # the bars of loading and writing weights, not those of training
    try:
        arguments.run(arguments)
    except TokenPruningError as error:
        print(f"{parser.prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return _leave(2)
    except ModuleNotFoundError as error:
        extra = "sweep" if error.name == "optuna" else "demo"
        print(f"{parser.prog}: error: {error.name} is missing; pip install 'token-pruning[{extra}]'", file=sys.stderr)
        return _leave(2)
    except KeyboardInterrupt:
        print("interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        return _leave(130)
    return 0


def _leave(status: int) -> int:
    """One process of several must not wait for the others, nor they for it."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _dashed(argument: str) -> str:
    """The paper's commands write ``--masking_mode``; both spellings mean the same."""
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else argument
