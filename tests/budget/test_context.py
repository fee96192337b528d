"""Context fitted by calibrate: against least squares and singular values in numpy; and in the search of rules."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import token_pruning as tp
from tests.budget.test_elastic import fitted_to
from tests.budget.test_observation import LAYERS, ZEROS
from tests.budget.test_search import TARGET, calibrated, pairs, relative_flops, texts
from tests.tiny import VOCABULARY, assert_close, assert_equal, pruned, ragged_batch, tiny_model
from token_pruning.budget import comparison, context
from token_pruning.budget.context import _sample, can_have_context, fit_context, rank_for
from token_pruning.budget.observation import Observed, Watching, watched
from token_pruning.budget.rules import Rule, even, first_rules, further_rules, received_rules, spread_rules, step
from token_pruning.budget.schedules import schedules
from token_pruning.families import Family
from token_pruning.pruners.fitted import apply_affine
from token_pruning.runtime.prune import attachment_of, prunable

Array = npt.NDArray[np.float64]
HIDDEN, RANK = 32, 10
BATCH = ragged_batch([30, 5, 17, 40, 9, 23, 31, 12] * 3)
POST_NORM = ("bert", "roberta", "mpnet", "deberta-v2", "albert", "distilbert", "electra")
ROTARY = ("modernbert", "nomic_bert", "gte", "eurobert", "jina_embeddings_v3")
EVERY = (*POST_NORM, "deberta", "xlm-roberta-xl", "megatron-bert", *ROTARY)


@contextmanager
def thresholds_of_zero(family: str = "bert", head: str = "encoder", reads: Any = None, **options: Any) -> Iterator[Any]:
    model = tiny_model(family, head, layers=LAYERS, **{"initializer_range": 0.15, **options})
    with prunable(model, ZEROS, reads):
        yield model


# What is fitted, against numpy


def observed_by_hand(batch: dict[str, Tensor]) -> tuple[dict[int, Array], Array]:
    """By BERT's own modules: tokens' states where they enter and after each attention block, ``[tokens, hidden]``, and
    all layers' keys and values, ``[tokens, layers, 2, hidden]``.
    """
    model = tiny_model("bert", "encoder", layers=LAYERS, initializer_range=0.15).double()
    valid = batch["attention_mask"].bool()
    joined: dict[int, Array] = {}
    for number, layer in enumerate(model.encoder.layer, start=1):

        def keep(_: Any, given: Any, states: Tensor, number: int = number) -> None:
            joined[number] = states[valid].numpy()

        layer.attention.output.register_forward_hook(keep)
    with torch.no_grad():
        entering = model(**batch, output_hidden_states=True).hidden_states
        given = [
            torch.stack([part(states[valid]) for part in (layer.attention.self.key, layer.attention.self.value)], 1)
            for layer, states in zip(model.encoder.layer, entering, strict=False)
        ]
    return {0: entering[0][valid].numpy(), **joined}, torch.stack(given, 1).numpy()


def ridge_by_hand(x: Array, y: Array, penalty: float) -> Array:
    """``[out, in]``: centred least squares, with one more row for each weight."""
    x, y = x - x.mean(0), y - y.mean(0)
    size = x.shape[1]
    rows = np.sqrt(penalty * (x**2).sum(0).mean()) * np.eye(size)
    weights, *_ = np.linalg.lstsq(np.concatenate([x, rows]), np.concatenate([y, np.zeros((size, y.shape[1]))]))
    return np.asarray(weights.T)


def cut_by_hand(states: Array, given: Array, rank: int, penalty: float) -> tuple[Array, Array]:
    """The keys and values that a regression of this rank gives, and its directions ``[out, rank]``; both scaled.

    Every layer's keys, and its values, count alike: they are divided by their standard deviation, all numbers together.
    """
    scaled = scaled_by_hand(given)
    weights = ridge_by_hand(states, scaled, penalty)
    size, directions = np.linalg.eigh(np.cov(states.T, bias=True))
    whitened = weights @ directions * np.sqrt(np.maximum(size, 0)) @ directions.T
    left, size, _ = np.linalg.svd(whitened)
    left, size = left[:, :rank], size[:rank]
    return (states - states.mean(0)) @ weights.T @ left @ left.T, left * size


def scaled_by_hand(given: Array) -> Array:
    centred = given - given.mean(0)
    deviation = np.sqrt((centred**2).mean((0, 3), keepdims=True))
    return (centred / deviation).reshape(len(given), -1)


def affine(weights: Tensor, rows: Array | Tensor) -> Tensor:
    rows = torch.as_tensor(rows).double()
    return rows @ weights[..., :-1].double().mT + weights[..., -1].double()


def made(found: tp.LinearContext, states: Array, cut: int = 0) -> Array:
    """Keys and values that a context gives, ``[tokens, layers, 2, hidden]``."""
    codes = affine(found.down[found.layers.index(cut)], states)
    layers = [affine(up, codes).view(len(codes), 2, -1) for up in found.up]
    return torch.stack(layers, 1).numpy()


def beside(found: Array, given: Array) -> Array:
    """Scaled as :func:`scaled_by_hand` scales what was given."""
    deviation = np.sqrt(((given - given.mean(0)) ** 2).mean((0, 3), keepdims=True))
    return np.asarray(((found - given.mean(0)) / deviation).reshape(len(given), -1))


@pytest.mark.parametrize("penalty", [1e-3, 0.1])
@pytest.mark.parametrize("rank", [1, 3, RANK, HIDDEN])
def test_it_is_least_squares_cut_to_a_rank(rank: int, penalty: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "rank_for", lambda hidden: rank)
    monkeypatch.setattr(context, "_PENALTY", penalty)
    with thresholds_of_zero() as model:
        found = fit_context(model, BATCH, [1, 2])
    states, given = observed_by_hand(BATCH)
    assert found.layers == (0, 1, 2)
    assert found.down.shape == (3, rank, HIDDEN + 1) and found.up.shape == (LAYERS, 2 * HIDDEN, rank + 1)
    assert found.down.dtype == found.up.dtype == torch.float32
    wanted, directions = cut_by_hand(states[0], given, rank, penalty)
    assert np.abs(beside(made(found, states[0]), given) - wanted).max() < 2e-3
    # Codes are told from each other by what they explain: the first most, and no two the same.
    up = found.up[..., :-1].double().numpy().reshape(LAYERS, 2, HIDDEN, rank)
    deviation = np.sqrt(((given - given.mean(0)) ** 2).mean((0, 3)))
    up = (up / deviation[:, :, None, None]).reshape(-1, rank)
    sizes = (directions**2).sum(0)
    assert np.abs(up.T @ up - np.diag(sizes)).max() < 2e-3 * sizes.max()
    # Of tokens that leave later: the codes that give their keys and values best, from their states there.
    best = np.linalg.lstsq(up, scaled_by_hand(given).T)[0].T
    for cut in (1, 2):
        weights = ridge_by_hand(states[cut], best, penalty)
        codes = (states[cut] - states[cut].mean(0)) @ weights.T + best.mean(0)
        codes_found = affine(found.down[cut], states[cut]).numpy()
        assert np.abs((codes_found - codes) * np.sqrt(sizes)).max() < 2e-2 * np.abs(codes * np.sqrt(sizes)).max()


def test_the_whole_rank_gives_the_first_layer_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "rank_for", lambda hidden: hidden)
    states, given = observed_by_hand(BATCH)
    errors = []
    for penalty in (1e-9, 1e-3):
        monkeypatch.setattr(context, "_PENALTY", penalty)
        with thresholds_of_zero() as model:
            found = fit_context(model, BATCH, [])
        assert found.layers == (0,)
        errors.append(np.abs(made(found, states[0])[:, 0] - given[:, 0]).max() / given[:, 0].std())
    assert errors[0] < 1e-3 < errors[1] < 0.1  # little is lost by the penalty
    others, there = observed_by_hand(ragged_batch([25, 13], seed=5))
    monkeypatch.setattr(context, "_PENALTY", 1e-9)
    with thresholds_of_zero() as model:
        found = fit_context(model, BATCH, [])
    assert np.abs(made(found, others[0])[:, 0] - there[:, 0]).max() < 1e-3 * there[:, 0].std()  # of other texts too


def test_the_error_falls_with_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    states, given = observed_by_hand(BATCH)
    errors: dict[int, list[float]] = {0: [], 1: [], 2: []}
    for rank in (1, 2, 3, 5, 8, 12, 20, HIDDEN):
        monkeypatch.setattr(context, "rank_for", lambda hidden, rank=rank: rank)
        with thresholds_of_zero() as model:
            found = fit_context(model, BATCH, [1, 2])
        wanted = scaled_by_hand(given)
        for cut, seen in errors.items():
            seen.append(((beside(made(found, states[cut], cut), given) - wanted) ** 2).mean())
    for seen in errors.values():
        assert seen == sorted(seen, reverse=True) and seen[-1] < 0.7 * seen[0] < 0.7


def test_tokens_that_leave_later_say_more_of_later_layers() -> None:
    """Nothing of the layers before: nobody asks for that."""
    states, given = observed_by_hand(BATCH)
    with thresholds_of_zero() as model:
        found = fit_context(model, BATCH, [1, 2])
    errors = [((made(found, states[cut], cut) - given)[:, -1] ** 2).mean() for cut in (0, 1, 2)]
    assert errors == sorted(errors, reverse=True)


# Models and examples


@pytest.mark.parametrize("family", POST_NORM)
def test_a_first_layer_that_loses_tokens_gives_what_the_dense_one_gives(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every family whose first layer reads what enters as it is."""
    monkeypatch.setattr(context, "rank_for", lambda hidden: hidden)
    monkeypatch.setattr(context, "_PENALTY", 1e-9)
    model, batch = tiny_model(family, "encoder", layers=1), ragged_batch([30, 40, 25, 38] * 8, family=family)
    others = ragged_batch([30, 1, 17, 2], family=family, seed=3)
    with prunable(model, tp.FixedThreshold(thresholds=[0.0], scoring_mode="relative"), "all"):
        found = fit_context(model, batch, [])
    with torch.no_grad():
        dense = model(**others).last_hidden_state.flatten(0, 1)
    gate = tp.VocabularyGate(torch.rand(VOCABULARY, generator=torch.Generator().manual_seed(0)), 0.5)
    nothing = tp.FixedThreshold(thresholds=[0.0], scoring_mode="relative", vocabulary=gate, context=found)
    with pruned(model, nothing), tp.record(model) as trace, torch.no_grad():
        states = model(**others).last_hidden_state.flatten(0, 1)
    entered = trace.passes[0].entering.indices
    assert 10 < len(entered) < 40
    assert_close(states[entered], dense[entered], 5e-3)


