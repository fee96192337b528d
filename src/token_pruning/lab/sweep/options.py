"""What a user can ask of a sweep, checked."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from token_pruning.checks import choice, number, positive_integer
from token_pruning.errors import ConfigError
from token_pruning.lab.options import check_options, option, output_folder
from token_pruning.lab.sweep.methods import METHODS
from token_pruning.lab.training.options import TrainOptions
from token_pruning.pruners.summary import SUMMARY_TOKENS, SummaryTokens


def _methods(name: str, value: Sequence[str]) -> None:
    for method in value:
        choice(name, method, METHODS)


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """One sweep.

    Args:
        base: what all trials have in common; its ``restore`` is the dense checkpoint.

    Raises:
        ConfigError: for a value that is not allowed.
    """

    base: TrainOptions

    output_dir: Path = option(help="where to write, and to continue", check=output_folder)
    methods: Sequence[str] = option(
        tuple(METHODS), help=f"{', '.join(METHODS)} (default: all)", metavar="METHOD", check=_methods
    )
    trials: int = option(
        40, help="finished trials of the study, over all machines (default {default}); a higher number goes on",
        check=positive_integer,
    )  # fmt: skip
    storage: str | None = option(
        None, help="database of the study, as SQLAlchemy writes it: sqlite:///FILE, mysql://…, postgresql://… "
        "(default: study.db in --output-dir)", metavar="URL",
    )  # fmt: skip
    study_name: str | None = option(None, help="in the database (default: the task's name)", metavar="NAME")
    validate_on: str = option(
        "train", help="train: measure on up to 1000 examples, at most a fifth, that are held out of the training set; "
        "dev: on the validation set (default {default})", check=partial(choice, allowed=("train", "dev")),
    )  # fmt: skip
    prune_margin: float = option(
        5.0, help="from the middle of its epochs on, stop a training after an evaluation if a finished trial of any "
        "method costs no more and is better by more than this (default {default})",
        metavar="POINTS", check=partial(number, low=0),
    )  # fmt: skip
    keep_checkpoints: bool = option(False, help="keep the models of all complete trials")
    summary_tokens: SummaryTokens | None = option(
        None, help="none, shared or segment, for every method (default: none; budget and calibrated try segment too)",
        check=partial(choice, allowed=SUMMARY_TOKENS),
    )  # fmt: skip

    def __post_init__(self) -> None:
        """Check everything that needs no file but the output folder."""
        check_options(self)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError("a sweep is not for torchrun: start it several times with one --storage instead")
