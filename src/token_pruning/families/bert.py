"""BERT, and the models that share its layers and embeddings: ELECTRA."""

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithCrossAttentions

from token_pruning.families.base import EmbeddingModules, Family, LayerModules, split_heads, wanted
from token_pruning.ragged import PackedTokens


class Bert(Family):
    """Post-LN: ``norm(x + attention(x))``, then ``norm(x + feed_forward(x))``."""

    model_types: ClassVar[tuple[str, ...]] = ("bert",)
    native = True
    replaced = ("attention", "attention.self", "attention.self.dropout")

    def project(self, layer: Any, rows: Tensor, positions: Tensor, asking: Tensor | None) -> tuple[Tensor, ...]:
        """Three linear layers."""
        attention = layer.attention.self
        size = attention.attention_head_size
        return (
            split_heads(attention.query(wanted(rows, asking)), size),
            split_heads(attention.key(rows), size),
            split_heads(attention.value(rows), size),
        )

    def dropout(self, layer: Any) -> float:
        return float(layer.attention.self.dropout.p)

    def join(self, layer: Any, context: Tensor, rows: Tensor) -> Tensor:
        """BertSelfOutput."""
        joined: Tensor = layer.attention.output(context, rows)
        return joined

    def feed_forward(self, layer: Any, rows: Tensor) -> Tensor:
        """BertIntermediate and BertOutput."""
        result: Tensor = layer.output(layer.intermediate(rows), rows)
        return result

    def embedding_modules(self) -> EmbeddingModules:
        embeddings = self.base.embeddings
        return EmbeddingModules(
            word=embeddings.word_embeddings,
            position=embeddings.position_embeddings,
            token_type=getattr(embeddings, "token_type_embeddings", None),
            norm=getattr(embeddings, "LayerNorm", None),
            projection=getattr(self.base, "embeddings_project", None),  # ELECTRA's
        )

    def norms(self, layer: Any) -> tuple[nn.Module, nn.Module]:
        """Attention's and the feed-forward's."""
        return layer.attention.output.LayerNorm, layer.output.LayerNorm

    def layer_modules(self, layer: Any) -> LayerModules:
        attention, (attention_norm, output_norm) = layer.attention, self.norms(layer)
        return LayerModules(
            query=attention.self.query,
            key=attention.self.key,
            value=attention.self.value,
            attention_output=attention.output.dense,
            attention_norm=attention_norm,
            feed_forward_up=layer.intermediate.dense,
            feed_forward_down=layer.output.dense,
            output_norm=output_norm,
            activation=layer.intermediate.intermediate_act_fn,
        )


class Electra(Bert):
    """BERT with narrower embeddings, and heads instead of a pooler."""

    model_types = ("electra",)
    output_class = BaseModelOutputWithCrossAttentions

    @classmethod
    def reads(cls, model: Any) -> Any:
        """Multiple choice reads what ``summary_type`` says."""
        summarises = type(model).__name__.endswith("ForMultipleChoice")
        return "all" if summarises and model.config.summary_type != "first" else super().reads(model)

    def embed(self, tokens: PackedTokens) -> Tensor:
        """Embeddings, then the projection to the hidden size if they have another."""
        embedded = super().embed(tokens)
        projection = getattr(self.base, "embeddings_project", None)
        return embedded if projection is None else projection(embedded)
