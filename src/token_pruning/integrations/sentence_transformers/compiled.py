"""A SentenceTransformer or CrossEncoder whose encoder is an engine.

It is a copy of the model, of the same class, with an :class:`EngineModel` in place of the Hugging Face model, and
objects in its ``__dict__`` that stand in for methods: what computes (``_inference``), what saves (``save``), and what
casts and moves it (``_apply``), which does nothing.
"""

import copy
from multiprocessing.context import get_spawning_popen
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import truncate_embeddings
from torch import Tensor, nn

from token_pruning.engine.compiled import Engine
from token_pruning.errors import ConfigError
from token_pruning.integrations.sentence_transformers.attached import SavedBeside
from token_pruning.integrations.sentence_transformers.batches import Batch, batches
from token_pruning.integrations.sentence_transformers.tail import Tail
from token_pruning.runtime.prune import attachment_of, is_pruned, prune, unprune
from token_pruning.runtime.token_pruner import TokenPruner

_OUTPUTS = ("sentence_embedding", "token_embeddings", None)


class _Source:
    """The Hugging Face model that was compiled, for saving; copies share it, and a pool's workers do without."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Source":
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {"model": None if get_spawning_popen() else self.model}


class EngineModel(nn.Module):
    """Stands in for a Hugging Face model. It has no parameters: casts and moves change nothing.

    Attributes:
        engine: what computes; ``engine.explain()`` says how.
        config: the model's configuration.
        device: the CPU.
        dtype: float32, of all that comes out.
        name_or_path: where the model came from, as Hugging Face models say it.
    """

    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, engine: Engine, source: Any) -> None:
        super().__init__()
        self.engine, self.config, self.source = engine, engine.config, _Source(source)
        self.name_or_path = source.name_or_path

    def forward(self, **inputs: Any) -> Any:
        """The engine's padded call."""
        return self.engine(**inputs)

    def saved(self) -> Any:
        """The model to save: the one that was compiled, or if it was pruned otherwise since, a copy pruned as then."""
        model, wanted = self.source.model, self.engine.token_pruner
        if model is None:
            raise ConfigError("a worker of a pool has no weights to save; save the model that started the pool")
        pruned = not self.engine.is_dense
        if is_pruned(model) is pruned and (not pruned or _same(attachment_of(model).token_pruner, wanted)):
            return model
        model = copy.deepcopy(model)
        if is_pruned(model):
            unprune(model)
        if pruned:
            prune(model, wanted.pruner, reads=self.engine.reads)
            attachment_of(model).token_pruner.load_state_dict(wanted.state_dict())
        return model


def _same(one: TokenPruner, other: TokenPruner) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return (
        one.pruner.config() == other.pruner.config()
        and ours.keys() == theirs.keys()
        and all(torch.equal(tensor.cpu(), theirs[name]) for name, tensor in ours.items())
    )


def compiled(model: Any, engine: Engine) -> Any:
    """A copy of a model that runs on an engine."""
    inner = model[0].model
    fast = copy.deepcopy(model, {id(inner): EngineModel(engine, inner)}).eval()
    fast[0].__dict__.pop("save", None)
    fast._apply = _Fixed(fast)
    fast._inference = (_Vectors if isinstance(fast, SentenceTransformer) else _Scores)(fast)
    fast.save = _Save(fast)
    return fast


class _Fixed:
    """``_apply``: what would make the engine's copy half, or move it, changes nothing."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model


class _Save:
    """``save``: the folder that the pruned model would write."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, path: Any, *args: Any, **kwargs: Any) -> None:
        stock, first = copy.copy(self.model), copy.copy(self.model[0])
        inner = first.model.saved()
        first._modules = {**first._modules, "model": inner}
        if is_pruned(inner):
            first.save = SavedBeside(first)
        name = next(iter(stock._modules))
        stock._modules = {**stock._modules, name: first}
        del stock.save  # of this copy, whose __dict__ is its own
        stock.save(path, *args, **kwargs)


