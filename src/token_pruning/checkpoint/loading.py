"""Loading checkpoints: hand-written ``config.json`` keys, learned thresholds, I-BERT and LTP names."""

import hashlib
import json
import logging
import math
import re
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor

from token_pruning.checkpoint.ibert import IBERT_MODEL_TYPES, as_roberta_config, as_roberta_weights, ltp_thresholds
from token_pruning.checkpoint.settings import check_config, foreign_errors, naming, quiet, read_json_object
from token_pruning.errors import CheckpointError, ConfigError, UnsupportedModelError
from token_pruning.families import supported_model_types
from token_pruning.pruners import Pruner, ignored_keys, method_keys, pruner_from_config
from token_pruning.runtime.adapters import adapter_for
from token_pruning.runtime.attachment import Execution
from token_pruning.runtime.prune import ModelT, prune

# What a pruned model's weights have besides the dense one's, and of how many dimensions each is.
_TENSORS = {
    "thresholds": 1,
    "vocabulary_scores": 1,
    "probe_weights": 2,
    "map_weights": 3,
    "context_down": 3,
    "context_up": 3,
    "correction_weights": 2,
}
logger = logging.getLogger(__name__)

_LTP_THRESHOLDS = "pruner.keep_threshold"
_INDEX = "model.safetensors.index.json"
_ADAPTER = "adapter_config.json"
_SMALL_MODEL = 10**7  # parameters
_FLOATING = ("F64", "F32", "F16", "BF16")
# Arguments of from_pretrained that say where on the hub, or how to get it.
_HUB_ARGUMENTS = ("revision", "cache_dir", "token", "local_files_only", "force_download")

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass
class Checkpoint:
    """A model directory that was read but not yet built.

    Attributes:
        path: the directory.
        config: ``config.json`` as it stands there.
        tensors: a method's tensors found in the weights, by their names in
            :class:`token_pruning.runtime.token_pruner.TokenPruner`.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def thresholds(self) -> tuple[float, ...] | None:
        """Learned thresholds found in the weights, or None."""
        found = self.tensors.get("thresholds")
        return None if found is None else tuple(found.reshape(-1).tolist())

    @property
    def is_ibert(self) -> bool:
        """Whether it has I-BERT's key names, and is RoBERTa in all but name."""
        return self.config.get("model_type") in IBERT_MODEL_TYPES

    @property
    def num_outputs(self) -> int:
        """How many outputs a classification head has; two where ``config.json`` does not say, as in transformers."""
        return len(self.config.get("id2label") or ()) or int(self.config.get("num_labels") or 2)

    def label_names(self) -> list[str] | None:
        """The labels in the order of the outputs; empty for a regression, None where the checkpoint names none."""
        id2label = self.config.get("id2label") or {}
        if len(id2label) == 1 or self.config.get("problem_type") == "regression":
            return []
        return [name for _, name in sorted(id2label.items(), key=lambda item: int(item[0]))] or None

    def model_config(self) -> transformers.PretrainedConfig:
        """``config.json`` as transformers reads it, defaults filled in.

        Raises:
            CheckpointError: for what transformers refuses.
            UnsupportedModelError: for an unsupported ``model_type``.
        """
        file, model_type = self.path / "config.json", self.config.get("model_type")
        if model_type not in supported_model_types() and not self.is_ibert:
            raise UnsupportedModelError(
                f"{file}: model_type is {model_type!r}; supported are "
                f"{', '.join([*supported_model_types(), *IBERT_MODEL_TYPES])}"
            )
        config = as_roberta_config(self.config) if self.is_ibert else dict(self.config)
        with quiet(), foreign_errors(f"{file} makes no model"):
            return transformers.CONFIG_MAPPING[config["model_type"]].from_dict(config)

    def sha256(self) -> str:
        """Over the weights' files and ``config.json`` as they are now, in hexadecimal digits.

        Keys that name a pruning method do not count: with them edited it is the same dense model.
        """
        config = read_json_object(self.path / "config.json")
        dense = {key: value for key, value in config.items() if key not in {"reads", *method_keys()}}
        digest = hashlib.sha256(json.dumps(dense, sort_keys=True).encode())
        for path in _weight_files(self.path):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def pruner(self, *, learned: bool = False, temperature: float | None = None) -> Pruner:
        """The method that ``config.json`` names, with the thresholds found in the weights.

        Args:
            learned: for absolute thresholds, a :class:`LearnedThreshold`.
            temperature: the soft stage's, where ``learned``.

        Raises:
            ConfigError: for a missing or unknown ``prune_mode``, or a key with a value that is not allowed.
        """
        file = self.path / "config.json"
        with naming(file):
            pruner = pruner_from_config(self.config, self.tensors, learned=learned, temperature=temperature)
        if ignored := ignored_keys(self.config):
            logger.warning(
                "%s: %s without effect: not of prune_mode %r", file, ", ".join(ignored), self.config["prune_mode"]
            )
        return pruner

    def prune(self, model: ModelT, pruner: Pruner | None = None, *, execution: Execution = "packed") -> ModelT:
        """Prune a model of this checkpoint in place.

        Args:
            model: from :func:`load_model`.
            pruner: the method; the one that ``config.json`` names unless given.
            execution: as for :func:`token_pruning.prune`.

        Returns:
            The same model.

        Raises:
            ConfigError: see :meth:`pruner` and :func:`token_pruning.prune`; or for a wrong ``reads``.
        """
        method = self.pruner() if pruner is None else pruner
        return prune(model, method, execution=execution, reads=self.config.get("reads"))


