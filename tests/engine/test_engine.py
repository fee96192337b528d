"""The engine against the masked reference: every family, dtype and kernel level."""

import copy
import gc
import os
import pickle
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import token_pruning as tp
from tests.tiny import (
    FAMILIES,
    HEADS,
    PAD,
    assert_close,
    assert_equal,
    decision_margin,
    outputs,
    pruned,
    ragged_batch,
    same_survivors,
    tiny_config,
    tiny_model,
)
from token_pruning.engine import compiled as compiling
from token_pruning.engine import native
from token_pruning.engine.library import KERNELS_VARIABLE, LEVELS, Shape, check_interface, levels_here, load_library
from token_pruning.ragged import PackedTokens, layout_from_mask

LIBRARY = load_library()
NATIVE = levels_here(LIBRARY)
DTYPES = ("float32", "bfloat16", "int8")
WORST = {"float32": 1e-4, "bfloat16": 2e-2, "int8": 5e-2}  # bfloat16 and int8 relative to the largest output
PRUNERS = (
    None,
    tp.FixedThreshold(final_token_threshold=0.0119),
    tp.FixedThreshold(final_token_threshold=1.03, scoring_mode="mean_norm"),
    tp.TopK(token_keep_rate=0.2),
    tp.RelativeThreshold(token_threshold=0.4),
    tp.RisingThreshold(final_token_threshold=0.7),
    tp.FixedThreshold(final_token_threshold=1.52, scoring_mode="relative", summary_tokens="segment"),
    tp.TopK(token_keep_rate=0.2, summary_tokens="shared"),
)
LENGTHS = (5, 40, 1, 33, 16, 17, 70)


def tiled_model(family: str = "bert", head: str = "sequence", **overrides: Any) -> Any:
    """A model whose sizes fit tiles of every level, with weights small enough for half precision."""
    sizes = (
        {"dim": 128, "hidden_dim": 192} if family == "distilbert" else {"hidden_size": 128, "intermediate_size": 192}
    )
    if family == "electra":
        sizes["embedding_size"] = 64
    return tiny_model(family, head, **{**sizes, "initializer_range": 0.05, **overrides})


def own_levels(dtype: str) -> tuple[str, ...]:
    """This processor's kernel levels that have products of their own for ``dtype``."""
    return tuple(level for level in NATIVE if LIBRARY and LIBRARY.tp_describe(LEVELS.index(level), DTYPES.index(dtype)))


def levels(dtype: str) -> tuple[str, ...]:
    return own_levels(dtype) if dtype == "int8" else ("torch", *own_levels(dtype))


@pytest.fixture(params=["torch", *NATIVE])
def any_level(request: Any, monkeypatch: Any) -> str:
    monkeypatch.setenv(KERNELS_VARIABLE, request.param)
    return str(request.param)


@pytest.fixture(params=levels("float32"))
def level(request: Any, monkeypatch: Any) -> str:
    monkeypatch.setenv(KERNELS_VARIABLE, request.param)
    return str(request.param)


@pytest.fixture
def model() -> Any:
    return tiled_model()


def same(actual: Tensor, expected: Tensor, level: str) -> None:
    """To the last bit from the package's own kernels."""
    if level == "torch":
        assert_equal(actual, expected)
    else:
        assert torch.equal(actual, expected)


