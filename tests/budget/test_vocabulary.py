"""The vocabulary threshold: scores against a plain loop, every execution path against one another, and whole runs."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import token_pruning as tp
from tests.budget.test_calibration import assert_same_fit
from tests.tiny import (
    FAMILIES,
    VOCABULARY,
    assert_close,
    assert_equal,
    outputs,
    ragged_batch,
    same_survivors,
    shared_model,
    tiny_model,
)
from tests.workspace import WORDS, edit_config, write_checkpoint, write_sst2
from token_pruning.budget.comparison import likely_divergence
from token_pruning.budget.examples import as_batch
from token_pruning.budget.vocabulary import token_ids
from token_pruning.checkpoint import load_model, read_checkpoint
from token_pruning.engine.library import KERNELS_VARIABLE, levels_here, load_library
from token_pruning.errors import ConfigError
from token_pruning.families import shape_of
from token_pruning.lab.cli import main
from token_pruning.runtime.flops import layer_flops

SCORES = torch.rand(VOCABULARY, generator=torch.Generator().manual_seed(0))
LENGTHS = [30, 12, 1, 17]
SOME: dict[str, Any] = {
    "scoring_mode": "relative",
    "thresholds": [0.5, 0.9, 1.0, 1.0],
    "vocabulary": tp.VocabularyGate(SCORES, 0.5),
}


def attach(model: Any, pruner: tp.Pruner, **options: Any) -> Any:
    return tp.prune(model, pruner, **options)


def entering_by_hand(ids: list[int], mask: list[int]) -> list[int]:
    """The places of a sequence's tokens that enter the first layer."""
    valid = [place for place, there in enumerate(mask) if there]
    return [place for place in valid if place == valid[0] or SCORES[ids[place]] >= 0.5]


def examples(count: int = 40) -> list[dict[str, Any]]:
    """Pairs between the special tokens 2 and 3."""
    rng = torch.Generator().manual_seed(1)
    found = []
    for _ in range(count):
        one, two = (torch.randint(5, 60, (int(torch.randint(2, 12, (), generator=rng)),), generator=rng).tolist()
                    for _ in range(2))  # fmt: skip
        found.append({"input_ids": [2, *one, 3, *two, 3]})
    return found


# Scores and thresholds


def test_scores_are_the_means_of_a_plain_loop() -> None:
    model, some = tiny_model(), examples()
    gate = tp.vocabulary_gate(model, some)
    found = gate.scores
    model.set_attn_implementation("eager")
    received: dict[int, list[float]] = {}
    for example in some:
        with torch.no_grad():
            attentions = model(torch.tensor([example["input_ids"]]), output_attentions=True).attentions
        upper = torch.stack([attention[0].mean(0).sum(0) for attention in attentions[2:]]).mean(0)
        for token, score in zip(example["input_ids"], upper.tolist(), strict=True):
            received.setdefault(token, []).append(score)
    for token in range(VOCABULARY):
        values = received.get(token, [])
        expected = torch.inf if token in (2, 3) else (sum(values) + 5) / (len(values) + 5)
        assert found[token].item() == pytest.approx(expected, abs=1e-5)
    assert found.dtype == torch.float32
    assert gate.threshold == 0
    assert_equal(found, tp.vocabulary_gate(tiny_model(), some[::-1]).scores)
    assert_close(tp.vocabulary_gate(tiny_model(), as_batch(some, 0)).scores[5:], found[5:], 1e-5)
    expected = gate.keeping(token_ids(some), 0.7)
    assert gate.keeping(token_ids(as_batch(some, 0)), 0.7).threshold == expected.threshold
    assert tp.vocabulary_gate(tiny_model(), some, 0.7).threshold == expected.threshold > 0


def test_an_example_without_tokens_is_named() -> None:
    some = [*examples(3), {"input_ids": []}]
    with pytest.raises(ConfigError, match=r"examples\[3\] has no tokens"):
        tp.vocabulary_gate(tiny_model(), some)


