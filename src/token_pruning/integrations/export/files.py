"""Writing a pruned model's graph, and what stands beside it in a folder."""

import copy
import inspect
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from token_pruning.checks import choice
from token_pruning.errors import ConfigError, TokenPruningError, UnsupportedModelError
from token_pruning.integrations.export.traced import Traced
from token_pruning.pruners import method_keys
from token_pruning.runtime.adapters import adapter_of
from token_pruning.runtime.prune import attachment_of, hugging_face_model

Format = Literal["onnx", "openvino"]

_FILES: dict[str, str] = {"onnx": "model.onnx", "openvino": "openvino_model.xml"}  # as optimum looks for them
_FORMATS = {".onnx": "onnx", ".xml": "openvino"}
_OPSET = 18  # the first with a maximum over scattered values
_MOST_BYTES = 2**31 - 2**24  # of one ONNX file, with room for the graph


def export(model: Any, output: str | os.PathLike[str], *, format: Format | None = None, tokenizer: Any = None) -> Path:
    """Write a pruned model as a graph for ONNX Runtime or OpenVINO, which really removes tokens.

    The graph takes ``input_ids``, ``attention_mask`` and, where the model has several token types, ``token_type_ids``:
    ``[batch, width]`` int64 of any batch and width, padded left or right. It computes no padding but in attention,
    takes the model's own decisions, and gives what the model gives, in float32: ``logits``, ``start_logits`` and
    ``end_logits``, or ``last_hidden_state`` with ``pooler_output``. That of a ``SentenceTransformer`` also gives
    ``sentence_embedding``, after all of its modules. A ``CrossEncoder``'s logits are those before its activation. A
    graph checks nothing: ids outside their tables and texts longer than the model's positions are the runtime's own
    errors, or undefined.

    Args:
        model: a pruned model of transformers with input ids and any head but multiple choice, also with LoRA,
            which are merged in a copy; or a pruned ``SentenceTransformer`` or ``CrossEncoder``.
        output: a file that ends in ``.onnx``, or in ``.xml`` for OpenVINO (its weights go beside it, into ``.bin``);
            else a folder, which gets the graph, ``config.json`` and tokenizer files, and of a sentence-transformers
            model all but the weights, as that library and optimum load them with the backend ``"onnx"`` or
            ``"openvino"``.
        format: ``"onnx"`` or ``"openvino"``; as the file's name says, and ``"openvino"`` for a folder, unless given.
        tokenizer: of transformers, for a folder; a sentence-transformers model has its own.

    Returns:
        ``output``.

    Raises:
        ConfigError: if the model is not pruned, for a setting that a graph cannot have (summary tokens,
            ``max_tokens``), a wrong format, or a folder that is not empty.
        UnsupportedModelError: for a model or a method of another kind, or weights of more than 2 GB in one ONNX file.
        TokenPruningError: if a package is missing: ``pip install 'token-pruning[export]'``.
    """
    path = Path(output)
    kind = _format(path, format)
    in_folder = path.suffix.lower() not in _FORMATS
    if in_folder and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"output is {path}, which exists; it must be a new or empty folder, or end in .onnx or .xml")
    if tokenizer is not None and not in_folder:
        raise ConfigError(f"tokenizer is given, but output is the file {path}; only a folder can hold both")
    _need("onnx", *(["openvino"] if kind == "openvino" else []))
    adapter = adapter_of(model)
    graph: Any = Traced(model, rounded=kind == "openvino")
    size = sum(weight.numel() * weight.element_size() for weight in graph.parameters())
    if kind == "onnx" and size > _MOST_BYTES:
        raise UnsupportedModelError(f"the weights have {size / 2**30:.1f} GB; one ONNX file holds 2: format='openvino'")
    with _staged(path) as staging:
        folder = staging / "whole"
        folder.mkdir()
        if adapter is not None:
            from token_pruning.integrations.sentence_transformers.exported import save_without_weights, with_vector

            graph = with_vector(model, graph)
            if in_folder:
                save_without_weights(model, folder)
        elif in_folder:
            _save_settings(model, tokenizer, folder)
        written = _write(graph, kind, folder, staging)
        if in_folder:
            folder.replace(path)
        else:  # the file that names the other comes last
            *others, first = reversed(written)
            for file in others:
                file.replace(path.with_suffix(file.suffix))
            first.replace(path)
    return path


