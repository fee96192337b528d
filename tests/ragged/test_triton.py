"""The GPU kernels and what is built on them: compiled where there is a GPU, elsewhere interpreted on the CPU."""

import itertools
import json
import os
import re
import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import GridExecutor

import token_pruning as tp
from tests.tiny import FAMILIES, assert_close, assert_equal, pruned, ragged_batch, same_survivors, tiny_model
from token_pruning.pruners.fitted import Probes
from token_pruning.pruners.importance import SCORING_MODES, ScoringMode, common_normalizer, importance_scores
from token_pruning.ragged import drop_below, first_token_attention, fused, packed_attention
from token_pruning.ragged import triton as kernels
from token_pruning.ragged.layout import Layout, drop, layout_from_mask, pack
from token_pruning.ragged.triton import compaction
from token_pruning.ragged.triton.attention import attend, column_sums

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
SCALING = 0.3
LENGTHS = st.lists(st.one_of(st.integers(0, 5), st.integers(1, 150)), min_size=1, max_size=5)
EXAMPLES = 25 if GPU else 8  # the interpreter takes its time
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}


def layout_of(lengths: list[int]) -> Layout:
    return layout_from_mask((torch.arange(max(1, *lengths))[None] < torch.tensor(lengths)[:, None]).to(DEVICE))


def random_rows(rows: int, heads: int, dim: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """Queries, keys and values as a model has them: parts of one projection, not contiguous."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([4 / dim**0.5, 1, 1]).view(1, 3, 1, 1)
    rows_ = torch.randn(rows, 3, heads, dim, generator=generator) * scale
    return list(rows_.to(DEVICE, dtype).unbind(1))


def by_the_book(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], window: int | None, positions: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Context, log-sum-exp ``[heads, rows]``, received attention ``[rows]``: one softmax per sequence, in float64."""
    q, k, v = (x.double().cpu().transpose(0, 1) for x in (query, key, value))
    parts = []
    for rows in itertools.starmap(slice, itertools.pairwise(itertools.accumulate(lengths, initial=0))):
        logits = q[:, rows] @ k[:, rows].mT * SCALING
        if window is not None and positions is not None:
            where = positions[rows].cpu()
            logits = logits.masked_fill((where[:, None] - where).abs() > window, -torch.inf)
        weights = logits.softmax(-1)
        parts.append((weights @ v[:, rows], logits.logsumexp(-1), weights.sum(1).mean(0)))
    context, lse, received = (torch.cat(x, -2 if x[0].dim() == 3 else -1) for x in zip(*parts, strict=True))
    return context.transpose(0, 1), lse, received


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    difference = (actual.double().cpu() - expected).norm()
    return float(difference / expected.norm().clamp(min=1e-30))


def check_kernels(
    lengths: list[int], heads: int, dim: int, dtype: torch.dtype, seed: int = 0, window: int | None = None
) -> None:
    layout = layout_of(lengths)
    query, key, value = random_rows(layout.total, heads, dim, dtype, seed)
    positions = None
    if window is not None:  # as after many layers of pruning: gaps between the tokens left
        steps = torch.randint(1, 5, (layout.total,), generator=torch.Generator().manual_seed(seed))
        positions = torch.cat([part.cumsum(0) for part in steps.split(lengths)]).to(DEVICE)
    cu_seqlens, longest = layout.cu_seqlens, max(lengths)
    context, lse = attend(
        query, key, value, cu_seqlens, cu_seqlens, longest, SCALING,
        window=window, query_positions=positions, key_positions=positions,
    )  # fmt: skip
    sums = column_sums(query, key, lse, cu_seqlens, longest, SCALING, window=window, positions=positions)
    expected_context, expected_lse, expected_received = by_the_book(query, key, value, lengths, window, positions)
    assert context.dtype == dtype and lse.dtype == sums.dtype == torch.float32
    tolerance = TOLERANCE[dtype]
    assert relative_error(context, expected_context) <= tolerance
    assert relative_error(lse, expected_lse) <= tolerance
    assert relative_error(sums.mean(0), expected_received) <= tolerance


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("dim", [32, 64, 96, 128])
def test_kernels_equal_float64(dim: int, dtype: torch.dtype) -> None:
    check_kernels([1, 130, 17, 64, 65, 127], 2, dim, dtype)


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 63, 64, 65, 128, 129, 255, 257, 512, 513])
def test_kernels_at_every_length(length: int) -> None:
    check_kernels([length], 1, 32, torch.float32, seed=length)
    check_kernels([length], 1, 64, torch.bfloat16, seed=length)