def test_scores_do_not_change_the_model() -> None:
    model = tiny_model().train()
    tp.vocabulary_gate(model, examples(4))
    assert model.training
    assert not any(hasattr(module, "token_pruner") for module in model.modules())
    with pytest.raises(ConfigError, match="no examples were given"):
        tp.vocabulary_gate(model, [])
    with pytest.raises(ConfigError, match="pruned already"):
        tp.vocabulary_gate(tp.prune(model, tp.Unpruned()), examples(4))


@given(
    worth=st.lists(st.sampled_from([0.25, 0.5, 0.75, 1.0, torch.inf]), min_size=1, max_size=8),
    ids=st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=6), min_size=1, max_size=5),
    keep_rate=st.floats(0.05, 1),
)
def test_a_threshold_drops_as_much_as_it_may_and_never_more(
    worth: list[float], ids: list[list[int]], keep_rate: float
) -> None:
    some = [{"input_ids": [token % len(worth) for token in example]} for example in ids]
    found = [worth[token] for example in some for token in example["input_ids"]]
    threshold = tp.VocabularyGate(torch.tensor(worth)).keeping(token_ids(some), keep_rate).threshold
    kept = sum(value >= threshold for value in found)
    assert kept >= keep_rate * len(found) - 1e-6
    lowest = min((value for value in found if value >= threshold), default=torch.inf)
    if lowest < torch.inf:  # the next entry would be too much
        assert sum(value > lowest for value in found) < keep_rate * len(found)


def test_a_keep_rate_of_one_drops_nothing() -> None:
    gate, ids = tp.VocabularyGate(SCORES), token_ids(examples())
    assert gate.keeping(ids, 1.0).threshold == 0
    for wrong in (0.0, 1.1):
        with pytest.raises(ConfigError, match="keep_rate"):
            gate.keeping(ids, wrong)
    with pytest.raises(ConfigError, match="no examples were given"):
        gate.keeping(ids[:0], 0.5)


# Execution


@pytest.mark.parametrize("summaries", ["none", "segment"])
@pytest.mark.parametrize("head", ["sequence", "token", "question", "encoder"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_path_drops_the_same_tokens(family: str, head: str, summaries: Any, monkeypatch: Any) -> None:
    model, batch = tiny_model(family, head), ragged_batch(LENGTHS, family=family)
    attach(model, tp.FixedThreshold(**SOME, summary_tokens=summaries), execution="masked")
    with torch.no_grad(), tp.record(model) as expected:
        reference = outputs(model(**batch))
    tp.unprune(model)
    attach(model, tp.FixedThreshold(**SOME, summary_tokens=summaries))
    runs: list[Any] = [model]
    for level in ("torch", *levels_here(load_library())[-1:]):
        monkeypatch.setenv(KERNELS_VARIABLE, level)
        runs.append(tp.compile(model, "float32", threads=1))
    for run in runs:
        with torch.no_grad(), tp.record(run) as trace:
            found = outputs(run(**batch))
        assert same_survivors(trace, expected)
        assert torch.equal(trace.attention_lengths, expected.attention_lengths)
        assert torch.equal(trace.input_lengths, torch.tensor(LENGTHS))
        for name, value in reference.items():
            assert_close(found[name], value, 1e-4, f"{type(run).__name__} {name}")
    enter = [len(entering_by_hand(*row)) for row in zip(*(t.tolist() for t in batch.values()), strict=True)]
    assert expected.attention_lengths[0].tolist() == enter
    assert sum(enter) < sum(LENGTHS)


def test_what_never_entered_keeps_its_embedding() -> None:
    model, batch = tiny_model(head="encoder"), ragged_batch(LENGTHS)
    with torch.no_grad():
        embedded = model.embeddings(batch["input_ids"])
        states = attach(model, tp.FixedThreshold(**{**SOME, "thresholds": [0.0] * 4}))(**batch).last_hidden_state
    for row, (ids, mask) in enumerate(zip(*(t.tolist() for t in batch.values()), strict=True)):
        entered = entering_by_hand(ids, mask)
        for place in range(sum(mask)):
            assert torch.allclose(states[row, place], embedded[row, place], atol=1e-5) == (place not in entered)
        assert not states[row, sum(mask) :].any()


def test_it_is_the_model_with_those_tokens_masked_out() -> None:
    model, batch = tiny_model(), ragged_batch(LENGTHS)
    mask = torch.zeros_like(batch["attention_mask"])
    for row, (ids, valid) in enumerate(zip(*(t.tolist() for t in batch.values()), strict=True)):
        mask[row, entering_by_hand(ids, valid)] = 1
    with torch.no_grad():
        expected = model(batch["input_ids"], attention_mask=mask).logits
        assert_close(attach(model, tp.FixedThreshold(**{**SOME, "thresholds": [0.0] * 4}))(**batch).logits, expected)


@settings(max_examples=25)
@given(data=st.data())
def test_a_sequence_does_not_depend_on_its_batch_or_padding(data: Any) -> None:
    model = shared_model("bert", "encoder")
    lengths = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=4))
    batch = ragged_batch(lengths, left=data.draw(st.booleans()), width=max(lengths) + data.draw(st.integers(0, 3)))
    holes = torch.tensor(data.draw(st.lists(st.booleans(), min_size=batch["attention_mask"].numel(),
                                            max_size=batch["attention_mask"].numel())))  # fmt: skip
    batch["attention_mask"] *= holes.view(batch["attention_mask"].shape)
    attach(model, tp.FixedThreshold(**SOME))
    try:
        with torch.no_grad():
            together = model(**batch).last_hidden_state
            for row in range(len(lengths)):
                alone = model(**{name: value[row : row + 1] for name, value in batch.items()}).last_hidden_state
                assert_close(alone[0], together[row], 1e-5)
    finally:
        tp.unprune(model)


