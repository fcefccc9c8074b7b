"""The tables beside the published ones: their rows, which runs belong to them, what they say, how runs are started."""

import json
import os
import signal
import threading
import time

import pytest
from conftest import ROOT, module_of, tiny

from common.errors import UserError
from common.runs import records
from evidence import launch, pages, published, rows, table
from evidence.__main__ import main as evidence_main

ROWS = {"copytask": 5 + 1 + 2 + (6 + 1 + 1) * 3 + 8, "sMNIST": 5 + 1 + (6 + 1 + 1) * 3 + 8}


def row_of(task, model, stair, extra=()):
    return next(row for row in rows.rows_of(task, list(extra)) if (row.model, row.stair) == (model, stair))


def write_run(folder, row, seed, log="", result=None):
    """The record of a run of `row`, as a run would leave it."""
    place = folder / row.script / f"{row.model}-{row.stair}-s{seed}-{len(list(folder.glob('*/*')))}"
    place.mkdir(parents=True)
    options = {name: {"value": value, "origin": "typed"} for name, value in row.options(seed).items()}
    (place / "config.json").write_text(json.dumps({"script": row.script, "row": row.model, "argv": [],
                                                   "options": options,
                                                   "revision": rows.TASKS[row.script.split("_")[0]].REVISION}))
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
    header, *lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    line, = [line for line in lines if line[0] == model]
    return dict(zip(header, line, strict=True))


@pytest.mark.parametrize("task", ROWS)
def test_every_model_has_every_stair(task):
    """Five baselines, three models with six schedules, a learned and an exponential stair; henaff beside random."""
    every = rows.rows_of(task, [])
    assert len(every) == ROWS[task]
    assert len({(row.script, row.model, row.stair) for row in every}) == len(every)


@pytest.mark.parametrize("task", rows.TASKS)
def test_every_row_is_a_command(task):
    seen = set()
    for row in rows.rows_of(task, []):
        options = row.options(400)
        key = row.script, json.dumps(options, sort_keys=True)
        assert key not in seen, row.command()
        seen.add(key)
        if task == "sMNIST":
            assert options["permute"]
        assert row.baseline.removesuffix(" 300") in published.FINAL["copytask"]


