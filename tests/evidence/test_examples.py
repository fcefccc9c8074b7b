"""The examples that people are told to copy: the stair of the README, the task of common/__init__.py."""

import re
import textwrap

import torch
from conftest import ROOT

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


def test_the_adding_problem_is_learned():
    code = textwrap.dedent(common.__doc__[common.__doc__.index("    import torch"):])
    assert len([line for line in code.splitlines() if line.strip()]) < 30
    torch.manual_seed(0)
    names = {}
    exec(code, names)
    with torch.no_grad():
        x, target = names["batch"](30, 1000)
        error = torch.nn.functional.mse_loss(names["model"](x), target).item()
    assert error < 1 / 12                                              # guessing has 1/6
