"""What docs/promises.md says of an engine, and a test for each: no number lost, no interrupt, no thread in the way."""

import copy
import gc
import math
import mmap
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import token_pruning as tp
from tests.engine.test_engine import DTYPES, own_levels, tiled_model
from tests.tiny import VOCABULARY, assert_close, pruned, ragged_batch
from token_pruning.engine import native
from token_pruning.engine.library import KERNELS_VARIABLE, load_library, sized

LENGTHS = (5, 40, 1, 17)
SPECIAL_ID = 7  # a word that the tests below make special
EVERYWHERE = [(level, dtype) for dtype in DTYPES for level in own_levels(dtype)]
PLACES = (
    "embeddings.position_embeddings.weight",
    "embeddings.LayerNorm.bias",
    "encoder.layer.0.attention.self.query.weight",
    "encoder.layer.0.attention.self.value.bias",
    "encoder.layer.1.attention.output.dense.weight",
    "encoder.layer.0.intermediate.dense.weight",
    "encoder.layer.0.intermediate.dense.bias",
    "encoder.layer.1.output.dense.weight",
    "encoder.layer.1.output.LayerNorm.weight",
)


@pytest.fixture(autouse=True)
def _nothing_forced(monkeypatch: Any) -> None:
    monkeypatch.delenv(KERNELS_VARIABLE, raising=False)


def small_model(**overrides: Any) -> Any:
    return tiled_model(layers=2, **overrides)


def context(cuts: tuple[int, ...], rank: int = 20, layers: int = 2) -> tp.LinearContext:
    """Keys and values about as large as a model's own."""
    generator = torch.Generator().manual_seed(0)
    down = torch.randn(len(cuts), rank, 129, generator=generator) / 128**0.5
    return tp.LinearContext(cuts, down, torch.randn(layers, 256, rank + 1, generator=generator) / rank**0.5)


GATE = tp.VocabularyGate(torch.rand(VOCABULARY, generator=torch.Generator().manual_seed(0)), 0.3)
WITH_CONTEXT: tuple[tp.Pruner, ...] = (
    tp.FixedThreshold(thresholds=[0.7, 0.6], scoring_mode="relative", vocabulary=GATE, context=context((0, 1))),
    tp.TopK(token_keep_rate=0.3, keep_all_layers=1, vocabulary=GATE, context=context((0,), rank=3)),
    tp.FixedThreshold(
        thresholds=[0.95, 0.6], scoring_mode="relative", departed="survivors", context=context((1,), rank=128)
    ),
)


