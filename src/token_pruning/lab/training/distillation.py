"""Knowledge distillation (Hinton et al. 2015, arXiv 1503.02531): the loss, and the teacher's outputs, computed once."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional

from token_pruning.checkpoint import Checkpoint, read_checkpoint
from token_pruning.errors import CheckpointError, ConfigError
from token_pruning.families import shape_of
from token_pruning.lab.evaluation import Collate, Features, predict
from token_pruning.lab.files import write_tensors
from token_pruning.lab.heads import refuse_several_answers
from token_pruning.lab.training.load import load_float32, other_architecture
from token_pruning.lab.training.options import flag
from token_pruning.lab.training.run_dir import RUN_FILE, TEACHER_LOGITS
from token_pruning.pruners import Unpruned
from token_pruning.runtime.prune import prune

_TENSOR = "logits"


def distillation_loss(logits: Tensor, teacher_logits: Tensor, temperature: float | None) -> Tensor:
    """``τ² · KL(softmax(teacher / τ) ‖ softmax(student / τ))``, or the mean squared error; the mean over the batch.

    Args:
        logits: the student's, ``[batch, labels]``, any floating dtype.
        teacher_logits: of the same shape.
        temperature: τ; None for a regression.

    Returns:
        A scalar, computed in float32.
    """
    logits, teacher_logits = logits.float(), teacher_logits.float()
    if temperature is None:
        return functional.mse_loss(logits, teacher_logits)
    student = (logits / temperature).log_softmax(-1)
    teacher = (teacher_logits / temperature).log_softmax(-1)
    return temperature**2 * functional.kl_div(student, teacher, reduction="batchmean", log_target=True)


@dataclass(frozen=True)
class Distillation:
    """How much, and how, a model learns from its teacher.

    Attributes:
        weight: α, the teacher's share of the loss.
        temperature: τ; None for a regression.
    """

    weight: float
    temperature: float | None = None

    def mix(self, task_loss: Tensor, logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """``(1 − α) · task_loss + α ·`` :func:`distillation_loss`."""
        distance = distillation_loss(logits, teacher_logits, self.temperature)
        return (1 - self.weight) * task_loss + self.weight * distance


def read_teacher(name: str) -> Checkpoint:
    """The teacher's checkpoint; a folder, or a model's name on the hub.

    Raises:
        CheckpointError: see :func:`token_pruning.checkpoint.loading.read_checkpoint`.
        ConfigError: if it has no sequence-classification or regression head.
    """
    teacher = read_checkpoint(name)
    if (other := other_architecture(teacher)) is not None:
        raise ConfigError(f"--teacher {name} is {other}; only sequence-classification and regression models can teach")
    refuse_several_answers(teacher, "--teacher")
    return teacher


def default_teacher(checkpoint: Checkpoint) -> str:
    """The dense model that pruning started from: the checkpoint itself, or what its own training started from.

    A run's ``run.json`` names the teacher or the checkpoint it started from; where that one is pruned too, its own is
    followed.

    Args:
        checkpoint: as it stands on disk: what is edited for a run does not make it dense.

    Raises:
        ConfigError: if the checkpoint is pruned and does not say what it started from.
    """
    if not _was_pruned(checkpoint):
        return str(checkpoint.path)
    seen, folder = set(), checkpoint.path
    while folder.resolve() not in seen:  # folders that were overwritten may name each other
        seen.add(folder.resolve())
        run = _run_of(folder) or {}
        name = run.get("teacher") or run.get("restore")
        if not isinstance(name, str):
            break
        if not Path(name).is_dir() or not _was_pruned(read_checkpoint(name)):
            return name
        folder = Path(name)
    raise ConfigError(
        f"{checkpoint.path} is pruned already and does not say by which dense model; give --teacher or --no-teacher"
    )


def _was_pruned(checkpoint: Checkpoint) -> bool:
    """Whether it was trained or calibrated with pruning; keys written into its ``config.json`` alone say nothing."""
    if checkpoint.thresholds is not None:
        return True
    run = _run_of(checkpoint.path)
    return run is not None and run.get("masking_mode", "none") != "none"


def _run_of(folder: Path) -> dict[str, Any] | None:
    """The options of the run that wrote this folder, or None."""
    try:
        options = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))["options"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return options if isinstance(options, dict) else None


def teacher_logits(
    teacher: Checkpoint,
    features: Features,
    collate: Collate,
    *,
    fallback: Path,
    batch_size: int,
    bf16: bool,
    device: torch.device,
) -> Tensor:
    """The dense teacher's outputs for every example, read from disk where a run has computed them before.

    They lie under ``teacher_logits`` in the teacher's folder, in a file whose name comes from the examples and the
    dtype, and whose header says by which weights they were made.

    Args:
        teacher: the checkpoint; its pruning is left off.
        features: what its own tokenizer made of the training examples.
        collate: makes a padded batch of tensors from a list of features.
        fallback: the folder to write to where the teacher's cannot be written.
        batch_size: examples per forward pass.
        bf16: bfloat16 autocast.
        device: where to compute.

    Returns:
        ``[examples, outputs]`` float32, in the features' order and that of the teacher's outputs.

    Raises:
        CheckpointError: if the file on disk is unreadable or was made by another teacher, or none can be written.
        ConfigError: if the examples are longer than the teacher's positions.
    """
    data = _digest(features, bf16)
    metadata = {"checkpoint_sha256": teacher.sha256(), "data_sha256": data, "examples": str(len(features))}
    files = [folder / TEACHER_LOGITS / f"{data[:16]}.safetensors" for folder in (teacher.path, fallback)]
    for file in files:
        if file.exists():
            return _read(file, metadata, (len(features), teacher.num_outputs))
    logits = _compute(teacher, features, collate, batch_size, bf16, device)
    problem: Exception | None = None
    for file in files:
        try:
            write_tensors(file, {_TENSOR: logits}, metadata)
            return logits
        except (OSError, SafetensorError) as error:
            problem = error
    raise CheckpointError(f"{files[-1]} cannot be written: {problem}")


def _digest(features: Features, bf16: bool) -> str:
    """SHA-256 of every example's token ids, in order, and of the dtype."""
    digest = hashlib.sha256(b"bfloat16" if bf16 else b"float32")
    for feature in features:
        digest.update(b"\n" + " ".join(map(str, feature["input_ids"])).encode())
    return digest.hexdigest()


