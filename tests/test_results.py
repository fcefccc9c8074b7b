"""What the README and results/ say is what the records in results/runs say."""

from pathlib import Path

import pytest

from common.table import RUNS, SEEDS, find_runs, rows_of, table

ROOT = Path(__file__).resolve().parent.parent
ONE_EPOCH = ["--epochs", "1"]


def text(task, extra=(), short=False):
    """The table that `python -m common.table` prints from the committed records."""
    rows = rows_of(task, list(extra))
    find_runs(rows, SEEDS, ROOT / RUNS)
    return table(task, rows, short)


def test_the_copying_table():
    assert (ROOT / "results" / "copytask.md").read_text(encoding="utf-8") == text("copytask")


@pytest.mark.parametrize(("task", "extra"), [("copytask", ()), ("sMNIST", ONE_EPOCH), ("language", ONE_EPOCH)])
def test_the_readme_shows_the_records(task, extra):
    shown = text(task, extra, short=True)
    assert len(shown.splitlines()) > 2, "no record was found"
    assert shown in (ROOT / "README.md").read_text(encoding="utf-8")


def test_records_name_no_machine():
    for config in (ROOT / RUNS).glob("*/*/config.json"):
        assert '"/' not in config.read_text(encoding="utf-8"), config
