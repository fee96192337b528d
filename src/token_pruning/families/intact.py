"""Whether a model is what its family takes it for.

The loop, and the native engine even more, compute themselves what some modules of a model would: a layer, its
attention, the encoder around them. That is right only while these are transformers' own. A subclass with a forward of
its own, a patch of a forward, or a hook would be skipped without a word; so each of them is looked for, and named.

What is computed through the module itself (projections, LayerNorms, embeddings, poolers; see the family's file) may be
anything, for the loop. What the native engine also reads itself is listed in :func:`foreign_to_native`.
"""

import inspect
from collections.abc import Iterator
from typing import Any, NoReturn

from torch import Tensor, nn
from transformers.activations import ACT2FN

from token_pruning.errors import UnsupportedModelError
from token_pruning.families.base import Family, HeadOutputs, LayerModules, ModelShape, Outputs

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def replaced_modules(family: Family, *, base_is_called: bool) -> Iterator[tuple[str, nn.Module]]:
    """The modules that are never called, since the family's loop takes their place, with their names in the base model.

    Args:
        family: bound to the base model.
        base_is_called: whether the base model, whose forward is replaced in any case, is called as a module.
    """
    names = {module: name for name, module in family.base.named_modules()}
    within: set[nn.Module] = set()
    for layer in family.layers:
        within |= {layer} | {layer.get_submodule(part) for part in family.replaced if _has(layer, part)}
    around = {names[layer].rpartition(".")[0] for layer in family.layers}
    for name in around:
        while name:
            within.add(family.base.get_submodule(name))
            name = name.rpartition(".")[0]
    if not base_is_called:
        yield "", family.base
    for module in within:
        yield names[module], module


def _has(layer: nn.Module, part: str) -> bool:
    try:
        layer.get_submodule(part)
    except AttributeError:
        return False
    return True


def refuse_foreign(family: Family, *, base_is_called: bool = False) -> None:
    """Let a model pass that the loop computes as it is; arguments as for :func:`replaced_modules`.

    Raises:
        UnsupportedModelError: otherwise; it names the module and what is wrong with it.
    """
    check_depth(family, family.shape(family.config).num_layers)
    if why := foreign_forward(family, family.base):
        refuse("", family.base, why)
    for name, module in replaced_modules(family, base_is_called=base_is_called):
        if why := skipped(family, module):
            refuse(name, module, why)


def check_depth(family: Family, num_layers: int) -> None:
    """Let a model pass that has as many layers as its config says: layers are sometimes cut off a model by hand.

    Raises:
        UnsupportedModelError: otherwise.
    """
    if len(family.layers) != num_layers:
        raise UnsupportedModelError(
            f"the model has {len(family.layers)} layers and its config says {num_layers}: write into the config what "
            "is there, before the model is pruned or compiled"
        )


def refuse(name: str, module: nn.Module, why: str) -> NoReturn:
    """Raise UnsupportedModelError for a module whose forward is not called, and that would have to be."""
    raise UnsupportedModelError(
        f"{name or 'the model'}, a {type(module).__name__}, {why}; pruning computes that module's part itself, "
        "so take this off first"
    )


def skipped(family: Family, module: nn.Module) -> str:
    """What of a module is lost when it is not called; empty if nothing."""
    return foreign_forward(family, module) or hooks_of(module)


def foreign_forward(family: Family, module: nn.Module) -> str:
    """Says so if a module's forward is another than its family's."""
    patched = module.__dict__.get("forward")
    if patched is not None and not hasattr(patched, "attachment"):  # the latter is pruning itself
        return "has a forward that another library has put in place of its own"
    home = _home(module)
    package = type(family).__module__.partition(".")[0]  # a family of one's own may be for models of one's own
    own = [cls.__module__ for cls in type(family.base).__mro__ if cls.__module__.startswith("transformers.models.")]
    if home not in (*own, "transformers.activations") and home.partition(".")[0] not in ("torch", package):
        return f"has a forward that is not its family's, but of {home}"
    return ""


def _home(module: nn.Module) -> str:
    """The Python module that the forward of a module's class is written in."""
    return str(getattr(inspect.unwrap(type(module).forward), "__module__", ""))


def hooks_of(module: nn.Module) -> str:
    """Says so if a module has hooks; not of transformers' own, which only watch."""
    for name in _HOOKS:
        for hook in getattr(module, name).values():
            if str(getattr(hook, "__module__", "")).partition(".")[0] != "transformers":
                return f"has {name.strip('_').replace('_', ' ')}, which would be skipped"
    return ""


