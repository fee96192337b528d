"""Exported graphs, held against the pruned model in ONNX Runtime and in OpenVINO."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch import Tensor

import token_pruning as tp
from tests.integrations.test_sentence_transformers import LONGEST, TEXTS, embedder, home, ranker  # noqa: F401
from tests.integrations.test_sentence_transformers import PAIRS as TEXT_PAIRS
from tests.tiny import EVERY_FAMILY, outputs, ragged_batch, tiny_model
from tests.workspace import write_checkpoint
from token_pruning.integrations.export.graph import GraphLayout, rounded_up
from token_pruning.lab.cli import main
from token_pruning.pruners import LayerTokens, Pruner
from token_pruning.ragged import Layout
from token_pruning.runtime.prune import attachment_of

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
openvino = pytest.importorskip("openvino")

THRESHOLDS: dict[str, Any] = {"thresholds": [0.5, 0.7, 0.9, 1.0], "scoring_mode": "relative"}
PRUNER = tp.FixedThreshold(**THRESHOLDS)
# None of the shape that is traced; a single text, left padding, a text of no tokens, one that can lose none.
BATCHES: list[tuple[list[int], bool]] = [
    ([9, 30, 17, 1, 55], False), ([60], False), ([12, 40], True), ([0, 5], False), ([1], False),
]  # fmt: skip
Arrays = dict[str, Any]


def in_onnx_runtime(file: Path) -> Callable[[Arrays], Arrays]:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names, given = [put.name for put in session.get_outputs()], [put.name for put in session.get_inputs()]
    return lambda feed: dict(zip(names, session.run(None, {name: feed[name] for name in given}), strict=True))


def _own_name(put: Any) -> str:
    """Not one of those that stand for places inside the graph."""
    return next(name for name in put.names if not name.startswith("/"))


def in_openvino(file: Path) -> Callable[[Arrays], Arrays]:
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino.Core().compile_model(file, "CPU", settings)
    given, names = ([_own_name(put) for put in puts] for puts in (compiled.inputs, compiled.outputs))
    return lambda feed: dict(zip(names, compiled([feed[name] for name in given]).to_tuple(), strict=True))


def feed_of(batch: Mapping[str, Tensor]) -> Arrays:
    ids = batch["input_ids"]
    return {"token_type_ids": np.zeros(ids.shape, np.int64), **{name: value.numpy() for name, value in batch.items()}}


def check(model: Any, folder: Path, family: str = "bert") -> None:
    """Hold both runtimes against the pruned model."""
    runtimes = [
        in_onnx_runtime(tp.export(model, folder / "model.onnx")),
        in_openvino(tp.export(model, folder / "model.xml")),
    ]
    for lengths, left in BATCHES:
        batch = ragged_batch(lengths, family=family, left=left, seed=1)
        with torch.no_grad():
            expected = outputs(model(**batch))
        for run in runtimes:
            found = run(feed_of(batch))
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                np.testing.assert_allclose(found[name], value.numpy(), rtol=0, atol=1e-4, err_msg=f"{name} {lengths}")


def only_exhaustively(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.exhaustive)


# Their graphs are BERT's, but for names.
LIKE_BERT = ("camembert", "data2vec-text", "electra", "ernie", "roberta", "xlm-roberta")


@pytest.mark.parametrize("family", [only_exhaustively(name) if name in LIKE_BERT else name for name in EVERY_FAMILY])
def test_every_family(family: str, tmp_path: Path) -> None:
    check(tp.prune(tiny_model(family), PRUNER), tmp_path, family)


@pytest.mark.parametrize("head", ["token", "question", "regression", "masked_lm", "encoder"])
def test_heads(head: str, tmp_path: Path) -> None:
    check(tp.prune(tiny_model("bert", head), PRUNER), tmp_path)


def _scores(count: int = 200) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(0))


def _affine(*shape: int) -> Tensor:
    return torch.randn(*shape, 33, generator=torch.Generator().manual_seed(1)) / 6


@dataclass(frozen=True, kw_only=True)
class _Own(Pruner, registered=False):
    """A method that no exporter knows."""

    prune_mode = "own"

    def keep(self, tokens: LayerTokens) -> Tensor:
        return tokens.scores * tokens.layer >= tokens.scores.mean()


METHODS: dict[str, tp.Pruner] = {
    "linear rule": tp.FixedThreshold(final_token_threshold=0.01),
    "mean_norm": tp.FixedThreshold(final_token_threshold=0.02, scoring_mode="mean_norm"),
    "learned": tp.LearnedThreshold(final_token_threshold=0.01),
    "top-k": tp.TopK(token_keep_rate=0.3, keep_all_layers=1),
    "relative": tp.RelativeThreshold(token_threshold=0.1),
    "rising": tp.RisingThreshold(final_token_threshold=0.3),
    "some layers": tp.FixedThreshold(**THRESHOLDS, prune_layers=[2, 3]),
    "protect": tp.FixedThreshold(**THRESHOLDS, protect=["separators", "first_segment"]),
    "from the first": tp.FixedThreshold(**THRESHOLDS, received_from="first"),
    "from the first segment": tp.FixedThreshold(**THRESHOLDS, received_from="first_segment"),
    "gate": tp.FixedThreshold(**THRESHOLDS, vocabulary=tp.VocabularyGate(_scores(), 0.3)),
    "probes": tp.FixedThreshold(
        thresholds=[0.0, 0.0, 0.9, 1.0], scoring_mode="relative", probes=tp.Probes([1, 2], _affine(2))
    ),
    "context": tp.FixedThreshold(
        thresholds=[0.0, 0.7, 0.9, 1.0],
        scoring_mode="relative",
        vocabulary=tp.VocabularyGate(_scores(), 0.3),
        probes=tp.Probes([1], _affine(1)),
        context=tp.LinearContext([0, 1, 2], _affine(3, 10), _affine(4, 64)[..., -11:]),
    ),
    "own": _Own(scoring_mode="relative"),
}


@pytest.mark.parametrize("name", METHODS)
def test_methods(name: str, tmp_path: Path) -> None:
    check(tp.prune(tiny_model(), METHODS[name]), tmp_path)


@pytest.mark.parametrize(
    ("family", "head"),
    [
        ("mpnet", "encoder"),
        ("deberta-v2", "token"),
        ("albert", "sequence"),
        ("modernbert", "token"),
        ("gte", "encoder"),
    ],
)
def test_context_of_other_families(family: str, head: str, tmp_path: Path) -> None:
    check(tp.prune(tiny_model(family, head), METHODS["context"]), tmp_path, family)


ALWAYS = {  # what departed tokens count as, what is read, and whether they are attended to still
    ("state", "all", False),
    ("survivors", "first", False),
    ("map", "mean", False),
    ("survivors", "mean", True),
    ("map", "mean", True),
}


@pytest.mark.parametrize(
    ("departed", "reads", "context"),
    [
        each if each in ALWAYS else only_exhaustively(*each)
        for each in product(("state", "survivors", "map"), ("first", "mean", "all"), (False, True))
    ],
)
def test_what_departed_tokens_count_as(departed: Any, reads: Any, context: bool, tmp_path: Path) -> None:
    pruner = tp.FixedThreshold(
        **THRESHOLDS,
        departed=departed,
        maps=tp.DepartureMaps([0, 1, 2, 3, 4], _affine(5, 32)) if departed == "map" else None,
        correction=None if reads == "all" else tp.Correction(_affine(32)),
        vocabulary=tp.VocabularyGate(_scores(), 0.3),
        context=tp.LinearContext([0, 1, 2, 3], _affine(4, 10), _affine(4, 64)[..., -11:]) if context else None,
    )
    check(tp.prune(tiny_model("bert", "encoder"), pruner, reads=reads), tmp_path)


@pytest.mark.parametrize("departed", ["map", "survivors"])
def test_a_method_by_which_nothing_leaves(departed: Any, tmp_path: Path) -> None:
    """Neither of the texts that the graph is traced with, nor of any other."""
    maps = tp.DepartureMaps([1, 2, 3, 4], _affine(4, 32)) if departed == "map" else None
    pruner = tp.FixedThreshold(thresholds=[1e-9] * 4, scoring_mode="relative", departed=departed, maps=maps)
    check(tp.prune(tiny_model("bert", "encoder"), pruner, reads="mean"), tmp_path)


def test_a_file_is_named_as_it_was_asked_for(tmp_path: Path) -> None:
    model = tp.prune(tiny_model(), PRUNER)
    for name in ("M.ONNX", "M.XML"):
        assert tp.export(model, tmp_path / name) == tmp_path / name
    assert {file.name for file in tmp_path.iterdir()} == {"M.ONNX", "M.XML", "M.bin"}
    feed = feed_of(ragged_batch([9, 3]))
    one, other = in_onnx_runtime(tmp_path / "M.ONNX")(feed), in_openvino(tmp_path / "M.XML")(feed)
    np.testing.assert_allclose(one["logits"], other["logits"], rtol=0, atol=1e-4)


def test_the_settings_of_a_graph_are_the_dense_models(tmp_path: Path) -> None:
    tp.prune(tiny_model(), PRUNER).save_pretrained(tmp_path / "pruned")
    model = tp.from_pretrained(tmp_path / "pruned")
    before = attachment_of(model).config_before.to_dict()
    folder = tp.export(model, tmp_path / "graph", format="onnx")
    assert attachment_of(model).config_before.to_dict() == before
    kept = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert not kept.keys() & {"prune_mode", "thresholds", "final_token_threshold", "scoring_mode"}
    assert kept["model_type"] == "bert"


def test_tokens_are_gone(tmp_path: Path) -> None:
    """Rows of every feed-forward are as many as the model's."""
    model = tp.prune(tiny_model(), PRUNER)
    file = tp.export(model, tmp_path / "model.onnx")
    graph = onnx.load(file)
    inner = [node.output[0] for node in graph.graph.node if "/intermediate/dense" in node.name]
    graph.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in inner)
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    batch = ragged_batch([20, 50, 7])
    with torch.no_grad(), tp.record(model) as trace:
        model(**batch)
    feed = feed_of(batch)
    rows = [value.shape[0] for value in session.run(inner, {put.name: feed[put.name] for put in session.get_inputs()})]
    assert rows[:3] == trace.ffn_lengths.sum(1).tolist()[:3]
    assert rows[0] > rows[1] > rows[2] > rows[3] == 3  # the last layer's are of first tokens alone


