"""benchmarks/gpu.sh: rehearsed on the CPU from start to end, and the commands that it types on a GPU."""

import os
import shutil
import subprocess
import sys
import tarfile

import pytest
from conftest import ROOT, environment

from benchmarks import __main__ as benchmarks
from evidence import rows, table

pytestmark = pytest.mark.skipif(shutil.which("bash") is None or shutil.which("timeout") is None, reason="no bash here")


@pytest.fixture
def gpu_sh(tmp_path, mnist_folder, penn_folder):
    """gpu_sh(minutes, **variables) → the process when it has ended, the summary's lines, what the archive holds."""
    data = tmp_path / "data"
    data.mkdir()
    os.symlink(mnist_folder / "MNIST", data / "MNIST")
    os.symlink(penn_folder / "pennchar", data / "pennchar")

    def run(minutes, **variables):
        given = {"PYTHON": sys.executable, "OUT": str(tmp_path / "out")}
        done = subprocess.run([ROOT / "benchmarks" / "gpu.sh", minutes, "data"], cwd=tmp_path, capture_output=True,
                              text=True, timeout=900, check=False, env={**environment(), **given, **variables})
        assert done.returncode == 0, done.stderr
        with tarfile.open(tmp_path / "out.tgz") as archive:
            return done, (tmp_path / "out" / "summary.txt").read_text().splitlines(), archive.getnames()
    return run


def test_a_rehearsal_from_start_to_end(gpu_sh, tmp_path):
    done, summary, names = gpu_sh("30", SMALL="1")
    assert [line.partition(": ")[0] for line in summary] == [
        "environment", "version", "tests", "benchmark psMNIST --engine torch",
        "benchmark characters --engine torch", "benchmark copying --engine torch", "row sMNIST sRNN (exponential) expn",
        "row language sRNN (exponential) expn"]
    parts = {path.name: path.read_text() for path in (tmp_path / "out").glob("*.txt") if path.name != "summary.txt"}
    assert len(parts) == len(summary)
    needed = [line for line in summary if not line.startswith("version")]
    assert all(": status 0 after" in line for line in needed), parts        # outside git there is no version
    assert parts["benchmark_characters___engine_torch.txt"].count("×") == 8
    results = [name for name in names if name.endswith("result.json")]
    assert len(results) == 2
    assert {f"out/{name}" for name in parts} < set(names)
    assert done.stdout.splitlines()[-1] == f"all of it: {tmp_path / 'out.tgz'}"


STAND_IN = """#!/usr/bin/env bash
printf '%s\\n' "$*" >> "$TYPED"
case "$2" in benchmarks) echo a failure >&2; exit 3;; pytest) kill -SEGV $$;; esac
"""


@pytest.fixture
def typed_by(gpu_sh, tmp_path, monkeypatch):
    """typed_by(minutes): the commands of python on a GPU, the summary, what the archive holds; another python runs."""
    def run(minutes):
        stand_in, typed = tmp_path / "python", tmp_path / "typed"
        stand_in.write_text(STAND_IN)
        stand_in.chmod(0o755)
        typed.touch()
        _, summary, names = gpu_sh(minutes, PYTHON=str(stand_in), TYPED=str(typed))
        return typed.read_text().splitlines(), summary, names
    return run


def test_a_part_that_fails_loses_only_itself(typed_by):
    typed, summary, names = typed_by("30")
    assert len(typed) == len(summary) - 1                               # one is git
    ended = {line.split()[0].rstrip(":"): line.partition(": ")[2].split(" after")[0] for line in summary}
    assert (ended["tests"], ended["benchmark"], ended["row"]) == ("status 139", "status 3", "status 0")
    assert "out/benchmark_psMNIST___engine_triton.txt" in names


def test_when_the_time_is_over_there_is_still_an_archive(typed_by):
    typed, summary, names = typed_by("1")                               # all of it is kept for the closing
    assert typed == []
    assert {line.partition(": ")[2] for line in summary} == {"no time was left"}
    assert "out/summary.txt" in names


def test_what_is_typed_on_a_gpu_exists(typed_by, monkeypatch):
    """Every command's own parser takes it, and every row is one."""
    typed, _, _ = typed_by("30")
    monkeypatch.setattr(benchmarks, "prepare_machine", lambda cuda, threads, tf32: exit_if(cuda))
    order = []
    for line in typed:
        _, module, *arguments = line.split(" ")
        if module == "benchmarks":
            with pytest.raises(SystemExit, match="on the GPU"):
                benchmarks.main(arguments)
        elif module == "evidence":
            before, _, after = line.partition(" --only ")
            name, _, after = after.partition(" --seeds ")
            task = before.split()[-1]
            assert [row.name for row in rows.select(rows.rows_of(task, []), [name])] == [name], line
            args = table.make_parser().parse_args([task, "--only", name, "--seeds", *after.split(" ")])
            assert args.run
            assert args.cuda
        order.append(module)
    first = {module: order.index(module) for module in order}
    assert sorted(first, key=first.get) == ["torch.utils.collect_env", "pytest", "benchmarks", "evidence"]


def exit_if(cuda):
    raise SystemExit("on the GPU" if cuda else "on the CPU")


@pytest.mark.parametrize("typed", [[], ["30"], ["x", "."], ["30", "no-such-folder"], ["-1", "."], ["1.5", "."]])
def test_what_is_typed_wrongly_is_one_line(tmp_path, typed):
    done = subprocess.run([ROOT / "benchmarks" / "gpu.sh", *typed], cwd=tmp_path, capture_output=True, text=True,
                          timeout=60, check=False)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
