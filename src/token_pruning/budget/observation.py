"""What a dense model says about its tokens: what probes, maps and vocabulary tables are fitted to.

Two things can be worth predicting of a token. ``"attention"``: what it receives in the upper half of the layers.
``"influence"``: how far the output moves when it takes a little less part, by gradients of random projections; no
labels. Which of them tells better who may leave differs from model to model.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from token_pruning.budget.examples import Batch, model_inputs, part_of
from token_pruning.budget.ridge import Ridge
from token_pruning.pruners import LinearContext
from token_pruning.ragged import LogitTerms
from token_pruning.runtime.departed import LastStates
from token_pruning.runtime.loop import PackedLoop, PaddedLoop
from token_pruning.runtime.prune import attachment_of, reads_of, record
from token_pruning.runtime.trace import LayerRecord

Target = Literal["attention", "influence"]

_PENALTY = 1e-3
_PROJECTIONS = 4
_INFLUENCE_GRADIENTS = 48_000  # of tokens; together they cost as much as some ten passes over a fourth of them
_BATCH_TOKENS = 4096
_EMBEDDING_PENALTY = 0.3  # entries are few for so many weights
_PRIOR_TOKENS = 5.0  # as many tokens of each vocabulary entry are taken to be what its embedding says
_MOST_RECEIVED = 6.0  # times the mean: separators that take nearly all attention say nothing about the others


@dataclass(frozen=True)
class Observed:
    """What was fitted.

    Attributes:
        tables: for each target, ``[vocabulary]`` float32 above 0: what an entry's tokens are worth.
        probes: for each target and layer (1-based), ``[hidden + 1]``: the target's logarithm from a token's state.
        maps: for each layer, 0 for the entry, ``[hidden, hidden + 1]``: the last state from the one there.
        context: of tokens that leave before the first layer or after one of these; None for a model that has none.
    """

    tables: dict[Target, Tensor]
    probes: dict[tuple[Target, int], Tensor]
    maps: dict[int, Tensor]
    context: LinearContext | None = None


def observe(model: Any, batch: Batch, layers: Sequence[int], targets: Sequence[Target], *, seed: int) -> Observed:
    """Run a dense model over examples, and fit what predicts its tokens' worth and last states.

    Args:
        model: pruned by thresholds of zero (:func:`token_pruning.runtime.prune.prunable`), in evaluation mode.
        batch: padded tensors.
        layers: those (1-based) that get a probe and a map.
        targets: those that are predicted; maps need attention's pass.
        seed: of the random projections.
    """
    attachment = attachment_of(model)
    size = attachment.base.get_input_embeddings().num_embeddings
    tables: dict[Target, Tensor] = {}
    probes: dict[tuple[Target, int], Tensor] = {}
    maps: dict[int, Ridge] = {}
    if reads_of(model) != "first":
        maps = {layer: Ridge() for layer in (0, *layers)}
    for target in targets:
        table, found = _Table(size), {layer: Ridge() for layer in layers}
        seen = _attention(model, batch, maps) if target == "attention" else _influence(model, batch, seed)
        for each in seen:
            worth = each.worth(0).log()
            table.add(each.ids, worth)
            for layer, ridge in found.items():
                ridge.add(each.joined[layer], each.worth(layer).log()[:, None])
        embeddings = attachment.base.get_input_embeddings().weight.detach().float().cpu()
        tables[target] = table.scores(embeddings)
        probes |= {(target, layer): ridge.solve(_PENALTY)[0] for layer, ridge in found.items()}
    return Observed(tables, probes, {layer: ridge.solve(_PENALTY) for layer, ridge in maps.items()})


@dataclass(frozen=True)
class _Seen:
    """Tokens of one batch: ids, states after each layer's attention block, and what each is worth from a layer on."""

    ids: Tensor
    joined: dict[int, Tensor]
    worths: dict[int, Tensor]

    def worth(self, layer: int) -> Tensor:
        """``[tokens]`` float32 above 0: what taking part after a layer is worth."""
        return self.worths[min(layer, max(self.worths))]