def test_probabilities_are_read_twice_only_where_importance_is_made_of_them(tmp_path: Path) -> None:
    """Elsewhere attention has the form that OpenVINO computes in one operation: logits, mask, softmax, product."""
    pruner = tp.FixedThreshold(
        thresholds=[0.0, 0.7, 0.9, 0.0], scoring_mode="relative", probes=tp.Probes([3], _affine(1))
    )
    graph = onnx.load(tp.export(tp.prune(tiny_model("bert", "encoder"), pruner), tmp_path / "model.onnx")).graph
    made = {name: node.op_type for node in graph.node for name in node.output}
    softmaxes = [node for node in graph.node if node.op_type == "Softmax"]
    readers = [[node.op_type for node in graph.node if each.output[0] in node.input] for each in softmaxes]
    assert readers == [["MatMul"], ["MatMul", "MatMul"], ["MatMul"], ["MatMul"]]
    assert [made[each.input[0]] for each in softmaxes] == ["Add", "MatMul", "Add", "Add"]


def test_a_token_among_many_others_padding(tmp_path: Path) -> None:
    """The mask holds where most places of a text are padding, and where logits are large."""
    model = tiny_model("bert", "encoder")
    for layer in model.encoder.layer:
        layer.attention.self.query.weight.data *= 30
    tp.prune(model, PRUNER)
    runs = [in_onnx_runtime(tp.export(model, tmp_path / "m.onnx")), in_openvino(tp.export(model, tmp_path / "m.xml"))]
    batch = ragged_batch([2, 60, 3, 59, 1], seed=2)
    with torch.no_grad():
        expected = model(**batch).last_hidden_state.numpy()
    for run in runs:
        np.testing.assert_allclose(run(feed_of(batch))["last_hidden_state"], expected, rtol=0, atol=1e-4)


