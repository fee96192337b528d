"""A model that is not what its family takes it for: each part in turn computes something else.

Pruned with nothing dropped, and compiled, it must compute what it computes by itself, or be refused by name.
"""

import inspect
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import token_pruning as tp
from tests.families.shared import assert_same, batch_of, kept_model, model_of, valid
from tests.tiny import EVERY_FAMILY, assert_close, ragged_batch, tiny_model
from token_pruning.families import family_of

IN_EVERY_WAY = ("bert", "electra", "distilbert")


def more(output: Any) -> Any:
    """A quarter more."""
    if isinstance(output, tuple):
        return (more(output[0]), *output[1:])
    if isinstance(output, Tensor):
        return output * 1.25 if output.is_floating_point() else output
    name, value = next(iter(output.items()))
    output[name] = more(value)
    return output


def subclassed(module: nn.Module) -> Callable[[], None]:
    own: Any = type(module)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return more(own.forward(self, *args, **kwargs))

    module.__class__ = type(own.__name__, (own,), {"forward": forward, "__module__": "somebody_elses"})
    return lambda: setattr(module, "__class__", own)


def hooked(module: nn.Module) -> Callable[[], None]:
    return module.register_forward_hook(lambda module, args, output: more(output)).remove


def patched(module: nn.Module) -> Callable[[], None]:
    own: Any = type(module).forward
    signature = inspect.signature(own)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return more(own(self, *args, **kwargs))

    forward.__signature__ = signature  # type: ignore[attr-defined]
    module.forward = types.MethodType(forward, module)
    return lambda: delattr(module, "forward")


WAYS = (subclassed, hooked, patched)


def parts(model: Any) -> dict[str, nn.Module]:
    """Every module but copies of layers, and lists, which compute nothing."""
    kept: dict[str, nn.Module] = {}
    seen: set[str] = set()
    for name, module in model.named_modules():
        pattern = ".".join("N" if part.isdigit() else part for part in name.split("."))
        if name and not isinstance(module, nn.ModuleList | nn.ModuleDict) and pattern not in seen:
            kept[name] = module
            seen.add(pattern)
    return kept


def equal_or_refused(model: Any, batch: dict[str, Tensor], what: str) -> set[str]:
    """Whether pruning and compiling gave the model's own result."""
    found = set()
    expected = valid(model(**batch), batch)
    try:
        tp.prune(model, tp.Unpruned())
    except tp.UnsupportedModelError as error:
        assert "so take this off first" in str(error)
    else:
        assert_same(valid(model(**batch), batch), expected, 5e-5, f"{what}, pruned")
        tp.unprune(model)
        found.add("pruned")
    try:
        engine = tp.compile(model, "float32")
    except tp.UnsupportedModelError as error:
        assert "so take this off first" in str(error)
    else:
        assert_same(valid(engine(**batch), batch), expected, 5e-5, f"{what}, compiled")
        found.add("compiled, on PyTorch" if "kernels: PyTorch" in engine.explain() else "compiled")
    return found


@pytest.mark.parametrize("family", EVERY_FAMILY)
@torch.no_grad()
def test_each_part_in_turn(family: str) -> None:
    model = model_of(family, "sequence", layers=2)
    batch, dense = batch_of(family, lengths=(9, 4)), None
    dense = model(**batch).logits
    changes, refused = 0, 0
    for number, (name, module) in enumerate(parts(model).items()):
        for way in WAYS if family in IN_EVERY_WAY else WAYS[number % 3 :][:1]:
            undo = way(module)
            changed = not torch.equal(model(**batch).logits, dense)
            found = equal_or_refused(model, batch, f"{name}, {way.__name__}")
            changes += changed
            refused += changed and not found
            undo()
    assert changes > 15 and refused >= 2, (changes, refused)
    assert torch.equal(model(**batch).logits, dense)
    assert ("kernels: PyTorch" not in tp.compile(model, "float32").explain()) == family_of(model.config).native


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert"])
@torch.no_grad()
def test_a_base_model_that_computes_something_else(family: str, way: Any) -> None:
    """With a head and without; what only adds to the base model, such as a method, is let be."""
    batch = batch_of(family, lengths=(9, 9))
    for head in ("sequence", "encoder"):
        model = model_of(family, head, layers=2)
        base = model.base_model
        undo = way(base)
        expected = model(**batch)[0]
        if head == "encoder" and way is hooked:  # on the model that is called, and in an engine is not
            assert_same({"x": tp.prune(model, tp.Unpruned())(**batch)[0]}, {"x": expected}, 5e-5)
            tp.unprune(model)
        else:
            with pytest.raises(tp.UnsupportedModelError, match="so take this off first"):
                tp.prune(model, tp.Unpruned())
        with pytest.raises(tp.UnsupportedModelError, match="so take this off first"):
            tp.compile(model, "float32")
        undo()
        base.__class__ = type("More", (type(base),), {"extra": lambda self: 1, "__module__": "somebody_elses"})
        tp.compile(tp.prune(model, tp.Unpruned()), "float32")


