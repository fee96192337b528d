"""What a user can ask of the demo."""

from dataclasses import dataclass
from pathlib import Path

from token_pruning.lab.options import check_options, option, output_folder


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """One demo."""

    output_dir: Path = option(Path("demo_output"), help="default: {default}", check=output_folder)
    hub: bool = option(False, help="take the model from the hub, not from the PyPI package")

    def __post_init__(self) -> None:
        """Check everything that needs no file but the output folder."""
        check_options(self)
