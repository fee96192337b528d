"""A pruned model under other people's trainers: where nothing is dropped, each run is the run without pruning.

``python -m tests.integrations.test_trainers FOLDER HOME`` is what ``accelerate launch`` starts twice.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers as hf
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sentence_transformers import (
    CrossEncoder,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.modules import Transformer
from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss, CoSENTLoss
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import token_pruning as tp
from tests.tiny import ragged_batch, tiny_model
from tests.workspace import MANY_WORDS, assert_same_training, write_transformers

LAYERS, BATCH, STEPS = 3, 4, 4
KINDS = ("classifier", "embedder", "ranker")
NOTHING_DROPPED: dict[str, tp.Pruner] = {
    "fixed": tp.FixedThreshold(thresholds=[0.0] * LAYERS),
    "learned": tp.LearnedThreshold(thresholds=[-50.0] * LAYERS),  # a soft mask of ones
}
SOFT = tp.LearnedThreshold(final_token_threshold=0.05, temperature=0.01)
REENTRANT = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}
EVERY_OTHER = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
pytestmark = pytest.mark.filterwarnings(
    # sentence-transformers uses names that transformers has replaced.
    "ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning",
    "ignore:.* only defines `gradient_checkpointing_enable`:FutureWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",  # torch's compiler asks for it
)


def texts(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(MANY_WORDS, rng.integers(2, 30))) for _ in range(count)]


def write_home(home: Path) -> Path:
    """Folders with a transformer and tokenizer each, without dropout."""
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return write_transformers(home, "embedder", layers=LAYERS, longest=64, **none)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_home(tmp_path_factory.mktemp("home"))


def dense_model(kind: str, home: Path) -> Any:
    folder = str(home / kind)
    if kind == "classifier":
        return hf.AutoModelForSequenceClassification.from_pretrained(folder)
    if kind == "ranker":
        return CrossEncoder(folder, device="cpu")
    return SentenceTransformer(modules=[Transformer(folder), Pooling(32)], device="cpu")


def examples(kind: str, home: Path, count: int) -> Any:
    if kind == "classifier":
        tokenizer = hf.AutoTokenizer.from_pretrained(home / kind)
        return [{**tokenizer(text), "labels": number % 3} for number, text in enumerate(texts(count))]
    labels = [number % 2 for number in range(count)]
    column = {"score": [float(x) for x in labels]} if kind == "embedder" else {"label": [float(x) for x in labels]}
    return Dataset.from_dict({"one": texts(count), "other": texts(count, 1), **column})


def trainer_of(
    kind: str, home: Path, folder: Path, model: Any, *,
    count: int = 40, loss: Any = None, callbacks: Any = None, **more: Any,
) -> Any:  # fmt: skip
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        **more,
    }
    data = examples(kind, home, count)
    common: dict[str, Any] = {"model": model, "train_dataset": data, "eval_dataset": data, "callbacks": callbacks}
    if kind == "classifier":
        collator = hf.DataCollatorWithPadding(hf.AutoTokenizer.from_pretrained(home / kind))
        return hf.Trainer(args=hf.TrainingArguments(**arguments), data_collator=collator, **common)
    if kind == "ranker":
        settings = CrossEncoderTrainingArguments(**arguments)
        return CrossEncoderTrainer(args=settings, loss=BinaryCrossEntropyLoss(model), **common)
    settings = SentenceTransformerTrainingArguments(**arguments)
    return SentenceTransformerTrainer(args=settings, loss=(loss or CoSENTLoss)(model), **common)


@dataclass
class Run:
    model: Any
    trainer: Any
    losses: list[float]

    @property
    def weights(self) -> dict[str, Tensor]:
        """Those that the dense model has too."""
        state = self.model.state_dict()
        return {name: value.detach().clone() for name, value in state.items() if "token_pruner" not in name}

    @property
    def thresholds(self) -> Tensor:
        return pruner_of(self.model).thresholds.detach().clone()


def pruner_of(model: Any) -> Any:
    found = next(module for name, module in model.named_modules() if name.endswith("token_pruner"))
    return found.current


def train(
    kind: str, home: Path, folder: Path, model: Any, *, weight: float | None = None, resume: Any = None, **more: Any
) -> Run:
    trainer = trainer_of(kind, home, folder, model, **more)
    if weight is not None:
        tp.regularize(tp.regularize(trainer, 7.0), weight)  # the last counts
    trainer.train(resume_from_checkpoint=resume)
    return Run(model, trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def pruned_model(kind: str, home: Path, pruner: tp.Pruner | None) -> Any:
    model = dense_model(kind, home)
    return model if pruner is None else tp.prune(model, pruner)


def assert_same_run(one: Run, other: Run, atol: float = 1e-4) -> None:
    assert len(one.losses) == len(other.losses) > 1
    assert one.losses == pytest.approx(other.losses, abs=atol)
    assert_same_training(one.weights, other.weights, atol)


def outputs(kind: str, model: Any, home: Path) -> Tensor:
    """Of a few texts, in evaluation mode."""
    model.eval()
    some = texts(5, 7)
    if kind == "classifier":
        batch = hf.AutoTokenizer.from_pretrained(home / kind)(some, padding=True, return_tensors="pt")
        with torch.no_grad():
            return model(**batch).logits
    return torch.from_numpy(
        model.predict([("w1 w2", text) for text in some]) if kind == "ranker" else model.encode(some)
    )


# Equal to the run without pruning


@pytest.mark.parametrize(
    ("arguments", "atol"),
    [
        ({}, 2e-4),
        ({"activation_checkpointing": True}, 2e-4),
        (REENTRANT, 2e-4),
        ({"gradient_accumulation_steps": 2}, 2e-4),
        ({"bf16": True}, 0.1),
    ],
    ids=["plain", "checkpointing", "re-entrant checkpointing", "accumulation", "bfloat16"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_where_nothing_is_dropped_a_run_is_the_dense_one(
    kind: str, arguments: dict[str, Any], atol: float, home: Path, tmp_path: Path
) -> None:
    dense = train(kind, home, tmp_path, dense_model(kind, home), **arguments)
    start = dense_model(kind, home).state_dict()
    assert max((dense.weights[name] - value).abs().max() for name, value in start.items()) > 2e-3  # it is training
    for pruner in (*NOTHING_DROPPED.values(), *(() if arguments else (tp.Unpruned(),))):
        assert_same_run(train(kind, home, tmp_path, pruned_model(kind, home, pruner), **arguments), dense, atol)


@pytest.mark.parametrize("kind", ["classifier", "embedder"])
def test_a_compiled_run_is_the_dense_one(kind: str, home: Path, tmp_path: Path) -> None:
    dense = train(kind, home, tmp_path, dense_model(kind, home))
    torch._dynamo.reset()
    options = {"torch_compile": True, "torch_compile_backend": "eager", "save_strategy": "steps", "save_steps": STEPS}
    compiled = train(kind, home, tmp_path, pruned_model(kind, home, NOTHING_DROPPED["fixed"]), **options)
    assert_same_run(compiled, dense)
    found = tp.from_pretrained(tmp_path / f"checkpoint-{STEPS}")
    assert torch.equal(outputs(kind, found, home), outputs(kind, compiled.model, home))


@pytest.mark.parametrize("pruner", [SOFT, tp.FixedThreshold(final_token_threshold=0.05)])
def test_compiled_shapes_do_not_compile_without_end(pruner: tp.Pruner) -> None:
    torch._dynamo.reset()
    model = tp.prune(tiny_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), pruner).train()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    graphs = []
    for step in range(6):
        batch = ragged_batch([3 + step, 10 + 2 * step, *range(1, 1 + step % 3)])
        labels = torch.arange(len(batch["input_ids"])) % 3
        found = []
        for each in (model, compiled):
            model.zero_grad()
            loss = each(**batch, labels=labels).loss
            loss.backward()
            found.append((loss, [p.grad.clone() for p in model.parameters() if p.grad is not None]))
        assert torch.allclose(found[0][0], found[1][0], atol=1e-6)
        for one, other in zip(found[0][1], found[1][1], strict=True):
            assert torch.allclose(one, other, atol=1e-5)
        graphs.append(counter.frame_count)
    assert 1 <= graphs[-1] == graphs[2] <= 4  # the head's, anew once sizes have changed


# The soft stage


@pytest.mark.parametrize("kind", KINDS)
def test_the_regularizer_is_in_the_loss_and_thresholds_learn(kind: str, home: Path, tmp_path: Path) -> None:
    one_batch = partial(train, kind, home, tmp_path, max_steps=1, count=BATCH, learning_rate=1e-2)
    plain, regularized = (one_batch(pruned_model(kind, home, SOFT), weight=weight) for weight in (None, 10.0))
    model = pruned_model(kind, home, SOFT).train()
    # All texts of the one batch, each on its own.
    tokenizer = hf.AutoTokenizer.from_pretrained(home / kind)
    rows = examples(kind, home, BATCH)
    if kind == "classifier":
        given = [{name: torch.tensor([row[name]]) for name in ("input_ids", "attention_mask")} for row in rows]
    else:
        inputs = [(r["one"], r["other"]) for r in rows] if kind == "ranker" else [*rows["one"], *rows["other"]]
        given = [tokenizer(*([x] if isinstance(x, str) else x), return_tensors="pt") for x in inputs]
    inner = model if kind == "classifier" else model[0].model
    with tp.record(model) as trace:
        for batch in given:
            inner(**batch)
    term = trace.soft_rates.sum(0).mean().item()
    assert regularized.losses[0] - plain.losses[0] == pytest.approx(10 * term, rel=1e-4)
    start = torch.tensor([SOFT.final_token_threshold * layer / LAYERS for layer in range(1, LAYERS + 1)])
    assert (regularized.thresholds - start).abs().min() > 1e-3
    assert (regularized.thresholds > plain.thresholds - 1e-6).all()  # it wants fewer tokens
    assert any(p is pruner_of(regularized.model).thresholds for g in regularized.trainer.optimizer.param_groups
               for p in g["params"])  # fmt: skip

    evaluated = regularized.trainer.evaluate()["eval_loss"]
    del regularized.trainer.compute_loss
    assert evaluated == pytest.approx(regularized.trainer.evaluate()["eval_loss"], rel=1e-6)  # the task's alone


def test_one_weight_whatever_the_accumulation(home: Path, tmp_path: Path) -> None:
    runs = []
    for steps in (1, 2):
        model = pruned_model("classifier", home, SOFT)
        more = {"gradient_accumulation_steps": steps, "per_device_train_batch_size": BATCH // steps}
        runs.append(train("classifier", home, tmp_path, model, weight=3.0, optim="sgd", **more))
    assert runs[0].losses == pytest.approx(runs[1].losses, rel=1e-3)
    assert torch.allclose(runs[0].thresholds, runs[1].thresholds, atol=1e-4)


def test_after_freezing_tokens_leave_and_the_regularizer_is_gone(home: Path, tmp_path: Path) -> None:
    model = pruned_model("classifier", home, SOFT)
    trainer = tp.regularize(trainer_of("classifier", home, tmp_path, model), 10.0)
    tp.freeze_thresholds(model)
    with tp.record(model) as trace:
        trainer.train()
    assert (trace.ffn_lengths[0] < trace.attention_lengths[0]).any()
    assert [entry["loss"] < 5 for entry in trainer.state.log_history if "loss" in entry] == [True] * STEPS


def test_what_cannot_be_regularized(home: Path, tmp_path: Path) -> None:
    fixed = trainer_of("classifier", home, tmp_path, pruned_model("classifier", home, tp.FixedThreshold()))
    with pytest.raises(tp.ConfigError, match="only LearnedThreshold has a regularizer"):
        tp.regularize(fixed, 0.1)
    with pytest.raises(tp.ConfigError, match="is not pruned"):
        tp.regularize(trainer_of("classifier", home, tmp_path, dense_model("classifier", home)), 0.1)
    with pytest.raises(tp.ConfigError, match="a BertModel is given; it must be a trainer"):
        tp.regularize(tiny_model(head="encoder"), 0.1)
    with pytest.raises(tp.ConfigError, match="weight is -1"):
        tp.regularize(fixed, -1)
    cached = partial(CachedMultipleNegativesRankingLoss, mini_batch_size=2)
    model = pruned_model("embedder", home, SOFT)
    with pytest.raises(tp.ConfigError, match="use a loss that is not cached"):
        train("embedder", home, tmp_path, model, weight=0.1, loss=cached)


# Checkpoints


class TheFirstIsBest(hf.TrainerCallback):
    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        metrics["eval_step"] = state.global_step


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pruner", [SOFT, tp.FixedThreshold(thresholds=[0.01, 0.02, 0.03])], ids=["soft", "hard"])
def test_checkpoints_resume_and_come_back_pruned(kind: str, pruner: tp.Pruner, home: Path, tmp_path: Path) -> None:
    best = {"load_best_model_at_end": True, "greater_is_better": False, "metric_for_best_model": "step"}
    weight = 0.1 if pruner is SOFT else None
    model = pruned_model(kind, home, pruner)
    whole = train(kind, home, tmp_path, model, weight=weight, callbacks=[TheFirstIsBest()], **EVERY_OTHER, **best)
    chosen = Path(whole.trainer.state.best_model_checkpoint)
    assert chosen.name == "checkpoint-2"
    found = tp.from_pretrained(chosen)
    assert torch.equal(pruner_of(found).thresholds, whole.thresholds)
    assert torch.equal(outputs(kind, found, home), outputs(kind, whole.model, home))
    with tp.record(found) as trace:
        outputs(kind, found, home)
    assert (trace.ffn_lengths[-1] < trace.attention_lengths[0]).any()

    last = tp.from_pretrained(tmp_path / f"checkpoint-{STEPS}")
    model = pruned_model(kind, home, pruner)
    resumed = train(kind, home, tmp_path, model, weight=weight, resume=str(tmp_path / "checkpoint-2"), **EVERY_OTHER)
    assert torch.equal(outputs(kind, resumed.model, home), outputs(kind, last, home))
    assert torch.equal(resumed.thresholds, pruner_of(last).thresholds)
    assert torch.equal(resumed.thresholds, whole.thresholds) == (pruner is not SOFT)  # those went on training


# PEFT


def with_lora(model: Any, *more: str) -> Any:
    torch.manual_seed(1)
    settings = peft.LoraConfig(
        task_type="SEQ_CLS", r=4, target_modules=["query", "value"], modules_to_save=["classifier", *more]
    )
    return peft.get_peft_model(model, settings)


@pytest.mark.parametrize("arguments", [{}, {"activation_checkpointing": True}, REENTRANT])
def test_lora_before_and_after_pruning_is_the_dense_run(arguments: dict[str, Any], home: Path, tmp_path: Path) -> None:
    run = partial(train, "classifier", home, tmp_path, learning_rate=1e-2, **arguments)
    dense = run(with_lora(dense_model("classifier", home)))
    for pruner in NOTHING_DROPPED.values():
        assert_same_run(run(with_lora(pruned_model("classifier", home, pruner))), dense)
        assert_same_run(run(tp.prune(with_lora(dense_model("classifier", home)), pruner)), dense)


@pytest.mark.parametrize("first", ["prune", "adapt"])
def test_merged_lora_comes_back_pruned(first: str, home: Path, tmp_path: Path) -> None:
    pruner = tp.FixedThreshold(thresholds=[0.01, 0.02, 0.03])
    model = dense_model("classifier", home)
    model = with_lora(tp.prune(model, pruner)) if first == "prune" else tp.prune(with_lora(model), pruner)
    run = train("classifier", home, tmp_path / "run", model, learning_rate=1e-2)
    expected = outputs("classifier", run.model, home)
    run.model.merge_and_unload().save_pretrained(tmp_path / "merged")
    found = tp.from_pretrained(tmp_path / "merged")
    assert torch.allclose(outputs("classifier", found, home), expected, atol=1e-5)


def test_thresholds_are_trained_and_saved_with_an_adapter(home: Path, tmp_path: Path) -> None:
    def model() -> Any:
        return with_lora(pruned_model("classifier", home, SOFT), "token_pruner")

    run = partial(train, "classifier", home, tmp_path, learning_rate=1e-2, weight=0.1, **EVERY_OTHER)
    whole = run(model())
    start = dict(model().named_parameters())
    moved = {name for name, value in whole.model.named_parameters() if not torch.equal(value, start[name])}
    assert {name for name in start if "lora_B" in name} <= moved
    assert {name for name in moved if "token_pruner" in name} == {
        "base_model.model.token_pruner.modules_to_save.default.thresholds"
    }
    resumed = run(model(), resume=str(tmp_path / "checkpoint-2"))
    assert torch.equal(resumed.thresholds, whole.thresholds)
    assert_same_training(resumed.weights, whole.weights, 1e-6)

    expected = outputs("classifier", whole.model, home)
    base = pruned_model("classifier", home, SOFT)
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / f"checkpoint-{STEPS}"))
    assert torch.equal(outputs("classifier", loaded, home), expected)
    with loaded.disable_adapter():
        alone = outputs("classifier", pruned_model("classifier", home, SOFT), home)
        assert torch.allclose(outputs("classifier", loaded, home), alone, atol=1e-6)
    tp.freeze_thresholds(loaded)
    merged = loaded.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    found = tp.from_pretrained(tmp_path / "merged")
    assert torch.equal(pruner_of(found).thresholds, whole.thresholds)
    assert torch.allclose(outputs("classifier", found, home), expected, atol=1e-5)
    assert hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").config.prune_mode
    assert torch.allclose(outputs("classifier", tp.unprune(merged), home), outputs("classifier", merged, home))


def test_an_adapter_of_sentence_transformers_trains_beside_the_thresholds(home: Path, tmp_path: Path) -> None:
    settings = peft.LoraConfig(task_type="FEATURE_EXTRACTION", r=4, target_modules=["query", "value"])
    runs = []
    for pruner in (None, NOTHING_DROPPED["learned"], SOFT):
        model = dense_model("embedder", home)
        if pruner is not SOFT:  # those are compared, and in float32 some of an adapter's gradients are rounding alone
            model.double()
        torch.manual_seed(1)
        model.add_adapter(settings)
        if pruner is not None:
            tp.prune(model, pruner)
        best = {"load_best_model_at_end": True}
        runs.append(train("embedder", home, tmp_path / str(len(runs)), model, **EVERY_OTHER, **best))
    assert_same_run(runs[1], runs[0])
    beside = load_file(Path(runs[2].trainer.state.best_model_checkpoint, "token_pruner.safetensors"))
    assert torch.equal(beside["token_pruner.thresholds"], runs[2].thresholds)
    with safe_open(Path(runs[2].trainer.state.best_model_checkpoint, "adapter_model.safetensors"), "pt") as saved:
        state = dict(runs[2].model[0].model.named_parameters())
        for name in saved.keys():  # noqa: SIM118 - not a dict
            ours = name.removeprefix("base_model.model.").replace(".weight", ".default.weight")
            assert torch.equal(saved.get_tensor(name), state[ours])


# Two processes


def accelerated(folder: Path, home: Path) -> None:
    """All kinds, dense and pruned; the first process writes what they end with."""
    runs: dict[str, tuple[tp.Pruner | None, float | None]] = {"dense": (None, None), "soft": (SOFT, 1.0)}
    runs |= {name: (pruner, None) for name, pruner in NOTHING_DROPPED.items()}
    for kind in KINDS:
        for name, (pruner, weight) in runs.items():
            more: dict[str, Any] = {"per_device_train_batch_size": BATCH // 2, "max_steps": 2}
            if kind == "ranker":
                more["ddp_find_unused_parameters"] = False  # a CrossEncoder needs it, dense or pruned
            run = train(kind, home, folder / "runs", pruned_model(kind, home, pruner), weight=weight, **more)
            tensors = {**run.weights, "losses": torch.tensor(run.losses)}
            if name == "soft":
                tensors["thresholds"] = run.thresholds
                everybodys = run.trainer.accelerator.gather(run.thresholds[None])
                assert len(everybodys) == 2 and torch.equal(everybodys[0], everybodys[1])
            if run.trainer.is_world_process_zero():
                save_file(
                    {key: value.clone().contiguous() for key, value in tensors.items()}, folder / f"{kind} {name}"
                )


def test_two_processes_of_accelerate(home: Path, tmp_path: Path) -> None:
    # On processors alone, accelerate wants an MPI with --cpu; the processes it starts for GPUs do without one.
    launch = "--multi_gpu --num_processes=2 --num_machines=1 --mixed_precision=no --dynamo_backend=no"
    line = [sys.executable, "-m", "accelerate.commands.launch", *launch.split(), "--main_process_port=0", "-m"]
    line += ["tests.integrations.test_trainers", str(tmp_path), str(home)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=480, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    for kind in KINDS:
        dense = load_file(tmp_path / f"{kind} dense")
        for name in NOTHING_DROPPED:
            found = load_file(tmp_path / f"{kind} {name}")
            assert torch.allclose(found.pop("losses"), dense["losses"], atol=1e-4)
            assert_same_training(found, {key: value for key, value in dense.items() if key != "losses"}, 1e-4)
        soft = load_file(tmp_path / f"{kind} soft")
        start = torch.tensor([SOFT.final_token_threshold * layer / LAYERS for layer in range(1, LAYERS + 1)])
        assert (soft["thresholds"] - start).abs().min() > 1e-4
    model = pruned_model("classifier", home, SOFT)
    one = train("classifier", home, tmp_path / "one", model, weight=1.0, max_steps=2)
    soft = load_file(tmp_path / "classifier soft")
    assert torch.allclose(soft["thresholds"], one.thresholds, atol=1e-4)
    assert torch.allclose(soft["losses"], torch.tensor(one.losses), atol=1e-3)


if __name__ == "__main__":
    accelerated(Path(sys.argv[1]), Path(sys.argv[2]))
