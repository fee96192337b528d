"""GTE."""

from token_pruning.families.nomic_bert import NomicBert


class Gte(NomicBert):
    """NomicBERT's layers with biases; some models have no token types."""

    model_types = ("gte",)