def test_thresholds_that_keep_everything_change_nothing() -> None:
    batch = ragged_batch(LENGTHS)
    with torch.no_grad():
        plain = tp.prune(tiny_model(), tp.Unpruned())(**batch).logits
        gated = attach(tiny_model(), tp.Unpruned(vocabulary=tp.VocabularyGate(SCORES)))
        assert_equal(gated(**batch).logits, plain)


def test_flops_are_relative_to_all_valid_tokens() -> None:
    model, batch = tiny_model(head="token"), ragged_batch(LENGTHS)
    attach(model, tp.Unpruned(vocabulary=SOME["vocabulary"]))
    with torch.no_grad(), tp.record(model) as trace:
        model(**batch)
    enter = torch.tensor(
        [len(entering_by_hand(*row)) for row in zip(*(t.tolist() for t in batch.values()), strict=True)]
    )
    shape, given_ = shape_of(model.config), torch.tensor(LENGTHS)
    expected = layer_flops(shape, enter, enter).sum() / layer_flops(shape, given_, given_).sum()
    assert tp.count_flops(model, trace).relative == pytest.approx(float(expected))


def test_topk_counts_what_entered() -> None:
    model, batch = tiny_model(), ragged_batch([40])
    attach(model, tp.TopK(token_keep_rate=0.5, keep_all_layers=3, vocabulary=SOME["vocabulary"]))
    with torch.no_grad(), tp.record(model) as trace:
        model(**batch)
    entered = int(trace.attention_lengths[0])
    assert trace.ffn_lengths.flatten().tolist() == [entered, entered, entered, round(entered / 2)]


