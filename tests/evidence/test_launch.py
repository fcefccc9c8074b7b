"""Runs that `python -m evidence --run` starts, watches and stops, and records that --collect brings together."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT, environment
from test_rows import row_of, write_run

from common.errors import UserError
from evidence import launch, pages, rows, table


def many_epochs(penn_folder, save):
    return ["language", "--only", "expRNN none", "--seeds", "400", "--save", str(save), "--data", str(penn_folder),
            "--with=--nhid 8 --batch 4 --bptt 20 --emsize 5 --epochs 100000", "--run"]


def is_free(folder):
    """Whether no process holds the lock of a run."""
    with open(folder / ".lock") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


@pytest.mark.skipif(os.name == "nt", reason="no such signals")
def test_a_signal_saves_every_run(tmp_path, penn_folder):
    """Typed as a person would; the exit status is that of the signal."""
    process = subprocess.Popen([sys.executable, "-m", "evidence", *many_epochs(penn_folder, tmp_path)], cwd=ROOT,
                               env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    limit = time.monotonic() + 60
    while not list(tmp_path.glob("*/*/best.pt")) and time.monotonic() < limit:
        time.sleep(0.1)
    process.send_signal(signal.SIGUSR1)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGUSR1
    assert "the same command goes on" in errors
    started, place, *_ = said.splitlines()
    assert started.startswith("started language_nvar.py --net-type expRNN")
    assert place == f"  writing to {tmp_path}/language_nvar/expRNN-none-bptt20-s400/log.csv"
    folder, = (tmp_path / "language_nvar").iterdir()
    assert (folder / "last.pt").exists()
    assert is_free(folder)                                                    # the run has ended too
    assert not (folder / "result.json").exists()


def test_no_run_is_left_behind_alone(tmp_path, monkeypatch, capsys, penn_folder):
    """Where run_all ends for a reason of its own, such as `| head` that reads no more."""
    def reader_is_gone(text, **named):
        if text.endswith(": done\n"):
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
    assert is_free(folder)
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


@pytest.mark.skipif(os.name == "nt", reason="no such signals")
@pytest.mark.parametrize("name", launch.STOPPING)
def test_a_run_that_could_not_save_has_failed(name, tmp_path, capsys):
    """Whatever the signal, the run is asked to stop; the exit status is that of the signal."""
    ready = tmp_path / "ready"
    code = f"import pathlib, signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit('disk full')); " \
           f"pathlib.Path({str(ready)!r}).touch(); time.sleep(60)"

    def stop_soon():
        while not ready.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), getattr(signal, name))

    threading.Thread(target=stop_soon).start()
    with pytest.raises(UserError, match="stopped") as stopped:
        launch.run_all([["-c", code], ["-c", "pass"]], 1)
    assert stopped.value.status == 128 + getattr(signal, name)
    said = capsys.readouterr().out
    assert "FAILED (disk full)" in said
    assert "pass" not in said                                                 # was never begun


def test_a_report_is_told_once_a_minute(monkeypatch, capsys):
    monkeypatch.setattr(launch, "TELL_SECONDS", 0.5)
    launch.run_all([["-c", "import time\nfor n in range(9): print('loss', n, flush=True); time.sleep(n == 0)"]], 1)
    assert "  loss 1\n" in (said := capsys.readouterr().out)
    assert "loss 2" not in said


def test_records_are_collected(tmp_path, capsys):
    source, target = tmp_path / "source", tmp_path / "target"
    row = row_of("copytask", "expRNN", "none")
    folder = write_run(source, row, 400, "update,loss,seconds\n4,1,2\n", {"loss": 3}, started="now", versions={})
    config = json.loads((folder / "config.json").read_text())
    config["argv"] = [str(tmp_path / "copytask_nvar.py"), "--data=/some/where/data", "--save", "results/runs"]
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("last.pt", "best.pt", "curves.png", ".lock"):
        (folder / name).write_bytes(b"x")
    pages.collect([source], target)
    copy, = target.glob("*/*")
    assert {path.name for path in copy.iterdir()} == {"config.json", "log.csv", "result.json"}
    assert json.loads((copy / "config.json").read_text())["argv"] == \
        ["copytask_nvar.py", "--data=data", "--save", "results/runs"]
    (folder / "result.json").write_text('{"loss": 1, "seconds": 2}')
    pages.collect([source], target)
    pages.collect([source], target)
    assert json.loads((copy / "result.json").read_text())["loss"] == 1         # it went on to more
    assert len(list(target.glob("*/*"))) == 1
    (copy / "config.json").write_text(json.dumps({**config, "started": "before"}))
    pages.collect([source], target)                                             # the name is taken
    assert {path.name for path in target.glob("*/*")} == {folder.name, f"{folder.name}-2"}
    assert [line.split(",")[0] for line in capsys.readouterr().out.splitlines()] == \
        ["1 new", "1 newer", "1 the same", "1 new"]


def test_of_records_with_the_same_options_the_tables_show_the_first_finished_one(tmp_path):
    row, target = row_of("copytask", "expRNN", "none"), tmp_path / "target"
    log = "update,loss,seconds\n4,nan,2\n"
    for started, result in (("first", None), ("second", dict(loss=0.5, recall=0.5)), ("third", dict(loss=9, recall=0))):
        write_run(tmp_path / started, row, 400, log, result, started=started, versions={})
        pages.collect([tmp_path / started], target)
    rows.find_runs([row], (400,), target)
    assert "0.5000, n = 1" in table.table([row])


def test_what_has_not_ended_is_not_collected(tmp_path, capsys):
    """But a run that diverged is."""
    row = row_of("copytask", "expRNN", "none")
    write_run(tmp_path / "source", row, 400)
    folder = write_run(tmp_path / "source", row, 401, "update,loss,seconds\n100,nan,1\n")
    place = tmp_path / "target" / folder.relative_to(tmp_path / "source")
    pages.collect([tmp_path / "source"], tmp_path / "target")
    assert capsys.readouterr().out == "1 new, 1 not finished, left out\n"
    assert {path.name for path in place.iterdir()} == {"config.json", "log.csv"}
    with pytest.raises(UserError, match="nowhere: no runs"):
        pages.collect([tmp_path / "nowhere"], tmp_path / "target")