def test_a_run_is_found_by_its_options(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("common.runs.folder.edited_files", lambda *_: [])   # also where this checkout has changes
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
    asked = ["copytask", "--with", " ".join(extra), "--only", "expRNN none", "--save", "runs", "--seeds"]
    evidence_main([*asked, "400", "401"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| expRNN |")]
    assert len(lines) == 1
    losses = [records.read_result(folder)["loss"] for folder in row.runs.values()]
    assert f"{sum(losses) / 2:.4f} ± " in lines[0]
    assert "n = 2" in lines[0]
    evidence_main([*asked, "402", "--list"])
    listed, = capsys.readouterr().out.splitlines()
    assert listed.startswith("python copytask_nvar.py --net-type expRNN --nvar none")
    assert "--seed 402" in listed


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


def test_an_unfinished_run_is_resumed(tmp_path):
    row = row_of("copytask", "expRNN", "none")
    folder = write_run(tmp_path, row, 400, "update,loss,loss_median,recall,seconds\n4,1,1,0,2\n")
    rows.find_runs([row], (400,), tmp_path)
    command, = launch.commands_of([row], (400,), tmp_path, [], left=True)
    assert command == [*row.command(400), "--save", str(tmp_path), "--resume", "auto", "--no-curves"]
    assert row.runs == {400: folder}
    assert "unfinished: update 4" in table.table("copytask", [row])


@pytest.mark.parametrize("extra", ["--nhdi 3", "--net-type"])
def test_a_mistake_in_the_extra_flags(extra):
    with pytest.raises(UserError):
        evidence_main(["copytask", "--list", f"--with={extra}"])


@pytest.mark.parametrize(("asked", "sentence"), [([], "name a task"), (["copytask", "--vary", "T"], "needs values"),
                                                 (["copytask", "--run", "--until-epoch", "1"], "no epochs"),
                                                 (["copytask", "--grid", "--vary", "T", "5"], "ask for one of them")])
def test_a_mistake_in_what_is_asked_for(asked, sentence, capsys):
    with pytest.raises(SystemExit):
        evidence_main(asked)
    assert sentence in capsys.readouterr().err


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


# ── unfinished runs ──────────────────────────────────────────────────────────────────────────────────────


def test_an_unfinished_row_of_psmnist_stands_beside_the_published_curve(tmp_path):
    every = [row_of("sMNIST", *name) for name in (("expRNN", "none"), ("sRNN, henaff", "alpha"), ("RNN", "none"))]
    write_run(tmp_path, every[0], 400, log_of(2))
    write_run(tmp_path, every[0], 401, log_of(1, 0.7))
    write_run(tmp_path, every[1], 400, log_of(1, 0.8))
    write_run(tmp_path, every[2], 400, log_of(0))
    rows.find_runs(every, (400, 401), tmp_path)
    text = table.table("sMNIST", every, short=True)
    there = next(name for name in cells(text, "expRNN") if "at that epoch" in name)

    line = cells(text, "expRNN")                         # two runs, at the last epoch that both have completed
    assert "**unfinished: epoch 1 of 100, epoch 2 of 100**, n = 2" in line.values()
    assert line["validation accuracy, %"] == "61.00 ± 14.14"                  # of 0.51 and 0.71
    assert line[there] == "84.01 ± 0.13 (H 722)"
    assert line["time a run"] == "11 s so far"
    line = cells(text, "sRNN, henaff")                   # no published value: the baseline's, called that
    assert line["validation accuracy, %"] == "81.00"
    assert line[there] == "baseline RNN-Orth: 75.78 ± 3.78"
    assert "none known" in line.values()
    line = cells(text, "RNN")                            # not one epoch yet
    assert "**unfinished: epoch 0 of 100**, n = 1" in line.values()
    assert line["validation accuracy, %"] == line[there] == ""


def test_an_unfinished_row_of_the_characters_shows_its_bits(tmp_path):
    row = row_of("language", "nnRNN", "none")
    write_run(tmp_path, row, 400, log_of(3, 0.5, loss=1.386294361))
    rows.find_runs([row], (400,), tmp_path)
    line = cells(table.table("language", [row]), "nnRNN")
    assert line["validation bits per character"] == "2.0000"
    assert line["validation accuracy, %"] == "53.00"
    assert "68.78 (1.47)" in line.values()
    assert not any("at that epoch" in name for name in line)                  # no curve is known


def test_a_finished_seed_beside_an_unfinished_one(tmp_path):
    row = row_of("sMNIST", "nnRNN", "none")
    write_run(tmp_path, row, 400, log_of(2), dict(test_accuracy=0.9, validation_accuracy=0.91, best_epoch=2))
    write_run(tmp_path, row, 401, log_of(5, 0.1))
    rows.find_runs([row], (400, 401), tmp_path)
    line = cells(table.table("sMNIST", [row]), "nnRNN")
    assert "90.00, n = 1 (unfinished: epoch 5 of 100)" in line.values()
    assert line["validation accuracy, %"] == "91.00"                          # of the finished one alone
    assert any(value == "85.85 ± 0.12" for value in line.values())            # the curve at its best epoch


def test_the_published_curves_are_whole():
    curve = published.curve_points("sMNIST")
    assert [int(point["epoch"]) for point in curve] == list(range(1, 71))
    for model, best in published.FINAL["sMNIST"].items():
        assert 0 < max(float(point[model]) for point in curve) < 1
        if model not in published.CURVE_HIDDEN:                                   # the same H: the same runs
            assert 100 * max(float(point[model]) for point in curve) == pytest.approx(float(best), abs=0.2)
    assert len(published.curve_points("copytask")) == 150


# ── a column a value ─────────────────────────────────────────────────────────────────────────────────────


def test_vary_makes_a_column_a_value(tmp_path, capsys):
    for value, loss in (("5", 0.25), ("7", 1e20)):
        for seed in (400, 401):
            write_run(tmp_path, row_of("copytask", "expRNN", "none", ["--T", value]), seed,
                      result=dict(loss=loss, recall=0.5, memoryless_loss=0.125))
    write_run(tmp_path, row_of("copytask", "expRNN", "none", ["--T", "9"]), 400)
    write_run(tmp_path, row_of("copytask", "expRNN", "none", ["--T", "7"]), 402)
    asked = ["copytask", "--save", str(tmp_path), "--only", "expRNN none", "LSTM none", "--vary", "T", "5", "7", "9"]
    evidence_main([*asked, "--short"])
    text = capsys.readouterr().out
    assert cells(text, "expRNN") == {"model": "expRNN", "stair": "none",
                                     "T 5": "0.2500 ± 0.0000; recall 0.500 ± 0.000; n = 2",
                                     "T 7": "1.0e+20 ± 0.0e+00; recall 0.500 ± 0.000; n = 2 of 3",
                                     "T 9": "**unfinished: started**"}
    assert cells(text, "a memoryless model")["T 5"] == "0.1250"
    assert "LSTM" not in text
    evidence_main([*asked, "--missing", "--seeds", "400"])
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == 1 + 3                                               # one to resume, three of the LSTM
    assert sum("--net-type LSTM" in line for line in listed) == 3


def test_a_run_that_diverged_is_told_and_left(tmp_path, capsys):
    """It would diverge again, bit for bit; an interrupted one is gone on with."""
    row = row_of("sMNIST", "sRNN", "n2")
    write_run(tmp_path, row, 400, log_of(0) + "1,200,nan,0.1,,,20\n")
    write_run(tmp_path, row, 401, log_of(1))
    asked = ["sMNIST", "--save", str(tmp_path), "--only", "sRNN n2", "--seeds", "400", "401"]
    evidence_main(asked)
    said = cells(capsys.readouterr().out, "sRNN")
    assert said["ours: test accuracy, % (mean ± std, n)"] == \
        "**diverged: batch 200 of epoch 1; unfinished: epoch 1 of 100**, n = 2"
    evidence_main([*asked, "--missing"])
    resumed, = capsys.readouterr().out.splitlines()
    assert "--seed 401" in resumed
    write_run(tmp_path, row_of("copytask", "sRNN", "n2"), 400, "update,loss,seconds\n100,inf,1\n")
    write_run(tmp_path, row_of("copytask", "sRNN", "n2"), 401, result=dict(loss=0.5, recall=0.5))
    evidence_main(["copytask", "--save", str(tmp_path), "--only", "sRNN n2", "--vary", "T", "200"])
    assert cells(capsys.readouterr().out, "sRNN")["T 200"].endswith("; n = 1 of 2, 1 diverged")


@pytest.mark.parametrize("task", ["sMNIST", "language"])
def test_a_run_that_diverged_at_the_end_of_an_epoch_has_not_completed_it(tmp_path, capsys, task):
    row = row_of(task, "sRNN", "n2")
    write_run(tmp_path, row, 400, log_of(1))
    write_run(tmp_path, row, 401, log_of(0) + "1,500,2.3,0.1,nan,0.099,20\n")
    asked = [task, "--save", str(tmp_path), "--only", "sRNN n2"]
    evidence_main(asked)
    said = cells(capsys.readouterr().out, "sRNN")
    assert said["ours: test accuracy, % (mean ± std, n)"] == \
        "**diverged: batch 500 of epoch 1; unfinished: epoch 1 of 100**, n = 2"
    assert said["validation accuracy, %"] == "51.00"


def test_vary_asks_the_scripts_that_have_the_flag(tmp_path, capsys):
    columns = rows.vary("copytask", "alpha-start", ["0.5", "2"], [], None)
    assert {row.stair for found in columns.values() for row in found} == {"alpha", "expalpha"}
    evidence_main(["copytask", "--list", "--vary", "alpha-start", "2", "--only", "expalpha", "--seeds", "400", "--save",
                str(tmp_path)])
    assert capsys.readouterr().out.count("copytask_expalpha.py") == 4
    with pytest.raises(UserError, match="has a flag --warp"):
        evidence_main(["copytask", "--vary", "warp", "9"])


# ── a column a cell ──────────────────────────────────────────────────────────────────────────────────────


def test_grid_has_a_line_a_stair_and_a_column_a_cell(tmp_path, capsys):
    for stair, loss in (("none", 0.25), ("n2", 0.5), ("alpha", 0.75)):
        model = "expRNN" if stair == "none" else "sRNN (exponential)"
        write_run(tmp_path, row_of("copytask", model, stair), 400, result=dict(loss=loss, recall=0.5))
    write_run(tmp_path, row_of("copytask", "sRNN, henaff", "n2"), 400, result=dict(loss=0.125, recall=0.5))
    evidence_main(["copytask", "--grid", "--save", str(tmp_path)])
    text = capsys.readouterr().out
    assert [line.split("|")[1].strip() for line in text.splitlines()] == \
        ["stair", "---", "none", "n", "n2", "expn", "logn", "log2n", "sqrtlogn", "alpha", "expalpha", "none, published"]
    assert cells(text, "n2") == {"stair": "n2", "RNN": "", "RNN-Orth": "not run", "LSTM": "", "nnRNN": "not run",
                                     "expRNN, H 176": "", "LSTM, H 63": "",
                                 "RNN-Orth, henaff": "0.1250; recall 0.500; n = 1",
                                 "expRNN": "0.5000; recall 0.500; n = 1"}
    assert cells(text, "none")["expRNN"].startswith("0.2500")
    assert cells(text, "alpha")["expRNN"].startswith("0.7500")
    assert cells(text, "none, published")["RNN-Orth, henaff"] == "0.0016"
    evidence_main(["copytask", "--grid", "--short", "--save", str(tmp_path)])
    assert list(cells(capsys.readouterr().out, "n2")) == ["stair", "RNN-Orth, henaff", "expRNN"]


def test_a_list_does_not_depend_on_what_was_run(tmp_path, capsys):
    """Nor on the machine that lists; --missing does."""
    asked = ["copytask", "--only", "expRNN none", "nnRNN none", "--seeds", "400", "401", "--save", str(tmp_path)]
    evidence_main([*asked, "--list"])
    before = capsys.readouterr().out
    assert len(before.splitlines()) == 4
    assert all("--resume auto" in line and "--threads" not in line for line in before.splitlines())
    write_run(tmp_path, row_of("copytask", "expRNN", "none"), 400, result=dict(loss=0.5, recall=0.5))
    evidence_main([*asked, "--list"])
    assert capsys.readouterr().out == before
    evidence_main([*asked, "--missing"])
    assert capsys.readouterr().out.splitlines() == before.splitlines()[1:]


def test_runs_of_several_folders_and_engines(tmp_path, capsys):
    row = row_of("copytask", "expRNN", "none")
    for seed, place, engine in ((400, "a", "native"), (401, "b", "torch"), (402, "b", "torch")):
        write_run(tmp_path / place, row, seed, result=dict(loss=0.5, recall=0.5, engine=engine))
    both = ["--save", str(tmp_path / "a"), str(tmp_path / "b")]
    for table_ in (["copytask"], ["copytask", "--grid"], ["copytask", "--vary", "T", "200", "500"]):
        evidence_main([*table_, "--only", "expRNN none", *both])
        said = capsys.readouterr().out
        assert "n = 3" in said
        assert said.endswith("\n\nRuns of different engines, whose last digits differ: native 1, torch 2.\n")
        evidence_main([*table_, "--only", "expRNN none", both[0], both[2]])
        said = capsys.readouterr().out
        assert "n = 2" in said
        assert "engines" not in said
    evidence_main(["--collect", str(tmp_path / "a"), str(tmp_path / "b"), "--save", str(tmp_path / "c")])
    assert "3 new" in capsys.readouterr().out


def test_paired_differences_at_the_small_size(tmp_path, capsys):
    """Of the seeds that both rows have; the spread is that of the differences, not of the scores."""
    small = ["--nhid", "128", "--epochs", "10"]
    for seed, plain, stair in ((400, 0.80, 0.81), (401, 0.70, 0.73), (402, 0.60, None)):
        write_run(tmp_path, row_of("sMNIST", "expRNN", "none", small), seed, result=dict(test_accuracy=plain))
        if stair:
            write_run(tmp_path, row_of("sMNIST", "sRNN (exponential)", "n2", small), seed,
                      result=dict(test_accuracy=stair))
    write_run(tmp_path, row_of("sMNIST", "expRNN", "none"), 400, result=dict(test_accuracy=0.99))     # of another size
    asked = ["sMNIST", "--small", "--grid", "--save", str(tmp_path)]
    evidence_main([*asked, "--paired"])
    text = capsys.readouterr().out
    assert cells(text, "n2")["expRNN"] == "+2.00 ± 1.41; n = 2"
    assert cells(text, "none")["expRNN"] == "70.00 ± 10.00; n = 3"
    assert cells(text, "expn")["expRNN"] == "not run"
    evidence_main(asked)
    assert cells(capsys.readouterr().out, "n2")["expRNN"] == "77.00 ± 5.66; n = 2"
    evidence_main(["--best", "--small", "--save", str(tmp_path)])
    line = cells(capsys.readouterr().out, "permuted MNIST (nhid 128, epochs 10), expRNN")
    assert line["best stair"] == "n2: 77.00 ± 5.66; n = 2"
    for task, lines in (("sMNIST", 19), ("language", 19)):
        evidence_main([task, "--small", "--seeds", "400", "--list"])
        assert len(capsys.readouterr().out.splitlines()) == lines


def test_the_best_stair_of_every_cell(tmp_path, capsys):
    """The highest mean recall or test accuracy of the runs that have ended."""
    for model, stair, recalls in (("expRNN", "none", (0.9, 0.7)), ("sRNN (exponential)", "n", (0.99, 0.3)),
                                  ("sRNN (exponential)", "n2", (0.8, 0.6)), ("sRNN (non-normal)", "n", (1.0,))):
        for seed, recall in enumerate(recalls, 400):
            write_run(tmp_path, row_of("copytask", model, stair), seed, result=dict(loss=0.5, recall=recall))
    ended = dict(test_accuracy=0.9, validation_accuracy=0.8)
    write_run(tmp_path, row_of("sMNIST", "expRNN", "none"), 400, log_of(3), ended)
    write_run(tmp_path, row_of("sMNIST", "sRNN (exponential)", "n"), 400, log_of(2, 0.99))
    write_run(tmp_path, row_of("sMNIST", "RNN-Orth", "none"), 400, log_of(2))
    write_run(tmp_path, row_of("sMNIST", "sRNN", "n"), 400, log_of(2), ended)
    write_run(tmp_path, row_of("sMNIST", "sRNN", "n"), 401, log_of(1))
    write_run(tmp_path, row_of("sMNIST", "nnRNN", "none"), 400, log_of(3), ended)
    write_run(tmp_path, row_of("sMNIST", "sRNN (non-normal)", "n"), 400, log_of(3), {**ended, "test_accuracy": 0.95})
    evidence_main(["--best", "--save", str(tmp_path)])
    text = capsys.readouterr().out
    line = cells(text, "copying memory, expRNN")
    assert line["plain network"] == "0.5000 ± 0.0000; recall 0.800 ± 0.141; n = 2"
    assert line["best stair"] == "n2: 0.5000 ± 0.0000; recall 0.700 ± 0.141; n = 2"
    assert line["published, without a stair"] == "0.0003 (H 176)"
    assert "permuted MNIST, expRNN" not in text                               # no run with a stair has ended
    line = cells(text, "permuted MNIST, RNN-Orth")
    assert (line["plain network"], line["best stair"]) == ("**unfinished: epoch 2 of 100**", "n: 90.00; n = 1 of 2")
    assert line["published, without a stair"] == "95.3"
    line = cells(text, "permuted MNIST, nnRNN")
    assert (line["measured"], line["best stair"]) == ("test accuracy, %", "n: 95.00; n = 1")
    assert cells(text, "characters")["best stair"] == "not run"
    assert "copying memory, nnRNN" not in text                                # no plain network to put beside it


# ── starting runs ────────────────────────────────────────────────────────────────────────────────────────


def many_epochs(penn_folder, save):
    return ["language", "--only", "expRNN none", "--seeds", "400", "--save", str(save), "--data", str(penn_folder),
            "--with=--nhid 8 --batch 4 --bptt 20 --emsize 5 --epochs 100000", "--run"]


def test_runs_are_stopped_after_an_epoch(tmp_path, monkeypatch, capsys, penn_folder):
    monkeypatch.chdir(ROOT)
    evidence_main([*many_epochs(penn_folder, tmp_path), "--until-epoch", "2"])
    folder, = (tmp_path / "language_nvar").iterdir()
    assert len(rows.epochs_of(folder)) == 2
    assert (folder / "last.pt").exists()
    assert not (folder / "result.json").exists()
    said = capsys.readouterr().out
    assert ": done" in said
    assert "of 100000**" in said
    evidence_main([*many_epochs(penn_folder, tmp_path), "--until-epoch", "2", "--missing"])
    assert capsys.readouterr().out == ""                                      # far enough: nothing to do


def test_sigterm_saves_every_run(tmp_path, monkeypatch, capsys, penn_folder):
    """Where a shell in the background has made Python, and with it every run, deaf to Ctrl-C."""
    def stop_soon():
        limit = time.monotonic() + 60
        while not list(tmp_path.glob("*/*/best.pt")) and time.monotonic() < limit:
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.chdir(ROOT)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        threading.Thread(target=stop_soon).start()
        with pytest.raises(UserError, match="the same command goes on") as stop:
            evidence_main(many_epochs(penn_folder, tmp_path))
    finally:
        signal.signal(signal.SIGINT, before)
    assert stop.value.status == 130
    assert "every run saves first" in capsys.readouterr().out
    folder, = (tmp_path / "language_nvar").iterdir()
    assert (folder / "last.pt").exists()
    assert not pages.at_work(folder)                                          # the run has ended too
    assert not (folder / "result.json").exists()


def test_no_run_is_left_behind_alone(tmp_path, monkeypatch, capsys, penn_folder):
    """Where run_all ends for a reason of its own, such as `| head` that reads no more."""
    def reader_is_gone(*args, **kwargs):
        raise BrokenPipeError

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("builtins.print", reader_is_gone)
    sizes = ["--nhid", "8", "--batch", "4", "--bptt", "20", "--emsize", "5", "--epochs", "100000"]
    long, = launch.commands_of([row_of("language", "expRNN", "none", sizes)], (400,), tmp_path,
                               ["--data", str(penn_folder)])
    wait = f"import time, pathlib\nwhile not list(pathlib.Path({str(tmp_path)!r}).glob('*/*/best.pt')): time.sleep(0.1)"
    with pytest.raises(BrokenPipeError):
        launch.run_all([long, ["-c", wait], long], 2)
    folder, = (tmp_path / "language_nvar").iterdir()
    assert not pages.at_work(folder)
    assert (folder / "last.pt").exists()


@pytest.mark.parametrize(("code", "failed", "how"), [
    ("pass", 0, "done"),
    ("import sys; sys.stderr.write('x' * 10**6 + '\\nno room\\n'); sys.exit(1)", 1, "FAILED (no room)"),
    ("import sys; sys.exit(3)", 1, "FAILED (status 3)"),
])
def test_how_a_run_ended(code, failed, how, capsys):
    """However much it had to say, which would fill a pipe."""
    assert launch.run_all([["-c", code]], 1) == failed
    assert capsys.readouterr().out.endswith(f": {how}\n")


def test_a_run_that_could_not_save_has_failed(tmp_path, capsys):
    ready = tmp_path / "ready"
    code = f"import pathlib, signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit('disk full')); " \
           f"pathlib.Path({str(ready)!r}).touch(); time.sleep(60)"

    def stop_soon():
        while not ready.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_soon).start()
    with pytest.raises(UserError, match="stopped"):
        launch.run_all([["-c", code], ["-c", "pass"]], 1)
    said = capsys.readouterr().out
    assert "FAILED (disk full)" in said
    assert "pass" not in said                                                 # was never begun


def test_collect_and_update_go_together(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "elsewhere", row_of("copytask", "expRNN", "none"), 400)
    (tmp_path / "README.md").write_text("<!-- python -m evidence copytask --short -->\n<!-- end -->\n")
    monkeypatch.chdir(tmp_path)
    evidence_main(["--collect", "elsewhere", "--update"])
    assert "1 new" in capsys.readouterr().out
    assert "unfinished: started" in (tmp_path / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("asked", "sentence"), [(["--with='"], "cannot be read"),
                                                 (["-o", "nowhere/table.md"], "nowhere/table.md could not be written")])
def test_a_mistake_ends_in_a_sentence(asked, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=sentence):
        evidence_main(["copytask", *asked])


@pytest.mark.parametrize(("name", "text"), [("result.json", '{"loss": '), ("log.csv", "update,loss\n50,a\n"),
                                            ("log.csv", "update\n50,1\n")])
def test_a_spoiled_record_ends_in_a_sentence(name, text, tmp_path):
    folder = write_run(tmp_path, row_of("copytask", "expRNN", "none"), 400)
    (folder / name).write_text(text)
    with pytest.raises(UserError, match="is damaged"):
        evidence_main(["copytask", "--save", str(tmp_path), "--only", "expRNN none"])


def test_the_last_epoch_is_not_cut_off(tmp_path):
    """A run whose last epoch is the one that is asked for goes on to its test."""
    row = row_of("sMNIST", "expRNN", "none", ["--epochs", "2"])
    folder = write_run(tmp_path, row, 400, log_of(2))
    assert launch.is_through(folder, 1)
    assert not launch.is_through(folder, 2)


# ── records ──────────────────────────────────────────────────────────────────────────────────────────────


def test_records_are_collected(tmp_path, capsys):
    source, target = tmp_path / "source", tmp_path / "target"
    row = row_of("copytask", "expRNN", "none")
    folder = write_run(source, row, 400, "update,loss,seconds\n4,1,2\n")
    config = json.loads((folder / "config.json").read_text())
    config["argv"] = [str(tmp_path / "copytask_nvar.py"), "--data=/some/where/data", "--save", "results/runs"]
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("last.pt", "best.pt", "curves.png", ".lock"):
        (folder / name).write_bytes(b"x")
    pages.collect([source], target)
    copy, = target.glob("*/*")
    assert {path.name for path in copy.iterdir()} == {"config.json", "log.csv"}
    assert json.loads((copy / "config.json").read_text())["argv"] == \
        ["copytask_nvar.py", "--data=data", "--save", "results/runs"]
    (folder / "result.json").write_text('{"loss": 1, "seconds": 2}')
    pages.collect([source], target)
    pages.collect([source], target)
    assert (copy / "result.json").exists()
    assert len(list(target.glob("*/*"))) == 1
    (copy / "config.json").write_text(json.dumps({**config, "row": "another run"}))
    pages.collect([source], target)                                             # the name is taken
    assert {path.name for path in target.glob("*/*")} == {folder.name, f"{folder.name}-2"}
    assert [line.split(",")[0] for line in capsys.readouterr().out.splitlines()] == \
        ["1 new", "1 newer", "1 the same", "1 new"]


def test_of_records_with_the_same_options_the_tables_show_the_first_finished_one(tmp_path, capsys):
    """--collect says so where it is an earlier one, and not where the new record takes the place of an unfinished."""
    row, target = row_of("copytask", "expRNN", "none"), tmp_path / "target"
    for started, result in (("first", None), ("second", dict(loss=0.5, recall=0.5)), ("third", dict(loss=9, recall=0)),
                            ("fourth", None)):
        folder = write_run(tmp_path / started, row, 400, "update,loss,seconds\n4,1,2\n", result)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "started": started}))
        pages.collect([tmp_path / started], target)
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == ["1 new", "1 new"]
    assert all(line.startswith("1 new, 1 of the new with the options and seed of an earlier") for line in said[2:])
    rows.find_runs([row], (400,), target)
    assert "0.5000, n = 1" in table.table("copytask", [row])


@pytest.mark.skipif(os.name == "nt", reason="no flock")
def test_a_run_at_work_is_not_collected(tmp_path, capsys):
    import fcntl

    folder = write_run(tmp_path / "source", row_of("copytask", "expRNN", "none"), 400)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        pages.collect([tmp_path / "source"], tmp_path / "target")
    assert "1 still running" in capsys.readouterr().out
    assert not (tmp_path / "target").exists()
    with pytest.raises(UserError, match="holds no runs"):
        pages.collect([tmp_path / "nowhere"], tmp_path / "target")
