"""Distillation in the trainers of sentence-transformers: the dense model's outputs as labels, and losses on them."""

from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from sentence_transformers import CrossEncoder
from torch import Tensor, nn
from torch.nn.functional import normalize

from token_pruning.budget.divergence import scores_divergence
from token_pruning.engine import compile
from token_pruning.errors import ConfigError, UnsupportedModelError

_NEAREST = 10  # texts among which a neighbour is looked for
_CHUNK = 1024  # texts whose cosines to all are computed at once


class VectorLoss(nn.Module):
    """How far vectors are from the dense model's: by cosine, and by the cosines of the texts of a batch to each other.

    The second is the squared change of a text's cosines to the other texts, summed over these: once from its dense
    vector, once from its pruned one. What is near to a text matters most, so that batches have each text's neighbour.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """The mean over texts.

        Args:
            features: tokenized texts, ``columns`` times ``[rows]``.
            labels: the dense vectors of a row's texts one after the other, ``[rows, columns · dim]``.
        """
        found = torch.cat([self.model(each)["sentence_embedding"].float() for each in features])
        dim = labels.shape[1] * len(labels) // len(found)  # fewer than the model gives where it has a truncate_dim
        found = normalize(found[:, :dim], dim=1)
        wanted = normalize(torch.cat(torch.split(labels.to(found), dim, dim=1)), dim=1)
        loss: Tensor = (1 - (found * wanted).sum(1)).mean()
        cosines = wanted @ wanted.T
        for rows in (wanted, found):
            changes = (rows @ found.T - cosines).square()
            loss = loss + (changes.sum() - changes.diagonal().sum()) / len(found) / 2
        return loss


class RankingLoss(nn.Module):
    """How far a reranker's scores are from the dense model's.

    Their squared distance, and for each query the Kullback–Leibler divergence of the softmax of its passages' scores,
    both in units of the dense scores' spread over all pairs.
    """

    def __init__(self, model: Any, spread: float) -> None:
        super().__init__()
        self.model, self.spread = model, spread

    def forward(
        self, inputs: Sequence[Any], labels: Sequence[Tensor], prompt: str | None = None, task: str | None = None
    ) -> Tensor:
        """The mean over pairs, and the mean over queries.

        Args:
            inputs: queries, and for each the list of its passages.
            labels: for each query the dense scores, ``[passages]``.
            prompt: for the model's tokenisation.
            task: for the model's tokenisation.
        """
        queries, passages = inputs
        pairs = [(query, text) for query, texts in zip(queries, passages, strict=True) for text in texts]
        features = self.model.preprocess(pairs, prompt=prompt, task=task)
        features = {
            name: value.to(labels[0].device) if isinstance(value, Tensor) else value for name, value in features.items()
        }
        found = self.model(features)["scores"].float().flatten() / self.spread
        wanted = torch.cat([*labels]).to(found) / self.spread
        loss: Tensor = (found - wanted).square().mean()
        sizes = [len(texts) for texts in passages]
        each = zip(torch.split(found, sizes), torch.split(wanted, sizes), strict=True)
        rankings = [scores_divergence(w, f) for f, w in each]
        return loss + torch.stack(rankings).mean()


class _WithoutTexts:
    """Put before a trainer of sentence-transformers: it would write some of the texts into the model's card."""

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        pass


def check_distilling(model: Any) -> None:
    """See that it can be trained.

    Raises:
        ConfigError: if ``datasets`` or ``accelerate`` is missing.
        UnsupportedModelError: for a reranker with several outputs.
    """
    if isinstance(model, CrossEncoder) and model.num_labels != 1:
        raise UnsupportedModelError(f"this CrossEncoder has {model.num_labels} outputs; distill trains those with one")
    for package in ("accelerate", "datasets"):
        if find_spec(package) is None:
            raise ConfigError(f"{package} is missing; pip install 'sentence-transformers[train]'")


def distilling(
    model: Any,
    texts: Sequence[Any],
    teacher: Any,
    *,
    batch_size: int,
    arguments: dict[str, Any],
    callbacks: list[Any],
    kind: type | None,
    shows: bool,
) -> Any:
    """See :meth:`token_pruning.runtime.adapters.Adapter.distilling`."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments

    outputs = outputs_of(teacher, texts, shows)
    loss: nn.Module
    own: Any
    if isinstance(model, CrossEncoder):
        queries: dict[str, tuple[list[str], list[float]]] = {}
        for (query, passage), score in zip(texts, outputs[:, 0].tolist(), strict=True):
            passages, scores = queries.setdefault(query, ([], []))
            passages.append(passage)
            scores.append(score)
        columns = {
            "query": list(queries),
            "passages": [passages for passages, _ in queries.values()],
            "label": [scores for _, scores in queries.values()],
        }
        loss = RankingLoss(model, float(outputs.std().clamp(min=1e-6)))
        own, settings = CrossEncoderTrainer, CrossEncoderTrainingArguments
        batch_size = max(1, round(batch_size * len(queries) / len(texts)))
    else:
        one, other = neighbours(outputs).unbind(1)
        columns = {
            "text": [texts[place] for place in one],
            "neighbour": [texts[place] for place in other],
            "label": torch.cat([outputs[one], outputs[other]], 1).tolist(),
        }
        loss, own, settings = VectorLoss(model), SentenceTransformerTrainer, SentenceTransformerTrainingArguments
        batch_size = max(1, batch_size // 2)
    prompt = model._resolve_prompt(None, None)
    given = settings(per_device_train_batch_size=batch_size, **({"prompts": prompt} if prompt else {}), **arguments)
    own = type(own.__name__, (*([] if kind is None else [kind]), _WithoutTexts, own), {})
    trainer = own(model=model, args=given, train_dataset=Dataset.from_dict(columns), loss=loss, callbacks=callbacks)
    return trainer


def neighbours(vectors: Tensor) -> Tensor:
    """Pairs of near texts, ``[texts // 2, 2]`` int64, each text in one pair.

    In their order, each text that is free gets the nearest free one of its ten nearest; those that are left over pair
    up as they come.

    Args:
        vectors: ``[texts, dim]``.
    """
    unit = normalize(vectors, dim=1)
    nearest: list[list[int]] = []
    for rows in torch.split(unit, _CHUNK):
        cosines = rows @ unit.T
        places = torch.arange(len(nearest), len(nearest) + len(rows))
        cosines[torch.arange(len(rows)), places] = -torch.inf
        nearest += cosines.topk(min(_NEAREST, len(unit) - 1)).indices.tolist()
    free = [True] * len(unit)
    pairs, left = [], []
    for one, near in enumerate(nearest):
        if free[one]:
            other = next((place for place in near if free[place]), None)
            free[one] = False
            if other is None:
                left.append(one)
            else:
                free[other] = False
                pairs.append((one, other))
    pairs += zip(left[::2], left[1::2], strict=False)
    return torch.tensor(pairs)


@torch.inference_mode()
def outputs_of(model: Any, texts: Sequence[Any], shows: bool = False) -> Tensor:
    """Vectors ``[texts, dim]``, or scores ``[pairs, 1]`` before any activation, float32."""
    if model.device.type == "cpu":
        model = compile(model, dtype="float32", threads=torch.get_num_threads())
    if isinstance(model, CrossEncoder):
        found = model.predict([*texts], activation_fn=nn.Identity(), show_progress_bar=shows, convert_to_tensor=True)
        found = found[:, None]
    else:
        found = model.encode([*texts], show_progress_bar=shows, convert_to_tensor=True)
    result: Tensor = found.float().cpu()
    return result