def _compute(
    teacher: Checkpoint, features: Features, collate: Collate, batch_size: int, bf16: bool, device: torch.device
) -> Tensor:
    model: Any = load_float32(teacher, model_class=transformers.AutoModelForSequenceClassification)
    longest, positions = max(len(feature["input_ids"]) for feature in features), shape_of(model.config).max_positions
    if positions is not None and longest > positions:
        raise ConfigError(
            f"the longest example has {longest} tokens; the teacher {teacher.path} has positions for at most "
            f"{positions}; give a smaller {flag('max_length')}"
        )
    if device.type == "cpu":
        prune(model, Unpruned())  # packed: the same arithmetic without padding
    model.to(device)
    found = predict(model, features, collate, batch_size=batch_size, bf16=bf16, description="teacher")
    return torch.from_numpy(found.logits)


def _read(file: Path, metadata: Mapping[str, str], shape: tuple[int, int]) -> Tensor:
    """The file's logits, if its header is ``metadata``."""
    remedy = "delete it, and it is made anew"
    try:
        with safe_open(file, framework="pt") as content:
            found = content.metadata() or {}
            logits: Tensor = content.get_tensor(_TENSOR)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}; {remedy}") from None
    for key, wanted in metadata.items():
        if found.get(key) != wanted:
            what = "a teacher with other weights or another config.json" if key == "checkpoint_sha256" else "other data"
            raise CheckpointError(f"{file} was made from {what}: {key} is {found.get(key)}, not {wanted}; {remedy}")
    if logits.shape != shape or logits.dtype != torch.float32:
        raise CheckpointError(
            f"{file} holds {logits.dtype} of shape {list(logits.shape)}, not float32 of {list(shape)}; {remedy}"
        )
    return logits
