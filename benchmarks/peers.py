"""The dense engines the CPU benchmark compares with, each in the forms among which its fastest is looked for."""

import importlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import llama
import torch
from hardware import has_vnni
from torch import Tensor, nn
from workloads import Inputs, Sequences, load

Call = Callable[[Inputs], Tensor]
"""From a padded batch to logits or vectors, ``[batch, …]``."""
CALIBRATION_SEQUENCES = 32


@dataclass(frozen=True)
class Model:
    """Where a workload's model is, in the forms that were prepared.

    Attributes:
        checkpoint: the pruned checkpoint; its weights alone are the dense model.
        folder: where exported models are.
        names: the inputs, in order.
        pooled: whether it gives the mean of its last states, not logits.
    """

    checkpoint: Path
    folder: Path
    names: tuple[str, ...]
    pooled: bool = False


@dataclass(frozen=True)
class Form:
    """One way to run a model.

    Attributes:
        about: what is particular, for a reader.
        file: what it reads, in the model's folder; empty for the checkpoint.
        write: writes that file; it may need those of the forms before it.
        options: for the peer's ``build``.
    """

    about: str = ""
    file: str = ""
    write: Callable[[Model, Sequences, Path], None] | None = None
    options: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Peer:
    """A dense engine.

    Attributes:
        settings: what it runs with, for a reader.
        packages: what it imports.
        build: gives the engine for a form, a dtype and a number of threads.
        forms: per dtype that it has, those to choose the fastest of.
    """

    settings: str
    packages: tuple[str, ...]
    build: Callable[[Model, Form, str, int], Call]
    forms: Mapping[str, Sequence[Form]]


def outcome(output: Any, mask: Tensor, pooled: bool) -> Tensor:
    """Logits, or the mean of valid tokens' states, from a model's output."""
    if not pooled:
        logits: Tensor = output.logits
        return logits
    states: Tensor = output.last_hidden_state
    weights = mask[..., None].to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1)


class _Exported(nn.Module):
    """The model as a function of positional inputs to one tensor, which is what exporters take."""

    def __init__(self, model: Model, **kwargs: Any) -> None:
        super().__init__()
        self.module = load(model.checkpoint, **kwargs).eval()
        self.names, self.pooled = model.names, model.pooled

    def forward(self, *inputs: Tensor) -> Tensor:
        named = dict(zip(self.names, inputs, strict=True))
        return outcome(self.module(**named), named["attention_mask"], self.pooled)


def _example(model: Model, sequences: Sequences) -> tuple[Tensor, ...]:
    """A small batch with padding, batch and width both above 1."""
    inputs = sequences.pad([feature for batch in sequences.draw(0) for feature in batch][:3])
    return tuple(inputs[name] for name in model.names)


def _calibration(model: Model, sequences: Sequences) -> list[list[Any]]:
    """Sequences of the workload's lengths, one by one, to quantise activations by."""
    features = [feature for batch in sequences.draw(2**31 - 4) for feature in batch]
    chosen = features[:: max(1, len(features) // CALIBRATION_SEQUENCES)][:CALIBRATION_SEQUENCES]
    return [[sequences.pad([feature])[name].numpy() for name in model.names] for feature in chosen]


# transformers, and torch.compile of it


def _transformers(model: Model, form: Form, dtype: str, threads: int) -> Call:
    module = load(model.checkpoint, dtype=getattr(torch, dtype))

    def call(inputs: Inputs) -> Tensor:
        with torch.inference_mode():
            return outcome(module(**inputs), inputs["attention_mask"], model.pooled)

    return call


def _torch_compile(model: Model, form: Form, dtype: str, threads: int) -> Call:
    import torch._inductor.config

    torch._inductor.config.freezing = True  # packs the weights for the processor
    module = load(model.checkpoint, dtype=getattr(torch, dtype))
    compiled = torch.compile(module, dynamic=True)

    def call(inputs: Inputs) -> Tensor:
        with torch.no_grad():
            return outcome(compiled(**inputs), inputs["attention_mask"], model.pooled)

    return call


# ONNX Runtime


def _export_onnx(model: Model, sequences: Sequences, path: Path) -> None:
    module = _Exported(model, attn_implementation="eager")
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        torch.onnx.export(
            module,
            _example(model, sequences),
            path,
            input_names=list(model.names),
            output_names=["output"],
            dynamic_axes={**{name: {0: "batch", 1: "width"} for name in model.names}, "output": {0: "batch"}},
            opset_version=17,
            dynamo=False,
        )


def _fuse_onnx(model: Model, sequences: Sequences, path: Path) -> None:
    from onnxruntime.transformers import optimizer

    config = load(model.checkpoint).config
    with _without_logging():
        fused = optimizer.optimize_model(
            str(model.folder / "plain.onnx"),
            model_type="bert",
            num_heads=config.num_attention_heads,
            hidden_size=config.hidden_size,
            opt_level=0,
        )
        fused.save_model_to_file(str(path))


def _quantize_onnx(source: str, model: Model, sequences: Sequences, path: Path) -> None:
    """Dynamically: activations by the range of every call."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    vnni = has_vnni()
    with _without_logging():
        quantize_dynamic(
            model.folder / source,
            path,
            per_channel=True,
            reduce_range=not vnni,  # sums of two products overflow 16 bits elsewhere
            weight_type=QuantType.QInt8 if vnni else QuantType.QUInt8,
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},  # fused operators tell no type
        )


def _quantize_onnx_statically(model: Model, sequences: Sequences, path: Path) -> None:
    """By ranges found on sequences, with quantised operators between Quantize and Dequantize."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    samples = [dict(zip(model.names, sample, strict=True)) for sample in _calibration(model, sequences)]

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(samples)

        def get_next(self) -> Any:
            return next(self.left, None)

    vnni, prepared = has_vnni(), path.with_suffix(".prepared.onnx")
    with _without_logging():
        quant_pre_process(str(model.folder / "plain.onnx"), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            prepared,
            path,
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            reduce_range=not vnni,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},  # attention's products stay as they are, as dynamically
        )
    prepared.unlink()


@contextmanager
def _without_logging() -> Iterator[None]:
    """Quantisers and optimisers warn of what does not matter here."""
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _onnxruntime(model: Model, form: Form, dtype: str, threads: int) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.folder / form.file, options, providers=["CPUExecutionProvider"])
    used = {entry.name for entry in session.get_inputs()}

    def call(inputs: Inputs) -> Tensor:
        arrays = {name: value.numpy() for name, value in inputs.items() if name in used}
        return torch.from_numpy(session.run(None, arrays)[0])

    return call


