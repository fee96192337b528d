"""What the benchmarks compute with, and the CPU benchmark on tiny models; other runs need data that is not here."""

import json
import random
from argparse import Namespace
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import token_pruning as tp
from tests.integrations.test_sentence_transformers import embedder, texts
from tests.integrations.test_sentence_transformers import home as home  # a fixture
from tests.workspace import WORDS, write_checkpoint, write_sst2
from token_pruning.families import shape_of

pytest.importorskip("scipy")


def benchmark(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return import_module(name)


@pytest.fixture
def measures(monkeypatch: pytest.MonkeyPatch) -> Any:
    return benchmark("measures", monkeypatch)


@pytest.fixture
def comparison(monkeypatch: pytest.MonkeyPatch) -> Any:
    return benchmark("comparison", monkeypatch)


def test_ranks_count_those_before_the_target_and_ties_against_it(measures: Any) -> None:
    scores = np.array([[0.9, 0.5, 0.1], [0.2, 0.2, 0.1], [0.3, 0.8, 0.9]])
    assert measures.ranks(scores, np.array([0, 1, 0])).tolist() == [0, 1, 2]


def test_scores_of_rankings(measures: Any) -> None:
    found = np.array([0, 1, 2, 9, 10, 100])
    assert measures.ndcg(found) == pytest.approx([1, 1 / np.log2(3), 0.5, 1 / np.log2(11), 0, 0])
    assert measures.reciprocal_rank(found) == pytest.approx([1, 1 / 2, 1 / 3, 1 / 10, 1 / 11, 1 / 101])


def test_spearman_is_of_the_order_alone(measures: Any) -> None:
    values = np.array([0.1, 0.5, 0.2, 0.9])
    assert measures.spearman(values, np.exp(9 * values)) == pytest.approx(100)
    assert measures.spearman(values, -values) == pytest.approx(-100)


def test_an_interval_is_of_the_same_items_and_of_some_only(measures: Any) -> None:
    def mean(outcome: Any, items: Any) -> float:
        return float(outcome[items].mean())

    generator = np.random.default_rng(1)
    dense = generator.normal(size=400) * 100
    everything, few = np.arange(400), np.arange(40)
    assert measures.loss_interval(mean, dense, dense - 2, everything) == pytest.approx((2, 2))  # however it spreads
    noisy = dense - generator.normal(1, 1, size=400)
    low, high = measures.loss_interval(mean, dense, noisy, everything)
    assert low < (dense - noisy).mean() < high
    assert high - low == pytest.approx(2 * 1.96 / np.sqrt(400), rel=0.15)
    noisy[40:] = 0
    low, high = measures.loss_interval(mean, dense, noisy, few)
    assert -1 < low < high < 3


@pytest.mark.parametrize("target", [0.01, 0.3, 0.5, 0.74, 1.0, 2.0])
def test_the_length_with_the_nearest_cost(measures: Any, target: float) -> None:
    lengths = [5, 9, 9, 12, 40, 160]

    def cost(length: int) -> float:
        return sum(measures.truncated(lengths, length)) / sum(lengths)

    found = measures.length_for(target, cost, 160)
    every = range(3, 161)
    assert abs(cost(found) - target) == pytest.approx(min(abs(cost(length) - target) for length in every))


def test_truncation_costs_what_shorter_texts_cost(comparison: Any) -> None:
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, vocab_size=50
    )
    lengths = [10, 20, 60]
    whole = comparison.flops_of(config, lengths)
    cost = comparison.truncation_cost(config, lengths, 15, first_only=False)
    assert cost == pytest.approx(comparison.flops_of(config, [10, 15, 15]) / whole)
    assert comparison.truncation_cost(config, lengths, 60, first_only=False) == pytest.approx(1)
    assert comparison.truncation_cost(config, lengths, 15, first_only=True) < cost


