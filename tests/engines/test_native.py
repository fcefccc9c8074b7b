"""The native engine: what is its own. Its numbers beside the reference's are in test_recurrence.py."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY, environment
from problems import FORMULAS, problem, worst

from common.network import build_network
from common.orthogonal import skew_exponential, triangle, triangle_indices
from common.recurrence import ENGINES, agreement, native_engine, unavailable_reason
from common.recurrence.reference_engine import reference_recurrence
from common.stair import NONLINEARITIES, RULES, FixedStair

REASON = unavailable_reason("native", torch.device("cpu"))
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no native engine on this machine: {REASON}")
native = ENGINES["native"]


def same_bits(first: dict, other: dict) -> bool:
    return all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("phi", NONLINEARITIES)
@pytest.mark.parametrize("scale", [1e-300, 1e-12, 1e-3, 1.0, 40.0, 800.0])
def test_small_and_large_arguments(phi, scale):
    """exp and expm1 keep their relative accuracy where e^v − 1 cancels, vanishes or overflows."""
    x = (scale * torch.linspace(-1, 1, 64, dtype=torch.float64)).view(1, 1, 64)
    zeros, numbers = torch.zeros(1, 64, dtype=torch.float64), torch.tensor([0.9], dtype=torch.float64)
    bias = torch.full((64,), 0.01, dtype=torch.float64) if phi == "modrelu" else None
    for rule in RULES:
        expected = reference_recurrence(x, torch.zeros(64, 64).double(), zeros, numbers, rule, phi, bias, False)
        found = native(x, torch.zeros(64, 64).double(), zeros, numbers, rule, phi, bias, False)
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-290, equal_nan=True)


@pytest.mark.parametrize("chunk", [1, 60, 100])
def test_states_formed_again_in_chunks(monkeypatch, chunk):
    monkeypatch.setattr(native_engine, "CHUNK_ELEMENTS", chunk)
    for last_only in (False, True):
        assert worst(native, problem("exponential", "tanh", 9, 3, 10), "exponential", "tanh", last_only) < 1e-12


@pytest.mark.parametrize("numbers", [[0.0] * 4, [0.5, 0.0, 1e-200, -0.3]])
@pytest.mark.parametrize("phi", NONLINEARITIES)
def test_vanishing_numbers(phi, numbers):
    """Where ρ_t is 0, h says nothing about z, and the gradient of ρ_t still has to be right."""
    given = problem("scale", phi, 4, 3, 7)
    given[3] = torch.tensor(numbers, dtype=torch.float64, requires_grad=True)
    expected, found = (agreement.solve(engine, given, "scale", phi, False) for engine in (reference_recurrence, native))
    assert expected["numbers"].abs().min() > 0
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("rule", "phi"), FORMULAS)
def test_same_bits_for_any_number_of_threads(monkeypatch, rule, phi):
    monkeypatch.setattr(native_engine, "WORK_PER_THREAD", 1)
    given, runs = problem(rule, phi, 6, 13, 70, torch.float32), []
    for threads in (1, 1, 2, 3, 16):
        torch.set_num_threads(threads)
        runs.append(agreement.solve(native, given, rule, phi, False))
    assert all(same_bits(runs[0], other) for other in runs[1:])


WITHOUT_OPENMP = """
import ctypes, torch
from common.recurrence import agreement, native_engine
find, ctypes.CDLL = ctypes.CDLL, lambda name, *given, **named: name and find(name, *given, **named)
torch.set_num_threads(3)
native_engine.WORK_PER_THREAD = 1
given = agreement.problem(6, 13, 70, "exponential", "modrelu", torch.float64, "cpu")
case = given, "exponential", "modrelu", False
print(max(agreement.errors(agreement.solve(native_engine.native_recurrence, *case), *case).values()) < 1e-13)
"""


def test_without_openmp():
    """Threads of our own, where torch's runtime cannot be found."""
    done = subprocess.run([sys.executable, "-c", WITHOUT_OPENMP], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("steps", "batch", "hidden"), [(30, 10, 128), (70, 9, 150), (9, 70, 300)])
def test_gradient_of_w_over_several_stretches(steps, batch, hidden, dtype):
    """More steps × examples than are packed at a time, with rows fetched ahead (H ≤ 256) and without."""
    generator = torch.Generator().manual_seed(0)
    x, kernel, h0 = (torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_() for shape in
                     ((steps, batch, hidden), (hidden, hidden), (batch, hidden)))
    with torch.no_grad():
        kernel *= 0.5 / hidden**0.5
    numbers = torch.linspace(0.5, 0.9, steps, dtype=dtype)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        h = native(x, kernel, h0, numbers, "scale", "tanh", None, False)
        grad_x, grad_kernel = torch.autograd.grad((h * torch.cos(h.detach())).sum(), (x, kernel))
        before = torch.cat((h0.unsqueeze(0), h[:-1])).detach().double().flatten(0, 1)
        expected = before.t() @ grad_x.double().flatten(0, 1)
        error = (grad_kernel - expected).abs().max() / expected.abs().max()
        assert error < (1e-5 if dtype is torch.float32 else 1e-13)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("rule", "phi"), FORMULAS)
def test_what_is_not_finite_shows(rule, phi, value):
    given = [None if t is None else t.detach() for t in problem(rule, phi, 3, 2, 20)]
    given[0][1, 0, 3] = value
    expected = reference_recurrence(*given[:4], rule, phi, given[4], False)
    found = native(*given[:4], rule, phi, given[4], False)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10, equal_nan=True)