class _Table:
    """Means of a token's worth by vocabulary entry; of entries that are seen little, what their embedding says."""

    def __init__(self, size: int) -> None:
        self.sums, self.counts = (torch.zeros(size, dtype=torch.float64, device="cpu") for _ in range(2))

    def add(self, ids: Tensor, values: Tensor) -> None:
        self.sums = self.sums.index_add(0, ids.cpu(), values.double().cpu())
        self.counts = self.counts + torch.bincount(ids.cpu(), minlength=len(self.counts))

    def scores(self, embeddings: Tensor) -> Tensor:
        """``[vocabulary]`` float32, logarithms turned back into numbers above 0."""
        seen = self.counts > 0
        means = self.sums[seen] / self.counts[seen]
        ridge = Ridge()
        # An entry counts by how often it was seen, up to where its mean is known well.
        for times in (1, 3, 10):
            often = self.counts[seen] >= times
            ridge.add(embeddings[seen][often], means[often].float()[:, None])
        weights = ridge.solve(_EMBEDDING_PENALTY)[0].double()
        low, high = means.min(), means.max()
        prior = (embeddings.double() @ weights[:-1] + weights[-1]).clamp(low, high)
        return ((self.sums + _PRIOR_TOKENS * prior) / (self.counts + _PRIOR_TOKENS)).exp().float()


class Watching(PackedLoop):
    """Keeps the states after each attention block, and the last ones."""

    def __init__(self, *args: Any, seen: "list[Any]", **kwargs: Any) -> None:
        """Keep itself in a list when it has run."""
        super().__init__(*args, **kwargs)
        self.seen = seen
        self.joined: dict[int, Tensor] = {}

    def run(self) -> LastStates:
        """See :class:`PackedLoop`."""
        last = super().run()
        self.last = last.states
        self.seen.append(self)
        return last

    def enter(self) -> Tensor:
        """See :class:`PackedLoop`."""
        rows = super().enter()
        self.joined[0] = rows[: self.tokens.layout.total]
        return rows

    def join(self, number: int, layer: nn.Module, record: LayerRecord, *args: Any) -> Tensor:
        """See :class:`PackedLoop`."""
        joined = super().join(number, layer, record, *args)
        self.joined[number] = joined[: record.entering.total]
        return joined


WatchingT = TypeVar("WatchingT", bound=Watching)


def watched(
    model: Any, batch: Batch, tokens: int, loop: type[WatchingT], *, scored: bool = False
) -> Iterator[WatchingT]:
    """Passes of a dense model over examples, so many tokens at a time.

    Args:
        model: pruned by thresholds of zero.
        batch: padded tensors.
        tokens: of a pass.
        loop: what watches.
        scored: whether tokens' importance is computed, and recorded.
    """
    loops: list[WatchingT] = []
    with attachment_of(model).looping(partial(loop, seen=loops)), torch.inference_mode():
        for inputs in _batches(model, batch, tokens):
            with record(model) if scored else nullcontext():
                model(**inputs)
            yield loops.pop()