@settings(max_examples=EXAMPLES)
@given(lengths=LENGTHS, dim=st.sampled_from([8, 24, 32, 256]), seed=st.integers(0, 99))
@example(lengths=[0, 7, 0], dim=32, seed=0)
@example(lengths=[150, 1, 64, 0, 65], dim=24, seed=0)
def test_kernels_on_ragged_batches(lengths: list[int], dim: int, seed: int) -> None:
    if sum(lengths):
        check_kernels(lengths, 2, dim, torch.float32, seed)


@settings(max_examples=EXAMPLES)
@given(lengths=LENGTHS, window=st.sampled_from([0, 1, 5, 64, 1000]), seed=st.integers(0, 99))
@example(lengths=[150, 3, 129], window=5, seed=0)
def test_windows_count_original_positions(lengths: list[int], window: int, seed: int) -> None:
    if sum(lengths):
        check_kernels(lengths, 2, 32, torch.float32, seed, window)


def test_windows_by_the_layouts_own_positions() -> None:
    layout = layout_of([40, 9])
    rows, heads = layout.total, 2
    keep = torch.arange(rows, device=DEVICE) % 3 != 1
    fewer, _, _ = drop(layout, keep)
    query, key, value = random_rows(fewer.total, heads, 32)
    context, received = fused.fused_attention(query, key, value, fewer, SCALING, window=4)
    expected, _, expected_received = by_the_book(query, key, value, fewer.lengths, 4, fewer.indices % fewer.width)
    assert relative_error(context, expected) <= 1e-5
    assert received is not None and relative_error(received, expected_received) <= 1e-5


def test_kernels_never_read_or_write_outside_their_rows() -> None:
    layout = layout_of([5, 70])
    guarded = torch.full((layout.total + 64, 3, 2, 32), torch.nan, device=DEVICE)
    guarded[32:-32] = torch.stack(random_rows(layout.total, 2, 32), 1)
    query, key, value = guarded[32:-32].unbind(1)
    context, lse = attend(query, key, value, layout.cu_seqlens, layout.cu_seqlens, 70, SCALING)
    sums = column_sums(query, key, lse, layout.cu_seqlens, 70, SCALING)
    expected, expected_lse, _ = by_the_book(query, key, value, [5, 70], None, None)
    assert relative_error(context, expected) <= 1e-5 and relative_error(lse, expected_lse) <= 1e-5
    assert sums.sum().item() == pytest.approx(2 * layout.total, rel=1e-5)  # every query hands out 1 in every head


def test_kernels_give_the_same_bits_again_and_alone() -> None:
    lengths = [33, 100, 1, 64]
    layout = layout_of(lengths)
    query, key, value = random_rows(layout.total, 3, 32)

    def run(which: Layout, rows: slice) -> tuple[Tensor, Tensor | None]:
        return fused.fused_attention(query[rows], key[rows], value[rows], which, SCALING)

    together, again = run(layout, slice(None)), run(layout, slice(None))
    alone = run(layout_of([100]), slice(33, 133))
    for one, two, single in zip(together, again, alone, strict=True):
        assert one is not None and two is not None and single is not None
        if GPU:
            assert torch.equal(one, two) and torch.equal(one[33:133], single)
        else:  # the interpreter's products are NumPy's
            assert_equal(one, two)
            assert_equal(one[33:133], single)


