"""Which tokens of a text that is longer than ``max_tokens`` enter the model: spans of it, or all of it in windows."""

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from token_pruning.pruners import Pruner
from token_pruning.ragged import Layout, PackedTokens
from token_pruning.runtime.roles import first_segment

_SPAN = 8  # tokens; evenly spaced spans of so many kept most of what long texts are found by
_ASKED = 0.75  # of a pair's spans, those chosen by what the first text asks for


@dataclass(frozen=True)
class Selection:
    """What enters in place of the valid tokens.

    Attributes:
        tokens: what enters, with a layout of its own; a text in windows is several sequences.
        rows: ``[tokens.layout.total]`` int64: the row that each has among the valid tokens.
        cu_texts: ``[batch + 1]`` int64: where each text's rows begin and end.
        in_windows: ``[tokens.layout.total]`` bool: whether its text was cut into windows.
    """

    tokens: PackedTokens
    rows: Tensor
    cu_texts: Tensor
    in_windows: Tensor


def select(tokens: PackedTokens, pruner: Pruner) -> Selection | None:
    """Choose from texts that are longer than the method's ``max_tokens``.

    Their tokens are numbered anew, as if nothing had stood between them.

    Args:
        tokens: the valid tokens.
        pruner: the method.

    Returns:
        What enters; None where no text is longer.
    """
    most, layout = pruner.max_tokens, tokens.layout
    if most is None or max(layout.lengths, default=0) <= most:
        return None
    device = layout.indices.device
    prefixes = [1] * layout.batch_size
    if tokens.ids is not None and not pruner.chunks:
        prefixes = [length or 1 for length in _first_lengths(tokens.ids, layout)]
    sequences: list[Tensor] = []
    lengths: list[int] = []
    windowed: list[Tensor] = []
    start = 0
    for length, prefix in zip(layout.lengths, prefixes, strict=True):
        if length <= most:
            found = [torch.arange(length)]
        elif pruner.chunks:
            found = _windows(length, most)
        elif tokens.ids is not None and most - prefix - 1 >= _SPAN and prefix > 1:
            found = [_asked_spans(tokens.ids[start : start + length].cpu(), most, prefix)]
        else:  # a first text that fills the window by itself is cut like the rest
            found = [_spans(length, most)]
        sequences += [start + part for part in found]
        lengths.append(sum(map(len, found)))
        windowed.append(torch.full((lengths[-1],), len(found) > 1))
        start += length
    rows = torch.cat(sequences).to(device)
    each = torch.tensor([len(part) for part in sequences])
    width = int(each.max())
    ranks = torch.cat([torch.arange(int(size)) for size in each])
    places = torch.arange(len(each)).repeat_interleave(each) * width + ranks
    chosen = Layout(places.to(device), pad(each.cumsum(0), (1, 0)).to(device, torch.int32), width)
    own = tokens.positions[rows]
    anew = tokens.positions[layout.cu_seqlens.long()[layout.sequence_ids[rows]]] + ranks.to(device, own.dtype)
    positions = torch.where((layout.lengths_tensor > most)[layout.sequence_ids[rows]], anew, own)
    cu_texts = pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(device)
    return Selection(
        replace(tokens.of(rows, chosen), positions=positions), rows, cu_texts, torch.cat(windowed).to(device)
    )


def _first_lengths(ids: Tensor, layout: Layout) -> list[int]:
    """Tokens of each pair's first text, with the first token and the separator; 0 for a single text."""
    inside = pad(first_segment(ids, layout).cumsum(0), (1, 0))[layout.cu_seqlens.long()].diff()
    return [0 if first == length else first for first, length in zip(inside.tolist(), layout.lengths, strict=True)]


def _spans(length: int, most: int) -> Tensor:
    """Rows of a text: its first token, evenly spaced spans of the rest, and its last token."""
    spans = (most - 2) // _SPAN
    starts = [1 + span * (length - 2 - _SPAN) // max(1, spans - 1) for span in range(spans)]
    body = [torch.arange(start, start + _SPAN) for start in starts]
    return torch.cat([torch.tensor([0]), *body, torch.tensor([length - 1])])


def _asked_spans(ids: Tensor, most: int, prefix: int) -> Tensor:
    """Rows of a pair: its first text whole, spans of the second, and its last token.

    Most are those that have, or stand beside, what the first text has: a token counts less the more often the second
    has it. The others are evenly spaced, for what is asked in other words.
    """
    asked, body = ids[1 : prefix - 1], ids[prefix:-1]
    values, places, times = body.unique(return_inverse=True, return_counts=True)  # type: ignore[no-untyped-call]
    worth = (torch.isin(values, asked) / times)[places]
    own = pad(worth, (0, -len(body) % _SPAN)).view(-1, _SPAN).sum(1)
    near = own + (pad(own, (1, 0))[:-1] + pad(own, (0, 1))[1:]) / 2
    wanted = (most - prefix - 1) // _SPAN
    found = near.argsort(descending=True, stable=True)[: min(int(_ASKED * wanted), int((near > 0).sum()))]
    left = torch.ones_like(near, dtype=torch.bool).index_fill(0, found, False).nonzero().squeeze(-1)
    even = wanted - len(found)
    others = left[torch.arange(even) * (len(left) - 1) // max(1, even - 1)]
    spans = torch.cat([found, others]).sort().values
    rows = (prefix + spans[:, None] * _SPAN + torch.arange(_SPAN)).flatten()
    return torch.cat([torch.arange(prefix), rows[rows < len(ids) - 1], torch.tensor([len(ids) - 1])])


def _windows(length: int, most: int) -> list[Tensor]:
    """Rows of a text in windows of equal size, each with the text's first and last token around it."""
    inner = length - 2
    count = -(-inner // (most - 2))
    ends = [1 + inner * part // count for part in range(count + 1)]
    first, last = torch.tensor([0]), torch.tensor([length - 1])
    return [torch.cat([first, torch.arange(a, b), last]) for a, b in pairwise(ends)]