def read_checkpoint(path: str | Path, *, subfolder: str = "", **hub: Any) -> Checkpoint:
    """Read what a model says of itself, weights left alone but for the pruning method's.

    Args:
        path: a folder, or a model's name on the hub, which is then downloaded.
        subfolder: the part of it where the checkpoint is.
        **hub: for the download: ``revision``, ``cache_dir``, ``token``, ``local_files_only``, ``force_download``.

    Raises:
        CheckpointError: if there is no such folder or model, no readable ``config.json``, or no safetensors weights.
        ConfigError: if ``config.json`` is not JSON, or has a key with a value that is not allowed.
        UnsupportedModelError: for quantised weights, I-BERT's included, or an adapter's.
    """
    path = local_folder(path, subfolder, hub)
    config_file = path / "config.json"
    if (path / _ADAPTER).exists():
        raise UnsupportedModelError(
            f"{path / _ADAPTER} makes it an adapter of another model; merge it first (PEFT's merge_and_unload) and "
            "save the whole model"
        )
    config = read_json_object(config_file)
    check_config(config, config_file)
    checkpoint = Checkpoint(path, config)
    if checkpoint.is_ibert and config.get("quant_mode"):
        raise UnsupportedModelError(
            f"{config_file}: quant_mode is true; only I-BERT checkpoints in float mode (quant_mode false) are supported"
        )
    found = _read_weights(path, (*(f"token_pruner.{name}" for name in _TENSORS), _LTP_THRESHOLDS))
    for key, tensor in found.items():
        name = key.rpartition("token_pruner.")[2]
        dimensions = (0, 1) if name == "thresholds" or name not in _TENSORS else (_TENSORS[name],)
        bad = tensor.isnan() if name == "vocabulary_scores" else ~tensor.isfinite()  # special tokens score infinity
        if not tensor.is_floating_point() or tensor.dim() not in dimensions or bad.any():
            shown = f"{list(tensor.shape)}{' with ' + str(tensor[bad][0].item()) if bad.any() else ''}"
            wanted = {1: "one row", 2: "rows", 3: "several tables"}[dimensions[-1]]
            raise CheckpointError(
                f"{path}: weight {key} is {tensor.dtype} of shape {shown}; it must be {wanted} of finite numbers"
            )
        if name in _TENSORS:
            checkpoint.tensors[name] = tensor
    if "thresholds" not in checkpoint.tensors and (own := ltp_thresholds(found, config, path)) is not None:
        checkpoint.tensors["thresholds"] = torch.tensor(own, dtype=torch.float64, device="cpu")
    return checkpoint


def local_folder(path: str | Path, subfolder: str = "", hub: Mapping[str, Any] = MappingProxyType({})) -> Path:
    """Where a model's files are, on this machine; arguments and errors as for :func:`read_checkpoint`."""
    return (Path(path) if _is_folder(path) else _download(str(path), subfolder, hub)) / subfolder


