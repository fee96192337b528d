"""What tokens that left count as, with every other setting: against loops over single texts and tokens."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import token_pruning as tp
from tests.families.shared import batch_of, kept_model, without_dropout
from tests.runtime.by_hand import Text, counts_as, mean_of, pooled_by_hand, spans_by_hand, text_by_hand, windows_by_hand
from tests.tiny import VOCABULARY, assert_close, pruned, ragged_batch, same_survivors, tiny_model
from token_pruning.ragged import layout_from_mask
from token_pruning.runtime.departed import Departures, LastStates
from token_pruning.runtime.token_pruner import TokenPruner

FAMILIES = (
    "bert", "roberta", "distilbert", "albert", "mpnet", "deberta-v2", "modernbert", "nomic_bert", "xlm-roberta-xl"
)  # fmt: skip
HIDDEN, LAYERS = 32, 4


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


GATE = tp.VocabularyGate(torch.rand(VOCABULARY, generator=torch.Generator().manual_seed(0)), 0.25)
PROBES = tp.Probes([1, 3], random(2, HIDDEN + 1) / HIDDEN**0.5)
MAPS = tp.DepartureMaps(range(LAYERS + 1), random(LAYERS + 1, HIDDEN, HIDDEN + 1, seed=1) / HIDDEN**0.5)
CORRECTION = tp.Correction(random(HIDDEN, HIDDEN + 1, seed=2) / HIDDEN**0.5)
METHODS: dict[str, Any] = {
    "fixed": {"cls": tp.FixedThreshold, "thresholds": [0.2, 0.5, 0.4, 0.6], "scoring_mode": "relative"},
    "relative": {"cls": tp.RelativeThreshold, "token_threshold": 0.2},
    "topk": {"cls": tp.TopK, "token_keep_rate": 0.2, "keep_all_layers": 1},
}


def method(name: str = "fixed", **options: Any) -> tp.Pruner:
    values = {**METHODS[name], **options}
    made: tp.Pruner = values.pop("cls")(**values)
    return made


def rows_of(output: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    """Each text's valid rows."""
    masks = batch["attention_mask"].bool()
    return [states[mask] for states, mask in zip(output.last_hidden_state, masks, strict=True)]