def _attention(model: Any, batch: Batch, maps: dict[int, Ridge]) -> Iterator[_Seen]:
    """Attention received in the upper half of the layers; maps are fitted on the way."""
    for loop in watched(model, batch, _BATCH_TOKENS, Watching, scored=True):
        layers = loop.decisions.record.layers
        scores = [layers[layer].scores for layer in range(len(layers) // 2 + 1, len(layers) + 1)]
        received = torch.stack([score for score in scores if score is not None]).mean(0)
        assert loop.tokens.ids is not None
        for layer, ridge in maps.items():
            ridge.add(loop.joined[layer], loop.last)
        # log(1 + received) is what is averaged and predicted.
        yield _Seen(loop.tokens.ids, loop.joined, {0: received.clamp(max=_MOST_RECEIVED).log1p().exp()})


class _TakingPart(PaddedLoop):
    """Tokens take part in attention by a factor, 1, whose gradient tells what they are worth."""

    def __init__(self, *args: Any, seen: "list[_TakingPart]", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.joined: dict[int, Tensor] = {}
        layout = self.tokens.layout
        ones = torch.ones(layout.batch_size * layout.width, device=layout.indices.device)
        count = len(self.family.layers) + 1  # the last: in the mean
        self.factors = [ones.clone().requires_grad_() for _ in range(count)]
        seen.append(self)

    def run(self) -> LastStates:
        last = super().run()
        self.last = last.states
        return last

    def terms(self, number: int, layer: nn.Module) -> LogitTerms:
        own, layout = super().terms(number, layer), self.tokens.layout
        factor = self.factors[number - 1].view(layout.batch_size, 1, 1, layout.width).log()
        bias = own.bias

        def less(query: Tensor, key: Tensor, query_positions: Tensor, key_positions: Tensor) -> Tensor:
            added = factor if bias is None else bias(query, key, query_positions, key_positions) + factor
            return added.expand(-1, -1, query.shape[-2], -1)

        return LogitTerms(bias=less, window=own.window)

    def join(self, number: int, layer: nn.Module, record: LayerRecord, *args: Any) -> Tensor:
        joined = super().join(number, layer, record, *args)
        self.joined[number] = joined[record.entering.indices].detach()
        return joined


def _influence(model: Any, batch: Batch, seed: int) -> Iterator[_Seen]:
    """How far the output moves when a token takes a little less part after a layer."""
    attachment = attachment_of(model)
    loops: list[_TakingPart] = []
    generator = torch.Generator("cpu").manual_seed(seed)
    budget = _INFLUENCE_GRADIENTS
    looping = attachment.looping(partial(_TakingPart, seen=loops))
    with looping, torch.inference_mode(False), torch.enable_grad(), _usable_by_autograd(attachment.model):
        batches = list(_batches(model, batch, _BATCH_TOKENS // 2))
        for number in torch.randperm(len(batches), generator=generator).tolist():  # short texts and long ones
            if budget <= 0:
                return
            inputs = batches[number]
            output = model(**inputs)
            [loop] = loops
            loops.clear()
            layout = loop.tokens.layout
            vectors = _read(output, loop, attachment.reads)
            squares = [torch.zeros_like(factor) for factor in loop.factors]
            directions = _directions(vectors, generator)
            budget -= len(directions) * int(inputs["attention_mask"].sum())
            for direction in directions:
                gradients = torch.autograd.grad(
                    (vectors * direction).sum(), loop.factors, retain_graph=True, materialize_grads=True
                )
                later = torch.stack(gradients).flip(0).cumsum(0).flip(0)  # from a layer on
                for total, gradient in zip(squares, later, strict=True):
                    total += gradient.square()
            worths = {}
            for number, total in enumerate(squares[:-1]):
                moved = total.sqrt()[layout.indices] * layout.lengths_tensor[layout.sequence_ids]
                worths[number] = moved / moved.mean().clamp(min=1e-12) + 1e-3
            assert loop.tokens.ids is not None
            yield _Seen(loop.tokens.ids, loop.joined, worths)


def _directions(vectors: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Each number of the output in turn where these are few, else random projections; as ``vectors`` each."""
    texts, size = vectors.shape
    if size <= _PROJECTIONS:
        return [unit.expand(texts, size) for unit in torch.eye(size).to(vectors)]
    return [torch.randn(texts, size, generator=generator).to(vectors) for _ in range(_PROJECTIONS)]


@contextmanager
def _usable_by_autograd(model: nn.Module) -> Iterator[None]:
    """Inside, copies stand in for parameters and buffers that were made in inference mode."""
    made_so: list[tuple[Any, str, Tensor]] = [
        (tensors, name, tensor)
        for module in model.modules()
        for tensors in (module._parameters, module._buffers)
        for name, tensor in tensors.items()
        if tensor is not None and tensor.is_inference()
    ]
    for tensors, name, tensor in made_so:
        copy = tensor.detach().clone()
        tensors[name] = nn.Parameter(copy, requires_grad=False) if isinstance(tensor, nn.Parameter) else copy
    try:
        yield
    finally:
        for tensors, name, tensor in made_so:
            tensors[name] = tensor


def _read(output: Any, loop: _TakingPart, reads: str) -> Tensor:
    """What is read of the output: ``[batch, …]`` logits, or vectors of length 1, that every token has a part in."""
    layout = loop.tokens.layout
    if "logits" in output:
        logits: Tensor = output.logits
        return logits.float().flatten(1)
    if "start_logits" in output:
        return torch.stack([output.start_logits, output.end_logits], -1).float().flatten(1)
    states = loop.last.float()  # of the tokens that entered, or of the windows of a long text
    if reads == "first":
        return nn.functional.normalize(states, dim=1)
    weights = loop.factors[-1][layout.indices, None]
    sums = torch.zeros(layout.batch_size, states.shape[1] + 1, device=states.device)
    sums = sums.index_add(0, layout.sequence_ids, torch.cat([states * weights, weights], dim=1))
    return nn.functional.normalize(sums[:, :-1] / sums[:, -1:].clamp(min=1e-9), dim=1)


def _batches(model: Any, batch: Batch, tokens: int) -> Iterator[dict[str, Tensor]]:
    """Examples by length, so many tokens at a time, on the model's device."""
    device = attachment_of(model).model.device
    lengths = batch["attention_mask"].sum(1)
    order = lengths.argsort(stable=True).tolist()
    start = 0
    while start < len(order):
        end, longest = start, 0
        while end < len(order):
            longest = max(longest, int(lengths[order[end]]))
            if end > start and longest * (end + 1 - start) > tokens:
                break
            end += 1
        yield model_inputs(part_of(batch, order[start:end]), device)
        start = end
