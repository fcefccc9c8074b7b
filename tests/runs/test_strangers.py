"""Files, shells and clusters that are not ours: a run folder that somebody else made, streams that are closed, signals
of a scheduler, runs that an earlier version wrote. Each ends in one sentence, or as it would have ended here.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_same_run, command, environment, module_of, plain, task_of, tiny

from common.errors import UserError
from common.runs import records, run
from common.runs.curves import draw_curves
from evidence import pages
from evidence.__main__ import main as evidence_main

FIXTURES = Path(__file__).parent / "fixtures"
COPY = (*tiny("copytask_nvar"), "--log-interval", "2")


@pytest.fixture
def finished(main):
    """The folder of a finished run of four updates."""
    return main("copytask_nvar", *COPY)[1]


@pytest.fixture
def stopped(main):
    """The folder of a run that was asked to stop in its third update, and has a log."""
    return main("copytask_nvar", *COPY, stop_after=3)[1]


def changed(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


BAD_LOGS = {"Latin-1": b"update,loss\n1,\xe9\n", "a missing cell": b"update,loss\n1\n",
            "a cell too many": b"update,loss\n1,2,3\n", "text": b"update,loss\n1,x\n"}


@pytest.mark.parametrize("content", BAD_LOGS.values(), ids=BAD_LOGS)
def test_a_damaged_log(main, stopped, tmp_path, content):
    """Found by whatever reads it, and before a resumed run trains."""
    log = (stopped / "log.csv").read_bytes()
    (stopped / "log.csv").write_bytes(content)
    for read in (records.log_rows, lambda folder: draw_curves([folder], tmp_path / "x.png"),
                 lambda folder: pages.collect([tmp_path / "saves"], tmp_path / "t")):
        with pytest.raises(UserError, match=r"log\.csv cannot be used"):
            read(stopped)
    (stopped / "log.csv").write_bytes(content + log)
    with pytest.raises(UserError, match=r"log\.csv (cannot be used|has other columns|is shorter)"):
        main("copytask_nvar", "--resume", stopped)
    assert not (stopped / "result.json").exists()


def test_rubbish_behind_the_log_that_was_saved_goes(main, stopped):
    """As a file system leaves it after a power cut."""
    with open(stopped / "log.csv", "ab") as file:
        file.write(b"\0\0\0\0\n")
    main("copytask_nvar", "--resume", stopped)
    assert b"\0" not in (stopped / "log.csv").read_bytes()
    assert (stopped / "result.json").exists()


def test_a_line_that_is_being_written_is_no_row(stopped):
    rows = records.log_rows(stopped)
    with open(stopped / "log.csv", "ab") as file:
        file.write(b"4,0.1,0.")
    assert records.log_rows(stopped) == rows
    assert [row["update"] for row in rows] == [2]


def test_a_foreign_record_sends_nothing_to_the_terminal(main, stopped, capsys):
    def spoil(config):
        config.update(row="row\x1b[2J\x9b", device="gpu\x1b]0;x\x07")
        config["options"]["nhid"]["origin"] = "typed\x1b[31m"
    changed(stopped / "config.json", spoil)
    main("copytask_nvar", "--resume", stopped)
    said = capsys.readouterr()
    assert all(c.isprintable() or c == "\n" for c in said.out + said.err)
    assert "row\\x1b[2J\\x9b" in said.out
    assert "gpu\\x1b]0;x\\x07" in said.out


def test_a_foreign_record_ends_no_cell_of_a_table(main, finished, monkeypatch, capsys):
    monkeypatch.setattr("evidence.rows.SEEDS", (400,))
    changed(finished / "config.json", lambda config: config.update(edited_files=[]))
    changed(finished / "result.json", lambda result: result.update(device="a|b\n<!-- end --><script>\x1b"))
    evidence_main(["copytask", "--only", "sRNN (exponential) expn", "--with", " ".join(tiny("copytask_nvar")[:-2]),
                   "--save", "saves", "--seeds", "400"])
    out = capsys.readouterr().out
    assert "a\\|b\\n&lt;!-- end -->&lt;script>\\x1b" in out
    assert out.count("\n") == 3


@pytest.mark.parametrize("name", ["$^$", "a$b", "_", "\N{GREEK SMALL LETTER ALPHA}\N{CJK UNIFIED IDEOGRAPH-4F8B}"])
def test_a_name_is_no_formula(main, recwarn, name):
    _, folder = main("copytask_nvar", *COPY, "--name", name)
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [w for w in recwarn if "matplotlib" in str(w.filename)] == []


def test_a_picture_that_cannot_be_drawn_is_a_line(main, monkeypatch, capsys):
    def broken(folders, path):
        assert (folders[0] / "result.json").exists()
        raise RuntimeError("no fonts here\nat all")

    with monkeypatch.context() as patched:
        patched.setattr(run, "draw_curves", broken)
        result, folder = main("copytask_nvar", *COPY)
    assert result["updates"] == 4
    out = capsys.readouterr().out
    assert "curves.png could not be drawn: no fonts here\n" in out
    assert "curves in" not in out
    assert not (folder / "curves.png").exists()
    main("copytask_nvar", "--resume", folder)
    assert (folder / "curves.png").exists()


@pytest.mark.skipif(os.name == "nt", reason="a shell of POSIX")
def test_closed_streams(tmp_path):
    """The run goes on, and no file of it is opened in the place of a stream."""
    done = subprocess.run(["sh", "-c", '"$@" <&- >&- 2>&-', "sh", *command("copytask_nvar", *COPY)], cwd=tmp_path,
                          env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    folder, = (tmp_path / "saves" / "copytask_nvar").iterdir()
    assert len(records.log_rows(folder)) == 2
    assert records.read_result(folder)["updates"] == 4


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux")
def test_a_full_output_names_the_reason(tmp_path):
    def written_to(*arguments, cwd=tmp_path):
        with open("/dev/full", "w") as full:
            return subprocess.run(arguments, cwd=cwd, env=environment(), stdout=full, stderr=subprocess.PIPE, text=True,
                                  timeout=120, check=False)
    done = written_to(*command("copytask_nvar", *COPY))
    assert done.returncode == 128 + signal.SIGPIPE
    sentence, = done.stderr.splitlines()
    assert "stopped and saved, because the output cannot be written (No space left on device); go on with" in sentence
    done = written_to(sys.executable, "-m", "evidence", "copytask", "--only", "expRNN none", cwd=ROOT)
    sentence, = done.stderr.splitlines()
    assert done.returncode == 1
    assert "No space left on device" in sentence


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGTERM"])
def test_what_a_scheduler_sends_saves(main, name):
    _, folder = main("copytask_nvar", *tiny("copytask_nvar"), stop_after=1, number=getattr(signal, name))
    assert torch.load(folder / "last.pt", weights_only=True)["parts"]["progress"]["update"] == 1


def test_the_first_report_makes_a_checkpoint(main, monkeypatch):
    """A run that is killed within its first minute goes on from there."""
    monkeypatch.setattr(run.Run, "finish", lambda *given: None)
    monkeypatch.setattr(run.Run, "stop_if_asked", lambda this: None)
    saved, save = [], records.save_tensors
    monkeypatch.setattr(records, "save_tensors", lambda path, content: saved.append((
        path.name, content.get("parts", {}).get("progress", {}).get("update"))) or save(path, content))
    main("copytask_nvar", *COPY, "--updates", "8")
    assert [update for name, update in saved if name == "last.pt"] == [2, 8]


@pytest.mark.parametrize("more", [60, 130])
def test_more_updates_of_a_finished_run(main, more):
    """It ends bit for bit as the run that was to be so long from its start; more values are kept than before."""
    typed = (*tiny("copytask_nvar"), "--log-interval", "70")
    _, folder = main("copytask_nvar", *typed)
    assert main("copytask_nvar", "--resume", folder, "--updates", more)[0]["updates"] == more
    _, whole = main("copytask_nvar", *typed, "--updates", more)
    one, other = (plain(torch.load(f / "last.pt", weights_only=True)["parts"]) for f in (folder, whole))
    assert one == other
    assert plain(records.read_result(folder)) == plain(records.read_result(whole))
    entry = records.read_config(folder)["options"]["updates"]
    assert entry == {"value": more, "origin": "typed on resume"}
    again, _ = main("copytask_nvar", "--resume", folder)                      # it knows by now how long it is
    assert again == json.loads((folder / "result.json").read_text())


def test_more_epochs_of_a_finished_run(main, few_images):
    typed = ("--nhid", "6", "--batch", "5", "--threads", "1", "--net-type", "expRNN")
    _, folder = main("sMNIST_nvar", *typed, "--epochs", "2")
    main("sMNIST_nvar", "--resume", folder, "--epochs", "5")
    _, whole = main("sMNIST_nvar", *typed, "--epochs", "5")
    assert_same_run(folder, whole)


def test_a_run_that_was_killed_on_its_way_to_more(main, finished):
    """config.json has the new number and the result is of the old one."""
    entry = {"value": 6, "origin": "typed on resume"}
    changed(finished / "config.json", lambda config: config["options"].update(updates=entry))
    assert main("copytask_nvar", "--resume", finished)[0]["updates"] == 6


def test_fewer_than_reached(main, finished):
    before = (finished / "result.json").read_bytes()
    with pytest.raises(UserError, match=r"--updates is 4 in .* and cannot become 3"):
        main("copytask_nvar", "--resume", finished, "--updates", "3")
    assert (finished / "result.json").read_bytes() == before


def test_records_without_checkpoints_are_left_alone(main, finished):
    """A finished run whose checkpoints were not copied along: its log is not begun again."""
    (finished / "last.pt").unlink()
    log = (finished / "log.csv").read_bytes()
    main("copytask_nvar", "--resume", finished)
    with pytest.raises(UserError, match=r"last\.pt is missing"):
        main("copytask_nvar", "--resume", finished, "--updates", "6")
    assert (finished / "log.csv").read_bytes() == log
    assert records.read_result(finished)["updates"] == 4


@pytest.mark.parametrize(("net", "promises"), [("expRNN", True), ("nnRNN", True), ("RNN", False), ("LSTM", False)])
def test_orthogonality_stands_in_the_log(main, net, promises):
    _, folder = main("copytask_nvar", *COPY, "--net-type", net, "--nvar", "none")
    rows = records.log_rows(folder)
    assert all(("orthogonality_error" in row) == promises for row in rows)
    if promises:
        model, _ = module_of("copytask_nvar").load(folder)
        p = model.network.cell.rotation().double()
        assert model.network.cell.rotation.error() == pytest.approx(
            (p @ p.t() - torch.eye(len(p))).abs().max().item(), abs=3e-7)
        assert all(row["orthogonality_error"] < 1e-5 for row in rows)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("script", ["copytask_nvar", "sMNIST_alpha", "language_expalpha"])
def test_evaluate(main, few_images, penn_folder, capsys, script):
    """The scores of the log and of the result, and no file that changes."""
    typed = [*tiny(script), *(("--batch", "5") if task_of(script) == "sMNIST" else ())]
    typed += [*(("--data", penn_folder) if task_of(script) == "language" else ())]
    _, folder = main(script, *typed, stop_after=2)
    if task_of(script) != "copytask":                                          # no epoch has ended
        with pytest.raises(UserError, match="has no best weights yet"):
            main(script, "--evaluate", folder)
    result, _ = main(script, "--resume", folder)
    before = contents(folder)
    scores, _ = main(script, "--evaluate", folder)
    with pytest.raises(UserError, match=r"--nhid is 8 in .* and cannot become 3"):
        main(script, "--evaluate", folder, "--nhid", "3")
    assert contents(folder) == before
    if task_of(script) == "copytask":
        assert scores.keys() == {"validation"}
        assert 0 < scores["validation"][0] < 5
    else:
        assert scores["validation"][1] == pytest.approx(result["validation_accuracy"])
        assert scores["test"] == pytest.approx((result["test_loss"], result["test_accuracy"]))
        (folder / "result.json").unlink()
        assert main(script, "--evaluate", folder)[0].keys() == {"validation"}     # the test is for the end
        assert "its test score is worked out once" in capsys.readouterr().out


def sampled(capsys, main, *typed):
    capsys.readouterr()
    text, _ = main("language_nvar", "--evaluate", next(Path("saves/language_nvar").iterdir()), "--sample", *typed)
    assert capsys.readouterr().out == text + "\n"
    return text


def test_a_sample_is_the_text_that_was_drawn(main, capsys, monkeypatch):
    """Data goes out as it is; the corpus is not needed; the seed and a first text decide it."""
    text = "a\tb\u3000\xad_\x1b[1m\n" * 200
    Path("own.txt").write_text(text, encoding="utf-8")
    main("language_nvar", "--text", "own.txt", *tiny("language_nvar"), "--bptt", "7")
    Path("own.txt").unlink()
    one = sampled(capsys, main, "60")
    assert len(one) == 60
    assert set(one) == set(text)                               # 10 symbols, tiny model: all of them
    assert sampled(capsys, main, "60") == one != sampled(capsys, main, "60", "--seed", "1")
    long = "b\u3000" * 20
    assert sampled(capsys, main, "5", "--prompt", long).startswith(long)
    with pytest.raises(UserError, match="--prompt: 'z' is no symbol of the text"):
        sampled(capsys, main, "5", "--prompt", "abz")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    main("language_nvar", "--evaluate", next(Path("saves/language_nvar").iterdir()), "--sample", "60")
    assert capsys.readouterr().out == one.replace("\x1b", "\\x1b") + "\n"


def test_a_sample_of_the_penn_treebank_has_lines_and_blanks(main, penn_folder, capsys):
    main("language_nvar", "--data", penn_folder, *tiny("language_nvar"))
    text = sampled(capsys, main, "200", "--prompt", "the cat\n")
    assert text.startswith("the cat\n")
    assert "<eos>" not in text
    assert "_" not in text
    assert text.count(" ") > 1
    assert text.count("\n") > 1
    assert len(text) == 208


@pytest.mark.parametrize(("script", "typed", "sentence"), [
    ("copytask_nvar", ("--evaluate", "x", "--sample", "3"), "this task has none"),
    ("language_nvar", ("--sample", "3"), "--evaluate FOLDER"),
    ("sMNIST_nvar", ("--evaluate", "nowhere"), "is not a run's folder")])
def test_evaluate_is_refused(main, script, typed, sentence):
    with pytest.raises(UserError, match=sentence):
        main(script, *typed)


@pytest.mark.parametrize("script", sorted(path.name for path in FIXTURES.iterdir()))
def test_a_run_of_an_earlier_version_goes_on(main, few_images, penn_folder, tmp_path, capsys, script):
    """Written by commit d936e9f24cda and stopped half-way; expected.json is what that commit made of it."""
    folder = tmp_path / script
    shutil.copytree(FIXTURES / script, folder)
    expected = json.loads((folder / "expected.json").read_text())
    typed = ("--resume", folder, *(("--data", penn_folder) if task_of(script) == "language" else ()))
    if records.read_config(folder)["options"]["net_type"]["value"] == "LSTM":            # which computes something else
        with pytest.raises(UserError, match=r"last\.pt cannot be used .*go on with the version that it was"):
            main(script, *typed)
        assert "not as it was started: " in capsys.readouterr().out
        return
    result, _ = main(script, *typed)
    assert {name: result[name] for name in expected["result"]} == pytest.approx(expected["result"], abs=1e-5, rel=1e-5)
    rows = records.log_rows(folder)
    assert len(rows) == len(expected["log"])
    for row, wanted in zip(rows, expected["log"], strict=True):
        assert row.keys() - {"seconds"} == wanted.keys()
        for name, value in wanted.items():
            assert row[name] == (value if value is None else pytest.approx(value, abs=1e-5, rel=1e-5))


def test_the_earlier_runs_are_small_and_of_every_cell():
    nets = set()
    for folder in FIXTURES.iterdir():
        assert sum(path.stat().st_size for path in folder.iterdir()) <= 25_000
        nets.add(records.read_config(folder)["options"]["net_type"]["value"])
    assert nets == {"RNN", "RNN-Orth", "expRNN", "nnRNN", "LSTM"}
    assert {task_of(folder.name) for folder in FIXTURES.iterdir()} == {"copytask", "sMNIST", "language"}
