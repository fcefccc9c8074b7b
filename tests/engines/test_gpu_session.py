"""The session for somebody who has a GPU for half an hour, rehearsed on the CPU; what it asks for, in its order."""

import importlib.util
import os
import subprocess
import sys
import time

import pytest
from conftest import ROOT, environment

from benchmarks import gpu_session
from evidence import table


@pytest.fixture(scope="module")
def both_folders(tmp_path_factory, mnist_folder, penn_folder):
    """One data folder with MNIST and the characters."""
    folder = tmp_path_factory.mktemp("both")
    os.symlink(mnist_folder / "MNIST", folder / "MNIST")
    os.symlink(penn_folder / "pennchar", folder / "pennchar")
    return folder


def test_a_rehearsal_from_start_to_end(tmp_path, both_folders):
    command = [sys.executable, "-m", "benchmarks.gpu_session", "--rehearse", "--minutes", "0.5", "--rounds", "1",
               "--save", str(tmp_path), "--data", str(both_folders)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=280,
                          check=False)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert text.strip() == done.stdout.strip()
    parts = [line.removeprefix("## ").split(":")[0] for line in text.splitlines() if line.startswith("## ")]
    assert parts == ["Tests", "psMNIST", "characters", "copying", "Targets", "Rows"]
    assert "The triton engine is left out: the triton engine needs" in text
    verdicts = [line for line in text.splitlines() if line.startswith(("- reached", "- MISSED"))]
    assert len(verdicts) == 3 * 4
    ended = [line for line in text.splitlines() if line.startswith("- sRNN (exponential), expn: ")]
    assert [line.split(": ")[1].split(";")[0] for line in ended] == ["finished", "stopped"]
    finished, = tmp_path.glob("runs/language_nvar/*/result.json")

    rows = gpu_session.wanted_rows(rehearse=True)
    assert gpu_session.command_of(rows[0], tmp_path / "runs", [], 1) is None
    left = gpu_session.command_of(rows[1], tmp_path / "runs", [], 1)
    assert ("--resume" in left) == any(tmp_path.glob("runs/sMNIST_nvar/*"))  # a busy machine may not come to its start
    assert finished.exists()


def test_rows_most_valuable_first():
    rows = [(row.script.split("_")[0], row.model, row.stair) for row in gpu_session.wanted_rows(rehearse=False)]
    first = list(gpu_session.FIRST)
    assert rows[:10] == [("sMNIST", *pair) for pair in first] + [("language", *pair) for pair in first]
    assert len(set(rows)) == len(rows)
    assert len(rows) == len(table.rows_of("sMNIST", [])) * 2
    assert not any("300" in model for _, model, _ in rows)


@pytest.mark.parametrize("model", ["LSTM", "expRNN"])
def test_an_lstm_has_no_engine(tmp_path, model):
    row = next(r for r in gpu_session.wanted_rows(rehearse=False) if r.model == model)
    command = gpu_session.command_of(row, tmp_path, ["--cuda", "--engine", "triton"], 1)
    assert "--cuda" in command
    assert ("--engine" in command) == (model != "LSTM")
    row.options(gpu_session.SEED)                           # and it can be typed


def test_what_the_engine_is_trusted_for():
    host = "FAILED test_gpu.py::test_the_host_does_not_wait_for_a_training_step[torch-LSTM-copying] - RuntimeE..."
    sizes = "FAILED test_gpu.py::test_sizes[5-1-1-dtype0] - AssertionError"
    for status, said, expected in [(0, "100 passed", True), (1, host, True), (1, f"{host}\n{sizes}", False),
                                   (1, sizes, False), (1, "", False), (2, "ERROR test_gpu.py - Import", False)]:
        assert gpu_session.trusted(status, said)[0] == expected, said
    defined = (ROOT / "tests" / "engines" / "test_gpu.py").read_text(encoding="utf-8")
    assert all(f"def {name}(" in defined for name in gpu_session.ASIDE)


def test_an_error_without_words_has_a_name():
    assert gpu_session.first_line(AssertionError()) == "AssertionError"
    assert gpu_session.first_line(RuntimeError("CUDA error: launch failure\nmore")) == "CUDA error: launch failure"


def test_a_command_that_fails_is_told(tmp_path):
    ended = gpu_session.run_until([str(ROOT / "copytask_nvar.py"), "--nhid", "0"], time.monotonic() + 60)
    assert ended.startswith("failed (copytask_nvar.py: --nhid: '0' is not")


def test_without_a_gpu_is_one_sentence(tmp_path):
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu_session", "--save", str(tmp_path)], cwd=ROOT,
                          env=environment(), capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "torch sees no GPU" in done.stderr


BLOCKS = """
import torch
from benchmarks import gpu_session
gpu_session.SHAPES.update(gpu_session.TINY)
print(gpu_session.blocks("characters", 1, torch.device("cpu"), float("inf")))
print(gpu_session.blocks("characters", 1, torch.device("cpu"), 0.0))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_other_ways_to_cut_it():
    """The part of the session that a rehearsal leaves out, through Triton's interpreter."""
    done = subprocess.run([sys.executable, "-c", BLOCKS], cwd=ROOT, env={**environment(), "TRITON_INTERPRET": "1"},
                          capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith(("| ieee", "| tf32"))]
    assert sum("chosen" in line for line in lines) == 2
    assert "error" not in done.stdout.lower()
    assert done.stdout.count("The time is over") == 1
