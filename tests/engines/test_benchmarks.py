"""python -m benchmarks at tiny sizes, and the pages that it writes."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT, environment

from benchmarks.__main__ import main
from common.errors import UserError


def test_the_page(tmp_path):
    page, place = tmp_path / "speed.md", "<!-- python -m benchmarks -->\n"
    page.write_text(f"before\n{place}old\n<!-- end -->\nafter <!-- end -->\n")
    done = subprocess.run([sys.executable, "-m", "benchmarks", "--threads", "1", "--small", "--rounds", "3", "--tasks",
                           "characters", "-o", page], cwd=ROOT, text=True, capture_output=True, check=False,
                          env=environment())
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    assert text == f"before\n{place}\n{done.stdout}\n<!-- end -->\nafter <!-- end -->\n"
    for told in (r"torch \d", r"1 thread;", r"\d{4}-\d\d-\d\d, commit \w+", r"Medians of 3 turns"):
        assert re.search(told, text), told
    rows = [line for line in text.splitlines() if line.startswith(("| RNN", "| expRNN", "| nnRNN"))]
    assert len(rows) == 4
    time = r"[\d.]+ \([\d.]+–[\d.]+\), CPU [\d.]+ \([\d.]+–[\d.]+\)"
    assert all(re.fullmatch(rf"\| \S+ \| {time} \| {time} \| [\d.]+× \| {time} \| [\d.]+× \|", row) for row in rows)


def test_what_a_row_costs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    main(["--rows", "expRNN none", "--tasks", "copying", "--threads", "1"])
    *_, row = capsys.readouterr().out.splitlines()
    numbers = r"10,697 \| 0\.\d+ GB \| [\d.e-]+ s \| 1500 \| [\d.:]+ [\w:]+"
    assert re.fullmatch(rf"\| copytask \| expRNN \| {numbers} \|", row), row


@pytest.mark.parametrize(("content", "told"), [
    (b"another page\n", "has no place for the tables"), (b"\xff\xfe", "cannot be used"), (None, "cannot be used")])
def test_another_page_is_one_sentence_and_stays(tmp_path, content, told):
    page = tmp_path / "speed.md"
    if content is not None:
        page.write_bytes(content)
    with pytest.raises(UserError, match=told):
        main(["-o", str(page)])
    assert content is None or page.read_bytes() == content
