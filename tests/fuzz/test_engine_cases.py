"""A short run of what `make fuzz` runs for longer."""

from tests.fuzz import engine_cases, threads


def test_engines_models_and_reference_agree() -> None:
    tally = engine_cases.run(60, seed=0, groups=range(12))
    assert not tally.failures
    assert tally.counts["equal"] > 300 and tally.counts["refused"] > 20


def test_threads_share_an_engine() -> None:
    calls, wrong = threads.run(2, threads=8)
    assert not wrong and calls > 8
