"""ERNIE."""

from dataclasses import replace

from torch import nn

from token_pruning.families.base import EmbeddingModules
from token_pruning.families.bert import Bert


class Ernie(Bert):
    """BERT; some models also embed a task's type, here always task 0, as Hugging Face does where none is given."""

    model_types = ("ernie",)
    refused_inputs = (*Bert.refused_inputs, "task_type_ids")

    def embedding_modules(self) -> EmbeddingModules:
        """The native engine gets the task's embedding within those of the positions."""
        modules = super().embedding_modules()
        task = getattr(self.base.embeddings, "task_type_embeddings", None)
        if task is None or modules.position is None:
            return modules
        for table in (modules.position, task):
            if type(table) is not nn.Embedding or table._forward_hooks or table._forward_pre_hooks:
                return replace(modules, position=table)  # the engine says what it has against it
        summed = modules.position.weight.detach().float() + task.weight.detach()[0].float()
        return replace(modules, position=nn.Embedding(summed.shape[0], summed.shape[1], _weight=summed))