def _is_folder(path: str | Path) -> bool:
    """An empty path is no folder, though it is the current one to :mod:`pathlib`."""
    try:
        return str(path) != "" and Path(path).is_dir()
    except (OSError, ValueError):  # a name that is too long, or has a null byte
        return False


def _download(name: str, subfolder: str, hub: Mapping[str, Any]) -> Path:
    """A model of the hub as a local folder."""
    missing = f"{name or repr(name)} is not a folder; a checkpoint is a folder with config.json and safetensors weights"
    if not _HUB_NAME.fullmatch(name):
        raise CheckpointError(missing)
    patterns = [f"{subfolder}/{end}" if subfolder else end for end in ("*.json", "*.safetensors", "*.txt", "*.model")]
    with foreign_errors(f"{missing}, and as a hub model it cannot be had"):
        return Path(snapshot_download(name, allow_patterns=patterns, **hub))  # nosec B615  # the caller gives the revision


def from_pretrained(
    path: str | Path,
    pruner: Pruner | None = None,
    *,
    execution: Execution = "packed",
    model_class: type[transformers.PreTrainedModel] | None = None,
    **kwargs: Any,
) -> Any:
    """Load a checkpoint with its pruning attached, in evaluation mode.

    Args:
        path: a folder (or hub model) written by ``save_pretrained`` on a pruned model, or one whose ``config.json`` got
            ``prune_mode`` and its keys by hand. I-BERT and LTP checkpoints in float mode load as RoBERTa. What
            sentence-transformers wrote (a folder with ``modules.json``) loads as its ``SentenceTransformer`` or
            ``CrossEncoder``.
        pruner: the method to attach instead of the one ``config.json`` names.
        execution: as for :func:`token_pruning.prune`.
        model_class: the class of transformers to build; else the one ``config.json`` names under ``architectures``.
        **kwargs: passed to the class's ``from_pretrained``, for example ``dtype``, ``num_labels``, ``config``,
            ``revision``, ``subfolder``, ``device_map``, ``ignore_mismatched_sizes`` or ``output_loading_info``. Without
            ``dtype`` the weights keep the checkpoint's. Refused are ``trust_remote_code=True``,
            ``use_safetensors=False``: no code and no pickle of a checkpoint is ever run. A sentence-transformers model
            takes its own class's arguments, and ``dtype``.

    Returns:
        The model; with ``output_loading_info`` the pair of it and the dictionary that transformers gives.

    Raises:
        CheckpointError: if the directory is missing, unreadable or holds only pickled weights.
        ConfigError: if ``config.json`` is malformed or has a value that is not allowed, or an argument is refused.
        UnsupportedModelError: for an architecture without an adapter.
    """
    _refuse_unsafe(kwargs)
    hub = {name: kwargs.pop(name) for name in _HUB_ARGUMENTS if name in kwargs}
    folder = local_folder(path, kwargs.pop("subfolder", None) or "", hub)
    if model_class is None and (adapter := adapter_for(folder)):
        return adapter.load(folder, pruner, execution=execution, **kwargs)
    with_info = bool(kwargs.pop("output_loading_info", False))
    checkpoint = read_checkpoint(folder)
    method = pruner or checkpoint.pruner(learned=checkpoint.config.get("masking_mode") == "soft")
    model, info = _load(checkpoint, model_class, False, kwargs)
    with naming(checkpoint.path / "config.json") if pruner is None else nullcontext():
        pruned = checkpoint.prune(model, method, execution=execution)
    return (pruned, info) if with_info else pruned


def load_model(
    checkpoint: Checkpoint,
    *,
    model_class: type[transformers.PreTrainedModel] | None = None,
    new_head: bool = False,
    **kwargs: Any,
) -> transformers.PreTrainedModel:
    """The checkpoint's model, dense, in evaluation mode; arguments and errors as for :func:`from_pretrained`.

    With ``new_head`` the head's weights of another shape are replaced by random ones, to be trained for another task.
    """
    _refuse_unsafe(kwargs)
    return _load(checkpoint, model_class, new_head, kwargs)[0]


