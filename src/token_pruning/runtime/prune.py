"""Attaching a pruner to a Hugging Face model, recording what it does, and taking it off again."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any, TypeVar, get_args

import torch
from torch import nn
from transformers import PreTrainedModel

from token_pruning.checks import choice
from token_pruning.errors import ConfigError, UnsupportedModelError
from token_pruning.families import Reads, family_of, shape_of, supported_model_types
from token_pruning.pruners import FixedThreshold, Pruner
from token_pruning.pruners.budgets import at_budget
from token_pruning.runtime.adapters import adapter_of
from token_pruning.runtime.attachment import Attachment, Execution, write_keys
from token_pruning.runtime.token_pruner import TokenPruner
from token_pruning.runtime.trace import Trace, recording

ModelT = TypeVar("ModelT", bound=nn.Module)


def prune(
    model: ModelT,
    pruner: Pruner,
    *,
    execution: Execution = "packed",
    reads: Reads | None = None,
) -> ModelT:
    """Make a Hugging Face encoder drop tokens, in place.

    The model stays what it was: same class, same call, same outputs. Its configuration gets the method's keys and its
    state dict the thresholds (``token_pruner.thresholds``) and vocabulary scores, so ``save_pretrained`` saves all.

    Args:
        model: of a supported family, with any head or without; a PEFT model around one; or a ``SentenceTransformer`` or
            ``CrossEncoder`` of sentence-transformers that begins with one.
        pruner: the method.
        execution: ``"packed"`` removes tokens. ``"masked"`` computes everything on the padded batch and masks what is
            gone: a slow reference with the same results, which can return attentions and hidden states.
        reads: which last hidden states are used: ``"first"``, only those of sequences' first tokens, so that the last
            layer computes no others and a base model's ``last_hidden_state`` is ``[batch, 1, dim]``; ``"mean"``, only
            the mean over a sequence's tokens, so that rows of tokens that left need not be their own; or ``"all"``. As
            the model's head, or its Pooling module, is known to do unless given; an embedding model of plain
            transformers with CLS pooling may say ``"first"``, one with mean pooling ``"mean"``.

    Returns:
        The same model.

    Raises:
        UnsupportedModelError: for a model of another family, or with other layers than its config says.
        ConfigError: if the model is pruned already, or the thresholds do not fit its layers or the vocabulary scores
            its vocabulary.
    """
    choice("execution", execution, get_args(Execution))
    if not isinstance(pruner, Pruner):
        raise ConfigError(f"pruner is {pruner!r}; it must be an instance of a pruner such as LearnedThreshold()")
    inner, adapter = hugging_face_model(model), adapter_of(model)
    if is_pruned(inner):
        raise ConfigError(f"this {type(inner).__name__} is pruned already; call unprune(model) first")
    if pruner.vocabulary is not None:
        entries = getattr(inner.get_input_embeddings(), "num_embeddings", 0)  # of pixels there is no vocabulary
        if len(pruner.vocabulary.scores) != entries:
            raise ConfigError(
                f"the vocabulary gate has {len(pruner.vocabulary.scores)} scores; the model's vocabulary has {entries} "
                "entries"
            )
    Attachment(inner, pruner, execution, _asked_reads(model, reads))
    if adapter is not None:
        adapter.attach(model, pruner)
    return model


def unprune(model: ModelT) -> ModelT:
    """Take the pruner off a model, in place: it then computes bit for bit what it computed before :func:`prune`.

    What else has changed in the model or its config since stays: weights, labels, a resized vocabulary.

    Args:
        model: a pruned model.

    Returns:
        The same model.

    Raises:
        ConfigError: if the model is not pruned.
    """
    attachment_of(model).detach()
    if adapter := adapter_of(model):
        adapter.detach(model)
    return model


@contextmanager
def prunable(model: Any, pruner: Pruner | None = None, reads: Reads | None = None) -> Iterator[None]:
    """A dense model inside the block, in evaluation mode: pruned by a method that drops nothing.

    Args:
        model: that is not pruned.
        pruner: the method; thresholds of zero for importance in scoring mode ``"relative"`` unless given.
        reads: see :func:`prune`.
    """
    layers = shape_of(hugging_face_model(model).base_model.config).num_layers
    training = model.training
    pruner = pruner or FixedThreshold(thresholds=[0.0] * layers, scoring_mode="relative")
    prune(model, pruner, reads=reads).eval()
    try:
        yield
    finally:
        unprune(model)
        model.train(training)


@contextmanager
def record(model: Any) -> Iterator[Trace]:
    """Record what happens to the tokens of every forward pass of ``model`` inside the block, in this thread.

    Args:
        model: a pruned model, possibly inside a wrapper such as ``DistributedDataParallel``, or what
            :func:`token_pruning.compile` made.

    Yields:
        The trace; it can be read after the block too.

    Raises:
        ConfigError: if the model is not pruned.
    """
    token_pruner = token_pruner_of(model)
    trace = Trace(token_pruner.pruner.max_seq_length)
    token = recording.set((*recording.get(), (token_pruner, trace)))
    try:
        yield trace
    finally:
        recording.reset(token)


def freeze_thresholds(model: nn.Module) -> None:
    """End the soft stage in place: the thresholds learned so far become fixed, and tokens are removed from now on.

    Called again it takes over thresholds that were loaded into the model since. Models pruned by another method, or by
    the linear rule, are left as they are.

    Args:
        model: a model pruned with :class:`LearnedThreshold`.

    Raises:
        ConfigError: if the model is not pruned.
    """
    attachment = attachment_of(model)
    token_pruner = attachment.token_pruner
    pruner = token_pruner.pruner
    if not isinstance(pruner, FixedThreshold) or not pruner.stores_thresholds or token_pruner.thresholds is None:
        return
    token_pruner.thresholds.requires_grad_(False)
    values = {f.name: getattr(pruner, f.name) for f in fields(FixedThreshold)}
    token_pruner.pruner = FixedThreshold(**{**values, "thresholds": token_pruner.thresholds.tolist()})
    attachment.describe()


def set_thresholds(model: nn.Module, thresholds: Sequence[float]) -> None:
    """Give a model other thresholds, in place.

    Args:
        model: a model pruned with absolute thresholds, learned or given one by one.
        thresholds: one per layer, in the units of its scoring mode.

    Raises:
        ConfigError: if the model is not pruned that way, or for a wrong number of thresholds.
    """
    attachment = attachment_of(model)
    token_pruner = attachment.token_pruner
    pruner = token_pruner.pruner
    if not isinstance(pruner, FixedThreshold) or not pruner.stores_thresholds or token_pruner.thresholds is None:
        raise ConfigError(f"thresholds cannot be set on a model pruned by {pruner!r}")
    if not isinstance(thresholds, Iterable):
        raise ConfigError(f"thresholds is {thresholds!r}; it must be a list with one number per layer")
    pruner = replace(pruner, thresholds=tuple(thresholds))
    values = pruner.initial_thresholds(token_pruner.num_layers)
    with torch.no_grad():
        token_pruner.thresholds.copy_(torch.tensor(values, dtype=torch.float32, device=token_pruner.thresholds.device))
    token_pruner.pruner = pruner
    attachment.describe()


def set_budget(model: Any, budget: float) -> None:
    """Prune to another budget, in place: nothing is loaded, fitted or compiled again.

    Thresholds of a budget that was fitted are taken as they are, those of others lie linearly between the neighbours'.
    They are part of what ``save_pretrained`` writes, as the table of budgets is.

    Args:
        model: that :func:`token_pruning.calibrate` pruned for several budgets, a checkpoint of one, or what
            :func:`token_pruning.compile` made of either. A call that another thread has begun may see both budgets.
        budget: relative FLOPs, from the lowest that was fitted to 1; where the model costs less than that with nothing
            dropped, nothing is.

    Raises:
        ConfigError: for a budget outside, or a model that is not pruned for several budgets.
    """
    token_pruner = token_pruner_of(model)
    pruner = token_pruner.pruner
    if not isinstance(pruner, FixedThreshold) or not pruner.budgets or token_pruner.thresholds is None:
        raise ConfigError(
            "this model is not pruned for several budgets: token_pruning.calibrate(model, examples, [0.75, 0.5, 0.35]) "
            "does that"
        )
    found = at_budget(pruner.budgets, budget)
    with torch.no_grad():
        token_pruner.thresholds.copy_(torch.tensor(found.thresholds, dtype=torch.float32))
    token_pruner.pruner = pruner.at(found)
    if token_pruner.attachment is not None:
        token_pruner.attachment.describe()
        return
    adapter = adapter_of(model)
    engine = model if adapter is None else adapter.engine(model)
    write_keys(engine.config, token_pruner.pruner)


def reads_of(model: nn.Module, asked: Reads | None = None) -> Reads:
    """Which last hidden states of a model are used, pruned or not.

    Args:
        model: with a head or without.
        asked: which are wanted of a model that is not pruned.

    Raises:
        ConfigError: for something else than what another library's model reads.
    """
    attachment = _find_attachment(model)
    if attachment is not None:
        return attachment.reads
    inner = hugging_face_model(model)
    return _asked_reads(model, asked) or family_of(inner.base_model.config).reads(inner)


def _asked_reads(model: Any, asked: Reads | None) -> Reads | None:
    """What a caller says is read, or the modules after another library's model; None for what the head reads."""
    if asked is not None:
        choice("reads", asked, get_args(Reads))
    adapter = adapter_of(model)
    own = None if adapter is None else adapter.reads(model)
    if own is not None and asked not in (None, own, "all"):
        raise ConfigError(f"reads is {asked!r}; what comes after the transformer of this model reads {own!r}")
    return asked or own


