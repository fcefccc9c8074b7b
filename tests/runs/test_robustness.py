"""A small part of `python -m tests.robustness`: the whole is run by hand and its page committed."""

import os

import pytest

pytest.importorskip("fcntl")
if not hasattr(os, "pidfd_open"):
    pytest.skip("the campaign needs Linux", allow_module_level=True)

from tests.robustness import kills, troubles
from tests.robustness.__main__ import PAGE
from tests.robustness.sessions import TASKS, Session, Workplace, run_folder, uninterrupted


@pytest.fixture(scope="module")
def workplace():
    with Workplace() as made:
        yield made


@pytest.mark.parametrize("task", TASKS)
def test_killed_at_random(workplace, task):
    campaign = kills.random_kills(workplace, task, wanted=3, seed=1, seconds=20)
    assert campaign.wrong == []
    assert campaign.kills >= 3
    assert campaign.same == campaign.runs >= 1


@pytest.mark.parametrize(("task", "resumed"), [("copytask", False), ("sMNIST", True), ("language", True)])
def test_killed_in_the_middle_of_a_write(workplace, task, resumed):
    campaign = kills.aimed_kills(workplace, task, resumed, every=23)
    assert campaign.wrong == []
    assert campaign.same == campaign.runs == campaign.kills >= 2


def test_every_kind_of_write_has_its_moments(workplace):
    place = workplace.new_folder()
    names = set(kills.moments_of(workplace, "language", place, workplace.arguments("language")))
    for file in ("config.json", "last.pt", "best.pt", "curves.png", "result.json"):
        for moment in ("open, before", "half written", "written", "flush to the disk, before", "rename, before",
                       "rename, after"):
            assert f"{file}: {moment}" in names
    assert {"log.csv: half written", "log.csv: flush to the disk, after", "curves.png: draw, before",
            "curves.png: draw, after"} <= names


@pytest.mark.parametrize("trouble", [troubles.closed_output, troubles.another_device, troubles.another_version])
def test_trouble(workplace, trouble):
    found = trouble(workplace)
    assert found.wrong == []
    assert found.well == found.tried == 3


def test_a_full_disk(workplace):
    found = troubles.at_every_moment(workplace, "", troubles.full_disk, 73, "No space left on device")
    assert found.wrong == []
    assert found.well == found.tried >= 4


def test_what_a_killed_process_left_is_removed(workplace):
    """Temporary files of processes that are gone do not pile up."""
    expected, _ = uninterrupted(workplace, "copytask")
    place = workplace.new_folder()
    Session(place, "copytask_nvar", workplace.arguments("copytask"), troubles.ask_after(2)).wait()
    folder = run_folder(place)
    for name in (".last.pt.1.tmp", ".best.pt.22.tmp", ".curves.png.333.tmp"):
        (folder / name).write_bytes(b"half")
    assert troubles.finished(workplace, place, "copytask", expected) is None


def test_the_page_is_there():
    text = PAGE.read_text(encoding="utf-8")
    assert "python -m tests.robustness" in text
    assert "Nothing." in text.split("## What went wrong")[1]
