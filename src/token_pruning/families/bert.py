"""BERT and the models that share its encoder: ELECTRA, RoBERTa, XLM-R, CamemBERT."""

from dataclasses import replace
from operator import attrgetter
from typing import Any

from torch import Tensor

from token_pruning.families.base import EmbeddingModules, Family, LayerModules, ModelShape, column_positions


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


def _embedding_modules(base: Any) -> EmbeddingModules:
    embeddings = base.embeddings
    return EmbeddingModules(
        word=embeddings.word_embeddings,
        position=embeddings.position_embeddings,
        token_type=embeddings.token_type_embeddings,
        norm=embeddings.LayerNorm,
        projection=getattr(base, "embeddings_project", None),  # ELECTRA's
    )


def _layer_modules(layer: Any) -> LayerModules:
    attention = layer.attention
    return LayerModules(
        query=attention.self.query,
        key=attention.self.key,
        value=attention.self.value,
        attention_output=attention.output.dense,
        attention_norm=attention.output.LayerNorm,
        feed_forward_up=layer.intermediate.dense,
        feed_forward_down=layer.output.dense,
        output_norm=layer.output.LayerNorm,
    )


def _roberta_positions(input_ids: Tensor, config: Any) -> Tensor:
    # RoBERTa counts tokens that are not the padding token, whatever the attention mask says.
    present = input_ids.ne(config.pad_token_id).long()
    padding: int = config.pad_token_id
    return present.cumsum(1) * present + padding


BERT = Family(
    model_types=("bert", "electra"),
    encoder=attrgetter("encoder"),
    layers=attrgetter("layer"),
    attention=attrgetter("attention.self"),
    attention_output=attrgetter("attention"),
    shape=_bert_shape,
    embedding_modules=_embedding_modules,
    layer_modules=_layer_modules,
    activation=attrgetter("hidden_act"),
    positions=column_positions,
)

ROBERTA = replace(
    BERT,
    model_types=("roberta", "xlm-roberta", "camembert"),
    shape=_roberta_shape,
    positions=_roberta_positions,
)
