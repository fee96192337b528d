"""The loop over a model's layers, and the one place where a layer's step is written.

:class:`PackedLoop` removes tokens. :class:`PaddedLoop` is the slow and obvious reference: the same step of the same
family over every place of the padded batch, with a plain softmax, and masks instead of removal.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from token_pruning.errors import ConfigError
from token_pruning.families import Family, Reads
from token_pruning.ragged import (
    Layout,
    LogitTerms,
    PackedTokens,
    first_token_attention,
    masked_attention,
    packed_attention,
    row_bucket,
)
from token_pruning.ragged.layout import computed_once
from token_pruning.runtime.context import Context, ContextTokens
from token_pruning.runtime.decisions import Decisions
from token_pruning.runtime.departed import LastStates, needs_left_at
from token_pruning.runtime.token_pruner import TokenPruner
from token_pruning.runtime.trace import LayerRecord


class PackedLoop:
    """One forward pass over packed rows ``[tokens, dim]``; tokens that leave are gone."""

    def __init__(self, family: Family, token_pruner: TokenPruner, tokens: PackedTokens, *, reads: Reads) -> None:
        """Decide what enters the first layer.

        Args:
            family: bound to the model.
            token_pruner: the method and its thresholds.
            tokens: the valid tokens.
            reads: which last states are used.
        """
        self.family, self.tokens, self.reads = family, tokens, reads
        self.decisions = Decisions(token_pruner, tokens, reads=reads)
        self.context = Context(token_pruner)
        self.departed: dict[int, tuple[Tensor, Tensor]] = {}
        """Per layer, the places in the padded batch of the tokens dropped there and their states; 0 for the entry.

        States only where they count for something.
        """
        self.beside: dict[int, Tensor] = {}
        """Per layer just run, what else than its rows a gradient comes back to: the soft mask, or departed states."""

    def run(self) -> LastStates:
        """All layers.

        Returns:
            The last states: of first tokens where only these are wanted (zeros for a sequence without tokens), else of
            all. A batch of no sequences is not recorded.
        """
        if not self.tokens.layout.batch_size:  # modules cannot reshape a batch of nothing
            weight: Tensor = next(self.family.base.parameters())
            return LastStates(weight.new_zeros(0, self.family.shape(self.family.config).hidden_size))
        rows = self.enter()
        for number, layer in enumerate(self.family.layers, start=1):
            rows = self._checkpointed(number, layer, rows)
        last = self.leave(rows)
        self.decisions.finish()
        return last

    def step(self, number: int, layer: nn.Module, rows: Tensor) -> Tensor:
        """One layer.

        Args:
            number: 1 for the first.
            layer: the module.
            rows: what enters, ``[rows, dim]``.

        Returns:
            What enters the next layer.
        """
        positions = self.positions(number, rows)
        asking = self.asking(number)
        query, key, value = self.family.project(layer, rows, positions, asking)
        context, received = self.attend(number, layer, query, key, value, asking)
        if self.decisions.probes(number):
            joined = self.family.join(layer, context.flatten(1), rows)
            record = self.decisions.decide(number, self.decisions.probe_scores(number, self.states(number, joined)))
            joined = self.remove(number, record, joined)
        else:
            record = self.decisions.decide(number, received)
            joined = self.join(number, layer, record, context.flatten(1), rows, asking)
        return self.settle(number, record, self.family.feed_forward(layer, joined), joined, rows)

    # What packed and padded rows have different ways of doing.

    def enter(self) -> Tensor:
        """The first layer's rows; padding is left behind, and tokens that the vocabulary threshold drops."""
        decisions, record = self.decisions, self.decisions.record
        if decisions.entered_rows is None or decisions.never_entered_rows is None:
            return self._with_filler(self.family.embed(self.tokens))
        if not self._keeps(0):
            return self._with_filler(self.family.embed(self.tokens.of(decisions.entered_rows, record.entering)))
        embedded, gone = self.family.embed(self.tokens), decisions.never_entered_rows
        self.departed[0] = (record.valid.indices[gone], embedded[gone])
        return self._with_filler(embedded[decisions.entered_rows])

    @property
    def keeps_departed(self) -> bool:
        """Whether the states of tokens that left count for something."""
        return self.reads != "first" and self.decisions.record.pruner.departed != "survivors"

    def _keeps(self, number: int) -> bool:
        """Whether the states of tokens that leave after a layer, 0 for those that never enter, are needed."""
        return self.keeps_departed or self.context.takes(number)

    def states(self, number: int, rows: Tensor) -> Tensor:
        """The rows of the tokens that entered the layer, ``[entering.total, dim]``."""
        total = self.decisions.entering(number).total
        return rows if total == rows.shape[0] else rows[:total]

    def positions(self, number: int, rows: Tensor) -> Tensor:
        """Position ids of the rows, ``[rows]`` integers; 0 for filler."""
        layout, found = self.decisions.entering(number), self.tokens.positions
        if layout is not self.tokens.layout:
            found = self._position_grid.index_select(0, layout.indices)
        filler = rows.shape[0] - layout.total
        return pad(found, (0, filler)) if filler else found

    def asking(self, number: int) -> Tensor | None:
        """The rows whose queries are wanted: first tokens in a last layer that computes nothing else; None for all."""
        decisions = self.decisions
        entering = decisions.entering(number)
        narrow = decisions.first_only(number) and not decisions.prunes(number) and entering.total > 0
        return entering.first_rows if narrow else None

    def terms(self, number: int, layer: nn.Module) -> LogitTerms:
        """What is added to the layer's attention logits."""
        return self.family.terms(layer)

    def attend(
        self,
        number: int,
        layer: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        asking: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Context ``[rows asking, heads, head_dim]`` and received attention ``[entering.total]`` float32 or None."""
        family, decisions = self.family, self.decisions
        layout, rows, own = decisions.entering(number), query.shape[0], None
        scores = decisions.prunes(number) and not decisions.probes(number)
        paid = decisions.paid(number) if scores else None
        others = self.others(number, layer, key)
        if others is not None and others.places.numel():
            total = layout.total
            layout, order, own = self.context.beside(layout, others)
            key, value = (
                torch.cat([own_rows[:total], given]).index_select(0, order)
                for own_rows, given in ((key, others.key), (value, others.value))
            )
            if asking is None:  # those that left ask nothing, and what they pay counts for nothing
                query = query.new_zeros(layout.total, *query.shape[1:]).index_copy(0, own, query[:total])
                paid = torch.ones(total, dtype=torch.float32, device=own.device) if paid is None else paid
                paid = paid.new_zeros(layout.total).index_copy(0, own, paid)
        scale, terms = family.scale(layer), self.terms(number, layer)
        dropout = family.dropout(layer) if layer.training else 0.0
        # Windows and distances are those of the text as it came: of columns, whatever position ids there are.
        columns = pad(layout.indices % layout.width, (0, key.shape[0] - layout.total)) if terms else None
        if asking is not None:
            context = first_token_attention(query, key, value, layout, scale, dropout, terms=terms, positions=columns)
            return context, None
        context, received = packed_attention(
            query, key, value, layout, scale, dropout,
            needs_importance=scores,
            differentiable_importance=decisions.differentiable_importance,
            paid=paid,
            terms=terms, positions=columns,
        )  # fmt: skip
        if own is None:
            return context, received
        context = pad(context.index_select(0, own), (0, 0, 0, 0, 0, rows - own.numel()))
        return context, None if received is None else received.index_select(0, own)

    def others(self, number: int, layer: nn.Module, key: Tensor) -> ContextTokens | None:
        """The context tokens in the layer's attention; ``key`` is that of the rows, ``[rows, heads, head_dim]``."""
        found = self.context.of(number, self.departed, key)
        if found is None or not self.family.turns:
            return found
        return replace(found, key=self.family.turned(layer, found.key, self._position_grid[found.places]))

    def join(
        self,
        number: int,
        layer: nn.Module,
        record: LayerRecord,
        context: Tensor,
        rows: Tensor,
        asking: Tensor | None,
    ) -> Tensor:
        """What enters the feed-forward.

        Rows that leave are projected only where their states are wanted.
        """
        family = self.family
        if asking is not None:
            return self._with_filler(family.join(layer, context, rows[asking]))
        stay = self._staying(number, record)
        if stay is not None and record.merge is None and not self._keeps(number):
            return self._with_filler(family.join(layer, context.index_select(0, stay), rows.index_select(0, stay)))
        return self.remove(number, record, family.join(layer, context, rows))

    def remove(self, number: int, record: LayerRecord, joined: Tensor) -> Tensor:
        """The rows that stay, ``[rows, dim]``, of those after the attention block."""
        stay = self._staying(number, record)
        if stay is None:
            return joined
        if self._keeps(number) and record.dropped_rows is not None:
            self.beside[number] = joined.index_select(0, record.dropped_rows)
            places = record.entering.indices.index_select(0, record.dropped_rows)
            self.departed[number] = (places, self.beside[number])
        if record.merge is not None:
            joined = record.merge.apply(joined)
        return self._with_filler(joined.index_select(0, stay))

    def _staying(self, number: int, record: LayerRecord) -> Tensor | None:
        return record.entering.first_rows if self.decisions.first_only(number) else record.kept_rows

    def settle(self, number: int, record: LayerRecord, after: Tensor, joined: Tensor, rows: Tensor) -> Tensor:
        """What enters the next layer, from what the feed-forward gives; in the soft stage times the soft mask."""
        if record.soft_mask is None:
            return after
        self.beside[number] = record.soft_mask
        if self.decisions.first_only(number):  # first tokens are never masked
            return after
        factor = pad(record.soft_mask, (0, after.shape[0] - record.entering.total), value=1.0)
        return after * factor[:, None].to(after.dtype)

    def leave(self, rows: Tensor) -> LastStates:
        """The last states, from the rows that the last layer gives."""
        family, record = self.family, self.decisions.record
        valid, last = record.valid, record.layers[len(record.layers)]
        if record.first_only:
            return LastStates(valid.per_sequence(family.finish(rows[: valid.first_rows.numel()])), self.left_at())
        own = family.finish(rows[last.token_rows])
        places = [last.leaving.indices[last.token_rows], *(places for places, _ in self.departed.values())]
        parts = [own, *(self._unread(states) for _, states in self.departed.values())]
        flat = rows.new_zeros(valid.batch_size * valid.width, rows.shape[1])
        states = flat.index_copy(0, torch.cat(places), torch.cat(parts)) if valid.total else flat
        return LastStates(states.index_select(0, valid.indices), self.left_at())

    def _unread(self, states: Tensor) -> Tensor:
        """States of tokens that left, as their maps were fitted to them, or as they count by themselves."""
        return states if self.decisions.record.pruner.departed == "map" else self.family.finish(states)

    def left_at(self) -> Tensor | None:
        """See :class:`LastStates`."""
        record = self.decisions.record
        if not needs_left_at(record.pruner, self.reads):
            return None
        valid = record.valid
        found = valid.indices.new_full((valid.batch_size * valid.width,), len(record.layers) + 1)
        if self.decisions.never_entered_rows is not None:
            found[valid.indices[self.decisions.never_entered_rows]] = 0
        for number, each in record.layers.items():
            if each.dropped_rows is not None:
                found[each.entering.indices[each.dropped_rows]] = number
        return found[valid.indices]

    @computed_once
    def _position_grid(self) -> Tensor:
        """Position ids by place, ``[batch · width]``."""
        return self.tokens.layout.grid(self.tokens.positions).flatten()

    @staticmethod
    def _with_filler(rows: Tensor) -> Tensor:
        """Rows with zeros appended up to a bucketed count, where half-precision CPU products would need that."""
        count = rows.shape[0]
        if rows.device.type == "cpu" and (rows.dtype != torch.float32 or torch.is_autocast_enabled("cpu")):
            count = row_bucket(count)
        count = max(1, count)  # nothing but padding: modules cannot reshape a batch of no rows
        return rows if count == rows.shape[0] else pad(rows, (0, 0, 0, count - rows.shape[0]))

    def _checkpointed(self, number: int, layer: Any, rows: Tensor) -> Tensor:
        """The step, under gradient checkpointing where the model is set to it."""
        if not (getattr(layer, "gradient_checkpointing", False) and layer.training):
            return self.step(number, layer, rows)
        with_grad = torch.is_grad_enabled()

        def step(rows: Tensor) -> tuple[Tensor, Tensor | None]:
            if with_grad and not torch.is_grad_enabled() and not self.reentrant:
                raise ConfigError(
                    "the masked reference, summary tokens and context cannot train through re-entrant gradient "
                    'checkpointing; use activation_checkpointing_kwargs={"use_reentrant": False}'
                )
            return self.step(number, layer, rows), self.beside.pop(number, None)

        after: Tensor
        after, beside = layer._gradient_checkpointing_func(step, rows)
        # What a layer leaves beside its rows has to come out of the checkpoint too, or no gradient would reach it.
        record = self.decisions.record.layers[number]
        if record.soft_mask is not None:
            record.soft_mask = beside
        elif beside is not None:
            self.departed[number] = (self.departed[number][0], beside)
        return after

    @property
    def reentrant(self) -> bool:
        """Whether re-entrant checkpointing, which cuts the graph between layers, loses nothing but the rows' part."""
        return self.decisions.record.pruner.summary_tokens == "none" and self.context.setting is None


class PaddedLoop(PackedLoop):
    """The reference: rows are all places of the padded batch, ``[batch · width, dim]``, in every layer."""

    def __init__(self, family: Family, token_pruner: TokenPruner, tokens: PackedTokens, *, reads: Reads) -> None:
        """See :class:`PackedLoop`; ``probabilities`` and ``hidden_states`` have one tensor per layer."""
        super().__init__(family, token_pruner, tokens, reads=reads)
        self.probabilities: list[Tensor] = []
        self.hidden_states: list[Tensor] = []

    def enter(self) -> Tensor:
        """Zeros where there is padding."""
        layout = self.tokens.layout
        embedded = self.family.embed(self.tokens)
        rows = embedded.new_zeros(layout.batch_size * layout.width, embedded.shape[1])
        rows = rows.index_copy(0, layout.indices, embedded)
        gone = self.decisions.never_entered_rows
        if gone is not None:
            places = layout.indices[gone]
            self.departed[0] = (places, rows[places])
        return self._shown(rows)

    def states(self, number: int, rows: Tensor) -> Tensor:
        """See :class:`PackedLoop`."""
        return rows[self.decisions.entering(number).indices]

    def positions(self, number: int, rows: Tensor) -> Tensor:
        """Of every place; 0 for padding."""
        return self._position_grid

    @property
    def reentrant(self) -> bool:
        """No gradient would reach the hidden states."""
        return False

    def asking(self, number: int) -> Tensor | None:
        """All."""
        return None

    def attend(
        self,
        number: int,
        layer: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        asking: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """One softmax over the whole batch, with all that is gone masked out."""
        family, entering = self.family, self.decisions.entering(number)
        alive = self._at(entering).view(entering.batch_size, entering.width)
        others = self.others(number, layer, key)
        paid = self._paid(number)
        if others is not None:
            paid = alive.float() if paid is None else paid
            alive = alive.flatten().index_fill(0, others.places, True).view(alive.shape)
            key, value = (
                x.index_copy(0, others.places, more) for x, more in ((key, others.key), (value, others.value))
            )
        q, k, v = (self._padded(x).transpose(1, 2) for x in (query, key, value))
        columns = torch.arange(entering.width, device=alive.device)
        context, probabilities, received = masked_attention(
            q, k, v, alive, family.scale(layer), family.dropout(layer) if layer.training else 0.0,
            paid=paid, terms=self.terms(number, layer), positions=columns.expand(alive.shape),
        )  # fmt: skip
        self.probabilities.append(probabilities)
        by_attention = self.decisions.prunes(number) and not self.decisions.probes(number)
        wanted = received.flatten()[entering.indices] if by_attention else None
        return context.transpose(1, 2).flatten(0, 1), wanted

    def join(
        self,
        number: int,
        layer: nn.Module,
        record: LayerRecord,
        context: Tensor,
        rows: Tensor,
        asking: Tensor | None,
    ) -> Tensor:
        """Everything."""
        return self.remove(number, record, self.family.join(layer, context, rows))

    def remove(self, number: int, record: LayerRecord, joined: Tensor) -> Tensor:
        """Nothing is; a merge puts summaries into the places of some of the tokens dropped."""
        if record.dropped_rows is None or (record.merge is None and not self.context.takes(number)):
            return joined
        places = record.entering.indices
        gone = places[record.dropped_rows]
        self.departed[number] = (gone, joined[gone])
        return joined if record.merge is None else joined.index_copy(0, places, record.merge.apply(joined[places]))

    def settle(self, number: int, record: LayerRecord, after: Tensor, joined: Tensor, rows: Tensor) -> Tensor:
        """Tokens that are gone keep their last state."""
        if record.soft_mask is not None:
            self.beside[number] = record.soft_mask
            factor = torch.ones(after.shape[0], dtype=torch.float32, device=after.device)
            factor = factor.index_copy(0, record.entering.indices, record.soft_mask)
            after = after * factor[:, None].to(after.dtype)
        else:
            entered, stays = (self._at(layout)[:, None] for layout in (record.entering, record.leaving))
            after = torch.where(stays, after, torch.where(entered, joined, rows))
        return self._shown(after)

    def leave(self, rows: Tensor) -> LastStates:
        """The valid tokens' rows; some have carried summaries, whose tokens' own states come back."""
        record, left_at = self.decisions.record, self.left_at()
        self.hidden_states[-1] = self.family.finish(self.hidden_states[-1])  # as transformers' own are
        for places, states in self.departed.values():
            rows = rows.index_copy(0, places, states)
        valid = record.valid
        raw = rows.index_select(0, valid.indices)
        states = self.family.finish(raw)
        if record.first_only:
            return LastStates(valid.per_sequence(states[valid.first_rows]), left_at)
        if left_at is not None and record.pruner.departed == "map":
            states = torch.where((left_at > len(record.layers))[:, None], states, raw)
        return LastStates(states, left_at)

    def _paid(self, number: int) -> Tensor | None:
        paid, entering = self.decisions.paid(number), self.decisions.entering(number)
        return None if paid is None else entering.grid(paid)

    def _shown(self, rows: Tensor) -> Tensor:
        """The rows by way of what is returned as hidden states, so that gradients reach these."""
        self.hidden_states.append(self._padded(rows))
        return self.hidden_states[-1].flatten(0, 1)

    def _padded(self, rows: Tensor) -> Tensor:
        """``[batch · width, …]`` as ``[batch, width, …]``."""
        layout = self.tokens.layout
        return rows.view(layout.batch_size, layout.width, *rows.shape[1:])

    def _at(self, layout: Layout) -> Tensor:
        """``[batch · width]`` bool, True at the layout's places."""
        places = torch.zeros(layout.batch_size * layout.width, dtype=torch.bool, device=layout.indices.device)
        return places.index_fill(0, layout.indices, True)
