"""Jina embeddings v3."""

from token_pruning.families.nomic_bert import NomicBert


class JinaEmbeddingsV3(NomicBert):
    """NomicBERT's layers with biases and a plain feed-forward."""

    model_types = ("jina_embeddings_v3",)
    ffn_matrices = 2
