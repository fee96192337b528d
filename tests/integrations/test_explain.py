"""Explanations of sentence-transformers' models, pruned and compiled."""

from pathlib import Path

import pytest

import token_pruning as tp
from tests.integrations.test_sentence_transformers import PAIRS, PRUNER, TEXTS, embedder, home, ranker

__all__ = ["home"]  # the fixture


def test_an_embedder_and_what_was_compiled_of_it(home: Path) -> None:
    model = tp.prune(embedder(home), PRUNER)
    fast = tp.compile(model, dtype="float32")
    for text in TEXTS[:6]:
        explanation, compiled = tp.explain(model, text), tp.explain(fast, text)
        assert [token.text for token in explanation.tokens] == ["[CLS]", *text.split(), "[SEP]"]
        assert [token.left_after for token in compiled.tokens] == [token.left_after for token in explanation.tokens]
        with tp.record(model) as trace:
            model.encode(text)
        survived = [3 if token.left_after is None else token.left_after - 1 for token in explanation.tokens]
        assert survived == trace.survived_layers[0].tolist()


def test_the_default_prompt_stands_before_the_text(home: Path) -> None:
    model = tp.prune(embedder(home), PRUNER)
    model.default_prompt_name = "query"
    tokens = tp.explain(model, "w9").tokens
    assert [token.text for token in tokens] == ["[CLS]", "w1", "w2", "w3", "w9", "[SEP]"]


def test_a_reranker_takes_pairs(home: Path) -> None:
    pruner = tp.FixedThreshold(thresholds=[0.8, 0.9, 0.9], scoring_mode="relative", protect=["first_segment"])
    model = tp.prune(ranker(home), pruner)
    query, passage = PAIRS[0]
    for each in (model, tp.compile(model, dtype="float32")):
        explanation = tp.explain(each, (query, passage))
        texts = [token.text for token in explanation.tokens]
        assert texts == ["[CLS]", *query.split(), "[SEP]", *passage.split(), "[SEP]"]
        protected = [token.decided_by == "protected" for token in explanation.tokens]
        assert protected.count(True) == len(query.split()) + 1
        with pytest.raises(tp.ConfigError, match=r"text is 'w1'; a CrossEncoder takes a pair of texts"):
            tp.explain(each, "w1")


def test_long_texts_are_cut_as_the_model_does_it(home: Path) -> None:
    text = TEXTS[-1]
    model = tp.prune(embedder(home), PRUNER)
    explanation = tp.explain(model, text)
    assert len(explanation.tokens) == 64
    assert explanation.truncated == len(text.split()) + 2 - 64
    tp.unprune(model)
    tp.prune(model, tp.FixedThreshold(thresholds=[0.0] * 3, max_tokens=24))
    explanation = tp.explain(model, text)
    assert (len(explanation.tokens), explanation.truncated) == (len(text.split()) + 2, 0)
    assert sum(token.decided_by == "max_tokens" for token in explanation.tokens) == len(text.split()) + 2 - 18
    with pytest.raises(tp.ConfigError, match=r"a SentenceTransformer takes one text"):
        tp.explain(model, ("w1", "w2"))
