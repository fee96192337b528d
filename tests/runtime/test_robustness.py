"""A pruned model in other hands: copies, casts, autocast, checkpointing, threads, Trainer, pipeline."""

import copy
import pickle
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import token_pruning as tp
from tests.tiny import (
    VOCABULARY,
    assert_close,
    assert_equal,
    keep_by_the_book,
    pruned,
    ragged_batch,
    same_survivors,
    tiny_config,
    tiny_model,
)

LAYERS = 4
METHODS: dict[str, tp.Pruner] = {
    "learned": tp.LearnedThreshold(final_token_threshold=0.06, max_seq_length=16),
    "fixed": tp.FixedThreshold(thresholds=[0.02, 0.03, 0.05, 0.06], max_seq_length=16),
    "topk": tp.TopK(token_keep_rate=0.4),
    "relative": tp.RelativeThreshold(token_threshold=0.3),
    "rising": tp.RisingThreshold(final_token_threshold=0.5),
}
BATCH = ragged_batch([30, 1, 17, 2])


def logits_of(model: Any, batch: dict[str, Tensor] = BATCH) -> tuple[Tensor, tp.Trace]:
    with torch.no_grad(), tp.record(model) as trace:
        return model(**batch).logits, trace


# Copies


@pytest.mark.parametrize("execution", ["packed", "masked"])
@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_a_deep_copy_computes_the_same(family: str, execution: str) -> None:
    model = tp.prune(tiny_model(family), METHODS["learned"], execution=execution)
    expected, expected_trace = logits_of(model)
    twin = copy.deepcopy(model)
    logits, trace = logits_of(twin)
    assert_equal(logits, expected)
    assert same_survivors(trace, expected_trace)
    assert twin.token_pruner is not model.token_pruner
    assert twin.config is not model.config


def test_recording_a_deep_copy_does_not_record_its_origin() -> None:
    model = tp.prune(tiny_model(), METHODS["learned"])
    twin = copy.deepcopy(model)
    with torch.no_grad(), tp.record(model) as of_model, tp.record(twin) as of_twin:
        model(**BATCH)
        twin(**ragged_batch([5]))
    assert of_model.attention_lengths.shape == (LAYERS, 4)
    assert of_twin.attention_lengths.shape == (LAYERS, 1)


@pytest.mark.parametrize("change_copy", [True, False])
def test_changes_to_one_of_two_deep_copies_do_not_reach_the_other(change_copy: bool) -> None:
    model = tp.prune(tiny_model(), METHODS["learned"])
    before, _ = logits_of(model)
    twin = copy.deepcopy(model)
    changed, other = (twin, model) if change_copy else (model, twin)
    with torch.no_grad():
        changed.token_pruner.thresholds.fill_(9.0)
    _, trace = logits_of(changed)
    assert trace.ffn_lengths[0].tolist() == [1, 1, 1, 1]
    assert_equal(logits_of(other)[0], before)
    with torch.no_grad():
        for parameter in changed.bert.parameters():
            parameter.zero_()
    changed.config.prune_mode = "changed"
    changed.train()
    assert not other.training and not other.token_pruner.training
    assert_equal(logits_of(other)[0], before)
    assert other.config.prune_mode == "absolute_threshold"


@pytest.mark.parametrize("unprune_copy", [True, False])
@pytest.mark.parametrize("family", ["roberta", "distilbert"])
def test_unpruning_one_of_two_deep_copies_leaves_the_other_pruned(family: str, unprune_copy: bool) -> None:
    batch = ragged_batch([30, 1, 17, 2], family=family)
    model = tiny_model(family)
    with torch.no_grad():
        dense = model(**batch).logits
    tp.prune(model, METHODS["relative"])
    expected, _ = logits_of(model, batch)
    twin = copy.deepcopy(model)
    gone, stays = (twin, model) if unprune_copy else (model, twin)
    tp.unprune(gone)
    with torch.no_grad():
        assert_equal(gone(**batch).logits, dense)
    assert not hasattr(gone, "token_pruner")
    assert not hasattr(gone.config, "prune_mode")
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in gone.modules())
    assert_equal(logits_of(stays, batch)[0], expected)
    assert not torch.equal(expected, dense)
    tp.unprune(stays)
    with torch.no_grad():
        assert_equal(stays(**batch).logits, dense)


