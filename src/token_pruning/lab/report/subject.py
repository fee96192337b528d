"""What a report is about: a folder's model, pruned at first and then dense, and the texts that it is asked about."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from token_pruning.budget.examples import as_batch, model_inputs
from token_pruning.checkpoint import read_checkpoint
from token_pruning.engine import compile as compile_engine
from token_pruning.errors import ConfigError
from token_pruning.families import ModelShape, Reads, shape_of
from token_pruning.lab.data import TaskData, TextExamples, load_unlabelled
from token_pruning.lab.report.agreement import Kind
from token_pruning.lab.report.options import ReportOptions
from token_pruning.lab.training.features import encode, labelled_features
from token_pruning.lab.training.load import load_classifier, load_float32, load_tokenizer
from token_pruning.lab.training.plan import DataSource
from token_pruning.runtime.adapters import Adapter
from token_pruning.runtime.flops import count_flops
from token_pruning.runtime.prune import hugging_face_model, is_pruned, reads_of, record, token_pruner_of, unprune

Rows = list[dict[str, Any]]
_BATCH_TOKENS = 8192  # of a forward pass, padding included
_SEED = 1  # not that of calibrations, which may have had the same file
_LIKE_A_LIMIT = 100_000  # some tokenizers say 10³⁰ for no limit


class Subject:
    """A model and its texts.

    Attributes:
        model: pruned until :meth:`make_dense`.
        texts: what it is asked about.
        data: the task they are of, or None for texts without labels.
        kind: what its answers are.
        reads: which last hidden states are used.
        groups: the query that each text belongs to.
        whole: whether the method wants texts that are not truncated.
        limit: tokens that the dense model takes of a text.
        shortest: tokens that a text can be truncated to.
        tokenizer: what names the tokens.
    """

    data: TaskData | None = None
    tokenizer: Any
    kind: Kind
    reads: Reads
    limit: int
    shortest: int

    def __init__(self, model: Any, texts: TextExamples) -> None:
        self.model, self.texts = model, texts
        self.inner = hugging_face_model(model)
        if type(self.inner).__name__.endswith("ForMultipleChoice"):
            raise ConfigError(
                f"a {type(self.inner).__name__} chooses between texts; a report is of single texts or pairs"
            )
        self.reads = reads_of(model)
        self.groups = _groups(texts)
        self.whole = token_pruner_of(model).pruner.max_tokens is not None

    @property
    def shape(self) -> ModelShape:
        """The model's sizes."""
        return shape_of(self.inner.base_model.config)

    @property
    def first_only(self) -> bool:
        """Whether the last layer computes first tokens only, in the engine."""
        return self.reads == "first"

    @property
    def pools(self) -> bool:
        """Whether an engine of it gives one vector a text."""
        return self.inner is self.inner.base_model and self.reads != "all"

    def rows(self, cut: int | None) -> Rows:
        """The texts, tokenized.

        Args:
            cut: at most so many tokens of each; None for whole texts.
        """
        raise NotImplementedError

    def answers(self, cut: int | None) -> list[Tensor]:
        """What the model says of each text, as :func:`token_pruning.lab.report.agreement.agreement` takes it."""
        raise NotImplementedError

    def pruned_answers(self, cut: int | None) -> tuple[list[Tensor], float]:
        """The pruned model's answers, and its FLOPs per text."""
        with record(self.model) as trace:
            found = self.answers(cut)
        per_sequence = count_flops(self.inner.base_model, trace).pruned
        return found, per_sequence * len(trace.input_lengths) / len(self.texts)  # windows are sequences

    def make_dense(self) -> None:
        """Take the pruning off."""
        unprune(self.model)

    def label_ids(self) -> list[Any] | None:
        """The texts' labels in the order of the model's outputs; None without a task."""
        return None

    def engine(self, dtype: Any, threads: int) -> Any:
        """The model, as it is now, compiled."""
        return compile_engine(self.inner, dtype, threads, reads=None if is_pruned(self.inner) else self.reads)


