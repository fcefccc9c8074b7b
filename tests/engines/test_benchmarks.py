"""python -m benchmarks at tiny sizes: the page that it writes, and the part of the peak."""

import re

import pytest
import torch
from conftest import ROOT

from benchmarks import __main__ as benchmarks
from benchmarks import rows
from common.errors import UserError
from common.recurrence import unavailable_reason

REASON = unavailable_reason("native", torch.device("cpu"))


@pytest.fixture
def sizes(monkeypatch):
    """--small changes the sizes for the whole process."""
    monkeypatch.setattr(benchmarks, "SHAPES", dict(benchmarks.SHAPES))
    monkeypatch.setattr(benchmarks, "STEPS_IN_A_TURN", dict(benchmarks.STEPS_IN_A_TURN))


def test_the_page(sizes, tmp_path, capsys):
    page = tmp_path / "speed.md"
    page.write_text("before\n<!-- python -m benchmarks -->\nold\n<!-- end -->\nafter <!-- end -->\n")
    benchmarks.main(["--small", "--quick", "--tasks", "characters", "--threads", "1", "-o", str(page)])
    text = page.read_text()
    printed = capsys.readouterr().out
    assert text == f"before\n<!-- python -m benchmarks -->\n\n{printed}\n<!-- end -->\nafter <!-- end -->\n"
    for told in (r"torch \d", r"1 thread;", r"\d{4}-\d\d-\d\d, commit \w+", r"Medians of 3 turns"):
        assert re.search(told, text), told
    rows = [line for line in text.splitlines() if line.startswith(("| RNN", "| expRNN", "| nnRNN"))]
    assert len(rows) == 4
    time = r"[\d.]+ \([\d.]+–[\d.]+\), CPU [\d.]+ \([\d.]+–[\d.]+\)"
    assert all(re.fullmatch(rf"\| \S+ \| {time} \| {time} \| [\d.]+× \| {time} \| [\d.]+× \|", row) for row in rows)


def test_a_new_page_is_nothing_but_tables(tmp_path):
    assert benchmarks.around_the_tables(tmp_path / "speed.md") == ("", "")


@pytest.mark.parametrize(("content", "told"), [
    (b"another page\n", "has no place for the tables"), (b"<!-- python -m benchmarks -->\n", "has no place"),
    (b"\xff\xfe", "cannot be read as text")])
def test_another_page_is_one_sentence_and_stays(tmp_path, content, told):
    page = tmp_path / "speed.md"
    page.write_bytes(content)
    with pytest.raises(UserError, match=told) as error:
        benchmarks.main(["--small", "-o", str(page)])
    assert len(str(error.value).splitlines()) == 1
    assert page.read_bytes() == content


def test_a_page_that_has_no_folder_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        benchmarks.main(["--small", "-o", str(tmp_path / "missing" / "speed.md")])


@pytest.mark.skipif(REASON is not None, reason=f"no native engine on this machine: {REASON}")
def test_part_of_the_peak(monkeypatch):
    """Half the operations in the same CPU time are half of the peak, whatever the clock says."""
    peak = benchmarks.Peak(torch.device("cpu"))
    monkeypatch.setattr(peak, "ROUNDS", 1000)
    peak.run()
    assert peak.operations > 0
    turns = {"peak": [benchmarks.Turn(9.0, 1.0)] * 3, "both": [benchmarks.Turn(1.0, 2.0)] * 3}
    assert peak.part(peak.operations, "both", turns) == "50 (50–50)"
    assert peak.rate(turns) == f"{peak.operations / 1e9:.0f}"


def test_no_peak_without_the_engine(monkeypatch):
    monkeypatch.setattr(benchmarks, "unavailable_reason", lambda engine, device: "no compiler")
    peak = benchmarks.Peak(torch.device("cpu"))
    assert peak.contender() == {}
    assert (peak.rate({}), peak.part(1.0, "both", {})) == ("—", "—")


def test_what_a_row_costs(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{rows.PLACE}old\n<!-- end -->\nafter\n")
    rows.main(["--tasks", "copytask", "--only", "expRNN none", "-o", str(page)])
    before, *_, head, _, line, empty, end, after = page.read_text().splitlines()
    assert (before, empty, end, after) == ("before", "", "<!-- end -->", "after")
    cells = dict(zip(head.split(" | "), line.split(" | "), strict=True))
    assert cells["row"] == "expRNN"
    assert cells["updates"] == "1500"
    assert cells["parameters"] == "10,697"
    assert float(cells["memory"].removesuffix(" GB")) > 0.01
    assert float(cells["an update"].removesuffix(" s")) > 1e-4
    with pytest.raises(UserError, match="threads"):
        rows.main(["--tasks", "copytask", "--only", "expRNN none", "--threads", "0"])