@pytest.mark.parametrize(
    ("head", "reads"), [("encoder", "mean"), ("encoder", "first"), ("sequence", None), ("token", None)]
)
@pytest.mark.parametrize("family", EVERY)
def test_every_family_and_whatever_is_read(family: str, head: str, reads: Any) -> None:
    batch = {name: x[:8] for name, x in ragged_batch([30, 5, 17, 40, 9, 23, 31, 12] * 2, family=family).items()}
    with thresholds_of_zero(family, head, reads) as model:
        assert can_have_context(model)
        before = attachment_of(model).loop
        found = fit_context(model, batch, [1, 2])
        assert attachment_of(model).loop is before
        method = replace(ZEROS, thresholds=[0.6] * LAYERS, context=found)
        keys = attachment_of(model).shape.key_size
    assert found.down.shape == (3, RANK, HIDDEN + 1) and found.up.shape == (LAYERS, 2 * keys, RANK + 1)
    assert found.down.isfinite().all() and found.up.isfinite().all()
    assert not found.down.is_inference() and not found.up.requires_grad
    with pruned(model, method, reads=reads), torch.no_grad():
        output = model(**batch)
        states = output.last_hidden_state if head == "encoder" else output.logits
        assert states.isfinite().all()


def test_what_is_read_does_not_matter() -> None:
    fits = []
    for head, reads in (("encoder", "mean"), ("encoder", "first"), ("sequence", None)):
        with thresholds_of_zero("bert", head, reads) as model:
            model.base_model.load_state_dict(tiny_model("bert", "encoder", layers=LAYERS).state_dict(), strict=False)
            fits.append(fit_context(model, BATCH, [1, 2]))
    for other in fits[1:]:
        assert_equal(other.up, fits[0].up, 1e-3)
        assert_equal(other.down, fits[0].down, 1e-3)


