"""What an exported SentenceTransformer or CrossEncoder needs besides the graph of its transformer."""

import copy
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from token_pruning.integrations.sentence_transformers.modules import pooling_of
from token_pruning.runtime.prune import unprune


class _WithVector(nn.Module):
    """A graph with one more output, what the modules after the transformer make of its states."""

    def __init__(self, graph: Any, modules: list[nn.Module]) -> None:
        super().__init__()
        self.graph, self.tail = graph, nn.ModuleList(modules)
        self.inputs, self.outputs = graph.inputs, (*graph.outputs, "sentence_embedding")
        self.example, self.token_pruner, self.family = graph.example, graph.token_pruner, graph.family

    def dynamic_outputs(self) -> dict[str, dict[int, str]]:
        return {**self.graph.dynamic_outputs(), "sentence_embedding": {0: "batch"}}

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        found = self.graph(*inputs)
        states = found[self.graph.outputs.index("last_hidden_state")]
        features: dict[str, Any] = {"token_embeddings": states, "attention_mask": inputs[1]}
        for module in self.tail:
            features = module(features)
        return (*found, features["sentence_embedding"])


def with_vector(model: Any, graph: Any) -> Any:
    """The graph with ``sentence_embedding``; as it is where the transformer has a head, or prompts are not pooled.

    Args:
        model: the pruned model.
        graph: of its transformer.
    """
    pooling = pooling_of(model)
    if pooling is None or not pooling.include_prompt:
        return graph
    modules = [copy.deepcopy(module).to("cpu").float().eval() for module in list(model)[1:]]
    return _WithVector(graph, modules)


def save_without_weights(model: Any, folder: Path) -> None:
    """All that sentence-transformers saves but the transformer's weights, as of the dense model."""
    dense = unprune(copy.deepcopy(model))
    dense.save_pretrained(str(folder), create_model_card=False)
    for pattern in ("*.safetensors", "*.safetensors.index.json"):
        for file in folder.glob(pattern):
            file.unlink()
