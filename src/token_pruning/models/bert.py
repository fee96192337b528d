"""BERT and the models that share its encoder: ELECTRA, RoBERTa, XLM-R, CamemBERT."""

from dataclasses import replace
from operator import attrgetter
from typing import Any

from token_pruning.models.base import Family, ModelShape


def _bert_shape(config: Any) -> ModelShape:
    return ModelShape(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        ffn_matrices=2,
        max_positions=config.max_position_embeddings,
    )


def _roberta_shape(config: Any) -> ModelShape:
    # RoBERTa's positions start at pad_token_id + 1.
    shape = _bert_shape(config)
    return replace(shape, max_positions=shape.max_positions - config.pad_token_id - 1)


BERT = Family(
    model_types=("bert", "electra"),
    encoder=attrgetter("encoder"),
    layers=attrgetter("layer"),
    attention=attrgetter("attention.self"),
    attention_output=attrgetter("attention"),
    shape=_bert_shape,
)

ROBERTA = replace(BERT, model_types=("roberta", "xlm-roberta", "camembert"), shape=_roberta_shape)