class _Inference:
    """``_inference``: in batches by tokens, unpadded, in order."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.engine: Engine = model[0].model.engine
        self.tail = Tail(model, self.engine)

    def batches(self, inputs: list[Any], device: Any, prompt: str | None, show: bool, options: dict[str, Any]) -> Any:
        """See :func:`~token_pruning.integrations.sentence_transformers.batches.batches`."""
        if device is not None and torch.device(device).type != "cpu":
            raise ConfigError(f"device is {str(device)!r}; a compiled model runs on the CPU")
        pruner = self.engine.token_pruner.pruner
        return batches(self.model, inputs, prompt, show, None if pruner.chunks else pruner.max_tokens, **options)

    def vectors(self, batch: Batch, *, states: bool = False) -> dict[str, Any]:
        """What the modules say of a batch's texts; ``states`` asks for each token's too, ``[tokens, dim]``."""
        pooled = self.engine.run_pooled(
            batch.ids, batch.cu_seqlens, batch.token_types, states=states or self.tail.needs_states
        )
        features = self.tail.vectors(pooled, batch.cu_seqlens, batch.features)
        return {**features, "token_embeddings": pooled.states} if states else features


class _Vectors(_Inference):
    """A SentenceTransformer's. ``batch_size`` changes nothing: memory is bounded by tokens."""

    @torch.inference_mode()
    def __call__(
        self,
        inputs: list[Any],
        *,
        prompt: str | None,
        batch_size: int,
        show_progress_bar: bool,
        output_value: str | None,
        save_to_cpu: bool,
        normalize_embeddings: bool,
        truncate_dim: int | None,
        device: Any = None,
        **options: Any,
    ) -> Any:
        if output_value not in _OUTPUTS:
            raise ConfigError(f"output_value is {output_value!r}; it must be one of {', '.join(map(str, _OUTPUTS))}")
        found: list[Any] = [None] * len(inputs)
        for batch in self.batches(inputs, device, prompt, show_progress_bar, options):
            features = self.vectors(batch, states=output_value != "sentence_embedding")
            vectors = features["sentence_embedding"]
            if truncate_dim is not None:
                features["sentence_embedding"] = vectors = truncate_embeddings(vectors, truncate_dim)
            if output_value == "sentence_embedding":
                if normalize_embeddings:
                    vectors = torch.nn.functional.normalize(vectors, p=2, dim=1)
                results: Any = vectors
            else:
                results = self._of_each(batch, features)
                if output_value == "token_embeddings":
                    results = [text["token_embeddings"] for text in results]
            for place, result in zip(batch.places, results, strict=True):
                found[place] = result
        if output_value == "sentence_embedding":
            return torch.stack(found) if found else torch.tensor([])
        return found

    def _of_each(self, batch: Batch, features: dict[str, Any]) -> list[dict[str, Any]]:
        """All features of each text, without padding."""
        lengths, count = batch.lengths.tolist(), len(batch.places)
        states = features.pop("token_embeddings")
        rows: dict[str, Any] = {
            "input_ids": torch.split(batch.ids, lengths),
            "attention_mask": torch.split(torch.ones_like(batch.ids), lengths),
            "token_embeddings": torch.split(states, 1 if self.engine.reads == "first" else lengths),
        }
        if batch.token_types is not None:
            rows["token_type_ids"] = torch.split(batch.token_types, lengths)
        for name, value in features.items():
            one_each = isinstance(value, Tensor) and value.ndim > 0
            rows[name] = list(value) if one_each else [value] * count
        return [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]


class _Scores(_Inference):
    """A CrossEncoder's. ``batch_size`` changes nothing: memory is bounded by tokens."""

    @torch.inference_mode()
    def __call__(
        self,
        inputs: list[Any],
        *,
        prompt: str | None,
        batch_size: int,
        show_progress_bar: bool,
        activation_fn: Any,
        apply_softmax: bool | None,
        device: Any = None,
        **options: Any,
    ) -> Tensor:
        found: list[Any] = [None] * len(inputs)
        squeeze = self.model.num_labels == 1
        for batch in self.batches(inputs, device, prompt, show_progress_bar, options):
            for place, scores in zip(batch.places, torch.split(self._scores(batch), 1), strict=True):
                if activation_fn is not None:
                    scores = activation_fn(scores)
                if squeeze and scores.ndim > 1:
                    scores = scores.squeeze(-1)
                if apply_softmax and scores.ndim > 1:
                    scores = torch.nn.functional.softmax(scores, dim=1)
                found[place] = scores[0]
        return torch.stack(found) if found else torch.tensor([])

    def _scores(self, batch: Batch) -> Tensor:
        """``[texts, labels]`` before the activation."""
        if self.tail.pooling is None:
            scores: Tensor = self.engine.run_packed(batch.ids, batch.cu_seqlens, batch.token_types).logits
        else:
            scores = self.vectors(batch)["scores"]
        return scores
