"""The tables beside the published ones: their rows, which runs belong to them, what they say."""

import json

import pytest
from conftest import module_of, tiny

from common import cli, table

ROWS = {"copytask": 5 + 1 + (6 + 1 + 1) * 3 + 8, "sMNIST": 5 + 1 + (6 + 1 + 1) * 3 + 8}


@pytest.mark.parametrize("task", ROWS)
def test_every_model_has_every_stair(task):
    """Five baselines, three models with six schedules, a learned and an exponential stair; henaff beside random."""
    rows = table.rows_of(task, [])
    assert len(rows) == ROWS[task]
    assert len({(row.script, row.model, row.stair) for row in rows}) == len(rows)


@pytest.mark.parametrize("task", table.TASKS)
def test_every_row_is_a_command(task):
    seen = set()
    for row in table.rows_of(task, []):
        options = row.options(400)
        key = row.script, json.dumps(options, sort_keys=True)
        assert key not in seen, row.command()
        seen.add(key)
        if task == "sMNIST":
            assert options["permute"]


def test_a_run_is_found_by_its_options(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    extra = tiny("copytask_nvar")[:-2]
    rows = table.rows_of("copytask", list(extra))
    row = next(r for r in rows if (r.model, r.stair) == ("expRNN", "none"))
    for seed in ("400", "401"):
        module_of("copytask_nvar").main([*row.command()[1:], "--seed", seed, "--threads", "1", "--save", "runs",
                                         "--name", "any-name"])
    table.find_runs(rows, (400, 401, 402), tmp_path / "runs")
    assert set(row.runs) == {400, 401}
    assert all(not r.runs for r in rows if r is not row)
    capsys.readouterr()
    asked = ["copytask", "--with", " ".join(extra), "--only", "expRNN none", "--save", "runs", "--seeds"]
    table.main([*asked, "400", "401"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| expRNN |")]
    assert len(lines) == 1
    losses = [table.result(folder)["loss"] for folder in row.runs.values()]
    assert f"{sum(losses) / 2:.4f} ± " in lines[0]
    assert "n = 2" in lines[0]
    table.main([*asked, "402", "--list"])
    listed, = capsys.readouterr().out.splitlines()
    assert listed.startswith("python copytask_nvar.py --net-type expRNN --nvar none")
    assert "--seed 402" in listed


def test_an_unfinished_run_is_resumed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = table.rows_of("copytask", list(tiny("copytask_nvar")[:-2]))
    row = next(r for r in rows if (r.model, r.stair) == ("expRNN", "none"))
    module_of("copytask_nvar").main([*row.command()[1:], "--threads", "1", "--save", "runs"])
    folder, = (tmp_path / "runs" / "copytask_nvar").iterdir()
    (folder / "result.json").unlink()
    table.find_runs([row], (400,), tmp_path / "runs")
    command, = table.missing([row], (400,), tmp_path / "runs", 1, [])
    assert command[:3] == ["copytask_nvar.py", "--resume", str(folder)]
    assert "unfinished: update 4" in table.table("copytask", [row], (400,))


@pytest.mark.parametrize("extra", ["--nhdi 3", "--net-type"])
def test_a_mistake_in_the_extra_flags(extra, capsys):
    with pytest.raises(cli.UserError):
        table.main(["copytask", "--list", f"--with={extra}"])
