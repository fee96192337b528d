"""An option is declared once: as a dataclass's field, which the command line and the checks are built from."""

from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import partial
from inspect import get_annotations
from pathlib import Path
from typing import Any, get_args

from token_pruning.checks import number, positive_integer
from token_pruning.engine.compiled import EngineDtype
from token_pruning.errors import ConfigError

MODEL = "model"
ENGINE_DTYPES = get_args(EngineDtype)
TEXTS_HELP = (
    "unlabelled: one text column, or one text per line (.txt); two columns for pairs, of a reranker query and passage, "
    "with several rows for each query"
)


def option(
    default: Any = MISSING,
    *,
    help: str,  # as argparse calls it
    flags: Sequence[str] = (),
    group: str | None = None,
    metavar: str | None = None,
    check: Callable[[str, Any], object] | None = None,
) -> Any:
    """A field that is also an option of a command.

    Its type says how it is read: a number, text, a path, a list of these (one or more words), a number ``| list`` of
    numbers (one is that number), or a switch that changes a bool's default. ``| None`` is for an option that may be
    left out.

    Args:
        default: what it is unless given; without one it must be given.
        help: for ``--help``; ``{default}`` stands for the default.
        flags: its spellings, the first one for messages; ``--the-field's-name`` unless given.
        group: the heading that it stands under in ``--help``.
        metavar: how ``--help`` calls the value.
        check: called with the flag and a value that is not None; raises ConfigError.
    """
    return field(
        default=default,
        metadata={"help": help, "flags": tuple(flags), "group": group, "metavar": metavar, "check": check},
    )


def options_of(cls: type) -> list[Field[Any]]:
    """The fields of a dataclass that are options, its own before those it inherits."""
    own = get_annotations(cls)
    return sorted((found for found in fields(cls) if "help" in found.metadata), key=lambda found: found.name not in own)


def spelling(name: str) -> str:
    """How a name is spelt on the command line unless it says otherwise."""
    return "--" + name.replace("_", "-")


def flag_of(cls: type, name: str) -> str:
    """The command-line spelling of a field, or of a key that is none."""
    flags = [flag for found in options_of(cls) if found.name == name for flag in found.metadata["flags"]]
    return str(flags[0]) if flags else spelling(name)


def check_options(options: Any) -> None:
    """Check every value that is not None by its own declaration.

    Raises:
        ConfigError: for the first one that is not allowed.
    """
    for found in options_of(type(options)):
        check, value = found.metadata["check"], getattr(options, found.name)
        flag = flag_of(type(options), found.name)
        for text in value if isinstance(value, list | tuple) else [value]:
            if isinstance(text, str) and not text.strip():
                raise ConfigError(f"{flag} is {text!r}; it must not be empty")
        if check is not None and value is not None:
            check(flag, value)


def output_folder(flag: str, path: Any) -> None:
    """A path that is a folder, or not there yet.

    Raises:
        ConfigError: for a file, an empty path, or one that no system has.
    """
    if not str(path):
        raise ConfigError(f"{flag} is empty; it must be a folder, or not exist yet")
    path = Path(path)
    if "\0" in str(path):
        raise ConfigError(f"{flag} is {str(path)!r}; a path has no NUL")
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{flag} is {path}, a file; it must be a folder, or not exist yet")


@dataclass(frozen=True, kw_only=True)
class BudgetOptions:
    """At which of its budgets a checkpoint is run."""

    budget: float | None = option(
        None, help="of a checkpoint for several budgets: run it at this one, relative FLOPs (default: as it was saved)",
        group=MODEL, metavar="F", check=partial(number, above=0, high=1),
    )  # fmt: skip

    def __post_init__(self) -> None:
        """Check every value by itself."""
        check_options(self)


@dataclass(frozen=True, kw_only=True)
class InferenceOptions:
    """How examples are run through a model."""

    batch_size: int = option(
        32, help="batch size (default {default})", flags=("--bs", "--batch-size"), group=MODEL, check=positive_integer
    )
    max_length: int = option(
        128, help="longer texts are truncated (default {default} tokens)", group=MODEL, check=positive_integer
    )
    bf16: bool = option(False, help="bfloat16 autocast: faster on a CPU with AMX, or a GPU", group=MODEL)

    def __post_init__(self) -> None:
        """Check every value by itself."""
        check_options(self)