def _format(path: Path, asked: Format | None) -> str:
    if asked is not None:
        choice("format", asked, get_args(Format))
    named = _FORMATS.get(path.suffix.lower())
    if asked is not None and named not in (None, asked):
        raise ConfigError(f"format is {asked!r}, but output is {path}, a file for {named!r}")
    return asked or named or "openvino"


def _need(*packages: str) -> None:
    for package in packages:
        try:
            import_module(package)
        except ImportError as error:
            raise TokenPruningError(
                f"an export needs {package}: pip install 'token-pruning[export]' ({error})"
            ) from error


@contextmanager
def _staged(path: Path) -> Iterator[Path]:
    """A folder beside ``path`` for what is not whole yet."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="incomplete-", dir=path.parent) as staging:
            yield Path(staging)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}") from error


def _save_settings(model: Any, tokenizer: Any, folder: Path) -> None:
    """``config.json`` as the dense model has it, since the graph has the pruning in it, and the tokenizer's files."""
    inner = hugging_face_model(model)
    config = copy.deepcopy(attachment_of(inner).config_before)
    for key in method_keys():  # of a model that was loaded pruned
        config.__dict__.pop(key, None)
    config.architectures = [type(inner).__name__]
    config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _write(graph: Any, kind: str, folder: Path, staging: Path) -> list[Path]:
    """The graph's files in ``folder``, the one that is opened first."""
    onnx_file = (folder if kind == "onnx" else staging) / _FILES["onnx"]
    _trace(graph, onnx_file)
    if kind == "onnx":
        return [onnx_file]
    import openvino

    converted = openvino.Core().read_model(onnx_file)
    for name, put in zip(graph.inputs, converted.inputs, strict=True):
        put.get_tensor().set_names({name})
    for name, put in zip(graph.outputs, converted.outputs, strict=True):
        put.get_tensor().set_names({name})
    file = folder / _FILES["openvino"]
    openvino.save_model(converted, file, compress_to_fp16=False)
    return [file, file.with_suffix(".bin")]


def _trace(graph: Any, file: Path) -> None:
    """Write ``graph`` as ONNX.

    By the exporter that traces tensors (torch's older one): to it, numbers of rows that are known only when the graph
    runs are tensors like any other.
    """
    places = {name: {0: "batch", 1: "width"} for name in graph.inputs}
    with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            torch.onnx.export(
                graph,
                graph.example(),
                file,
                input_names=list(graph.inputs),
                output_names=list(graph.outputs),
                dynamic_axes={**places, **graph.dynamic_outputs()},
                opset_version=_OPSET,
                dynamo=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise UnsupportedModelError(f"the graph cannot be exported: {str(error).splitlines()[0]}") from error
    _check_trace(graph, caught)


def _check_trace(graph: Any, caught: list[warnings.WarningMessage]) -> None:
    """Raises UnsupportedModelError if a method or family of others made numbers of tensors: those of one input."""
    for part in (graph.token_pruner.pruner, graph.family):
        own = type(part)
        if own.__module__.partition(".")[0] == "token_pruning":
            continue
        for warning in caught:
            if warning.category.__name__ == "TracerWarning" and warning.filename == inspect.getsourcefile(own):
                raise UnsupportedModelError(
                    f"{own.__name__} makes Python numbers of tensors (line {warning.lineno} of {warning.filename}); "
                    "in a graph they would be those of one input"
                )