def test_the_library_was_built() -> None:
    """Tests below run on what there is; here there must be everything."""
    assert LIBRARY is not None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_engine_equals_the_masked_reference(family: str, dtype: str, any_level: str) -> None:
    if any_level not in levels(dtype):
        return
    model, batch = tiled_model(family), ragged_batch(LENGTHS, family=family)
    for pruner in PRUNERS:
        method = pruner or tp.Unpruned()
        with pruned(model, method, "masked"), tp.record(model) as expected, torch.no_grad():
            reference = model(**batch).logits
        with pruned(model, method):
            engine = tp.compile(model, dtype, threads=1)
        assert f"kernels: {'PyTorch' if any_level == 'torch' else any_level}" in engine.explain()
        with tp.record(engine) as actual:
            logits = engine(**batch).logits
        assert_close(
            engine(**batch).logits, logits, WORST[dtype] if any_level == "torch" else 0, "recording changed it"
        )
        if dtype == "float32":
            assert decision_margin(expected, 4) > 1e-6, "choose another threshold"
            assert same_survivors(actual, expected), pruner
            assert_close(logits, reference, 1e-4, f"{pruner}")
            assert torch.equal(actual.attention_lengths, expected.attention_lengths)
            assert torch.equal(actual.ffn_lengths, expected.ffn_lengths)
            continue
        same = [torch.equal(a, b) for a, b in zip(actual.survived_layers, expected.survived_layers, strict=True)]
        agreeing = sum((a == b).sum() for a, b in zip(actual.survived_layers, expected.survived_layers, strict=True))
        assert agreeing / sum(LENGTHS) > 0.95, pruner
        difference = (logits - reference).abs().amax(-1)[torch.tensor(same)].max()
        assert difference <= WORST[dtype] * reference.abs().max(), (pruner, difference, reference.abs().max())


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_head_returns_what_the_model_returns(family: str, head: str, level: str) -> None:
    model, batch = tiled_model(family, head), ragged_batch(LENGTHS, family=family)
    valid = batch["attention_mask"].bool()
    for pruner in (tp.Unpruned(), PRUNERS[1]):
        with pruned(model, pruner, "masked"), torch.no_grad():
            expected = model(**batch)
        with pruned(model, pruner):
            actual = tp.compile(model, "float32", threads=1)(**batch)
        assert type(actual) is type(expected)
        assert outputs(actual).keys() == outputs(expected).keys()
        for name, value in outputs(actual).items():
            reference = expected[name]
            if value.shape[:2] == valid.shape:
                value, reference = value[valid], reference[valid]
            assert_close(value, reference, 2e-4, name)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_packed_input_equals_padded_input(family: str, head: str, level: str) -> None:
    with pruned(tiled_model(family, head), PRUNERS[1]) as model:
        engine = tp.compile(model, "float32", threads=1)
    batch = ragged_batch(LENGTHS, family=family)
    valid = batch["attention_mask"].bool()
    cu_seqlens = torch.tensor([0, *np.cumsum(LENGTHS).tolist()], dtype=torch.int32)
    padded, packed = outputs(engine(**batch)), outputs(engine.run_packed(batch["input_ids"][valid], cu_seqlens))
    narrow = outputs(engine.run_packed(batch["input_ids"][valid].int(), cu_seqlens.long()))
    for name, value in packed.items():
        same(narrow[name], value, level)
    assert padded.keys() == packed.keys()
    for name, value in packed.items():
        expected = padded[name][valid] if padded[name].shape[:2] == valid.shape else padded[name]
        assert_close(value, expected, 0 if level != "torch" else 1e-5, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head", ["sequence", "token"])
def test_many_rows_on_several_threads(dtype: str, head: str) -> None:
    """Enough rows that threads take chunks of their own, with lengths around every tile's edge."""
    lengths = [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 255, 256, 257, 511, 512]
    model = tiled_model(head=head, max_position_embeddings=512)
    batch = ragged_batch(lengths)
    valid = batch["attention_mask"].bool()
    with pruned(model, tp.FixedThreshold(final_token_threshold=0.01), "masked"), torch.no_grad():
        reference = model(**batch).logits
    with pruned(model, tp.FixedThreshold(final_token_threshold=0.01)):
        one, three = tp.compile(model, dtype, threads=1), tp.compile(model, dtype, threads=3)
    logits = one(**batch).logits
    assert torch.equal(three(**batch).logits, logits)
    if dtype == "float32":
        different = (logits - reference).abs().amax(-1) > 1e-4
        assert (different & valid if head == "token" else different).sum() <= 2  # decisions at a threshold's edge


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    left=st.booleans(),
    threads=st.integers(1, 3),
    seed=st.integers(0, 3),
    threshold=st.floats(0, 0.03),
)
def test_ragged_batches_equal_the_packed_model(
    lengths: list[int], left: bool, threads: int, seed: int, threshold: float
) -> None:
    if not max(lengths):
        return
    model = tiled_model(head="token")
    batch = ragged_batch(lengths, seed=seed, left=left)
    with pruned(model, tp.FixedThreshold(final_token_threshold=threshold)), torch.no_grad():
        with tp.record(model) as expected:
            reference = model(**batch).logits
        engine = tp.compile(model, "float32", threads=threads)
    with tp.record(engine) as actual:
        logits = engine(**batch).logits
    if decision_margin(expected, 4) > 1e-6:
        assert same_survivors(actual, expected)
        assert_close(logits, reference, 1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_size": 36, "num_attention_heads": 3, "intermediate_size": 50},
        {"hidden_size": 40, "num_attention_heads": 1, "intermediate_size": 33},
        {"hidden_size": 96, "num_attention_heads": 2, "intermediate_size": 100},
        {"hidden_size": 32, "num_attention_heads": 32, "intermediate_size": 64},
        {"hidden_size": 256, "num_attention_heads": 1, "intermediate_size": 300},
        {"hidden_size": 192, "num_attention_heads": 2, "intermediate_size": 320},
    ],
)
def test_sizes_that_fit_no_tile_go_to_another_level(sizes: dict[str, int], dtype: str, any_level: str) -> None:
    if any_level not in levels(dtype):
        return
    model, batch = tiny_model(initializer_range=0.05, **sizes), ragged_batch((1, 20, 13))
    with torch.no_grad():
        reference = model(**batch).logits
    engine = tp.compile(model, dtype, threads=2)
    assert_close(engine(**batch).logits, reference, WORST[dtype] * max(1, reference.abs().max().item()))
    if any_level == "amx" and dtype != "float32" and sizes["intermediate_size"] != 320:
        assert "amx kernels do not fit" in engine.explain()
        assert "kernels: avx512" in engine.explain()


