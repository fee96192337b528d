"""What the CPU benchmark computes: models, the lengths of their inputs, and batches sorted by length."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from random_weights import FINAL_KEEP, linear_thresholds, make_model
from torch import Tensor

import token_pruning as tp
from token_pruning.checkpoint import load_model, read_checkpoint
from token_pruning.lab.data import glue_task, load_glue_folder
from token_pruning.lab.training.features import tokenize
from token_pruning.lab.training.load import load_tokenizer

LENGTHS = {
    "GLUE-like": (8, 128, "log-normal (σ 0.4), mean about 50 tokens, from 8 to 128"),
    "long": (340, 400, "uniform from 340 to 400 tokens"),
}

Features = Mapping[str, list[int]]
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Workload:
    """A model and how its inputs come.

    Attributes:
        batch_size: sequences per call.
        shape: random weights: ``roberta-`` and a key of ``random_weights.SHAPES``.
        lengths: random weights: a key of ``LENGTHS``.
        batches: random weights: calls per pass.
        pool: random weights: batches that are drawn and sorted by length, of which a pass takes ``batches``, the
            middle one of each of as many equal parts: they are then as full as those of a long list.
        task: real weights: a GLUE task, whose development set is a pass.
    """

    batch_size: int
    shape: str = ""
    lengths: str = "GLUE-like"
    batches: int = 1
    pool: int = 1
    task: str = ""

    @property
    def about(self) -> str:
        """Weights and lengths, for a reader."""
        if self.task:
            return f"real weights, {self.task}'s development set"
        return f"{self.shape} with random weights; lengths drawn anew for every pass, {LENGTHS[self.lengths][2]}"


WORKLOADS = {
    "roberta-base-bs32": Workload(32, "roberta-base", batches=8, pool=32),
    "roberta-base-bs1": Workload(1, "roberta-base", batches=16, pool=16),
    "roberta-base-long": Workload(16, "roberta-base", "long"),
    "minilm-mrpc-bs32": Workload(32, task="MRPC"),
    "minilm-mrpc-bs1": Workload(1, task="MRPC"),
    "minilm-sst2-bs32": Workload(32, task="SST2"),
    "minilm-sst2-bs1": Workload(1, task="SST2"),
    "roberta-large-bs8": Workload(8, "roberta-large", batches=2, pool=32),
}


class Sequences:
    """Draws a workload's batches, the same ones for the same number in every process."""

    def __init__(self, workload: Workload, checkpoint: Path, data_dir: Path | None) -> None:
        self.workload = workload
        config = read_checkpoint(checkpoint).config
        self.padding = {"input_ids": config["pad_token_id"], "attention_mask": 0, "token_type_ids": 0}
        self.vocabulary = config["vocab_size"]
        self.features: list[Features] = []
        if workload.task:
            if data_dir is None:
                raise tp.DataError("--data-dir is missing; it must be the folder that holds the GLUE tasks")
            read = read_checkpoint(checkpoint)
            texts = load_glue_folder(glue_task(workload.task), data_dir, need_train=False).validation["validation"]
            self.features = list(tokenize(load_tokenizer(read), texts, load_model(read), 128))
        self.names = tuple(self.features[0]) if self.features else ("input_ids", "attention_mask")

    def draw(self, number: int) -> list[list[Features]]:
        """A pass: batches of sequences of similar length, shortest first; single sequences come in random order."""
        workload, generator = self.workload, torch.Generator().manual_seed(number)
        features = self.features or self._random(workload.pool * workload.batch_size, generator)
        size = workload.batch_size
        if size == 1:
            return [[features[i]] for i in torch.randperm(len(features), generator=generator).tolist()]
        ordered = sorted(features, key=lambda feature: len(feature["input_ids"]))
        batches = [ordered[start : start + size] for start in range(0, len(ordered), size)]
        if self.features:
            return batches
        stride = workload.pool // workload.batches
        return batches[stride // 2 :: stride]

    def every_shape(self) -> Iterator[list[Features]]:
        """Batches of the shapes to expect, for engines that prepare themselves for a shape when they first meet it."""
        if self.workload.batch_size > 1 or self.features:
            yield from (batch for number in (-1, -2) for batch in self.draw(2**31 + number))
        else:
            low, high, _ = LENGTHS[self.workload.lengths]
            yield from ([feature] for feature in self._tokens(list(range(low, high + 1)), torch.Generator()))

    def pad(self, batch: list[Features], multiple: int = 1) -> Inputs:
        """``[batch, width]`` int64 tensors, the width a multiple of ``multiple``."""
        longest = max(len(feature["input_ids"]) for feature in batch)
        width = -(-longest // multiple) * multiple
        return {
            name: torch.tensor([f[name] + [self.padding[name]] * (width - len(f[name])) for f in batch])
            for name in self.names
        }

    def _random(self, count: int, generator: torch.Generator) -> list[Features]:
        uniform = torch.rand(count, generator=generator)
        if self.workload.batch_size == 1:  # few: each of as many equal parts of the distribution gives one
            uniform = (torch.arange(count) + uniform) / count
        low, high, _ = LENGTHS[self.workload.lengths]
        if self.workload.lengths == "long":
            lengths = low + uniform * (high - low)
        else:
            lengths = 50 * (0.4 * torch.special.ndtri(uniform) - 0.08).exp()
        return self._tokens(lengths.round().long().clamp(low, high).tolist(), generator)

    def _tokens(self, lengths: list[int], generator: torch.Generator) -> list[Features]:
        return [
            {
                "input_ids": torch.randint(3, self.vocabulary, (length,), generator=generator).tolist(),
                "attention_mask": [1] * length,
            }
            for length in lengths
        ]


def make_checkpoint(workload: Workload, folder: Path, checkpoints: Path | None, data_dir: Path | None) -> Path:
    """The pruned checkpoint of a workload: the trained one, or random weights with thresholds fitted to them."""
    if workload.task:
        if checkpoints is None:
            raise tp.CheckpointError("--checkpoints is missing; it must hold TASK/hard for every task")
        path = checkpoints / workload.task / "hard"
        if not path.is_dir():
            raise tp.CheckpointError(f"{path} does not exist; it must be a pruned checkpoint")
        return path
    model = make_model(workload.shape.removeprefix("roberta-"))
    path = folder / "checkpoint"
    model.save_pretrained(path)
    sequences = Sequences(workload, path, data_dir)
    held_out = [feature for batch in sequences.draw(2**31 - 3) for feature in batch]
    sample = sequences.pad(held_out[:: max(1, len(held_out) // 64)])
    tp.prune(model, linear_thresholds(model, sample, FINAL_KEEP))
    model.save_pretrained(path)
    return path


def load(checkpoint: Path, *, pruned: bool = False, **kwargs: Any) -> Any:
    """A checkpoint's model in evaluation mode, with its pruning or without."""
    read = read_checkpoint(checkpoint)
    model = load_model(read, **kwargs).eval()
    return read.prune(model) if pruned else model