ALONE = """
import sys
import numpy as np
file, arrays = sys.argv[1:]
feed = dict(np.load(arrays))
expected = feed.pop("expected")
if file.endswith(".onnx"):
    import onnxruntime
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    found = session.run(None, {put.name: feed[put.name] for put in session.get_inputs()})[0]
else:
    import openvino
    compiled = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = compiled([feed[put.any_name] for put in compiled.inputs])[0]
assert np.abs(found - expected).max() < 1e-4, found
assert not {"torch", "transformers", "token_pruning"} & set(sys.modules)
"""


@pytest.mark.parametrize("name", ["model.onnx", "model.xml"])
def test_a_fresh_process_needs_the_runtime_alone(name: str, tmp_path: Path) -> None:
    model = tp.prune(tiny_model(), PRUNER)
    file = tp.export(model, tmp_path / name)
    batch = ragged_batch([44, 3, 60], left=True)
    with torch.no_grad():
        np.savez(tmp_path / "arrays.npz", **feed_of(batch), expected=model(**batch).logits.numpy())
    subprocess.run([sys.executable, "-c", ALONE, file, tmp_path / "arrays.npz"], check=True)


def test_lora_is_merged_and_half_precision_becomes_float32(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = tp.prune(tiny_model(), PRUNER)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query", "value"], init_lora_weights=False))
    check(adapted.eval(), tmp_path)
    half = tp.prune(tiny_model().bfloat16(), PRUNER)
    found = in_onnx_runtime(tp.export(half, tmp_path / "half.onnx"))(feed_of(ragged_batch([20, 30])))
    assert found["logits"].dtype == np.float32
    assert next(half.parameters()).dtype == torch.bfloat16


# sentence-transformers


@pytest.mark.parametrize("pooling", [{}, {"pooling_mode": "cls"}, {"pooling_mode": "max"}])
def test_an_embedding_model(pooling: dict[str, Any], home: Path, tmp_path: Path) -> None:  # noqa: F811
    model = tp.prune(embedder(home, **pooling), tp.FixedThreshold(thresholds=[0.5, 0.7, 0.9], scoring_mode="relative"))
    expected, features = model.encode(TEXTS), model.preprocess(TEXTS)
    tp.export(model, tmp_path / "onnx", format="onnx")
    tp.export(model, tmp_path / "openvino")
    for run in (
        in_onnx_runtime(tmp_path / "onnx" / "model.onnx"),
        in_openvino(tmp_path / "openvino" / "openvino_model.xml"),
    ):
        found = run(feed_of({name: value for name, value in features.items() if isinstance(value, Tensor)}))
        np.testing.assert_allclose(found["sentence_embedding"], expected, rtol=0, atol=1e-4)
        with torch.no_grad():
            states = model[0](dict(features))["token_embeddings"]
        np.testing.assert_allclose(found["last_hidden_state"], states.numpy(), rtol=0, atol=1e-4)
    names = {path.relative_to(tmp_path / "onnx").as_posix() for path in (tmp_path / "onnx").rglob("*")}
    assert {"modules.json", "config.json", "tokenizer.json", "1_Pooling/config.json", "model.onnx"} <= names
    assert not {"model.safetensors", "token_pruner.safetensors"} & names
    assert "2_Dense/model.safetensors" in names  # what runs outside the graph
    assert hf.AutoConfig.from_pretrained(tmp_path / "onnx").to_dict().get("prune_mode") is None


def test_a_reranker(home: Path, tmp_path: Path) -> None:  # noqa: F811
    model = tp.prune(ranker(home), tp.FixedThreshold(thresholds=[0.5, 0.7, 0.9], scoring_mode="relative"))
    expected = model.predict(TEXT_PAIRS, activation_fn=torch.nn.Identity())
    features = model.preprocess(TEXT_PAIRS)
    tp.export(model, tmp_path / "out")
    run = in_openvino(tmp_path / "out" / "openvino_model.xml")
    found = run(feed_of({name: value for name, value in features.items() if isinstance(value, Tensor)}))
    np.testing.assert_allclose(found["logits"][:, 0], expected, rtol=0, atol=1e-4)
    assert features["input_ids"].shape[1] <= LONGEST


# What is refused


class _Counting(_Own, registered=False):
    def keep(self, tokens: LayerTokens) -> Tensor:
        return tokens.scores >= float(tokens.scores.mean())


class _Looking(_Own, registered=False):
    def keep(self, tokens: LayerTokens) -> Tensor:
        return tokens.scores >= min(tokens.layout.lengths)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "dense": (tiny_model, "not pruned"),
    "summaries": (
        lambda: tp.prune(tiny_model(), tp.FixedThreshold(**THRESHOLDS, summary_tokens="shared")),
        "summary_tokens is 'shared'",
    ),
    "max_tokens": (
        lambda: tp.prune(tiny_model(), tp.FixedThreshold(**THRESHOLDS, max_tokens=32)),
        "max_tokens is 32",
    ),
    "choices": (lambda: tp.prune(tiny_model("bert", "multiple_choice"), PRUNER), "MultipleChoice"),
    "images": (lambda: tp.prune(tiny_model("vit", "encoder"), PRUNER), "pixel_values"),
    "numbers of tensors": (lambda: tp.prune(tiny_model(), _Counting()), "_Counting makes Python numbers of tensors"),
    "lengths": (lambda: tp.prune(tiny_model(), _Looking()), "layout.lengths"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_graph_cannot_have_is_refused_by_name(case: str, tmp_path: Path) -> None:
    make, message = REFUSED[case]
    with pytest.raises(tp.TokenPruningError, match=message):
        tp.export(make(), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_wrong_arguments(tmp_path: Path) -> None:
    model = tp.prune(tiny_model(), PRUNER)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for output, settings, message in (
        ("full", {}, "full, which exists"),
        ("full/file", {}, "file, which exists"),
        ("model.onnx", {"format": "openvino"}, "a file for 'onnx'"),
        ("out", {"format": "tflite"}, "format is 'tflite'"),
        ("model.onnx", {"tokenizer": object()}, "tokenizer is given"),
        ("full/file/model.onnx", {}, "cannot be written"),
    ):
        with pytest.raises(tp.TokenPruningError, match=message):
            tp.export(model, tmp_path / output, **settings)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(tp.TokenPruningError, match=r"needs openvino: pip install 'token-pruning\[export\]'"):
        tp.export(tp.prune(tiny_model(), PRUNER), tmp_path / "out")


def test_nothing_is_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tp.prune(tiny_model(), PRUNER)
    (tmp_path / "model.onnx").write_text("before")

    def fail(*args: Any, **kwargs: Any) -> None:
        Path(args[2]).write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.onnx, "export", fail)
    for output in ("model.onnx", "out"):
        with pytest.raises(tp.ConfigError, match="No space left"):
            tp.export(model, tmp_path / output)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_text() == "before"


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = tp.prune(tiny_model(), PRUNER).train()
    batch = ragged_batch([9, 20])
    tp.export(model, tmp_path / "model.onnx")
    assert model.training and all(weight.requires_grad for weight in model.bert.encoder.parameters())
    with torch.no_grad(), tp.record(model.eval()) as trace:
        model(**batch)
    assert len(trace.passes) == 1
    assert tp.unprune(model).config.to_dict() == tiny_model().config.to_dict()


def test_the_layout_of_a_graph_is_the_layout_of_a_batch() -> None:
    layout = GraphLayout(torch.tensor([0, 1, 2, 5, 6]), torch.tensor([0, 3, 5], dtype=torch.int32), 5)
    assert layout.columns.tolist() == [0, 1, 2, 0, 1]
    assert layout.grid_mask.tolist() == [[True] * 3, [True, True, False]]
    assert layout.grid_rows.tolist() == [[0, 1, 2], [3, 4, 3]]
    assert layout.grid_places.tolist() == [0, 1, 2, 3, 4]
    assert replace(layout, rounded=True).grid_mask.shape == (2, 16)
    rows = torch.arange(10.0).view(5, 2)
    found = [int(rounded_up(torch.tensor(count))) for count in (1, 16, 17, 511, 512, 513, 4700, 4900)]
    assert found == [16, 16, 32, 512, 512, 544, 4864, 5120]
    scores = torch.tensor([0.5, 0.9, 0.5, 0.1, 0.2])
    assert layout.ranks(scores).tolist() == Layout(layout.indices, layout.cu_seqlens, 5).ranks(scores).tolist()
    assert layout.sums(rows, torch.ones(5)).tolist() == [[6.0, 9.0], [14.0, 16.0]]


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    keys = {"prune_mode": "absolute_threshold", "thresholds": [0.5, 0.7, 0.9, 1.0], "scoring_mode": "relative"}
    write_checkpoint(Path("model"), initializer_range=0.3, **keys)
    assert main(["export", "model", "out", "--format", "onnx"]) == 0
    assert {"config.json", "model.onnx", "tokenizer.json"} <= {path.name for path in Path("out").iterdir()}
    tokenizer = hf.AutoTokenizer.from_pretrained("out")
    features = tokenizer(["good cat sat on the mat", "bad dog"], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = tp.from_pretrained("model")(**features).logits
    found = in_onnx_runtime(Path("out/model.onnx"))(feed_of(features))["logits"]
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-4)
    thresholds = {0.5: keys["thresholds"], 1.0: [0.0] * 4}
    table = [{"relative_flops": cost, "thresholds": own} for cost, own in thresholds.items()]
    write_checkpoint(Path("several"), initializer_range=0.3, **keys, budgets=table)
    assert main(["export", "several", "at.onnx", "--budget", "0.75"]) == 0
    with torch.no_grad():
        several = tp.from_pretrained("several")
        assert torch.equal(several(**features).logits, expected)  # as it was saved
        tp.set_budget(several, 0.75)
        expected_at, unlike = several(**features).logits.numpy(), expected.numpy()
    assert np.abs(expected_at - unlike).max() > 1e-3
    np.testing.assert_allclose(in_onnx_runtime(Path("at.onnx"))(feed_of(features))["logits"], expected_at, atol=1e-4)
    for line, message in (
        ("export several out2 --budget 0.2", "budget is 0.2"),
        ("export model out2 --budget 0.5", "not pruned for several budgets"),
        ("export model out", "out, which exists"),
        ("export model", "OUTPUT is missing"),
        ("export nowhere out2", "nowhere is not a folder"),
        ("export model out2 --output out3", "give either OUTPUT or --output"),
    ):
        assert main(line.split()) == 2
        assert message in capsys.readouterr().err
