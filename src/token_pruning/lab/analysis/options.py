"""What a user can ask of an analysis, checked."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from token_pruning.checks import number, positive_integer, whole_number
from token_pruning.errors import ConfigError
from token_pruning.lab.options import InferenceOptions, option, output_folder


def _budgets(flag: str, values: list[float]) -> None:
    for value in values:
        number(flag, value, above=0, high=1)
        if values.count(value) > 1:
            raise ConfigError(f"{flag} gives {value:g} twice; every budget is analyzed once")


@dataclass(frozen=True, kw_only=True)
class AnalyzeOptions(InferenceOptions):
    """One analysis.

    Raises:
        ConfigError: for a value that is not allowed, a checkpoint or a budget twice, or names that do not fit.
    """

    restore: list[str] = option(help="one or more checkpoints", metavar="CKPT")
    names: list[str] | None = option(None, help="what to call them (default: their folders' names)", metavar="NAME")
    budgets: list[float] | None = option(
        None, help="of every checkpoint for several budgets: analyze it at each of these, relative FLOPs (default: as "
        "it was saved)", metavar="F", check=_budgets,
    )  # fmt: skip
    output_dir: Path = option(help="where to write; an older analysis is replaced", check=output_folder)
    quantiles: int = option(4, help="groups of examples by length (default {default})", check=positive_integer)
    samples: int = option(
        8,
        help="texts whose tokens are shown, 0 for none (default {default})",
        check=partial(whole_number, low=0, high=10**6),
    )

    def __post_init__(self) -> None:
        """Check everything that needs no file but the output folder."""
        super().__post_init__()
        self.checkpoint_names()

    def checkpoint_names(self) -> list[str]:
        """What the checkpoints are called: the shortest ends of their paths that differ, unless given.

        Raises:
            ConfigError: for a checkpoint or a name that is given twice, or too few or too many names.
        """
        names, restore = self.names, self.restore
        if names is not None:
            if len(names) != len(restore):
                raise ConfigError(
                    f"--names gives {len(names)} ({', '.join(names)}); it must give one for each of the {len(restore)} "
                    "checkpoints of --restore"
                )
            for name in names:
                if names.count(name) > 1:
                    raise ConfigError(f"--names gives {name!r} twice; every checkpoint needs a name of its own")
            return list(names)
        parts = [Path(path).resolve().parts for path in restore]
        for path, own in zip(restore, parts, strict=True):
            if parts.count(own) > 1:
                raise ConfigError(f"--restore gives {path} twice; every checkpoint is analyzed once")
        for count in range(1, max(map(len, parts))):
            ends = ["/".join(own[-count:]) for own in parts]
            if len(set(ends)) == len(ends):
                return ends
        return list(restore)
