"""ONNX Runtime and OpenVINO under sentence-transformers, so that encode, predict and rank themselves are timed.

Their own backends need optimum, whose exporters want an older transformers: optimum-onnx 0.1 asks for less than 4.58,
optimum-intel 2.2 for less than 5.6. So the model inside the first module is replaced by one that calls the engine;
tokenizing, sorting by length, padding and pooling stay sentence-transformers'.
"""

import io
import logging
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from hardware import has_vnni
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput

Model = Any
"""A SentenceTransformer or a CrossEncoder."""
Engine = Callable[[list[Tensor]], Tensor]
"""From the inputs, in order, to last states or logits."""

QUANTIZATION_TEXTS = 128
SETTINGS = {
    "ONNX Runtime": "opset 17, eager attention, dynamic axes, BERT's operators fused by onnxruntime.transformers where "
    "that is faster, all graph optimisations; int8: dynamic quantisation as sentence-transformers does it for the "
    "processor, weights per channel",
    "OpenVINO": "SDPA attention, dynamic shapes, PERFORMANCE_HINT LATENCY, INFERENCE_PRECISION_HINT f32 or bf16, no "
    "pinning; "
    f"int8: weights and activations quantised by NNCF on {QUANTIZATION_TEXTS} of the texts to calibrate on, preset "
    "PERFORMANCE with SmoothQuant",
}


class _Outside(nn.Module):
    """What stands where the Hugging Face model stood."""

    def __init__(self, model: nn.Module, names: tuple[str, ...], engine: Engine) -> None:
        super().__init__()
        self.config, self._names, self._engine = model.config, names, engine
        self._states = not hasattr(model, "classifier")
        self.register_buffer("_place", torch.zeros(()), persistent=False)  # tells sentence-transformers the device

    def forward(self, **inputs: Any) -> BaseModelOutput | SequenceClassifierOutput:
        found = self._engine([inputs[name] for name in self._names])
        if self._states:
            return BaseModelOutput(last_hidden_state=found)
        return SequenceClassifierOutput(logits=found.clone())  # kept after the next call, which may use its memory


class _Positional(nn.Module):
    """The model as a function of positional inputs, which is what exporters take."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Tensor:
        found = self.model(**dict(zip(self.names, inputs, strict=True)))
        states: Tensor = found.logits if hasattr(found, "logits") else found.last_hidden_state
        return states


def inputs_of(model: Model, texts: Sequence[Any]) -> dict[str, Tensor]:
    """What the tokenizer makes of texts or pairs that the model takes, in a fixed order."""
    features = model.preprocess(list(texts))
    return {name: features[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in features}


def put(model: Model, engine: Engine, names: tuple[str, ...]) -> Model:
    """Let an engine compute instead of the model inside; returns ``model``."""
    model[0].model = _Outside(model[0].model, names, engine)
    return model


# ONNX Runtime


def export_onnx(model: Model, texts: Sequence[Any], folder: Path) -> None:
    """Write ``plain.onnx``, ``fused.onnx`` and, of each, ``…-int8.onnx``."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.transformers import optimizer

    inside = model[0].model
    inside.set_attn_implementation("eager")
    example = inputs_of(model, texts[:3])
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        torch.onnx.export(
            _Positional(inside, tuple(example)),
            tuple(example.values()),
            folder / "plain.onnx",
            input_names=list(example),
            output_names=["output"],
            dynamic_axes={name: {0: "batch", 1: "width"} for name in (*example, "output")},
            opset_version=17,
            dynamo=False,
        )
    logging.disable(logging.ERROR)
    try:
        config = inside.config
        fused = optimizer.optimize_model(
            str(folder / "plain.onnx"),
            model_type="bert",
            num_heads=config.num_attention_heads,
            hidden_size=config.hidden_size,
            opt_level=0,
        )
        fused.save_model_to_file(str(folder / "fused.onnx"))
        vnni = has_vnni()
        for source in ("plain", "fused"):
            quantize_dynamic(
                folder / f"{source}.onnx",
                folder / f"{source}-int8.onnx",
                per_channel=True,
                reduce_range=not vnni,
                weight_type=QuantType.QInt8 if vnni else QuantType.QUInt8,
                extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},  # fused operators tell no type
            )
    finally:
        logging.disable(logging.NOTSET)


def onnx_runtime(path: Path, threads: int) -> Engine:
    """An engine of a file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    used = [entry.name for entry in session.get_inputs()]

    def call(inputs: list[Tensor]) -> Tensor:
        arrays = {name: value.numpy() for name, value in zip(used, inputs, strict=True)}
        return torch.from_numpy(session.run(None, arrays)[0])

    return call


# OpenVINO


def export_openvino(model: Model, texts: Sequence[Any], folder: Path) -> None:
    """Write ``float32.xml`` and ``int8.xml``."""
    import nncf
    import openvino

    inside = model[0].model
    inside.set_attn_implementation("sdpa")
    example = inputs_of(model, texts[:3])
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        converted = openvino.convert_model(
            _Positional(inside, tuple(example)).eval(),
            example_input=tuple(example.values()),
            input=[([-1, -1], openvino.Type.i64) for _ in example],
        )
    openvino.save_model(converted, folder / "float32.xml", compress_to_fp16=False)
    nncf.set_log_level(logging.ERROR)
    chosen = texts[:: max(1, len(texts) // QUANTIZATION_TEXTS)][:QUANTIZATION_TEXTS]
    samples = [[value.numpy() for value in inputs_of(model, [text]).values()] for text in chosen]
    with redirect_stdout(io.StringIO()):  # progress bars
        quantized = nncf.quantize(
            openvino.Core().read_model(folder / "float32.xml"),
            nncf.Dataset(samples),
            model_type=nncf.ModelType.TRANSFORMER,
            preset=nncf.QuantizationPreset.PERFORMANCE,
            target_device=nncf.TargetDevice.CPU,
            subset_size=len(samples),
        )
    openvino.save_model(quantized, folder / "int8.xml", compress_to_fp16=False)


def openvino_engine(path: Path, threads: int, precision: str = "f32") -> Engine:
    """An engine of a file; ``precision`` is that of the products that the file leaves in float32."""
    import openvino

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_CPU_PINNING": False,
        "INFERENCE_PRECISION_HINT": precision,
    }
    request = openvino.Core().compile_model(path, "CPU", settings).create_infer_request()

    def call(inputs: list[Tensor]) -> Tensor:
        outputs = request.infer([value.numpy() for value in inputs], share_inputs=True, share_outputs=True)
        return torch.from_numpy(outputs[0])

    return call
