"""Calls that no model can answer, and some that it can: model, reference and engine say or compute the same."""

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers as hf

import token_pruning as tp
from tests.families.shared import PRUNERS, batch_of, kept_model, valid
from tests.tiny import (
    EVERY_FAMILY,
    LONGEST,
    MORE_HEADS,
    VOCABULARY,
    assert_close,
    assert_equal,
    pruned,
    tiny_config,
    tiny_model,
)

every_family = pytest.mark.parametrize("family", EVERY_FAMILY)
every_way = pytest.mark.parametrize("way", ["packed", "masked", "engine"])
RELATIVE = tp.RelativeThreshold(token_threshold=0.4)
IDS = torch.full((2, 5), 7)
MASK = torch.ones(2, 5)


@contextmanager
def callable_of(model: Any, way: str, pruner: tp.Pruner = RELATIVE) -> Any:
    with pruned(model, pruner, "masked" if way == "masked" else "packed"), torch.no_grad():
        yield tp.compile(model, "float32") if way == "engine" else model


BAD = [
    ("input_ids holds 200; the model has ids from 0 to 199", {"input_ids": IDS.clone().fill_(VOCABULARY)}),
    ("input_ids holds -1; the model has ids", {"input_ids": IDS.clone().fill_(-1)}),
    ("input_ids is a torch.float32 tensor", {"input_ids": IDS.float()}),
    (r"input_ids is a torch.int64 tensor of shape \[5\]; it must be int64 or int32, \[batch", {"input_ids": IDS[0]}),
    ("input_ids is a list; it must be a tensor", {"input_ids": IDS.tolist()}),
    ("input_ids is a ndarray; it must be a tensor", {"input_ids": IDS.numpy()}),
    (r"the input has shape \[3, 0\], without a place", {"input_ids": torch.zeros(3, 0, dtype=torch.long)}),
    (r"attention_mask has shape \[2, 4\]; it must be \[2, 5\]", {"attention_mask": MASK[:, :4]}),
    (r"attention_mask has shape \[2, 1, 1, 5\]; it must be", {"attention_mask": MASK[:, None, None]}),
    (r"attention_mask has shape list; it must be \[2, 5\]", {"attention_mask": MASK.tolist()}),
    ("attention_mask holds -inf; it must be 1 for a token", {"attention_mask": MASK - torch.inf}),
    ("attention_mask holds 2; it must be 1 for a token", {"attention_mask": (MASK * 2).long()}),
    ("attention_mask holds nan; it must be 1 for a token", {"attention_mask": MASK * torch.nan}),
    ("attention_masks is given; a .* has no such argument: did you mean attention_mask", {"attention_masks": MASK}),
    ("cu_seq_lens_q is given; a .* has no such argument", {"cu_seq_lens_q": torch.tensor([0, 5])}),
    ("head_mask is given; a .* has no such argument", {"head_mask": torch.ones(4, 4)}),
    (r"position_ids has shape \[2, 4\]; it must be \[2, 5\]", {"position_ids": IDS[:, :4]}),
    ("position_ids is a torch.float32 tensor", {"position_ids": IDS.float()}),
]
BAD_FOR_BERT = [
    (r"token_type_ids has shape \[2, 4\]; it must be", {"token_type_ids": torch.zeros(2, 4, dtype=torch.long)}),
    ("token_type_ids holds 2; the model has ids from 0 to 1", {"token_type_ids": torch.full((2, 5), 2)}),
    ("positions for at most 80: truncate the input", {"input_ids": torch.full((1, 81), 7)}),
    ("position_ids reach 80; the model has positions", {"position_ids": torch.full((2, 5), 80)}),
    ("position_ids reach -1; the model has positions", {"position_ids": torch.full((2, 5), -1)}),
]


@every_way
@pytest.mark.parametrize("family", ["bert", "distilbert", "deberta-v2", "modernbert", "mpnet"])
def test_a_bad_call_is_one_clear_error(family: str, way: str) -> None:
    with callable_of(kept_model(family, "token"), way) as call:
        for message, arguments in BAD + BAD_FOR_BERT * (family == "bert"):
            if "has no such" in message and way != "engine" and family in ("deberta-v2", "mpnet"):
                continue  # these heads keep it to themselves, as they do without pruning
            with pytest.raises(tp.ConfigError, match=message):
                call(**{"input_ids": IDS, **arguments})
        assert call(IDS).logits.shape == (2, 5, 3)