# Number formats


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("bfloat16", torch.bfloat16), ("half", torch.float16), ("double", torch.float64), ("to", torch.bfloat16)],
)
@pytest.mark.parametrize("method", METHODS)
def test_casts_leave_thresholds_in_float32(method: str, name: str, dtype: torch.dtype) -> None:
    model = tp.prune(tiny_model(), METHODS[method])
    thresholds = model.token_pruner.thresholds
    before = None if thresholds is None else thresholds.detach().clone()
    cast = getattr(model, name)
    assert (cast(dtype) if name == "to" else cast()) is model
    assert model.dtype == dtype
    if before is not None:
        assert model.token_pruner.thresholds.dtype == torch.float32
        assert torch.equal(model.token_pruner.thresholds, before)
        assert isinstance(model.token_pruner.thresholds, nn.Parameter) == (method == "learned")
    logits, trace = logits_of(model)
    assert logits.dtype == dtype
    assert logits.isfinite().all()
    assert 4 < trace.ffn_lengths[-1].sum().item() < 50


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_decisions_are_taken_in_float32_whatever_the_dtype(family: str, dtype: torch.dtype) -> None:
    # Not a half-precision number, and a score that differs from it only beyond half precision must see that.
    pruner = tp.FixedThreshold(thresholds=[0.0312345678, 0.04, 0.05, 0.06], max_seq_length=16)
    model = tp.prune(tiny_model(family), pruner).to(dtype)
    assert model.token_pruner.thresholds[0].item() == torch.tensor(0.0312345678).item()
    _, trace = logits_of(model)
    (done,) = trace.passes
    for layer, record in done.layers.items():
        assert record.scores is not None and record.scores.dtype == torch.float32
        # Not rounded to half precision on the way.
        assert not torch.equal(record.scores, record.scores.to(torch.bfloat16).float())
        left = [
            sum(keep_by_the_book(pruner, layer, LAYERS, scores.tolist(), len(scores))[0])
            for scores in record.scores.split(record.entering.lengths)
        ]
        assert record.leaving.lengths == left


@pytest.mark.parametrize("family", ["bert", "distilbert"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_float32_and_independent_of_the_batch(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, initializer_range=0.1)
    batch = ragged_batch([33, 5, 70, 1, 20], family=family)
    with pruned(model, tp.FixedThreshold(final_token_threshold=0)):
        expected, _ = logits_of(model, batch)
        model.to(dtype)
        logits, _ = logits_of(model, batch)
        assert_close(logits, expected, 0.05)
        for row, length in enumerate([33, 5, 70, 1, 20]):
            alone = {name: value[row : row + 1, :length] for name, value in batch.items()}
            assert_close(logits_of(model, alone)[0][0], logits[row], 0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_compute_the_tokens_that_are_left_and_in_half_precision_a_little_filler(dtype: torch.dtype) -> None:
    model = tp.prune(tiny_model(head="token"), METHODS["topk"]).to(dtype)
    rows = []
    for layer in model.bert.encoder.layer:
        layer.intermediate.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    logits_of(model, ragged_batch([50, 29, 9]))  # 88 tokens; 20, 12 and 4 stay after the last layer
    half = dtype == torch.bfloat16
    assert rows == [88] * 3 + [36]  # 88 and 36 are among the few row counts of half precision
    rows.clear()
    logits_of(model, ragged_batch([50, 28, 9]))
    assert rows == [88 if half else 87] * 3 + [36 if half else 35]


@pytest.mark.parametrize("method", METHODS)
def test_autocast_computes_in_half_precision_and_decides_in_float32(method: str) -> None:
    model = tp.prune(tiny_model(initializer_range=0.1), METHODS[method])
    with torch.autocast("cpu", torch.bfloat16):
        logits, trace = logits_of(model)
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()
    for record in trace.passes[0].layers.values():
        assert record.scores is None or record.scores.dtype == torch.float32
    tp.unprune(model)
    with pruned(model, tp.FixedThreshold(final_token_threshold=0)):
        expected, _ = logits_of(model)
        with torch.autocast("cpu", torch.bfloat16):
            assert_close(logits_of(model)[0], expected, 0.05)


def test_training_under_autocast_gives_finite_gradients_in_both_stages() -> None:
    for pruner in (METHODS["learned"], METHODS["fixed"]):
        model = tp.prune(tiny_model(), pruner).train()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**BATCH, labels=torch.tensor([0, 1, 2, 0])).loss
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert len(gradients) > 50
        assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("execution", ["packed", "masked"])
@pytest.mark.parametrize("method", METHODS)
def test_inference_mode(method: str, execution: str) -> None:
    model = tp.prune(tiny_model(), METHODS[method], execution=execution)
    expected, expected_trace = logits_of(model)
    with torch.inference_mode(), tp.record(model) as trace:
        logits = model(**BATCH).logits
    assert_close(logits, expected, 1e-6)
    assert same_survivors(trace, expected_trace)
    model.train()  # nothing made in inference mode stays behind
    model(**BATCH).logits.sum().backward()


# Gradient checkpointing


def checkpoint(model: Any, *, reentrant: bool) -> None:
    # transformers 5.23 renamed it, and warns of the old name.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


def loss_and_gradients(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor], tp.Trace]:
    torch.manual_seed(0)  # the same dropout every time
    model.zero_grad(set_to_none=True)
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 3, batch["input_ids"].shape, generator=generator)
    with tp.record(model) as trace:
        loss = model(**batch, labels=labels).loss
    if model.token_pruner.soft:
        loss = loss + 0.1 * trace.soft_rates.sum(0).mean()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, trace


