"""The encoder in plain PyTorch: what machines without the native kernels get."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, layer_norm, linear, pad
from transformers.activations import ACT2FN

from token_pruning.engine.tokens import EncoderOutput, PackedTokens
from token_pruning.families import EmbeddingModules, Family, LayerModules
from token_pruning.ragged import first_token_attention, packed_attention
from token_pruning.ragged.layout import Layout, row_bucket
from token_pruning.runtime.state import ForwardState, TokenPruner


class TorchEncoder:
    """Packed execution with one product for queries, keys and values, and removal before the output projection."""

    def __init__(self, family: Family, base: Any, dtype: torch.dtype) -> None:
        """Copy a base model's weights.

        Args:
            family: the model's adapter.
            base: the base model.
            dtype: float32 or bfloat16.
        """
        self.shape, self._dtype = family.shape(base.config), dtype
        self._embeddings = Embeddings(family.embedding_modules(base), dtype)
        self._activation = ACT2FN[family.activation(base.config)]
        layers = list(family.layers(family.encoder(base)))
        self._layers = [
            _Layer(family.layer_modules(layer), self._activation, dtype, last=layer is layers[-1]) for layer in layers
        ]

    def head_linear(self, linear: nn.Linear, vocabulary: int) -> nn.Module:
        """A head's linear layer, as it is."""
        return copy.deepcopy(linear)

    def run(self, tokens: PackedTokens, pruner: TokenPruner, *, first_only: bool, recorded: bool) -> EncoderOutput:
        """See :class:`token_pruning.engine.tokens.Encoder`."""
        layout = tokens.layout
        places = layout.batch_size * layout.width
        mask = torch.zeros(places, dtype=torch.bool).index_fill_(0, layout.indices, True)
        state = ForwardState(
            pruner,
            mask.view(layout.batch_size, layout.width),
            {},
            packed=True,
            input_ids=tokens.id_grid(),
            first_only=first_only,
        )
        states = torch.zeros(places, self.shape.hidden_size)
        x = self._with_filler(self._embeddings(tokens))
        for number, layer in enumerate(self._layers, start=1):
            entering = state.entering(number)
            heads, prunes = self.shape.num_heads, state.prunes(number)
            if state.first_only(number) and not prunes:
                context, x = layer.attend_first(x, entering, heads)
                state.decide(number, None)
                x = layer.feed_forward(layer.finish_attention(self._with_filler(context), self._with_filler(x)))
                continue
            context, received = layer.attend(x, entering, heads, prunes)
            state.decide(number, received)
            record = state.layers[number]
            if record.merge is not None:  # a summary needs the states of the tokens dropped
                x = layer.finish_attention(context, x)
                states[entering.indices[record.dropped_rows]] = x[record.dropped_rows].float()
                x = layer.feed_forward(self._with_filler(record.merge.apply(x)[record.kept_rows]))
                continue
            rows = entering.first_rows if state.first_only(number) else record.kept_rows
            if record.dropped_rows is not None and not first_only:
                gone = record.dropped_rows
                states[entering.indices[gone]] = layer.finish_attention(context[gone], x[gone]).float()
            if rows is not None:
                context, x = self._with_filler(context[rows]), self._with_filler(x[rows])
            x = layer.feed_forward(layer.finish_attention(context, x))
        if first_only:
            result = torch.zeros(layout.batch_size, self.shape.hidden_size)
            filled = layout.lengths_tensor > 0
            result[filled] = x[: int(filled.sum())].float()
        else:
            last = state.layers[self.shape.num_layers]
            states[last.leaving.indices[last.token_rows]] = x[last.token_rows].float()
            result = states[layout.indices]
        return EncoderOutput(result, state.layers if recorded else {})

    def _with_filler(self, rows: Tensor) -> Tensor:
        """Rows up to a bucketed count, which half-precision products need; never none at all."""
        count = max(1, rows.shape[0] if self._dtype == torch.float32 else row_bucket(rows.shape[0]))
        return pad(rows, (0, 0, 0, count - rows.shape[0])) if count > rows.shape[0] else rows

    def explain(self) -> list[str]:
        """Which products are used."""
        prepacked = self._layers[0].projections.prepacked is not None
        return [f"products: {'oneDNN with prepacked weights' if prepacked else 'torch.nn.functional.linear'}"]


