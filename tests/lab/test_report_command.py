"""``token-pruning report``: figures against plain loops, every kind of folder, mistakes, and the page in a browser."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import token_pruning as tp
from tests.lab.test_report import Page
from tests.workspace import WORDS, edit_config, write_checkpoint, write_sst2, write_stsb
from token_pruning.lab.cli import main
from token_pruning.lab.data import TextExamples
from token_pruning.lab.report import run, timing
from token_pruning.lab.report.agreement import agreement

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

THRESHOLDS = {"prune_mode": "absolute_threshold", "thresholds": [0.6, 0.8, 0.9, 0.9], "scoring_mode": "relative"}
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
LINE = "--examples 24 --samples 3 --bs 8 --threads 1 --dtype float32 --output out.html"


def text_of(start: int, words: int) -> str:
    return " ".join(WORDS[(start + step * step) % len(WORDS)] for step in range(words))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(timing, "PASSES", 1)  # nothing is timed here
    monkeypatch.setattr(timing, "FEWEST_PASSES", 1)
    texts = [text_of(number, 3 + number % 19) for number in range(40)]
    Path("texts.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    pairs = [f"{text_of(query, 3)}\t{texts[query * 3 + passage]}" for query in range(6) for passage in range(5)]
    Path("pairs.tsv").write_text("\n".join(["query\tpassage", *pairs]) + "\n", encoding="utf-8")
    return tmp_path


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What the page is made of."""
    found: dict[str, Any] = {}
    before = run.write_report
    monkeypatch.setattr(run, "write_report", lambda given, path: found.update(given) or before(given, path))
    yield found


