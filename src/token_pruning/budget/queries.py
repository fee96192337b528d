"""Queries that nobody asked, for a reranker to learn from: spans of the passages themselves."""

import random
from collections.abc import Sequence

_WORD = 20  # characters within which a word ends, in writing that sets words apart

Pair = tuple[str, str]


def drawn_queries(pairs: Sequence[Pair], seed: int) -> list[Pair]:
    """For each query one that is drawn, with the same passages, in the order of the queries.

    It is a span of one of the passages, about as long as the query, and cut out of its own passage: the inverse cloze
    task (Lee, Chang and Toutanova, ACL 2019, section 4), but for its labels, which the dense model gives. A query whose
    passages are all shorter than twice its length has none.

    The dense model was trained to be sure of the queries that people asked; of drawn ones it is not, so that its scores
    of these say more. On SQuAD's passages, from a reranker that had been trained on the same articles, learning from
    their queries alone made rankings worse; with drawn ones it made them as good as the dense model's.

    Args:
        pairs: queries and passages, in any order.
        seed: of what is drawn.
    """
    rng = random.Random(seed)
    passages: dict[str, list[str]] = {}
    for query, passage in pairs:
        passages.setdefault(query, []).append(passage)
    found = []
    for query, texts in passages.items():
        length = max(1, len(query))
        plain = [" ".join(text.split()) for text in texts]
        long_enough = [place for place, text in enumerate(plain) if len(text) >= 2 * length]
        if long_enough:
            own = rng.choice(long_enough)
            span, rest = _cut(plain[own], length, rng)
            found += [(span, rest if place == own else text) for place, text in enumerate(texts)]
    return found


def _cut(text: str, length: int, rng: random.Random) -> Pair:
    """A span of a text, and the text without it: whole words, where words have spaces between them."""
    spaced, near = f" {text} ", _WORD if " " in text else 0
    start = rng.randint(1, len(text) - length + 1)
    end = start + length
    before, after = spaced.rfind(" ", max(0, start - near), start), spaced.find(" ", end, end + near)
    start, end = before + 1 if before >= 0 else start, after if after >= 0 else end
    return spaced[start:end].strip(), (spaced[:start] + spaced[end:].lstrip()).strip()