@settings(max_examples=60)
@given(
    mask=st.integers(1, 6).flatmap(
        lambda width: st.lists(st.lists(st.booleans(), min_size=width, max_size=width), min_size=1, max_size=5)
    ),
    seed=st.integers(0, 99),
)
@example(mask=[[False, False]], seed=0)
@example(mask=[[True] * 6] * 5, seed=3)
def test_compaction_equals_dropping_by_masks(mask: list[list[bool]], seed: int) -> None:
    layout = layout_from_mask(torch.tensor(mask).to(DEVICE))
    keep = (torch.rand(layout.total, generator=torch.Generator().manual_seed(seed)) < 0.6).to(DEVICE)
    check_compaction(layout, keep)


def test_compaction_of_sequences_longer_than_a_block() -> None:
    layout = layout_of([3000, 0, 1024, 1025, 1])
    for share in (0.0, 0.3, 1.0):
        check_compaction(layout, (torch.rand(layout.total, generator=torch.Generator()) < share).to(DEVICE))


def check_compaction(layout: Layout, keep: Tensor) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "usable", lambda device: False)
        expected, expected_kept, expected_dropped = drop(layout, keep)
        patch.setattr(kernels, "usable", lambda device: True)
        fewer, kept, dropped = drop(layout, keep)
    assert_same_layout(fewer, expected)
    for one, two in ((kept, expected_kept), (dropped, expected_dropped)):
        assert one.dtype == two.dtype and torch.equal(one, two)


def assert_same_layout(actual: Layout, expected: Layout) -> None:
    for one, two in (
        (actual.indices, expected.indices), (actual.cu_seqlens, expected.cu_seqlens),
        (actual.lengths_tensor, expected.lengths_tensor), (actual.first_rows, expected.first_rows),
    ):  # fmt: skip
        assert one.dtype == two.dtype and torch.equal(one, two)
    assert actual.lengths == expected.lengths and actual.width == expected.width


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=5),
    mode=st.sampled_from(SCORING_MODES),
    protects=st.booleans(),
    seed=st.integers(0, 99),
)
@example(lengths=[0, 0], mode="mean", protects=True, seed=0)
@example(lengths=[100, 0, 16, 17, 1], mode="mean_norm", protects=True, seed=0)
@example(lengths=[1, 2] * 20, mode="mean", protects=False, seed=0)  # more sequences than a block
def test_thresholds_by_kernel_decide_as_plain_ones(
    lengths: list[int], mode: ScoringMode, protects: bool, seed: int
) -> None:
    layout, generator = layout_of(lengths), torch.Generator().manual_seed(seed)
    received = (torch.rand(layout.total, generator=generator) * 2).to(DEVICE)
    expected_scores = importance_scores(received.cpu(), layout_on_cpu(layout), mode, 83).to(DEVICE)  # 1/83 is inexact
    # One score is the threshold, and so stays: a quotient that is rounded otherwise falls on the wrong side.
    of = expected_scores[int(torch.randint(layout.total, (), generator=generator))] if layout.total else torch.tensor(0)
    thresholds = torch.stack([torch.inf * torch.ones_like(of), of]).float().to(DEVICE)
    protected = None
    keep = expected_scores >= thresholds[1]
    keep[layout.first_rows] = True
    if protects:
        protected = (torch.rand(layout.batch_size * layout.width, generator=generator) < 0.2).to(DEVICE)
        keep |= protected[layout.indices]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "usable", lambda device: False)
        expected, expected_kept, expected_dropped = drop(layout, keep)

    divisor = common_normalizer(mode, 83)
    for wanted in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compaction, "_BLOCK", 16)
            fewer, kept, dropped, scores = drop_below(
                layout, received, thresholds, 1, divisor=divisor, protected=protected, dropped=wanted, scores=wanted
            )
        assert_same_layout(fewer, expected)
        assert torch.equal(kept, expected_kept)
        if wanted:
            assert dropped is not None and torch.equal(dropped, expected_dropped)
            assert scores is not None and torch.equal(scores, expected_scores)
        else:
            assert dropped is None and scores is None


