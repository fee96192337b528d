"""What models with rotary position embeddings share: no position table, and layers without an encoder module around."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any, ClassVar

from torch import Tensor, nn

from token_pruning.families.base import Family, ModelShape, Rotation, split_heads, wanted


class Rotary(Family):
    """Queries and keys are turned by their positions in the original text, whatever has left in between.

    Attributes:
        ffn_matrices: see :class:`ModelShape`; the feed-forward is gated unless a family says otherwise.
    """

    model_types: ClassVar[tuple[str, ...]] = ()
    ffn_matrices: ClassVar[int] = 3
    replaced = ("self_attn",)

    def __init__(self, base: Any) -> None:
        super().__init__(base)
        name = self.config.model_type
        self._rotate: Callable[..., tuple[Tensor, Tensor]] = import_module(
            f"transformers.models.{name}.modeling_{name}"
        ).apply_rotary_pos_emb

    @classmethod
    def shape(cls, config: Any) -> ModelShape:
        """Positions are without limit."""
        return replace(
            super().shape(config),
            max_positions=None,
            ffn_matrices=cls.ffn_matrices,
            head_dim=getattr(config, "head_dim", None),
            num_kv_heads=getattr(config, "num_key_value_heads", None),
        )

    @classmethod
    def unsupported(cls, config: Any) -> str | None:
        """Angles that depend on the longest sequence of a batch; layers that are not transformers' own."""
        given = getattr(config, "rope_parameters", None)
        if not given:
            return "layers of its own code"
        for parameters in (given, *given.values()):
            kind = parameters.get("rope_type") if isinstance(parameters, dict) else None
            if kind is not None and ("dynamic" in kind or kind == "longrope"):
                return f"rope_type {kind!r}"
        return None

    @property
    def layers(self) -> Sequence[nn.Module]:
        return list(self.base.layers)[: self.config.num_hidden_layers]

    @abstractmethod
    def attention(self, layer: Any) -> Any:
        """The layer's attention module."""

    def scale(self, layer: Any) -> float:
        return float(self.attention(layer).scaling)

    def dropout(self, layer: Any) -> float:
        return float(self.attention(layer).attention_dropout)

    def rotation(self, layer: Any) -> Rotation:
        rotary = self.base.rotary_emb
        return Rotation(rotary.inv_freq, float(rotary.attention_scaling))

    def angles(self, layer: Any, rows: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of some positions, ``[1, tokens, head_dim]`` each, in the rows' dtype."""
        found: tuple[Tensor, Tensor] = self.base.rotary_emb(rows, positions[None])
        return found

    def turned(self, layer: Any, keys: Tensor, positions: Tensor, *, back: bool = False) -> Tensor:
        cos, sin = (x[0] for x in self.angles(layer, keys, positions))
        turned = self._rotate(keys, keys, cos, -sin if back else sin)[0]
        if back:
            turned = turned / self.rotation(layer).factor ** 2
        return turned.to(keys.dtype)

    def project(self, layer: Any, rows: Tensor, positions: Tensor, asking: Tensor | None) -> tuple[Tensor, ...]:
        """Three linear layers, then the rotation."""
        attention = self.attention(layer)
        size = attention.head_dim
        return self.rotated(
            split_heads(attention.q_proj(wanted(rows, asking)), size),
            split_heads(attention.k_proj(rows), size),
            split_heads(attention.v_proj(rows), size),
            self.angles(layer, rows, positions),
            asking,
        )

    def rotated(
        self, query: Tensor, key: Tensor, value: Tensor, angles: tuple[Tensor, Tensor], asking: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Queries and keys rotated, in the values' dtype.

        Args:
            query: ``[asking, heads, head_dim]``.
            key: ``[tokens, heads, head_dim]``.
            value: see ``key``.
            angles: cosine and sine, ``[1, tokens, head_dim]`` each.
            asking: see :meth:`project`.
        """
        cos, sin = (x[0] for x in angles)
        if asking is None:
            query, key = self._rotate(query, key, cos, sin)
        else:  # as many rows of both are needed; one head will do for those not wanted
            query = self._rotate(query, query[:, :1], cos[asking], sin[asking])[0]
            key = self._rotate(key, key[:, :1], cos, sin)[0]
        return query.to(value.dtype), key.to(value.dtype), value