# OpenVINO


def _export_openvino(model: Model, sequences: Sequences, path: Path) -> None:
    """With SDPA where the model has it, unless rows of padding that see nothing but padding become NaN there."""
    longest = max(sequences.draw(0)[-1], key=lambda feature: len(feature["input_ids"]))
    padded = sequences.pad([longest, {name: values[:5] for name, values in longest.items()}], 128)
    for kwargs in ({}, {"attn_implementation": "eager"}):
        _convert_openvino(_Exported(model, **kwargs), model, sequences, path)
        if not _openvino(model, _OPENVINO, "float32", 1)(padded).isnan().any():
            return


def _convert_openvino(module: nn.Module, model: Model, sequences: Sequences, path: Path) -> None:
    import openvino

    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        converted = openvino.convert_model(
            module,
            example_input=_example(model, sequences),
            input=[([-1, -1], openvino.Type.i64) for _ in model.names],
        )
    openvino.save_model(converted, path, compress_to_fp16=False)


def _halve_openvino(model: Model, sequences: Sequences, path: Path) -> None:
    import openvino

    openvino.save_model(openvino.Core().read_model(model.folder / "float32.xml"), path, compress_to_fp16=True)


def _quantize_openvino(model: Model, sequences: Sequences, path: Path) -> None:
    import nncf
    import openvino

    nncf.set_log_level(logging.ERROR)
    samples = _calibration(model, sequences)
    with redirect_stdout(io.StringIO()):  # progress bars
        quantized = nncf.quantize(
            openvino.Core().read_model(model.folder / "float32.xml"),
            nncf.Dataset(samples),
            model_type=nncf.ModelType.TRANSFORMER,
            preset=nncf.QuantizationPreset.PERFORMANCE,
            target_device=nncf.TargetDevice.CPU,
            subset_size=len(samples),
        )
    openvino.save_model(quantized, path, compress_to_fp16=False)


def _openvino(model: Model, form: Form, dtype: str, threads: int) -> Call:
    import openvino

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_CPU_PINNING": False,
        **(form.options or {}),
    }
    compiled = openvino.Core().compile_model(model.folder / form.file, "CPU", settings)
    request = compiled.create_infer_request()

    def call(inputs: Inputs) -> Tensor:
        outputs = request.infer([inputs[name].numpy() for name in model.names], share_inputs=True, share_outputs=True)
        return torch.from_numpy(outputs[0].copy())

    return call


_ONNX = Form("", "plain.onnx", _export_onnx)
_FUSED = Form("fused", "fused.onnx", _fuse_onnx)
_OPENVINO = Form("", "float32.xml", _export_openvino, {"INFERENCE_PRECISION_HINT": "f32"})