def test_a_level_without_products_of_the_dtype_takes_those_of_the_best_below(monkeypatch: Any) -> None:
    for level in NATIVE:
        monkeypatch.setenv(KERNELS_VARIABLE, level)
        for dtype in DTYPES:
            own = [name for name in own_levels(dtype) if LEVELS.index(name) <= LEVELS.index(level)][-1]
            text = tp.compile(tiled_model(), dtype).explain()
            assert f"kernels: {own}, " in text
            assert (f"{level} has no {dtype} products of its own" in text) == (own != level)


@pytest.mark.skipif("avx512_bf16" not in NATIVE, reason="no AVX-512 BF16")
def test_bfloat16_products_are_used_where_they_pay(monkeypatch: Any) -> None:
    model, batch = tiled_model(), ragged_batch(LENGTHS)
    monkeypatch.delenv(KERNELS_VARIABLE, raising=False)
    assert 0.1 < native._bfloat16_gain() < 10
    found = {}
    monkeypatch.setattr(native, "levels_here", lambda library: NATIVE[: NATIVE.index("avx512_bf16") + 1])
    monkeypatch.setattr(compiling, "level_limit", lambda library: LEVELS.index("avx512_bf16"))
    for gain, level in ((1.05, "avx512"), (1.2, "avx512_bf16")):
        monkeypatch.setattr(native, "_bfloat16_gain", lambda gain=gain: gain)
        engine = tp.compile(model, "bfloat16")
        text = engine.explain()
        assert f"kernels: {level}, " in text
        assert f"were {gain:.2f} times as fast" in text
        assert "limits kernels" not in text
        chosen = (
            "bfloat16 (auto: 1.20 times as fast as float32 in a probe)" if gain > 1.1 else "float32 (auto: bfloat16"
        )
        assert f"dtype: {chosen}" in tp.compile(model).explain()
        found[level] = engine(**batch).logits
        copied = pickle.loads(pickle.dumps(engine))  # which is not asked again, and gives the same bits
        assert torch.equal(copied(**batch).logits, found[level])
        assert "times as fast" not in copied.explain()
    assert not torch.equal(found["avx512"], found["avx512_bf16"])
    monkeypatch.setenv(KERNELS_VARIABLE, "avx512_bf16")
    monkeypatch.setattr(native, "_bfloat16_gain", None)  # nor where the level is named
    assert torch.equal(tp.compile(model, "bfloat16")(**batch).logits, found["avx512_bf16"])


