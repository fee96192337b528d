"""Which tokens of long texts enter: spans and windows against a second writing, and what a model makes of them."""

from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

import token_pruning as tp
from tests.families.shared import kept_model
from tests.runtime.by_hand import mean_of, spans_by_hand, windows_by_hand
from tests.tiny import EVERY_FAMILY, PAD, assert_close, ragged_batch, tiny_model
from token_pruning.ragged import PackedTokens, layout_from_mask
from token_pruning.runtime.selection import select

SEPARATOR = 3


def packed(texts: list[list[int]], *, left: bool = False) -> PackedTokens:
    width = max(1, *map(len, texts)) if len(texts) > 1 else max(1, len(texts[0]))
    mask = torch.zeros(len(texts), width, dtype=torch.bool)
    for row, text in zip(mask, texts, strict=True):
        row[width - len(text) if left else 0 : width if left else len(text)] = True
    ids = torch.tensor([x for text in texts for x in text], dtype=torch.int64)
    positions = torch.tensor([7 + i for text in texts for i in range(len(text))], dtype=torch.int64)
    return PackedTokens(ids, positions, ids % 2, layout_from_mask(mask))


def text_of(length: int, query: int) -> list[int]:
    """Ids that say where they stand; with a first text of so many tokens, where there is room for it."""
    ids = [100 + i for i in range(length)]
    if length:
        ids[-1] = SEPARATOR
    if 0 < query < length - 1:
        ids[query] = SEPARATOR
    return ids


TEXTS = st.lists(st.tuples(st.integers(0, 150), st.integers(0, 40)), min_size=1, max_size=4)


@given(shapes=TEXTS, most=st.integers(16, 60), chunks=st.booleans(), left=st.booleans())
@example(shapes=[(17, 0), (17, 16), (17, 15)], most=16, chunks=False, left=False)
@example(shapes=[(17, 0), (30, 0), (31, 0)], most=16, chunks=True, left=False)
@example(shapes=[(0, 0), (100, 0), (0, 0)], most=16, chunks=True, left=True)
def test_what_enters_by_hand(shapes: list[tuple[int, int]], most: int, chunks: bool, left: bool) -> None:
    texts = [text_of(*shape) for shape in shapes]
    tokens = packed(texts, left=left)
    pruner = tp.FixedThreshold(max_tokens=most, chunks=chunks)
    found = select(tokens, pruner)
    if max(map(len, texts)) <= most:
        assert found is None
        return
    assert found is not None
    parts: list[list[int]] = []
    ends, windowed, rows, start = [0], [], [], 0
    for text in texts:
        chosen = [list(range(len(text)))]
        if len(text) > most:
            chosen = windows_by_hand(len(text), most) if chunks else [spans_by_hand(text, most)]
        parts += [[text[i] for i in part] for part in chosen]
        rows += [start + i for part in chosen for i in part]
        ends.append(ends[-1] + sum(map(len, chosen)))
        windowed += [len(chosen) > 1] * sum(map(len, chosen))
        start += len(text)
    layout = found.tokens.layout
    assert layout.lengths == [*map(len, parts)] and max(layout.lengths) <= most
    assert found.tokens.ids is not None and found.tokens.token_types is not None
    assert found.tokens.ids.tolist() == [x for part in parts for x in part]
    assert found.tokens.token_types.tolist() == [x % 2 for part in parts for x in part]
    assert found.tokens.positions.tolist() == [7 + i for part in parts for i in range(len(part))]
    assert found.rows.tolist() == rows
    assert found.cu_texts.tolist() == ends
    assert found.in_windows.tolist() == windowed
    columns = [layout.indices[layout.sequence_ids == s].tolist() for s in range(len(parts))]
    assert columns == [[s * layout.width + i for i in range(len(part))] for s, part in enumerate(parts)]
    if chunks:  # every token is in a window, none but the first and the last in two
        for text, first, last in zip(texts, ends, ends[1:], strict=False):
            inside = found.tokens.ids[first:last].tolist()
            assert set(inside) == set(text)
            assert len(text) <= most or all(inside.count(x) == 1 for x in set(text[1:-1]) - {SEPARATOR, text[0]})


def test_the_first_text_of_a_pair_enters_whole() -> None:
    found = select(packed([text_of(100, 10)]), tp.FixedThreshold(max_tokens=32))
    assert found is not None
    assert found.rows.tolist() == [*range(11), *range(11, 19), *range(91, 99), 99]


def test_of_the_second_text_what_the_first_asks_for_enters() -> None:
    ids = [0, 50, 51, SEPARATOR, *[60] * 40, 50, *[60] * 55, SEPARATOR]  # asked for after forty others
    found = select(packed([ids]), tp.FixedThreshold(max_tokens=32))
    assert found is not None
    spans = [*range(44, 52), *range(36, 44), *range(4, 12)]  # it, its neighbour, and another
    assert found.rows.tolist() == [0, 1, 2, 3, *sorted(spans), 100]


def test_one_that_fills_the_window_is_cut_like_the_rest() -> None:
    found = select(packed([text_of(100, 60)]), tp.FixedThreshold(max_tokens=32))
    assert found is not None
    assert found.rows.tolist() == [0, *range(1, 9), *range(46, 54), *range(91, 99), 99]


def random_ids(*shape: int) -> Tensor:
    """Single texts: a separator ends each."""
    ids = torch.randint(5, 200, shape, generator=torch.Generator().manual_seed(0))
    return ids.index_fill(1, torch.tensor([shape[1] - 1]), SEPARATOR)