@pytest.mark.parametrize("execution", ["packed", "masked"])
def test_the_soft_stage_trains_what_enters(execution: Any) -> None:
    model, batch = (
        tiny_model(head="token", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        ragged_batch(LENGTHS),
    )
    attach(model, tp.LearnedThreshold(**SOME, temperature=0.1), execution=execution).train()
    with tp.record(model) as trace:
        logits = model(**batch).logits
    logits.square().mean().backward()
    assert model.token_pruner.thresholds.grad.abs().sum() > 0
    assert (trace.soft_lengths[0] < trace.input_lengths).any()
    other = tiny_model(head="token", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    attach(other, tp.LearnedThreshold(**SOME, temperature=0.1), execution="masked").train()
    valid = batch["attention_mask"].bool()
    assert_close(logits[valid], other(**batch).logits[valid], 1e-5)


# The model's own business


def test_scores_are_saved_loaded_copied_and_never_rounded(tmp_path: Path) -> None:
    model, batch = tiny_model(), ragged_batch(LENGTHS)
    attach(model, tp.FixedThreshold(**SOME)).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["vocabulary_threshold"] == 0.5
    loaded, checkpoint = tp.from_pretrained(tmp_path), read_checkpoint(tmp_path)
    assert torch.equal(loaded.token_pruner.vocabulary_scores, SCORES)
    with torch.no_grad():
        expected = model(**batch).logits
        assert_equal(loaded(**batch).logits, expected)
        assert_equal(checkpoint.prune(load_model(checkpoint))(**batch).logits, expected)
        assert_equal(copy.deepcopy(model)(**batch).logits, expected)
    assert model.to(torch.bfloat16).token_pruner.vocabulary_scores.dtype == torch.float32
    edit_config(tmp_path, vocabulary_threshold=None)  # by hand
    with torch.no_grad(), tp.record(loaded := tp.from_pretrained(tmp_path)) as trace:
        loaded(**batch)
    assert torch.equal(trace.attention_lengths[0], trace.input_lengths)


def test_what_is_missing_or_does_not_fit_is_said(tmp_path: Path) -> None:
    model = tiny_model()
    with pytest.raises(ConfigError, match=r"the vocabulary gate has 7 scores; the model's vocabulary has 200 entries"):
        tp.prune(model, tp.Unpruned(vocabulary=tp.VocabularyGate(torch.ones(7), 0.5)))
    with pytest.raises(ConfigError, match=r"vocabulary scores are \[2, 3\]"):
        tp.VocabularyGate(torch.ones(2, 3))
    with pytest.raises(ConfigError, match=r"vocabulary is 0\.5; it must be a VocabularyGate"):
        tp.Unpruned(vocabulary=0.5)  # type: ignore[arg-type]
    with torch.no_grad():
        model(**ragged_batch(LENGTHS))  # nothing is left behind
    with pytest.raises(ConfigError, match=r"vocabulary_threshold is -1"):
        tp.VocabularyGate(SCORES, -1)
    attach(model, tp.FixedThreshold(**SOME))
    embedded = model.bert.embeddings.word_embeddings(ragged_batch(LENGTHS)["input_ids"])
    with pytest.raises(ConfigError, match="needs input_ids; inputs_embeds will not do"):
        model(inputs_embeds=embedded)


def test_only_valid_tokens_are_looked_up() -> None:
    model, batch = attach(tiny_model(), tp.FixedThreshold(**SOME)), ragged_batch(LENGTHS)
    batch["input_ids"].masked_fill_(batch["attention_mask"] == 0, -100)
    tokens = model.token_pruner.attachment.pack(**batch)
    layout = tokens.layout
    entering, kept, dropped = model.token_pruner.enter(tokens)
    assert isinstance(kept, Tensor) and isinstance(dropped, Tensor)
    assert sorted([*kept.tolist(), *dropped.tolist()]) == list(range(layout.total))
    assert torch.equal(entering.indices, layout.indices[kept])


# Whole runs


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_sst2(tmp_path / "glue", train=96, dev=40)
    write_checkpoint(tmp_path / "CKPT")
    return tmp_path


def command(line: str) -> int:
    return main(line.split())


def train(line: str, output: str = "out") -> int:
    return command(f"train --lr 1e-3 --bs 8 --epoch 2 --data-dir glue --output-dir {output} --task SST2 {line}")


def read(folder: Path, name: str = "eval_results.json") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
    return found


def test_a_budget_saves_half_of_what_it_must_in_the_vocabulary(folder: Path, capsys: Any) -> None:
    assert train("--restore CKPT --masking-mode hard --target-flops 0.4") == 0
    said = capsys.readouterr().out
    assert "of the tokens enter the first layer: vocabulary threshold" in said
    assert read(folder / "out")["relative_flops"] == pytest.approx(0.4, abs=0.06)
    assert read(folder / "out")["tokens_in_first_layer"] < read(folder / "out")["tokens_entering"]
    assert " the first layer; kept per layer" in said
    left_out = next(line for line in said.splitlines() if "most frequent of the others: " in line)
    assert set(left_out.rpartition(": ")[2].split()) <= set(WORDS)
    scores = tp.from_pretrained(folder / "out").token_pruner.vocabulary_scores
    threshold = read(folder / "out", "config.json")["vocabulary_threshold"]
    assert train("--restore out --masking-mode hard --target-flops 0.3", "out2") == 0  # goes on with what it has
    assert read(folder / "out2", "config.json")["vocabulary_threshold"] == threshold
    assert torch.equal(tp.from_pretrained(folder / "out2").token_pruner.vocabulary_scores, scores)
    assert command("eval --task SST2 --data-dir glue --restore out --output-dir again") == 0
    assert read(folder / "again")["relative_flops"] == pytest.approx(read(folder / "out")["relative_flops"])
    assert command("analyze --task SST2 --data-dir glue --restore CKPT out --output-dir analysis") == 0


def test_keep_rates_from_the_command_line(folder: Path) -> None:
    assert train("--restore CKPT --masking-mode hard --target-flops 0.5 --vocabulary-keep-rate 1") == 0
    assert "vocabulary_threshold" not in read(folder / "out", "config.json")
    assert read(folder / "out")["tokens_in_first_layer"] == read(folder / "out")["tokens_entering"]
    edit_config(folder / "CKPT", prune_mode="topk", token_keep_rate=0.5)
    assert train("--restore CKPT --masking-mode hard --vocabulary-keep-rate 0.7", "topk") == 0
    result = read(folder / "topk")
    assert 0.6 < result["tokens_in_first_layer"] / result["tokens_entering"] < 0.9
    assert train("--restore CKPT --masking-mode hard", "plain") == 0  # the paper's mode has none
    assert "vocabulary_threshold" not in read(folder / "plain", "config.json")


def test_a_soft_stage_keeps_what_it_started_with(folder: Path) -> None:
    edit_config(folder / "CKPT", prune_mode="absolute_threshold", final_token_threshold=0.01)
    assert train("--restore CKPT --masking-mode soft --lambda 0.1 --vocabulary-keep-rate 0.7", "soft") == 0
    assert train("--restore soft --masking-mode hard", "hard") == 0
    thresholds = [read(folder / name, "config.json")["vocabulary_threshold"] for name in ("soft", "hard")]
    assert thresholds[0] == thresholds[1] > 0
    assert read(folder / "hard")["tokens_in_first_layer"] < read(folder / "hard")["tokens_entering"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--masking-mode none --vocabulary-keep-rate 0.5", "--vocabulary-keep-rate applies to pruning"),
        ("--masking-mode hard --vocabulary-keep-rate 1.5", "--vocabulary-keep-rate is 1.5"),
        (
            "--masking-mode hard --vocabulary-keep-rate 0.5 --vocabulary-threshold 0.7",
            "give either --vocabulary-keep-rate or --vocabulary-threshold",
        ),
        (
            "--masking-mode hard --prune-mode topk --token-keep-rate 0.5 --vocabulary-threshold 0.7",
            "vocabulary_threshold is 0.7, but the model has no vocabulary scores",
        ),
    ],
)
def test_mistakes_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str], line: str, message: str) -> None:
    assert train(f"--restore CKPT {line}") == 2
    error = capsys.readouterr().err.strip()
    assert message in error.splitlines()[-1]
    assert "Traceback" not in error


