"""The examples that people are told to copy: the stair of the README, the task of examples/adding.py."""

import json
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, environment

import common
from common.network import build_network


def test_the_stair_of_the_readme():
    """It runs with whatever engine `auto` takes, and learns nothing itself."""
    code, = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    names = {}
    exec(code, names)
    network = build_network("expRNN", 3, 8, names["Falling"](5), "none", rinit="cayley", iinit="xavier")
    x = torch.randn(5, 2, 3)
    h, _ = network(x)
    z = network.cell.project(x)
    assert torch.allclose(h[0], z[0])                                  # 1 at the first step, ½ at the last
    assert torch.allclose(h[4], 0.5 * (z[4] + h[3] @ network.kernel()), atol=1e-6)
    assert not list(network.stair.parameters())


@pytest.fixture
def adding(tmp_path):
    """Run examples/adding.py as a user types it, or another command of the project, in a folder of runs."""
    def run(*arguments):
        done = subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, env=environment(), text=True,
                              capture_output=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def script(*typed):
        return run("examples/adding.py", *typed, "--threads", "1", "--save", tmp_path)

    script.run, script.folder = run, tmp_path / "adding"
    return script


def test_a_task_of_ones_own(adding):
    """It fits a page, learns, resumes bit for bit, and has a picture, a table and a sweep."""
    assert len((ROOT / "examples" / "adding.py").read_text(encoding="utf-8").splitlines()) <= 90
    adding()
    whole = adding.folder / "expRNN-expn-s400"
    assert json.loads((whole / "result.json").read_text())["loss"] < 1 / 60      # guessing has 1/6
    assert (whole / "curves.png").exists()
    adding("--updates", "100", "--name", "part")
    part = adding.folder / "expRNN-expn-s400-part"
    assert "this run is finished" in adding("--resume", part)
    adding("--resume", part, "--updates", "1000")
    assert log_of(part) == log_of(whole)
    adding("--lr", "1e-2")
    table = adding.run("-m", "evidence", "examples/adding.py", "--save", adding.folder.parent, "--seeds", "400")
    assert table.count("| expn |") == 2
    assert "lr 0.01 | expn |" in table
    adding.run("-m", "evidence.pictures", *adding.folder.iterdir(), "-o", adding.folder / "compared.pdf")
    sweep = adding.run("-m", "evidence", "examples/adding.py", "--vary", "nhid", "4", "8", "--with=--updates 50",
                       "--seeds", "400", "--run", "--save", adding.folder.parent)
    assert "| nhid 4 | nhid 8 |" in sweep
    assert len(list(adding.folder.glob("*/result.json"))) == 5


def log_of(folder):
    lines = (folder / "log.csv").read_text().splitlines()
    return [line.rpartition(",")[0] for line in lines]                           # without the seconds


def test_the_contract_names_what_the_example_uses():
    contract = common.__doc__.partition("A task of your own")[2]
    source = (ROOT / "examples" / "adding.py").read_text(encoding="utf-8")
    for name in re.findall(r"run\.(\w+)\(", contract):
        assert f"run.{name}(" in source or name == "epochs"
    for name in set(re.findall(r"\brun\.(\w+)\(", source)):
        assert f"run.{name}(" in contract
