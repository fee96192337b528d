"""Models of other libraries that hold a Hugging Face model: what this package has to know of each such library.

An integration registers the library's name, and is imported once a model of that library is given, or a folder that
the library wrote: nothing here imports it.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from token_pruning.errors import UnsupportedModelError
from token_pruning.families import Reads
from token_pruning.pruners import Pruner


class Adapter(Protocol):
    """What an integration says of a library's models; ``model`` is always one of these."""

    def inner(self, model: Any) -> Any:
        """The Hugging Face model inside, which may be a PEFT model.

        Raises:
            UnsupportedModelError: if there is none that can be pruned.
        """

    def reads(self, model: Any) -> Reads | None:
        """Which last hidden states are used; None for those that the head of the inner model reads.

        Raises:
            UnsupportedModelError: if tokens cannot leave before what is made of their states.
        """

    def tokenized(self, model: Any, texts: Sequence[Any], *, whole: bool) -> list[dict[str, Any]]:
        """Texts, or pairs of texts, as the model tokenises them: ``input_ids`` and what else, each a list.

        Args:
            model: the model; its default prompt is put before each text.
            texts: ``str`` each, or pairs of them.
            whole: without truncation.
        """

    def attach(self, model: Any, pruner: Pruner) -> None:
        """What the model needs besides a pruner on its inner model."""

    def detach(self, model: Any) -> None:
        """Undo :meth:`attach`."""

    def compiled(self, model: Any, engine: Any) -> Any:
        """A model of the same class that runs on an engine made of the inner model."""

    def engine(self, model: Any) -> Any:
        """The engine of a compiled model; None for one that is not compiled."""

    def load(self, folder: Path, pruner: Pruner | None, **options: Any) -> Any:
        """A pruned model from a folder that the library wrote; arguments and errors as ``from_pretrained``."""

    def load_dense(self, folder: Path, **options: Any) -> Any:
        """The same model without pruning, whether the folder names a method or not."""

    def names_method(self, folder: Path) -> bool:
        """Whether a folder that the library wrote says how its model is pruned."""

    def takes_pairs(self, model: Any) -> bool:
        """Whether an input is a pair of texts, not one."""

    def check_distilling(self, model: Any) -> None:
        """Raises UnsupportedModelError for a model whose outputs cannot be learned from another model's."""

    def outputs(self, model: Any, texts: Sequence[Any]) -> Tensor:
        """What a model gives for texts, or pairs: vectors ``[texts, dim]`` or scores ``[pairs, 1]``, float32."""

    def distilling(
        self,
        model: Any,
        texts: Sequence[Any],
        teacher: Any,
        *,
        batch_size: int,
        arguments: dict[str, Any],
        callbacks: list[Any],
        kind: type | None,
        shows: bool,
    ) -> Any:
        """The library's trainer, set up to bring the model's outputs near to another model's.

        Args:
            model: to be trained.
            texts: ``str`` each, or pairs of them.
            teacher: a dense model of the same class, whose outputs are computed once.
            batch_size: texts or pairs per step.
            arguments: the trainer's other arguments, as transformers calls them.
            callbacks: the trainer's.
            kind: a class to put before the trainer's own; None for none.
            shows: whether there are progress bars.
        """


@dataclass(frozen=True)
class _Integration:
    """Where an adapter is, under the name ``ADAPTER``, and the file that only this library puts into its folders."""

    module: str
    package: str
    extra: str
    mark: str

    def adapter(self) -> Adapter:
        try:
            found: Adapter = importlib.import_module(self.module).ADAPTER
        except ImportError as error:
            raise UnsupportedModelError(
                f"models of {self.package} need it installed, in a version that is known here: pip install "
                f"token-pruning[{self.extra}] ({error})"
            ) from error
        return found


_INTEGRATIONS: dict[str, _Integration] = {}


def register_adapter(library: str, *, module: str, package: str, extra: str, mark: str) -> None:
    """Make a library's models known.

    Args:
        library: the name it is imported by.
        module: the integration's module, with an :class:`Adapter` named ``ADAPTER``; imported on use only.
        package: the name the library is installed by.
        extra: this package's extra that installs it.
        mark: the file by which a folder that the library wrote is known.
    """
    _INTEGRATIONS[library] = _Integration(module, package, extra, mark)


def adapter_of(model: Any) -> Adapter | None:
    """The adapter for a model, None for one of no registered library.

    Raises:
        UnsupportedModelError: if the library is there in a version that the integration does not know.
    """
    for cls in type(model).__mro__:
        if found := _INTEGRATIONS.get(cls.__module__.partition(".")[0]):
            return found.adapter()
    return None


def adapter_for(folder: Path) -> Adapter | None:
    """The adapter for a folder, None for one that no registered library wrote.

    Raises:
        UnsupportedModelError: if the library is not installed.
    """
    for found in _INTEGRATIONS.values():
        if (folder / found.mark).is_file():
            return found.adapter()
    return None
