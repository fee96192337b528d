"""Learning a teacher's hidden states: those of the tokens that stay, after every layer."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from token_pruning.pruners import Unpruned
from token_pruning.runtime.loop import PackedLoop
from token_pruning.runtime.prune import attachment_of, prune


class StatesLoss:
    """How far the states of the tokens that stay are from the teacher's.

    The mean over layers of the squared difference, relative to the variance of the teacher's states: what TinyBERT
    learns (Jiao et al. 2020, arXiv 1909.10351, section 3.1), without a projection. A last layer that computes first
    tokens only is left out: what these say is in the logits.
    """

    def __init__(self, teacher: Any, weight: float) -> None:
        """Prune the teacher by a method that drops nothing, in place: that leaves padding out.

        Args:
            teacher: dense, with the student's layers, width and tokenizer, on its device.
            weight: of this in the loss.
        """
        self.teacher, self.weight = prune(teacher, Unpruned()).eval(), weight

    @contextmanager
    def watching(self, student: Any) -> Iterator[list["Watched"]]:
        """Inside, every forward pass adds what its layers give."""
        passes: list[Watched] = []
        with attachment_of(student).looping(partial(Watched, passes=passes)):
            yield passes

    def of(self, seen: "Watched", inputs: Mapping[str, Any]) -> Tensor:
        """The weighted loss of one forward pass, a scalar in float32; 0 where no token is left to compare.

        Args:
            seen: the student's pass.
            inputs: what it was called with, without labels.
        """
        with self.watching(self.teacher) as passes, torch.no_grad():
            self.teacher(**inputs)
        [teacher] = passes
        layout = seen.tokens.layout
        rows = layout.indices.new_zeros(layout.batch_size * layout.width)
        rows[layout.indices] = torch.arange(layout.total, device=rows.device)
        distances = []
        for number, (places, states) in seen.states_after.items():
            wanted = teacher.states_after[number][1][rows[places]].float()
            if wanted.numel():
                distances.append((states.float() - wanted).square().mean() / wanted.var())
        return self.weight * torch.stack(distances).mean() if distances else rows.new_zeros((), dtype=torch.float32)


class Watched(PackedLoop):
    """Keeps what layers give: by layer, places in the padded batch ``[tokens]`` and states ``[tokens, dim]``."""

    def __init__(self, *args: Any, passes: "list[Watched]", **kwargs: Any) -> None:
        """See :class:`PackedLoop`; a pass adds itself to ``passes``."""
        super().__init__(*args, **kwargs)
        self.states_after: dict[int, tuple[Tensor, Tensor]] = {}
        passes.append(self)

    def _checkpointed(self, number: int, layer: Any, rows: Tensor) -> Tensor:
        after = super()._checkpointed(number, layer, rows)
        if not self.decisions.first_only(number):
            record = self.decisions.record.layers[number]
            kept = record.token_rows
            self.states_after[number] = (record.leaving.indices[kept], after[kept])
        return after
