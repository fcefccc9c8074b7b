"""A small part of `python -m tests.robustness`: the whole is run by hand and its page committed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="the campaign needs Linux")
def test_a_small_campaign(tmp_path):
    """In a process of its own, whose sessions are forks that no thread of pytest disturbs."""
    page = tmp_path / "page.md"
    done = subprocess.run([sys.executable, "-m", "tests.robustness", "--quick", "-o", page], cwd=ROOT, text=True,
                          capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split(" | ") for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| ")][1:]
    assert len(lines) >= 18
    for what, _, runs, well, *_ in lines:
        assert int(well) == int(runs) >= 1, what


def test_the_page_is_of_the_whole_campaign_and_nothing_went_wrong():
    page = (ROOT / "results" / "robustness.md").read_text(encoding="utf-8")
    assert "python -m tests.robustness` in" in page
    assert page.split("## What went wrong")[1].strip() == "Nothing."
    for file in ("config.json", "last.pt", "best.pt", "curves.png", "stair.csv", "result.json"):
        for moment in ("open, before", "half written", "flush to the disk, before", "rename, before", "rename, after"):
            assert f"{file}: {moment} (" in page
    for moment in ("half written", "flush to the disk, before", "rename, before"):   # a resumed log is written anew
        assert f"log.csv: {moment} (" in page