def batch_with_the_special_word_in_row(row: int | None) -> dict[str, Tensor]:
    batch = ragged_batch(LENGTHS)
    ids = batch["input_ids"]
    ids[ids == SPECIAL_ID] = SPECIAL_ID + 1
    if row is not None:
        ids[row, LENGTHS[row] // 2] = SPECIAL_ID
    return batch


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(**batch).logits
    return result


# Numbers that are not finite, or nearly not


@pytest.mark.parametrize("activation", ["gelu", "relu", "gelu_new"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("level", "dtype"), EVERYWHERE)
def test_what_is_not_finite_in_a_weight_is_not_finite_in_the_result(
    level: str, dtype: str, bad: float, activation: str, monkeypatch: Any
) -> None:
    monkeypatch.setenv(KERNELS_VARIABLE, level)
    model = small_model(hidden_act=activation)
    base, batch = model.base_model.state_dict(), ragged_batch(LENGTHS)
    for place in PLACES:
        weight = base[place]
        was = weight.clone()
        index = (0, 3) if weight.dim() == 2 else (3,)
        weight[index] = bad
        with pruned(model, tp.Unpruned()):  # packed: in a padded batch padding that is NaN spoils what is beside it
            expected = logits(model, batch)
        found = tp.compile(model, dtype, threads=1)(**batch).logits
        finite = expected.isfinite()  # nothing where the place is NaN; relu undoes an infinity
        assert not finite.any() or math.isinf(bad), place
        assert not (found.isfinite() & ~finite).any(), (place, found)
        both = finite & found.isfinite()
        # int8 has no infinite weights: they are NaN. PyTorch takes scores that are all -inf for a mask.
        assert both.equal(finite) or dtype == "int8" or place.endswith("query.weight"), (place, found)
        assert_close(found[both], expected[both], 5e-2)
        weight.copy_(was)


@pytest.mark.parametrize(
    "pruner", [None, tp.FixedThreshold(final_token_threshold=0.02), tp.TopK(keep_all_layers=1), *WITH_CONTEXT]
)
@pytest.mark.parametrize(("level", "dtype"), EVERYWHERE)
def test_a_nan_stays_in_its_sequence(level: str, dtype: str, pruner: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv(KERNELS_VARIABLE, level)
    model = small_model()
    engine = tp.compile(model if pruner is None else tp.prune(model, pruner), dtype, threads=2)
    clean = engine(**batch_with_the_special_word_in_row(None)).logits
    model.base_model.embeddings.word_embeddings.weight.data[SPECIAL_ID] = math.nan
    batch = batch_with_the_special_word_in_row(1)
    with tp.record(model) if pruner else tp.record(tp.prune(model, tp.Unpruned())) as expected:
        reference = logits(model, batch)
    engine = tp.compile(model, dtype, threads=2)
    with tp.record(engine) as actual:
        recorded = engine(**batch).logits
    for result in (recorded, engine(**batch).logits):
        assert result[1].isnan().all()
        others = [0, 2, 3]
        assert torch.equal(result[others], clean[others])
    assert reference[1].isnan().all()
    assert torch.isfinite(reference[[0, 2, 3]]).all()
    # What a NaN score decides is the same in the engine as in the model.
    assert actual.survived_layers[1].tolist() == expected.survived_layers[1].tolist()


@pytest.mark.parametrize(("level", "dtype"), EVERYWHERE)
def test_finite_weights_give_finite_results(level: str, dtype: str, monkeypatch: Any) -> None:
    """Among them rows whose int8 scale would overflow, all zero, all equal, and of numbers near either end."""
    monkeypatch.setenv(KERNELS_VARIABLE, level)
    model, batch = small_model(hidden_act="gelu_new"), ragged_batch(LENGTHS)
    base = model.base_model.state_dict()
    base["encoder.layer.0.attention.self.query.weight"][0] = 1e-38
    base["encoder.layer.0.attention.self.key.weight"][1] = 1e-44
    base["encoder.layer.0.attention.self.value.weight"][2] = 0
    base["encoder.layer.0.intermediate.dense.weight"][3] = 0.01
    base["encoder.layer.0.intermediate.dense.bias"][4] = 1e12  # an activation that dwarfs all others,
    base["encoder.layer.0.intermediate.dense.bias"][5] = -1e38  # and one that vanishes in gelu
    base["encoder.layer.1.output.dense.weight"][0] = 1e-42
    with torch.no_grad():
        expected = model(**batch).logits
    assert torch.isfinite(expected).all()
    scale = expected.abs().max().item()
    found = tp.compile(model, dtype, threads=1)(**batch).logits
    allowed = {"float32": 1e-4, "bfloat16": 5e-2, "int8": 0.3}[dtype]
    assert_close(found, expected, allowed * max(1, scale))


@pytest.mark.parametrize(("level", "dtype"), EVERYWHERE)
def test_activations_of_nothing_but_tiny_numbers(level: str, dtype: str, monkeypatch: Any) -> None:
    """127 / 1e-39 is infinite, and infinity times 0 is NaN."""
    monkeypatch.setenv(KERNELS_VARIABLE, level)
    model, batch = small_model(), ragged_batch(LENGTHS)
    norm = model.base_model.encoder.layer[0].attention.output.LayerNorm
    norm.weight.data.fill_(1e-39)
    norm.bias.data.zero_()
    assert_close(tp.compile(model, dtype, threads=1)(**batch).logits, logits(model, batch), 5e-2)


# Batches, threads, sizes


@pytest.mark.parametrize(("level", "dtype"), EVERYWHERE)
def test_a_result_is_the_same_to_the_last_bit_in_any_batch_and_with_any_threads(
    level: str, dtype: str, monkeypatch: Any
) -> None:
    monkeypatch.setenv(KERNELS_VARIABLE, level)
    lengths = (3, 33, 1, 70, 16, 250)
    batch = ragged_batch(lengths)
    for pruner in (
        tp.FixedThreshold(final_token_threshold=0.012),
        tp.TopK(token_keep_rate=0.3, keep_all_layers=1, summary_tokens="segment"),
        *WITH_CONTEXT,
    ):
        with pruned(small_model(max_position_embeddings=260), pruner) as model:
            engines = [tp.compile(model, dtype, threads=threads) for threads in (1, 2, 8)]
        together = engines[0](**batch).logits
        for engine in engines[1:]:
            assert torch.equal(engine(**batch).logits, together)
        for row, length in enumerate(lengths):
            for engine in engines:
                alone = engine(**{name: x[row : row + 1, :length] for name, x in batch.items()}).logits
                assert torch.equal(alone[0], together[row])
        order = [3, 0, 5, 1, 4, 2]
        assert torch.equal(engines[0](**{name: x[order] for name, x in batch.items()}).logits, together[order])


@pytest.mark.parametrize("level", own_levels("float32"))
def test_heads_wider_than_256(level: str, monkeypatch: Any) -> None:
    monkeypatch.setenv(KERNELS_VARIABLE, level)
    model, batch = small_model(hidden_size=600, num_attention_heads=2), ragged_batch(LENGTHS)
    engine = tp.compile(model, "float32", threads=1)
    assert "PyTorch" not in engine.explain()
    assert_close(engine(**batch).logits, logits(model, batch))


def test_threads_beyond_the_cores_are_not_taken(monkeypatch: Any) -> None:
    """One core: 32 threads would take turns on it."""
    cores = os.sched_getaffinity(0)
    engine = tp.compile(small_model(), "float32", threads=32)
    expected = engine(**ragged_batch(LENGTHS)).logits
    before = len([*Path("/proc/self/task").iterdir()])
    os.sched_setaffinity(0, {min(cores)})
    try:
        assert torch.equal(engine(**ragged_batch(LENGTHS)).logits, expected)
        assert "a call takes 1 of its 32 threads" in engine.explain()
        assert len([*Path("/proc/self/task").iterdir()]) == before
    finally:
        os.sched_setaffinity(0, cores)


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group whose quota of processor time can be set."""
    root = Path("/sys/fs/cgroup")
    folder = (root / "cpu" if (root / "cpu").is_dir() else root) / f"token-pruning-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        if not any((folder / name).exists() for name in ("cpu.max", "cpu.cfs_quota_us")):
            pytest.skip(f"{folder} has no quota")
        yield folder
    finally:
        folder.rmdir()


@pytest.mark.parametrize(("quota", "cores"), [(50_000, 1), (100_000, 1), (200_000, 2), (-1, None)])
def test_threads_beyond_a_containers_quota_are_not_taken(group: Path, quota: int, cores: int | None) -> None:
    allowed = len(os.sched_getaffinity(0))
    if (group / "cpu.max").exists():
        (group / "cpu.max").write_text(f"{quota if quota > 0 else 'max'} 100000")
    else:
        (group / "cpu.cfs_period_us").write_text("100000")
        (group / "cpu.cfs_quota_us").write_text(str(quota))
    script = (
        "import os, sys; from pathlib import Path; from token_pruning.engine.library import load_library\n"
        "Path(sys.argv[1], 'cgroup.procs').write_text(str(os.getpid()))\n"
        "print(load_library().tp_usable_cores())"
    )
    done = subprocess.run([sys.executable, "-c", script, group], capture_output=True, text=True, check=True)
    assert int(done.stdout) == min(cores or allowed, allowed)


@pytest.mark.parametrize("pruner", WITH_CONTEXT)
@pytest.mark.parametrize(("level", "dtype"), EVERYWHERE)
def test_threads_that_share_an_engine_with_context(level: str, dtype: str, pruner: Any, monkeypatch: Any) -> None:
    """From its first call on, which packs the context; and while somebody writes what was there already."""
    monkeypatch.setenv(KERNELS_VARIABLE, level)
    with pruned(small_model(max_position_embeddings=260), pruner) as model:
        engine = tp.compile(model, dtype, threads=2)
    batches = [
        ragged_batch(lengths, seed=seed) for seed, lengths in enumerate([(3, 250), (33,), (1, 1, 70), (16,) * 9])
    ]
    expected = [copy.deepcopy(engine)(**batch).logits for batch in batches]
    assert engine._encoder._context is None
    start, wrong = threading.Barrier(8), []

    def call(which: int) -> None:
        start.wait()
        for _ in range(5):
            if which >= 6:
                engine.token_pruner.context_up.copy_(engine.token_pruner.context_up.clone())
            found = engine(**batches[which % 4]).logits
            if not torch.equal(found, expected[which % 4]):
                wrong.append(which)

    callers = [threading.Thread(target=call, args=(which,)) for which in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


# Interrupts and exceptions


@dataclass(frozen=True, kw_only=True)
class KeepOdd(tp.Pruner, registered=False):
    prune_mode: ClassVar[str] = "keep_odd_for_tests"

    def keep(self, tokens: Any) -> Tensor:
        return tokens.scores * 1e6 % 2 >= 1


@pytest.mark.parametrize(
    "pruner",
    [
        KeepOdd(),
        tp.TopK(token_keep_rate=0.3, keep_all_layers=1),
        tp.TopK(token_keep_rate=0.3, keep_all_layers=1, vocabulary=GATE, context=context((0, 1, 2), layers=4)),
    ],
)
def test_an_interrupt_at_any_moment_rises_and_nothing_else_is_lost(pruner: Any) -> None:
    """SIGALRM by a timer, which Python raises as KeyboardInterrupt wherever it then is."""
    engine = tp.compile(tp.prune(tiled_model(layers=4), pruner), "float32", threads=2)
    batch = ragged_batch((12, 5))
    expected = engine(**batch).logits
    unraisable: list[Any] = []
    hook, handler = sys.unraisablehook, signal.getsignal(signal.SIGALRM)
    fired = 0

    def interrupt(number: int, frame: Any) -> None:
        nonlocal fired
        fired += 1
        raise KeyboardInterrupt

    raised = wrong = 0
    sys.unraisablehook = unraisable.append
    signal.signal(signal.SIGALRM, interrupt)
    generator = torch.Generator().manual_seed(0)
    gc.disable()  # what other tests left behind may have a __del__, where no interrupt can rise
    try:
        while fired < 150:
            result = None
            delay = 1e-5 + 4e-3 * torch.rand((), generator=generator).item()
            try:
                try:
                    signal.setitimer(signal.ITIMER_REAL, delay)
                    result = engine(**batch).logits
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                raised += 1
            else:
                wrong += not torch.equal(result, expected)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        sys.unraisablehook = hook
        gc.enable()
    assert (raised, wrong, unraisable) == (fired, 0, [])
    assert torch.equal(engine(**batch).logits, expected)


# Processes


def child_succeeds(check: Any) -> bool:
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if check() else 1)
        finally:
            os._exit(2)
    for _ in range(3000):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) == 0
        threading.Event().wait(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("pruner", [tp.Unpruned(), tp.TopK(token_keep_rate=0.3, keep_all_layers=1), WITH_CONTEXT[1]])
def test_a_child_forked_in_the_middle_of_a_call_can_call_too(pruner: Any) -> None:
    with pruned(small_model(), pruner) as model:
        engine = tp.compile(model, "float32", threads=2)
    batch = ragged_batch((70, 70))
    expected = engine(**batch).logits
    stop = threading.Event()

    def hammer() -> None:
        while not stop.is_set():
            engine(**batch)

    callers = [threading.Thread(target=hammer) for _ in range(2)]
    for caller in callers:
        caller.start()
    try:
        for _ in range(5):
            assert child_succeeds(lambda: all(torch.equal(engine(**batch).logits, expected) for _ in range(2)))
    finally:
        stop.set()
        for caller in callers:
            caller.join()


def run_pickled(data: bytes, batch: dict[str, Tensor]) -> tuple[Tensor, str]:
    engine = pickle.loads(data)
    return engine(**batch).logits, engine.explain()


@pytest.mark.parametrize(
    "pruner",
    [
        tp.FixedThreshold(final_token_threshold=0.02),
        tp.TopK(token_keep_rate=0.3, keep_all_layers=1),
        *WITH_CONTEXT,
    ],
)
@pytest.mark.parametrize(("level", "dtype"), EVERYWHERE)
def test_a_pickled_or_copied_engine_is_the_same_to_the_last_bit(
    level: str, dtype: str, pruner: Any, monkeypatch: Any
) -> None:
    monkeypatch.setenv(KERNELS_VARIABLE, level)
    model, batch = small_model(), ragged_batch(LENGTHS)
    model.base_model.encoder.layer[0].intermediate.dense.weight.data[3] = 1e-39
    engine: Any = tp.compile(tp.prune(model, pruner), dtype, threads=1)
    expected = engine(**batch).logits
    copied = copy.deepcopy(engine)
    assert copied._encoder._handle is engine._encoder._handle  # the weights are there once
    data = pickle.dumps(engine)
    tensors = [] if pruner.context is None else [pruner.context.down, pruner.context.up]
    own = 2 * sum(tensor.nbytes for tensor in tensors)  # the method's, and the module's
    assert len(data) < engine._encoder.weight_bytes + own + 200_000
    del engine
    gc.collect()
    assert torch.equal(copied(**batch).logits, expected)
    del copied
    monkeypatch.delenv(KERNELS_VARIABLE)  # the level is the engine's own from now on
    for _ in range(2):
        found, text = run_pickled(data, batch)
        assert torch.equal(found, expected)
        assert f"kernels: {level}" in text
        data = pickle.dumps(pickle.loads(data))


def test_a_pickled_engine_on_another_machine(monkeypatch: Any) -> None:
    engine, batch = tp.compile(small_model(), "float32", threads=1), ragged_batch(LENGTHS)
    data = pickle.dumps(engine)
    monkeypatch.setenv(KERNELS_VARIABLE, "portable")
    found, text = run_pickled(data, batch)
    assert_close(found, engine(**batch).logits)
    assert "kernels: portable" in text
    monkeypatch.setenv(KERNELS_VARIABLE, "torch")
    with pytest.raises(tp.TokenPruningError, match="rules out: compile the model again"):
        pickle.loads(data)
    monkeypatch.delenv(KERNELS_VARIABLE)
    monkeypatch.setattr(native, "load_library", lambda: None)
    with pytest.raises(tp.TokenPruningError, match="were not built here: compile the model again"):
        pickle.loads(data)
    monkeypatch.undo()
    monkeypatch.setattr(native, "_STATE_FORMAT", 0)
    with pytest.raises(tp.TokenPruningError, match="another version of the package"):
        pickle.loads(data)


# Memory


def workspace_formula(lengths: tuple[int, ...], model: Any, level: str, dtype: str, threads: int) -> int:
    """That of encoder.h, for the vector levels."""
    config = model.config
    hidden, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    total, longest = sum(lengths), max(lengths)
    rows = -(-min(total, max(192, longest)) // 32) * 32
    panel = {"avx2": 16, "avx_vnni": 16, "avx512": 32, "avx512_vnni": 32, "avx512_bf16": 32}.get(level, 8)
    step, wide = 256, 4
    packed = rows * 4 * (-(-hidden // step) * step + -(-inner // step) * step)
    if dtype == "int8" or level in ("avx512_bf16", "i8mm"):  # a block holds them
        packed = rows * (1536 if level == "i8mm" else 768) * 2
    of_thread = rows * (4 * hidden * (1 + wide) + 4 * hidden + 8 * heads) + packed
    if dtype == "int8":
        of_thread += rows * inner * wide
    scratch = (rows + step) * panel * 4  # no input is wide enough for several parts
    attention = 4 * longest * (step + 2 * max(panel, hidden // heads) + 2 * panel)
    return total * ((8 + wide) * hidden + 40) + len(lengths) * 64 + threads * (of_thread + scratch + attention) + 65536


@pytest.mark.parametrize(("level", "dtype"), [(level, dtype) for level, dtype in EVERYWHERE if level != "amx"])
@pytest.mark.parametrize("lengths", [(1,), (5, 40), (250,), (60,) * 30])
def test_the_memory_of_a_call_is_what_the_formula_says(
    level: str, dtype: str, lengths: tuple[int, ...], monkeypatch: Any
) -> None:
    monkeypatch.setenv(KERNELS_VARIABLE, level)
    model = small_model(max_position_embeddings=260)
    engine: Any = tp.compile(model, dtype, threads=1)
    asked: list[int] = []
    monkeypatch.setattr(native, "Workspace", _measured(asked))
    engine(**ragged_batch(lengths))
    allowed = workspace_formula(lengths, model, level, dtype, 1)
    assert allowed / 2 < asked[0] + 65536 and asked[0] < allowed


def _measured(asked: list[int]) -> Any:
    original = native.Workspace

    def make(size: int) -> Any:
        asked.append(size)
        return original(size)

    return make


def test_a_call_without_memory_is_a_memory_error_and_the_next_is_right(monkeypatch: Any) -> None:
    engine, batch = tp.compile(small_model(), "float32", threads=1), ragged_batch(LENGTHS)

    def no_memory(*arguments: Any, **options: Any) -> Any:
        raise OSError(12, "Cannot allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(mmap, "mmap", no_memory)
        with pytest.raises(MemoryError, match=r"a call needs \d+ bytes"):
            engine(**batch)
    with monkeypatch.context() as patch:
        library: Any = load_library()
        patch.setattr(library, "tp_encoder_forward", lambda *_: -1)
        patch.setattr(library, "tp_last_error", lambda: b"out of memory")
        with pytest.raises(MemoryError, match="native engine: out of memory"):
            engine(**batch)
    assert torch.isfinite(engine(**batch).logits).all()


@pytest.mark.parametrize(("level", "dtype"), [(level, dtype) for level, dtype in EVERYWHERE if level != "amx"])
@pytest.mark.parametrize("lengths", [(1,), (5, 40), (250,), (60,) * 30])
def test_the_memory_of_a_call_with_context(level: str, dtype: str, lengths: tuple[int, ...], monkeypatch: Any) -> None:
    """That of one without and what encoder.h says of context."""
    monkeypatch.setenv(KERNELS_VARIABLE, level)
    model, asked = small_model(max_position_embeddings=260), list[int]()
    monkeypatch.setattr(native, "Workspace", _measured(asked))
    setting = context((0, 1), rank=100)
    for given in (None, setting):
        with pruned(model, tp.FixedThreshold(thresholds=[0.7, 0.6], scoring_mode="relative", context=given)):
            tp.compile(model, dtype, threads=1)(**ragged_batch(lengths))
    rank, total = 128, sum(lengths)  # ranks are rounded up
    rows = -(-min(total, max(192, *lengths)) // 32) * 32
    more = total * (4 * rank + 20) + len(lengths) * 8 + rows * (4 * rank + 4 * 4 * 128)
    packed, scratch = rows * 4 * 256, (rows + 256) * 32 * 4  # of 128 numbers, in steps of 256
    assert more / 2 < asked[1] - asked[0] < more + packed + scratch + 20 * 64


ELSEWHERE = """
import pickle, resource, sys, torch
from tests.tiny import ragged_batch
torch.set_num_threads(1)  # PyTorch's own threads end the process where they cannot start
engine = pickle.load(open(sys.argv[1], "rb"))
small, large = ragged_batch((5, 9)), ragged_batch((500,) * 8)
expected = pickle.load(open(sys.argv[2], "rb"))
assert torch.equal(engine(**small).logits, expected)
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
for more in range(0, 400, 8):  # MiB; in the beginning not even a thread's stack
    resource.setrlimit(resource.RLIMIT_AS, (size + more * 2**20, resource.RLIM_INFINITY))
    try:
        found = engine(**large).logits
    except MemoryError:
        found = None
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert torch.equal(engine(**small).logits, expected)
    if found is not None:
        break
assert more and torch.equal(engine(**large).logits, found), more
"""


@pytest.mark.parametrize("pruner", [tp.Unpruned(), WITH_CONTEXT[0]])
def test_in_a_process_of_its_own_and_with_little_memory(pruner: tp.Pruner, tmp_path: Path) -> None:
    """A pickled engine gives the same there to the last bit; what it has no memory for is a MemoryError."""
    with pruned(small_model(max_position_embeddings=512), pruner) as model:
        engine = tp.compile(model, "int8", threads=2)
    files = tmp_path / "engine", tmp_path / "logits"
    for file, thing in zip(files, (engine, engine(**ragged_batch((5, 9))).logits), strict=True):
        file.write_bytes(pickle.dumps(thing))
    command = [sys.executable, "-c", ELSEWHERE, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_the_native_side_gets_has_the_sizes_it_says() -> None:
    with pytest.raises(tp.TokenPruningError, match=r"torch.int64 tensor of 3 numbers on cpu where 3 of torch.int32"):
        sized(torch.zeros(3, dtype=torch.int64), torch.int32, 3)
    with pytest.raises(tp.TokenPruningError, match="2 numbers"):
        sized(torch.zeros(2), torch.float32, 3)
    with pytest.raises(tp.TokenPruningError, match="float32"):
        sized(torch.zeros(4, 2)[:, 0], torch.float32, 4)


class Wrong(tp.Pruner, registered=False):
    """Returns what it was told to, whatever the layer's tokens are."""

    prune_mode = "wrong"
    answer: ClassVar[Any]

    def keep(self, tokens: Any) -> Any:
        return self.answer(tokens.scores)


@pytest.mark.parametrize(
    "answer",
    [lambda scores: scores[:-1] > 0, lambda scores: torch.ones(999, dtype=torch.bool), lambda scores: scores,
     lambda scores: (scores > 0)[:, None], lambda scores: (scores > 0).int()],
)  # fmt: skip
@pytest.mark.parametrize("way", ["packed", "masked", "engine"])
def test_a_decision_of_another_size_or_dtype_is_an_error(way: Any, answer: Any) -> None:
    method = type("Wrong", (Wrong,), {"answer": staticmethod(answer)}, registered=False)
    with pruned(small_model(), method(), "packed" if way == "engine" else way) as model:
        call: Any = tp.compile(model, "float32") if way == "engine" else model
        with pytest.raises(ValueError, match=r"Wrong\.keep returned torch.* it must be torch\.bool of shape \[63\]"):
            call(**ragged_batch(LENGTHS))


def test_every_promise_on_the_page_has_its_test() -> None:
    root = Path(__file__).parents[2]
    page = (root / "docs/promises.md").read_text(encoding="utf-8")
    promises = re.findall(r"^\*\*.*?(?=\n\n)", page, re.M | re.S)
    assert len(promises) > 8
    tests = "".join(path.read_text(encoding="utf-8") for path in (root / "tests").rglob("test_*.py"))
    for promise in promises:
        names = re.findall(r"`(test_\w+)`", promise)
        assert names, promise
        for name in names:
            assert f"def {name}(" in tests, name
