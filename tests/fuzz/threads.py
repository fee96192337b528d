"""Many threads on one engine: every result is the one that a single thread gets, to the last bit.

python -m tests.fuzz.threads --seconds 1800 --threads 8
"""

import argparse
import random
import sys
import threading
import time
from typing import Any

import torch
from torch import Tensor

import token_pruning as tp
from tests.tiny import VOCABULARY, pruned, ragged_batch, tiny_model

_GENERATOR = torch.Generator().manual_seed(0)
_CONTEXT = tp.LinearContext(
    [0, 1, 2],
    torch.randn(3, 6, 65, generator=_GENERATOR) / 8,
    torch.randn(4, 128, 7, generator=_GENERATOR) / 6**0.5,
)
_GATE = tp.VocabularyGate(torch.rand(VOCABULARY, generator=_GENERATOR), 0.3)
PRUNERS = (
    tp.Unpruned(),
    tp.FixedThreshold(final_token_threshold=0.02),
    tp.TopK(token_keep_rate=0.3, keep_all_layers=1, summary_tokens="shared"),  # decides in Python, while C++ waits
    tp.TopK(token_keep_rate=0.3, keep_all_layers=1, vocabulary=_GATE, context=_CONTEXT),
)


def run(seconds: float, threads: int, seed: int = 0) -> tuple[int, list[str]]:
    """How many calls there were, and what was wrong."""
    model = tiny_model(hidden_size=64, intermediate_size=128)
    rng = random.Random(seed)
    batches = [ragged_batch([rng.randint(1, 60) for _ in range(rng.randint(1, 6))], seed=n) for n in range(24)]
    engines: list[Any] = []
    for pruner in PRUNERS:
        with pruned(model, pruner):
            engines += [
                tp.compile(model, dtype, threads=2) for dtype in ("float32", "int8") if dtype_there(model, dtype)
            ]
    expected = [[engine(**batch).logits for batch in batches] for engine in engines]
    until, calls, wrong = time.monotonic() + seconds, [0] * threads, list[str]()

    def work(number: int) -> None:
        own = random.Random(f"{seed}:{number}")
        try:
            while time.monotonic() < until and not wrong:
                which, batch = own.randrange(len(engines)), own.randrange(len(batches))
                logits: Tensor = call(engines[which], batches[batch], record=own.random() < 0.1)
                if not torch.equal(logits, expected[which][batch]):
                    wrong.append(f"thread {number}: engine {which} gave another result for batch {batch}")
                calls[number] += 1
        except Exception as error:
            wrong.append(f"thread {number}: {type(error).__name__}: {error}")

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(calls), wrong


def dtype_there(model: Any, dtype: Any) -> bool:
    """Without the native kernels there is no int8."""
    return dtype == "float32" or tp.compile(model, "float32").is_native


def call(engine: Any, batch: dict[str, Tensor], *, record: bool) -> Tensor:
    """One call; a recording must see this thread's alone."""
    if not record:
        logits: Tensor = engine(**batch).logits
        return logits
    with tp.record(engine) as trace:
        logits = engine(**batch).logits
    assert len(trace.passes) == 1 and trace.ffn_lengths.shape[1] == len(logits), "a recording saw another thread's call"
    return logits


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    calls, wrong = run(arguments.seconds, arguments.threads, arguments.seed)
    print(*wrong, sep="\n", end="\n" if wrong else "")
    minutes = arguments.seconds / 60
    print(f"threads: {calls} calls by {arguments.threads} threads in {minutes:g} minutes, {len(wrong)} failures")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
