"""Other libraries' models: each integration is a module of its own, imported once a model of that library is used."""

from token_pruning.runtime.adapters import register_adapter

register_adapter(
    "sentence_transformers",
    module="token_pruning.integrations.sentence_transformers",
    package="sentence-transformers",
    extra="sentence-transformers",
    mark="modules.json",
)

LIBRARIES = ("sentence_transformers",)
"""By the names they are imported by."""