PEERS = {
    "transformers": Peer(
        "SDPA attention where the model has it, inference_mode",
        ("transformers",),
        _transformers,
        {"float32": [Form()], "bfloat16": [Form()]},
    ),
    "torch.compile": Peer(
        "dynamic=True with inductor's freezing (packed weights), of transformers with the same attention",
        ("transformers", "torch._inductor.config"),
        _torch_compile,
        {"float32": [Form()], "bfloat16": [Form()]},
    ),
    "ONNX Runtime": Peer(
        "exported with eager attention, opset 17, dynamic axes, all graph optimisations, the fastest of: as exported, "
        "and with BERT's operators fused by onnxruntime.transformers; int8: quantised dynamically, either of these, or "
        f"statically (QDQ, {CALIBRATION_SEQUENCES} sequences), weights per channel; it has no bfloat16 on these "
        "processors",
        ("onnxruntime",),
        _onnxruntime,
        {
            "float32": [_ONNX, _FUSED],
            "int8": [
                Form("dynamic", "plain-int8.onnx", partial(_quantize_onnx, "plain.onnx")),
                Form("fused, dynamic", "fused-int8.onnx", partial(_quantize_onnx, "fused.onnx")),
                Form("static", "static-int8.onnx", _quantize_onnx_statically),
            ],
        },
    ),
    "OpenVINO": Peer(
        "the same attention, eager where that gives NaN; dynamic shapes, PERFORMANCE_HINT LATENCY, "
        "INFERENCE_NUM_THREADS as stated, no pinning, one request at a time; INFERENCE_PRECISION_HINT as the dtype; "
        "bfloat16: weights stored in float16, smaller and no slower; int8: weights and activations quantised "
        "statically by NNCF, model type TRANSFORMER (with SmoothQuant), preset PERFORMANCE, "
        f"{CALIBRATION_SEQUENCES} sequences of the workload's lengths to calibrate, the rest in float32 or bfloat16, "
        "whichever is faster",
        ("openvino",),
        _openvino,
        {
            "float32": [_OPENVINO],
            "bfloat16": [Form("", "bfloat16.xml", _halve_openvino, {"INFERENCE_PRECISION_HINT": "bf16"})],
            "int8": [
                Form(f"the rest in {rest}", "int8.xml", _quantize_openvino, {"INFERENCE_PRECISION_HINT": hint})
                for rest, hint in (("float32", "f32"), ("bfloat16", "bf16"))
            ],
        },
    ),
    "llama.cpp": Peer(
        "through llama-cpp-python, built for this processor; unpadded; float32: F32 weights; bfloat16: F16 or BF16, "
        "whichever is faster; int8: Q8_0; with flash attention or without, whichever is faster",
        ("llama_cpp", "gguf"),
        lambda model, form, dtype, threads: llama.build(
            model.folder / form.file, threads, pooled=model.pooled, **(form.options or {})
        ),
        {
            dtype: [
                Form(
                    f"{kind}{', flash attention' if flash else ''}",
                    f"{kind}.gguf",
                    lambda model, sequences, path: llama.write(load(model.checkpoint), path),
                    {"flash": flash},
                )
                for kind in kinds
                for flash in (False, True)
            ]
            for dtype, kinds in {"float32": ["F32"], "bfloat16": ["F16", "BF16"], "int8": ["Q8_0"]}.items()
        },
    ),
}
# Files that forms are made from.
_BEFORE = {"ONNX Runtime": [_ONNX, _FUSED], "OpenVINO": [_OPENVINO]}


def import_packages(peer: Peer) -> None:
    """Import what a peer needs, so that memory measured after it is the engine's own.

    Raises:
        ImportError: for a package that is not installed.
    """
    for package in peer.packages:
        importlib.import_module(package)


def prepare(name: str, dtype: str, model: Model, sequences: Sequences) -> dict[int, Exception]:
    """Write the files a peer reads for ``dtype``; what exists is not written again.

    Returns:
        What went wrong, by the place of the form among the peer's: other projects' exporters fail in many ways.
    """
    failed: dict[int, Exception] = {}
    tried: dict[str, Exception | None] = {}
    for form in [*_BEFORE.get(name, []), *PEERS[name].forms[dtype]]:
        if form.file and form.file not in tried:
            tried[form.file] = _write(form, model, sequences)
    root = next(iter(tried.values()), None)
    for place, form in enumerate(PEERS[name].forms[dtype]):
        if error := tried.get(form.file):
            failed[place] = root or error
    return failed


def _write(form: Form, model: Model, sequences: Sequences) -> Exception | None:
    mark = model.folder / f"{form.file}.done"
    if mark.exists() or form.write is None:
        return None
    try:
        form.write(model, sequences, model.folder / form.file)
    except Exception as error:
        return error
    mark.touch()
    return None


def versions() -> dict[str, Any]:
    """Of everything that can change a figure; None where it is not installed."""
    found: dict[str, Any] = {}
    packages = ("token-pruning", "torch", "transformers", "onnxruntime", "onnx", "openvino", "nncf", "llama-cpp-python")
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found
