"""What a user can ask of the demo."""

from dataclasses import dataclass
from pathlib import Path

from token_pruning.lab.options import option


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """One demo."""

    output_dir: Path = option(Path("demo_output"), help="default: {default}")
    hub: bool = option(False, help="take the model from the hub, not from the PyPI package")