def hugging_face_model(model: Any) -> PreTrainedModel:
    """The model itself, or the one inside a PEFT model or another library's.

    Raises:
        UnsupportedModelError: if it is none, or a causal language model.
    """
    if adapter := adapter_of(model):
        model = adapter.inner(model)
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a Hugging Face model; supported are {', '.join(supported_model_types())}"
        )
    if type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        raise UnsupportedModelError(
            f"{type(model).__name__} predicts every next token, so that none can be dropped; only encoders can"
        )
    return model


def is_pruned(model: nn.Module) -> bool:
    """Whether a pruner is attached to the model, or to the model inside a wrapper."""
    return _find_attachment(model) is not None


def token_pruner_of(model: Any) -> TokenPruner:
    """The method and the tensors of a pruned model, or of what was compiled.

    Raises:
        ConfigError: if the model is not pruned.
    """
    if adapter := adapter_of(model):
        model = adapter.engine(model) or model
    found = None if isinstance(model, nn.Module) else getattr(model, "token_pruner", None)  # an engine's
    return found if isinstance(found, TokenPruner) else attachment_of(model).token_pruner


def attachment_of(model: nn.Module) -> Attachment:
    """The attachment of a pruned model, its base model, or a wrapper around either.

    Raises:
        ConfigError: if the model is not pruned.
    """
    attachment = _find_attachment(model)
    if attachment is None:
        raise ConfigError(f"this {type(model).__name__} is not pruned; call prune(model, pruner) first")
    return attachment


def _find_attachment(model: nn.Module) -> Attachment | None:
    if not isinstance(model, nn.Module):
        kind: type = type(model).__mro__[-2]  # an engine's own class has its model's name
        raise ConfigError(f"a {kind.__name__} is given; it must be a model that was pruned")
    for module in model.modules():
        owner = module if isinstance(module, TokenPruner) else module.__dict__.get("forward")
        found = getattr(owner, "attachment", None)
        if isinstance(found, Attachment):
            return found
    return None