def _act(model: Any) -> None:
    model.bert.encoder.layer[1].intermediate.intermediate_act_fn = nn.ReLU()


def _epsilon(model: Any) -> None:
    model.bert.encoder.layer[1].output.LayerNorm.eps = 0.5


def _norm_without_bias(model: Any) -> None:
    model.bert.encoder.layer[1].output.LayerNorm.bias = None


def _norm_without_weights(model: Any) -> None:
    model.bert.encoder.layer[0].attention.output.LayerNorm = nn.LayerNorm(32, elementwise_affine=False, eps=1e-12)


def _linear_without_bias(model: Any) -> None:
    for layer in model.bert.encoder.layer:
        for linear in (layer.attention.self.query, layer.output.dense, layer.intermediate.dense):
            linear.bias = None


def _max_norm(model: Any) -> None:
    model.bert.embeddings.word_embeddings.max_norm = 0.5


def _doubles(model: Any) -> None:
    model.double()


def _parametrized(model: Any) -> None:
    class Twice(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    parametrize.register_parametrization(model.bert.encoder.layer[0].attention.self.key, "weight", Twice())


def _weight_normed(model: Any) -> None:
    linear = model.bert.encoder.layer[0].output.dense
    model.bert.encoder.layer[0].output.dense = nn.utils.parametrizations.weight_norm(linear)


class _Rounded(nn.Parameter):
    """Stands for the tensors of quantisation libraries, inside a plain Linear."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = [x.as_subclass(Tensor).round(decimals=1) if isinstance(x, _Rounded) else x for x in args]
        return func(*plain, **(kwargs or {}))


def _tensor_subclass(model: Any) -> None:
    linear = model.bert.encoder.layer[0].attention.self.value
    linear._parameters["weight"] = linear.weight.detach().as_subclass(_Rounded)


def _quantised(model: Any) -> None:
    torch.ao.quantization.quantize_dynamic(model.bert.encoder, {nn.Linear}, inplace=True)


def _quantised_head(model: Any) -> None:
    model.classifier = torch.ao.quantization.quantize_dynamic(nn.Sequential(model.classifier), {nn.Linear})[0]


def _tied(model: Any) -> None:
    model.bert.encoder.layer[1] = model.bert.encoder.layer[0]


def _wider_values(model: Any) -> None:
    """A head that is not a plain linear layer."""
    model.classifier = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, 3, bias=False))


NATIVE_AFTER = {"_norm_without_bias", "_linear_without_bias", "_doubles", "_quantised_head", "_tied", "_wider_values"}


@pytest.mark.filterwarnings("ignore")  # torch.ao is deprecated, and used
@pytest.mark.parametrize(
    "change",
    [_act, _epsilon, _norm_without_bias, _norm_without_weights, _linear_without_bias, _max_norm, _doubles,
     _parametrized, _weight_normed, _tensor_subclass, _quantised, _quantised_head, _tied, _wider_values],
)  # fmt: skip
@torch.no_grad()
def test_weights_and_settings_that_are_not_what_config_says(change: Callable[[Any], None]) -> None:
    model, batch = model_of("bert", "sequence", layers=2), batch_of("bert", lengths=(9, 4))
    dense = model(**batch).logits
    change(model)
    if change not in (_doubles, _weight_normed, _quantised_head):
        assert not torch.allclose(model(**batch).logits, dense, atol=1e-4)
    expected = valid(model(**batch), batch)
    engine = tp.compile(model, "float32")
    assert ("kernels: PyTorch" not in engine.explain()) == (change.__name__ in NATIVE_AFTER), engine.explain()
    actual = {name: x.to(expected[name].dtype) for name, x in valid(engine(**batch), batch).items()}
    assert_same(actual, expected, 2e-2 if change is _quantised else 1e-4)
    tp.prune(model, tp.Unpruned())
    assert_same(valid(model(**batch), batch), expected, 2e-2 if change is _quantised else 1e-4)


def test_weights_that_are_not_in_memory_are_refused() -> None:
    with torch.device("meta"):
        model = type(tiny_model())(tiny_model().config)
    with pytest.raises(tp.UnsupportedModelError, match=r"embeddings.word_embeddings.weight is not in memory"):
        tp.compile(model, "float32")


def test_a_hook_that_comes_later_is_refused_when_it_would_be_skipped() -> None:
    model, batch = tp.prune(tiny_model(), tp.Unpruned()), batch_of("bert")
    handle = model.bert.encoder.layer[2].register_forward_hook(lambda module, args, output: output)
    with pytest.raises(tp.UnsupportedModelError, match=r"encoder.layer.2, a BertLayer, has forward hooks"):
        model(**batch)
    handle.remove()
    seen: list[int] = []
    model.bert.encoder.layer[2].output.register_forward_hook(lambda *args: seen.append(1))
    model(**batch)
    assert seen


@torch.no_grad()
def test_hooks_of_transformers_that_only_watch_are_let_be() -> None:
    """A dense model that was asked for hidden states keeps them for good."""
    model, batch = tiny_model("modernbert"), batch_of("modernbert")
    expected = model(**batch, output_hidden_states=True, output_attentions=True).logits
    tp.prune(model, tp.Unpruned())
    assert_same({"logits": model(**batch).logits}, {"logits": expected}, 2e-5)


def test_a_model_whose_forward_was_replaced_is_refused() -> None:
    model = tiny_model()
    patched(model)
    with pytest.raises(tp.UnsupportedModelError, match="another library has put in place of its own"):
        tp.prune(model, tp.TopK())
    assert not any("token_pruner" in name for name, _ in model.named_modules())
    tp.prune(kept_model("bert", "sequence"), tp.TopK())
    tp.unprune(kept_model("bert", "sequence"))


@pytest.mark.parametrize("family", ["bert", "modernbert", "distilbert"])
def test_layers_that_were_cut_off_without_a_word_to_the_config_are_named(family: str) -> None:
    def cut(model: Any) -> Any:
        home = model.base_model.get_submodule({"bert": "encoder", "distilbert": "transformer"}.get(family, ""))
        name = "layers" if family == "modernbert" else "layer"
        setattr(home, name, getattr(home, name)[:2])
        return model

    batch, message = ragged_batch([9, 5], family=family), "has 2 layers and its config says 4"
    model = cut(tiny_model(family))
    for refusing in (lambda: tp.prune(model, tp.Unpruned()), lambda: tp.compile(model)):
        with pytest.raises(tp.UnsupportedModelError, match=message):
            refusing()
    model.config.num_hidden_layers = 2
    with torch.no_grad():
        expected = model(**batch).logits
        assert_close(tp.compile(model, dtype="float32")(**batch).logits, expected)
        assert_close(tp.prune(model, tp.Unpruned())(**batch).logits, expected)
    with pytest.raises(tp.UnsupportedModelError, match=message):
        cut(tp.prune(tiny_model(family), tp.Unpruned()))(**batch)


def test_a_base_model_that_was_replaced_after_pruning_is_named() -> None:
    model = tp.prune(tiny_model("bert"), tp.Unpruned())
    own, model.bert = model.bert, tiny_model("bert", "encoder", seed=1)
    with pytest.raises(tp.UnsupportedModelError, match="BertModel of this BertForSequenceClassification is another"):
        model(**ragged_batch([5]))
    model.bert = own
    model(**ragged_batch([5]))