def _copied(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to("cpu", dtype, copy=True).contiguous()


class Embeddings:
    """What enters the first layer, ``[tokens, hidden]`` for packed tokens."""

    def __init__(self, modules: EmbeddingModules, dtype: torch.dtype) -> None:
        """Copy a base model's tables."""
        self.word = _copied(modules.word.weight, dtype)
        self.position = _copied(modules.position.weight, dtype)
        self.token_type = None if modules.token_type is None else _copied(modules.token_type.weight, dtype)
        self.norm = _Norm(modules.norm, dtype)
        self.projection = None if modules.projection is None else _Linear([modules.projection], dtype)

    def __call__(self, tokens: PackedTokens) -> Tensor:
        x = embedding(tokens.ids, self.word)
        if self.token_type is not None:
            types = torch.zeros_like(tokens.ids) if tokens.token_types is None else tokens.token_types
            x = x + embedding(types, self.token_type)
        x = self.norm(x + embedding(tokens.positions, self.position))
        return x if self.projection is None else self.projection(x)


class _Norm:
    def __init__(self, module: nn.LayerNorm, dtype: torch.dtype) -> None:
        self.shape, self.epsilon = module.normalized_shape, module.eps
        self.weight, self.bias = _copied(module.weight, dtype), _copied(module.bias, dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.shape, self.weight, self.bias, self.epsilon)


class _Linear:
    """One or several linear layers of the same input as one product."""

    def __init__(self, modules: list[nn.Linear], dtype: torch.dtype) -> None:
        weight = _copied(torch.cat([module.weight for module in modules]), dtype)
        self.bias = _copied(torch.cat([module.bias for module in modules]), dtype)
        self.prepacked = _prepack(weight, self.bias)
        self.weight = weight if self.prepacked is None else None

    def __call__(self, x: Tensor) -> Tensor:
        if self.prepacked is None:
            return linear(x, self.weight, self.bias)  # type: ignore[arg-type]
        return _prepacked_linear(x, self.prepacked, self.bias)


def _prepacked_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


def _prepack(weight: Tensor, bias: Tensor) -> Tensor | None:
    """The weight in oneDNN's own layout, or None where that is not to be had or does not pay (below AVX-512).

    The operators are private to PyTorch, so they are tried, never assumed.
    """
    if "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return None
    try:
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, 256)
        x = torch.linspace(-1, 1, 2 * weight.shape[1], dtype=weight.dtype).view(2, -1)
        close = torch.allclose(_prepacked_linear(x, packed, bias), linear(x, weight, bias), rtol=1e-2, atol=1e-2)
    except (AttributeError, RuntimeError):
        return None
    return packed if close else None


class _Layer:
    def __init__(self, modules: LayerModules, activation: nn.Module, dtype: torch.dtype, *, last: bool) -> None:
        # Queries apart in the last layer, where only first tokens' may be wanted.
        self.query = _Linear([modules.query], dtype) if last else None
        inputs = [modules.key, modules.value]
        self.projections = _Linear(inputs if last else [modules.query, *inputs], dtype)
        self.attention_output = _Linear([modules.attention_output], dtype)
        self.attention_norm = _Norm(modules.attention_norm, dtype)
        self.up, self.down = _Linear([modules.feed_forward_up], dtype), _Linear([modules.feed_forward_down], dtype)
        self.output_norm = _Norm(modules.output_norm, dtype)
        self.activation = activation

    def attend(self, x: Tensor, layout: Layout, heads: int, needs_importance: bool) -> tuple[Tensor, Tensor | None]:
        """Context ``[rows, hidden]`` and received attention."""
        projected = self.projections(x)
        if self.query is not None:
            projected = torch.cat([self.query(x), projected], 1)
        q, k, v = projected.view(x.shape[0], 3, heads, -1).unbind(1)
        context, received = packed_attention(q, k, v, layout, q.shape[-1] ** -0.5, needs_importance=needs_importance)
        return context.flatten(1), received

    def attend_first(self, x: Tensor, layout: Layout, heads: int) -> tuple[Tensor, Tensor]:
        """In the last layer, first tokens' contexts and their rows of ``x``, both ``[sequences, hidden]``."""
        assert self.query is not None
        first = x[layout.first_rows]
        size = x.shape[1] // heads
        q = self.query(first).view(-1, heads, size)
        k, v = self.projections(x).view(-1, 2, heads, size).unbind(1)
        return first_token_attention(q, k, v, layout, size**-0.5).flatten(1), first

    def finish_attention(self, context: Tensor, x: Tensor) -> Tensor:
        return self.attention_norm(self.attention_output(context) + x)

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.output_norm(self.down(self.activation(self.up(x))) + x)
