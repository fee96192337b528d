"""Settings every test runs under: offline, one thread, quiet, and the same Hypothesis examples on every run."""

import gc
import importlib.util
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
import transformers
from hypothesis import settings

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()

# `pytest --hypothesis-profile explore` looks for new examples, many more of them, and is not repeatable.
settings.register_profile("tests", deadline=None, derandomize=True, database=None, print_blob=False)
settings.register_profile("explore", deadline=None, database=None, print_blob=True)
settings.load_profile("tests")

collect_ignore = [] if importlib.util.find_spec("triton") else ["ragged/test_triton.py"]  # Triton is for Linux
GPU = torch.cuda.is_available()
if not GPU:  # before anything imports Triton's kernels
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a GPU are skipped where there is none."""
    for item in items:
        if "cuda" in item.keywords and not GPU:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))


@pytest.fixture(autouse=True, scope="module")
def _quick_garbage_collection() -> None:
    """What is there for good, most of it code, is not looked through again after every training run."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def nothing_stays_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Families and methods that the test defines are forgotten after it."""
    from token_pruning.families import base as families
    from token_pruning.pruners import base as pruners

    monkeypatch.setattr(families, "_FAMILIES", dict(families._FAMILIES))
    monkeypatch.setattr(pruners, "_METHODS", dict(pruners._METHODS))