def test_what_the_padded_call_takes() -> None:
    model = tiled_model()
    batch = ragged_batch((9, 4))
    batch["token_type_ids"] = torch.arange(9).expand(2, 9) % 2
    batch["position_ids"] = torch.arange(9).flip(0).expand(2, 9)
    batch["labels"] = torch.tensor([2, 0])
    with torch.no_grad():
        expected = model(**batch)
    engine = tp.compile(model, "float32")
    actual = engine(**{name: value.int() if name != "labels" else value for name, value in batch.items()})
    assert_close(actual.logits, expected.logits)
    assert_close(actual.loss, expected.loss)
    assert_close(engine(batch["input_ids"]).logits, model(batch["input_ids"]).logits)
    packed = engine.run_packed(
        torch.cat([batch["input_ids"][0], batch["input_ids"][1, :4]]),
        torch.tensor([0, 9, 13]),
        token_type_ids=torch.cat([batch["token_type_ids"][0], batch["token_type_ids"][1, :4]]),
        position_ids=torch.cat([batch["position_ids"][0], batch["position_ids"][1, :4]]),
    )
    assert torch.equal(packed.logits, actual.logits)
    as_tuple = engine(batch["input_ids"], return_dict=False)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == 1


def test_padding_tokens_inside_a_sequence_move_robertas_positions() -> None:
    model = tiled_model("roberta")
    batch = ragged_batch((9, 12), family="roberta")
    batch["input_ids"][1, 4] = PAD["roberta"]
    with torch.no_grad():
        assert_close(tp.compile(model, "float32")(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("head", ["sequence", "token", "encoder"])
def test_sequences_without_tokens(head: str, level: str) -> None:
    engine = tp.compile(tp.prune(tiled_model(head=head), PRUNERS[1]), "float32")
    batch = ragged_batch((0, 7, 0, 12, 0))
    name = "last_hidden_state" if head == "encoder" else "logits"
    some = engine(**batch)[name]
    alone = engine(**{k: v[[1, 3]] for k, v in batch.items()})[name]
    same(some[[1, 3]], alone, level)
    nothing = engine(**{k: v[[0, 2]] for k, v in batch.items()})[name]
    assert_close(nothing, some[[0, 2]], 1e-6)
    if head == "encoder":
        assert not nothing.any()


def test_the_engine_keeps_nothing_of_the_model(level: str) -> None:
    model = tp.prune(tiled_model(), PRUNERS[1])
    batch = ragged_batch(LENGTHS)
    engine = tp.compile(model, "float32")
    before = engine(**batch).logits
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.token_pruner.thresholds.fill_(9.0)
    same(engine(**batch).logits, before, level)
    tp.unprune(model)
    del model
    gc.collect()
    same(engine(**batch).logits, before, level)


def test_learned_thresholds_remove_tokens_even_in_training_mode() -> None:
    learned = tp.LearnedThreshold(thresholds=[0.002, 0.004, 0.006, 0.009])
    with pruned(tiled_model(), learned) as model:
        with tp.record(model) as expected, torch.no_grad():
            model(**ragged_batch(LENGTHS))
        engine = tp.compile(model.train(), "float32")
    with tp.record(engine) as actual:
        engine(**ragged_batch(LENGTHS))
    assert same_survivors(actual, expected)
    assert tp.count_flops(engine, actual) == tp.count_flops(model, expected)
    assert actual.ffn_lengths[-1].sum() < sum(LENGTHS)


@dataclass(frozen=True, kw_only=True)
class KeepEven(tp.Pruner):
    """A method from outside the package."""

    prune_mode: ClassVar[str] = "keep_even"
    fails: bool = False

    def keep(self, tokens: Any) -> Tensor:
        if self.fails:
            raise KeyError("of the user's own making")
        assert (tokens.scores > 0).all() and len(tokens.scores) == tokens.layout.total
        return (tokens.layout.indices % tokens.layout.width) % (2**tokens.layer) == 0


@dataclass(frozen=True, kw_only=True)
class KeepTwo(tp.FixedThreshold):
    """A method of the package with another decision."""

    prune_mode: ClassVar[str] = "keep_two"

    def keep(self, tokens: Any) -> Tensor:
        return torch.arange(tokens.layout.total) < 2


def test_a_threshold_method_with_another_decision() -> None:
    with pruned(tiled_model(), KeepTwo()) as model:
        engine = tp.compile(model, "float32", threads=1)
    with tp.record(engine) as trace:
        engine(**ragged_batch(LENGTHS))
    assert trace.ffn_lengths[-1].tolist() == [2, 1, 1, 1, 1, 1, 1]


def test_layers_without_a_threshold_compute_no_importance() -> None:
    thresholds = [0.0, -1.0, 0.008, 0.0]
    with pruned(tiled_model(), tp.FixedThreshold(thresholds=thresholds)) as model:
        engine: Any = tp.compile(model, "float32", threads=1)
    with tp.record(engine) as trace:
        recorded = engine(**ragged_batch(LENGTHS)).logits
    assert torch.equal(engine(**ragged_batch(LENGTHS)).logits, recorded)
    assert trace.ffn_lengths.sum(1).tolist()[:2] == [sum(LENGTHS)] * 2
    assert trace.ffn_lengths.sum(1).tolist()[2] < sum(LENGTHS)


def test_a_pruner_of_ones_own(level: str) -> None:
    with pruned(tiled_model(), KeepEven()) as model:
        with tp.record(model) as expected, torch.no_grad():
            reference = model(**ragged_batch(LENGTHS)).logits
        engine = tp.compile(model, "float32", threads=2)
    with tp.record(engine) as actual:
        assert_close(engine(**ragged_batch(LENGTHS)).logits, reference)
    assert same_survivors(actual, expected)
    with pruned(model, KeepEven(fails=True)):
        engine = tp.compile(model, "float32", threads=2)
    for _ in range(2):
        with pytest.raises(KeyError, match="of the user's own making"):
            engine(**ragged_batch(LENGTHS))


def test_memory_is_about_one_copy_of_the_weights(monkeypatch: Any) -> None:
    model = tiled_model(vocab_size=2000)
    numbers = sum(p.numel() for p in model.base_model.parameters())
    for dtype, size in (("float32", 4), ("bfloat16", 2), ("int8", 1)):
        engine: Any = tp.compile(model, dtype)
        tables = sum(p.numel() for p in model.base_model.embeddings.parameters())
        expected = (numbers - tables) * size + tables * max(size, 2)
        assert engine._encoder.weight_bytes < 1.25 * expected + 64 * 1024, dtype


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("threads", [1, 2])
def test_eight_threads_at_once(threads: int) -> None:
    """TOKEN_PRUNING_HAMMER_SECONDS=60 makes it a minute."""
    seconds = float(os.environ.get("TOKEN_PRUNING_HAMMER_SECONDS", "2"))
    engine = tp.compile(tp.prune(tiled_model(), PRUNERS[1]), "auto", threads=threads)
    batches = [ragged_batch(lengths) for lengths in ((5, 40, 1), (70,), (33, 16, 17, 70), (2,) * 20, (64,) * 9)]
    expected = [engine(**batch).logits for batch in batches]
    wrong: list[int] = []
    done = [0] * 8
    sizes: list[int] = []
    end = time.monotonic() + seconds

    def hammer(number: int) -> None:
        while time.monotonic() < end:
            which = (number + done[number]) % len(batches)
            if not torch.equal(engine(**batches[which]).logits, expected[which]):
                wrong.append(which)
            done[number] += 1

    workers = [threading.Thread(target=hammer, args=(number,)) for number in range(8)]
    for worker in workers:
        worker.start()
    time.sleep(seconds / 2)
    sizes.append(resident_bytes())
    for worker in workers:
        worker.join()
    sizes.append(resident_bytes())
    assert not wrong and min(done) > 0
    assert sizes[1] < sizes[0] + 20 * 2**20, "memory grew"


def test_bad_input() -> None:
    """What is the engine's own; tests/families/test_bad_calls.py has what any call may get wrong."""
    engine = tp.compile(tiled_model(), "float32")
    ids = torch.full((2, 5), 7)
    for message, arguments in (
        ("input_ids is on meta; an engine takes tensors on the CPU", {"input_ids": ids.to("meta")}),
        ("input_ids is missing", {"input_ids": None}),
        ("input_ids is missing; an engine takes no", {"input_ids": None, "inputs_embeds": torch.zeros(2, 5, 128)}),
        ("takes input_ids only", {"inputs_embeds": torch.zeros(2, 5, 128)}),
    ):
        with pytest.raises(tp.ConfigError, match=message):
            engine(**{"input_ids": ids, **arguments})
    for output in ("output_attentions", "output_hidden_states"):
        with pytest.raises(tp.UnsupportedModelError, match=output):
            engine(ids, **{output: True})
        with pytest.raises(tp.UnsupportedModelError, match=output):
            tp.compile(tiny_model(attn_implementation="eager", **{output: True}), "float32")(ids)
    for cu_seqlens in ([0, 5], [1, 10], [0, 12, 10], [0], [0, 6, 5, 10]):
        with pytest.raises(tp.ConfigError, match=r"cu_seqlens is .*; it must rise from 0 to the number of tokens, 10"):
            engine.run_packed(ids.flatten(), torch.tensor(cu_seqlens))
    with pytest.raises(tp.ConfigError, match=r"cu_seqlens is a torch.float32 tensor"):
        engine.run_packed(ids.flatten(), torch.tensor([0.0, 10.0]))
    with pytest.raises(tp.ConfigError, match="token_type_ids has shape"):
        engine.run_packed(ids.flatten(), torch.tensor([0, 10]), token_type_ids=ids[0])
    assert engine(ids).logits.shape == (2, 3)  # and it still works


def test_bad_settings(monkeypatch: Any, model: Any) -> None:
    with pytest.raises(tp.ConfigError, match="dtype is 'float16'; it must be one of auto, float32, bfloat16, int8"):
        tp.compile(model, "float16")  # type: ignore[arg-type]
    with pytest.raises(tp.ConfigError, match="threads is 0"):
        tp.compile(model, threads=0)
    with pytest.raises(tp.UnsupportedModelError, match="Linear is not a Hugging Face model"):
        tp.compile(torch.nn.Linear(2, 2))
    monkeypatch.setenv(KERNELS_VARIABLE, "sse9")
    with pytest.raises(tp.ConfigError, match="TOKEN_PRUNING_KERNELS is 'sse9'; it must be one of portable, avx2"):
        tp.compile(model)
    monkeypatch.setenv(KERNELS_VARIABLE, "torch")
    with pytest.raises(tp.ConfigError, match=r"'int8' needs the native kernels; .* TOKEN_PRUNING_KERNELS=torch"):
        tp.compile(model, "int8")


def test_a_level_the_processor_lacks(monkeypatch: Any, model: Any) -> None:
    class OldProcessor:
        def tp_has_level(self, level: int) -> bool:
            return level < 2

    monkeypatch.setenv(KERNELS_VARIABLE, "amx")
    monkeypatch.setattr(compiling, "load_library", OldProcessor)
    with pytest.raises(tp.ConfigError, match="is 'amx'; this processor has portable, avx2"):
        tp.compile(model)


@pytest.mark.skipif(LIBRARY is None, reason="no native library")
def test_a_library_built_from_other_sources_is_refused() -> None:
    check_interface(LIBRARY)

    class Older:
        """Before there was a version."""

    class Other(Older):
        def tp_abi_version(self) -> int:
            return 1

        def tp_request_size(self) -> int:
            return 8

        def tp_shape_size(self) -> int:
            return 4

    for library, found in (
        (Older(), "interface 0 with requests of 0 bytes"),
        (Other(), "interface 1 with requests of 8 bytes and shapes of 4;"),
    ):
        with pytest.raises(tp.TokenPruningError, match=found):
            check_interface(library)


def test_without_the_library_pytorch_is_used_and_says_so_once(monkeypatch: Any, model: Any) -> None:
    monkeypatch.delenv(KERNELS_VARIABLE, raising=False)
    monkeypatch.setattr(compiling, "load_library", lambda: None)
    compiling._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="native kernels were not built"):
        engine = tp.compile(model, "float32")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tp.compile(model, "float32")
    assert "kernels: PyTorch, because the native library was not built" in engine.explain()
    batch = ragged_batch(LENGTHS)
    assert_close(engine(**batch).logits, model(**batch).logits)
    with pytest.raises(tp.ConfigError, match=r"'int8' needs the native kernels; .*not built"):
        tp.compile(model, "int8")


@pytest.mark.parametrize("activation", ["relu", "gelu_new", "silu", "mish"])
def test_activations(activation: str, level: str) -> None:
    model, batch = tiled_model(hidden_act=activation), ragged_batch(LENGTHS)
    with torch.no_grad():
        reference = model(**batch).logits
    for dtype in ("float32", "bfloat16"):
        engine = tp.compile(model, dtype)
        assert_close(engine(**batch).logits, reference, WORST[dtype] * max(1, reference.abs().max().item()))
        assert ("no activation 'mish'" in engine.explain()) == (activation == "mish" and level != "torch")


def test_explain(monkeypatch: Any) -> None:
    text = tp.compile(tp.prune(tiled_model(), PRUNERS[1]), "int8", threads=3).explain()
    for part in ("dtype: int8", "threads: 3", "int8", "MiB", "FixedThreshold", "first tokens only"):
        assert part in text
    assert "first tokens only" not in tp.compile(tiled_model(head="token")).explain()
    monkeypatch.setenv(KERNELS_VARIABLE, "portable")
    assert "limits kernels to portable" in tp.compile(tiled_model()).explain()
    assert "auto" in repr(tp.compile(tiled_model()))


def test_half_precision_models_compile() -> None:
    model = tiled_model()
    batch = ragged_batch(LENGTHS)
    reference = model(**batch).logits
    engine = tp.compile(copy.deepcopy(model).to(torch.bfloat16), "float32")
    assert engine(**batch).logits.dtype == torch.float32
    assert_close(engine(**batch).logits, reference, 5e-2 * reference.abs().max().item())


def test_native_side_refuses_what_python_would_not_send(model: Any) -> None:
    """The last line of defence: an error code, never a read outside the tables."""
    assert LIBRARY is not None
    engine: Any = tp.compile(model, "float32")
    batch = ragged_batch((3,))

    def run(**changes: Any) -> None:
        tokens = PackedTokens(
            ids=changes.get("ids", batch["input_ids"][0].int()),
            positions=changes.get("positions", torch.arange(3, dtype=torch.int32)),
            token_types=changes.get("types"),
            layout=layout_from_mask(batch["attention_mask"].bool()),
        )
        engine._encoder.run(tokens, engine.token_pruner, reads="first")

    run()
    far = torch.tensor([0, 1, 2**30], dtype=torch.int32)
    for change in ({"ids": far}, {"positions": far}, {"types": far}, {"ids": -far}):
        with pytest.raises(tp.TokenPruningError, match="outside its table"):
            run(**change)
    shape = Shape(layers=1, hidden=32, heads=1, key_heads=1, head_size=32, inner=32, epsilon=1e-5, scale=1.0)
    handle = LIBRARY.tp_encoder_new(99, 0, shape)
    assert not handle and b"level" in LIBRARY.tp_last_error()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_multiple_choice_needs_a_padded_batch() -> None:
    model = hf.BertForMultipleChoice(tiny_config("bert")).eval()
    with pytest.raises(tp.ConfigError, match="whose head needs a padded batch"):
        tp.compile(model, "float32").run_packed(torch.tensor([5, 6, 7]), torch.tensor([0, 1, 3]))


@pytest.mark.parametrize("lengths", [[], [0], [0, 0], [0, 3, 0]])
@pytest.mark.parametrize(
    "model", [partial(tiny_model), partial(tiny_model, head="token"), partial(tiny_model, "modernbert")]
)
def test_packed_sequences_of_nothing(model: Any, lengths: list[int]) -> None:
    engine = tp.compile(model(), "float32")
    ids = torch.tensor([5, 6, 7][: sum(lengths)], dtype=torch.long)
    logits = engine.run_packed(ids, torch.tensor([0, *accumulate(lengths)])).logits
    assert len(logits) == (len(ids) if engine.reads == "all" else len(lengths))
    if 3 in lengths:
        alone = engine(ids[None]).logits[0]
        assert torch.equal(logits if engine.reads == "all" else logits[1], alone)


def test_a_head_that_pools_gives_a_text_the_same_in_any_company() -> None:
    model = tiny_model("modernbert", classifier_pooling="mean")
    tp.prune(model, tp.FixedThreshold(thresholds=[0.8] * 4, scoring_mode="relative"))
    engine = tp.compile(model, "float32")
    batch = ragged_batch([9, 30, 2])
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    cu_seqlens = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
    together = engine.run_packed(ids[mask], cu_seqlens).logits
    assert_close(together, engine(**batch).logits, 1e-5)
    assert_close(together, model(**batch).logits, 1e-4)
    for text in range(3):
        alone = engine.run_packed(ids[text][mask[text]], torch.tensor([0, int(mask[text].sum())])).logits
        assert_close(alone, together[text : text + 1], 1e-5)


@pytest.mark.parametrize(
    "family", ["bert", "ernie", "megatron-bert", "roberta", "data2vec-text", "mpnet", "electra", "distilbert"]
)
def test_known_heads_run_without_transformers_around_them(family: str) -> None:
    """To the last bit what the model's own head gives; also copied, pickled, and where it is asked for more."""
    model = tiny_model(family, "sequence")
    batch = ragged_batch((5, 0, 9))
    with pruned(model, tp.TopK(token_keep_rate=0.5)):
        engine = tp.compile(model, "float32")
    assert engine._steps is not None
    for one in (engine, copy.deepcopy(engine), pickle.loads(pickle.dumps(engine))):
        for inputs in (batch, {name: rows[2:] for name, rows in batch.items()}):
            found = one(**inputs)
            with torch.inference_mode():
                expected = one._head(**inputs)
            assert type(found) is type(expected) and list(found) == list(expected)
            assert torch.equal(found.logits, expected.logits)
    ids, cu_seqlens = batch["input_ids"][batch["attention_mask"] == 1], torch.tensor([0, 5, 5, 14])
    assert torch.equal(engine.run_packed(ids, cu_seqlens).logits, engine(**batch).logits)
    assert engine(**batch, labels=torch.tensor([0, 1, 1])).loss.isfinite()
    assert isinstance(engine(**batch, return_dict=False), tuple)
    with pytest.raises(tp.ConfigError, match="input_ids is missing"):
        engine(attention_mask=batch["attention_mask"])


def test_heads_that_were_changed_run_as_they_are() -> None:
    def compiled(change: Any) -> tuple[Any, Any]:
        model = tiny_model("bert", "sequence")
        change(model)
        return model, tp.compile(model, "float32")

    def hooked(model: Any) -> None:
        model.classifier.register_forward_hook(lambda module, inputs, output: output + 1)

    def replaced(model: Any) -> None:
        model.classifier = torch.nn.Sequential(model.classifier, torch.nn.Tanh())

    def activated(model: Any) -> None:
        model.bert.pooler.activation = torch.nn.Sigmoid()

    def patched(model: Any) -> None:
        model.bert.pooler.forward = lambda states: states[:, 0] * 2

    def as_tuples(model: Any) -> None:
        model.config.return_dict = False

    batch = ragged_batch((5, 9))
    for change in (hooked, replaced, activated, patched, as_tuples):
        model, engine = compiled(change)
        assert engine._steps is None
        with torch.no_grad():
            assert_close(engine(**batch)[0], model(**batch)[0], message=change.__name__)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.float32, torch.bfloat16])
def test_batches_without_padding_are_packed_as_others(dtype: torch.dtype) -> None:
    """A mask of ones, or none, changes nothing; neither do positions that are given."""
    for family in ("bert", "roberta"):
        model = tiny_model(family, "encoder")
        engine = tp.compile(model, "float32")
        ids = torch.randint(5, 60, (3, 7))
        padded = torch.nn.functional.pad(ids, (0, 2), value=model.config.pad_token_id)
        mask = torch.nn.functional.pad(torch.ones_like(ids), (0, 2))
        expected = engine(input_ids=padded, attention_mask=mask.to(dtype)).last_hidden_state[:, :7]
        for masks in ({}, {"attention_mask": torch.ones(3, 7, dtype=dtype)}):
            assert torch.equal(engine(input_ids=ids, **masks).last_hidden_state, expected)
            assert torch.equal(engine(input_ids=ids[1:2], **{n: m[:1] for n, m in masks.items()})[0], expected[1:2])