def _refuse_unsafe(kwargs: dict[str, Any]) -> None:
    """Take out the arguments that may only have one value."""
    for name, allowed, reason in (
        ("trust_remote_code", False, "a checkpoint's own code is never run"),
        ("use_safetensors", True, "pickled weights can run any code when they are read, so they are never loaded"),
    ):
        value = kwargs.pop(name, None)
        if value is not None and value is not allowed:
            raise ConfigError(f"{name} is {value!r}; it must be {allowed} or left out: {reason}")


def _load(
    checkpoint: Checkpoint, model_class: Any, new_head: bool, kwargs: dict[str, Any]
) -> tuple[transformers.PreTrainedModel, dict[str, Any]]:
    """The dense model, and what transformers says of its weights, without those that belong to the pruning."""
    own = checkpoint.model_config()
    config = as_roberta_config(checkpoint.config) if checkpoint.is_ibert else checkpoint.config
    if model_class is None:
        model_class = _architecture(config, checkpoint.path / "config.json")
    any_shape = bool(kwargs.pop("ignore_mismatched_sizes", False))
    kwargs = {"trust_remote_code": False, **kwargs}
    with quiet(), foreign_errors(f"{checkpoint.path} cannot be loaded"):
        if checkpoint.is_ibert:
            own = kwargs.pop("config", None) or own
            for name, value in _config_overrides(kwargs).items():
                setattr(own, name, value)
            weights = as_roberta_weights(_read_weights(checkpoint.path), checkpoint.path)
            source: dict[str, Any] = {"config": own, "state_dict": weights}
            if hasattr(model_class, "_model_mapping"):  # an Auto class would want a path to choose by
                model_class = model_class._model_mapping[type(own)]
                kwargs.pop("trust_remote_code")
        else:
            source = {"use_safetensors": True}
        _check_size(model_class, own, checkpoint.path)
        model, info = model_class.from_pretrained(
            None if checkpoint.is_ibert else checkpoint.path,
            **source,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **kwargs,
        )
    ours = {f"token_pruner.{name}" for name in _TENSORS}  # transformers does not know them; pruning loads them
    unexpected = info["unexpected_keys"]
    info = {**info, "unexpected_keys": type(unexpected)(name for name in unexpected if name not in ours)}
    _check_shapes(model, info, checkpoint.path, anything=any_shape, new_head=new_head)
    _check_names(model, info, checkpoint.path, config.get("architectures") or [])
    return model, info


def _architecture(config: Mapping[str, Any], file: Path) -> Any:
    """The class that ``config.json`` names.

    Raises:
        UnsupportedModelError: for a name that is no model of transformers, or of another family's.
    """
    name = (config.get("architectures") or ["AutoModel"])[0]
    found = getattr(transformers, name, None)
    auto = name.startswith("AutoModel") and hasattr(found, "from_config")
    if not auto and not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise UnsupportedModelError(f"{file}: architectures names {name!r}, which is no model that transformers has")
    model_type = getattr(getattr(found, "config_class", None), "model_type", None)
    if model_type is not None and model_type != config.get("model_type"):
        raise UnsupportedModelError(
            f"{file}: architectures names {name!r}, a model of type {model_type!r}; model_type is "
            f"{config.get('model_type')!r}"
        )
    return found


def _check_size(model_class: Any, config: Any, path: Path) -> None:
    """Before memory is taken: a model many times as large as its weights would be mostly random numbers.

    Raises:
        ConfigError: if ``config.json`` makes such a model.
    """
    build = model_class.from_config if hasattr(model_class, "from_config") else model_class._from_config
    with torch.device("meta"):
        wanted = sum(parameter.numel() for parameter in build(config).parameters())
    there = sum(math.prod(shape) for _, shape in _headers(path).values())
    if wanted > 2 * there + _SMALL_MODEL:  # a head may be missing, and an embedding stand there once for two
        raise ConfigError(
            f"{path / 'config.json'}: its sizes make a model of {wanted} parameters; the weights in {path} are {there}"
        )


