"""What the modules of a sentence-transformers model say: which model to prune, and what is read of it."""

from typing import Any

from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

from token_pruning.errors import UnsupportedModelError
from token_pruning.families import Reads

_MEANS = {"mean", "mean_sqrt_len_tokens"}
_EVERY_TOKEN = {"max", "weightedmean"}
_TASKS = ("feature-extraction", "sequence-classification")


def transformer_of(model: Any) -> Any:
    """The Transformer module of a SentenceTransformer or CrossEncoder.

    Raises:
        UnsupportedModelError: for another model of sentence-transformers, or one that does not begin with a Transformer
            for text, on PyTorch.
    """
    name = type(model).__name__
    if not isinstance(model, (SentenceTransformer, CrossEncoder)):
        raise UnsupportedModelError(
            f"{name} of sentence-transformers cannot be pruned or compiled; SentenceTransformer and CrossEncoder can"
        )
    first = model[0] if len(model) else None
    if not isinstance(first, Transformer):
        raise UnsupportedModelError(f"this {name} begins with a {type(first).__name__}; it must be a Transformer")
    if first.backend != "torch":
        raise UnsupportedModelError(f"this {name} runs on the backend {first.backend!r}; it must be 'torch'")
    if first.transformer_task not in _TASKS:
        raise UnsupportedModelError(
            f"the Transformer of this {name} is for {first.transformer_task}; it must be for {' or '.join(_TASKS)}"
        )
    if set(first.modality_config) != {"text"} or first.modality_config["text"]["method"] != "forward":
        modalities = ", ".join(map(str, first.modality_config))
        raise UnsupportedModelError(f"the Transformer of this {name} takes {modalities}; it must take text alone")
    if first.query_expansion is not None:
        raise UnsupportedModelError(f"this {name} expands its queries, which reads padding; it cannot be pruned")
    return first


def pooling_of(model: Any) -> Any:
    """The Pooling module, which must come after the Transformer; None where the transformer has a head of its own.

    Raises:
        UnsupportedModelError: for another module in its place.
    """
    transformer = transformer_of(model)
    if transformer.transformer_task == "sequence-classification":
        return None
    second = model[1] if len(model) > 1 else None
    if not isinstance(second, Pooling) or transformer.module_output_name != "token_embeddings":
        found = "nothing" if second is None else f"a {type(second).__name__}"
        raise UnsupportedModelError(
            f"after the Transformer of this {type(model).__name__} comes {found}; it must be Pooling of its "
            "token_embeddings"
        )
    return second


def pooling_modes(pooling: Any) -> tuple[str, ...]:
    """What is pooled, one after the other."""
    return (pooling.pooling_mode,) if isinstance(pooling.pooling_mode, str) else tuple(pooling.pooling_mode)


def reads_of_modules(model: Any) -> Reads | None:
    """Which last hidden states Pooling reads; None where the transformer's own head says so.

    Raises:
        UnsupportedModelError: for a pooling that reads single tokens which may have left.
    """
    pooling = pooling_of(model)
    if pooling is None:
        return None
    modes = set(pooling_modes(pooling))
    known = {"cls", *_MEANS, *_EVERY_TOKEN}
    if not modes <= known:
        raise UnsupportedModelError(
            f"pooling_mode is {', '.join(sorted(modes - known))}; tokens can be pruned for {', '.join(sorted(known))}"
        )
    if modes & _EVERY_TOKEN or not pooling.include_prompt:
        return "all"
    return "mean" if modes & _MEANS else "first"
