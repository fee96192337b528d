"""A few of the cases of :mod:`tests.fuzz.data_files`, always the same ones."""

from pathlib import Path

from tests.fuzz.data_files import Rows, Tally, differences, fuzz, one_line


def test_every_file_is_read_right_or_refused_with_one_line() -> None:
    tally = fuzz(range(400))
    assert not tally.failures, tally.failures[0]
    assert tally.cases == 400
    assert tally.read > 100 < tally.refused.total()


def test_the_fuzzer_sees_what_is_wrong(tmp_path: Path) -> None:
    table = Rows(("text",), "label", ["text", "label"], [{"text": "x", "label": 0}, {"text": "y", "label": 1}])
    path = tmp_path / "a.csv"
    path.write_text("text,label\nx,0\ny,1\n")
    assert differences(table, path) is None
    path.write_text("text,label\nx,0\nz,1\n")
    assert "texts are [['x', 'z']]" in str(differences(table, path))
    path.write_text("text,label\nx,1\ny,0\n")
    assert "labels are ['1', '0']" in str(differences(table, path))
    assert "ZeroDivisionError" in str(one_line(lambda: 1 / 0, Tally()))