@every_way
def test_what_is_masked_may_hold_anything(way: str) -> None:
    """Padding is not looked up."""
    ids, mask = IDS.clone(), torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 0, 1]])
    with callable_of(kept_model("bert", "token"), way) as call:
        expected = call(ids, attention_mask=mask).logits
        ids[mask == 0] = 10**6
        assert_equal(call(ids, attention_mask=mask).logits, expected)


@every_way
@every_family
def test_no_sequences_give_an_empty_result(family: str, way: str) -> None:
    gate = tp.VocabularyGate(torch.linspace(0, 1, VOCABULARY), threshold=0.2)
    pruner = tp.FixedThreshold(final_token_threshold=0.02, vocabulary=gate)
    for head in ("sequence", "token", "encoder"):
        with callable_of(kept_model(family, head), way, pruner) as call, tp.record(call) as trace:
            output = call(torch.zeros(0, 5, dtype=torch.long), attention_mask=torch.zeros(0, 5))
        assert output[0].shape == {"sequence": (0, 3), "token": (0, 5, 3), "encoder": (0, 5, 32)}[head]
        assert not trace.passes


@pytest.mark.parametrize("cls", [hf.BertLMHeadModel, hf.RobertaForCausalLM, hf.ElectraForCausalLM])
@pytest.mark.parametrize("call", [lambda model: tp.prune(model, RELATIVE), tp.compile])
def test_a_causal_language_model_is_refused(cls: Any, call: Callable[[Any], Any]) -> None:
    model = cls(tiny_config("bert" if cls is hf.BertLMHeadModel else cls.config_class.model_type))
    with pytest.raises(tp.UnsupportedModelError, match=f"{cls.__name__} predicts every next token"):
        call(model)


def test_a_head_that_needs_the_embeddings_says_so_in_an_engine() -> None:
    """The engine has them packed; the pruned model can do it."""
    model = hf.DebertaV2ForMaskedLM(tiny_config("deberta-v2", layers=2, legacy=False)).eval()
    with pruned(model, RELATIVE), torch.no_grad():
        assert model(IDS).logits.shape == (2, 5, VOCABULARY)
        with pytest.raises(tp.UnsupportedModelError, match="reads the embeddings of its DebertaV2Model"):
            tp.compile(model, "float32")(IDS)


@every_way
@every_family
def test_the_longest_text_and_one_token_more(family: str, way: str) -> None:
    batch = batch_of(family, lengths=(LONGEST[family], 3))
    with callable_of(kept_model(family, "sequence"), way) as call:
        assert call(**batch).logits.isfinite().all()
        if family in ("bert", "roberta", "mpnet", "albert"):
            longer = torch.full((1, LONGEST[family] + 1), 7)
            with pytest.raises(tp.ConfigError, match=f"{LONGEST[family] + 1} tokens; the model has positions for at"):
                call(longer)
            masked = torch.ones_like(longer)
            masked[0, -1] = 0
            assert call(longer, attention_mask=masked).logits.isfinite().all()


@pytest.mark.parametrize("way", ["packed", "masked"])
@every_family
def test_embeddings_in_place_of_ids(family: str, way: str) -> None:
    model, batch = kept_model(family, "token"), batch_of(family)
    ids = batch["input_ids"]
    with callable_of(model, way) as call:
        given = {**batch, "position_ids": torch.arange(ids.shape[1]).expand_as(ids) + _first_position(family)}
        expected = valid(call(**given), batch)
        embedded = model.get_input_embeddings()(given.pop("input_ids"))
        actual = valid(call(**given, inputs_embeds=embedded), batch)
        for name, value in expected.items():
            assert_close(actual[name], value, 1e-4)
        for wrong in (embedded[0], embedded.long(), ids):
            with pytest.raises(tp.ConfigError, match=r"inputs_embeds is torch.* it must be a floating-point tensor"):
                call(**given, inputs_embeds=wrong)
        with pytest.raises(tp.ConfigError, match="give exactly one of input_ids and inputs_embeds"):
            call(**given, input_ids=ids, inputs_embeds=embedded)


def _first_position(family: str) -> int:
    counts_from_padding = ("roberta", "xlm-roberta", "camembert", "data2vec-text", "mpnet", "xlm-roberta-xl")
    return 2 if family in counts_from_padding else 0