def test_modrelu_at_zero():
    """sign(0) = 0: no value and no gradient at z = 0, even where b > 0."""
    given = [torch.zeros(1, 1, 20), torch.eye(20), torch.zeros(1, 20), torch.ones(1), torch.full((20,), 0.5)]
    given = [t.requires_grad_() for t in given]
    for rule in RULES:
        found = agreement.solve(native, given, rule, "modrelu", False)
        assert not any(found[name].any() for name in ("h", "x", "bias"))


def test_what_does_not_fit_is_one_sentence():
    x, kernel, h0, numbers, bias = (t.detach() for t in problem("scale", "modrelu", 2, 2, 3))
    for told, given in (("all alike", (x.float(), kernel, h0, numbers, "scale", "modrelu", bias)),
                        ("needs tensors of the shapes", (x, kernel, h0, numbers[:1], "scale", "modrelu", bias)),
                        ("modrelu needs tensors", (x, kernel, h0, numbers, "scale", "modrelu", None))):
        with pytest.raises(ValueError, match=told):
            native(*given, False)


def rotation_in_python(logarithm, size):
    upper = triangle(logarithm, triangle_indices(size), size)
    return skew_exponential(upper - upper.t())


def logarithm_of(size, norm, dtype=torch.float64):
    """The numbers of a dense S (size, size) with ‖S‖₂ = norm."""
    numbers = torch.randn(size * (size - 1) // 2, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    upper = triangle(numbers, triangle_indices(size), size)
    found = float(torch.linalg.matrix_norm(upper - upper.t(), 2))
    return (numbers * norm / max(found, 1e-30)).to(dtype).requires_grad_()


@pytest.mark.parametrize("norm", [0.0, 1e-9, 0.05, 1.0, 3.14, 40.0])
@pytest.mark.parametrize("size", [1, 2, 3, 17, 64, 100, 129])
def test_the_exponential_equals_the_one_in_python(size, norm):
    direction = torch.randn(size, size, dtype=torch.float64)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        leaf, results = logarithm_of(size, norm, dtype), []
        for form in (rotation_in_python, native_engine.native_exponential):
            w = form(leaf, size)
            assert w.dtype == dtype
            results.append([w.detach(), *torch.autograd.grad((w * direction.to(dtype)).sum(), leaf)])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_an_exponential_that_is_not_finite_shows():
    for value in (float("nan"), float("inf"), 1e30):
        assert not native_engine.native_exponential(torch.tensor([0.1, value, 0.2]), 3).isfinite().all()


def test_same_bits_of_the_exponential_for_any_number_of_threads(monkeypatch):
    monkeypatch.setattr(native_engine, "WORK_PER_THREAD", 1)
    leaf, direction, runs = logarithm_of(70, 3.0, torch.float32), torch.randn(70, 70), []
    for threads in (1, 1, 2, 3, 16):
        torch.set_num_threads(threads)
        w = native_engine.native_exponential(leaf, 70)
        runs.append([w.detach(), *torch.autograd.grad(w, leaf, direction)])
    for found in runs[1:]:
        assert all(torch.equal(ours, first) for ours, first in zip(found, runs[0], strict=True))


@pytest.mark.parametrize("engine", ["auto", "native", "torch", "reference"])
def test_the_engine_decides_about_the_exponential(engine):
    """--engine torch runs no compiled code; auto and native run the exponential in it, with last digits of its own."""
    network = build_network("expRNN", 4, 60, FixedStair("n", 5), "modrelu", "henaff", "xavier", engine)
    rotation = network.cell.rotation
    compiled, plain = native_engine.native_exponential(rotation.logarithm, 60), skew_exponential(rotation.skew())
    assert not torch.equal(compiled, plain)
    assert torch.equal(network.kernel(), compiled if engine in ("auto", "native") else plain)


@pytest.mark.parametrize(("body", "told"), [
    ("{ return 0; }", "with rule scale and nonlinearity none h is off by "),
    ("{ __builtin_trap(); }", "it ended with signal ")])
def test_a_library_that_is_wrong_costs_no_run(tmp_path, body, told):
    """A compiler that makes another program of native.cpp: the run says so in a line and takes the PyTorch engine."""
    names = ("forward", "backward", "kernel_gradient", "square", "exponential", "exponential_backward")
    entries = "".join(f"long stair_{name}(...) {body} " for name in names)
    (tmp_path / "wrong.cpp").write_text(f'extern "C" {{ {entries} }}')
    script = tmp_path / "compiler"
    script.write_text(f'#!/bin/sh\nfor last; do :; done\nexec c++ -shared -fPIC {tmp_path}/wrong.cpp -o "$last"\n')
    script.chmod(0o700)
    done = subprocess.run([sys.executable, ROOT / "copytask_nvar.py", *TINY["copytask"]], cwd=tmp_path, text=True,
                          env={**environment(), "CXX": str(script), "XDG_CACHE_HOME": str(tmp_path / "cache")},
                          capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("stair: running")]
    assert len(lines) == 1
    before = "stair: running the PyTorch engine, the native one is not available: the compiled library is not right: "
    assert lines[0].startswith(before + told)
    assert [path.name for path in (tmp_path / "cache" / "stair-rnn").iterdir()] == ["lock"]


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_asked_for_by_name_without_a_compiler(tmp_path, compiler):
    """A run with --engine native ends in one sentence, before it makes a folder."""
    env = {**environment(), "XDG_CACHE_HOME": str(tmp_path / "cache"), "CXX": compiler}
    done = subprocess.run([sys.executable, ROOT / "copytask_nvar.py", *TINY["copytask"], "--engine", "native",
                           "--save", "saves"], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    sentence = done.stderr.splitlines()[-1]
    assert sentence.startswith("copytask_nvar.py: the native engine is not available: ")
    assert compiler in sentence
    assert sentence.endswith("choose the engine torch, which needs no compiler")
    assert not (tmp_path / "saves").exists()
