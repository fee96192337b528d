"""Writing a checkpoint as a graph for other runtimes."""

from dataclasses import dataclass
from pathlib import Path

from token_pruning.checkpoint import from_pretrained, read_checkpoint
from token_pruning.errors import CheckpointError, ConfigError
from token_pruning.integrations.export import Format, export
from token_pruning.lab.options import BudgetOptions, option
from token_pruning.lab.training.load import load_tokenizer
from token_pruning.runtime.adapters import adapter_for
from token_pruning.runtime.prune import set_budget


@dataclass(frozen=True, kw_only=True)
class ExportOptions(BudgetOptions):
    """Exporting one checkpoint.

    Raises:
        ConfigError: for a value that is not allowed.
    """

    restore: str = option(help="pruned checkpoint", flags=("--restore", "--restore-file"), metavar="CKPT")
    output: str = option(help="a new folder, or a file that ends in .onnx, or in .xml for OpenVINO")
    format: Format | None = option(None, help="onnx or openvino (default: by the file's name; openvino for a folder)")


def export_checkpoint(options: ExportOptions) -> Path:
    """Write the graph, and beside it in a folder ``config.json`` and the tokenizer.

    Raises:
        TokenPruningError: as :func:`token_pruning.export`, and for a bad checkpoint.
    """
    folder = Path(options.restore)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder")
    output = Path(options.output)
    in_folder = output.suffix not in (".onnx", ".xml")
    tokenizer = None
    if adapter_for(folder) is None:
        checkpoint = read_checkpoint(folder)
        if checkpoint.config.get("prune_mode") is None:
            raise ConfigError(f"{folder / 'config.json'}: prune_mode is missing: the checkpoint is dense")
        tokenizer = load_tokenizer(checkpoint) if in_folder else None
    model = from_pretrained(folder)
    if options.budget is not None:
        set_budget(model, options.budget)
    return export(model, output, format=options.format, tokenizer=tokenizer)
