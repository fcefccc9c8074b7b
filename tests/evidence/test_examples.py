"""The examples that people are told to copy: the stair of the README, the task of examples/adding.py."""

import importlib.util
import json
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, environment

import common
from common.network import build_network
from evidence import pictures
from evidence.__main__ import main as tables

EXAMPLE = ROOT / "examples" / "adding.py"


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
def adding(monkeypatch):
    """examples/adding.py as a module."""
    spec = importlib.util.spec_from_file_location("adding", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "adding", module)
    spec.loader.exec_module(module)
    return module


def test_a_task_of_ones_own(adding, capsys, tmp_path):
    """It fits a page, learns, resumes bit for bit, and has a picture, a table and a sweep."""
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) <= 90
    typed = ["--threads", "1", "--save", str(tmp_path)]
    done = subprocess.run([sys.executable, EXAMPLE, *typed], cwd=tmp_path, env=environment(), text=True,
                          capture_output=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    whole = tmp_path / "adding" / "expRNN-expn-s400"
    assert json.loads((whole / "result.json").read_text())["loss"] < 1 / 60      # guessing has 1/6
    assert (whole / "curves.png").exists()
    adding.main([*typed, "--updates", "100", "--name", "part"])
    part = whole.with_name("expRNN-expn-s400-part")
    adding.main(["--resume", part])
    assert "this run is finished" in capsys.readouterr().out
    (loss,), = adding.main(["--evaluate", part]).values()
    assert capsys.readouterr().out.endswith(f"validation: loss {loss:.4f}\n")
    adding.main(["--resume", part, "--updates", "200"])
    assert log_of(part) == log_of(whole)[:5]
    adding.main([*typed, "--lr", "1e-2", "--updates", "50"])
    tables([str(EXAMPLE), "--save", str(tmp_path), "--seeds", "400"])
    table = capsys.readouterr().out
    assert table.count("| expn |") == 3
    assert "lr 0.01, updates 50 | expn |" in table
    pictures.main([*map(str, whole.parent.iterdir()), "-o", str(tmp_path / "compared.pdf")])
    tables([str(EXAMPLE), "--vary", "nhid", "4", "8", "--with=--updates 50", "--seeds", "400", "--run",
            "--save", str(tmp_path)])
    assert "| nhid 4 | nhid 8 |" in capsys.readouterr().out
    assert len(list(whole.parent.glob("*/result.json"))) == 5


def log_of(folder):
    lines = (folder / "log.csv").read_text().splitlines()
    return [line.rpartition(",")[0] for line in lines]                           # without the seconds


def test_the_contract_names_what_the_example_uses():
    contract = common.__doc__.partition("A task of your own")[2]
    source = EXAMPLE.read_text(encoding="utf-8")
    for name in re.findall(r"run\.(\w+)\(", contract):
        assert f"run.{name}(" in source or name == "epochs"
    for name in set(re.findall(r"\brun\.(\w+)\(", source)):
        assert f"run.{name}(" in contract
