"""What ``prune`` puts on a model: the forward of its base, and of a head that reads first tokens only.

Both are plain objects in place of the modules' ``forward``, so that copies and pickles of the model carry them along.
"""

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from token_pruning.errors import ConfigError, UnsupportedModelError
from token_pruning.families import Family, Reads, family_of
from token_pruning.families.intact import check_depth, hooks_of, refuse, refuse_foreign, replaced_modules
from token_pruning.pruners import Pruner, method_keys
from token_pruning.ragged import PackedTokens
from token_pruning.runtime.departed import Departures
from token_pruning.runtime.inputs import check_arguments, input_tables, model_output, pack_inputs
from token_pruning.runtime.loop import PackedLoop, PaddedLoop
from token_pruning.runtime.selection import select
from token_pruning.runtime.spans import answers_with_spans, with_span_loss
from token_pruning.runtime.token_pruner import TokenPruner

Execution = Literal["packed", "masked"]

MODULE_NAME = "token_pruner"


class Attachment:
    """Pruning on one model. A deep copy of the model has one of its own."""

    def __init__(
        self,
        model: PreTrainedModel,
        pruner: Pruner,
        execution: Execution,
        reads: Reads | None,
    ) -> None:
        """Attach; nothing is changed if that fails."""
        base: Any = model.base_model
        family = family_of(base.config)
        self.family: Family = family(base)
        self.reads: Reads = family.reads(model) if reads is None else reads
        head_reads_first = model is not base and "first" in (self.reads, family.reads(model))
        refuse_foreign(self.family, base_is_called=not head_reads_first)
        self.replaced = list(replaced_modules(self.family, base_is_called=not head_reads_first))
        self.shape = family.shape(base.config)
        _check_text(pruner, model)
        _check_lengths(pruner, self.reads, self.shape.max_positions)
        if "forward" in model.__dict__ and (head_reads_first or answers_with_spans(model)):
            refuse("", model, "has a forward that another library has put in place of its own")
        self.packed = execution == "packed"
        self.loop: Callable[..., Any] = PackedLoop if self.packed else PaddedLoop
        token_pruner = TokenPruner(pruner, self.shape.num_layers, model.device)
        token_pruner.train(model.training)
        token_pruner.check_fit(self.shape, self.reads)
        _check_keys_can_be_guessed(pruner, self.family)
        token_pruner.attachment = self
        self.model, self.base = model, base
        self.original_config, self.config_before = model.config, copy.deepcopy(model.config)
        # Models built from one config object share it; what is written below must not reach the others.
        config = copy.deepcopy(model.config)
        _replace_config(model, model.config, config)
        write_keys(config, pruner)
        if reads is not None:
            config.reads = reads
        model.add_module(MODULE_NAME, token_pruner)
        self.forwards: list[_Forward] = [_BaseForward(self)]
        if head_reads_first:
            self.forwards.append(_HeadForward(self))
        elif answers_with_spans(model):
            self.forwards.append(_SpanForward(self))

    @property
    def token_pruner(self) -> TokenPruner:
        """The module on the model, or the one in PEFT's wrapper around it."""
        module: Any = self.model._modules[MODULE_NAME]
        current: TokenPruner = module.current
        return current

    def detach(self) -> None:
        """Undo everything, but not what others have changed in the config meanwhile: a resized vocabulary, labels."""
        for forward in self.forwards:
            forward.remove()
        own_keys = self.token_pruner.pruner.config().keys()
        delattr(self.model, MODULE_NAME)
        config, before = self.model.config, vars(self.config_before)
        for key in method_keys() | own_keys | {"reads"}:
            vars(config).pop(key, None)
            if key in before:
                vars(config)[key] = before[key]
        if vars(config) == before:
            _replace_config(self.model, config, self.original_config)

    def describe(self) -> None:
        """Write the method as it is now into the config."""
        write_keys(self.model.config, self.token_pruner.pruner)

    def exchange(self, token_pruner: TokenPruner) -> None:
        """Prune by another method from now on; the config is left as it is."""
        self.model._modules[MODULE_NAME] = token_pruner

    @contextmanager
    def looping(self, loop: Callable[..., Any]) -> Iterator[None]:
        """Inside, forward passes run another loop over the layers, made as :class:`PackedLoop` is."""
        before, self.loop = self.loop, loop
        try:
            yield
        finally:
            self.loop = before

    def check_call(self) -> None:
        """What has come upon the model since it was pruned, and what a forward pass that drops tokens cannot do.

        Raises:
            UnsupportedModelError: for hooks that would be skipped, another base model or number of layers, and for
                transforms of the model.
        """
        if self.model.base_model is not self.base:
            raise UnsupportedModelError(
                f"the {type(self.base).__name__} of this {type(self.model).__name__} is another than when it was "
                "pruned; call unprune(model) before it is replaced"
            )
        check_depth(self.family, self.shape.num_layers)
        for name, module in self.replaced:
            if why := hooks_of(module):
                refuse(name, module, why)
        transform = torch._C._functorch.peek_interpreter_stack()
        if transform is not None and (self.packed or transform.key() == torch._C._functorch.TransformType.Vmap):
            raise UnsupportedModelError(
                "torch.func cannot transform a pruned model, but for gradients in the slow reference: "
                'prune(model, pruner, execution="masked")'
            )

    def pack(self, **inputs: Any) -> PackedTokens:
        """See :func:`token_pruning.runtime.inputs.pack_inputs`."""
        max_tokens = self.token_pruner.pruner.max_tokens
        return pack_inputs(self.family, input_tables(self.base), max_tokens=max_tokens, **inputs)

    def reads_in(self, by_head: bool) -> Reads:
        """Which last hidden states a call uses: the base of a head that reads first tokens, called by itself, all.

        Args:
            by_head: see :meth:`run`.
        """
        return self.reads if self.reads != "first" or by_head or self.base is self.model else "all"

    def run(self, options: dict[str, Any], *, by_head: bool) -> Any:
        """The base model's forward.

        Args:
            options: the forward's arguments.
            by_head: whether a head that reads first tokens only has called it. The base of such a head may be called by
                itself for other tokens' states, too.

        Returns:
            The base model's output class.

        Raises:
            UnsupportedModelError: for tracing of the model, beside what the call is checked for.
        """
        if torch.compiler.is_exporting() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            raise UnsupportedModelError(
                "a pruned model cannot be traced or exported: which tokens leave depends on the input. "
                "Use token_pruning.export or token_pruning.compile, or export the dense model"
            )
        return self._run(options, by_head)

    @torch.compiler.disable(reason="which tokens leave depends on the input")  # type: ignore[untyped-decorator, no-untyped-call]
    def _run(self, options: dict[str, Any], by_head: bool) -> Any:
        """The forward; under torch.compile as it is, for every count of tokens would be another graph."""
        self.check_call()
        self.token_pruner.fit_vocabulary()
        check_arguments(self.family, options)
        reads = self.reads_in(by_head)
        tokens = self.pack(**self.family.inputs(options))
        selection = select(tokens, self.token_pruner.pruner)
        entering = tokens if selection is None else selection.tokens
        if selection is not None and reads == "all":
            raise ConfigError(
                f"a sequence has more than max_tokens, {self.token_pruner.pruner.max_tokens}, and all of its last "
                "states are asked for: there are none of tokens that did not enter"
            )
        wanted = {
            name: asked if (asked := options.get(name)) is not None else getattr(self.base.config, name, False)
            for name in ("output_attentions", "output_hidden_states")
        }
        return_dict = options.get("return_dict", getattr(self.base.config, "return_dict", True))
        for name in filter(wanted.get, wanted):
            if self.packed:
                raise UnsupportedModelError(
                    f"{name}=True is not possible in packed execution, where layers hold different tokens; "
                    'use prune(model, pruner, execution="masked")'
                )
            if selection is not None:
                raise UnsupportedModelError(
                    f"{name}=True is not possible for a sequence of more than max_tokens, "
                    f"{self.token_pruner.pruner.max_tokens}: layers hold other tokens than the input"
                )
        if not self.token_pruner.soft:  # thresholds may have been trained or set since, and what is read be more
            self.token_pruner.check_maps(reads)
        loop = self.loop(self.family, self.token_pruner, entering, reads=reads)
        states = Departures(self.token_pruner).states(loop.run(), entering.layout, reads, selection, tokens.layout)
        fields: dict[str, Any] = {}
        if isinstance(loop, PaddedLoop):
            if wanted["output_attentions"]:
                fields["attentions"] = tuple(loop.probabilities)
            if wanted["output_hidden_states"]:
                fields["hidden_states"] = _selected(loop.hidden_states, wanted["output_hidden_states"])
        return model_output(
            self.family, states, tokens.layout,
            first_only=reads == "first", for_first_token_head=by_head, return_dict=return_dict, **fields,
        )  # fmt: skip


