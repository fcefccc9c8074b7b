"""The rows of the tables, and which runs belong to them: published rows, those of other sources, and one's own."""

import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
from conftest import ROOT, environment, module_of, tiny

from common.errors import UserError
from common.runs import records
from evidence import published, rows, table
from evidence.__main__ import main as evidence_main


def row_of(task, model, stair, extra=()):
    return next(row for row in rows.rows_of(task, list(extra)) if (row.model, row.stair) == (model, stair))


def write_run(folder, row, seed, log="", result=None, **config):
    """The record of a run of `row`, as a run would leave it."""
    place = folder / row.script / f"{row.model}-{row.stair}-s{seed}-{len(list(folder.glob('*/*')))}"
    place.mkdir(parents=True)
    options = {name: {"value": value, "origin": "default"} for name, value in row.options(seed).items()}
    (place / "config.json").write_text(json.dumps({"script": row.script, "row": row.model, "argv": [],
                                                   "options": options, "revision": rows.TASKS[row.task].REVISION,
                                                   **config}))
    if log:
        (place / "log.csv").write_text(log)
    if result is not None:
        (place / "result.json").write_text(json.dumps({"seconds": 9.0, "device": "a CPU", **result}))
    return place


def log_of(epochs, accuracy=0.5, loss=1.0):
    """log.csv of a run that is in the middle of the epoch after `epochs` whole ones."""
    lines = ["epoch,batch,train_loss,train_accuracy,validation_loss,validation_accuracy,seconds"]
    for epoch in range(1, epochs + 1):
        lines += [f"{epoch},100,1,0.4,,,{10 * epoch}",
                  f"{epoch},500,1,0.4,{loss},{accuracy + epoch / 100},{11 * epoch}"]
    return "\n".join([*lines, f"{epochs + 1},100,1,0.4,,,999"]) + "\n"


def cells(text, model):
    """The cells of a table's only line that starts with `model`, by column."""
    header, *lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()
                      if line.startswith("|")]
    line, = [line for line in lines if line[0] == model]
    return dict(zip(header, line, strict=True))


def test_every_model_has_every_stair():
    """Five baselines, three models with six schedules, a learned and an exponential stair; henaff beside random."""
    for task, count in (("copytask", 38), ("sMNIST", 38), ("language", 76)):
        every = rows.rows_of(task, [])
        assert len([row for row in every if not row.source]) == count
        assert len({(row.script, row.name) for row in every}) == len(every)


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("task", rows.TASKS)
def test_every_row_is_a_command_of_its_own(task, small):
    seen = set()
    for row in rows.rows_at(task, small, []):
        options = row.options(400)
        key = row.script, json.dumps(options, sort_keys=True)
        assert key not in seen, row.command()
        seen.add(key)
        if task == "sMNIST":
            assert options["permute"]


def test_every_line_of_the_sources_names_a_row():
    """And a published value stands beside the row with its own flags alone."""
    for task in rows.TASKS:
        every = {row.name: row for small in (False, True) for row in rows.rows_at(task, small, [])}
        assert {line.name for line in published.lines(task)} <= every.keys()
    values = {row.name: row.value for row in rows.rows_at("copytask", False, [])}
    assert {name: value for name, value in values.items() if value} == {
        "RNN none": "0.0945", "RNN-Orth none": "0.0016", "expRNN, supplement none": "0.0003",
        "nnRNN, supplement none": "0.0018", "LSTM, supplement none": "0.0945"}
    assert not row_of("copytask", "RNN", "none", ["--T", "500"]).value      # of another task size


@pytest.mark.parametrize(("task", "name", "values"), [
    ("copytask", "nnRNN, supplement none", dict(Tdecay=1e-6, iinit="xavier", lr=5e-4, lr_orth=1e-6, alam=1e-4)),
    ("sMNIST", "nnRNN, supplement none", dict(lr=1.5e-4, lr_orth=1.5e-5, alam=0.15, Tdecay=1e-4, iinit="kaiming",
                                              rinit="cayley", nhid=512)),
    ("language", "LSTM 300, supplement, H 475 none", dict(nhid=475, lr=3e-3, alpha=0.9, bptt=300)),
    ("language", "sRNN (non-normal) 300, revision expn", dict(lr=2e-4, lr_orth=8e-5, alam=1.0, nvar="expn", bptt=300)),
])
def test_the_values_of_the_sources(task, name, values):
    row, = rows.select(rows.rows_at(task, False, []), [name])
    options = row.options(400)
    assert {key: options[key] for key in values} == values


