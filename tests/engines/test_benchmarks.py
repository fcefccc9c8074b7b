"""python -m benchmarks at tiny sizes: the page that it writes, and the part of the peak."""

import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, environment

from benchmarks.__main__ import Peak, Turn
from common.recurrence import unavailable_reason

REASON = unavailable_reason("native", torch.device("cpu"))
PLACE = "<!-- python -m benchmarks -->\n"


def benchmark(*typed):
    return subprocess.run([sys.executable, "-m", "benchmarks", "--threads", "1", *map(str, typed)], cwd=ROOT, text=True,
                          capture_output=True, check=False, env=environment())


def test_the_page(tmp_path):
    page = tmp_path / "speed.md"
    page.write_text(f"before\n{PLACE}old\n<!-- end -->\nafter <!-- end -->\n")
    done = benchmark("--small", "--quick", "--tasks", "characters", "-o", page)
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    assert text == f"before\n{PLACE}\n{done.stdout}\n<!-- end -->\nafter <!-- end -->\n"
    for told in (r"torch \d", r"1 thread;", r"\d{4}-\d\d-\d\d, commit \w+", r"Medians of 3 turns"):
        assert re.search(told, text), told
    rows = [line for line in text.splitlines() if line.startswith(("| RNN", "| expRNN", "| nnRNN"))]
    assert len(rows) == 4
    time = r"[\d.]+ \([\d.]+–[\d.]+\), CPU [\d.]+ \([\d.]+–[\d.]+\)"
    assert all(re.fullmatch(rf"\| \S+ \| {time} \| {time} \| [\d.]+× \| {time} \| [\d.]+× \|", row) for row in rows)
    assert "An expRNN step of" in text


def test_what_a_row_costs(tmp_path):
    """On a new page, which is nothing but the table."""
    done = benchmark("--rows", "expRNN none", "--tasks", "copying", "-o", tmp_path / "page.md")
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "page.md").read_text().splitlines()
    assert lines == done.stdout.splitlines()
    names = [cell.strip() for cell in lines[2].strip("|").split("|")]
    rows = [dict(zip(names, (cell.strip() for cell in line.strip("|").split("|")), strict=True)) for line in lines[4:]]
    row, = rows
    assert (row["row"], row["updates"], row["parameters"]) == ("expRNN", "1500", "10,697")
    assert float(row["memory"].removesuffix(" GB")) > 0.01
    assert float(row["an update"].removesuffix(" s")) > 1e-4


@pytest.mark.parametrize(("content", "told"), [
    (b"another page\n", "has no place for the tables"), (PLACE.encode(), "has no place"),
    (b"\xff\xfe", "cannot be used"), (None, "there is no folder")])
def test_another_page_is_one_sentence_and_stays(tmp_path, content, told):
    page = tmp_path / "folder" / "speed.md"
    if content is not None:
        page.parent.mkdir()
        page.write_bytes(content)
    done = benchmark("--small", "--quick", "--tasks", "characters", "-o", page)
    assert done.returncode
    line, = [line for line in done.stderr.splitlines() if not line.startswith("stair:")]
    assert told in line
    assert content is None or page.read_bytes() == content


@pytest.mark.skipif(REASON is not None, reason=f"no native engine on this machine: {REASON}")
def test_part_of_the_peak():
    """Half the operations in the same CPU time are half of the peak, whatever the clock says."""
    peak = Peak(torch.device("cpu"))
    peak.run()
    assert peak.operations > 0
    turns = {"peak": [Turn(9.0, 1.0)] * 3, "both": [Turn(1.0, 2.0)] * 3}
    assert peak.part(peak.operations, "both", turns) == "50 (50–50)"
    assert peak.rate(turns) == f"{peak.operations / 1e9:.0f}"
    assert Peak(torch.device("cuda")).part(1.0, "both", {}) == "—"
