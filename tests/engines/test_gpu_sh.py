"""benchmarks/gpu.sh: what it types on a GPU. Another program in the place of python keeps the list."""

import os
import re
import shutil
import subprocess
import sys
import tarfile

import pytest
from conftest import ROOT, environment

from benchmarks.__main__ import make_parser
from evidence import rows, table

pytestmark = pytest.mark.skipif(shutil.which("bash") is None or shutil.which("timeout") is None, reason="no bash here")
SCRIPT = ROOT / "benchmarks" / "gpu.sh"


def call(folder, *typed, **variables):
    return subprocess.run([SCRIPT, *typed], cwd=folder, capture_output=True, text=True, timeout=900, check=False,
                          env={**environment(), "OUT": str(folder / "out"), **variables})


STAND_IN = """#!/usr/bin/env bash
[[ $2 == *"sys.exit(not torch.cuda"* ]] && exit 0
printf '%s\\n' "${*//$'\\n'/ }" >> "$TYPED"
case "$2" in benchmarks) echo a failure >&2; exit 3;; pytest) kill -SEGV $$;; esac
"""


@pytest.fixture
def typed_by(tmp_path):
    """typed_by(minutes): the commands of python on a GPU, the summary's lines, what the archive holds."""
    def run(minutes):
        for name in ("python", "ncu"):
            (tmp_path / name).write_text(STAND_IN)
            (tmp_path / name).chmod(0o755)
        (tmp_path / "typed").touch()
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        done = call(tmp_path, minutes, ".", PYTHON=str(tmp_path / "python"), TYPED=str(tmp_path / "typed"), PATH=path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == f"all of it: {tmp_path / 'out.tgz'}"
        with tarfile.open(tmp_path / "out.tgz") as archive:
            names = archive.getnames()
        summary = (tmp_path / "out" / "summary.txt").read_text().splitlines()
        return (tmp_path / "typed").read_text().splitlines(), summary, names
    return run


def test_what_is_worth_most_comes_first(typed_by):
    """A part that fails loses only itself. Every command's own parser takes it, every test and every row is one."""
    typed, summary, names = typed_by("30")
    parts = [re.split(": (?=status|no time)", line) for line in summary]
    order = [" ".join(name.split()[:3]) for name, _ in parts]
    assert order[:13] == [
        "environment", "version", "agreement 100 512", "agreement 10 128", "benchmark psMNIST --engine",
        "benchmark copying --engine", "tests 200_repetitions or", "agreement 128 1024", "benchmark characters --engine",
        "benchmark psMNIST --engine", "benchmark copying --engine", "benchmark characters --engine",
        "tests not (200_repetitions"]
    assert order[13:17] == ["agreement 100 512", "agreement 100 512", "benchmark psMNIST --engine", "profile"]
    assert all(name.startswith("row ") for name in order[17:])
    assert len(typed) == len(summary) - 1                               # one is git
    how = {name.split()[0]: how.split(" after")[0] for name, how in parts}
    assert (how["tests"], how["benchmark"], how["row"]) == ("status 139", "status 3", "status 0")
    assert "out/benchmark_psMNIST___engine_triton.txt" in names
    tests = (ROOT / "tests" / "engines" / "test_gpu.py").read_text(encoding="utf-8")
    for line in typed:
        _, module, *arguments = line.split(" ")
        if module == "benchmarks":
            assert make_parser().parse_args(arguments).cuda
        elif module == "evidence":
            task, name, after = re.fullmatch(r"-m evidence (\w+) --only (.+) --seeds (.+)", line).groups()
            assert [row.name for row in rows.select(rows.rows_of(task, []), [name])] == [name], line
            args = table.make_parser().parse_args([task, "--only", name, "--seeds", *after.split(" ")])
            assert args.run
            assert args.cuda
        elif module == "pytest":
            for name in re.findall(r"\w+_\w+", line.partition(" -k ")[2]):
                assert re.search(rf"def test_\w*{name}", tests), name
        elif line.startswith("-c"):
            compile(line[3:].replace("is_right raise", "is_right\nraise"), "typed", "exec")


def test_the_limits_fit_into_nine_minutes():
    """First numbers within six minutes, and the tests that show races within eight, however slow all is."""
    text = re.sub("; (?=part|agreement)", "\n", SCRIPT.read_text(encoding="utf-8"))
    limit = int(re.search(r"^agreement\(\) { part (\d+)", text, re.MULTILINE)[1])
    seconds = []
    for line in re.findall(r"^ *(?:part|tests|agreement|for task in [\w ]+; do bench) .*", text, re.MULTILINE):
        tasks = re.search(r"in ([\w ]+); do bench (\d+)", line)
        seconds.append(len(tasks[1].split()) * int(tasks[2]) if tasks else
                       limit if "agreement" in line else int(line.split()[1]))
    assert sum(seconds[:5]) <= 360
    assert sum(seconds[:6]) <= 480


def test_when_the_time_is_over_there_is_still_an_archive(typed_by):
    typed, summary, names = typed_by("1")                               # all of it is kept for the closing
    assert typed == []
    assert {re.split(": (?=no time)", line)[1] for line in summary} == {"no time was left"}
    assert "out/summary.txt" in names


@pytest.mark.parametrize("typed", [[], ["30"], ["x", "."], ["30", "no-such-folder"], ["-1", "."], ["1.5", "."]])
def test_what_is_typed_wrongly_is_one_line(tmp_path, typed):
    done = call(tmp_path, *typed)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("python", ["no-such-python", sys.executable])
def test_without_python_or_gpu_it_stops_at_once(tmp_path, python):
    done = call(tmp_path, "30", ".", PYTHON=python)
    assert done.returncode == 2
    line, = done.stderr.splitlines()
    assert f"{python} is no program with a torch that sees a GPU" in line
    assert list(tmp_path.iterdir()) == []