class OfTransformers(Subject):
    """A checkpoint of transformers."""

    def __init__(self, options: ReportOptions, folder: Path, load_data: DataSource | None) -> None:
        """Load the model, pruned as its ``config.json`` says, and the texts.

        Raises:
            TokenPruningError: for every mistake of the user.
        """
        checkpoint = read_checkpoint(folder)
        pruner = checkpoint.pruner()
        self.tokenizer = load_tokenizer(checkpoint)
        if load_data is None:
            assert options.texts is not None
            texts, model = load_unlabelled(options.texts), load_float32(checkpoint)
        else:
            self.data = load_data(checkpoint)
            texts, model = next(iter(self.data.validation.values())), load_classifier(checkpoint, self.data.task)
        super().__init__(checkpoint.prune(model, pruner), texts.sample(options.examples, _SEED))
        special = self.tokenizer.num_special_tokens_to_add(pair=texts.second is not None)
        self.shortest = special + (1 if texts.second is None else 2)
        longest = self.shape.max_positions or _LIKE_A_LIMIT
        if options.max_length is not None and not self.shortest <= options.max_length <= longest:
            raise ConfigError(
                f"--max-length is {options.max_length}; this model and its tokenizer take {self.shortest} to {longest}"
            )
        self.limit = options.max_length or min(longest, self.tokenizer.model_max_length)
        self.kind = _kind(self.inner, self.reads, self.groups)

    def rows(self, cut: int | None) -> Rows:
        rows: Rows = encode(self.tokenizer, self.texts, cut)
        return rows

    def answers(self, cut: int | None) -> list[Tensor]:
        rows = self.rows(cut)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]), reverse=True)
        found: list[Tensor] = [torch.empty(0)] * len(rows)
        start = 0
        while start < len(order):
            count = max(1, _BATCH_TOKENS // max(1, len(rows[order[start]]["input_ids"])))
            some = order[start : start + count]
            batch = as_batch([rows[i] for i in some], self.tokenizer.pad_token_id)
            for i, answer in zip(some, self._of_batch(batch), strict=True):
                found[i] = answer
            start += count
        return found

    @torch.inference_mode()
    def _of_batch(self, batch: Mapping[str, Tensor]) -> list[Tensor]:
        output = self.model(**model_inputs(batch, self.inner.device))
        lengths = batch["attention_mask"].sum(1).tolist()
        if self.kind == "span":
            both = (output.start_logits, output.end_logits)
            return [torch.stack([logits[i, :length].argmax() for logits in both]) for i, length in enumerate(lengths)]
        if self.kind == "tokens":
            return [own[:length].argmax(-1) for own, length in zip(output.logits, lengths, strict=True)]
        if self.kind in ("embedding", "states"):
            states = output.last_hidden_state.float()
            if self.reads == "first":
                return list(states[:, 0])
            own_states = [own[:length] for own, length in zip(states, lengths, strict=True)]
            return [own.mean(0) for own in own_states] if self.reads == "mean" else own_states
        return list(output.logits.float())

    def label_ids(self) -> list[Any] | None:
        if self.data is None:
            return None
        rows = labelled_features(self.tokenizer, self.texts, self.data.task, self.model, self.limit)
        return [row["labels"] for row in rows]


class OfLibrary(Subject):
    """A folder of another library, such as sentence-transformers."""

    def __init__(self, options: ReportOptions, folder: Path, adapter: Adapter) -> None:
        """As :class:`OfTransformers`."""
        if options.texts is None:
            raise ConfigError(f"{folder} is compared with the dense model on texts; give --texts, not a task")
        if options.max_length is not None:
            raise ConfigError(f"--max-length is {options.max_length}; {folder} has its own, max_seq_length")
        model: Any = adapter.load(folder, None, execution="packed", dtype=torch.float32, device="cpu")
        texts = load_unlabelled(options.texts)
        self.pairs = adapter.takes_pairs(model)
        if self.pairs != (texts.second is not None):
            wanted = "pairs, in two columns" if texts.second is None else "single texts, in one column"
            raise ConfigError(f"--texts {options.texts}: a {type(model).__name__} takes {wanted}")
        super().__init__(model, texts.sample(options.examples, _SEED))
        self.adapter, self.tokenizer = adapter, model.tokenizer
        self.shortest = model.tokenizer.num_special_tokens_to_add(pair=self.pairs) + (2 if self.pairs else 1)
        self.limit = model.max_seq_length or self.shape.max_positions or _LIKE_A_LIMIT
        self.kind = "embedding"
        if self.pairs:
            self.kind = _kind(self.inner, self.reads, self.groups)

    def _inputs(self) -> Sequence[Any]:
        if self.texts.second is None:
            return self.texts.first
        return list(zip(self.texts.first, self.texts.second, strict=True))

    def rows(self, cut: int | None) -> Rows:
        before = self.model.max_seq_length
        self.model.max_seq_length = cut or before
        try:
            return self.adapter.tokenized(self.model, self._inputs(), whole=cut is None)
        finally:
            self.model.max_seq_length = before

    def answers(self, cut: int | None) -> list[Tensor]:
        before = self.model.max_seq_length
        self.model.max_seq_length = cut or before
        ask = self.model.predict if self.pairs else self.model.encode
        try:
            found: Tensor = ask(self._inputs(), convert_to_tensor=True, show_progress_bar=False)
        finally:
            self.model.max_seq_length = before
        return list(found.float().cpu().reshape(len(found), -1))


def _groups(texts: TextExamples) -> list[int]:
    """The first text of each pair as a number; all different for single texts."""
    if texts.second is None:
        return list(range(len(texts)))
    numbers: dict[str, int] = {}
    return [numbers.setdefault(first, len(numbers)) for first in texts.first]


def _kind(model: Any, reads: Reads, groups: Sequence[int]) -> Kind:
    """What a model of transformers says of a text."""
    name, config = type(model).__name__, model.config
    if model is model.base_model:
        return "states" if reads == "all" else "embedding"
    if name.endswith("ForQuestionAnswering"):
        return "span"
    if name.endswith("ForNextSentencePrediction"):
        return "classes"
    if not name.endswith("ForSequenceClassification"):
        return "tokens"
    problem = getattr(config, "problem_type", None)
    if problem == "multi_label_classification":
        return "labels"
    if config.num_labels > 1:
        return "scores" if problem == "regression" else "classes"
    return "ranking" if 2 * len(set(groups)) <= len(groups) else "scores"
