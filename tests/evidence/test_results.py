"""What the README and results/ say is what the records in results/runs say."""

import re
import shlex

import pytest
from conftest import ROOT, SCRIPTS, module_of

from common.errors import UserError
from common.runs.provenance import foreign_code
from common.runs.records import log_rows, read_config, read_result
from evidence import pages, pictures
from evidence.rows import RUNS, SEEDS, Row, find_runs
from evidence.table import TASK_TITLES, Measure

PAGES = pages.pages(ROOT)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_shows_the_records(page, monkeypatch):
    """Otherwise: python -m evidence --update."""
    monkeypatch.chdir(ROOT)
    text = page.read_text(encoding="utf-8")
    assert pages.fill(text) == text
    assert text.count("<!-- python -m evidence ") == len(pages.TABLE.findall(text)), "a table without an end"


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_a_script_says_it_reached(script, monkeypatch):
    """The docstring's two commands: recall over the seeds, or the test of seed 400, or its validation after epoch 1.

    "not run" where there is no record.
    """
    monkeypatch.chdir(ROOT)
    told = re.findall(rf"^    python {script}\.py(.*?)  .*: (.+)$", module_of(script).__doc__, flags=re.MULTILINE)
    assert len(told) == 2
    for typed, number in told:
        row = Row(script, "", "", shlex.split(typed))
        find_runs([row], SEEDS, RUNS)
        if not row.runs:
            found = "not run"
        elif script.startswith("copytask"):
            recalls = [read_result(folder) for folder in row.runs.values()]
            found = f"recall {Measure('recall', '', form='.3f').cell(recalls)}"
        else:
            result = read_result(row.runs[400]) or {}
            reached = result.get("test_accuracy") or next(
                report["validation_accuracy"] for report in log_rows(row.runs[400]) if report["validation_accuracy"])
            found = f"{100 * reached:.2f} %"
        assert number == found


def test_the_readme_has_one_table_and_fits_a_page():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (_, command, _), = pages.TABLE.findall(text)
    assert command == "--best --small"
    assert all(title in text for title in TASK_TITLES.values())
    assert len(text.splitlines()) <= 150


def test_pictures_are_there_and_small():
    """Every picture that a page shows or draws, and no other one."""
    shown = set()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        shown |= {(page.parent / link).resolve() for link in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)}
        for command in pages.PICTURE.findall(text):
            assert (ROOT / pictures.make_parser().parse_args(shlex.split(command)).output).resolve() in shown
    assert shown == {path for path in (ROOT / "results").iterdir() if path.suffix in (".png", ".svg")}
    assert all(path.stat().st_size < 300_000 for path in shown)


def test_records_are_of_the_projects_own_code_and_name_no_machine():
    for config in (ROOT / RUNS).glob("*/*/config.json"):
        assert not foreign_code(read_config(config.parent)), config.parent
        for name in ("config.json", "result.json"):
            if (config.parent / name).exists():
                text = (config.parent / name).read_text(encoding="utf-8")
                assert pages.ABSOLUTE.sub("", text) == text, config.parent


def test_tables_are_filled_in(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    text = "a\n<!-- python -m evidence copytask --short --only 'expRNN none' -->\nold\n<!-- end -->\nb\n"
    new = pages.fill(text)
    assert new.startswith("a\n<!-- python -m evidence copytask --short --only 'expRNN none' -->\n\n| not run |")
    assert new.endswith("|\n\n<!-- end -->\nb\n")
    assert pages.fill(new) == new


def test_update_writes_pages_and_pictures(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    page = tmp_path / "README.md"
    page.write_text("<!-- python -m evidence copytask --short -->\n<!-- end -->\n"
                    "<!-- python -m evidence.pictures --stairs -o results/stairs.png -->\n", encoding="utf-8")
    pages.update(tmp_path)
    assert "| not run |" in page.read_text(encoding="utf-8")
    assert (tmp_path / "results" / "stairs.png").read_bytes().startswith(b"\x89PNG")
    assert "1 tables, changed" in capsys.readouterr().out
    pages.update(tmp_path)
    assert "1 tables\n" in capsys.readouterr().out
    with pytest.raises(UserError, match="in the project's folder"):
        pages.update(tmp_path / "results")
    page.write_text(page.read_text(encoding="utf-8").replace("not run", "n = 1"), encoding="utf-8")
    with pytest.raises(UserError, match="fewer runs than the table of python -m evidence copytask --short shows"):
        pages.update(tmp_path)