def _selected(tensors: list[Tensor], asked: Any) -> tuple[Tensor | None, ...]:
    """All for True; for an index or several, as transformers takes them, None in the places of the others."""
    if isinstance(asked, bool):
        return tuple(tensors)
    indices = {asked} if isinstance(asked, int) else {*asked}
    count = len(tensors)
    return tuple(x if {i, i - count} & indices else None for i, x in enumerate(tensors))


class _Forward:
    """Stands in for a module's ``forward``, with its signature."""

    def __init__(self, attachment: Attachment, module: nn.Module) -> None:
        self.attachment, self.module = attachment, module
        module.forward = self

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self.module).forward.__get__(self.module))

    @property
    def __code__(self) -> Any:  # torch.export asks for it
        return inspect.unwrap(type(self.module).forward).__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], nn.Module):  # accelerate binds it as a method when it unwraps a model
            owner: Any = args[0]  # or a deep copy of it, which has a forward of its own
            owner.forward = next(f for f in getattr(owner, MODULE_NAME).attachment.forwards if f.module is owner)
            return owner.forward(*args[1:], **kwargs)
        return self.call(*args, **kwargs)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """The forward itself."""
        raise NotImplementedError

    def options(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments by name."""
        if not args:
            return kwargs
        given = self.__signature__.bind_partial(*args).arguments
        for name in given.keys() & kwargs.keys():
            raise TypeError(f"{type(self.module).__name__}.forward() got multiple values for argument {name!r}")
        return {**given, **kwargs}

    def remove(self) -> None:
        """Give the module its own forward back."""
        del self.module.forward


class _BaseForward(_Forward):
    """The base model's: the loop over its layers."""

    def __init__(self, attachment: Attachment) -> None:
        super().__init__(attachment, attachment.base)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        return self.attachment.run(self.options(args, kwargs), by_head=False)


class _HeadForward(_Forward):
    """The forward of a model whose head reads first tokens only: its own, on a view whose base computes no others."""

    def __init__(self, attachment: Attachment) -> None:
        super().__init__(attachment, attachment.model)
        _view_class(type(attachment.model))

    def call(self, *args: Any, **kwargs: Any) -> Any:
        model = self.attachment.model
        cls: Any = type(model)
        view: Any = object.__new__(_view_class(cls))
        object.__setattr__(view, "__dict__", model.__dict__)
        return cls.forward(view, *args, **kwargs)


class _SpanForward(_Forward):
    """The forward of a model that answers with a span of its input: its own, but for the loss."""

    def __init__(self, attachment: Attachment) -> None:
        super().__init__(attachment, attachment.model)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        model = self.attachment.model
        own: Any = partial(type(model).forward, model)
        return with_span_loss(own, model.config, self.options(args, kwargs))


_VIEW_CLASSES: dict[type, type] = {}


def _view_class(cls: Any) -> type:
    """``cls`` with another base under the name its head calls it by; everything else of an instance is shared."""

    def base(view: nn.Module) -> Any:
        attachment: Attachment = getattr(view, MODULE_NAME).attachment
        base_forward = attachment.forwards[0]

        def first_tokens(*args: Any, **kwargs: Any) -> Any:
            return attachment.run(base_forward.options(args, kwargs), by_head=True)

        return first_tokens

    if cls not in _VIEW_CLASSES:
        members = {cls.base_model_prefix: property(base), "__module__": cls.__module__}
        _VIEW_CLASSES[cls] = type(cls.__name__, (cls,), members)
    return _VIEW_CLASSES[cls]


def _check_text(pruner: Pruner, model: PreTrainedModel) -> None:
    """Raises ConfigError for settings that mean nothing to a model of images."""
    if model.main_input_name == "input_ids":
        return
    for name, unset in (("protect", ()), ("received_from", "all"), ("max_tokens", None)):
        value = getattr(pruner, name)
        if value not in (unset, "first"):
            raise ConfigError(f"{name} is {value!r}; a {type(model).__name__} has no text: leave it out")


def _check_lengths(pruner: Pruner, reads: Reads, max_positions: int | None) -> None:
    """Raises ConfigError for a ``max_tokens`` or ``chunks`` that the model cannot have."""
    if pruner.max_tokens is None:
        return
    if reads == "all":
        raise ConfigError(
            f"max_tokens is {pruner.max_tokens}, but all last states are read, those of tokens that would not enter "
            'too; a model whose states are averaged wants reads="mean"'
        )
    if pruner.chunks and reads != "mean":
        raise ConfigError('chunks is true; windows can only be pooled where the mean is read: reads="mean"')
    if max_positions is not None and pruner.max_tokens > max_positions:
        raise ConfigError(f"max_tokens is {pruner.max_tokens}; the model has positions for at most {max_positions}")


def _check_keys_can_be_guessed(pruner: Pruner, family: Family) -> None:
    """Raises ConfigError for context in a model of a family that does not say how its keys turn."""
    if pruner.context is not None and not family.can_guess_keys:
        raise ConfigError(
            f"context is {pruner.context!r}, but the family {type(family).__name__} does not say how its rotary "
            "positions turn keys; leave context out, or give the family a method turned"
        )


def write_keys(config: Any, pruner: Pruner) -> None:
    """Describe the method in the model's config, and so in ``config.json``."""
    for key, value in pruner.config().items():
        if value is not None:
            setattr(config, key, value)
        elif hasattr(config, key):
            delattr(config, key)


def _replace_config(model: nn.Module, old: Any, new: Any) -> None:
    for module in model.modules():
        if getattr(module, "config", None) is old:
            module.config = new
