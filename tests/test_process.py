"""The process belongs to somebody else: what is set in it is neither changed nor depended on."""

import copy
import csv
import locale
import logging
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import token_pruning as tp
from tests.tiny import assert_close, ragged_batch, shared_model, tiny_model

SNAPSHOT = """
import csv, locale, logging, os, random, signal, sys, threading, warnings, torch
def snapshot():
    return dict(
        dtype=torch.get_default_dtype(), device=str(torch.get_default_device()), threads=torch.get_num_threads(),
        deterministic=torch.are_deterministic_algorithms_enabled(), filters=list(warnings.filters),
        signals=[signal.getsignal(s) for s in signal.valid_signals()], handlers=list(logging.getLogger().handlers),
        level=logging.getLogger().level, locale=locale.setlocale(locale.LC_ALL), environment=dict(os.environ),
        directory=os.getcwd(), path=list(sys.path), hook=sys.excepthook, limit=sys.getrecursionlimit(),
        csv=csv.field_size_limit(), random=random.getstate(), torch=torch.get_rng_state().tolist(),
        grad=torch.is_grad_enabled(), running=threading.active_count(),
    )
"""


def state() -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(SNAPSHOT, names)
    found: dict[str, Any] = names["snapshot"]()
    found["numpy"] = np.random.get_state()[1].tolist()
    found["transformers"] = transformers.logging.get_verbosity()
    return found


def everything(folder: Path) -> torch.Tensor:
    """All that the library does, but for training."""
    batch = ragged_batch([12, 7, 3])
    model = tp.prune(copy.deepcopy(shared_model("bert", "sequence")), tp.RelativeThreshold(token_threshold=0.4))
    with tp.record(model) as trace, torch.no_grad():
        model(**batch)
    tp.count_flops(model, trace)
    model.save_pretrained(folder)
    engine = tp.compile(tp.from_pretrained(folder), "float32")
    logits: torch.Tensor = engine(**batch).logits
    tp.unprune(model)
    tp.calibrate(model, ragged_batch([9, 14, 22, 30] * 8), target_flops=0.7)
    return logits


def test_nothing_in_the_process_is_changed(tmp_path: Path) -> None:
    before = state()
    everything(tmp_path)
    after = state()
    assert {name for name in before if before[name] != after[name]} == set()


def test_importing_changes_nothing_either() -> None:
    """Beyond what torch and transformers change themselves."""
    code = SNAPSHOT + (
        "import torch._dynamo\nfrom transformers import PreTrainedModel, Trainer\n"
        "before = snapshot()\n"
        "import token_pruning, token_pruning.lab.cli\n"
        "after = snapshot()\n"
        "print({name for name in before if before[name] != after[name]})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stdout + done.stderr


def test_what_others_have_set_does_not_matter(tmp_path: Path) -> None:
    """A locale with decimal commas cannot be had everywhere; the others can."""
    expected = everything(tmp_path / "before")
    numbers = np.random.get_state()
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True)
    limit, level = csv.field_size_limit(10), logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16, enabled=False):
            warnings.simplefilter("error")
            assert_close(everything(tmp_path / "after"), expected, 1e-5)
        with torch.inference_mode():
            assert_close(everything(tmp_path / "inference"), expected, 1e-5)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)
        csv.field_size_limit(limit)
        logging.getLogger().setLevel(level)
        np.random.set_state(numbers)


@pytest.mark.parametrize("name", ["de_DE.UTF-8", "C"])
def test_any_locale(name: str, tmp_path: Path) -> None:
    before = locale.setlocale(locale.LC_ALL)
    try:
        locale.setlocale(locale.LC_ALL, name)
    except locale.Error:
        pytest.skip(f"this machine has no locale {name}")
    try:
        assert everything(tmp_path).isfinite().all()
    finally:
        locale.setlocale(locale.LC_ALL, before)


def test_a_handler_for_ctrl_c_of_somebody_elses_is_called() -> None:
    """Signals are not ours: the caller's handler runs, and the call goes on."""
    engine, batch = tp.compile(tiny_model(), "float32"), ragged_batch([12, 7, 3])
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda *args: seen.append(1))
    try:
        expected = engine(**batch).logits
        os.kill(os.getpid(), signal.SIGINT)
        assert torch.equal(engine(**batch).logits, expected)
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen
