"""What README, the pages of docs/ and CONTRIBUTING show is what works."""

import re
import shlex
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import token_pruning as tp
from tests.pages import PAGES, ROOT, blocks
from tests.workspace import WORDS, write_checkpoint
from token_pruning import families
from token_pruning.families import supported_model_types
from token_pruning.lab.cli import main, paper_main

SHOWN = (*PAGES, "CONTRIBUTING.md")
EXTENDING = ("docs/add-a-method.md", "docs/add-a-family.md")  # run by test_extension.py
RECIPES = ("docs/ecosystem.md",)  # run by integrations/test_recipes.py


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning")  # the Trainer's default, without a GPU
@pytest.mark.parametrize("page", [page for page in SHOWN if page not in EXTENDING + RECIPES and blocks(page, "python")])
def test_python_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_checkpoint(Path("my-model"), initializer_range=0.3)
    write_checkpoint(Path("all-MiniLM-L6-v2"), head="encoder")
    write_checkpoint(Path("cross-encoder/ms-marco-MiniLM-L6-v2"), labels=1)
    texts = [" ".join(WORDS[(start + step) % len(WORDS)] for step in range(3 + start % 19)) for start in range(72)]
    tokenizer = AutoTokenizer.from_pretrained("my-model")
    examples = [dict(tokenizer(text)) for text in texts]
    batch = tokenizer(texts[:2], padding=True, return_tensors="pt")
    names: dict[str, Any] = {
        "__name__": page,
        "tp": tp,
        "model": AutoModelForSequenceClassification.from_pretrained("my-model"),
        "tokenizer": tokenizer,
        "texts": texts,
        "pairs": [(query, passage) for query in texts[:12] for passage in texts[12:18]],
        "query": texts[0],
        "passages": texts[1:],
        "batch": {**batch, "labels": torch.tensor([0, 1])},
        "examples": examples,
        "labelled": [example | {"labels": number % 2} for number, example in enumerate(examples)],
    }
    for code in blocks(page, "python"):
        exec(compile(code, page, "exec"), names)


def commands(page: str) -> list[list[str]]:
    """The words of every command line of a page."""
    text = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
    found = []
    for line in re.split(r"\n|&&", text):
        words = shlex.split(line, comments=True)
        if words:
            found.append(words)
    return found


@pytest.mark.parametrize("page", [page for page in SHOWN if blocks(page, "bash")])
def test_command_lines_are_understood(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def parse(argv: list[str]) -> int:
        module._parser().parse_args([module._dashed(word) for word in argv])
        return 0

    module: Any = import_module("token_pruning.lab.cli.main")  # the package's own "main" is the function
    monkeypatch.setattr(module, "_carry_out", parse)
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for program, *rest in commands(page):
        if program == "token-pruning":
            assert main(rest) == 0
        elif program == "python":
            assert (ROOT / rest[0]).exists(), rest
            if rest[0] == "run.py":
                assert paper_main(rest[1:]) == 0
        elif program == "make":
            assert set(rest) <= targets, rest
        elif program == "pip":
            asked = [extra for word in rest for extra in re.findall(r"\[(.*)\]", word)]
            assert {name for extra in asked for name in extra.split(",")} <= set(extras), rest
        else:
            assert program in ("git", "cd", "pre-commit"), program


def test_files_that_pages_name_are_there() -> None:
    for page in SHOWN:
        text = (ROOT / page).read_text(encoding="utf-8")
        named = re.findall(r"`((?:tests|benchmarks|examples|results|docs|src)/[\w./-]+)`", text)
        named += [] if page.startswith("docs/") else re.findall(r"\]\((?!https?:)([^)#]+)", text)
        for path in named:
            if "yours" not in path:
                assert (ROOT / path).exists(), f"{page}: {path}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 140


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert sorted(re.findall(r"[\w-]+\.md", text)) == sorted(Path(page).name for page in PAGES if page != "README.md")
    assert yaml.safe_load(text)["strict"] is True


def test_the_page_of_models_names_every_family() -> None:
    rows = re.findall(
        r"^\|[^|]*\|([^|]*`[^|]*)\| (yes|no) \|", (ROOT / "docs/models.md").read_text(encoding="utf-8"), re.M
    )
    native = {name: answer == "yes" for names, answer in rows for name in re.findall(r"`([\w-]+)`", names)}
    assert native == {name: families.base._FAMILIES[name].native for name in supported_model_types()}


def test_every_public_name_is_on_the_page_of_the_api() -> None:
    shown = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs/api.md").read_text(encoding="utf-8"), re.M)
    assert {f"token_pruning.{name}" for name in tp.__all__} <= set(shown)


def test_every_version_is_the_same() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert project["version"] == citation["version"] == tp.__version__
    assert f"## {tp.__version__} " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "command", ["train", "eval", "export", "predict", "report", "analyze", "calibrate", "sweep", "demo"]
)
def test_every_option_is_explained(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for option in set(re.findall(r"--[a-z][a-z0-9-]+", text.split("\n\n")[0])):
        assert re.search(rf"^  .*{option}\b.*(\n +\S.*|  \S.*)", text, re.M), option
