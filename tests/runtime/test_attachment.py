"""A pruned model in other hands: pickled, compiled, adapted, called from threads."""

import copy
import pickle
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

import token_pruning as tp
from tests.tiny import assert_close, assert_equal, ragged_batch, tiny_model

PRUNER = tp.RelativeThreshold(token_threshold=0.3)
BATCH = ragged_batch([30, 1, 17, 2])


def adapted(model: Any) -> Any:
    """A LoRA model with weights that matter."""
    torch.manual_seed(0)
    settings = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks for an attribute that transformers has renamed
        return peft.get_peft_model(model, settings).eval()


@pytest.mark.parametrize("head", ["sequence", "token", "encoder"])
@torch.no_grad()
def test_a_pickled_model_is_a_pruned_model_of_its_own(head: str) -> None:
    model = tp.prune(tiny_model(head=head), PRUNER)
    copied = pickle.loads(pickle.dumps(model))
    expected = model(**BATCH)[0]
    tp.unprune(model)
    assert_equal(copied(**BATCH)[0], expected)
    with tp.record(copied) as trace:
        copied(**BATCH)
    assert trace.ffn_lengths.shape == (4, 4)
    assert_equal(tp.unprune(copied)(**BATCH)[0], model(**BATCH)[0])


@torch.no_grad()
def test_a_saved_model_comes_back_in_a_fresh_process(tmp_path: Path) -> None:
    model = tp.prune(tiny_model(), PRUNER)
    torch.save({"model": model, "batch": BATCH, "logits": model(**BATCH).logits}, tmp_path / "model.pt")
    code = (
        "import sys, torch\n"
        "saved = torch.load(sys.argv[1], weights_only=False)\n"
        "difference = saved['model'](**saved['batch']).logits - saved['logits']\n"
        "assert difference.abs().max() < 1e-6, difference\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.pt")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_lora_on_a_pruned_model() -> None:
    model = adapted(tp.prune(tiny_model(), PRUNER))
    with torch.no_grad():
        packed = model(**BATCH).logits
        tp.unprune(model)
        tp.prune(model, PRUNER, execution="masked")
        assert_close(model(**BATCH).logits, packed, 1e-5)
    tp.unprune(model)
    tp.prune(model, PRUNER).train()
    model(**BATCH, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    trained = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert trained and all("lora_" in name or "modules_to_save" in name for name in trained)


@torch.no_grad()
def test_pruning_and_compiling_a_lora_model() -> None:
    model = adapted(tiny_model())
    dense = model(**BATCH).logits
    tp.prune(model, tp.Unpruned())
    assert_close(model(**BATCH).logits, dense, 1e-5)
    engine = tp.compile(model, "float32")
    assert "kernels: PyTorch" not in engine.explain()
    assert_close(engine(**BATCH).logits, dense, 1e-5)
    assert_equal(tp.unprune(model)(**BATCH).logits, dense)
    with model.disable_adapter():
        expected = model(**BATCH).logits
        assert_close(tp.compile(model, "float32")(**BATCH).logits, expected, 1e-5)
    assert (expected - dense).abs().max() > 1e-3
    model.merge_adapter()  # what is merged already is not merged again
    assert_close(tp.compile(model, "float32")(**BATCH).logits, dense, 1e-5)
    with model.disable_adapter():
        assert_close(tp.compile(model, "float32")(**BATCH).logits, expected, 1e-5)


@torch.no_grad()
def test_an_adapter_that_does_not_merge_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.tuners.lora.layer import Linear

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise NotImplementedError

    model = adapted(tiny_model())
    dense = model(**BATCH).logits
    monkeypatch.setattr(Linear, "merge", refuse)
    engine = tp.compile(model, "float32")
    assert "the native ones cannot compute a peft.tuners.lora.layer.Linear" in engine.explain()
    assert_close(engine(**BATCH).logits, dense, 1e-5)


@torch.no_grad()
def test_a_hook_keeps_a_model_off_the_native_kernels() -> None:
    model = tiny_model()
    model.bert.encoder.layer[1].intermediate.dense.register_forward_hook(lambda module, args, output: output * 0.5)
    expected = model(**BATCH).logits
    engine = tp.compile(model, "float32")
    assert "has forward hooks" in engine.explain()
    assert_close(engine(**BATCH).logits, expected, 1e-5)


@torch.no_grad()
def test_threads_share_a_model() -> None:
    model = tp.prune(tiny_model(), PRUNER)
    batches = [ragged_batch([n, n + 3]) for n in range(4, 20)]
    expected = [model(**batch).logits for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda batch: model(**batch).logits, batches))
    for logits, wanted in zip(found, expected, strict=True):
        assert_close(logits, wanted, 1e-5)


@torch.no_grad()
def test_torch_compile_still_runs() -> None:
    model = tp.prune(tiny_model(layers=2), PRUNER)
    expected = model(**BATCH).logits
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        assert_close(torch.compile(model, backend="eager")(**BATCH).logits, expected, 1e-5)
    assert not [str(x.message) for x in given if "token_pruning" in str(x.message) or "inputs.py" in str(x.message)]


@torch.no_grad()
def test_accelerate_wraps_and_unwraps_a_pruned_model() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # another test's
    model, accelerator = tiny_model(layers=2), Accelerator(cpu=True, mixed_precision="bf16")
    dense = model(**BATCH).logits
    tp.prune(model, PRUNER)
    expected = model(**BATCH).logits
    wrapped = accelerator.prepare(model)
    assert_close(wrapped(**BATCH).logits, expected, 0.1)
    plain = accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    assert plain is model
    for again in (plain, copy.deepcopy(plain)):
        assert_close(again(**BATCH).logits, expected, 1e-5)
        assert_close(tp.unprune(again)(**BATCH).logits, dense, 1e-5)