def _check_shapes(model: Any, info: dict[str, Any], path: Path, *, anything: bool, new_head: bool) -> None:
    """Weights of another shape would be random numbers."""
    for name, found, wanted in sorted(info["mismatched_keys"]):
        if anything or (new_head and not name.startswith(f"{model.base_model_prefix}.")):
            logger.warning("%s: %s has shape %s: a new one of %s is trained", path, name, list(found), list(wanted))
            continue
        raise CheckpointError(f"{path}: weight {name} has shape {list(found)}; config.json asks for {list(wanted)}")


def _check_names(model: Any, info: dict[str, Any], path: Path, architectures: list[str]) -> None:
    """Weights that are not there would be random numbers: of the encoder, or of the head that the checkpoint has.

    Another head than the checkpoint's is new, to be trained; many base models have no pooler.
    """
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    own_head = bool(prefix) and type(model).__name__ in architectures
    new = []
    for name in sorted(info["missing_keys"]):
        if name.startswith("token_pruner."):
            continue
        if own_head or (name.startswith(prefix) and ".pooler." not in f".{name}"):
            raise CheckpointError(f"{path}: weight {name} is missing; it would start from random numbers")
        new.append(name)
    if new and prefix:
        logger.warning("%s has no weights for %s: they are new, and random until trained", path, ", ".join(new))
    unused = sorted(name for name in info["unexpected_keys"] if prefix and name.startswith(prefix))
    if unused:
        logger.warning(
            "%s: config.json leaves out %d of the encoder's weights, such as %s", path, len(unused), unused[0]
        )


def _config_overrides(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Take the arguments out of ``kwargs`` that ``from_pretrained`` would pass on to the config."""
    names = ("num_labels", "id2label", "label2id", "problem_type")
    return {name: kwargs.pop(name) for name in names if name in kwargs}


def _weight_files(path: Path) -> list[Path]:
    files = sorted(path.glob("*.safetensors"))
    if files:
        _check_index(path)
        return files
    pickled = sorted(
        file
        for pattern in ("pytorch_model*.bin", "model*.bin", "pytorch_model*.pt", "model*.pt", "*.ckpt")
        for file in path.glob(pattern)
    )
    if pickled:
        raise CheckpointError(
            f"{pickled[0]} is a pickle, which can run any code when it is read, so it is never loaded; convert one you "
            'trust, in its folder, with: python -c "import torch, safetensors.torch as s; '
            f"s.save_file({{k: v.clone().contiguous() for k, v in torch.load('{pickled[0].name}', weights_only=True)"
            ".items()}, 'model.safetensors', {'format': 'pt'})\""
        )
    raise CheckpointError(f"{path} has no *.safetensors weights")


def _check_index(path: Path) -> None:
    """The index of a checkpoint in several files may only name such files, in the same folder."""
    file = path / _INDEX
    if not file.exists():
        return
    shards = read_json_object(file).get("weight_map")
    if not isinstance(shards, dict):
        raise ConfigError(f"{file}: weight_map is {shards!r}; it must be an object with a file name for each weight")
    for name in shards.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{file}: weight_map names {name!r}; it must name *.safetensors files of {path}")


def _headers(path: Path) -> dict[str, tuple[str, list[int]]]:
    """Dtype, as safetensors writes it, and shape of every weight.

    Raises:
        CheckpointError: for a file that cannot be read, or parameters that are not floating-point numbers.
    """
    found: dict[str, tuple[str, list[int]]] = {}
    for file in _weight_files(path):
        with foreign_errors(f"{file} cannot be read"), safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                part = tensors.get_slice(name)
                found[name] = part.get_dtype(), part.get_shape()
    for name, (dtype, _) in found.items():
        if dtype not in _FLOATING and name.endswith((".weight", ".bias")):
            raise CheckpointError(f"{path}: weight {name} is {dtype}; it must be one of {', '.join(_FLOATING)}")
    return found


def _read_weights(path: Path, prefix: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """All tensors of a checkpoint, or those whose name ends with one of ``prefix``."""
    weights: dict[str, Tensor] = {}
    for file in _weight_files(path):
        with foreign_errors(f"{file} cannot be read"), safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                if not prefix or name.endswith(prefix):
                    weights[name] = tensors.get_tensor(name)
    return weights