def test_padding_and_parts_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    states, given = observed_by_hand(BATCH)
    lengths = BATCH["attention_mask"].sum(1).tolist()
    found = []
    for left, tokens in ((False, 2048), (True, 2048), (False, 60)):
        monkeypatch.setattr(context, "_PASS_TOKENS", tokens)
        with thresholds_of_zero() as model:
            fitted = fit_context(model, ragged_batch(lengths, left=left), [1, 2])
        found.append([beside(made(fitted, states[cut], cut), given) for cut in (0, 1, 2)])
    for other in found[1:]:
        for one, wanted in zip(other, found[0], strict=True):
            assert np.abs(one - wanted).max() < 5e-3


@pytest.mark.parametrize("chunks", [False, True])
def test_long_texts_are_observed_where_they_enter(chunks: bool) -> None:
    model = tiny_model("bert", "encoder", layers=LAYERS)
    with prunable(model, replace(ZEROS, max_tokens=16, chunks=chunks), "mean"):
        found = fit_context(model, ragged_batch([70, 12, 30] * 12), [1, 2])
    assert found.down.isfinite().all() and found.up.isfinite().all()


@pytest.mark.parametrize(
    ("lengths", "options", "wanted"),
    [
        ([3000] * 64, {"max_tokens": 16}, 64 * 10),  # the first, the last, and a span of eight
        ([30_000] * 4, {"max_tokens": 16}, 4 * 10),
        ([30_000], {"max_tokens": 16, "chunks": True}, 30_000),
    ],
    ids=["of many", "of few", "of one in windows"],
)
def test_of_long_texts_what_enters_is_counted(
    lengths: list[int], options: dict[str, Any], wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where few tokens of many texts enter, all of these texts say something; and some text always does."""
    seen = []
    own = context._Sums.add

    def add(self: Any, states: Tensor, given: Tensor) -> None:
        seen.append(len(states))
        own(self, states, given)

    monkeypatch.setattr(context._Sums, "add", add)
    model = tiny_model("bert", "encoder", layers=LAYERS)
    with prunable(model, replace(ZEROS, **options), "mean"):
        fit_context(model, ragged_batch(lengths), [1, 2])
    assert sum(seen) >= wanted


def test_what_never_changes_says_nothing() -> None:
    """The same text again and again, of two tokens: no number is divided by nothing."""
    batch = {name: x.repeat(40, 1) for name, x in ragged_batch([2]).items()}
    states, given = observed_by_hand(batch)
    with thresholds_of_zero() as model:
        found = fit_context(model, batch, [1])
    assert found.down.isfinite().all() and found.up.isfinite().all()
    for cut in (0, 1):
        assert np.abs(made(found, states[cut], cut) - given).max() < 0.02 * np.abs(given).max()
    one = {name: x[:, :1] for name, x in batch.items()}
    with thresholds_of_zero() as model:
        found = fit_context(model, one, [1])
    states, given = observed_by_hand(one)
    assert np.abs(made(found, states[0]) - given).max() < 1e-3


def test_rank_is_a_third_in_steps_of_64() -> None:
    assert [rank_for(size) for size in (1, 2, 8, 32, 128, 191)] == [1, 1, 2, 10, 42, 63]
    assert [rank_for(size) for size in (192, 256, 312, 384, 512, 768, 1024)] == [64, 64, 64, 128, 128, 256, 320]


@pytest.mark.parametrize("family", ROTARY)
def test_a_family_that_does_not_say_how_keys_turn_has_no_context(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with thresholds_of_zero(family) as model:
        assert can_have_context(model)
        monkeypatch.setattr(type(attachment_of(model).family), "turned", Family.turned)
        assert not can_have_context(model)


@pytest.mark.parametrize("family", ROTARY)
@torch.inference_mode()
def test_keys_are_fitted_as_they_are_before_they_turn(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first layer's, which are linear in the state that enters, or nearly so."""
    monkeypatch.setattr(context, "rank_for", lambda size: size)
    batch = ragged_batch([30, 5, 17, 40, 9, 23, 31, 12] * 3, family=family)
    with thresholds_of_zero(family) as model:
        found, bound = fit_context(model, batch, []), attachment_of(model).family
        [watching] = watched(model, {name: x[:1] for name, x in batch.items()}, 2048, Watching)
        states, layer = watching.joined[0], bound.layers[0]
        _, key, value = bound.project(layer, states, torch.arange(len(states)), None)
        code = apply_affine(states, found.down[0])
        size = attachment_of(model).shape.key_size
        keys, values = apply_affine(code, found.up[0]).split(size, 1)
        heads = [rows.view(len(states), -1, key.shape[2]) for rows in (keys, values)]
        shared = key.shape[1] // heads[0].shape[1]
        turned = bound.turned(layer, heads[0], torch.arange(len(states)))
    most = 0.4 if family == "eurobert" else 0.1
    for guessed, wanted in ((turned, key[:, ::shared]), (heads[1], value[:, ::shared])):
        assert (guessed - wanted).norm() < most * wanted.norm()


@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=60), most=st.integers(1, 400))
def test_a_sample_has_texts_of_all_lengths(lengths: list[int], most: int) -> None:
    """So many tokens, and at most one text more."""
    batch, every = ragged_batch(lengths, width=60), -(-sum(lengths) // most)
    if every // 2 >= len(lengths):
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(context, "_TOKENS", most)
        found = _sample(batch)["attention_mask"].sum(1).tolist()
    assert sum(found) <= most + max(lengths)
    ranked = sorted(lengths)
    assert found == [ranked[place] for place in range(every // 2, len(ranked), every)]
    assert len(found) >= len(lengths) // every and (every > 1 or found == ranked)


# In the search


def test_context_is_tried_by_whoever_decides() -> None:
    with_context, without = (first_rules(5, False, ["map"], given) for given in (True, False))
    assert [replace(rule, context=False) for rule in with_context] == without == first_rules(5, False, ["map"])
    assert all(rule.context for rule in with_context)
    names = [str(rule) for rule in with_context]
    assert all(name.count("as context") == 1 for name in names) and len(set(names)) == len(names)
    assert "gate of attention, departed: map, as context" in names
    assert "attention received step-2, departed: map, as context, separators protected" in names
    assert not any("context" in str(rule) for rule in (*without, *received_rules(schedules(5))))


def test_the_best_rule_is_tried_without_context_too() -> None:
    best = first_rules(5, False, ["map"], True)[0]
    further = further_rules(best, 5, (1, 2, 3), ["map", "state"], pairs=False)
    assert [rule for rule in further if not rule.context] == [replace(best, context=False)]
    assert len(further) == 4 * 3 * 2 + 1  # the best itself, which has the gate alone, is none of them
    assert all(rule.context for rule in spread_rules(best, 5, (1, 2, 3), pairs=False))
    plain = replace(best, context=False)
    assert not any(rule.context for rule in further_rules(plain, 5, (1, 2, 3), ["map"], pairs=False))


def observed_with(cuts: Sequence[int]) -> Observed:
    down = torch.arange(len(cuts) * 2 * 9.0).view(len(cuts), 2, 9)
    return Observed(
        tables={"attention": torch.ones(5)}, probes={("attention", cut): torch.ones(9) for cut in cuts if cut},
        maps={cut: torch.zeros(8, 9) for cut in cuts}, context=tp.LinearContext(cuts, down, torch.ones(4, 16, 3)),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("gate", "cuts", "wanted"),
    [(1.0, (2,), (0,)), (0.5, (2,), (0, 2)), (0.0, (2,), (2,)), (0.0, (1, 2), (1, 2)), (0.25, (1, 4), (0, 1)),
     (0.0, (4,), None)],
)  # fmt: skip
def test_a_method_has_the_context_of_its_own_cuts(gate: float, cuts: tuple[int, ...], wanted: Any) -> None:
    """Where attention received decides after layers that have none, those tokens are gone."""
    rule = Rule("attention", gate, even(cuts, 4), False, "all", (), "state", True)
    observed = observed_with([0, 1, 2, 3])
    found = rule.method(replace(ZEROS, thresholds=[0.0] * 4), observed).context
    if wanted is None:
        assert found is None
        return
    assert found is not None and found.layers == wanted and observed.context is not None
    assert torch.equal(found.down, observed.context.down[[*wanted]]) and torch.equal(found.up, observed.context.up)
    assert replace(rule, context=False).method(replace(ZEROS, thresholds=[0.0] * 4), observed).context is None


@pytest.mark.parametrize("kind", ["classifier", "tagger", "mean", "reranker"])
def test_a_search_tries_context(kind: str) -> None:
    model, found = calibrated(kind, pairs(24, 0) if kind == "reranker" else texts(80, 0))
    names = {fit.rule.removesuffix(", corrected") for fit in found.candidates}
    tried = {name for name in names if "as context" in name}
    assert len(tried) > 6 and any("gate" in name for name in tried) and any("probe" in name for name in tried)
    assert any("attention received" in name for name in tried)
    for fit in found.candidates:
        context = fit.pruner.context
        assert (context is not None) == ("as context" in fit.rule)
        gated = fit.pruner.vocabulary is not None
        assert context is None or (0 in context.layers) == ("gate" in fit.rule) >= gated
    if "as context" in found.chosen.rule:
        assert names & {name.replace(", as context", "") for name in tried}
    assert attachment_of(model).token_pruner.pruner is found.pruner


@pytest.fixture
def context_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is tried has context."""
    monkeypatch.setattr(comparison, "received_rules", lambda *_: [])
    monkeypatch.setattr(comparison, "further_rules", lambda *_: [])


@pytest.mark.usefixtures("context_alone")
@pytest.mark.parametrize("kind", ["classifier", "tagger", "mean", "first"])
def test_a_calibrated_model_with_context(kind: str, tmp_path: Path) -> None:
    """Costs what it says, is saved and loaded, copied, compiled, and taken off again."""
    batch, others = texts(80, 0), texts(80, 9)
    model, found = calibrated(kind, batch)
    dense = tiny_model(head=model_head(kind), layers=3).state_dict()
    assert found.pruner.context is not None and "as context" in found.chosen.rule
    assert found.pruner.context.up.shape == (3, 64, RANK + 1)
    assert found.chosen.relative_flops == pytest.approx(TARGET, abs=0.015)
    assert relative_flops(model, fitted_to(batch, kind, given=False)) == pytest.approx(TARGET, abs=0.015)
    assert relative_flops(model, others) == pytest.approx(TARGET, abs=0.05)
    assert model.config.context_layers == [*found.pruner.context.layers]
    expected = output_of(model, others)
    model.save_pretrained(tmp_path)
    loaded = tp.from_pretrained(tmp_path, model_class=type(model))
    assert_equal(output_of(loaded, others), expected)
    again = attachment_of(loaded).token_pruner.pruner.context
    assert again is not None and again.layers == found.pruner.context.layers
    for name in ("down", "up"):
        assert torch.equal(getattr(again, name), getattr(found.pruner.context, name))
    assert relative_flops(loaded, others) == pytest.approx(relative_flops(model, others), rel=1e-9)
    assert_equal(output_of(copy.deepcopy(model), others), expected)
    engine = tp.compile(loaded, "float32")
    with tp.record(engine) as trace:
        fast = output_of(engine, others)
    assert tp.count_flops(engine, trace).relative == pytest.approx(relative_flops(model, others), abs=2e-3)
    valid = others["attention_mask"].bool() if kind in ("tagger", "mean") else ...
    assert ((fast - expected)[valid].abs() < 1e-4).double().mean() > 0.99  # but for a decision at the edge
    tp.unprune(model)
    assert not hasattr(model.config, "context_layers")
    assert all(torch.equal(x, dense[name]) for name, x in model.state_dict().items())


def model_head(kind: str) -> str:
    return {"classifier": "sequence", "tagger": "token"}.get(kind, "encoder")


def output_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        output = model(**batch)
    found: Tensor = output.logits if "logits" in output else output.last_hidden_state
    return found


@pytest.mark.usefixtures("context_alone")
@pytest.mark.parametrize("kind", ["classifier", "mean"])
def test_several_budgets_with_context(kind: str, tmp_path: Path) -> None:
    others, asked = texts(80, 9), [0.7, 0.45, 0.55]
    model, found = calibrated(kind, texts(80, 0), asked)
    assert [fit.relative_flops for fit in found.fits] == pytest.approx(sorted(asked), abs=0.015)
    contexts = [fit.pruner.context for fit in found.fits]
    assert contexts[0] is not None and {one.layers for one in contexts if one} == {contexts[0].layers}
    model.save_pretrained(tmp_path)
    loaded = tp.from_pretrained(tmp_path, model_class=type(model))
    engine = tp.compile(loaded, "float32")
    costs = []
    for budget in (*sorted(asked), 1.0):
        for one in (model, loaded, engine):
            tp.set_budget(one, budget)
        with tp.record(engine) as trace:
            fast = output_of(engine, others)
        wanted = output_of(model, others)
        assert_equal(output_of(loaded, others), wanted)
        costs.append(relative_flops(model, others))
        assert tp.count_flops(engine, trace).relative == pytest.approx(costs[-1], abs=2e-3)
        valid = others["attention_mask"].bool() if kind == "mean" else ...
        assert ((fast - wanted)[valid].abs() < 1e-4).double().mean() > 0.99
    assert costs[:-1] == pytest.approx(sorted(asked), abs=0.03) and costs == sorted(costs)


def test_the_same_seed_gives_the_same_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "further_rules", lambda *_: [])
    monkeypatch.setattr(comparison, "received_rules", lambda *_: [])
    first, again = (calibrated("mean", texts(64, 0), seed=5)[1].pruner.context for _ in range(2))
    assert first is not None and again is not None and first.layers == again.layers
    assert torch.equal(first.down, again.down) and torch.equal(first.up, again.up)


@pytest.mark.parametrize("family", ["modernbert", "nomic_bert"])
def test_a_family_with_rotary_positions_is_calibrated_with_it(family: str) -> None:
    model = tiny_model(family, "encoder", layers=3)
    found = tp.calibrate(model, texts(64, 0), TARGET, reads="mean")
    assert sum("as context" in fit.rule for fit in found.candidates) > 5


@pytest.mark.parametrize("options", [{"search": schedules(2)[:2]}, {"summary_tokens": "segment"}], ids=str)
def test_what_the_caller_asks_for_has_no_context(options: dict[str, Any]) -> None:
    _, found = calibrated("classifier", texts(64, 0), **options)
    assert not any(fit.pruner.context or "context" in fit.rule for fit in found.candidates)


@pytest.mark.usefixtures("context_alone")
def test_without_gates_context_is_of_what_entered() -> None:
    _, found = calibrated("classifier", texts(64, 0), vocabulary=False)
    assert found.pruner.context is not None and found.pruner.vocabulary is None
    assert all(fit.pruner.context and 0 not in fit.pruner.context.layers for fit in found.candidates)


@pytest.mark.usefixtures("context_alone")
@pytest.mark.parametrize("options", [{"max_tokens": 24}, {"max_tokens": 24, "chunks": True}], ids=str)
def test_long_texts_with_context(options: dict[str, Any]) -> None:
    model, found = calibrated("mean", texts(48, 0), **options)
    assert found.pruner.context is not None
    assert output_of(model, texts(8, 3)).isfinite().all()


def test_context_keeps_more_of_the_dense_model() -> None:
    """Half of all words enter: the same gate with it is nearer."""
    model, batch = tiny_model(head="encoder", layers=LAYERS, initializer_range=0.15), texts(80, 0)
    with prunable(model, ZEROS, "mean"):
        found = fit_context(model, batch, [1, 2])
    others = texts(40, 9)
    valid = others["attention_mask"].bool()
    with torch.no_grad():
        dense = model(**others).last_hidden_state
    gate = tp.VocabularyGate(torch.rand(VOCABULARY, generator=torch.Generator().manual_seed(0)), 0.5)
    errors = []
    for setting in (None, found):
        with pruned(model, replace(ZEROS, vocabulary=gate, context=setting)), torch.no_grad():
            states = model(**others).last_hidden_state
        entered = valid & (gate.scores[others["input_ids"]] >= 0.5)
        errors.append((states - dense)[entered].square().mean())
    assert errors[1] < 0.5 * errors[0]


def test_step_is_where_attention_received_decides_first() -> None:
    rule = first_rules(5, False, ["state"], True)[-1]
    assert rule.schedule == step(2, 5) and not rule.probes and str(rule).startswith("attention received step-2")