def singles(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    masks = batch["attention_mask"].bool()
    return [
        {name: x[i, mask][None] for name, x in batch.items() if name != "attention_mask"}
        for i, mask in enumerate(masks)
    ]


def parts_by_hand(
    model: Any, pruner: tp.Pruner, inputs: dict[str, Tensor], text: Callable[..., Text] = text_by_hand
) -> tuple[list[list[int]], list[Text]]:
    """The tokens that enter, of each window, and these windows' passes."""
    ids = inputs["input_ids"][0].tolist()
    chosen = [list(range(len(ids)))]
    if pruner.max_tokens is not None and len(ids) > pruner.max_tokens:
        most = pruner.max_tokens
        chosen = windows_by_hand(len(ids), most) if pruner.chunks else [spans_by_hand(ids, most)]
    parts = [text(model, pruner, {name: x[:, part] for name, x in inputs.items()}) for part in chosen]
    return chosen, parts


def expected_rows(pruner: tp.Pruner, reads: str, chosen: list[list[int]], parts: list[Text]) -> Tensor:
    """The rows of last_hidden_state, ``[tokens, dim]`` float64, or of the first token alone ``[1, dim]``."""
    length = max(map(max, chosen)) + 1
    all_own = pruner.departed == "state" and pruner.correction is None  # the mean is of these
    survives = [[at == max(part.left_at) for at in part.left_at] for part in parts]
    if reads == "first":
        first = parts[0].finished[0].double()
        lost = any(at < LAYERS for at in parts[0].left_at)
        if lost and pruner.correction is not None:
            first = pruner.correction.weights.double() @ torch.cat([first, first.new_ones(1)])
        return first[None]
    if reads == "all":
        only = parts[0]
        survivors = [only.finished[i].double() for i, stay in enumerate(survives[0]) if stay]
        found = [counts_as(pruner, only, i) for i in range(length)]
        return torch.stack([torch.stack(survivors).mean(0) if x is None else x for x in found])
    pooled = pooled_by_hand(pruner, parts)
    own = {}
    if len(parts) == 1:
        own = {chosen[0][i]: parts[0].finished[i].double() for i, stay in enumerate(survives[0]) if stay or all_own}
    if len(own) == length:
        return torch.stack([own[i] for i in range(length)])
    rest = (pooled * length - sum(own.values())) / (length - len(own))
    return torch.stack([own.get(i, rest) for i in range(length)])


def draw_method(data: st.DataObject, reads: str, **more: Any) -> tp.Pruner:
    """Any setting with every other, but for those given."""

    def one_of(*values: Any) -> Any:
        return data.draw(st.sampled_from(values))

    name, departed = one_of(*METHODS), one_of("state", "survivors", "map")
    options: dict[str, Any] = {
        "departed": departed,
        "protect": one_of((), ("separators",), ("first_segment",), ("separators", "first_segment")),
        "received_from": one_of("all", "first_segment", "first"),
        "vocabulary": one_of(None, GATE),
        "probes": one_of(None, PROBES),
        "maps": MAPS if departed == "map" else None,
        "correction": None if reads == "all" else one_of(None, CORRECTION),
        "scoring_mode": one_of("relative", "mean_norm"),
        "prune_layers": one_of(None, None, [1, 3]),
        **more,
    }
    if options["scoring_mode"] == "mean_norm" and name == "fixed":
        options["thresholds"] = [0.01, 0.02, 0.03, 0.04]
    if reads != "all":
        options["max_tokens"] = one_of(None, 16, 21)
        options["chunks"] = bool(options["max_tokens"]) and reads == "mean" and one_of(True, False)
    return method(name, **options)


@settings(max_examples=90)
@given(data=st.data())
def test_every_setting_with_every_other(data: st.DataObject) -> None:
    family, reads = data.draw(st.sampled_from(FAMILIES)), data.draw(st.sampled_from(["mean", "mean", "all", "first"]))
    pruner = draw_method(data, reads)
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    if pruner.max_tokens:
        lengths.append(100)  # the models have positions for 80 or fewer
    model, batch = kept_model(family, "encoder"), batch_of(family, lengths=tuple(lengths))
    by_hand = [parts_by_hand(model, pruner, inputs) for inputs in singles(batch)]
    # A decision that rounding turns around is not what this is about.
    assume(min(part.margin for _, parts in by_hand for part in parts) > 1e-4)
    expected = [expected_rows(pruner, reads, *found) for found in by_hand]
    left = batch_of(family, lengths=tuple(lengths), left=True)
    for execution, inputs in (("packed", batch), ("packed", left), ("masked", batch)):
        with torch.no_grad():
            tp.prune(model, pruner, execution=execution, reads=reads)  # type: ignore[arg-type]
            try:
                output = model(**inputs)
            finally:
                tp.unprune(model)
        found = list(output.last_hidden_state) if reads == "first" else rows_of(output, inputs)
        for rows, wanted in zip(found, expected, strict=True):
            scale = max(1.0, wanted.abs().max().item())
            assert_close(rows, wanted, 2e-5 * scale, f"{execution} {family} {reads} {pruner}")


BATCH = ragged_batch([30, 1, 17, 2])
VALID = BATCH["attention_mask"].bool()
ENCODERS = ("bert", "distilbert", "modernbert")
EVERY: dict[str, dict[str, Any]] = {
    "state": {},
    "survivors": {"departed": "survivors"},
    "map": {"departed": "map", "maps": MAPS},
    "state_corrected": {"correction": CORRECTION},
    "map_corrected": {"departed": "map", "maps": MAPS, "correction": CORRECTION},
}

READ = [(name, reads) for name in EVERY for reads in ("first", "mean", "all") if reads != "all" or "corr" not in name]
"""Which states are read; a correction is of one vector."""


@pytest.mark.parametrize("departed", EVERY)
@pytest.mark.parametrize("family", ENCODERS)
@torch.no_grad()
def test_maps_of_a_text_are_the_mean_of_maps_of_its_tokens(family: str, departed: str) -> None:
    """reads="mean" gives what the mean of all rows is with reads="all", corrected."""
    model = kept_model(family, "encoder")
    options = {name: value for name, value in EVERY[departed].items() if name != "correction"}
    with pruned(model, method(**options)), tp.record(model) as trace:
        expected = mean_of(model(**BATCH), BATCH["attention_mask"])
    lost = torch.tensor([int(layers.min()) < LAYERS for layers in trace.survived_layers])
    assert lost.any() and not lost.all()
    if "correction" in EVERY[departed]:
        weights = CORRECTION.weights
        expected = torch.where(lost[:, None], expected @ weights[:, :-1].T + weights[:, -1], expected)
    tp.prune(model, method(**EVERY[departed]), reads="mean")
    actual = mean_of(model(**BATCH), BATCH["attention_mask"])
    tp.unprune(model)
    assert_close(actual, expected, 1e-5)


@pytest.mark.parametrize(("departed", "reads"), [x for x in READ if x[1] != "first"])
@pytest.mark.parametrize("family", ENCODERS)
@torch.no_grad()
def test_a_text_that_lost_nothing_has_its_own_states_to_the_bit(family: str, departed: str, reads: Any) -> None:
    model = kept_model(family, "encoder")
    keep_all = method(thresholds=[-1.0] * LAYERS, probes=tp.Probes([1, 2, 3, 4], torch.zeros(4, HIDDEN + 1)))
    with pruned(model, keep_all):
        expected = model(**BATCH).last_hidden_state
    tp.prune(model, replace(keep_all, **EVERY[departed]), reads=reads)
    actual = model(**BATCH).last_hidden_state
    tp.unprune(model)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize(("departed", "reads"), READ)
@pytest.mark.parametrize("execution", ["packed", "masked"])
@torch.no_grad()
def test_texts_without_tokens_and_batches_without_texts(departed: str, reads: Any, execution: Any) -> None:
    model = kept_model("bert", "encoder")
    most = None if reads == "all" else 16
    tp.prune(model, method(**EVERY[departed], max_tokens=most), reads=reads, execution=execution)
    try:
        with_empty = ragged_batch([0, 30, 0, 5, 0])
        states = model(**with_empty).last_hidden_state
        assert states.isfinite().all()
        assert (states[[0, 2, 4]] == 0).all()
        alone = model(**{name: x[[1, 3]] for name, x in with_empty.items()}).last_hidden_state
        assert_close(states[[1, 3]], alone, 2e-5)
        nobody = {name: x[[0]] for name, x in with_empty.items()}
        assert (model(**nobody).last_hidden_state == 0).all()
        if execution == "packed":
            none = {name: x[:0] for name, x in with_empty.items()}
            assert model(**none).last_hidden_state.shape == (0, 1 if reads == "first" else 30, HIDDEN)
    finally:
        tp.unprune(model)


@torch.no_grad()
def test_of_all_tokens_the_first_is_always_left() -> None:
    drop_all = method(thresholds=[1e9] * LAYERS, departed="survivors")
    model = kept_model("bert", "encoder")
    with pruned(model, drop_all):
        states = model(**BATCH).last_hidden_state
    first = states[:, :1].expand_as(states)
    assert torch.equal(states[VALID], first[VALID])


@pytest.mark.parametrize("departed", EVERY)
@torch.no_grad()
def test_results_do_not_depend_on_the_batch(departed: str) -> None:
    model = kept_model("modernbert", "encoder")
    tp.prune(model, method(**EVERY[departed], max_tokens=20, chunks=True), reads="mean")
    batch = ragged_batch([30, 7, 50, 20], family="modernbert")
    together = mean_of(model(**batch), batch["attention_mask"])
    apart = [mean_of(model(**one), torch.ones_like(one["input_ids"])) for one in singles(batch)]
    tp.unprune(model)
    assert_close(together, torch.cat(apart), 1e-5)


@pytest.mark.parametrize("summaries", ["shared", "segment"])
@pytest.mark.parametrize(("departed", "reads"), READ)
@pytest.mark.parametrize("family", ["bert", "modernbert"])
@torch.no_grad()
def test_beside_summaries(family: str, departed: str, reads: Any, summaries: Any) -> None:
    """What left counts by its own state, though its row may carry a summary."""
    model, batch = kept_model(family, "encoder"), batch_of(family, lengths=(30, 1, 17, 2))
    pruner = method(
        **EVERY[departed],
        summary_tokens=summaries,
        protect=["separators"],
        received_from="first_segment",
        vocabulary=GATE,
    )
    found = []
    for execution in ("packed", "masked"):
        tp.prune(model, pruner, execution=execution, reads=reads)
        with tp.record(model) as trace:
            found.append((model(**batch).last_hidden_state, trace))
        tp.unprune(model)
    assert same_survivors(found[0][1], found[1][1])
    valid = batch["attention_mask"].bool() if reads != "first" else torch.ones(4, 1, dtype=torch.bool)
    assert_close(found[0][0][valid], found[1][0][valid], 2e-5)


def departures_of(pruner: tp.Pruner) -> Departures:
    return Departures(TokenPruner(pruner, LAYERS, torch.device("cpu")))


@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    departed=st.sampled_from([*EVERY]),
    seed=st.integers(0, 99),
)
def test_pooled_vectors_by_loops(lengths: list[int], departed: str, seed: int) -> None:
    pruner = method(**EVERY[departed])
    width = max(1, *lengths) if lengths else 1
    layout = layout_from_mask(torch.arange(width)[None] < torch.tensor(lengths)[:, None])
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(layout.total, HIDDEN, generator=generator)
    left_at = torch.randint(0, LAYERS + 2, (layout.total,), generator=generator)
    counted = torch.rand(layout.total, generator=generator) < 0.7
    for some in (None, counted):
        found = departures_of(pruner).pooled(LastStates(states, left_at), layout, counted=some)
        start = 0
        for length, vector in zip(lengths, found, strict=True):
            rows, lost = [], False
            for i in range(start, start + length):
                at = int(left_at[i])
                lost = lost or at <= LAYERS
                if some is not None and not some[i]:
                    continue
                if at > LAYERS or pruner.departed == "state":
                    rows.append(states[i])
                elif pruner.departed == "map":
                    rows.append(MAPS.weights[at] @ torch.cat([states[i], torch.ones(1)]))
            expected = torch.stack(rows).mean(0) if rows else torch.zeros(HIDDEN)
            if lost and pruner.correction is not None:
                expected = CORRECTION.weights @ torch.cat([expected, torch.ones(1)])
            assert_close(vector, expected, 1e-5)
            start += length