# Calibration


def frequent_and_rare(count: int = 80) -> list[dict[str, Any]]:
    """Three tokens make up half of every text."""
    rng = torch.Generator().manual_seed(2)
    found = []
    for _ in range(count):
        length = int(torch.randint(6, 30, (), generator=rng))
        ids = torch.randint(8, 60, (length,), generator=rng)
        common = torch.rand(length, generator=rng) < 0.5
        found.append({"input_ids": [2, *torch.where(common, ids % 3 + 5, ids).tolist(), 3]})
    return found


def test_calibration_tries_the_vocabulary_too() -> None:
    some = frequent_and_rare()
    model = tiny_model()
    gate = tp.vocabulary_gate(model, some)
    gate.scores[5:8] = torch.tensor([0.1, 0.2, 0.3])  # what makes up half of every text is worth nothing
    model.bert.embeddings.word_embeddings.weight.data[5:8] *= 1e-3
    result = tp.calibrate(model, some, 0.5, vocabulary=gate)
    with_, without = ([fit for fit in result.candidates if (fit.vocabulary_threshold is None) == none]
                      for none in (False, True))  # fmt: skip
    assert len(with_) > 3 and len(without) > 3
    for fit in result.candidates:
        assert fit.relative_flops == pytest.approx(0.5, abs=0.02)
        assert (fit.entering < 1) == (fit.vocabulary_threshold is not None)
    assert likely_divergence(result.chosen) == min(map(likely_divergence, result.candidates))
    again = tiny_model()
    again.bert.embeddings.word_embeddings.weight.data[5:8] *= 1e-3
    assert_same_fit(tp.calibrate(again, some, 0.5, vocabulary=gate).chosen, result.chosen)
    with torch.no_grad(), tp.record(model) as trace:
        for example in some:
            model(torch.tensor([example["input_ids"]]))
    assert tp.count_flops(model, trace).relative == pytest.approx(0.5, abs=0.03)
    assert result.pruner.vocabulary_threshold == result.chosen.vocabulary_threshold
    assert (model.token_pruner.vocabulary_scores is None) == (result.chosen.vocabulary_threshold is None)