def foreign_to_native(family: Family) -> str:
    """What about a model the native engine would compute wrongly; empty if nothing.

    The engine reads these by itself, and each is checked here:

    * every module of the embeddings and the encoder: its forward, in place and in its class, and its hooks;
    * the class of what has weights: a plain Linear, norm or Embedding, no subclass or wrapper;
    * the class of every weight: no quantised or distributed tensor, but floating point, and in memory;
    * that a norm has a weight, the sizes of all weights, and that no embedding has a ``max_norm``;
    * the norms' epsilon, which is one for all of them, and the scale of the logits;
    * what is added to the logits: nothing but a window, and a bias by distance or disentangled attention;
    * the activation, by its module and not only by its name in the config.

    Raises:
        UnsupportedModelError: for another number of layers than the config's; see :func:`check_depth`.
    """
    shape = family.shape(family.config)
    check_depth(family, shape.num_layers)
    tables = family.embedding_modules()
    parts: list[tuple[Any, tuple[int, ...] | None]] = [
        (module, None) for module in (tables.word, tables.position, tables.token_type, tables.projection)
    ]
    parts.append((tables.norm, tuple(tables.word.weight.shape[1:])))
    parts += [(norm, (shape.hidden_size,)) for norm in (tables.projected_norm, family.last_norm)]
    if len({family.scale(layer) for layer in family.layers}) > 1:
        return "the layers scale their logits differently"
    bias_everywhere = family.distance_bias() is not None
    for own in family.layers:
        distance = family.distance_modules(own)
        if distance is not None:
            parts += [(distance.embeddings, None), (distance.norm, (shape.hidden_size,))]
            parts += [(linear, (shape.query_size, shape.hidden_size)) for linear in (distance.key, distance.query)]
        elif family.terms(own).bias is not None and not bias_everywhere:
            return f"the native ones have no {family.config.model_type!r} attention"
    for layer in map(family.layer_modules, family.layers):
        expected = ACT2FN[family.activation]
        if type(layer.activation) is not type(expected):
            found = f"{type(layer.activation).__name__}, not the {type(expected).__name__}"
            return f"an activation is a {found} of config.json's {family.activation!r}"
        parts += _layer_parts(layer, shape)
    for module, size in parts:
        if module is not None and (why := not_plain(module, size, norm=family.norm_class)):
            return why
    for name, other in family.base.named_modules():
        called = name.partition(".")[0] in ("pooler", "token_pruner")  # through itself, or pruning's own
        if not called and (why := skipped(family, other)):
            return f"{name or 'the model'}, a {type(other).__name__}, {why}"
    epsilons = {epsilon_of(module) for module, _ in parts if isinstance(module, family.norm_class)}
    return f"the norms have several epsilons, {sorted(epsilons)}" if len(epsilons) > 1 else ""


def epsilon_of(norm: Any) -> float:
    """What a norm adds to the variance."""
    return float(norm.eps if isinstance(norm, nn.LayerNorm) else norm.variance_epsilon)


def _layer_parts(layer: LayerModules, shape: ModelShape) -> list[tuple[Any, tuple[int, ...] | None]]:
    hidden, inner, heads, keys = shape.hidden_size, shape.intermediate_size, shape.query_size, shape.key_size
    return [
        (layer.query, (heads, hidden)),
        (layer.key, (keys, hidden)),
        (layer.value, (keys, hidden)),
        (layer.attention_output, (hidden, heads)),
        (layer.attention_norm, (hidden,)),
        (layer.feed_forward_up, (inner, hidden)),
        (layer.feed_forward_gate, (inner, hidden)),
        (layer.feed_forward_down, (hidden, inner)),
        (layer.output_norm, (hidden,)),
    ]


def not_plain(module: Any, size: tuple[int, ...] | None = None, *, norm: type[nn.Module] = nn.LayerNorm) -> str:
    """Why the native kernels cannot take a Linear, norm or Embedding for what its weights say; empty if they can.

    Args:
        module: the module, or some of its outputs.
        size: the shape that its weight must have; None for any.
        norm: the class of norms.
    """
    if isinstance(module, (Outputs, HeadOutputs)):
        if why := not_plain(module.linear):
            return why
        found = list(module.numbers()[0].shape)
        return "" if size is None or found == list(size) else f"some outputs of a linear layer are {found}, not {size}"
    what = f"a {type(module).__module__}.{type(module).__name__}"
    if type(module) not in (nn.Linear, norm, nn.Embedding):
        return f"the native ones cannot compute {what}"
    if "forward" in module.__dict__:
        return f"{what} has another forward in place of its own"
    if why := hooks_of(module):
        return f"{what} {why}"
    for name, tensor in module._parameters.items():
        if tensor is None:
            if name == "bias":
                continue
            return f"{what} has no {name}"
        if type(tensor) not in (Tensor, nn.Parameter) or not tensor.is_floating_point() or tensor.is_meta:
            return f"the {name} of {what} is a {type(tensor).__name__} of {tensor.dtype} on {tensor.device}"
    if size is not None and tuple(module.weight.shape) != size:
        return f"the weight of {what} has shape {list(module.weight.shape)}, not {list(size)}"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return f"{what} has a max_norm"
    return ""