def test_a_run_is_found_by_its_options(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    extra = tiny("copytask_nvar")[:-2]
    every = rows.rows_of("copytask", list(extra))
    row = next(r for r in every if (r.model, r.stair) == ("expRNN", "none"))
    for seed in ("400", "401"):
        module_of("copytask_nvar").main([*row.command()[1:], "--seed", seed, "--threads", "1", "--save", "runs",
                                         "--name", "any-name"])
    rows.find_runs(every, (400, 401, 402), tmp_path / "runs")
    assert set(row.runs) == {400, 401}
    assert all(not r.runs for r in every if r is not row)
    capsys.readouterr()
    evidence_main(["copytask", "--with", " ".join(extra), "--only", "expRNN none", "--save", "runs"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| expRNN |")]
    assert len(lines) == 1
    losses = [records.read_result(folder)["loss"] for folder in row.runs.values()]
    assert f"{sum(losses) / 2:.4f} ± " in lines[0]
    assert "n = 2" in lines[0]


def found_after(folder, row, **change):
    """Whether the record in `folder` still belongs to `row` after a change of its config.json."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key, value in change.items():
        if key == "revision":
            config.pop(key)
            config.update({key: value} if value else {})
        else:
            config["options"][key] = {**config["options"].get(key, {}), **value}
    path.write_text(json.dumps(config))
    row.runs = {}
    rows.find_runs([row], (400,), folder.parents[1])
    return bool(row.runs)


@pytest.mark.parametrize("task", rows.TASKS)
def test_a_table_takes_records_of_one_number(tmp_path, task):
    """And those of an earlier number, of cells that nothing changed for. A record without a number is of the first."""
    number, earlier = rows.TASKS[task].REVISION, rows.TASKS[task].AS_BEFORE
    for model in ("expRNN", "LSTM"):
        row = row_of(task, model, "none")
        folder = write_run(tmp_path, row, 400)
        assert found_after(folder, row, revision=number)
        assert not found_after(folder, row, revision=number + 1)
        assert found_after(folder, row, revision=number - 1) == (model in earlier.get(number - 1, ()))
        assert found_after(folder, row, revision=None) == (model in earlier.get(1, ()))


def test_an_option_that_a_run_does_not_use_decides_no_row(tmp_path):
    row = row_of("language", "expRNN", "none")
    folder = write_run(tmp_path, row, 400)
    assert found_after(folder, row, betas={"value": [0.9, 0.999], "origin": "not used"})
    assert not found_after(folder, row, betas={"value": [0.9, 0.999], "origin": "typed"})


def test_a_record_with_the_old_name_of_the_task(tmp_path):
    row = row_of("sMNIST", "expRNN", "none")
    write_run(tmp_path, row, 400, task="smnist")
    rows.find_runs([row], (400,), tmp_path)
    assert row.runs.keys() == {400}


def test_only_takes_names_and_texts():
    every = rows.rows_of("copytask", [])

    def chosen(*only):
        return {row.name for row in rows.select(every, list(only))}

    assert chosen() == {row.name for row in every}
    assert chosen("RNN none") == {"RNN none"}                                 # a name, not all that hold it
    assert chosen("sRNN n", "expRNN none") == {"sRNN n", "expRNN none"}
    assert len(chosen("(exponential)")) == 8
    with pytest.raises(UserError, match="no row holds 'expRN nome'; near it are 'expRNN none'"):
        chosen("RNN none", "expRN nome")                                      # would not be missed among the others
    with pytest.raises(UserError, match="without --only"):
        chosen("?")


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """A copy of a script under another name, that was run with several rates and sizes; → its folder of runs."""
    project = tmp_path_factory.mktemp("copied") / "project"
    shutil.copytree(ROOT / "common", project / "common", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "results" / "published", project / "results" / "published")
    shutil.copy(ROOT / "copytask_nvar.py", project / "mine.py")
    code = "import sys, mine\nfor more in sys.argv[2:]:\n    mine.main([*sys.argv[1].split(), *more.split()])"
    typed = " ".join(map(str, (*tiny("copytask_nvar"), "--no-curves")))
    subprocess.run([sys.executable, "-c", code, typed, "--lr 1e-4", "--lr 1e-2", "--lr 1e-2 --nhid 6",
                    "--lr 1e-2 --seed 7"], check=True, cwd=project, env=environment(), capture_output=True)
    return project / "saves"


def own_rows(seeds, folder, *words):
    """The rows of one's own of the copying task, with their runs."""
    return [replace(row, runs=runs[""]) for row, runs in rows.own_rows("copytask", seeds, [folder], words, "", [""])]


def test_own_rows_of_a_stair(tmp_path):
    """A later run that was stopped hides no finished one; a network of another size is not compared."""
    for sizes, result in (([], dict(loss=0.1, recall=0.5)), ([], None), (["--nhid", "32"], dict(loss=0.1, recall=0.2))):
        write_run(tmp_path, row_of("copytask", "sRNN (exponential)", "expn", sizes), 400, "update,loss\n50,1\n", result,
                  stair="Own")
    usual, small = own_rows((400,), tmp_path)
    assert usual.cell == "expRNN" != small.cell
    assert [result["recall"] for row in (usual, small) for result in row.results] == [0.5, 0.2]


def test_own_rows_are_whole(copied, capsys):
    """Typed values stand in the name and in the command; --with, --vary and --missing take own rows."""
    found = own_rows((400, 7), copied)
    assert sorted((row.name.split(", ", 1)[1], sorted(row.runs)) for row in found if "nhid 6" not in row.name) == [
        ("mine.py, nhid 8, lr 0.0001, batch 3, T 5, c-length 2, updates 4 expn", [400]),
        ("mine.py, nhid 8, lr 0.01, batch 3, T 5, c-length 2, updates 4 expn", [7, 400])]
    row = next(row for row in found if "0.0001" in row.name)
    assert shlex.join(row.command(3)) == \
        "mine.py --nhid 8 --lr 0.0001 --batch 3 --T 5 --c-length 2 --updates 4 --seed 3"
    assert len(own_rows((400,), copied, "--lr", "1e-2")) == 2
    assert len(own_rows((400,), copied, "--lr=0.01", "--nhid", "6")) == 1
    assert not own_rows((400,), copied, "--epochs", "6")
    asked = ["copytask", "--save", str(copied), "--only", "mine.py", "--seeds", "400", "7"]
    evidence_main([*asked, "--vary", "lr", "1e-4", "1e-2", "--with=--nhid 8", "--short"])
    lines = [line for line in capsys.readouterr().out.splitlines() if "mine.py" in line]
    assert len(lines) == 1
    assert lines[0].count("n = 1") == lines[0].count("n = 2") == 1
    evidence_main([*asked, "--missing"])
    missing = capsys.readouterr().out.splitlines()
    assert len(missing) == 2
    assert all(line.startswith("python mine.py") and "--seed 7" in line for line in missing)


def test_the_path_of_a_script_in_the_place_of_a_task(copied, capsys, monkeypatch):
    """Also before its first run; what is run is found again."""
    monkeypatch.chdir(copied.parent)
    evidence_main(["mine.py", "--save", "other", "--seeds", "1", "--missing", "--vary", "lr", "1e-3", "1e-2"])
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("python mine.py --lr 1e-3 --seed 1 --save other")
    assert second.startswith("python mine.py --lr 1e-2 --seed 1 --save other")
    evidence_main(["mine.py", "--save", "saves", "--with=--lr 1e-4"])
    line, = [line for line in capsys.readouterr().out.splitlines() if "mine.py" in line]
    assert "n = 1" in line
    with pytest.raises(SystemExit):
        evidence_main(["mine", "--list"])
    assert "there is no task mine" in capsys.readouterr().err


def test_runs_of_a_script_that_was_edited_are_rows_apart(copied, capsys, monkeypatch):
    """What is in its DEFAULTS now was not when the first runs were made: a sweep runs all of its values anew."""
    monkeypatch.chdir(copied.parent)
    script = copied.parent / "mine.py"
    before = script.read_text(encoding="utf-8")
    script.write_text(before.replace("labels=8, ", "labels=7, "), encoding="utf-8")
    asked = ["mine.py", "--save", "saves", "--seeds", "400", "--vary", "lr", "1e-4", "1e-2", "--with=--nhid 8"]
    evidence_main([*asked, "--missing"])
    said = capsys.readouterr()
    assert [line.split(" --seed")[0] for line in said.out.splitlines()] == [
        f"python mine.py --nhid 8 --lr {rate}" for rate in ("1e-4", "1e-2")]
    assert "mine.py, or what it imports, has changed since" in said.err
    subprocess.run([sys.executable, *said.out.splitlines()[0].split()[1:], "--T", "5", "--updates", "4", "--no-curves"],
                   check=True, env=environment(), capture_output=True)
    evidence_main(asked)
    old, new = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "mine.py" in line]
    assert (old[0].endswith("updates 4"), new[0].endswith("updates 4, labels=7")) == (True, True)
    assert ["n = 1" in cell for cell in (*old[2:], *new[2:])] == [True, True, True, False]
    script.write_text(before, encoding="utf-8")


def test_a_row_of_an_edited_script_has_no_command(tmp_path, capsys):
    row = row_of("copytask", "expRNN", "none")
    write_run(tmp_path, row, 400, edited_files=["copytask_nvar.py"])
    own, = own_rows((400,), tmp_path)
    assert own.why_no_command
    assert "edited copytask_nvar.py" in own.name
    assert "none: " in table.line_of(own, table.MEASURES["copytask"])["command"]
    evidence_main(["copytask", "--missing", "--only", "edited", "--save", str(tmp_path)])
    said = capsys.readouterr()
    assert (said.out, said.err.count("no command makes runs of")) == ("", 1)


def test_two_contents_of_a_script_are_two_rows(tmp_path):
    """Of the same name and options: edited between two seeds, they are no two runs of one program."""
    row = row_of("copytask", "expRNN", "none")
    for seed, content in ((400, "a" * 40), (401, "b" * 40), (402, "b" * 40)):
        write_run(tmp_path, row, seed, code={"copytask_nvar.py": content})
    one, two = own_rows((400, 401, 402), tmp_path)
    assert [sorted(own.runs) for own in (one, two)] == [[400], [401, 402]]
    assert two.name == one.name.replace("aaaaaaa", "bbbbbbb") != one.name
    rows.find_runs([row], (400, 401, 402), tmp_path)
    assert not row.runs
