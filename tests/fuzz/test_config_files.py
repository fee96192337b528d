"""Files and command lines that were once a traceback or a wrong number, and some that chance makes."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.fuzz.config_files import Case, Fuzzer, Summary, run

CASES = 150  # about six seconds


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Fuzzer:
    return Fuzzer(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.filterwarnings("ignore")  # what libraries say of broken files
def test_chance_finds_nothing(fuzzer: Fuzzer) -> None:
    summary = run(fuzzer, 0, range(CASES))
    assert not summary.failures, "\n".join(summary.failures)
    assert summary.cases == CASES
    assert min(summary.refused, summary.accepted, summary.compared) >= CASES // 30


def test_a_case_comes_from_its_seed_and_number(fuzzer: Fuzzer) -> None:
    def files(case: Case) -> Iterator[tuple[str, bytes]]:
        yield from ((str(file), file.read_bytes()) for file in sorted(case.folder.rglob("*")) if file.is_file())

    first = [(case.argv, case.changes, list(files(case))) for case in (fuzzer.case(1, number) for number in range(9))]
    again = [(case.argv, case.changes, list(files(case))) for case in (fuzzer.case(1, number) for number in range(9))]
    assert first == again
    assert len({str(found[1:]) for found in first}) > 5


PREDICT = ["predict", "--restore", "CKPT", "--input", "../texts.txt", "--max-length", "16"]
EVAL = ["eval", "--restore", "CKPT", "--validation-file", "../rows.csv", "--max-length", "16", "--output-dir", "out"]
FOUND: list[tuple[str, str, list[Any], Any, list[str]]] = [
    # family, file, way into it, value, command line
    ("bert", "config.json", ["output_attentions"], "roberta", PREDICT),
    ("bert", "config.json", ["output_hidden_states"], "nan", [*PREDICT, "--dense"]),
    ("electra", "config.json", ["chunk_size_feed_forward"], [True], [*PREDICT, "--dense"]),
    ("bert", "config.json", ["chunk_size_feed_forward"], 7, [*PREDICT, "--dense"]),
    ("roberta", "config.json", ["pad_token_id"], None, PREDICT),
    ("modernbert", "config.json", ["head_dim"], 1, EVAL),
    ("bert", "config.json", ["position_embedding_type"], "relative_key", PREDICT),
    ("deberta-v2", "config.json", ["pooler_hidden_act"], "eager", [*PREDICT, "--dense"]),
    ("bert", "config.json", ["id2label"], ["a", "b"], PREDICT),
    ("bert", "config.json", ["id2label"], {"0": 0, "1": 1}, PREDICT),
    ("bert", "config.json", ["architectures"], ["AutoTokenizer"], PREDICT),
    ("bert", "config.json", ["num_hidden_layers"], 10**9, PREDICT),
    ("bert", "config.json", ["dtype"], "int8", PREDICT),
    ("bert", "config.json", ["prune_mode"], ["topk"], PREDICT),
    ("bert", "config.json", ["num_attention_heads"], 0, PREDICT),
    ("bert", "tokenizer.json", ["version"], "2.0", PREDICT),
    ("bert", "tokenizer.json", ["model", "type"], "Nonsense", PREDICT),
    ("bert", "tokenizer.json", ["model", "vocab"], None, PREDICT),
    ("bert", "tokenizer.json", ["model", "vocab"], {}, PREDICT),
    ("bert", "tokenizer.json", ["model", "vocab", "good"], 50, PREDICT),
    ("bert", "config.json", ["chunk_size_feed_forward"], None, [*PREDICT, "--dense"]),
    ("bert", "config.json", ["return_dict"], None, EVAL),
    ("modernbert", "tokenizer.json", ["post_processor", "pair", 0, "SpecialToken", "id"], "float16", PREDICT),
    ("modernbert", "tokenizer.json", ["post_processor", "single", 0, "SpecialToken", "id"], "[CLS", PREDICT),
    ("bert", "tokenizer_config.json", ["pad_token"], None, PREDICT),
    ("modernbert", "tokenizer.json", ["post_processor", "special_tokens", "[SEP]", "ids", 0], 10**6, PREDICT),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "name", "way", "value", "argv"), FOUND)
def test_what_was_found(fuzzer: Fuzzer, family: str, name: str, way: list[Any], value: Any, argv: list[str]) -> None:
    case = fuzzer.unchanged(family, argv)
    file = case.folder / "CKPT" / name
    content = place = json.loads(file.read_text(encoding="utf-8"))
    for key in way[:-1]:
        place = place[key]
    place[way[-1]] = value
    file.write_text(json.dumps(content), encoding="utf-8")
    summary = Summary()
    assert case.run(summary) is None
    assert (summary.refused, summary.accepted) == (1, 0)


def test_unchanged_checkpoints_are_accepted_and_equal_transformers(fuzzer: Fuzzer) -> None:
    summary = Summary()
    for family in fuzzer.bases:
        for more in ([], ["--dense"]):
            assert fuzzer.unchanged(family, [*PREDICT, *more]).run(summary) is None
    assert summary.accepted == summary.cases == 2 * summary.compared