# Training


@pytest.mark.parametrize(("departed", "reads"), READ)
@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_gradients_are_the_masked_reference_s(family: str, departed: str, reads: Any) -> None:
    gradients, leaves = [], []
    model = tiny_model(family, "encoder", **without_dropout(family))
    weights = random(4, 30, HIDDEN)
    embeddings = model.get_input_embeddings()(BATCH["input_ids"]).detach()
    for execution in ("packed", "masked"):
        tp.prune(model, method(**EVERY[departed], probes=PROBES), execution=execution, reads=reads)
        model.train().zero_grad()
        leaf = embeddings.clone().requires_grad_()
        states = model(inputs_embeds=leaf, attention_mask=BATCH["attention_mask"]).last_hidden_state
        (states * weights[:, : states.shape[1]]).sum().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        leaves.append(leaf.grad)
        tp.unprune(model)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[1].items():
        assert_close(gradients[0][name], gradient, 2e-5 * max(1.0, gradient.abs().max().item()), name)
    assert_close(leaves[0], leaves[1], 1e-4)
    assert (leaves[0][VALID].abs().sum(-1) > 0).all()  # through attention or through its map, every token counts


@pytest.mark.parametrize("departed", EVERY)
def test_grad_no_grad_and_inference_mode_agree(departed: str) -> None:
    model = kept_model("bert", "encoder")
    options = {**EVERY[departed], "received_from": "first_segment", "vocabulary": GATE, "max_tokens": 20}
    tp.prune(model, method(**options), reads="mean")
    try:
        with_grad = model(**BATCH).last_hidden_state
        assert with_grad.requires_grad
        with torch.no_grad():
            assert_close(model(**BATCH).last_hidden_state, with_grad, 2e-5)
        with torch.inference_mode():
            assert_close(model(**BATCH).last_hidden_state.clone(), with_grad, 2e-5)
    finally:
        tp.unprune(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_decisions_and_maps_stay_float32_in_a_narrow_model(dtype: torch.dtype) -> None:
    model = tiny_model("bert", "encoder").to(dtype)
    tp.prune(model, method(**EVERY["map_corrected"], probes=PROBES, vocabulary=GATE), reads="mean")
    model.to(dtype)
    tensors = dict(model.token_pruner.named_buffers())
    assert {x.dtype for x in tensors.values()} == {torch.float32} and len(tensors) == 5
    with tp.record(model) as trace:
        states = model(**BATCH).last_hidden_state
    assert states.dtype == dtype and states.isfinite().all()
    for record in trace.passes[0].layers.values():
        assert record.scores is not None and record.scores.dtype == torch.float32
    probed = trace.passes[0].layers[1].scores
    assert probed is not None and not torch.equal(probed, probed.to(dtype).float())


@torch.no_grad()
def test_autocast_rounds_no_linear_setting() -> None:
    pruner = method(**EVERY["map_corrected"])
    layout = layout_from_mask(torch.ones(2, 5, dtype=torch.bool))
    last = LastStates(random(10, HIDDEN), torch.arange(10) % (LAYERS + 2))
    expected = departures_of(pruner).pooled(last, layout)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(departures_of(pruner).pooled(last, layout), expected)


# What does not fit


def test_maps_must_be_there_for_what_may_leave() -> None:
    some = tp.DepartureMaps([2, 3, 4], MAPS.weights[2:])
    model = tiny_model("bert", "encoder")
    with pytest.raises(tp.ConfigError, match="departed is 'map', but map_layers lacks 1, where tokens may leave"):
        tp.prune(model, method(departed="map", maps=some), reads="mean")
    with pytest.raises(tp.ConfigError, match="map_layers lacks 0, for tokens that never enter"):
        tp.prune(model, method(departed="map", maps=some, prune_layers=[2], vocabulary=GATE), reads="mean")
    late = method(thresholds=[0.0, 0.5, 0.5, 0.5], departed="map", maps=some)
    tp.prune(model, late, reads="mean")
    with torch.no_grad():
        model(**BATCH)
    tp.set_thresholds(model, [0.5] * 4)
    with pytest.raises(tp.ConfigError, match="map_layers lacks 1, where"):
        model(**BATCH)
    with pytest.raises(tp.ConfigError, match="map_layers lacks 1, where"):
        tp.compile(model)


def test_a_base_called_by_itself_needs_maps_that_its_head_does_not() -> None:
    some = tp.DepartureMaps([2], MAPS.weights[2:3])
    model = tp.prune(tiny_model(), method(departed="map", maps=some))
    with torch.no_grad():
        assert model(**BATCH).logits.isfinite().all()
        with pytest.raises(tp.ConfigError, match="map_layers lacks 1, where"):
            model.base_model(**BATCH)


@pytest.mark.parametrize(
    ("options", "reads", "message"),
    [
        ({"probes": tp.Probes([1], torch.zeros(1, 32))}, "mean", "probe weights are for hidden size 31; the model's"),
        ({"probes": tp.Probes([5], torch.zeros(1, 33))}, "mean", "probe_layers names layer 5; the model has"),
        ({"maps": tp.DepartureMaps([0], torch.zeros(1, 5, 6))}, "mean", "map weights are for hidden size 5; the"),
        ({"maps": tp.DepartureMaps([0, 7], torch.zeros(2, 32, 33))}, "mean", "map_layers names layer 7; the model"),
        ({"correction": tp.Correction(torch.zeros(3, 4))}, "mean", "correction weights are for hidden size 3; the"),
        ({"correction": CORRECTION}, "all", "correction is for one vector of a text; this model's outputs read all"),
        ({"max_tokens": 16}, "all", 'max_tokens is 16, but all last states are read.*wants reads="mean"'),
        ({"max_tokens": 81}, "mean", "max_tokens is 81; the model has positions for at most 80"),
        ({"max_tokens": 16, "chunks": True}, "first", 'chunks is true; windows can only be pooled.*reads="mean"'),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_model_is_one_line(options: dict[str, Any], reads: Any, message: str) -> None:
    model = tiny_model("bert", "encoder")
    before = model.config.to_dict()
    with pytest.raises(tp.ConfigError, match=message) as caught:
        tp.prune(model, method(**options), reads=reads)
    assert "\n" not in str(caught.value)
    assert model.config.to_dict() == before and not hasattr(model, "token_pruner")


def test_the_engine_on_pytorch_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN_PRUNING_KERNELS", "torch")
    for family in ("bert", "modernbert"):
        model, batch = kept_model(family, "encoder"), batch_of(family, lengths=(30, 1, 70, 12))
        for departed, options in EVERY.items():
            pruner = method(
                **options, probes=PROBES, vocabulary=GATE, protect=["separators"], received_from="first_segment",
                max_tokens=24, chunks=departed != "state",
            )  # fmt: skip
            tp.prune(model, pruner, reads="mean")
            with torch.no_grad():
                expected = model(**batch).last_hidden_state
            found = tp.compile(model, "float32")(**batch).last_hidden_state
            tp.unprune(model)
            assert_close(found, expected, 2e-5, f"{family} {departed}")