def layout_on_cpu(layout: Layout) -> Layout:
    return Layout(layout.indices.cpu(), layout.cu_seqlens.cpu(), layout.width)


# Whole models. Without a GPU the fused path is switched on by hand.


@pytest.fixture
def fuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "usable", lambda device: True)


def plain(model: Any, batch: dict[str, Tensor]) -> tuple[Any, tp.Trace]:
    """A forward pass on the CPU, in plain PyTorch."""
    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), tp.record(model) as trace:
        patch.setattr(kernels, "usable", lambda device: False)
        return model(**batch), trace


def on_device(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(DEVICE) for name, tensor in batch.items()}


METHODS = {
    "absolute": tp.FixedThreshold(final_token_threshold=1.1, scoring_mode="relative"),
    "absolute, by length": tp.FixedThreshold(final_token_threshold=0.05, scoring_mode="mean_norm"),
    "absolute, of so many": tp.FixedThreshold(final_token_threshold=0.05, max_seq_length=21),
    "learned": tp.LearnedThreshold(final_token_threshold=1.1, scoring_mode="relative"),
    "protected": tp.FixedThreshold(final_token_threshold=1.3, scoring_mode="relative", protect=["separators"]),
    "probes": tp.FixedThreshold(
        thresholds=[0.5, 0.1, 0.5],
        scoring_mode="mean_norm",
        probes=Probes([2], torch.randn(1, 33, generator=torch.Generator().manual_seed(0))),
    ),
    "top-k": tp.TopK(token_keep_rate=0.2, keep_all_layers=1),
    "relative": tp.RelativeThreshold(token_threshold=0.4),
    "summaries": tp.FixedThreshold(final_token_threshold=1.1, scoring_mode="relative", summary_tokens="segment"),
    "context": tp.FixedThreshold(
        final_token_threshold=1.1,
        scoring_mode="relative",
        context=tp.LinearContext([1], torch.eye(8, 33)[None], torch.eye(64, 9).expand(3, -1, -1)),
    ),
    "none": tp.Unpruned(),
}


def small_model(family: str = "bert", head: str = "sequence") -> Any:
    """The interpreter's time goes by layers and heads."""
    return tiny_model(family, head, layers=3, **{"n_heads" if family == "distilbert" else "num_attention_heads": 2})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("head", ["sequence", "token"])
def test_fused_model_equals_the_plain_one(fuse: None, method: str, head: str) -> None:
    check_model(small_model("bert", head), METHODS[method], [9, 1, 20])


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_model_of_every_family(fuse: None, family: str) -> None:
    check_model(small_model(family), METHODS["absolute"], [9, 1, 20])


def test_fused_model_on_empty_sequences_and_padding_on_the_left(fuse: None) -> None:
    model = small_model()
    check_model(model, METHODS["absolute"], [0, 12, 0], width=12)
    check_model(model, METHODS["absolute"], [0, 0], width=4)
    check_model(model, METHODS["absolute"], [5, 20], left=True)