@pytest.mark.parametrize("chunks", [False, True])
@pytest.mark.parametrize("family", EVERY_FAMILY)
@torch.no_grad()
def test_a_text_longer_than_the_model_s_positions_runs(family: str, chunks: bool) -> None:
    """What enters is a text of its own to the model, whatever stood between its tokens."""
    model = kept_model(family, "encoder")
    batch = ragged_batch([200, 3, 40, 90], family=family, left=chunks)
    mask = batch["attention_mask"].bool()
    expected = []
    for row, there in zip(batch["input_ids"], mask, strict=True):
        ids = row[there].tolist()
        parts = [ids]
        if len(ids) > 40:
            spans = spans_by_hand(ids, 40)
            parts = [[ids[i] for i in part] for part in (windows_by_hand(len(ids), 40) if chunks else [spans])]
        states = [model(torch.tensor([part])).last_hidden_state[0] for part in parts]
        expected.append(torch.cat(states).mean(0))
    tp.prune(model, tp.Unpruned(max_tokens=40, chunks=chunks), reads="mean")
    try:
        assert_close(mean_of(model(**batch), batch["attention_mask"]), torch.stack(expected), 5e-5)
    finally:
        tp.unprune(model)


@torch.no_grad()
def test_short_texts_have_the_positions_they_have_without_a_long_one() -> None:
    """RoBERTa gives padding tokens within a text a position of their own."""
    model = tp.prune(tiny_model("roberta", "encoder"), tp.Unpruned(max_tokens=20), reads="mean")
    short = random_ids(1, 12)
    short[0, 3:5] = PAD["roberta"]
    expected = model(short).last_hidden_state
    both = torch.cat([torch.nn.functional.pad(short, (0, 18)), random_ids(1, 30)])
    mask = (torch.arange(30) < torch.tensor([[12], [30]])).long()
    assert_close(model(both, attention_mask=mask).last_hidden_state[:1, :12], expected, 1e-5)


def test_what_cannot_be_is_one_line() -> None:
    with pytest.raises(tp.ConfigError, match="chunks is true, but max_tokens, the size of a window, is missing"):
        tp.FixedThreshold(chunks=True)
    for value in (15, 0, -1, 16.0, True, "64", 2**31):
        with pytest.raises(tp.ConfigError, match=r"max_tokens is .*; it must be a whole number >= 16"):
            tp.FixedThreshold(max_tokens=value)  # type: ignore[arg-type]
    with pytest.raises(tp.ConfigError, match="chunks is 1; it must be true or false"):
        tp.FixedThreshold(max_tokens=16, chunks=1)  # type: ignore[arg-type]
    model, batch = tiny_model("bert", "encoder"), ragged_batch([30, 3])
    tp.prune(model, tp.FixedThreshold(max_tokens=16), reads="mean")
    with pytest.raises(tp.ConfigError, match="position_ids is given, for a sequence of more than max_tokens, 16"):
        model(**batch, position_ids=torch.arange(30))
    model(**{name: x[1:] for name, x in batch.items()}, position_ids=torch.arange(30))  # this text is short
    with pytest.raises(tp.ConfigError, match="input_ids holds 200; the model has ids from 0 to 199"):
        model(batch["input_ids"].index_fill(1, torch.tensor([20]), 200))  # of a token that would not enter, too
    classifier = tp.prune(tiny_model(), tp.FixedThreshold(max_tokens=16))
    assert classifier(**batch).logits.isfinite().all()
    with pytest.raises(tp.ConfigError, match="a sequence has more than max_tokens, 16, and all of its last states"):
        classifier.base_model(**batch)


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_layers_of_a_long_text_hold_other_tokens(name: str) -> None:
    model = tiny_model("bert", "encoder")
    tp.prune(model, tp.Unpruned(max_tokens=16), execution="masked", reads="mean")
    model(**ragged_batch([16, 3]), **{name: True})
    with pytest.raises(tp.UnsupportedModelError, match=f"{name}=True is not possible for a sequence of more than max"):
        model(**ragged_batch([17, 3]), **{name: True})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protect": ["separators"]}, r"protect is \('separators',\); a ViTModel has no text: leave it out"),
        ({"received_from": "first_segment"}, "received_from is 'first_segment'; a ViTModel has no text"),
        ({"max_tokens": 16}, "max_tokens is 16; a ViTModel has no text"),
    ],
)
def test_images_have_no_text(options: dict[str, Any], message: str) -> None:
    model = tiny_model("vit", "encoder")
    with pytest.raises(tp.ConfigError, match=message):
        tp.prune(model, tp.TopK(**options), reads="mean")
    tp.prune(model, tp.TopK(received_from="first", departed="survivors", keep_all_layers=1), reads="mean")
    assert model(pixel_values=torch.zeros(1, 3, 32, 32)).last_hidden_state.isfinite().all()


@torch.no_grad()
def test_embeddings_are_chosen_from_too() -> None:
    model = kept_model("bert", "encoder")
    embeds = torch.randn(2, 50, 32, generator=torch.Generator().manual_seed(0))
    spans = spans_by_hand([*range(50)], 20)
    expected = model(inputs_embeds=embeds[:, spans]).last_hidden_state.mean(1)
    tp.prune(model, tp.Unpruned(max_tokens=20), reads="mean")
    try:
        assert_close(model(inputs_embeds=embeds).last_hidden_state.mean(1), expected, 1e-5)
    finally:
        tp.unprune(model)


@torch.no_grad()
def test_first_tokens_of_long_texts() -> None:
    model = tiny_model()
    ids = random_ids(2, 75)
    spans = [spans_by_hand(row.tolist(), 24) for row in ids]
    expected = model(torch.stack([row[chosen] for row, chosen in zip(ids, spans, strict=True)])).logits
    tp.prune(model, tp.Unpruned(max_tokens=24))
    assert_close(model(ids).logits, expected, 1e-5)
