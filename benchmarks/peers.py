"""The dense engines the CPU benchmark compares with, each with the settings that made it fastest."""

import importlib
import io
import logging
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from workloads import Inputs, Sequences, load

Call = Callable[[Inputs], Tensor]
"""From a padded batch to logits."""


@dataclass(frozen=True)
class Model:
    """Where a workload's model is, in the forms that were prepared.

    Attributes:
        checkpoint: the pruned checkpoint; its weights alone are the dense model.
        folder: where exported models are.
        names: the inputs, in order.
    """

    checkpoint: Path
    folder: Path
    names: tuple[str, ...]


@dataclass(frozen=True)
class Peer:
    """A dense engine.

    Attributes:
        settings: what it runs with, for a reader.
        packages: what it imports.
        build: gives the engine for a dtype and a number of threads.
        prepare: per dtype, what writes the file that ``build`` reads, from the files of the dtypes before it.
        dtypes: the precisions it has.
    """

    settings: str
    packages: tuple[str, ...]
    dtypes: tuple[str, ...]
    build: Callable[[Model, str, int], Call]
    prepare: Mapping[str, Callable[[Model, Sequences], None]]


class _Logits(nn.Module):
    """The model as a function of positional inputs that returns logits, which is what exporters take."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Tensor:
        logits: Tensor = self.model(**dict(zip(self.names, inputs, strict=True))).logits
        return logits


def _example(model: Model, sequences: Sequences) -> tuple[Tensor, ...]:
    """A small batch with padding, batch and width both above 1."""
    inputs = sequences.pad([feature for batch in sequences.draw(0) for feature in batch][:3])
    return tuple(inputs[name] for name in model.names)


# transformers, and torch.compile of it


def _transformers(model: Model, dtype: str, threads: int) -> Call:
    module = load(model.checkpoint, dtype=getattr(torch, dtype), attn_implementation="sdpa")

    def call(inputs: Inputs) -> Tensor:
        with torch.no_grad():
            return module(**inputs).logits

    return call


def _torch_compile(model: Model, dtype: str, threads: int) -> Call:
    import torch._inductor.config

    torch._inductor.config.freezing = True  # packs the weights for the processor
    module = load(model.checkpoint, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    module = torch.compile(module, dynamic=True)

    def call(inputs: Inputs) -> Tensor:
        with torch.no_grad():
            return module(**inputs).logits

    return call


# ONNX Runtime


def _export_onnx(model: Model, sequences: Sequences) -> None:
    module = load(model.checkpoint, attn_implementation="eager")
    axes = {name: {0: "batch", 1: "width"} for name in model.names}
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        torch.onnx.export(
            _Logits(module, model.names),
            _example(model, sequences),
            model.folder / "float32.onnx",
            input_names=list(model.names),
            output_names=["logits"],
            dynamic_axes={**axes, "logits": {0: "batch"}},
            opset_version=17,
            dynamo=False,
        )


def _quantize_onnx(model: Model, sequences: Sequences) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.getLogger().setLevel(logging.ERROR)
    quantize_dynamic(
        model.folder / "float32.onnx", model.folder / "int8.onnx", per_channel=True, weight_type=QuantType.QInt8
    )


def _onnxruntime(model: Model, dtype: str, threads: int) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = onnxruntime.InferenceSession(model.folder / f"{dtype}.onnx", options, providers=["CPUExecutionProvider"])
    used = {entry.name for entry in session.get_inputs()}

    def call(inputs: Inputs) -> Tensor:
        arrays = {name: value.numpy() for name, value in inputs.items() if name in used}
        return torch.from_numpy(session.run(None, arrays)[0])

    return call


# OpenVINO


def _export_openvino(model: Model, sequences: Sequences) -> None:
    import openvino

    module = _Logits(load(model.checkpoint, attn_implementation="sdpa"), model.names).eval()
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        converted = openvino.convert_model(
            module,
            example_input=_example(model, sequences),
            input=[([-1, -1], openvino.Type.i64) for _ in model.names],
        )
    openvino.save_model(converted, model.folder / "float32.xml", compress_to_fp16=False)


def _halve_openvino(model: Model, sequences: Sequences) -> None:
    import openvino

    whole = openvino.Core().read_model(model.folder / "float32.xml")
    openvino.save_model(whole, model.folder / "bfloat16.xml", compress_to_fp16=True)


def _quantize_openvino(model: Model, sequences: Sequences) -> None:
    import nncf
    import openvino

    nncf.set_log_level(logging.ERROR)
    features = [feature for batch in sequences.draw(2**31 - 4) for feature in batch]
    chosen = features[:: max(1, len(features) // 32)][:32]
    samples = [[sequences.pad([feature])[name].numpy() for name in model.names] for feature in chosen]
    with redirect_stdout(io.StringIO()):  # progress bars
        quantized = nncf.quantize(
            openvino.Core().read_model(model.folder / "float32.xml"),
            nncf.Dataset(samples),
            model_type=nncf.ModelType.TRANSFORMER,
            preset=nncf.QuantizationPreset.PERFORMANCE,
            target_device=nncf.TargetDevice.CPU,
            subset_size=len(samples),
        )
    openvino.save_model(quantized, model.folder / "int8.xml", compress_to_fp16=False)


def _openvino(model: Model, dtype: str, threads: int) -> Call:
    import openvino

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_CPU_PINNING": False,
        "INFERENCE_PRECISION_HINT": "f32" if dtype == "float32" else "bf16",
    }
    compiled = openvino.Core().compile_model(model.folder / f"{dtype}.xml", "CPU", settings)
    request = compiled.create_infer_request()

    def call(inputs: Inputs) -> Tensor:
        outputs = request.infer([inputs[name].numpy() for name in model.names], share_inputs=True, share_outputs=True)
        return torch.from_numpy(outputs[0].copy())

    return call


PEERS = {
    "transformers": Peer(
        "SDPA attention, no_grad",
        ("transformers",),
        ("float32", "bfloat16"),
        _transformers,
        {},
    ),
    "torch.compile": Peer(
        "dynamic=True with inductor's freezing (packed weights), of transformers with SDPA attention",
        ("transformers", "torch._inductor.config"),
        ("float32", "bfloat16"),
        _torch_compile,
        {},
    ),
    "ONNX Runtime": Peer(
        "exported with eager attention, opset 17, dynamic axes, all graph optimisations; "
        "int8: dynamic quantisation, weights per channel; it has no bfloat16 on this kind of processor",
        ("onnxruntime",),
        ("float32", "int8"),
        _onnxruntime,
        {"float32": _export_onnx, "int8": _quantize_onnx},
    ),
    "OpenVINO": Peer(
        "dynamic shapes, PERFORMANCE_HINT LATENCY, INFERENCE_NUM_THREADS as stated, no pinning, one request at a time; "
        "INFERENCE_PRECISION_HINT f32 for float32, else bf16; bfloat16: weights stored in float16, smaller and no "
        "slower; int8: weights and activations quantised by NNCF after training, preset PERFORMANCE with "
        "SmoothQuant, 32 sequences of the workload's lengths to calibrate",
        ("openvino",),
        ("float32", "bfloat16", "int8"),
        _openvino,
        {"float32": _export_openvino, "bfloat16": _halve_openvino, "int8": _quantize_openvino},
    ),
}


def import_packages(peer: Peer) -> None:
    """Import what a peer needs, so that memory measured after it is the engine's own.

    Raises:
        ImportError: for a package that is not installed.
    """
    for package in peer.packages:
        importlib.import_module(package)


def prepare(name: str, dtype: str, model: Model, sequences: Sequences) -> None:
    """Write the files a peer reads for ``dtype``; what exists is not written again."""
    for needed, write in PEERS[name].prepare.items():
        mark = model.folder / f"{name}-{needed}.done"
        if (needed == dtype or needed == "float32") and not mark.exists():
            write(model, sequences)
            mark.touch()


def versions() -> dict[str, Any]:
    """Of everything that can change a figure; None where it is not installed."""
    found: dict[str, Any] = {}
    for package in ("token-pruning", "torch", "transformers", "onnxruntime", "onnx", "openvino", "nncf"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found
