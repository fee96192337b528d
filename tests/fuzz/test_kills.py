"""A few kills at fixed operations on files; ``python -m tests.fuzz.kills`` goes on for as long as asked."""

from pathlib import Path

import pytest

from tests.fuzz.kills import Fuzzer, fork_server, half_written


@pytest.mark.parametrize(("kind", "kills"), [("predict", 4), ("eval", 3), ("mixed", 4)])
def test_a_killed_command_ends_as_if_it_was_left_alone(tmp_path: Path, kind: str, kills: int) -> None:
    with fork_server():
        fuzzer = Fuzzer(tmp_path, seed=1)
        while (tally := fuzzer.tallies[kind]).kills.total() < kills and not tally.failures:
            fuzzer.episode(kind, kills, by_time=False)
    assert not tally.failures, tally.failures[0]
    assert tally.finished


def test_half_written_files_are_found(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-4").mkdir()
    for name, content in (("a.json", "{"), ("b.safetensors", "x"), ("c.jsonl", '{}\n{"'), ("good.json", "{}")):
        (tmp_path / name).write_text(content)
    (tmp_path / "incomplete-d.json").write_text("{")
    found = [line.removeprefix(f"{tmp_path}/").split()[0] for line in half_written(tmp_path)]
    assert sorted(found) == ["a.json", "b.safetensors", "c.jsonl", "checkpoint-4"]