def test_calibrated_from_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = "calibrate --task SST2 --data-dir glue --restore CKPT --target-flops 0.5 --output-dir"
    assert command(f"{line} out") == 0
    said = capsys.readouterr().out
    found = read(folder / "out", "calibration.json")
    assert any(candidate["vocabulary_threshold"] for candidate in found["candidates"])
    assert ("of the tokens enter the first layer" in said) == bool(found["chosen"]["vocabulary_threshold"])
    assert command(f"{line} plain --no-vocabulary") == 0
    candidates = read(folder / "plain", "calibration.json")["candidates"]
    assert not any(candidate["vocabulary_threshold"] for candidate in candidates)


@pytest.mark.parametrize("entries", [VOCABULARY + 9, VOCABULARY - 9])
@torch.no_grad()
def test_a_vocabulary_that_is_resized(entries: int, tmp_path: Path) -> None:
    """New entries score the mean of those that have a score; all of it is saved, loaded, compiled and copied."""
    scores = torch.arange(VOCABULARY) / VOCABULARY
    scores[:3] = torch.inf
    model = tp.prune(
        tiny_model(), tp.FixedThreshold(final_token_threshold=0.01, vocabulary=tp.VocabularyGate(scores, 0.5))
    )
    model.resize_token_embeddings(entries, mean_resizing=False)
    batch = ragged_batch([12, 7, 3])
    batch["input_ids"].clamp_(max=entries - 1)
    batch["input_ids"][0, 3] = entries - 1
    with tp.record(model) as trace:
        expected = model(**batch).logits
    expected_scores = torch.cat([scores, scores[3:].mean().expand(9)]) if entries > VOCABULARY else scores[:entries]
    assert_close(model.token_pruner.vocabulary_scores[3:], expected_scores[3:], 1e-6)
    kept = [
        sum(expected_scores[x] >= 0.5 for x in row[1:n]) + 1
        for row, n in zip(batch["input_ids"], [12, 7, 3], strict=True)
    ]
    assert trace.attention_lengths[0].tolist() == kept
    model.save_pretrained(tmp_path)
    for other in (tp.from_pretrained(tmp_path), copy.deepcopy(model)):
        assert_close(other(**batch).logits, expected, 1e-5)
    assert_close(tp.compile(model, "float32")(**batch).logits, expected, 1e-4)
    saved = tp.prune(
        tiny_model(), tp.FixedThreshold(vocabulary=tp.VocabularyGate(scores, 0.5), final_token_threshold=0.01)
    )
    saved.resize_token_embeddings(entries, mean_resizing=False)
    saved.save_pretrained(tmp_path / "before it ever ran")
    assert len(tp.from_pretrained(tmp_path / "before it ever ran").token_pruner.vocabulary_scores) == entries
