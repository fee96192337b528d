"""Probes, maps, context, corrections and the keys around them: saved, loaded, written by hand, and taken off again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import token_pruning as tp
from tests.checkpoint.test_checkpoint import edit, read, refused
from tests.checkpoint.test_config_json import edit_weights
from tests.tiny import assert_equal, ragged_batch, same_survivors, tiny_model
from token_pruning.checkpoint import read_checkpoint
from token_pruning.pruners import check_keys

HIDDEN, LAYERS = 32, 4


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / HIDDEN**0.5


EVERYTHING: dict[str, Any] = {
    "vocabulary": tp.VocabularyGate(torch.linspace(0, 1, 200), 0.25),
    "probes": tp.Probes([1, 3], random(2, HIDDEN + 1)),
    "maps": tp.DepartureMaps(range(LAYERS + 1), random(LAYERS + 1, HIDDEN, HIDDEN + 1)),
    "context": tp.LinearContext([0, 2], random(2, 6, HIDDEN + 1, seed=1), 6 * random(LAYERS, 2 * HIDDEN, 7, seed=2)),
    "correction": tp.Correction(random(HIDDEN, HIDDEN + 1)),
    "protect": ["separators", "first_segment"],
    "received_from": "first_segment",
    "departed": "map",
    "max_tokens": 20,
    "chunks": True,
}
KEYS = {
    "protect": ["first_segment", "separators"],
    "received_from": "first_segment",
    "departed": "map",
    "max_tokens": 20,
    "chunks": True,
    "vocabulary_threshold": 0.25,
    "probe_layers": [1, 3],
    "map_layers": [0, 1, 2, 3, 4],
    "context_layers": [0, 2],
    "reads": "mean",
}
WEIGHTS = {
    f"token_pruner.{name}"
    for name in (
        "vocabulary_scores", "probe_weights", "map_weights", "context_down", "context_up", "correction_weights"
    )
}  # fmt: skip
METHODS: dict[str, tp.Pruner] = {
    "fixed": tp.FixedThreshold(thresholds=[0.1, 0.2, 0.3, 0.4], scoring_mode="relative", **EVERYTHING),
    "learned": tp.LearnedThreshold(thresholds=[0.1, 0.2, 0.3, 0.4], **EVERYTHING),
    "topk": tp.TopK(token_keep_rate=0.4, **EVERYTHING),
    "rising": tp.RisingThreshold(final_token_threshold=0.5, **EVERYTHING),
}
BATCH = ragged_batch([30, 1, 50, 2])


def states_of(model: Any) -> tuple[Tensor, tp.Trace]:
    with torch.no_grad(), tp.record(model) as trace:
        return model(**BATCH).last_hidden_state, trace


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tp.prune(tiny_model("bert", "encoder"), METHODS["fixed"], reads="mean")
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", METHODS)
def test_all_of_it_comes_back(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tp.prune(tiny_model("bert", "encoder").to(dtype), METHODS[name], reads="mean")
    expected, expected_trace = states_of(model)
    model.save_pretrained(tmp_path / "one")
    config = read(tmp_path / "one")
    assert {key: config[key] for key in KEYS} == KEYS and "correction" not in config
    assert load_file(tmp_path / "one" / "model.safetensors").keys() >= WEIGHTS
    loaded = tp.from_pretrained(tmp_path / "one")
    states, trace = states_of(loaded)
    assert same_survivors(trace, expected_trace)
    assert_equal(states, expected)
    for one, two in zip(model.token_pruner.buffers(), loaded.token_pruner.buffers(), strict=True):
        assert two.dtype == torch.float32 and torch.equal(one, two)
    one, two = ({**found.token_pruner.pruner.config(), "thresholds": None} for found in (model, loaded))
    assert one == two
    loaded.save_pretrained(tmp_path / "two")
    assert read(tmp_path / "two") == config
    weights = [load_file(tmp_path / folder / "model.safetensors") for folder in ("one", "two")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_defaults_are_not_written(tmp_path: Path) -> None:
    tp.prune(tiny_model("bert", "encoder"), tp.TopK()).save_pretrained(tmp_path)
    assert not read(tmp_path).keys() & KEYS.keys()
    assert not {name for name in load_file(tmp_path / "model.safetensors") if "token_pruner" in name}


@pytest.mark.parametrize("name", METHODS)
def test_unprune_leaves_nothing(name: str) -> None:
    model = tiny_model("bert", "encoder")
    before, weights = model.config.to_dict(), {n: x.clone() for n, x in model.state_dict().items()}
    with torch.no_grad():
        expected = model(**BATCH).last_hidden_state
        tp.prune(model, METHODS[name], reads="mean")
        model(**BATCH)
        tp.unprune(model)
        assert torch.equal(model(**BATCH).last_hidden_state, expected)
    assert model.config.to_dict() == before
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(x, weights[n]) for n, x in model.state_dict().items())


def test_unprune_gives_keys_back_that_were_there(folder: Path) -> None:
    loaded = tp.from_pretrained(folder, pruner=tp.TopK())
    assert not hasattr(loaded.config, "max_tokens")
    loaded = tp.unprune(loaded)
    assert {key: getattr(loaded.config, key) for key in KEYS} == KEYS


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"protect": "separators"}, "protect is 'separators'; it must be a list of separators, first_segment"),
        ({"protect": ["cls"]}, "protect[0] is 'cls'; it must be one of separators, first_segment"),
        ({"protect": {"separators": True}}, "protect is {'separators': True}; it must be a list of"),
        ({"received_from": "query"}, "received_from is 'query'; it must be one of all, first_segment, first"),
        ({"received_from": ["first"]}, "received_from is ['first']; it must be one of"),
        ({"departed": "mean"}, "departed is 'mean'; it must be one of state, survivors, map"),
        ({"departed": True}, "departed is True; it must be one of"),
        ({"max_tokens": 8}, "max_tokens is 8; it must be a whole number >= 16"),
        ({"max_tokens": 20.5}, "max_tokens is 20.5; it must be a whole number >= 16"),
        ({"max_tokens": 500}, "max_tokens is 500; the model has positions for at most 80"),
        ({"max_tokens": None}, "chunks is true, but max_tokens, the size of a window, is missing"),
        ({"chunks": "yes"}, "chunks is 'yes'; it must be true or false"),
        ({"reads": "first"}, 'chunks is true; windows can only be pooled where the mean is read: reads="mean"'),
        ({"reads": "all"}, "all last states are read"),
        ({"probe_layers": 3}, "probe_layers is 3; it must be a list of layers that rises from 1 or more"),
        ({"probe_layers": []}, "probe_layers is []; it must be a list of layers that rises"),
        ({"probe_layers": [0, 1]}, "probe_layers[0] is 0; it must be a whole number >= 1"),
        ({"probe_layers": [3, 1]}, "probe_layers is [3, 1]; it must be a list of layers that rises"),
        ({"probe_layers": [1, "3"]}, "probe_layers[1] is '3'; it must be a whole number"),
        ({"probe_layers": [1, 5]}, "probe_layers names layer 5; the model has 4 layers"),
        ({"probe_layers": [1]}, "probe weights are torch.float32 [2, 33];"),
        ({"probe_layers": None}, "the model has weights token_pruner.probe_weights, but probe_layers is missing"),
        ({"map_layers": [-1, 1, 2, 3, 4]}, "map_layers[0] is -1; it must be a whole number >= 0"),
        ({"map_layers": [0, 1, 2, 3]}, "map weights are torch.float32 [5, 32, 33]; they must be"),
        ({"map_layers": [0, 1, 2, 3, 9]}, "map_layers names layer 9; the model has 4 layers"),
        ({"map_layers": None}, "the model has weights token_pruner.map_weights, but map_layers is missing"),
        ({"context_layers": 2}, "context_layers is 2; it must be a list of layers that rises from 0 or more"),
        ({"context_layers": []}, "context_layers is []; it must be a list of layers that rises from 0"),
        ({"context_layers": [-1, 2]}, "context_layers[0] is -1; it must be a whole number >= 0"),
        ({"context_layers": [2, 0]}, "context_layers is [2, 0]; it must be a list of layers that rises"),
        ({"context_layers": [0, "2"]}, "context_layers[1] is '2'; it must be a whole number"),
        ({"context_layers": [0, 9]}, "context_layers names layer 9; the model has 4 layers"),
        ({"context_layers": [0]}, "context down weights are torch.float32 [2, 6, 33]; they must be floating-point"),
        ({"context_layers": None}, "the model has weights token_pruner.context_…, but context_layers is missing"),
        ({"context_layer": [0]}, "context_layer is no key that means anything; did you mean context_layers?"),
        ({"recieved_from": "first"}, "recieved_from is no key that means anything; did you mean received_from?"),
        ({"probes_layers": [1]}, "probes_layers is no key that means anything; did you mean probe_layers?"),
        ({"max_token": 20}, "max_token is no key that means anything; did you mean max_tokens?"),
    ],
)  # fmt: skip
def test_a_key_that_is_wrong_is_one_line(folder: Path, keys: dict[str, Any], message: str) -> None:
    refused(edit(folder, **keys), tp.ConfigError, message, "config.json")


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("probe_weights", None, tp.ConfigError, "probe_layers is [1, 3], but the model has no weights token"),
        ("map_weights", None, tp.ConfigError, "but the model has no weights token_pruner.map_weights"),
        ("vocabulary_scores", None, tp.ConfigError, "but the model has no vocabulary scores"),
        ("probe_weights", torch.zeros(33), tp.CheckpointError, "is torch.float32 of shape [33]; it must be rows"),
        ("probe_weights", torch.zeros(2, 33).long(), tp.CheckpointError, "is torch.int64 of shape [2, 33]"),
        ("probe_weights", torch.zeros(3, 33), tp.ConfigError, "probe weights are torch.float32 [3, 33]"),
        ("probe_weights", torch.zeros(2, 17), tp.ConfigError, "probe weights are for hidden size 16; the"),
        ("probe_weights", torch.full((2, 33), torch.nan), tp.CheckpointError, "of finite numbers"),
        ("probe_weights", torch.zeros(2, 0), tp.ConfigError, "probe weights are for hidden size -1; the model's is 32"),
        ("map_weights", torch.zeros(5, 33), tp.CheckpointError, "of shape [5, 33]; it must be several tables"),
        ("map_weights", torch.zeros(5, 16, 33), tp.ConfigError, "map weights are torch.float32 [5, 16, 33]"),
        ("map_weights", torch.zeros(5, 16, 17), tp.ConfigError, "map weights are for hidden size 16; the"),
        ("map_weights", torch.full((5, 32, 33), torch.inf), tp.CheckpointError, "with inf; it must be several"),
        ("context_down", None, tp.ConfigError, "context_layers is [0, 2], but the model has no weights token_pruner."),
        ("context_up", None, tp.ConfigError, "but the model has no weights token_pruner.context_up"),
        ("context_down", torch.zeros(6, 33), tp.CheckpointError, "of shape [6, 33]; it must be several tables"),
        ("context_down", torch.zeros(2, 6, 33).long(), tp.CheckpointError, "is torch.int64 of shape [2, 6, 33]"),
        ("context_down", torch.full((2, 6, 33), torch.nan), tp.CheckpointError, "it must be several tables of finite"),
        ("context_down", torch.zeros(1, 6, 33), tp.ConfigError, "context down weights are torch.float32 [1, 6, 33]"),
        ("context_down", torch.zeros(2, 0, 33), tp.ConfigError, "context down weights are torch.float32 [2, 0, 33]"),
        ("context_down", torch.zeros(2, 6, 17), tp.ConfigError, "context down weights are for hidden size 16; the"),
        ("context_down", torch.zeros(2, 5, 33), tp.ConfigError, "context up weights are torch.float32 [4, 64, 7]"),
        ("context_up", torch.zeros(64, 7), tp.CheckpointError, "of shape [64, 7]; it must be several tables"),
        ("context_up", torch.full((4, 64, 7), torch.inf), tp.CheckpointError, "with inf; it must be several tables"),
        ("context_up", torch.zeros(4, 64, 8), tp.ConfigError, "context up weights are torch.float32 [4, 64, 8]"),
        ("context_up", torch.zeros(4, 63, 7), tp.ConfigError, "context up weights are torch.float32 [4, 63, 7]"),
        ("context_up", torch.zeros(3, 64, 7), tp.ConfigError, "context up weights are [3, 64, 7]; the model has 4"),
        ("context_up", torch.zeros(4, 32, 7), tp.ConfigError, "context up weights are [4, 32, 7]; the model has 4"),
        ("correction_weights", torch.zeros(33, 32), tp.ConfigError, "correction weights are torch.float32 [33, 32]"),
        ("correction_weights", torch.zeros(8, 9), tp.ConfigError, "correction weights are for hidden size 8; the"),
        ("correction_weights", torch.zeros(1, 32, 33), tp.CheckpointError, "of shape [1, 32, 33]; it must be rows"),
    ],
)  # fmt: skip
def test_a_tensor_that_is_wrong_is_one_line(
    folder: Path, name: str, change: Tensor | None, error: type[tp.TokenPruningError], message: str
) -> None:
    def replace(weights: dict[str, Any]) -> None:
        del weights[f"token_pruner.{name}"]
        if change is not None:
            weights[f"token_pruner.{name}"] = change

    refused(edit_weights(folder, replace), error, message, str(folder))


def test_neither_context_nor_probes_go_with_summaries(folder: Path) -> None:
    def without_context(weights: dict[str, Any]) -> None:
        del weights["token_pruner.context_down"], weights["token_pruner.context_up"]

    edit(folder, summary_tokens="shared")
    refused(folder, tp.ConfigError, "summary_tokens is 'shared'; with context it must be none", "config.json")
    edit(edit_weights(folder, without_context), context_layers=None)
    refused(folder, tp.ConfigError, "summary_tokens is 'shared'; with probes it must be none", "config.json")
    assert tp.from_pretrained(edit(folder, summary_tokens=None)).token_pruner.pruner.context is None


def test_a_map_may_be_left_out_where_nothing_leaves(folder: Path) -> None:
    def without_layer_2(weights: dict[str, Any]) -> None:
        weights["token_pruner.map_weights"] = weights["token_pruner.map_weights"][[0, 1, 3, 4]].contiguous()

    edit(edit_weights(folder, without_layer_2), map_layers=[0, 1, 3, 4])
    refused(folder, tp.ConfigError, "departed is 'map', but map_layers lacks 2, where tokens may leave")
    states_of(tp.from_pretrained(edit(folder, prune_layers=[1, 3, 4])))


def test_keys_that_go_together_are_checked_one_by_one() -> None:
    check_keys({"chunks": True, "max_tokens": 64, "departed": "map", "received_from": "first", "protect": []})
    for name, value in {"chunks": "yes", "max_tokens": 1, "departed": "maps", "received_from": 1, "protect": 3}.items():
        with pytest.raises(tp.ConfigError, match=f"{name} is "):
            check_keys({name: value})


def test_a_resized_vocabulary(folder: Path, tmp_path: Path) -> None:
    model = tp.from_pretrained(folder)
    model.resize_token_embeddings(210, mean_resizing=False)
    model.save_pretrained(tmp_path / "larger")
    larger = tp.from_pretrained(tmp_path / "larger")
    assert larger.token_pruner.vocabulary_scores.shape == (210,)
    for name in ("probes", "maps", "correction"):
        own = getattr(larger.token_pruner.pruner, name).weights
        assert torch.equal(own, EVERYTHING[name].weights)
    for name in ("down", "up"):
        assert torch.equal(getattr(larger.token_pruner.pruner.context, name), getattr(EVERYTHING["context"], name))
    assert_equal(states_of(larger)[0], states_of(model)[0])


def test_a_state_dict_brings_its_tensors(folder: Path) -> None:
    model = tp.from_pretrained(folder)
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    for name in WEIGHTS:
        weights[name] *= 0.5
    model.load_state_dict(weights)
    pruner = model.token_pruner.pruner
    for setting in (pruner.probes, pruner.maps, pruner.correction):
        wanted = EVERYTHING[{tp.Probes: "probes", tp.DepartureMaps: "maps"}.get(type(setting), "correction")]
        assert torch.equal(setting.weights, 0.5 * wanted.weights)
    for name in ("down", "up"):
        assert torch.equal(getattr(pruner.context, name), 0.5 * getattr(EVERYTHING["context"], name))
    half = tp.FixedThreshold(
        thresholds=pruner.thresholds, scoring_mode="relative", vocabulary=pruner.vocabulary, probes=pruner.probes,
        maps=pruner.maps, context=pruner.context, correction=pruner.correction, departed="map", max_tokens=20,
        chunks=True, protect=["first_segment", "separators"], received_from="first_segment",
    )  # fmt: skip
    again = tp.prune(tiny_model("bert", "encoder"), half, reads="mean")
    assert_equal(states_of(again)[0], states_of(model)[0])


def test_a_pruner_s_tensors_are_its_own(folder: Path) -> None:
    """What is loaded into one model must not reach another that was pruned by the same method."""
    one, two = (tp.prune(tiny_model("bert", "encoder"), METHODS["fixed"], reads="mean") for _ in range(2))
    expected = states_of(two)[0]
    one.load_state_dict({n: x * 0.5 if "token_pruner" in n else x for n, x in one.state_dict().items()})
    assert torch.equal(states_of(two)[0], expected)


@pytest.mark.parametrize("keys", [{"prune_mode": "topk", "token_keep_rate": 0.4}, {"prune_mode": "absolute_threshold"}])
def test_checkpoints_of_earlier_versions(keys: dict[str, Any], tmp_path: Path) -> None:
    """Without any of the keys, thresholds beside the weights or not."""
    model = tiny_model()
    thresholds = torch.tensor([0.02, 0.03, 0.04, 0.05])
    learned = keys["prune_mode"] == "absolute_threshold"
    model.save_pretrained(tmp_path)
    edit(tmp_path, **keys, scoring_mode="mean", max_seq_length=32, masking_mode="hard")
    if learned:
        edit_weights(tmp_path, lambda weights: weights.update({"token_pruner.thresholds": thresholds}))
    found = read_checkpoint(tmp_path).pruner()
    assert (found.departed, found.received_from, found.protect, found.max_tokens) == ("state", "all", (), None)
    pruner: tp.Pruner = tp.TopK(token_keep_rate=0.4, max_seq_length=32)
    if learned:
        pruner = tp.FixedThreshold(thresholds=thresholds.tolist(), max_seq_length=32)
    tp.prune(model, pruner)
    with torch.no_grad():
        assert_equal(tp.from_pretrained(tmp_path)(**BATCH).logits, model(**BATCH).logits)
