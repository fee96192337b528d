"""Folders that sentence-transformers wrote, with a pruned model inside."""

import json
from pathlib import Path, PurePosixPath
from typing import Any

from sentence_transformers import CrossEncoder, SentenceTransformer
from transformers import AutoModel, AutoModelForSequenceClassification

from token_pruning.checkpoint.loading import Checkpoint, load_model, read_checkpoint
from token_pruning.checkpoint.settings import (
    check_config,
    check_has_tokenizer,
    foreign_errors,
    naming,
    quiet,
    read_json_object,
)
from token_pruning.errors import CheckpointError, ConfigError, UnsupportedModelError
from token_pruning.pruners import Pruner
from token_pruning.runtime.attachment import Execution

_CLASSES = {"SentenceTransformer": SentenceTransformer, "CrossEncoder": CrossEncoder}
_MODULES, _SETTINGS, _TRANSFORMER = "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"
_ARGUMENTS = ("model_kwargs", "model_args", "config_kwargs", "config_args")


def load(folder: Path, pruner: Pruner | None, *, execution: Execution, **kwargs: Any) -> Any:
    """The SentenceTransformer or CrossEncoder of a folder, pruned, in evaluation mode.

    Args:
        folder: with ``modules.json``.
        pruner: the method; the one that ``config.json`` names unless given.
        execution: as for :func:`token_pruning.prune`.
        kwargs: for the class; ``dtype`` goes to the transformer.

    Raises:
        CheckpointError: for a folder that is not whole, or has pickled weights.
        ConfigError: for settings that are not allowed.
        UnsupportedModelError: for modules that are not sentence-transformers' own, and for its other models.
    """
    model_class, checkpoint = _read(folder)
    if pruner is None:
        pruner = checkpoint.pruner(learned=checkpoint.config.get("masking_mode") == "soft")
    return checkpoint.prune(_built(folder, model_class, checkpoint, kwargs), pruner, execution=execution)


def load_dense(folder: Path, **kwargs: Any) -> Any:
    """The model without pruning, read as strictly; arguments and errors as for :func:`load`."""
    return _built(folder, *_read(folder), kwargs)


def names_method(folder: Path) -> bool:
    """Whether the configuration of a folder's transformer has a ``prune_mode``; errors as for :func:`load`."""
    return "prune_mode" in _read(folder)[1].config


def _read(folder: Path) -> tuple[Any, Checkpoint]:
    """The class of a folder's model, and the checkpoint of its transformer."""
    paths = _module_folders(folder)
    settings = read_json_object(folder / _SETTINGS) if (folder / _SETTINGS).exists() else {}
    name = settings.get("model_type", "SentenceTransformer")
    if name not in _CLASSES:
        raise UnsupportedModelError(
            f"{folder / _SETTINGS}: model_type is {name!r}; models that can be pruned are {', '.join(_CLASSES)}"
        )
    return _CLASSES[name], read_checkpoint(paths[0])


def _built(folder: Path, model_class: Any, checkpoint: Checkpoint, kwargs: dict[str, Any]) -> Any:
    """The dense model, in evaluation mode; ``dtype`` goes to the transformer."""
    check_has_tokenizer(checkpoint.path)
    of_transformer = {**(kwargs.pop("model_kwargs", None) or {})}
    if "dtype" in kwargs:
        of_transformer["dtype"] = kwargs.pop("dtype")
    # The strict reading of the weights: what is missing or of another shape would be random numbers below.
    load_model(checkpoint, model_class=_head(checkpoint.path / _TRANSFORMER), **of_transformer)
    with quiet(), foreign_errors(f"{folder} cannot be loaded"):
        return model_class(
            str(folder),
            trust_remote_code=False,
            local_files_only=True,
            model_kwargs={**of_transformer, "use_safetensors": True},
            **kwargs,
        ).eval()


def _module_folders(folder: Path) -> list[Path]:
    """The folders of the modules, in order; nothing of them is run that is not sentence-transformers' own."""
    file = folder / _MODULES
    try:
        modules = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
    if not isinstance(modules, list) or not modules:
        raise ConfigError(f"{file} holds a {type(modules).__name__}; it must be a list of modules")
    found = []
    for module in modules:
        entry = module if isinstance(module, dict) else {}
        kind, path = entry.get("type"), entry.get("path")
        if not isinstance(kind, str) or not isinstance(path, str):
            raise ConfigError(f"{file} lists {module!r}; a module is an object with a type and a path")
        if kind.partition(".")[0] != "sentence_transformers":
            raise UnsupportedModelError(
                f"{file}: type is {kind!r}; it must be a class of sentence_transformers: no other code is run "
                "because a checkpoint names it"
            )
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise ConfigError(f"{file}: path is {path!r}; it must be a folder below {folder}")
        found.append(folder / path)
        pickled = folder / path / "pytorch_model.bin"
        if pickled.exists() and not any((folder / path).glob("*.safetensors")):
            raise CheckpointError(
                f"{pickled} is a pickle, which can run any code when it is read, so it is never loaded"
            )
    return found


def _head(file: Path) -> Any:
    """The class of transformers that a Transformer module loads, its settings checked."""
    settings = read_json_object(file) if file.exists() else {}
    with naming(file):
        for name in _ARGUMENTS:
            if isinstance(given := settings.get(name), dict):
                check_config(given, file)
    sequence = settings.get("transformer_task") == "sequence-classification"
    return AutoModelForSequenceClassification if sequence else AutoModel
