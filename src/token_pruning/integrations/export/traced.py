"""A pruned model as a function from tensors to tensors that a tracer can follow."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from token_pruning.engine.adapters import with_merged_adapters
from token_pruning.errors import ConfigError, UnsupportedModelError
from token_pruning.integrations.export.graph import GraphLoop, pack_for_graph
from token_pruning.runtime.attachment import Attachment
from token_pruning.runtime.inputs import input_tables
from token_pruning.runtime.prune import attachment_of, hugging_face_model

_OUTPUTS = ("logits", "start_logits", "end_logits", "last_hidden_state", "pooler_output")


class Traced(nn.Module):
    """A copy of a pruned model whose base runs the loop of :mod:`token_pruning.integrations.export.graph`.

    Attributes:
        inputs: names of what ``forward`` takes, ``[batch, width]`` int64 each.
        outputs: names of what it returns.
    """

    def __init__(self, model: Any, *, rounded: bool) -> None:
        """Take a pruned model of transformers, or one of PEFT around it.

        Args:
            model: the model.
            rounded: see :class:`token_pruning.integrations.export.graph.GraphLayout`.

        Raises:
            ConfigError: if it is not pruned, or for a setting that a graph cannot have.
            UnsupportedModelError: for a head or a model that a graph cannot have.
        """
        super().__init__()
        inner = hugging_face_model(model)
        attachment_of(inner).check_call()
        refuse(inner, attachment_of(inner))
        self.model = copy.deepcopy(with_merged_adapters(inner)).to("cpu", torch.float32).eval().requires_grad_(False)
        attachment = attachment_of(self.model)
        attachment.token_pruner.fit_vocabulary()
        attachment.token_pruner.check_maps(attachment.reads)
        self.token_pruner, self.family = attachment.token_pruner, attachment.family
        attachment.run = _Run(attachment, rounded)  # type: ignore[method-assign]
        types = input_tables(attachment.base)["token_type_ids"] or 1
        self.inputs = ("input_ids", "attention_mask", *(("token_type_ids",) if types > 1 else ()))
        self.outputs: tuple[str, ...] = ()
        found = self._run(*self.example())
        self.outputs = tuple(name for name in _OUTPUTS if isinstance(found.get(name), Tensor))

    def example(self) -> tuple[Tensor, ...]:
        """Inputs to trace with: three texts of 9, 12 and 7 tokens, some of which leave."""
        generator = torch.Generator().manual_seed(0)
        vocabulary = self.model.get_input_embeddings().num_embeddings
        ids = torch.randint(min(5, vocabulary - 1), vocabulary, (3, 12), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, 9:], mask[2, 7:] = 0, 0
        return (ids, mask, torch.zeros_like(ids))[: len(self.inputs)]

    def dynamic_outputs(self) -> dict[str, dict[int, str]]:
        """Axes of the outputs that depend on the input's."""
        width = 12
        found = zip(self.outputs, self(*self.example()), strict=True)
        return {
            name: {0: "batch", **({1: "width"} if value.dim() > 1 and value.shape[1] == width else {})}
            for name, value in found
        }

    def _run(self, *inputs: Tensor) -> Any:
        return self.model(**dict(zip(self.inputs, inputs, strict=True)), return_dict=True)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """One tensor for each of :attr:`outputs`."""
        found = self._run(*inputs)
        return tuple(found[name] for name in self.outputs)


class _Run:
    """Stands in for :meth:`Attachment.run`."""

    def __init__(self, attachment: Attachment, rounded: bool) -> None:
        self.attachment, self.rounded = attachment, rounded

    def __call__(self, options: dict[str, Any], *, by_head: bool) -> Any:
        attachment, family = self.attachment, self.attachment.family
        reads = attachment.reads_in(by_head)
        given = {name: value for name, value in family.inputs(options).items() if value is not None}
        tokens, filled = pack_for_graph(family, given, rounded=self.rounded)
        states = GraphLoop(family, attachment.token_pruner, tokens, reads=reads).run().states
        layout = tokens.layout
        if reads == "first":
            first = torch.where(filled[:, None], states, 0.0)
            padded = first[:, None]
        else:
            padded = states.view(layout.batch_size, layout.width, -1)
            padded = torch.where(filled[:, None, None], padded, 0.0)
            first = states[layout.indices[layout.first_rows]]
            first = torch.where(filled[:, None], first, 0.0)
            padded = first[:, None] if by_head else padded
        output = family.output(padded, first)
        return family.as_tuple(output) if options.get("return_dict") is False else output


def refuse(model: Any, attachment: Attachment) -> None:
    """Raises for what a graph cannot have."""
    name, pruner = type(model).__name__, attachment.token_pruner.pruner
    if model.main_input_name != "input_ids":
        raise UnsupportedModelError(f"a {name} takes {model.main_input_name}; only models of input_ids can be exported")
    if name.endswith("ForMultipleChoice"):
        raise UnsupportedModelError(f"a {name} cannot be exported: it takes several texts as one")
    for setting, allowed in (("summary_tokens", "none"), ("max_tokens", None)):
        value = getattr(pruner, setting)
        if value != allowed:
            raise ConfigError(f"{setting} is {value!r}; a model that is exported must have {allowed!r}")
