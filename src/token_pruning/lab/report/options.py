"""What a user can ask of a report, checked."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from token_pruning.checks import choice, positive_integer, whole_number
from token_pruning.lab.options import ENGINE_DTYPES, TEXTS_HELP, BudgetOptions, option


@dataclass(frozen=True, kw_only=True)
class ReportOptions(BudgetOptions):
    """One report.

    Raises:
        ConfigError: for a value that is not allowed.
    """

    restore: str = option(help="the same as FOLDER", metavar="FOLDER")
    texts: Path | None = option(None, help=TEXTS_HELP, metavar="FILE")
    output: Path | None = option(None, help="the page (default: FOLDER/report.html)", metavar="HTML")
    examples: int = option(
        200, help="how many texts are used (default {default})", check=partial(whole_number, low=2, high=10**6)
    )
    samples: int = option(
        6, help="texts that are shown, 0 for none (default {default})", check=partial(whole_number, low=0, high=1000)
    )
    batch_size: int = option(
        32, help="texts of a timed batch (default {default})", flags=("--bs", "--batch-size"), check=positive_integer
    )
    max_length: int | None = option(
        None, help="longer texts are truncated (default: the model's own limit)", check=positive_integer
    )
    dtype: str = option(
        "auto", help=f"of the engine: {', '.join(ENGINE_DTYPES)} (default {{default}})",
        check=partial(choice, allowed=ENGINE_DTYPES),
    )  # fmt: skip
    threads: int | None = option(None, help="of the engine (default: PyTorch's)", check=positive_integer)