def test_the_first_layers_learn_what_all_of_them_give(
    home: Path, comparison: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = Namespace(distillation=texts(120, 12, seed=3))
    arguments = Namespace(epochs=2.0, bf16=False, device="cpu", keep_trained=tmp_path)
    dense = embedder(home)
    first = comparison.shallow(lambda: embedder(home), task, 2, 0, "tiny", arguments)
    assert shape_of(first[0].model.config).num_layers == len(first[0].model.encoder.layer) == 2
    cut = embedder(home)
    cut[0].model.encoder.layer = cut[0].model.encoder.layer[:2]
    unseen = texts(20, 12, seed=4)
    wanted = dense.encode(unseen)

    def cosine(model: Any) -> float:
        return float((model.encode(unseen) * wanted).sum(1).mean())

    assert cosine(first) > cosine(cut)
    assert comparison.training(task, "texts", 0, arguments) == "on 120 texts, 2 passes, seed 0"

    monkeypatch.setattr(timing := benchmark("timing", monkeypatch), "PAUSE", 0.0)
    kept = tmp_path / "tiny-first-2-seed0"
    how = Namespace(methods=[], threads=1, dtypes=["float32"], passes=1, trained=[kept])
    bench = timing.Bench(lambda: embedder(home), task.distillation, tmp_path, how)
    rows = bench.measure(
        lambda model, size: lambda: model.encode(unseen, batch_size=size),
        lambda model: {"agreement": float((model.encode(unseen) * first.encode(unseen)).sum(1).mean())},
    )
    assert [row["what"] for row in rows][1:] == [
        "sentence-transformers, float32", "token-pruning, tiny-first-2-seed0, float32",
    ]  # fmt: skip
    assert rows[-1]["agreement"] == pytest.approx(1, abs=1e-5) and rows[0]["agreement"] < 0.999
    assert rows[-1]["to_best"] and rows[-1]["batch_size"] is None


def test_a_table_keeps_rows_that_were_not_measured_again(
    comparison: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def publish(argv: list[str], rows: list[dict[str, Any]], add: bool) -> Any:
        monkeypatch.setattr("sys.argv", ["/somewhere/benchmarks/embeddings.py", *argv])
        arguments = Namespace(threads=1, output=tmp_path / "quality", add=add, data=Path("/data"))
        comparison.publish(
            comparison.table("a model", "A task.", "nDCG", rows, arguments), arguments, comparison.quality_lines
        )
        capsys.readouterr()
        return json.loads((tmp_path / "quality.json").read_text(encoding="utf-8"))

    def row(what: str, score: float) -> dict[str, Any]:
        return {"what": what, "cost": 0.5, "scores": {"all": score}, "losses": {}}

    publish(["--data", "/data"], [row("dense", 80.0), row("truncated", 70.0)], False)
    (table,) = publish(["--data", "/data", "--add"], [row("pruned", 78.0), row("dense", 81.0)], True)
    assert [(each["what"], each["scores"]["all"]) for each in table["rows"]] == [
        ("dense", 81.0), ("truncated", 70.0), ("pruned", 78.0),
    ]  # fmt: skip
    assert table["commands"] == [f"python benchmarks/embeddings.py --data DATA{more}" for more in ("", " --add")]
    comparison.merge(tables := [table], {**table, "rows": [row("timed together", 1.0)]}, whole=True)
    assert [each["what"] for each in tables[0]["rows"]] == ["timed together"]
    text = (tmp_path / "quality.md").read_text(encoding="utf-8")
    assert "| truncated | 0.50 |" in text and "/data" not in text


# benchmarks/int8.py


def test_int8_is_scored_on_the_same_examples_in_the_same_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    int8 = benchmark("int8", monkeypatch)
    glue, folder = tmp_path / "glue", write_checkpoint(tmp_path / "model")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    path = write_sst2(glue) / "SST-2" / "dev.tsv"
    header, *lines = path.read_text(encoding="utf-8").splitlines()
    texts = [line.split("\t")[0] for line in lines]
    with torch.inference_mode():
        answers = [int(model(**tokenizer(text, return_tensors="pt")).logits.argmax()) for text in texts]
    answers[0] = 1 - answers[0]  # one of them wrong
    rows = [f"{text}\t{answer}" for text, answer in zip(texts, answers, strict=True)]
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    found, score = int8.classifier(glue, "SST2", folder)
    wanted = 100 * (1 - 1 / len(texts))
    assert score(found) == pytest.approx(wanted)
    assert score(tp.compile(found, "int8", threads=1)) == pytest.approx(wanted, abs=20)


# benchmarks/cpu.py


@pytest.fixture
def hardware(monkeypatch: pytest.MonkeyPatch) -> Any:
    return benchmark("hardware", monkeypatch)


@pytest.fixture
def workloads(monkeypatch: pytest.MonkeyPatch) -> Any:
    return benchmark("workloads", monkeypatch)


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, with everything in this process."""
    script = benchmark("cpu", monkeypatch)
    monkeypatch.setattr(script, "in_fresh_process", lambda function, *arguments, threads: function(*arguments))
    return script


@pytest.mark.parametrize(
    ("name", "flags", "slug"),
    [
        ("AMD EPYC", "avx2 avx512f avx512_vnni avx512_bf16", "amd-epyc-avx512-vnni-bf16"),
        ("AMD EPYC (Zen 5)", "avx2 avx512f avx512_vnni avx512_bf16", "amd-epyc-zen-5-avx512-vnni-bf16"),
        ("AMD EPYC 7R13 48-Core Processor", "avx avx2", "amd-epyc-7r13-avx2"),
        ("Intel(R) Xeon(R) Processor", "avx2 avx512f avx512_vnni amx_bf16 amx_int8", "intel-xeon-amx"),
        ("Intel(R) Xeon(R) Platinum 8259CL CPU @ 2.50GHz", "avx2 avx512f", "intel-xeon-platinum-8259cl-avx512"),
        ("Intel(R) Core(TM) Ultra 7 155H", "avx2 avx_vnni", "intel-core-ultra-7-155h-avx2-vnni"),
        ("aarch64", "fp asimd asimddp i8mm", "aarch64-neon-dotprod-i8mm"),
        ("riscv64", "", "riscv64"),
    ],
)
def test_a_machine_has_a_folder_of_its_own(hardware: Any, name: str, flags: str, slug: str) -> None:
    assert hardware.slug(name, frozenset(flags.split())) == slug


def test_figures_of_another_machine_are_left_alone(
    cpu: Any, hardware: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "engines.json"
    hardware.refuse_others(hardware.this_machine(), path)
    for other in ({"cpu": "Another", "amx": False}, {**hardware.this_machine(), "machine": "another"}):
        path.write_text(json.dumps({"about": other, "runs": []}), encoding="utf-8")
        for option in ("--add", "--resume", "--no-memory"):
            monkeypatch.setattr("sys.argv", ["cpu.py", "--output", str(tmp_path / "engines"), option])
            with pytest.raises(tp.TokenPruningError, match="measured on another machine"):
                cpu.main()
        assert json.loads(path.read_text(encoding="utf-8"))["about"] == other


def test_drawn_lengths_are_those_asked_for(workloads: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for lengths in workloads.LENGTHS.values():
        drawn = torch.tensor(lengths.at((torch.arange(4000) + 0.5) / 4000)).double()
        assert lengths.low <= drawn.min() and drawn.max() <= lengths.high
        if lengths.sigma:
            assert drawn.mean() == pytest.approx(lengths.mean, rel=0.03)
        else:
            assert drawn.mean() == pytest.approx((lengths.low + lengths.high) / 2, rel=0.01)


@pytest.mark.parametrize("first_only", [True, False])
def test_a_line_of_thresholds_ends_where_it_costs_what_it_shall(
    first_only: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_weights = benchmark("random_weights", monkeypatch)
    config = transformers.BertConfig(num_hidden_layers=6)
    lengths = [40, 100, 300]
    end = random_weights.final_keep_for(0.7, config, lengths, first_only=first_only)
    cost, entering = 0.0, 1.0
    for layer in range(6):  # one by one, by hand
        left = 1 - (1 - end) * layer / 5
        last = first_only and layer == 5
        for length in lengths:
            keys = length * entering
            asking, fed = (1.0, 1.0) if last else (keys, length * left)
            joined = fed if first_only else asking
            cost += (
                2 * keys * 768 * 768 + (asking + joined) * 768 * 768 + 2 * asking * keys * 768 + 2 * fed * 768 * 3072
            )
        entering = left
    whole = 6 * sum(4 * n * 768 * 768 + 2 * n * n * 768 + 2 * n * 768 * 3072 for n in lengths)
    assert cost / whole == pytest.approx(0.7, abs=1e-3)
    assert random_weights.final_keep_for(0.01, config, lengths, first_only=first_only) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("workload", ["trial-classifier", "trial-reranker", "trial-embedding"])
def test_every_kind_of_workload_runs_to_the_end(
    workload: str,
    cpu: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "new" / "engines"

    def figures(*more: str) -> Any:
        monkeypatch.setattr(
            "sys.argv",
            ["/somewhere/benchmarks/cpu.py", "--workload", workload, "--threads", "1", "--passes", "2", "--peers",
             "transformers", "--dtypes", "float32", "--no-memory", "--output", str(output), *more],
        )  # fmt: skip
        cpu.main()
        capsys.readouterr()
        return json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))

    (done,) = figures()["runs"]
    assert set(done["engines"]) == {"transformers", cpu.UNPRUNED, cpu.PRUNED} and not done["left_out"]
    assert all(value < 1e-5 for value in done["difference"].values())
    assert done["relative_flops"] < done["relative_flops_unpruned"] <= 1
    assert done["best_dense"] == "transformers" and done["engines"]["transformers"]["to_best_dense"]["median"] == 1
    for name, row in done["engines"].items():  # ratios are of passes, one by one
        pairs = zip(done["seconds"]["transformers"], done["seconds"][name], strict=True)
        assert row["to_best_dense"]["median"] == pytest.approx(np.median([theirs / own for theirs, own in pairs]))
    text = output.with_suffix(".md").read_text(encoding="utf-8")
    assert str(tmp_path) not in text and "--output OUTPUT" in text
    assert output.with_suffix(".png").stat().st_size
    assert "| float32 | *kernels* | " in text

    monkeypatch.setattr(cpu, "run", lambda *arguments: pytest.fail("it was measured already"))
    assert figures("--resume")["runs"] == [done]
    monkeypatch.setattr(cpu, "run", lambda *arguments: {**done, "dtype": arguments[2], "passes": 5})
    assert [run["passes"] for run in figures("--add")["runs"]] == [5]
    assert [run["dtype"] for run in figures("--add", "--dtypes", "int8", "float32")["runs"]] == ["float32", "int8"]


def test_a_dense_engine_gets_what_is_fastest_for_it(
    cpu: Any, workloads: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that only counts what an imaginary engine says a call takes."""
    monkeypatch.setitem(workloads.WORKLOADS, "trial", workloads.Workload(32, "roberta-tiny", batches=2, pool=4))
    made = cpu.make_model("trial", tmp_path, None, None)
    sequences = cpu.Sequences(workloads.WORKLOADS["trial"], made["model"].checkpoint, None)
    now = 0.0

    def call(inputs: Any) -> Any:
        nonlocal now
        batch, width = inputs["input_ids"].shape
        now += {32: 3.0, 16: 2.0, 8: 1.0}.get(batch, 4.0) * batch * (1.0 if width % 16 == 0 else 1.2) * width

    monkeypatch.setattr(cpu.time, "perf_counter", lambda: now)
    setting = cpu.best_setting(call, sequences, 3)
    assert (setting.form, setting.batch_size, setting.multiple) == (3, 8, 16)
    batches = sequences.draw(0)
    whole = [sequences.pad(batch) for batch in batches]
    parts = list(cpu.cut(sequences, batches, replace(setting, multiple=1)))
    assert [len(part["input_ids"]) for part in parts] == [8] * 8
    assert sum(part["attention_mask"].sum() for part in parts) == sum(each["attention_mask"].sum() for each in whole)


def test_the_table_says_where_a_pruned_model_is_slower(cpu: Any) -> None:
    def run(dtype: str, ratio: float) -> dict[str, Any]:
        def row(speed: float, ratio: float) -> dict[str, Any]:
            spread = {"median": speed, "lowest": speed - 1, "highest": speed + 1}
            return {"sequences_per_second": spread, "to_best_dense": {"median": ratio, "lowest": ratio, "highest": 2.0}}

        return {
            "workload": "trial-classifier", "dtype": dtype, "threads": 1, "best_dense": "OpenVINO, float32",
            "relative_flops": 0.58, "engines": {"OpenVINO, float32": row(10, 1), cpu.PRUNED: row(10 * ratio, ratio)},
        }  # fmt: skip

    head, _, faster, slower = cpu.summary({"about": {"machine": "m"}, "runs": [run("bfloat16", 1.5), run("int8", 0.9)]})
    assert "SLOWER" not in faster and "**1.50×** (1.50 – 2.00)" in faster
    assert "**0.90×** (0.90 – 2.00), SLOWER than OpenVINO, float32" in slower
    assert len({line.count("|") for line in (head, faster, slower)}) == 1


def test_wider_dense_engines_take_part(cpu: Any) -> None:
    def run(workload: str, dtype: str, **speeds: float) -> dict[str, Any]:
        rows = {name: {"sequences_per_second": {"median": speed}} for name, speed in speeds.items()}
        return {"workload": workload, "threads": 1, "dtype": dtype, "engines": rows}

    runs = [
        run("a", "float32", x=1, y=2, own=9),
        run("a", "bfloat16", x=4),
        run("a", "int8", y=8),
        run("b", "float32", x=1),
    ]
    assert cpu.wider_best(runs, "a", 1, "int8", ["x", "y"]) == [("y", "float32"), ("x", "bfloat16")]
    assert cpu.wider_best(runs, "a", 1, "float32", ["x", "y"]) == []
    assert cpu.wider_best(runs, "a", 2, "int8", ["x", "y"]) == []


def test_the_index_names_every_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = benchmark("index", monkeypatch)
    for name, ratios in (("b-amx", [2.0, 3.0]), ("a-avx2", [1.5])):
        (tmp_path / name).mkdir()
        runs = [
            {"dtype": "int8", "engines": {"engine, pruned": {"to_best_dense": {"median": ratio}}}} for ratio in ratios
        ]
        about = {"cpu": name.upper(), "processors": 2, "versions": {"token-pruning": "0.2.0"}}
        (tmp_path / name / "engines.json").write_text(json.dumps({"about": about, "runs": runs}), encoding="utf-8")
    (tmp_path / "b-amx" / "README.md").touch()
    index.write_index(tmp_path)
    *_, first, second = (tmp_path / "README.md").read_text(encoding="utf-8").splitlines()
    assert first == "| [a-avx2](a-avx2/engines.md) | A-AVX2 | 2 | 0.2.0 | 1 |  |  | 1.50× – 1.50× |"
    assert second == "| [b-amx](b-amx/README.md) | B-AMX | 2 | 0.2.0 | 2 |  |  | 2.00× – 3.00× |"


@pytest.mark.parametrize(
    ("peer", "package"), [("ONNX Runtime", "onnxruntime"), ("OpenVINO", "nncf"), ("llama.cpp", "llama_cpp")]
)
@pytest.mark.parametrize("workload", ["trial-reranker", "trial-embedding"])
def test_other_engines_compute_the_model(peer: str, package: str, workload: str, cpu: Any, tmp_path: Path) -> None:
    pytest.importorskip(package)
    made = cpu.make_model(workload, tmp_path, None, None)
    for dtype, forms in cpu.PEERS[peer].forms.items():
        places, why = cpu.prepare_peer(workload, peer, dtype, made["model"], None)
        assert places == list(range(len(forms))), why
        for form in forms:
            found = cpu.PEERS[peer].build(made["model"], form, dtype, 1)(made["sample"])
            # llama.cpp has GELU from a table; statically quantised random weights are far off
            allowed = {"float32": 5e-3, "bfloat16": 5e-2, "int8": 0.6}[dtype]
            assert cpu.distance(found, made["expected"][False]) < allowed, form.about


def test_a_peer_that_is_not_installed_is_left_out(cpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cpu.PEERS, "ONNX Runtime", replace(cpu.PEERS["ONNX Runtime"], packages=("no_such_package",)))
    made = cpu.make_model("trial-classifier", tmp_path, None, None)
    places, why = cpu.prepare_peer("trial-classifier", "ONNX Runtime", "float32", made["model"], None)
    assert places == [] and why == {"ONNX Runtime": "ModuleNotFoundError: No module named 'no_such_package'"}


def test_a_dense_engine_that_computes_something_else_is_left_out(
    cpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = cpu.make_model("trial-classifier", tmp_path, None, None)
    broken = replace(cpu.PEERS["transformers"], build=lambda *arguments: lambda inputs: made["expected"][False] * 1.1)
    monkeypatch.setitem(cpu.PEERS, "transformers", broken)
    peers = {("transformers", "float32"): [0]}
    done = cpu.measure("trial-classifier", made, peers, "float32", 1, 1, None)
    assert set(done["seconds"]) == {cpu.UNPRUNED, cpu.PRUNED}
    assert "differ from the model's by 1.0e-01" in done["left_out"]["transformers"]


def test_shapes_are_those_of_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    random_weights = benchmark("random_weights", monkeypatch)
    sizes = {}
    for name, (model_type, values) in random_weights.SHAPES.items():
        shape = shape_of(transformers.AutoConfig.for_model(model_type, **values))
        sizes[name] = (shape.num_layers, shape.hidden_size, shape.intermediate_size)
    assert sizes == {
        "tiny": (3, 64, 128), "base": (12, 768, 3072), "large": (24, 1024, 4096), "minilm-l6": (6, 384, 1536),
        "modernbert-base": (22, 768, 1152),
    }  # fmt: skip


def test_pipelines_take_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipelines, output = benchmark("pipelines", monkeypatch), tmp_path / "new" / "pipelines"
    model = write_checkpoint(tmp_path / "model", initializer_range=0.3)
    pruner = tp.FixedThreshold(thresholds=[0.6, 0.8, 0.9, 0.9], scoring_mode="relative")
    docstrings = Namespace(train=Namespace(first=[" ".join(random.Random(0).choices(WORDS, k=400))]))
    monkeypatch.setattr(pipelines, "load_docstrings", lambda: docstrings)  # this and calibrating take a while
    monkeypatch.setattr(tp, "calibrate", lambda model, examples, target_flops: tp.prune(model, pruner))
    sizes = "--texts 3 --calibration 1 --shortest 8 --longest 40 --passes 2 --threads 1 --dtypes float32"
    words = ["/somewhere/benchmarks/pipelines.py", "--model", str(model), *sizes.split(), "--output", str(output)]
    monkeypatch.setattr("sys.argv", words)
    threads, verbosity = torch.get_num_threads(), transformers.logging.get_verbosity()
    try:
        pipelines.main()
    finally:
        torch.set_num_threads(threads)
        transformers.logging.set_verbosity(verbosity)
    capsys.readouterr()
    tables = json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))
    assert [table["title"].split(", 1 thread")[0] for table in tables] == [
        f"{task}, batch size {size}" for task in pipelines.HEADS for size in (1, 16)
    ]
    for table in tables:
        dense, *others = table["rows"]
        assert [row["what"] for row in others] == ["pruned model, float32", "engine, pruned, float32"]
        assert dense["to_dense"] == dense["relative_flops"] == 1
        for row in others:
            assert row["relative_flops"] < 0.8 and row["difference"] < 1e-4 and row["same_labels"] == 1
            ratios = [theirs / own for theirs, own in zip(dense["passes"], row["passes"], strict=True)]
            assert row["to_dense"] == pytest.approx(np.median(ratios))
    assert "| engine, pruned, float32 |" in output.with_suffix(".md").read_text(encoding="utf-8")


def test_answers_are_scored_as_squad_does(measures: Any) -> None:
    assert measures.answer_scores("The cat!", ["a dog", "cat"]) == (1, 1)
    assert measures.answer_scores("black cat", ["the cat", "dog"]) == (0, pytest.approx(2 / 3))
    assert measures.answer_scores("cat cat", ["cat"]) == (0, pytest.approx(2 / 3))
    assert measures.answer_scores("", []) == (1, 1) and measures.answer_scores("cat", []) == (0, 0)
    assert measures.answer_scores("", ["cat", "the"]) == (0, 0)


def test_entities_are_those_of_conlleval(measures: Any) -> None:
    labels = ["B-person", "I-person", "B-person", "O", "I-group", "I-person", "O", "B-group"]
    expected = {("person", 0, 2), ("person", 2, 3), ("group", 4, 5), ("person", 5, 6), ("group", 7, 8)}
    assert measures.entities(labels) == expected
    assert measures.entity_counts(["B-person", "O", *labels[2:]], labels) == (4, 5, 5)
    assert measures.entity_f1(np.array([[4.0, 5, 5], [0, 1, 0]])) == pytest.approx(100 * 8 / 11)
    assert measures.entity_f1(np.zeros((2, 3))) == 0


def write_spans(folder: Path) -> None:
    """Three articles of 40 questions, half of them with an answer, and sentences with names."""
    generator, articles = random.Random(0), []
    for _ in range(3):
        paragraphs = []
        for number in range(40):
            words = generator.choices(WORDS, k=30)
            place = generator.randrange(25)
            answer = {"text": " ".join(words[place : place + 3]), "answer_start": len("".join(words[:place])) + place}
            asked = {"question": f" {words[place]} ?", "is_impossible": number % 2 == 1}
            asked["answers"] = [] if asked["is_impossible"] else [answer]
            paragraphs.append({"context": " ".join(words), "qas": [asked]})
        articles.append({"paragraphs": paragraphs})
    (folder / "squad2").mkdir(parents=True)
    (folder / "squad2" / "half-dev-v2.0.json").write_text(json.dumps({"data": articles}), encoding="utf-8")
    (folder / "wnut17").mkdir()
    for part in ("train", "test"):
        lines = [f"{word}\t{'B-cat' if word == 'cat' else 'O'}" for word in generator.choices(WORDS, k=1200)]
        text = "\n".join("\n".join(lines[start : start + 20]) + "\n\t" for start in range(0, 1200, 20))
        (folder / "wnut17" / f"{part}.conll").write_text(text, encoding="utf-8")


def test_spans_are_measured_once_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spans, output = benchmark("spans", monkeypatch), tmp_path / "spans"
    write_spans(tmp_path / "data")
    model = write_checkpoint(tmp_path / "model", head="encoder", initializer_range=0.3)
    pruner = tp.FixedThreshold(thresholds=[0.0, 0.9, 0.9, 0.9], scoring_mode="relative")
    monkeypatch.setattr(spans, "find_minilm", lambda: model)
    monkeypatch.setattr(spans, "EPOCHS", {"answers": (1, 1), "tagging": (1, 1)})
    tasks = benchmark("span_tasks", monkeypatch)
    monkeypatch.setattr(tasks, "RERANK_TRAINING_ARTICLES", 2)
    monkeypatch.setattr(tasks, "LONGEST", 100)
    monkeypatch.setattr(tasks, "HELD_OUT_SENTENCES", 20)
    monkeypatch.setattr(tp, "calibrate", lambda model, examples, target_flops: tp.Calibration(
        tp.prune(model, pruner).token_pruner.pruner, Namespace(rule="attention received"), []
    ))  # fmt: skip
    words = ["/somewhere/benchmarks/spans.py", "--data", str(tmp_path / "data"), "--model", str(tmp_path / "runs")]
    monkeypatch.setattr("sys.argv", [*words, "--budgets", "0.6", "--output", str(output)])
    verbosity = transformers.logging.get_verbosity()
    try:
        spans.measure(spans.parse_arguments())
        first = capsys.readouterr().out
        (tmp_path / "runs" / "answers-seed0" / "top-k at 0.6, trained.json").unlink()
        spans.measure(spans.parse_arguments())
    finally:
        transformers.logging.set_verbosity(verbosity)
    assert first.count("answers, seed 0, ") == 8 and capsys.readouterr().out.count("answers, seed 0, ") == 1
    for table in json.loads(output.with_suffix(".json").read_text(encoding="utf-8")):
        rows = {row["what"]: row for row in table["rows"]}
        assert rows["dense"]["cost"] == 1 and rows["the first half of the layers, trained"]["cost"] == 0.5
        for what in ("calibrated to 0.6, then trained", "top-k at 0.6, trained"):
            assert rows[what]["cost"] == pytest.approx(0.6, abs=0.04)
        assert sum(not row["losses"] for row in table["rows"]) == 1  # of the better dense model
        assert table["commands"][0].startswith("python benchmarks/spans.py --data DATA --model FOLDER --budgets 0.6")
    assert "| top-k at 0.6, trained | 0.6" in output.with_suffix(".md").read_text(encoding="utf-8")


def test_answers_are_found_where_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = benchmark("span_tasks", monkeypatch)
    write_spans(tmp_path / "data")
    monkeypatch.setattr(tasks, "RERANK_TRAINING_ARTICLES", 2)
    tokenizer = transformers.AutoTokenizer.from_pretrained(write_checkpoint(tmp_path / "model"))
    task = tasks.read_answers(tmp_path / "data", tokenizer)
    logits = [torch.zeros(len(row["input_ids"]), 2) for row in task.rows]
    for each, row in zip(logits, task.rows, strict=True):
        each[row["start_positions"], 0] = each[row["end_positions"], 1] = 9
    groups = task.groups
    assert [task.score(task.outcome(logits), items) for items in groups.values()] == [100, 100, 100]
    assert len(groups["SQuAD 2.0 F1"]) == 2 * len(groups["all"]) == 40
    nothing = task.outcome([torch.zeros_like(each) for each in logits])  # a tie is no answer
    assert task.score(nothing, groups["SQuAD 2.0 F1"]) == task.score(nothing, groups["exact match"]) == 50
    rows, questions = task.cut(20)
    assert {len(row["input_ids"]) for row in rows} == {20} and len(questions[0].offsets) == 20 - questions[0].first - 1


def test_stages_are_held_against_the_best_products_of_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    stages = benchmark("stages", monkeypatch)

    def kinds(*flags: str) -> dict[str, str]:
        monkeypatch.setattr(stages, "cpu_flags", lambda: frozenset(flags))
        found: dict[str, str] = stages.kinds()
        return found

    assert kinds("avx2", "avx_vnni") == {"int8": "AVX_VNNI", "float32": "AVX2"}
    assert kinds("avx2", "avx512f", "avx512_vnni", "avx512_bf16") == {
        "bfloat16": "AVX512_BF16",
        "int8": "AVX512_VNNI",
        "float32": "AVX512",
    }
    rows = [{"name": name, "share": 0.5, "gops": 118.0} for name in ("attend", "up")]
    case = {"name": "one", "dtype": "int8", "milliseconds": 1.0, "stages": rows}
    peaks = {"bfloat16": 236.0, "int8": 472.0, "float32": 118.0, "reading": 30.0}
    text = stages.markdown({"cpu": "a processor", "kinds": kinds("avx2"), "peaks": peaks, "cases": [case]})
    assert "| attention | 50.0% | 118 | 50% " in text  # which int8 engines do in bfloat16
    assert "| feed-forward up, GELU | 50.0% | 118 | 25% " in text
