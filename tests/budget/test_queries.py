"""Queries that are drawn out of passages."""

import random

from hypothesis import given
from hypothesis import strategies as st

from token_pruning.budget.queries import drawn_queries

WORDS = st.lists(st.text("abcdefgh", min_size=1, max_size=12), min_size=1, max_size=60).map(" ".join)
CHINESE = "敏捷的棕色狐狸跳过了懒狗然后逃离了愤怒的农夫"


@given(st.lists(st.tuples(WORDS, st.lists(WORDS, min_size=1, max_size=4)), max_size=5), st.integers(0, 99))
def test_a_span_of_whole_words_and_its_passage_without_it(asked: list[tuple[str, list[str]]], seed: int) -> None:
    groups = dict(asked)
    pairs = [(query, text) for query, texts in groups.items() for text in texts]
    shuffled = random.Random(seed).sample(pairs, len(pairs))
    found = drawn_queries(shuffled, seed)
    assert found == drawn_queries(shuffled, seed)
    order = list(dict.fromkeys(query for query, _ in shuffled))
    passages = {query: [text for each, text in shuffled if each == query] for query in order}
    for query in order:
        if max(map(len, passages[query])) < 2 * len(query):
            continue
        drawn, found = found[: len(passages[query])], found[len(passages[query]) :]
        (span,) = {first for first, _ in drawn}
        assert len(query) - 2 <= len(span) <= len(query) + 2 * 12
        changed = [(text, now) for text, (_, now) in zip(passages[query], drawn, strict=True) if text != now]
        assert len(changed) == 1
        text, rest = changed[0]
        whole, left = (text.split(), rest.split()) if " " in text else (list(text), list(rest))
        count = len(whole) - len(left)
        joined = " " if " " in text else ""
        assert any(
            span == joined.join(whole[at : at + count]) and left == whole[:at] + whole[at + count :]
            for at in range(len(whole) - count + 1)
        )
    assert not found


def test_writing_without_spaces() -> None:
    ((span, rest),) = drawn_queries([("棕色狐狸", CHINESE)], seed=1)
    at = CHINESE.index(span)
    assert len(span) == 4 and rest == CHINESE[:at] + CHINESE[at + 4 :]


def test_queries_as_long_as_their_passages_have_none() -> None:
    pairs = [("A man plays the guitar.", "Someone is playing a guitar."), ("A dog runs.", "Dogs run.")]
    assert drawn_queries(pairs, seed=0) == []
