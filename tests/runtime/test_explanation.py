"""Why tokens leave: against attention probabilities and plain loops, for models and engines; text, HTML, mistakes."""

import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import token_pruning as tp
from tests.tiny import VOCABULARY, divisor_by_the_book, keep_by_the_book, pruned, shared_model, tiny_model
from token_pruning.runtime.drawing import ExplainedToken, greyed, layers, pieces, words
from token_pruning.runtime.explanation import explain_tokens

WORDS = [f"w{number}" for number in range(VOCABULARY - 5)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TOKENIZER = hf.BertTokenizerFast(vocab={word: i for i, word in enumerate(SPECIAL + WORDS)})
TEXT = " ".join(WORDS[(7 * step) % 90] for step in range(20))
METHODS: dict[str, tp.Pruner] = {
    "mean": tp.FixedThreshold(final_token_threshold=0.011),
    "mean_norm": tp.FixedThreshold(thresholds=[0.02, 0.04, 0.0, 0.06], scoring_mode="mean_norm"),
    "topk": tp.TopK(token_keep_rate=0.2, keep_all_layers=1),
    "relative": tp.RelativeThreshold(token_threshold=0.1),
    "rising": tp.RisingThreshold(final_token_threshold=0.3),
    "some layers": tp.FixedThreshold(thresholds=[0.8, 0.9, 0.9, 0.9], scoring_mode="relative", prune_layers=[2, 3]),
}


def by_hand(model: Any, pruner: tp.Pruner, text: str) -> list[tuple[int | None, float | None]]:
    """The layer that each token left after, and the value that decided, from attention probabilities."""
    batch = TOKENIZER(text, return_tensors="pt")
    with pruned(model, pruner, "masked"), torch.no_grad():
        attentions = model(**batch, output_attentions=True).attentions
    total = batch["input_ids"].shape[1]
    there = list(range(total))
    found: list[tuple[int | None, float | None]] = [(None, None)] * total
    for layer, probabilities in enumerate(attentions, start=1):
        mean = probabilities[0].mean(0)
        scores = [sum(float(mean[j, i]) for j in there) / divisor_by_the_book(pruner, len(there)) for i in there]
        if pruner.prunes(layer, len(attentions)) and layer not in zero_layers(pruner):
            keep, _ = keep_by_the_book(pruner, layer, len(attentions), scores, total)
            relative = isinstance(pruner, tp.RelativeThreshold | tp.RisingThreshold)
            for i, score, stays in zip(there, scores, keep, strict=True):
                found[i] = (None if stays else layer, score / max(scores) if relative else score)
            there = [i for i, stays in zip(there, keep, strict=True) if stays]
    return found


def zero_layers(pruner: tp.Pruner) -> list[int]:
    given = getattr(pruner, "thresholds", None) or []
    return [layer for layer, threshold in enumerate(given, start=1) if threshold == 0]


@pytest.mark.parametrize("name", METHODS)
def test_layers_and_values_are_those_of_attention(name: str) -> None:
    model, pruner = shared_model("bert", "token"), METHODS[name]
    expected = by_hand(model, pruner, TEXT)
    with pruned(model, pruner):
        explanation = tp.explain(model, TEXT, TOKENIZER)
        engine = tp.explain(tp.compile(model, dtype="float32"), TEXT, TOKENIZER)
    assert [token.text for token in explanation.tokens] == ["[CLS]", *TEXT.split(), "[SEP]"]
    assert {token.left_after for token in explanation.tokens} - {None}  # some leave
    assert explanation.tokens[0] == ExplainedToken("[CLS]", None, "first token")
    for found, compiled, (left_after, value) in list(zip(explanation.tokens, engine.tokens, expected, strict=True))[1:]:
        assert found.left_after == compiled.left_after == left_after, found
        assert found.decided_by == compiled.decided_by == "importance"
        assert found.decided_in == compiled.decided_in
        assert found.value == pytest.approx(value, rel=1e-4)
        assert compiled.value == pytest.approx(value, rel=1e-3)
        if left_after is not None:
            assert found.decided_in == left_after
            assert found.threshold is None or found.value <= found.threshold  # type: ignore[operator]
        elif found.threshold is not None:
            assert found.value >= found.threshold  # type: ignore[operator]


def test_the_thresholds_are_the_methods() -> None:
    model = shared_model("bert", "token")
    limits = {
        "mean": lambda layer: 0.011 * layer / 4,
        "relative": lambda layer: 0.1,
        "rising": lambda layer: 0.075 * layer,
    }
    for name, limit in limits.items():
        with pruned(model, METHODS[name]):
            tokens = tp.explain(model, TEXT, TOKENIZER).tokens[1:]
        assert all(token.threshold == pytest.approx(limit(token.decided_in)) for token in tokens)
    with pruned(model, METHODS["topk"]):
        tokens = tp.explain(model, TEXT, TOKENIZER).tokens[1:]
    stayed = [token.value for token in tokens if token.left_after is None]
    for token in tokens:
        if token.decided_in == 4:
            assert token.threshold == min(stayed)  # type: ignore[type-var]


def test_gate_probe_and_protection() -> None:
    model = shared_model("bert", "encoder")
    scores = torch.linspace(0.1, 2, VOCABULARY).index_fill(0, torch.tensor([0, 2]), math.inf)
    weights = torch.randn(1, 33, generator=torch.Generator().manual_seed(3))
    pruner = tp.FixedThreshold(
        thresholds=[0.0, 0.5, 0.0, 0.7], scoring_mode="relative", vocabulary=tp.VocabularyGate(scores, 0.5),
        probes=tp.Probes(layers=[2], weights=weights), protect=["separators"],
    )  # fmt: skip
    with pruned(model, pruner):
        explanation = tp.explain(model, TEXT, TOKENIZER)
        ids = TOKENIZER(TEXT)["input_ids"]
        with tp.record(model) as trace:
            model(torch.tensor([ids]))
        engine = tp.explain(tp.compile(model, dtype="float32"), TEXT, TOKENIZER)
    [done] = trace.passes
    probed = dict(zip(done.layers[2].entering.indices.tolist(), done.layers[2].scores.tolist(), strict=True))
    for place, (token, same) in enumerate(zip(explanation.tokens, engine.tokens, strict=True)):
        assert (token.left_after, token.decided_by, token.decided_in) == (
            same.left_after, same.decided_by, same.decided_in
        )  # fmt: skip
        if place == len(ids) - 1:
            assert token == ExplainedToken("[SEP]", None, "protected")
        elif place and scores[ids[place]] < 0.5:
            assert token == ExplainedToken(
                token.text, 0, "vocabulary gate", 0, pytest.approx(float(scores[ids[place]])), 0.5
            )
        elif place and probed[place] < 0.5:
            assert token == ExplainedToken(token.text, 2, "probe", 2, pytest.approx(probed[place], rel=1e-5), 0.5)
        elif place:
            assert (token.decided_by, token.decided_in) == ("importance", 4)
    reasons = {token.decided_by for token in explanation.tokens}
    assert reasons == {"first token", "protected", "vocabulary gate", "probe", "importance"}


@pytest.mark.parametrize("chunks", [False, True])
def test_texts_longer_than_max_tokens(chunks: bool) -> None:
    model = shared_model("bert", "encoder")
    text = " ".join(WORDS[(7 * step) % 90] for step in range(60))
    pruner = tp.FixedThreshold(thresholds=[0.9] * 4, scoring_mode="relative", max_tokens=24, chunks=chunks)
    with pruned(model, pruner, reads="mean"):
        explanation = tp.explain(model, text, TOKENIZER)
        with tp.record(model) as trace:
            model(torch.tensor([TOKENIZER(text)["input_ids"]]))
        engine = tp.explain(tp.compile(model, dtype="float32"), text, TOKENIZER)
    assert [token.text for token in explanation.tokens] == ["[CLS]", *text.split(), "[SEP]"]
    assert [token.left_after for token in engine.tokens] == [token.left_after for token in explanation.tokens]
    chosen = [token for token in explanation.tokens if token.decided_by != "max_tokens"]
    assert len(chosen) == (62 if chunks else 1 + 2 * 8 + 1)
    assert all(token.left_after == 0 for token in explanation.tokens if token not in chosen)
    survived = torch.cat(trace.survived_layers).tolist()
    expected = sorted(layers if layers < 4 else 9 for layers in survived)
    found = sorted(9 if token.left_after is None else token.left_after - 1 for token in chosen)
    if not chunks:
        assert found == expected
    else:  # the first and the last token stand in every window
        assert len(expected) - len(found) == 2 * (len(trace.survived_layers) - 1)


@pytest.mark.parametrize("which", ["shared", "segment"])
def test_a_token_whose_place_holds_a_summary_has_left(which: Any) -> None:
    model = shared_model("bert", "token")
    pruner = tp.FixedThreshold(thresholds=[0.8, 0.9, 0.9, 0.9], scoring_mode="relative", summary_tokens=which)
    with pruned(model, pruner):
        explanation = tp.explain(model, [TEXT, "w1 w2 w3"], TOKENIZER)
        encoded = TOKENIZER(TEXT, "w1 w2 w3", return_tensors="pt")
        with tp.record(model) as trace:
            model(**encoded)
        engine = tp.explain(tp.compile(model, dtype="float32"), [TEXT, "w1 w2 w3"], TOKENIZER)
    survived = [4 if token.left_after is None else token.left_after - 1 for token in explanation.tokens]
    assert survived == trace.survived_layers[0].tolist()
    assert [token.left_after for token in engine.tokens] == [token.left_after for token in explanation.tokens]


def test_a_model_of_choices_gets_one() -> None:
    model = shared_model("bert", "multiple_choice")
    with pruned(model, METHODS["mean"]):
        explanation, engine = (
            tp.explain(each, TEXT, TOKENIZER) for each in (model, tp.compile(model, dtype="float32"))
        )
    assert [token.left_after for token in explanation.tokens] == [token.left_after for token in engine.tokens]
    assert len(explanation.tokens) == 22


def test_a_model_in_training_is_explained_as_it_infers() -> None:
    model = tp.prune(tiny_model("bert", "token"), tp.LearnedThreshold(final_token_threshold=0.011)).train()
    explanation = tp.explain(model, TEXT, TOKENIZER)
    assert model.training and model.token_pruner.training
    assert explanation.tokens == tp.explain(model.eval(), TEXT, TOKENIZER).tokens
    assert any(token.left_after for token in explanation.tokens)


def test_a_method_of_ones_own_needs_nothing_more(nothing_stays_registered: None) -> None:
    class Odd(tp.Pruner):
        prune_mode = "odd"

        def keep(self, tokens: Any) -> Tensor:
            return torch.arange(len(tokens.scores)) % 2 == 0

    model = tiny_model("bert", "token")
    tp.prune(model, Odd())
    explanation = tp.explain(model, TEXT, TOKENIZER)
    assert explanation.tokens[1].left_after == 1
    assert explanation.tokens[1].threshold is None
    assert re.fullmatch(r"left after layer 1: importance [\d.]+", explanation.tokens[1].why)


def test_what_was_truncated_is_said() -> None:
    model = shared_model("bert", "token")
    with pruned(model, METHODS["mean"]):
        explanation = tp.explain(model, " ".join(["w1"] * 100), TOKENIZER)
    assert (len(explanation.tokens), explanation.truncated) == (80, 22)
    assert str(explanation).splitlines()[0].endswith("; 22 more were truncated")


def test_nothing_leaves_a_model_that_is_only_packed() -> None:
    model = shared_model("bert", "token")
    with pruned(model, tp.Unpruned()):
        tokens = tp.explain(model, "w1 w2", TOKENIZER).tokens
    assert [token.decided_by for token in tokens] == ["first token", "nothing", "nothing", "nothing"]
    assert tp.explain(tp.compile(model), "w1 w2", TOKENIZER).tokens == tokens  # never pruned, but an engine
    assert tokens[1].why == "stays to the end: no layer could drop it"


def test_mistakes() -> None:
    model = tiny_model("bert", "token")
    with pytest.raises(tp.ConfigError, match=r"this BertForTokenClassification is not pruned"):
        tp.explain(model, TEXT, TOKENIZER)
    tp.prune(model, METHODS["mean"])
    with pytest.raises(tp.ConfigError, match=r"tokenizer is missing; a BertForTokenClassification does not know"):
        tp.explain(model, TEXT)
    for wrong in (None, 3, ["a", "b", "c"], [1, 2], []):
        with pytest.raises(tp.ConfigError, match=r"text is .*; it must be a text, or a pair of texts"):
            tp.explain(model, wrong, TOKENIZER)  # type: ignore[arg-type]
    image = tp.prune(tiny_model("vit", "encoder"), METHODS["mean"])
    with pytest.raises(tp.ConfigError, match=r"a ViTModel takes pixel_values; only texts"):
        tp.explain(image, TEXT, TOKENIZER)


# What is shown.


def test_the_text_form_names_every_token_and_number() -> None:
    model = shared_model("bert", "token")
    with pruned(model, METHODS["mean"]):
        explanation = tp.explain(model, TEXT, TOKENIZER)
    first, *rest = str(explanation).splitlines()
    left = [token for token in explanation.tokens if token.left_after is not None]
    assert first == f"22 tokens, 4 layers: {22 - len(left)} stay to the end"
    said = " ".join(" ".join(rest).split())
    assert all(len(line) <= 100 for line in rest)
    shown: list[str] = []
    for token in explanation.tokens:
        text = token.text if token.left_after is None else "…"
        shown += [text] if text != "…" or shown[-1] != "…" else []
    assert said.startswith(f"{' '.join(shown)} left after layer ")
    for token in left:
        assert f"{token.text} {token.value:.3g}" in said
        assert f"left after layer {token.left_after} (importance, below {token.threshold:.3g}):" in said


class Reader(HTMLParser):
    """What a page says, and what it would ask for."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.attributes: dict[str, str | None] = {}
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= dict(attrs)
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_stands_alone_and_escapes_text() -> None:
    evil = "<script>alert('x')</script>"
    tokens = (
        ExplainedToken("[CLS]", None, "first token"),
        ExplainedToken(evil, 0, "vocabulary gate", 0, 0.25, 0.5),
        ExplainedToken('"&', 2, "probe", 2, -1.0, 0.5),
    )
    explanation = tp.Explanation(tokens, 4, METHODS["mean"])
    for page, whole in ((explanation.html, True), (explanation._repr_html_(), False)):
        read = Reader(page)
        assert ("html" in read.tags) is whole
        assert not {*read.tags} & {"script", "link", "img", "iframe"}
        assert not {*read.attributes} & {"src", "href", "style"}
        assert "http" not in page and "url(" not in page and "@import" not in page
        assert evil in read.text
        assert "left after layer 2: probe -1, below 0.5" in read.text
        assert "light-dark(" in page
    assert 'name="viewport" content="width=device-width' in explanation.html


def test_words_greyed_and_line_by_line() -> None:
    tokens = [
        ExplainedToken(text, layer, "importance", layer or 0)
        for text, layer in zip(["a", "##b", "c", "d"], [None, 1, 0, 2], strict=True)
    ]
    assert re.findall(r'class="piece (s\d+)"', words(tokens, 3)) == ["s32", "s8", "s0", "s16"]
    assert greyed(tokens).count('class="gone"') == 3
    assert ">a</span><span" in greyed(tokens) and "> <" in greyed(tokens)
    found = layers(tokens, 4)
    assert re.findall(r'scope="row">(.*?) <span>(\d) left', found) == [
        ("entry", "3"), ("layer 1", "2"), ("layers 2–4", "1")
    ]  # fmt: skip
    assert re.findall(r"<td>(.*?)</td>", found) == ["ab <s>c</s> d", "a<s>b c</s> d", "a<s>b c d</s>"]


@pytest.mark.parametrize(
    ("tokens", "shown"),
    [
        (["[CLS]", "##ing", "##", "a"], "[CLS] ing ## a"),
        (["<s>", "Get", "Ġthe", "Ġindex", "es", "</s>"], "<s> Get the indexes </s>"),
        (["<s>", "Ġca", "fÃ©", "</s>"], "<s> café </s>"),
        (["<s>", "▁Get", "▁the", "▁index", "es", "▁", "</s>"], "<s> Get the indexes ␣ </s>"),
    ],
)
def test_pieces_are_joined_into_words(tokens: list[str], shown: str) -> None:
    assert "".join(text if joined else f" {text}" for text, joined in pieces(tokens)).strip() == shown


def test_tokens_that_are_given_need_no_text() -> None:
    model = shared_model("bert", "token")
    with pruned(model, METHODS["mean"]):
        assert explain_tokens(model, TOKENIZER(TEXT), TOKENIZER) == tp.explain(model, TEXT, TOKENIZER)
