"""What the CPU benchmark computes: models, the lengths of their inputs, and batches sorted by length."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from random_weights import final_keep_for, linear_thresholds, make_model
from torch import Tensor

import token_pruning as tp
from token_pruning.checkpoint import load_model, read_checkpoint
from token_pruning.lab.data import find_minilm, find_mpnet, glue_task, load_docstrings, load_glue_folder
from token_pruning.lab.training.features import tokenize
from token_pruning.lab.training.load import load_tokenizer

TARGET_FLOPS = 0.58
"""Of the pruned models whose thresholds are fitted here."""


@dataclass(frozen=True)
class Lengths:
    """Tokens per sequence, drawn uniformly, or log-normally around ``mean`` where ``sigma`` is given."""

    low: int
    high: int
    mean: float = 0.0
    sigma: float = 0.0

    def __str__(self) -> str:
        if not self.sigma:
            return f"uniform from {self.low} to {self.high} tokens"
        return f"log-normal (σ {self.sigma}), mean about {self.mean:g} tokens, from {self.low} to {self.high}"

    def at(self, quantiles: Tensor) -> list[int]:
        """The lengths below which these fractions of all are."""
        if self.sigma:
            found = self.mean * (self.sigma * torch.special.ndtri(quantiles) - self.sigma**2 / 2).exp()
        else:
            found = self.low + quantiles * (self.high - self.low)
        return [int(length) for length in found.round().clamp(self.low, self.high)]


LENGTHS = {
    "GLUE-like": Lengths(8, 128, 50, 0.4),
    "long": Lengths(340, 400),
    "rerank": Lengths(100, 400),
    "STS-B": Lengths(5, 53, 16.2, 0.43),
    "passages": Lengths(160, 380),
}
REAL_WEIGHTS: dict[str, Callable[[], str | Path]] = {"all-MiniLM-L6-v2": find_minilm, "all-mpnet-base-v2": find_mpnet}
TEXT = "text.npz"

Features = Mapping[str, list[int]]
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Workload:
    """A model and how its inputs come.

    Attributes:
        batch_size: sequences per call of the engine; peers may cut the batch.
        model: random weights: ``roberta-`` and a key of ``random_weights.SHAPES``, or another key of it; or a key of
            ``REAL_WEIGHTS``, whose ids are those of real text, cut to the lengths.
        lengths: a key of ``LENGTHS``.
        batches: calls per pass.
        pool: batches that are drawn and sorted by length, of which a pass takes ``batches``, the
            middle one of each of as many equal parts: they are then as full as those of a long list.
        gives: two logits, one score, or a vector, the mean of the tokens' last states.
        task: trained classifiers: a GLUE task, whose development set is a pass; instead of ``model`` and lengths.
    """

    batch_size: int
    model: str = ""
    lengths: str = "GLUE-like"
    batches: int = 1
    pool: int = 1
    gives: Literal["logits", "score", "vector"] = "logits"
    task: str = ""

    @property
    def about(self) -> str:
        """Weights and lengths, for a reader."""
        if self.task:
            return f"real weights, {self.task}'s development set"
        weights = "its own weights, real text" if self.model in REAL_WEIGHTS else "random weights"
        purpose = {"logits": "", "score": ", a cross-encoder", "vector": ", mean pooling"}[self.gives]
        return f"{self.model} with {weights}{purpose}; lengths drawn anew for every pass, {LENGTHS[self.lengths]}"

    @property
    def reads(self) -> Literal["mean"] | None:
        """What pruning has to know of a base model."""
        return "mean" if self.gives == "vector" else None


WORKLOADS = {
    "roberta-base-bs32": Workload(32, "roberta-base", batches=4, pool=32),
    "roberta-base-bs1": Workload(1, "roberta-base", batches=16, pool=16),
    "roberta-base-long": Workload(16, "roberta-base", "long"),
    "rerank-minilm": Workload(50, "minilm-l6", "rerank", gives="score"),
    "rerank-roberta-base": Workload(50, "roberta-base", "rerank", gives="score"),
    "embed-minilm-sts": Workload(64, "all-MiniLM-L6-v2", "STS-B", batches=4, pool=8, gives="vector"),
    "embed-minilm-passages": Workload(32, "all-MiniLM-L6-v2", "passages", gives="vector"),
    "embed-mpnet-sts": Workload(64, "all-mpnet-base-v2", "STS-B", batches=2, pool=8, gives="vector"),
    "embed-mpnet-passages": Workload(16, "all-mpnet-base-v2", "passages", gives="vector"),
    "modernbert-base-bs32": Workload(32, "modernbert-base", batches=4, pool=32),
    "modernbert-base-long": Workload(16, "modernbert-base", "long"),
    "minilm-mrpc-bs32": Workload(32, task="MRPC"),
    "minilm-mrpc-bs1": Workload(1, task="MRPC"),
    "minilm-sst2-bs32": Workload(32, task="SST2"),
    "minilm-sst2-bs1": Workload(1, task="SST2"),
    "roberta-large-bs8": Workload(8, "roberta-large", batches=2, pool=32),
    "trial-classifier": Workload(4, "roberta-tiny", "STS-B", batches=2, pool=4),  # to try the scripts out
    "trial-reranker": Workload(6, "roberta-tiny", "STS-B", gives="score"),
    "trial-embedding": Workload(4, "roberta-tiny", "STS-B", gives="vector"),
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
        self.text = dict(np.load(checkpoint / TEXT)) if workload.model in REAL_WEIGHTS else {}
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
            lengths = LENGTHS[self.workload.lengths]
            every = list(range(lengths.low, lengths.high + 1))
            yield from ([feature] for feature in self._tokens(every, torch.Generator()))

    def pad(self, batch: list[Features], multiple: int = 1) -> Inputs:
        """``[batch, width]`` int64 tensors, the width a multiple of ``multiple``."""
        longest = max(len(feature["input_ids"]) for feature in batch)
        width = -(-longest // multiple) * multiple
        return {
            name: torch.tensor([f[name] + [self.padding[name]] * (width - len(f[name])) for f in batch])
            for name in self.names
        }

    def _random(self, count: int, generator: torch.Generator) -> list[Features]:
        quantiles = torch.rand(count, generator=generator)
        if self.workload.batch_size == 1 or self.workload.pool == 1:  # few: each part of the distribution gives one
            quantiles = (torch.arange(count) + quantiles) / count
        return self._tokens(LENGTHS[self.workload.lengths].at(quantiles), generator)

    def _tokens(self, lengths: list[int], generator: torch.Generator) -> list[Features]:
        return [{"input_ids": self._ids(length, generator), "attention_mask": [1] * length} for length in lengths]

    def _ids(self, length: int, generator: torch.Generator) -> list[int]:
        if not self.text:
            return torch.randint(3, self.vocabulary, (length,), generator=generator).tolist()
        ids, (first, last) = self.text["ids"], self.text["ends"].tolist()
        start = int(torch.randint(len(ids) - length, (1,), generator=generator))
        return [first, *ids[start : start + length - 2].tolist(), last]


def make_checkpoint(workload: Workload, folder: Path, checkpoints: Path | None, data_dir: Path | None) -> Path:
    """The pruned checkpoint of a workload: the trained one, or one with thresholds fitted to its weights."""
    if workload.task:
        if checkpoints is None:
            raise tp.CheckpointError("--checkpoints is missing; it must hold TASK/hard for every task")
        path = checkpoints / workload.task / "hard"
        if not path.is_dir():
            raise tp.CheckpointError(f"{path} does not exist; it must be a pruned checkpoint")
        return path
    path = folder / "checkpoint"
    if workload.model in REAL_WEIGHTS:
        original = read_checkpoint(REAL_WEIGHTS[workload.model]())
        torch.manual_seed(0)  # for the pooler, which is not there and which nobody reads
        model = transformers.AutoModel.from_pretrained(original.path, local_files_only=True, trust_remote_code=False)
        model.save_pretrained(path)
        _write_text(load_tokenizer(original), path / TEXT)
    else:
        labels = 1 if workload.gives == "score" else 2
        model = make_model(workload.model.removeprefix("roberta-"), labels)
        (model.base_model if workload.gives == "vector" else model).save_pretrained(path)
        model = load(path)
    sequences = Sequences(workload, path, data_dir)
    held_out = [feature for batch in sequences.draw(2**31 - 3) for feature in batch]
    sample = held_out[:: max(1, len(held_out) // 64)]
    lengths = [len(feature["input_ids"]) for feature in sample]
    final_keep = final_keep_for(TARGET_FLOPS, model.config, lengths, first_only=workload.reads is None)
    tp.prune(
        model, linear_thresholds(model, sequences.pad(sample), final_keep, reads=workload.reads), reads=workload.reads
    )
    model.save_pretrained(path)
    return path


def _write_text(tokenizer: Any, path: Path) -> None:
    """The ids of the standard library's docstrings in a row, and the ids that a text begins and ends with."""
    texts = load_docstrings().train.first
    ids = tokenizer(texts, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
    first, *_, last = tokenizer(texts[0])["input_ids"]
    np.savez(path, ids=np.concatenate([np.array(each, np.int64) for each in ids]), ends=np.array([first, last]))


def load(checkpoint: Path, *, pruned: bool = False, **kwargs: Any) -> Any:
    """A checkpoint's model in evaluation mode, with its pruning or without."""
    read = read_checkpoint(checkpoint)
    model = load_model(read, **kwargs).eval()
    return read.prune(model) if pruned else model
