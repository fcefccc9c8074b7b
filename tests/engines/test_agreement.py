"""On what a compiled engine is trusted: right numbers pass, wrong or changing ones do not, and `auto` obeys."""

from types import SimpleNamespace

import pytest
import torch

from common.recurrence import automatic, triton_engine
from common.recurrence.agreement import disagreement
from common.recurrence.torch_engine import sequence_recurrence
from common.stair import NONLINEARITIES, RULES, LearnedStair, Nonlinearity


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("phi", NONLINEARITIES)
@pytest.mark.parametrize("rule", RULES)
def test_a_right_engine_agrees(rule, phi, dtype):
    assert disagreement(sequence_recurrence, 9, 3, 19, rule, phi, dtype) is None


@pytest.mark.parametrize("spoil", ["x", "kernel", "h0", "numbers"])
def test_a_wrong_gradient_is_found(spoil):
    def wrong(x, kernel, h0, numbers, rule, phi, bias, last_only):
        given = dict(x=x, kernel=kernel, h0=h0, numbers=numbers)
        given[spoil] = 0.999 * given[spoil] + 0.001 * given[spoil].detach()     # right numbers, a gradient 0.1 % off
        return sequence_recurrence(*given.values(), rule, phi, bias, last_only)

    assert "is off by" in disagreement(wrong, 9, 3, 19, "scale", "modrelu", torch.float32)


def test_changing_bits_are_found():
    calls = []

    def changing(x, *given):
        calls.append(1)
        return sequence_recurrence(x * (1 + 1e-7 * (len(calls) % 2)), *given)

    assert "other bits" in disagreement(changing, 9, 3, 19, "scale", "modrelu", torch.float32)


@pytest.fixture
def on_gpu(monkeypatch):
    """`auto` on a GPU of one's own making, whose kernels are the PyTorch engine's on the CPU."""
    monkeypatch.setattr(triton_engine, "unavailable_reason", lambda device: None)
    monkeypatch.setattr(triton_engine, "capacity", lambda device: triton_engine.HOPPER)
    monkeypatch.setattr(triton_engine, "triton_recurrence", sequence_recurrence)
    monkeypatch.setattr(triton_engine, "disagreement", lambda *given: disagreement(*given[:-1], "cpu"))
    triton_engine.is_right.cache_clear()
    yield
    triton_engine.is_right.cache_clear()


def chosen(dtype=torch.float32, phi="modrelu"):
    x = SimpleNamespace(shape=(5, 3, 19), dtype=dtype, device=torch.device("cuda", 0))
    return automatic(x, LearnedStair(5), Nonlinearity(phi, 19))


@pytest.mark.usefixtures("on_gpu")
def test_auto_takes_kernels_that_agree():
    assert (chosen(), chosen(torch.float64), chosen(torch.float16)) == ("triton", "triton", "torch")


@pytest.mark.usefixtures("on_gpu")
def test_auto_leaves_wrong_kernels_and_says_so(monkeypatch, capsys):
    monkeypatch.setattr(triton_engine, "triton_recurrence", lambda *given: 1.01 * sequence_recurrence(*given))
    assert (chosen(), chosen()) == ("torch", "torch")
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("stair: running the PyTorch engine; triton: h is off by 1.0e-02 of its largest number")