@pytest.mark.parametrize(("execution", "reentrant"), [("packed", False), ("packed", True), ("masked", False)])
@pytest.mark.parametrize("stage", ["soft", "hard"])
@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_checkpointing_gives_the_same_loss_and_gradients(
    family: str, stage: str, execution: Any, reentrant: bool
) -> None:
    pruner: tp.Pruner = METHODS["fixed"]
    if stage == "soft":
        pruner = tp.LearnedThreshold(final_token_threshold=0.06, max_seq_length=16, temperature=0.02)
    model = tp.prune(tiny_model(family, "token"), pruner, execution=execution).train()
    loss, gradients, trace = loss_and_gradients(model, BATCH)
    assert ("token_pruner.thresholds" in gradients) == (stage == "soft")
    assert (trace.ffn_lengths.sum() < trace.attention_lengths[0].sum() * LAYERS).item() == (stage == "hard")
    checkpoint(model, reentrant=reentrant)
    again, recomputed, again_trace = loss_and_gradients(model, BATCH)
    assert_close(again, loss, 1e-6)
    assert again_trace.attention_lengths.shape == (LAYERS, 4)  # recomputation is not recorded
    assert same_survivors(trace, again_trace)
    assert recomputed.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert_close(recomputed[name], gradient, 1e-5, name)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_recomputation_does_not_decide_again(family: str, reentrant: bool) -> None:
    model = tp.prune(tiny_model(family, "token"), METHODS["fixed"]).train()
    _, expected, _ = loss_and_gradients(model, BATCH)
    checkpoint(model, reentrant=reentrant)
    torch.manual_seed(0)
    model.zero_grad(set_to_none=True)
    labels = torch.randint(0, 3, BATCH["input_ids"].shape, generator=torch.Generator().manual_seed(1))
    loss = model(**BATCH, labels=labels).loss
    model.token_pruner.thresholds.fill_(9.0)  # by now the tokens that left have left
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert_close(parameter.grad, expected[name], 1e-5, name)


@pytest.mark.parametrize(
    ("pruner", "execution"),
    [(METHODS["fixed"], "masked"), (tp.TopK(token_keep_rate=0.3, summary_tokens="shared"), "packed")],
)
def test_reentrant_checkpointing_is_refused_where_it_would_lose_gradients(pruner: tp.Pruner, execution: Any) -> None:
    model = tp.prune(tiny_model("bert", "token"), pruner, execution=execution).train()
    checkpoint(model, reentrant=True)
    with pytest.raises(tp.ConfigError, match=r're-entrant.*"use_reentrant": False'):
        loss_and_gradients(model, BATCH)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_evaluation_with_checkpointing_on_is_evaluation(family: str, reentrant: bool) -> None:
    model = tp.prune(tiny_model(family), METHODS["learned"])
    expected, expected_trace = logits_of(model)
    checkpoint(model, reentrant=reentrant)
    logits, trace = logits_of(model)
    assert_equal(logits, expected)
    assert same_survivors(trace, expected_trace)
    assert_equal(model(**BATCH).logits.detach(), model(**BATCH).logits.detach())  # with gradients on, too


# Threads