def check_model(model: Any, method: tp.Pruner, lengths: list[int], **how: Any) -> None:
    batch = ragged_batch(lengths, family=model.config.model_type, **how)
    with pruned(model, method):
        expected, expected_trace = plain(model, batch)
        model.to(DEVICE)
        try:
            with torch.no_grad(), tp.record(model) as trace:
                recorded = model(**on_device(batch))
            with torch.no_grad():
                output = model(**on_device(batch))
        finally:
            model.to("cpu")
    assert same_survivors(trace, expected_trace)
    for logits in (recorded.logits, output.logits):
        assert_close(logits.cpu()[batch["attention_mask"].any(1)], expected.logits[batch["attention_mask"].any(1)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_models_decide_in_float32(fuse: None, dtype: torch.dtype) -> None:
    batch = ragged_batch([40, 7, 25])
    model = tiny_model(initializer_range=0.1)
    with pruned(model, METHODS["absolute"]):
        expected, expected_trace = plain(model, batch)
        model.to(DEVICE, dtype)
        assert model.token_pruner.thresholds.dtype == torch.float32
        with torch.no_grad(), tp.record(model) as trace:
            output = model(**on_device(batch))
        records = trace.passes[0].layers.values()
        assert all(record.scores.dtype == torch.float32 for record in records if record.scores is not None)
    kept, expected_kept = (torch.cat(t.survived_layers).cpu() for t in (trace, expected_trace))
    assert (kept == expected_kept).double().mean() > 0.9
    assert relative_error(output.logits, expected.logits.double()) < 0.1


def test_layers_that_drop_nothing_compute_no_scores(fuse: None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def watch(*args: Any, needs_importance: bool = True, **kwargs: Any) -> Any:
        asked.append(needs_importance)
        return fused.fused_attention(*args, needs_importance=needs_importance, **kwargs)

    monkeypatch.setattr("token_pruning.ragged.packed.fused_attention", watch)
    model, batch = tiny_model("bert", "token").to(DEVICE), on_device(ragged_batch([9, 30]))
    some = tp.FixedThreshold(thresholds=[0.0, 0.9, 0.0, 0.9], scoring_mode="relative")
    for method, expected in (
        (some, [False, True, False, True]),
        (tp.FixedThreshold(final_token_threshold=0.01, prune_layers=[3]), [False, False, True, False]),
        (tp.Unpruned(), [False] * 4),
    ):
        asked.clear()
        with pruned(model, method), torch.no_grad():
            model(**batch)
        assert asked == expected
    with pruned(model, some), torch.no_grad(), tp.record(model):
        model(**batch)
    assert asked[-4:] == [True] * 4  # a trace shows every score


class FakeVarlen(SimpleNamespace):
    """``torch.nn.attention.varlen`` for any device, in plain PyTorch."""

    AuxRequest = SimpleNamespace

    @staticmethod
    def varlen_attn(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *, return_aux: Any,
        scale: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        assert return_aux.lse and max_q == int(cu_q.diff().max()) and max_k == int(cu_k.diff().max())
        contexts, sums = [], []
        for number in range(len(cu_q) - 1):
            rows, columns = (slice(cu[number], cu[number + 1]) for cu in (cu_q, cu_k))
            logits = torch.einsum("qhd,khd->hqk", q[rows], k[columns]) * scale
            contexts.append(torch.einsum("hqk,khd->qhd", logits.softmax(-1), v[columns]))
            sums.append(logits.logsumexp(-1))
        return torch.cat(contexts), torch.cat(sums, 1)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_varlen", lambda: FakeVarlen)
    monkeypatch.setattr(fused, "_library_takes", lambda query: True)


@pytest.mark.parametrize("head", ["sequence", "token"])
def test_hard_stage_trains_through_the_librarys_attention(fuse: None, library: None, head: str) -> None:
    batch = on_device(ragged_batch([9, 1, 30, 17]))
    gradients = []
    for usable in (True, False):
        model = tiny_model("bert", head, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0).to(DEVICE)
        with pruned(model.train(), METHODS["absolute"]), pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "usable", lambda device, usable=usable: usable)
            with tp.record(model) as trace:
                logits = model(**batch).logits
            mask = batch["attention_mask"].bool() if head == "token" else slice(None)
            logits[mask].square().mean().backward()
            gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
            assert int(trace.ffn_lengths.sum()) < int(trace.attention_lengths.sum())
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert_close(gradient, gradients[1][name], 1e-4, name)


def test_what_needs_the_plain_path_takes_it(fuse: None, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = layout_of([5, 3])
    rows = random_rows(layout.total, 2, 32)

    def can(rows: list[Tensor], dropout: float = 0.0, differentiable_importance: bool = False) -> bool:
        query, key, value = rows
        return fused.can_fuse(query, key, value, layout, dropout, differentiable_importance=differentiable_importance)

    assert can(rows) and can(rows, differentiable_importance=True)  # without a gradient
    assert not can(rows, dropout=0.1)
    assert not can(random_rows(layout.total, 1, 264))
    assert not can([x.double() for x in rows])
    trained = [x.detach().requires_grad_() for x in rows]
    monkeypatch.setattr(fused, "_library_takes", lambda query: False)
    assert not can(trained)
    monkeypatch.setattr(fused, "_library_takes", lambda query: True)
    assert can(trained) and not can(trained, differentiable_importance=True)
    with torch.no_grad():
        assert can(trained, differentiable_importance=True)
    monkeypatch.setattr(kernels, "usable", lambda device: False)
    assert not can(rows)


def test_soft_stage_learns_thresholds_beside_the_kernels(fuse: None) -> None:
    model = tiny_model("bert").to(DEVICE).train()
    tp.prune(model, tp.LearnedThreshold(final_token_threshold=0.01, temperature=1e-2))
    with tp.record(model) as trace:
        model(**on_device(ragged_batch([9, 30])))
    trace.soft_rates.sum().backward()
    assert model.token_pruner.thresholds.grad.abs().sum() > 0


class Operations(TorchDispatchMode):
    """Counts what PyTorch is asked for, by name, and the kernels launched; what the interpreter does is left out."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()
        run = GridExecutor.__call__

        def launch(executor: Any, *args: Any, **kwargs: Any) -> Any:
            self.launches[executor.fn.__name__] += 1
            with _disable_current_modes():
                return run(executor, *args, **kwargs)

        patch.setattr(GridExecutor, "__call__", launch)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(GPU, reason="counts under the interpreter")
@pytest.mark.parametrize("mode", SCORING_MODES)
def test_a_pruning_layer_asks_for_little(fuse: None, monkeypatch: pytest.MonkeyPatch, mode: ScoringMode) -> None:
    """All that stands between the host and the next layer: a GPU waits for it, however small the kernels are."""
    model, batch = tiny_model("bert", "sequence"), ragged_batch([40, 7, 25])
    found = []
    threshold = {"relative": 1.1, "mean_norm": 1.1 / 40, "mean": 1.1 / 128}[mode]
    for layers in ([], [1], [1, 2], [1, 2, 3]):
        thresholds = [threshold * (layer in layers) for layer in range(1, 5)]
        method = tp.FixedThreshold(thresholds=thresholds, scoring_mode=mode)
        with pruned(model, method), torch.inference_mode(), monkeypatch.context() as patch:
            operations = Operations(patch)
            with operations:
                model(**batch)
        found.append(operations)
    most = 22  # of the first: with it, positions are looked up in every later layer
    for before, after in itertools.pairwise(found):
        added = after.names - before.names
        assert after.launches - before.launches == Counter(["_column_sums", "_decide", "_split"])
        assert added.total() <= most, added
        most = 14
    assert added.keys().isdisjoint({"nonzero", "_local_scalar_dense"}), added  # what would wait for the GPU


def test_first_tokens_by_the_library(fuse: None, library: None) -> None:
    layout = layout_of([5, 1, 40])
    query, key, value = random_rows(layout.total, 2, 32)
    first = query[layout.first_rows]
    fast = first_token_attention(first, key, value, layout, SCALING)
    expected, _, _ = by_the_book(query, key, value, layout.lengths, None, None)
    assert relative_error(fast, expected[layout.first_rows.cpu()]) <= 1e-5


def test_kernels_want_a_gpu() -> None:
    assert not kernels.usable(torch.device("cpu"))
    assert kernels.usable(torch.device("cuda")) == kernels._installed()


def test_kernels_compile_for_gpus_and_fit_their_registers() -> None:
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2 * (6 * 2 + 2 + 5)
    for line in lines:
        found = re.search(r"stack (\d+)", line)
        assert found and int(found[1]) <= 128, line  # bytes per thread; an unlucky shape of blocks needs hundreds


@pytest.mark.skipif(GPU, reason="make gpu runs the benchmark itself")
def test_the_gpu_benchmark_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
    options = "--device cpu --shapes tiny --dtypes float32 --lengths 8 --batch-sizes 2 --passes 1 --no-compile"
    monkeypatch.setattr(sys, "argv", [str(script), *options.split(), "--output", str(tmp_path / "trial")])
    monkeypatch.setattr(sys, "path", [str(script.parent), *sys.path])
    runpy.run_path(str(script), run_name="__main__")
    capsys.readouterr()
    (run,) = json.loads((tmp_path / "trial.json").read_text(encoding="utf-8"))["runs"]
    assert set(run["engines"]) >= {"transformers, SDPA, padded", "token-pruning, unpruned", "token-pruning, pruned"}
    for name, engine in run["engines"].items():  # all the same model, but for what is pruned
        assert engine["logit_difference"] < (1e-5 if engine["relative_flops"] in (1.0, unpruned(run)) else 1.0), name
    assert run["engines"]["token-pruning, pruned"]["relative_flops"] < unpruned(run)
    assert (tmp_path / "trial.md").exists() and (tmp_path / "trial.png").exists()


def unpruned(run: dict[str, Any]) -> float:
    return float(run["engines"]["token-pruning, unpruned"]["relative_flops"])


# What only a GPU can show.


@pytest.mark.cuda
@pytest.mark.parametrize("dim", [32, 64, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_library_and_kernels_agree(dim: int, dtype: torch.dtype) -> None:
    lengths = [1, 130, 17, 512, 65, 128]
    layout = layout_of(lengths)
    query, key, value = random_rows(layout.total, 12, dim, dtype)
    assert fused._library_takes(query)
    cu_seqlens = layout.cu_seqlens
    context, lse = fused._library_attention(query, key, value, cu_seqlens, cu_seqlens, 512, 512, SCALING)
    own_context, own_lse = attend(query, key, value, cu_seqlens, cu_seqlens, 512, SCALING)
    assert lse.shape == own_lse.shape
    assert relative_error(context, own_context.double().cpu()) <= 1e-2
    assert relative_error(lse, own_lse.double().cpu()) <= 1e-3


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_training_in_half_precision(dtype: torch.dtype) -> None:
    batch = on_device(ragged_batch([30, 9, 17]))
    losses = []
    model = tiny_model("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).to(DEVICE).train()
    tp.prune(model, METHODS["absolute"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(20):
        with torch.autocast("cuda", dtype):
            loss = model(**batch, labels=torch.tensor([0, 1, 2], device=DEVICE)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@pytest.mark.cuda
def test_one_synchronisation_per_pruning_layer() -> None:
    model = tiny_model("bert", "token").to(DEVICE, torch.bfloat16)
    batch = on_device(ragged_batch([30, 9, 17]))
    counts = []
    for method in (tp.Unpruned(), tp.FixedThreshold(final_token_threshold=1.1, scoring_mode="relative")):
        with pruned(model, method), torch.inference_mode():
            model(**batch)
            torch.cuda.set_sync_debug_mode("warn")
            try:
                with pytest.warns(UserWarning) as caught:
                    model(**batch)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            counts.append(sum("synchroniz" in str(warning.message) for warning in caught))
    unpruned, with_pruning = counts
    assert with_pruning <= unpruned + 1 + 4  # the thresholds, and four layers


@pytest.mark.cuda
def test_large_batches_on_the_gpu() -> None:
    check_kernels([512] * 40 + [1, 300], 12, 64, torch.bfloat16)
    layout = layout_of([512] * 40)
    query, key, value = random_rows(layout.total, 12, 64, torch.bfloat16)
    context, received = packed_attention(query, key, value, layout, SCALING)
    assert received is not None and context.shape == query.shape
    assert received.sum().item() == pytest.approx(layout.total, rel=1e-3)


@pytest.mark.cuda
def test_packing_on_the_gpu() -> None:
    layout = layout_of([5, 0, 3])
    states = torch.randn(3, 5, 4, device=DEVICE)
    assert torch.equal(pack(states, layout), torch.cat([states[0], states[2, :3]]))
