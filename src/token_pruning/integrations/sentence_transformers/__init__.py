"""sentence-transformers: SentenceTransformer and CrossEncoder, pruned in place, compiled, saved and loaded."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sentence_transformers import CrossEncoder
from torch import Tensor

from token_pruning.engine import Engine
from token_pruning.errors import ConfigError
from token_pruning.families import Reads
from token_pruning.integrations.sentence_transformers.attached import SavedBeside, WholeTexts, not_reloading, reloading
from token_pruning.integrations.sentence_transformers.batches import tokenized
from token_pruning.integrations.sentence_transformers.compiled import EngineModel, compiled
from token_pruning.integrations.sentence_transformers.distilling import check_distilling, distilling, outputs_of
from token_pruning.integrations.sentence_transformers.loading import load, load_dense, names_method
from token_pruning.integrations.sentence_transformers.modules import pooling_of, reads_of_modules, transformer_of
from token_pruning.pruners import Pruner
from token_pruning.runtime.adapters import Adapter


class SentenceTransformersAdapter:
    """See :class:`token_pruning.runtime.adapters.Adapter`."""

    def inner(self, model: Any) -> Any:
        transformer = transformer_of(model)
        if isinstance(transformer.model, EngineModel):
            raise ConfigError(f"this {type(model).__name__} is compiled; take the model that it was compiled from")
        pooling_of(model)
        return transformer.model

    def reads(self, model: Any) -> Reads | None:
        return reads_of_modules(model)

    def tokenized(self, model: Any, texts: Sequence[Any], *, whole: bool) -> list[dict[str, Any]]:
        return tokenized(model, texts, model._resolve_prompt(None, None), whole=whole)

    def attach(self, model: Any, pruner: Pruner) -> None:
        transformer = transformer_of(model)
        transformer.save = SavedBeside(transformer)
        reloading(transformer)
        if pruner.max_tokens is not None:
            transformer.preprocess = WholeTexts(transformer)

    def detach(self, model: Any) -> None:
        transformer = transformer_of(model)
        for name in ("save", "preprocess"):
            transformer.__dict__.pop(name, None)
        not_reloading(transformer)

    def compiled(self, model: Any, engine: Engine) -> Any:
        return compiled(model, engine)

    def engine(self, model: Any) -> Engine | None:
        transformer = transformer_of(model)
        return transformer.model.engine if isinstance(transformer.model, EngineModel) else None

    def load(self, folder: Path, pruner: Pruner | None, **options: Any) -> Any:
        return load(folder, pruner, **options)

    def load_dense(self, folder: Path, **options: Any) -> Any:
        return load_dense(folder, **options)

    def names_method(self, folder: Path) -> bool:
        return names_method(folder)

    def takes_pairs(self, model: Any) -> bool:
        return isinstance(model, CrossEncoder)

    def check_distilling(self, model: Any) -> None:
        check_distilling(model)

    def outputs(self, model: Any, texts: Sequence[Any]) -> Tensor:
        return outputs_of(model, texts)

    def distilling(self, model: Any, texts: Sequence[Any], teacher: Any, **settings: Any) -> Any:
        return distilling(model, texts, teacher, **settings)


ADAPTER: Adapter = SentenceTransformersAdapter()
