"""A forward pass that removes tokens, written so that a tracer sees nothing but operations on tensors.

It is the loop of :mod:`token_pruning.runtime.loop` with the families' own steps and the methods' own decisions. Rows
are packed, ``[tokens, dim]``, and how many there are depends on the input; attention alone is computed on a padded
grid.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from token_pruning.errors import UnsupportedModelError
from token_pruning.families import Family
from token_pruning.pruners.fitted import apply_affine
from token_pruning.ragged import Layout, PackedTokens
from token_pruning.ragged.layout import computed_once
from token_pruning.runtime.context import ContextTokens
from token_pruning.runtime.departed import LastStates
from token_pruning.runtime.loop import PackedLoop
from token_pruning.runtime.trace import LayerRecord

_MASKED = -1e30  # finite: added to logits of places that hold no token
_STEPS, _LEAST_STEP, _OCTAVES = 16, 16, 20  # of numbers of rows that are rounded up: per octave, at least, at most


@dataclass(frozen=True)
class GraphLayout(Layout):
    """A layout all of whose numbers are tensors; every sequence has a token.

    Attributes:
        rounded: whether the grid's width is rounded up, and so are numbers of rows, once tokens have left: OpenVINO
            prepares itself for every shape that it has not met, which takes as long as a quarter of a pass.
    """

    rounded: bool = False

    @property
    def lengths(self) -> list[int]:
        """Known when the graph runs."""
        raise UnsupportedModelError(
            "the method reads how many tokens there are (layout.lengths), which a graph cannot; lengths_tensor it can"
        )

    @computed_once
    def lengths_tensor(self) -> Tensor:
        return (self.cu_seqlens[1:] - self.cu_seqlens[:-1]).long()

    @computed_once
    def starts(self) -> Tensor:
        """Each sequence's first row, ``[batch]`` int64."""
        return self.cu_seqlens[:-1].long()

    @property
    def first_rows(self) -> Tensor:
        return self.starts

    @computed_once
    def columns(self) -> Tensor:
        """Each row's place in its sequence, padding counted, ``[tokens]`` int64."""
        return self.indices - self.sequence_ids * self.width

    def per_sequence(self, first: Tensor) -> Tensor:
        return first

    @computed_once
    def grid_shape(self) -> tuple[Any, Any]:
        """Sequences, and the places that attention has for each."""
        longest = self.lengths_tensor.max()
        return self.lengths_tensor.shape[0], rounded_up(longest) if self.rounded else longest

    @computed_once
    def grid_mask(self) -> Tensor:
        """Places that hold a token, ``[batch, places]`` bool."""
        return torch.arange(self.grid_shape[1]) < self.lengths_tensor[:, None]

    @computed_once
    def grid_rows(self) -> Tensor:
        """The row for each place, ``[batch, places]`` int64; where none is, the sequence's first."""
        rows = self.starts[:, None] + torch.arange(self.grid_shape[1])
        return torch.where(self.grid_mask, rows, self.starts[:, None])

    @computed_once
    def grid_places(self) -> Tensor:
        """Each row's place in the flattened grid, ``[tokens]`` int64."""
        shift: Tensor = torch.arange(self.lengths_tensor.shape[0]) * self.grid_shape[1] - self.starts
        return torch.arange(self.indices.shape[0]) + shift[self.sequence_ids]

    def ranks(self, scores: Tensor) -> Tensor:
        own, other = scores[self.grid_rows][:, :, None], scores[self.grid_rows][:, None]
        numbers = torch.arange(self.grid_shape[1])
        before = (other > own) | ((other == own) & (numbers < numbers[:, None]))
        found = (before & self.grid_mask[:, None]).long().sum(2)
        return found.flatten()[self.grid_places]

    def sums(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Each sequence's weighted sum of its rows, ``[batch, dim]`` float32.

        Args:
            rows: ``[tokens, dim]``.
            weights: ``[tokens]`` float32.
        """
        weighted = torch.where(self.grid_mask, weights[self.grid_rows], 0.0)
        return (weighted[:, None] @ rows[self.grid_rows].float())[:, 0]


def rounded_up(count: int | Tensor) -> Any:
    """A number of rows rounded up: to a multiple of 16, from 512 on to one of 16 per octave; int64."""
    doubled = 2 ** torch.arange(_OCTAVES)
    step = _LEAST_STEP + torch.where(count >= _LEAST_STEP * _STEPS * 2 * doubled, _LEAST_STEP * doubled, 0).sum()
    return (count + step - 1) // step * step


def pack_for_graph(family: Family, inputs: dict[str, Tensor], *, rounded: bool) -> tuple[PackedTokens, Tensor]:
    """Leave padding behind.

    Args:
        family: bound to the base model.
        inputs: ``input_ids``, ``attention_mask`` and perhaps ``token_type_ids``, ``[batch, width]`` int64.
        rounded: see :class:`GraphLayout`.

    Returns:
        The tokens, and ``[batch]`` bool: which sequences have any. One without borrows its first place.
    """
    ids, width = inputs["input_ids"], inputs["input_ids"].shape[1]
    mask = inputs["attention_mask"] != 0
    filled = mask.any(1)
    mask = mask | (~filled[:, None] & (torch.arange(width) == 0))
    indices = mask.flatten().nonzero()[:, 0]
    ends = mask.long().sum(1).cumsum(0)
    layout = GraphLayout(indices, torch.cat([torch.zeros(1, dtype=torch.int64), ends]).int(), width, rounded)
    layout.__dict__["grid_shape"] = (ids.shape[0], layout.lengths_tensor.max())  # the input's, never rounded
    types = inputs.get("token_type_ids")
    return (
        PackedTokens(
            ids.flatten()[indices],
            family.positions(ids, mask).flatten()[indices],
            None if types is None else types.flatten()[indices],
            layout,
        ),
        filled,
    )


class GraphLoop(PackedLoop):
    """The loop over a model's layers as a graph."""

    def enter(self) -> Tensor:
        rows = super().enter()
        if not self._rounded or self.decisions.entering(1) is self.tokens.layout:
            return rows
        return rows[self._filled(torch.arange(rows.shape[0]))]

    def positions(self, number: int, rows: Tensor) -> Tensor:
        layout = self.decisions.entering(number)
        found = self.tokens.positions if layout is self.tokens.layout else self._position_grid[layout.indices]
        return pad(found, (0, rows.shape[0] - found.shape[0])) if self._rounded else found

    def states(self, number: int, rows: Tensor) -> Tensor:
        return rows[: self.decisions.entering(number).indices.shape[0]] if self._rounded else rows

    @property
    def _rounded(self) -> bool:
        layout = self.tokens.layout
        return isinstance(layout, GraphLayout) and layout.rounded

    def _staying(self, number: int, record: LayerRecord) -> Tensor | None:
        stay = super()._staying(number, record)
        return stay if stay is None or self.decisions.first_only(number) or not self._rounded else self._filled(stay)

    @staticmethod
    def _filled(rows: Tensor) -> Tensor:
        """Numbers of rows, with the first one again and again at the end, up to a rounded count."""
        numbers = torch.arange(rounded_up(rows.shape[0]))
        return rows[torch.where(numbers < rows.shape[0], numbers, 0)]

    @staticmethod
    def _with_filler(rows: Tensor) -> Tensor:
        return rows  # that is done where rows are chosen

    def attend(
        self,
        number: int,
        layer: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        asking: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """On the grid."""
        family, layout = self.family, self.decisions.entering(number)
        assert isinstance(layout, GraphLayout)
        rows = layout.grid_rows
        key_rows = key.shape[0]
        scores = self.decisions.prunes(number) and not self.decisions.probes(number)
        query = query * family.scale(layer)
        query = query[:, :, None] if asking is not None else query[rows].transpose(1, 2)
        terms, columns = self.terms(number, layer), layout.columns[rows]
        others = self.others(number, layer, key)
        if others is None:
            key, value, present, key_columns = key[rows], value[rows], layout.grid_mask, columns
        else:
            key, value, present = self._beside(others, layout, key, value)
            key_columns = torch.arange(layout.width).expand(present.shape)
        key, value = key.transpose(1, 2), value.transpose(1, 2)
        added = terms.of(query, key, columns if asking is None else columns[:, :1], key_columns) if terms else None
        masked = (~present).float() * _MASKED
        if scores:  # the mask is one more number of every query and key, which saves a pass over all logits
            masked = masked[:, None, :, None].expand(-1, key.shape[1], -1, 1)
            ones = torch.ones_like(masked if others is None else query[..., :1])
            logits = torch.cat([query, ones], 3) @ torch.cat([key, masked], 3).transpose(-1, -2)
        else:  # in this form OpenVINO computes attention in one operation
            logits = query @ key.transpose(-1, -2) + masked[:, None, None]
        logits = logits if added is None else logits + added
        probabilities = logits.softmax(-1)
        context = probabilities @ value
        if asking is not None:
            return context[:, :, 0], None
        # [batch, heads, places, head_dim] to rows again
        places = layout.grid_places
        if self._rounded:
            places = pad(places, (0, key_rows - places.shape[0]))
        context = context.transpose(1, 2).flatten(0, 1)[places]
        if not scores:
            return context, None
        paid = self.decisions.paid(number)
        weights = layout.grid_mask.float()
        if paid is not None:
            weights = weights * paid[rows]
        received = (weights[:, None, None] @ probabilities)[:, :, 0].mean(1)
        return context, received.flatten()[layout.grid_places if others is None else layout.indices]

    @staticmethod
    def _beside(
        others: ContextTokens, layout: GraphLayout, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values of rows and context tokens, ``[batch, width, heads, head_dim]``, and where there are any."""
        total, more = layout.indices.shape[0], others.places.shape[0]
        found = torch.zeros(layout.batch_size * layout.width, dtype=torch.int64)
        found = found.scatter(0, layout.indices, 1 + torch.arange(total))
        found = found.scatter(0, others.places, 1 + total + torch.arange(more)).view(layout.batch_size, layout.width)
        keys, values = (
            torch.cat([torch.zeros_like(rows[:1]), rows[:total], given])[found]
            for rows, given in ((key, others.key), (value, others.value))
        )
        return keys, values, found > 0

    def leave(self, rows: Tensor) -> LastStates:
        """``[batch, dim]`` of first tokens where only these are read, else of every place, ``[batch · width, dim]``.

        What departed tokens count as is in them, and the correction.
        """
        record, last = self.decisions.record, self.decisions.record.layers[len(self.decisions.record.layers)]
        own = self.family.finish(rows if record.first_only else rows[: last.leaving.indices.shape[0]])
        if record.first_only:
            return LastStates(self._corrected(own, last.entering))
        assert isinstance(last.leaving, GraphLayout)
        if self.reads == "all" or (record.pruner.departed == "state" and record.pruner.correction is None):
            return LastStates(self._every_state(own, last.leaving))
        return LastStates(self._states_of_mean(own, last.leaving))

    def _every_state(self, own: Tensor, leaving: GraphLayout) -> Tensor:
        """Each token's own state, or what it counts as."""
        departed, valid = self.decisions.record.pruner.departed, self.decisions.record.valid
        if departed == "survivors":
            means = leaving.sums(own, torch.ones_like(own[:, 0])) / leaving.lengths_tensor[:, None]
            places, states = valid.indices, means.to(own.dtype)[valid.sequence_ids]
            return self._placed([(places, states), (leaving.indices, own)])
        return self._placed([(leaving.indices, own), *self._parts(mapped=True)])

    def _parts(self, *, mapped: bool) -> list[tuple[Tensor, Tensor]]:
        """Places and states of departed tokens, layer by layer."""
        if self.decisions.record.pruner.departed != "map":
            return [(places, self.family.finish(states)) for places, states in self.departed.values()]
        if not mapped:
            return list(self.departed.values())
        maps = self.decisions.token_pruner.departure_maps
        return [(places, apply_affine(x, maps[at]).to(x.dtype)) for at, (places, x) in self.departed.items()]

    def _states_of_mean(self, own: Tensor, leaving: GraphLayout) -> Tensor:
        """Survivors' own states; what left shares one in each text, such that the mean is the pooled vector."""
        valid, pruner = self.decisions.record.valid, self.decisions.record.pruner
        lengths, count = valid.lengths_tensor[:, None], leaving.lengths_tensor[:, None]
        total = leaving.sums(own, torch.ones_like(own[:, 0]))
        whole, number = total, count
        if self.departed and pruner.departed != "survivors":  # which have some for context alone
            states = self._placed(self._parts(mapped=False))
            for at, (places, _) in self.departed.items():
                there = self._marked(places).view(valid.batch_size, 1, valid.width)
                some = (there @ states.view(valid.batch_size, valid.width, -1).float())[:, 0]
                gone = there.sum(2)
                if pruner.departed == "map":
                    some = apply_affine(some / gone.clamp(min=1), self.decisions.token_pruner.departure_maps[at]) * gone
                whole, number = whole + some, number + gone
        pooled = self._corrected(whole / number, leaving)
        rest = (pooled * lengths - total) / (lengths - count).clamp(min=1)
        shared = rest.to(own.dtype)[valid.sequence_ids]
        return self._placed([(valid.indices, shared), (leaving.indices, own)])

    def _corrected(self, vectors: Tensor, left: Layout) -> Tensor:
        """``[batch, dim]``, corrected where a text has fewer tokens left than it had."""
        weights = self.decisions.token_pruner.correction_weights
        if weights is None:
            return vectors
        lost = left.lengths_tensor < self.decisions.record.valid.lengths_tensor
        return torch.where(lost[:, None], apply_affine(vectors, weights).to(vectors.dtype), vectors)

    def _placed(self, parts: list[tuple[Tensor, Tensor]]) -> Tensor:
        """``[batch · width, dim]`` with states in their places, later ones over earlier ones; zeros elsewhere.

        The numbers of rows are put into their places, and the rows themselves copied once.
        """
        valid, rows = self.decisions.record.valid, torch.cat([states for _, states in parts])
        found = torch.zeros(valid.batch_size * valid.width, dtype=torch.int64)
        number = 1
        for places, states in parts:
            found = found.scatter(0, places, number + torch.arange(states.shape[0]))
            number = number + states.shape[0]
        return torch.cat([rows.new_zeros(1, rows.shape[1]), rows])[found]  # rows[:1] has none where nothing left

    def _marked(self, places: Tensor) -> Tensor:
        """``[batch · width]`` float32, 1 in some places."""
        valid = self.decisions.record.valid
        return torch.zeros(valid.batch_size * valid.width).scatter(0, places, torch.ones(places.shape[0]))