@pytest.fixture
def eager_switching() -> Any:
    """Python threads that take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def in_threads(*targets: Any) -> None:
    """Run them at once; an error in any of them is raised here."""
    errors: list[BaseException] = []

    def guarded(target: Any) -> None:
        try:
            target()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(target,)) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.usefixtures("eager_switching")
@pytest.mark.parametrize("execution", ["packed", "masked"])
@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_two_threads_share_a_model_and_each_records_its_own_passes(family: str, execution: str) -> None:
    model = tp.prune(tiny_model(family), METHODS["relative"], execution=execution)
    work = [
        [ragged_batch(lengths, family=family, seed=seed) for seed in range(6)]
        for lengths in ([30, 1, 17], [9, 60, 4, 25], [12])
    ]
    expected = [[logits_of(model, batch) for batch in batches] for batches in work]
    rounds, barrier = 5, threading.Barrier(len(work))

    def worker(number: int) -> None:
        barrier.wait()
        with torch.no_grad(), tp.record(model) as whole:
            for _ in range(rounds):
                for batch, (logits, trace) in zip(work[number], expected[number], strict=True):
                    with tp.record(model) as own:
                        actual = model(**batch).logits
                    assert_equal(actual, logits)
                    assert same_survivors(own, trace)
        assert whole.ffn_lengths.shape[1] == rounds * sum(len(batch["input_ids"]) for batch in work[number])

    in_threads(*[lambda number=number: worker(number) for number in range(len(work))])


@pytest.mark.usefixtures("eager_switching")
def test_two_threads_train_softly_at_once() -> None:
    model = tp.prune(tiny_model("distilbert", "token", dropout=0.0, attention_dropout=0.0), METHODS["learned"]).train()
    thresholds = model.token_pruner.thresholds
    batches = [ragged_batch([30, 1, 17]), ragged_batch([9, 60, 4, 25])]

    def gradient(batch: dict[str, Tensor]) -> Tensor:
        with tp.record(model) as trace:
            loss = model(**batch).logits.square().mean() + trace.soft_rates.sum()
        (result,) = torch.autograd.grad(loss, thresholds)
        return result

    expected = [gradient(batch) for batch in batches]

    def worker(number: int) -> None:
        for _ in range(8):
            assert_close(gradient(batches[number]), expected[number], 1e-4)

    in_threads(lambda: worker(0), lambda: worker(1))


def test_a_recording_does_not_see_other_threads() -> None:
    model = tp.prune(tiny_model(), METHODS["topk"])

    def elsewhere() -> None:
        with torch.no_grad():
            model(**BATCH)

    with tp.record(model) as trace:
        in_threads(elsewhere)
    assert trace.passes == []


def test_nested_recordings_see_what_runs_inside_them() -> None:
    model, other = (tp.prune(tiny_model(), METHODS["topk"]) for _ in range(2))
    with torch.no_grad(), tp.record(model) as outer:
        model(**ragged_batch([5]))
        with tp.record(model) as inner, tp.record(other) as of_other:
            model(**ragged_batch([7]))
            other(**ragged_batch([9]))
        model(**ragged_batch([11]))
    assert outer.attention_lengths[0].tolist() == [5, 7, 11]
    assert inner.attention_lengths[0].tolist() == [7]
    assert of_other.attention_lengths[0].tolist() == [9]


def test_a_recording_ends_when_its_block_fails() -> None:
    model = tp.prune(tiny_model(), METHODS["topk"])
    with pytest.raises(KeyboardInterrupt), tp.record(model) as trace:
        raise KeyboardInterrupt
    logits_of(model)
    assert trace.passes == []


# The rest of the world


@pytest.mark.parametrize("method", METHODS)
def test_a_text_classification_pipeline_gives_the_unbatched_results(method: str, tmp_path: Path) -> None:
    words = [f"word{i}" for i in range(VOCABULARY - 5)]
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]) + "\n")
    tokenizer = hf.BertTokenizerFast(str(vocabulary))
    model = tp.prune(tiny_model(), METHODS[method])
    pipe = hf.pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
    texts = [" ".join(words[(7 * i + 3 * j) % len(words)] for j in range(1 + 5 * i)) for i in range(11)]
    with tp.record(model) as trace:
        batched = pipe(texts, batch_size=8, top_k=None)
    assert trace.attention_lengths[0].tolist() == [3 + 5 * i for i in range(11)]  # a word more, [CLS] and [SEP]
    for text, results in zip(texts, batched, strict=True):
        ids = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            scores = model(**ids).logits[0].softmax(-1)
        assert {r["label"]: r["score"] for r in results} == pytest.approx(
            {model.config.id2label[i]: score for i, score in enumerate(scores.tolist())}, abs=1e-5
        )


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    width = max(len(row["input_ids"]) for row in rows)
    ids = [row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows]
    mask = [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows]
    return {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(mask),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


def test_trainer_predicts_and_trains_with_a_pruned_model(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model = tp.prune(tiny_model(), METHODS["learned"])
    batch = ragged_batch([5, 30, 1, 12, 44, 9, 2])
    rows = [
        {"input_ids": ids[mask.bool()].tolist(), "labels": row % 3}
        for row, (ids, mask) in enumerate(zip(*batch.values(), strict=True))
    ]
    expected, _ = logits_of(model, batch)
    arguments = hf.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_eval_batch_size=3,
        per_device_train_batch_size=3,
        max_steps=3,
        learning_rate=1e-2,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
        dataloader_pin_memory=False,
    )
    trainer = hf.Trainer(model=model, args=arguments, data_collator=collate, train_dataset=rows, eval_dataset=rows)
    prediction = trainer.predict(rows)
    assert_close(torch.from_numpy(prediction.predictions), expected)
    before = model.token_pruner.thresholds.detach().clone()
    trainer.train()
    assert not torch.equal(model.token_pruner.thresholds, before)
    trainer.save_model(str(tmp_path / "saved"))
    model.eval()
    assert_close(logits_of(tp.from_pretrained(tmp_path / "saved"), batch)[0], logits_of(model, batch)[0], 1e-6)


def test_record_and_unprune_find_a_model_inside_a_wrapper() -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    model = tp.prune(tiny_model(), METHODS["topk"])
    wrapper = Wrapper(model)
    with torch.no_grad(), tp.record(wrapper) as trace:
        model(**BATCH)
    assert trace.attention_lengths.shape == (LAYERS, 4)
    tp.unprune(wrapper)
    assert not hasattr(model, "token_pruner")


@pytest.mark.parametrize("execution", ["packed", "masked"])
def test_the_bare_encoder_of_a_model_can_be_pruned_on_its_own(execution: str) -> None:
    model, twin = tiny_model(), tiny_model()
    tp.prune(model.base_model, METHODS["fixed"], execution=execution)
    tp.prune(twin, METHODS["fixed"])
    assert_close(logits_of(model)[0], logits_of(twin)[0])
    tp.unprune(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_state_dicts_carry_thresholds_from_model_to_model() -> None:
    source = tp.prune(tiny_model(), tp.LearnedThreshold(thresholds=[0.01, 0.02, 0.03, 0.1234567]))
    target = tp.prune(tiny_model(seed=1), tp.LearnedThreshold())
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.token_pruner.thresholds, source.token_pruner.thresholds)
    assert_equal(logits_of(target)[0], logits_of(source)[0])


def test_what_is_a_parameter() -> None:
    def names(pruner: tp.Pruner) -> set[str]:
        return {name for name, _ in tp.prune(tiny_model(), pruner).named_parameters() if "token_pruner" in name}

    assert names(METHODS["learned"]) == {"token_pruner.thresholds"}
    for method in ("fixed", "topk", "relative", "rising"):
        assert names(METHODS[method]) == set()


def test_hard_training_removes_tokens_and_gives_gradients() -> None:
    for family in ("bert", "distilbert"):
        model = tp.prune(tiny_model(family, "token"), METHODS["fixed"]).train()
        _, gradients, trace = loss_and_gradients(model, BATCH)
        assert trace.ffn_lengths[-1].sum() < trace.attention_lengths[0].sum()
        assert all(gradient.isfinite().all() for gradient in gradients.values())
        assert gradients[next(name for name in gradients if "word_embeddings" in name)].any()


def test_packed_gradients_equal_masked_gradients_in_hard_training() -> None:
    for family, dropout in (
        ("bert", {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
        ("distilbert", {"dropout": 0.0, "attention_dropout": 0.0}),
    ):
        results = []
        for execution in ("packed", "masked"):
            model = tiny_model(family, "token", **dropout)
            tp.prune(model, METHODS["relative"], execution=execution).train()
            valid = dict(BATCH)
            logits = model(**valid).logits[valid["attention_mask"].bool()]
            weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
            (logits * weights).mean().backward()
            results.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        assert results[0].keys() == results[1].keys()
        for name, gradient in results[0].items():
            scale = max(1.0, results[1][name].abs().max().item())
            assert_close(gradient, results[1][name], 1e-4 * scale, f"{family} {name}")


def test_tiny_configs_are_separate_objects() -> None:
    assert tiny_config("bert") is not tiny_config("bert")


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_a_pickled_model_comes_back_pruned(family: str) -> None:
    model = tp.prune(tiny_model(family), tp.FixedThreshold(final_token_threshold=0.05))
    copied = pickle.loads(pickle.dumps(model))
    batch = ragged_batch([9, 30], family=family)
    with torch.no_grad(), tp.record(copied) as trace:
        assert_equal(copied(**batch).logits, model(**batch).logits)
    assert (trace.ffn_lengths[-1] < torch.tensor([9, 30])).any()
