"""Loading checkpoints: hand-written ``config.json`` keys, learned thresholds, I-BERT and LTP names."""

import hashlib
import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from token_pruning.checkpoint.ibert import IBERT_MODEL_TYPES, as_roberta_config, as_roberta_weights, ltp_thresholds
from token_pruning.checks import choice
from token_pruning.errors import CheckpointError, ConfigError, UnsupportedModelError
from token_pruning.families import Reads, supported_model_types
from token_pruning.pruners import Pruner, method_keys, pruner_from_config
from token_pruning.runtime.attachment import Execution
from token_pruning.runtime.prune import ModelT, prune

_THRESHOLDS = "token_pruner.thresholds"
_VOCABULARY_SCORES = "token_pruner.vocabulary_scores"
logger = logging.getLogger(__name__)

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass
class Checkpoint:
    """A model directory that was read but not yet built.

    Attributes:
        path: the directory.
        config: ``config.json`` as it stands there.
        thresholds: learned thresholds found in the weights, or None.
        vocabulary_scores: ``[vocabulary]`` float32 found in the weights, or None.
    """

    path: Path
    config: dict[str, Any]
    thresholds: tuple[float, ...] | None = None
    vocabulary_scores: Tensor | None = None

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
        names = [str(name) for _, name in sorted(id2label.items(), key=lambda item: int(item[0]))]
        return names or None

    def sha256(self) -> str:
        """Over the weights' files and ``config.json`` as they are now, in hexadecimal digits.

        Keys that name a pruning method do not count: with them edited it is the same dense model.
        """
        config = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
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
        try:
            return pruner_from_config(
                self.config, self.thresholds, self.vocabulary_scores, learned=learned, temperature=temperature
            )
        except ConfigError as error:
            raise ConfigError(f"{self.path / 'config.json'}: {error}") from None

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
        reads = self.config.get("reads")
        if reads is not None:
            choice(f"{self.path / 'config.json'}: reads", reads, get_args(Reads))
        return prune(model, method, execution=execution, reads=reads)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read what a model says of itself, weights left alone but for the pruning method's.

    Args:
        path: a folder, or a model's name on the hub, which is then downloaded.

    Raises:
        CheckpointError: if there is no such folder or model, no readable ``config.json``, or no safetensors weights.
        ConfigError: if ``config.json`` is not JSON.
        UnsupportedModelError: for I-BERT weights in quantised mode.
    """
    path = Path(path) if Path(path).is_dir() else _download(str(path))
    config_file = path / "config.json"
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{config_file} does not exist; a checkpoint is a folder with config.json") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{config_file} cannot be read: {error}") from None
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{config_file} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None
    if not isinstance(config, dict):
        raise ConfigError(f"{config_file} holds a {type(config).__name__}; it must be a JSON object")
    checkpoint = Checkpoint(path, config)
    if checkpoint.is_ibert and config.get("quant_mode"):
        raise UnsupportedModelError(
            f"{config_file}: quant_mode is true; only I-BERT checkpoints in float mode (quant_mode false) are supported"
        )
    found = _read_weights(path, (_THRESHOLDS, _VOCABULARY_SCORES, "pruner.keep_threshold"))
    if _THRESHOLDS in found:
        checkpoint.thresholds = tuple(found[_THRESHOLDS].to(torch.float32).tolist())
    else:
        checkpoint.thresholds = ltp_thresholds(found, config)
    checkpoint.vocabulary_scores = found.get(_VOCABULARY_SCORES)
    return checkpoint


def _download(name: str) -> Path:
    """A model of the hub as a local folder."""
    missing = f"{name} is not a folder; a checkpoint is a folder with config.json and safetensors weights"
    if not _HUB_NAME.fullmatch(name):
        raise CheckpointError(missing)
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"]))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{missing}, and as a hub model it cannot be had: {reason}") from None


def from_pretrained(
    path: str | Path,
    pruner: Pruner | None = None,
    *,
    execution: Execution = "packed",
    model_class: type[transformers.PreTrainedModel] | None = None,
    **kwargs: Any,
) -> transformers.PreTrainedModel:
    """Load a checkpoint with its pruning attached, in evaluation mode.

    Args:
        path: a folder (or hub model) written by ``save_pretrained`` on a pruned model, or one whose ``config.json`` got
            ``prune_mode`` and its keys by hand. I-BERT and LTP checkpoints in float mode load as RoBERTa.
        pruner: the method to attach instead of the one ``config.json`` names.
        execution: as for :func:`token_pruning.prune`.
        model_class: the class to build; else the one ``config.json`` names under ``architectures``.
        **kwargs: passed to the class's ``from_pretrained``, for example ``dtype`` or ``num_labels``.

    Raises:
        CheckpointError: if the directory is missing, unreadable or holds only pickled weights.
        ConfigError: if ``config.json`` is malformed or has a value that is not allowed.
        UnsupportedModelError: for an architecture without an adapter.
    """
    checkpoint = read_checkpoint(path)
    if pruner is None:
        pruner = checkpoint.pruner(learned=checkpoint.config.get("masking_mode") == "soft")
    return checkpoint.prune(load_model(checkpoint, model_class=model_class, **kwargs), pruner, execution=execution)


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
    model_type = checkpoint.config.get("model_type")
    if model_type not in supported_model_types() and not checkpoint.is_ibert:
        raise UnsupportedModelError(
            f"{checkpoint.path / 'config.json'}: model_type is {model_type!r}; supported are "
            f"{', '.join([*supported_model_types(), *IBERT_MODEL_TYPES])}"
        )
    config = as_roberta_config(checkpoint.config) if checkpoint.is_ibert else checkpoint.config
    if model_class is None:
        name = (config.get("architectures") or ["AutoModel"])[0]
        model_class = getattr(transformers, name, None)
        if model_class is None:
            raise UnsupportedModelError(
                f"{checkpoint.path / 'config.json'}: architectures names {name!r}, which transformers does not have"
            )
    # The thresholds are ours to load; transformers would report them as unexpected weights.
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        if checkpoint.is_ibert:
            arguments = {k: v for k, v in config.items() if k != "model_type"}
            roberta = transformers.RobertaConfig(**{**arguments, **_config_overrides(kwargs)})
            weights = as_roberta_weights(_read_weights(checkpoint.path), checkpoint.path)
            source: dict[str, Any] = {"config": roberta, "state_dict": weights}
            if hasattr(model_class, "_model_mapping"):  # an Auto class would want a path to choose by
                model_class = model_class._model_mapping[type(roberta)]
        else:
            source = {"use_safetensors": True}
        model, info = model_class.from_pretrained(
            None if checkpoint.is_ibert else checkpoint.path,
            **source,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **kwargs,
        )
        _check_loaded(model, info, checkpoint.path, new_head)
        return model
    except (OSError, SafetensorError, RuntimeError, ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise CheckpointError(f"{checkpoint.path} cannot be loaded: {' '.join(str(error).split())}") from None
    finally:
        transformers.logging.set_verbosity(level)


def _check_loaded(model: Any, info: dict[str, Any], path: Path, new_head: bool) -> None:
    """Weights of another shape, or encoder weights that are not there, would be random numbers."""
    for name, found, wanted in sorted(info["mismatched_keys"]):
        if new_head and not name.startswith(f"{model.base_model_prefix}."):
            logger.warning("%s: %s has shape %s: a new one of %s is trained", path, name, list(found), list(wanted))
            continue
        raise CheckpointError(f"{path}: weight {name} has shape {list(found)}; config.json asks for {list(wanted)}")
    bare = model.base_model is model
    prefix = "" if bare else f"{model.base_model_prefix}."
    for name in sorted(info["missing_keys"]):
        if name.startswith(prefix) and ".pooler." not in f".{name}" and not name.startswith("token_pruner."):
            raise CheckpointError(f"{path}: weight {name} is missing; the encoder would start from random numbers")


def _config_overrides(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Take the arguments out of ``kwargs`` that ``from_pretrained`` would pass on to the config."""
    names = ("num_labels", "id2label", "label2id", "problem_type")
    return {name: kwargs.pop(name) for name in names if name in kwargs}


def _weight_files(path: Path) -> list[Path]:
    files = sorted(path.glob("*.safetensors"))
    if files:
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


def _read_weights(path: Path, prefix: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """All tensors of a checkpoint, or those whose name ends with one of ``prefix``."""
    weights: dict[str, Tensor] = {}
    for file in _weight_files(path):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a dict
                    if not prefix or name.endswith(prefix):
                        weights[name] = tensors.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from None
    return weights
