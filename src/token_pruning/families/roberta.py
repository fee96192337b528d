"""RoBERTa, and the models that share its layers and embeddings: XLM-R, CamemBERT, data2vec-text."""

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from token_pruning.families.base import ModelShape
from token_pruning.families.bert import Bert


class Roberta(Bert):
    """BERT whose positions start at ``pad_token_id + 1``."""

    model_types: ClassVar[tuple[str, ...]] = ("roberta", "xlm-roberta", "camembert", "data2vec-text")

    @classmethod
    def padding(cls, config: Any) -> int:
        """The id of the padding token, which the first position follows."""
        return int(config.pad_token_id)

    @classmethod
    def unsupported(cls, config: Any) -> str | None:
        """No padding token: positions are counted from it."""
        return "pad_token_id null" if config.pad_token_id is None else super().unsupported(config)

    @classmethod
    def shape(cls, config: Any) -> ModelShape:
        """Two rows of the position table, with the usual padding id, are never used."""
        shape = super().shape(config)
        return replace(shape, max_positions=config.max_position_embeddings - cls.padding(config) - 1)

    def positions(self, input_ids: Tensor | None, mask: Tensor) -> Tensor:
        """Tokens that are not the padding token are counted, whatever the mask says; given embeddings have no ids."""
        padding = self.padding(self.config)
        if input_ids is None:
            return super().positions(None, mask) + padding + 1
        present = input_ids.ne(padding).to(torch.int64)
        return present.cumsum(1) * present + padding