def by_name(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {stage["name"]: stage for stage in results["stages"]}


def test_a_classifier_on_texts_without_labels(folder: Path, results: dict[str, Any]) -> None:
    """Each figure again, text by text."""
    write_checkpoint(folder / "CKPT", labels=3, initializer_range=0.5, **THRESHOLDS)
    assert main(["report", "CKPT", "--texts", "texts.txt", *LINE.split()]) == 0
    texts = TextExamples(Path("texts.txt").read_text().splitlines(), None, None).sample(24, 1).first
    tokenizer = hf.AutoTokenizer.from_pretrained("CKPT")
    dense = hf.AutoModelForSequenceClassification.from_pretrained("CKPT").eval()
    pruned = tp.from_pretrained("CKPT")
    same, flops, full, kept = [], 0.0, 0.0, []
    for text in texts:
        batch = tokenizer(text, return_tensors="pt")
        with torch.no_grad(), tp.record(pruned) as trace:
            same.append(bool(dense(**batch).logits.argmax() == pruned(**batch).logits.argmax()))
        cost = tp.count_flops(pruned, trace)
        flops, full = flops + cost.pruned, full + cost.dense
        survived = trace.survived_layers[0]
        kept.append([1.0, *(float((survived >= layer).double().mean()) for layer in range(1, 5))])
    stages = by_name(results)
    assert stages["pruned"]["metrics"] == {"same class": pytest.approx(sum(same) / 24)}
    assert stages["pruned"]["relative_flops"] == pytest.approx(flops / full)
    assert stages["pruned"]["gflops_per_example"]["computed"] == pytest.approx(flops / 24 / 1e9)
    assert stages["dense"]["metrics"] == {"same class": 1.0}
    assert stages["dense"]["relative_flops"] == 1
    [first] = [stage for name, stage in stages.items() if name.startswith("first ")]
    assert first["relative_flops"] == pytest.approx(stages["pruned"]["relative_flops"], abs=0.05)
    assert all(stage["times"]["ms alone"] > 0 and stage["times"]["ms in batches"] > 0 for stage in stages.values())
    groups = results["by_length"]
    assert sum(group["texts"] for group in groups) == 24
    means = [sum(group["texts"] * group["kept"][layer] for group in groups) / 24 for layer in range(5)]
    assert means == pytest.approx([sum(own[layer] for own in kept) / 24 for layer in range(5)])
    cut = int(re.findall(r"\d+", first["name"])[0])
    agree = [
        bool(
            dense(**tokenizer(text, return_tensors="pt")).logits.argmax()
            == dense(**tokenizer(text, return_tensors="pt", truncation=True, max_length=cut)).logits.argmax()
        )
        for text in texts
    ]
    assert first["metrics"]["same class"] == pytest.approx(sum(agree) / 24)
    assert len(results["samples"]) == 3
    assert results["environment"]["threads"] == 1


@pytest.mark.parametrize("budget", [0.75, 1.0])
def test_a_budget_of_several(folder: Path, results: dict[str, Any], budget: float) -> None:
    table = [
        {"relative_flops": 0.5, "thresholds": THRESHOLDS["thresholds"]},
        {"relative_flops": 0.9, "thresholds": [0.0] * 4},
    ]
    write_checkpoint(folder / "CKPT", initializer_range=0.5, **THRESHOLDS, budgets=table)
    assert main(["report", "CKPT", "--texts", "texts.txt", *LINE.split(), "--budget", str(budget)]) == 0
    texts = TextExamples(Path("texts.txt").read_text().splitlines(), None, None).sample(24, 1).first
    tokenizer, model = hf.AutoTokenizer.from_pretrained("CKPT"), tp.from_pretrained("CKPT")
    tp.set_budget(model, budget)
    with torch.no_grad(), tp.record(model) as trace:
        for text in texts:
            model(**tokenizer(text, return_tensors="pt"))
    cost = tp.count_flops(model, trace)
    assert by_name(results)["pruned"]["relative_flops"] == pytest.approx(cost.pruned / cost.dense)


def test_a_labelled_task(folder: Path, results: dict[str, Any]) -> None:
    write_sst2(folder / "glue", dev=24)
    write_stsb(folder / "glue")
    write_checkpoint(folder / "CKPT", initializer_range=0.5, **THRESHOLDS)
    write_checkpoint(folder / "REG", labels=1, **THRESHOLDS)
    assert main(["report", "CKPT", "--task", "SST2", "--data-dir", "glue", *LINE.split()]) == 0
    for masking, name in (("none", "dense"), ("hard", "pruned")):
        line = f"--task SST2 --data-dir glue --bs 4 --restore CKPT --masking-mode {masking} --output-dir {name}"
        assert main(["eval", *line.split()]) == 0
        metrics = by_name(results)[name]["metrics"]
        found = re.findall(r'"accuracy": ([\d.]+)', Path(name, "eval_results.json").read_text())
        assert metrics["accuracy"] == pytest.approx(float(found[0]))
        assert list(metrics) == ["accuracy", "same class"]
    assert results["metric"] == "accuracy"
    assert results["samples"][0]["label"] in ("negative", "positive")
    assert main(["report", "REG", "--task", "STSB", "--data-dir", "glue", *LINE.split()]) == 0
    assert list(by_name(results)["pruned"]["metrics"])[-1] == "correlation"
    assert isinstance(results["samples"][0]["prediction"], float)


@pytest.mark.parametrize(
    ("head", "keys", "name"),
    [
        (hf.AutoModelForTokenClassification, {}, "same label"),
        (hf.AutoModelForQuestionAnswering, {}, "same answer"),
        (hf.AutoModelForSequenceClassification, {"problem_type": "multi_label_classification"}, "same labels"),
        (hf.AutoModel, {}, "cosine"),
        (hf.AutoModel, {"reads": "mean"}, "shared neighbours"),
        (hf.AutoModel, {"reads": "first"}, "shared neighbours"),
        (hf.AutoModel, {"reads": "mean", "max_tokens": 16}, "shared neighbours"),
    ],
)
def test_other_heads(folder: Path, results: dict[str, Any], head: Any, keys: dict[str, Any], name: str) -> None:
    write_checkpoint(folder / "CKPT", labels=2 if name == "same answer" else 3, **THRESHOLDS)
    head.from_pretrained("CKPT").save_pretrained("CKPT")
    edit_config(folder / "CKPT", **keys)
    assert main(["report", "CKPT", "--texts", "texts.txt", *LINE.split()]) == 0
    dense, *_, pruned = results["stages"]
    assert next(iter(pruned["metrics"])) == name
    assert all(value == pytest.approx(1) for value in dense["metrics"].values())
    assert 0 <= pruned["metrics"][name] < 1 or name in ("same answer", "same labels")
    assert pruned["relative_flops"] < 1
    if "max_tokens" in keys:
        assert "they need not agree" in results["note"]
        whole = tp.from_pretrained("CKPT")
        assert whole.token_pruner.pruner.max_tokens == 16
        assert any(token["decided_by"] == "max_tokens" for token in results["samples"][-1]["tokens"])


@pytest.mark.parametrize("kind", ["embedder", "reranker", "classifier"])
def test_folders_of_sentence_transformers(folder: Path, results: dict[str, Any], kind: str) -> None:
    library = pytest.importorskip("sentence_transformers")
    write_checkpoint(
        folder / "BERT", head="encoder" if kind == "embedder" else "sequence", labels=3 if kind == "classifier" else 1
    )
    model = (library.SentenceTransformer if kind == "embedder" else library.CrossEncoder)("BERT", device="cpu")
    tp.prune(model, tp.FixedThreshold(thresholds=[0.6, 0.8, 0.9, 0.9], scoring_mode="relative"))
    model.save_pretrained("FOLDER")
    source = "texts.txt" if kind == "embedder" else "pairs.tsv"
    assert main(["report", "FOLDER", "--texts", source, *LINE.split()]) == 0
    names = {
        "embedder": ["shared neighbours", "cosine"],
        "reranker": ["same order", "same best"],
        "classifier": ["same class"],
    }
    dense, *_, pruned = results["stages"]
    assert list(pruned["metrics"]) == names[kind]
    assert all(value == pytest.approx(1) for value in dense["metrics"].values())
    assert pruned["metrics"][names[kind][0]] < 1 or kind == "classifier"
    if kind == "embedder":
        texts = TextExamples(Path("texts.txt").read_text().splitlines(), None, None).sample(24, 1).first
        fresh, whole = library.SentenceTransformer("FOLDER", device="cpu"), tp.from_pretrained("FOLDER")
        one, two = (each.encode(texts, convert_to_tensor=True) for each in (fresh, whole))
        cosine = torch.nn.functional.cosine_similarity(one, two, dim=1).mean()
        assert pruned["metrics"]["cosine"] == pytest.approx(float(cosine), abs=1e-5)


# Agreement.


def test_the_same_order_against_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    dense, other = (torch.randn(12, 1, generator=generator) for _ in range(2))
    groups = [0, 1, 2] * 4
    shares, best = [], []
    for group in range(3):
        own = [i for i in range(12) if groups[i] == group]
        pairs = [(i, j) for i in own for j in own if i < j]
        shares.append(sum((dense[i] > dense[j]) == (other[i] > other[j]) for i, j in pairs) / len(pairs))
        best.append(max(own, key=lambda i: dense[i]) == max(own, key=lambda i: other[i]))
    found = agreement("ranking", list(dense), list(other), groups)
    assert found == {"same order": pytest.approx(float(sum(shares) / 3)), "same best": pytest.approx(sum(best) / 3)}
    assert agreement("ranking", list(dense), list(3 * dense - 5), groups) == {"same order": 1, "same best": 1}


def test_shared_neighbours_against_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(15, 4, generator=generator)
    other = dense + 0.5 * torch.randn(15, 4, generator=generator)

    def nearest(vectors: torch.Tensor, i: int) -> set[int]:
        cosine = torch.nn.functional.cosine_similarity(vectors, vectors[i : i + 1], dim=1)
        return set(sorted((j for j in range(15) if j != i), key=lambda j: -float(cosine[j]))[:10])

    expected = sum(len(nearest(dense, i) & nearest(other, i)) / 10 for i in range(15)) / 15
    found = agreement("embedding", list(dense), list(other), range(15))
    assert found["shared neighbours"] == pytest.approx(expected)
    assert agreement("embedding", list(dense), list(2 * dense), range(15))["shared neighbours"] == 1


def test_tokens_that_were_cut_off_count_as_different() -> None:
    dense = [torch.tensor([1, 2, 3, 4, 0]), torch.tensor([1, 0])]
    cut = [torch.tensor([1, 9, 0]), torch.tensor([1, 0])]
    assert agreement("tokens", dense, cut, [0, 1]) == {"same label": pytest.approx((1 / 4 + 1) / 2)}
    states = [torch.eye(5), torch.eye(2)]
    assert agreement("states", states, [states[0][:3], states[1]], [0, 1]) == {"cosine": pytest.approx((2 / 4 + 1) / 2)}


# What is refused, and what is written.


def test_mistakes_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(folder / "CKPT", **THRESHOLDS)
    write_checkpoint(folder / "DENSE")
    write_checkpoint(folder / "ENC", head="encoder", **THRESHOLDS)
    hf.AutoModelForMultipleChoice.from_config(hf.AutoConfig.from_pretrained("DENSE")).save_pretrained("CKPT/choice")
    shutil.copy("CKPT/tokenizer.json", "CKPT/choice"), shutil.copy("CKPT/tokenizer_config.json", "CKPT/choice")
    edit_config(folder / "CKPT/choice", **THRESHOLDS)
    Path("one.txt").write_text("good\n")
    for line, words in (
        ("CKPT", ["give one of --task", "--texts"]),
        ("--texts texts.txt", ["FOLDER is missing"]),
        ("CKPT --texts texts.txt --task SST2", ["give one of"]),
        ("CKPT --texts missing.txt", ["missing.txt"]),
        ("NOWHERE --texts texts.txt", ["NOWHERE", "not a folder"]),
        ("DENSE --texts texts.txt", ["DENSE/config.json", "prune_mode is missing"]),
        ("CKPT --texts one.txt", ["1 text is given", "at least 2"]),
        ("CKPT --texts texts.txt --max-length 500", ["--max-length is 500", "3 to 130"]),
        ("CKPT --texts texts.txt --budget 0.5", ["not pruned for several budgets"]),
        ("CKPT --texts texts.txt --budget 2", ["--budget is 2.0"]),
        ("CKPT --texts texts.txt --dtype float16", ["--dtype", "float16", "bfloat16"]),
        ("CKPT --texts texts.txt --examples 1", ["--examples", ">= 2"]),
        ("CKPT --texts texts.txt --output CKPT", ["--output CKPT", "it is a folder"]),
        ("CKPT/choice --texts texts.txt", ["BertForMultipleChoice", "chooses between texts"]),
    ):
        capsys.readouterr()
        try:
            status = main(["report", *line.split()])
        except SystemExit as stopped:
            status = int(stopped.code or 0)
        error = capsys.readouterr().err.strip()
        assert status == 2, line
        assert len(error.splitlines()) == 1, error
        assert all(word in error for word in words), error
    assert not Path("CKPT/report.html").exists()


def test_the_page_stands_in_the_folder_and_says_how_it_was_made(folder: Path) -> None:
    write_checkpoint(folder / "CKPT", **THRESHOLDS)
    assert main(["report", "--restore", "CKPT", "--texts", "texts.txt", "--examples", "20", "--dtype", "float32"]) == 0
    text = Path("CKPT/report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "token-pruning report --restore CKPT --texts texts.txt" in text
    assert 'name="viewport" content="width=device-width, initial-scale=1"' in text
    assert not {tag for tag, _ in page.elements} & {"script", "link", "img", "iframe"}
    assert "http:" not in text and "https:" not in text and "@import" not in text
    drawings = [attributes for tag, attributes in page.elements if tag == "svg"]
    assert len(drawings) == 3
    assert all(drawing["role"] == "img" and drawing["aria-label"] for drawing in drawings)
    assert text.count('class="gone"') > 0
    assert [path.name for path in Path("CKPT").glob("*.html")] == ["report.html"]


MEASURE = """<!DOCTYPE html><meta charset="utf-8"><iframe src="{name}" width="375" height="800"></iframe><script>
addEventListener("load", () => {{
  const page = document.querySelector("iframe").contentDocument;
  for (const each of page.querySelectorAll("details")) each.open = true;
  const wide = [...page.querySelectorAll("body *")].filter(
    each => !each.closest(".scroll") && each.getBoundingClientRect().right > 375.5
  );
  document.title = "width " + page.documentElement.scrollWidth + " " + wide.map(each => each.className).join();
}});
</script>"""


@pytest.mark.skipif(CHROMIUM is None or sys.platform != "linux", reason="no Chromium")
def test_a_phone_shows_it_without_scrolling_sideways(folder: Path) -> None:
    """With everything unfolded, of a long word too; and the console has nothing to say."""
    assert CHROMIUM is not None
    write_checkpoint(folder / "CKPT", **THRESHOLDS)
    with Path("texts.txt").open("a") as file:
        file.write("x" * 300 + "\n" + "good " * 120 + "\n")
    assert (
        main(["report", "CKPT", "--texts", "texts.txt", "--examples", "50", "--samples", "50", *LINE.split()[4:]]) == 0
    )
    model = tp.from_pretrained("CKPT")
    tokenizer = hf.AutoTokenizer.from_pretrained("CKPT")
    Path("explained.html").write_text(tp.explain(model, "good " * 100, tokenizer).html, encoding="utf-8")
    for name in ("out.html", "explained.html"):
        Path("measure.html").write_text(MEASURE.format(name=name), encoding="utf-8")
        flags = (
            "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
            "--disable-dev-shm-usage --allow-file-access-from-files --hide-scrollbars --enable-logging=stderr "
            "--virtual-time-budget=5000 --dump-dom"
        )
        done = subprocess.run(
            [CHROMIUM, *flags.split(), f"--user-data-dir={folder / 'profile'}", f"file://{folder}/measure.html"],
            capture_output=True, text=True, timeout=240, check=True,
        )  # fmt: skip
        assert "<title>width 375 </title>" in done.stdout, done.stdout[-500:]
        assert "CONSOLE" not in done.stderr