@pytest.mark.parametrize("family", ["bert", "modernbert", "distilbert", "deberta-v2"])
@every_way
def test_the_loss_of_answers_does_not_depend_on_padding(family: str, way: str) -> None:
    batch = batch_of(family, lengths=(9, 4))
    spans = {"start_positions": torch.tensor([2, 1]), "end_positions": torch.tensor([[5], [9]])}  # 9: no answer there
    wider = {name: torch.nn.functional.pad(x, (0, 11)) for name, x in batch.items()}
    model = kept_model(family, "question")
    with callable_of(model, way) as call:
        narrow, wide = call(**batch, **spans), call(**wider, **spans)
        assert_close(wide.loss, narrow.loss, 1e-5)
        losses = [call(**{n: x[row : row + 1, :length] for n, x in batch.items()},
                       **{n: x[row : row + 1] for n, x in spans.items()}).loss
                  for row, length in ((0, 9), (1, 4))]  # fmt: skip
        starts = torch.stack(
            [-narrow.start_logits[0, :9].log_softmax(0)[2], -narrow.start_logits[1, :4].log_softmax(0)[1]]
        )
        ends = -narrow.end_logits[0, :9].log_softmax(0)[5]
        assert_close(narrow.loss, (starts.mean() + ends) / 2, 1e-5)
        assert_close(losses[0], (starts[0] + ends) / 2, 1e-5)
        assert_equal(call(**batch, **spans, return_dict=False)[0], narrow.loss)
        assert call(**batch, start_positions=spans["start_positions"]).loss is None
    whole = {name: x[:1] for name, x in batch.items()}
    with torch.no_grad():
        dense = model(**whole, **{n: x[:1] for n, x in spans.items()})
    with callable_of(model, way, tp.Unpruned()) as call:  # without padding it is transformers' own
        assert_close(call(**whole, **{n: x[:1] for n, x in spans.items()}).loss, dense.loss, 1e-4)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda model: torch.jit.trace(model, IDS, strict=False), "cannot be traced or exported"),
        (lambda model: torch.export.export(model, (IDS,)), "cannot be traced or exported"),
        (lambda model: torch.onnx.export(model, (IDS,), "never.onnx", dynamo=False), "cannot be traced or exported"),
        (lambda model: torch.func.vmap(lambda ids: model(ids[None]).logits)(IDS), "torch.func cannot transform"),
    ],
)
@pytest.mark.parametrize("execution", ["packed", "masked"])
@pytest.mark.filterwarnings("ignore")  # of deprecated exporters
def test_what_cannot_follow_the_input_is_refused(
    what: Callable[[Any], Any], message: str, execution: Any, tmp_path: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    with (
        pruned(tiny_model(layers=2), RELATIVE, execution) as model,
        pytest.raises(tp.UnsupportedModelError, match=message),
    ):
        what(model)
    assert not list(tmp_path.iterdir())


def test_functional_calls_and_gradients() -> None:
    def loss(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(model, weights, (IDS,)).logits.sum()

    with pruned(tiny_model(layers=2), RELATIVE) as model:
        weights = {name: weight.detach() for name, weight in model.named_parameters()}
        expected = model(IDS).logits.sum()
        assert_equal(loss(weights), expected)
        expected.backward()
        with pytest.raises(tp.UnsupportedModelError, match=r"but for gradients in the slow reference.*masked"):
            torch.func.grad(loss)(weights)
    with pruned(model, RELATIVE, "masked"):
        gradients = torch.func.grad(loss)(weights)
    for name, weight in model.named_parameters():
        assert_close(gradients[name], weight.grad, 1e-4 * max(1.0, weight.grad.abs().max().item()), name)


@pytest.mark.parametrize("head", MORE_HEADS)
def test_a_default_device_of_somebody_elses_changes_nothing(head: str) -> None:
    """Nor deterministic mode, nor autocast for an engine."""
    model = kept_model("bert", head)
    batch = batch_of("bert", head)
    with callable_of(model, "engine", PRUNERS["fixed"]) as engine, tp.record(engine) as trace:
        expected = engine(**batch)[0]
        with torch.device("meta"):
            assert torch.equal(engine(**batch)[0], expected)
            assert torch.equal(tp.compile(model, "float32")(**batch)[0], expected)
            assert_close(model(**batch)[0], expected)
        torch.use_deterministic_algorithms(True)
        try:
            assert torch.equal(engine(**batch)[0], expected)
            assert_close(model(**batch)[0], expected)
        finally:
            torch.use_deterministic_algorithms(False)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(engine(**batch)[0], expected)
    assert trace.ffn_lengths.device.type == "cpu"
