"""The native engine: the reference's numbers for every rule, nonlinearity and odd size, and a cache that cannot lie."""

import functools
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.recurrence import native_build, native_engine, stair_recurrence
from common.recurrence.reference_engine import reference_recurrence
from common.stair import NONLINEARITIES, RULES, FixedStair, Nonlinearity

ROOT = Path(native_engine.__file__).resolve().parents[2]
WHY_NOT = native_engine._library(torch.float64)[1] or native_engine._library(torch.float32)[1]
needs_compiler = pytest.mark.skipif(WHY_NOT is not None, reason=f"no native engine on this machine: {WHY_NOT}")
CASES = list(itertools.product(RULES, NONLINEARITIES))
SIZES = [(1, 1, 1), (2, 3, 7), (2, 13, 65), (33, 3, 7), (33, 10, 65), (2, 10, 190), (33, 1, 190)]  # T, B, H


def problem(rule, phi, steps, batch, hidden, dtype=torch.float64):
    """x, W, h0, numbers, b: numbers negative (logn's ρ_0) and 0 among them; the literal rule stays in its bounds."""
    random = torch.Generator().manual_seed(1000 * steps + 10 * hidden + batch)

    def leaf(*shape, scale=1.0, shift=0.0):
        made = torch.randn(shape, generator=random, dtype=torch.float64) * scale + shift
        return made.to(dtype).requires_grad_()

    numbers = leaf(steps, scale=0.3, shift=0.7) if rule == "scale" else leaf(steps, scale=0.05, shift=0.3)
    with torch.no_grad():
        numbers[0] = -0.4427 if rule == "scale" else 0.2
        if steps > 1:
            numbers[1] = 0
    bias = leaf(hidden, scale=0.1) if phi == "modrelu" else None
    size = 0.3 if rule == "literal" else 0.8
    return [leaf(steps, batch, hidden, scale=size), leaf(hidden, hidden, scale=size / hidden**0.5),
            leaf(batch, hidden, scale=0.5), numbers, bias]


def solve(engine, given, rule, phi, last_only):
    """Value and gradients of a weighted sum of the result."""
    h = engine(*given[:4], rule, phi, given[4], last_only)
    weight = torch.linspace(-1, 2, h.numel(), dtype=h.dtype).view(h.shape)
    leaves = [t for t in given if t is not None and t.requires_grad]
    return [h.detach(), *torch.autograd.grad((h * weight).sum(), leaves)]


def assert_close(found, expected, tolerance):
    """Relative to the largest number of each tensor."""
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs.isfinite().all()
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))


# ── the reference's numbers ──────────────────────────────────────────────────────────────────────────────


@needs_compiler
@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize(("rule", "phi"), CASES)
def test_equals_reference(rule, phi, last_only):
    for sizes in SIZES:
        given = problem(rule, phi, *sizes)
        expected = solve(reference_recurrence, given, rule, phi, last_only)
        assert_close(solve(native_engine.native_recurrence, given, rule, phi, last_only), expected, 1e-10)
        with torch.no_grad():
            h = native_engine.native_recurrence(*given[:4], rule, phi, given[4], last_only)
        assert_close([h], expected[:1], 1e-10)


@needs_compiler
@pytest.mark.parametrize(("rule", "phi"), CASES)
def test_float32(rule, phi):
    """Both engines in float32, against the reference in float64; units near modReLU's threshold may flip there."""
    given = problem(rule, phi, 12, 5, 37, torch.float32)
    if phi == "modrelu":
        given[4] = torch.full_like(given[4], 0.01, requires_grad=True)  # b > 0: no threshold away from z = 0
    wide = [None if t is None else t.detach().double().requires_grad_() for t in given]
    expected = [t.float() for t in solve(reference_recurrence, wide, rule, phi, False)]
    assert_close(solve(native_engine.native_recurrence, given, rule, phi, False), expected, 3e-5)


@needs_compiler
@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize(("rule", "phi"), CASES)
def test_gradcheck(rule, phi, last_only):
    given = problem(rule, phi, 3, 2, 5)
    with torch.no_grad():
        given[3].abs_()  # a slope at 0 is one-sided for |z|, not for α

    def run(*leaves):
        bias = leaves[4] if len(leaves) == 5 else None
        return native_engine.native_recurrence(*leaves[:4], rule, phi, bias, last_only)

    assert torch.autograd.gradcheck(run, [t for t in given if t is not None], eps=1e-7, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("phi", NONLINEARITIES)
@pytest.mark.parametrize("scale", [1e-300, 1e-12, 1e-3, 1.0, 40.0, 800.0])
def test_small_and_large_arguments(phi, scale):
    """exp and expm1 keep their relative accuracy where e^v − 1 cancels, vanishes or overflows."""
    x = (scale * torch.linspace(-1, 1, 64, dtype=torch.float64)).view(1, 1, 64)
    zeros, numbers = torch.zeros(1, 64, dtype=torch.float64), torch.tensor([0.9], dtype=torch.float64)
    bias = torch.full((64,), 0.01, dtype=torch.float64) if phi == "modrelu" else None
    for rule in RULES:
        expected = reference_recurrence(x, torch.zeros(64, 64).double(), zeros, numbers, rule, phi, bias, False)
        found = native_engine.native_recurrence(x, torch.zeros(64, 64).double(), zeros, numbers, rule, phi, bias, False)
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-290, equal_nan=True)


@needs_compiler
@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize("chunk", [1, 60, 100])
def test_states_formed_again_in_chunks(monkeypatch, chunk, last_only):
    monkeypatch.setattr(native_engine, "CHUNK_ELEMENTS", chunk)
    given = problem("exponential", "tanh", 9, 3, 10)
    expected = solve(reference_recurrence, given, "exponential", "tanh", last_only)
    assert_close(solve(native_engine.native_recurrence, given, "exponential", "tanh", last_only), expected, 1e-10)


@needs_compiler
@pytest.mark.parametrize("numbers", [[0.0] * 4, [0.5, 0.0, 1e-200, -0.3]])
def test_vanishing_numbers(numbers):
    """Where ρ_t is 0, h says nothing about z, and the gradient of ρ_t still has to be right."""
    for phi in NONLINEARITIES:
        given = problem("scale", phi, 4, 3, 7)
        given[3] = torch.tensor(numbers, dtype=torch.float64, requires_grad=True)
        expected = solve(reference_recurrence, given, "scale", phi, False)
        assert expected[4].abs().min() > 0
        solved = solve(native_engine.native_recurrence, given, "scale", phi, False)
        for ours, theirs in zip(solved, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@needs_compiler
@pytest.mark.parametrize("rule", RULES)
def test_only_what_is_needed(rule):
    """Gradients of any subset of the inputs, and None for the others."""
    whole = problem(rule, "modrelu", 3, 2, 5)
    expected = solve(reference_recurrence, whole, rule, "modrelu", False)[1:]
    for wanted in itertools.product([False, True], repeat=5):
        if not any(wanted):
            continue
        given = [t.detach().clone().requires_grad_(w) for t, w in zip(whole, wanted, strict=True)]
        found = solve(native_engine.native_recurrence, given, rule, "modrelu", False)[1:]
        assert_close(found, [e for e, w in zip(expected, wanted, strict=True) if w], 1e-10)


@needs_compiler
@pytest.mark.parametrize("last_only", [False, True])
def test_strides(last_only):
    """Transposed, expanded and sliced inputs and gradients."""
    x, kernel, h0, numbers, bias = (t.detach() for t in problem("scale", "modrelu", 5, 4, 9))
    kinds = [x.transpose(0, 1).contiguous().transpose(0, 1), x[..., :1].expand_as(x),
             x.permute(2, 0, 1).contiguous().permute(1, 2, 0), torch.stack([x, x], -1)[..., 0]]
    for other in kinds:
        given = [t.requires_grad_() for t in (other.detach(), kernel.t(), h0[:1].expand_as(h0),
                                              torch.stack([numbers, numbers], 1)[:, 0], bias[:1].expand_as(bias))]
        expected = solve(reference_recurrence, given, "scale", "modrelu", last_only)
        assert_close(solve(native_engine.native_recurrence, given, "scale", "modrelu", last_only), expected, 1e-10)
        h = native_engine.native_recurrence(*given[:4], "scale", "modrelu", given[4], last_only)
        expected = reference_recurrence(*given[:4], "scale", "modrelu", given[4], last_only)
        assert_close(torch.autograd.grad(h.sum(), given), torch.autograd.grad(expected.sum(), given), 1e-10)


@needs_compiler
@pytest.mark.parametrize(("rule", "phi"), CASES)
def test_same_bits_for_any_number_of_threads(monkeypatch, rule, phi):
    monkeypatch.setattr(native_engine, "WORK_PER_THREAD", 1)
    given = problem(rule, phi, 6, 13, 70, torch.float32)
    runs = []
    for threads in (1, 1, 2, 3, 16):
        torch.set_num_threads(threads)
        found = solve(native_engine.native_recurrence, given, rule, phi, False)
        del found[2]  # dW comes from torch's matrix product
        runs.append(found)
    for found in runs[1:]:
        assert all(torch.equal(ours, first) for ours, first in zip(found, runs[0], strict=True))


@needs_compiler
def test_without_openmp(monkeypatch):
    """Threads of our own, where torch's runtime cannot be found."""
    monkeypatch.setattr(native_engine, "WORK_PER_THREAD", 1)
    given = problem("exponential", "modrelu", 6, 13, 70)
    expected = solve(native_engine.native_recurrence, given, "exponential", "modrelu", False)
    monkeypatch.setattr(native_build, "openmp_parallel", lambda: None)
    torch.set_num_threads(3)
    assert_close(solve(native_engine.native_recurrence, given, "exponential", "modrelu", False), expected, 1e-14)


@needs_compiler
@pytest.mark.parametrize("rule", RULES)
def test_backward_twice(rule):
    given = problem(rule, "tanh", 4, 3, 8)[:4]
    h = native_engine.native_recurrence(*given, rule, "tanh", None, False)
    first = torch.autograd.grad(h.sum(), given, retain_graph=True)
    second = torch.autograd.grad(h.sum(), given)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@needs_compiler
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("rule", "phi"), CASES)
def test_what_is_not_finite_shows(rule, phi, value):
    given = [None if t is None else t.detach() for t in problem(rule, phi, 3, 2, 20)]
    given[0][1, 0, 3] = value
    expected = reference_recurrence(*given[:4], rule, phi, given[4], False)
    found = native_engine.native_recurrence(*given[:4], rule, phi, given[4], False)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10, equal_nan=True)


@needs_compiler
def test_modrelu_at_zero():
    """sign(0) = 0: no value and no gradient at z = 0, even where b > 0."""
    given = [torch.zeros(1, 1, 20), torch.eye(20), torch.zeros(1, 20), torch.ones(1), torch.full((20,), 0.5)]
    given = [t.requires_grad_() for t in given]
    for rule in RULES:
        found = solve(native_engine.native_recurrence, given, rule, "modrelu", False)
        assert all(not t.any() for t in (found[0], found[1], found[5]))


@needs_compiler
def test_errors():
    x, kernel, h0, numbers, bias = (t.detach() for t in problem("scale", "modrelu", 2, 2, 3))
    with pytest.raises(ValueError, match="all alike"):
        native_engine.native_recurrence(x.float(), kernel, h0, numbers, "scale", "modrelu", bias, False)
    with pytest.raises(ValueError, match="does not fit"):
        native_engine.native_recurrence(x, kernel, h0, numbers[:1], "scale", "modrelu", bias, False)
    with pytest.raises(ValueError, match="needs a bias"):
        native_engine.native_recurrence(x, kernel, h0, numbers, "scale", "modrelu", None, False)


@needs_compiler
@pytest.mark.parametrize("rule", ["scale", "exponential"])
def test_memory(monkeypatch, rule):
    """At the peak h and one more such array; the output is dropped before backward, as a model drops it."""
    steps, batch, hidden = 400, 16, 64
    array = steps * batch * hidden * 4
    given = problem(rule, "tanh", steps, batch, hidden, torch.float32)[:4]
    with torch.no_grad():
        given[3][1] = 0.5
    gradient = torch.ones(steps, batch, hidden)
    monkeypatch.setattr(native_engine, "CHUNK_ELEMENTS", 2**15)
    with torch.profiler.profile(profile_memory=True) as profile:
        h = native_engine.native_recurrence(*given, rule, "tanh", None, False)
        edge = torch.autograd.graph.get_gradient_edge(h)
        del h
        torch.autograd.backward((edge,), (gradient,))
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert array < peak < 2.25 * array


# ── the library and its cache, in fresh processes ────────────────────────────────────────────────────────

RUN = """
import sys, torch
from common.recurrence import native_engine, stair_recurrence
from common.stair import FixedStair, Nonlinearity
h = stair_recurrence(torch.ones(3, 2, 4), torch.eye(4), torch.zeros(2, 4), FixedStair("n", 3), Nonlinearity("tanh", 4))
h = stair_recurrence(torch.ones(3, 2, 4), torch.eye(4), torch.zeros(2, 4), FixedStair("n", 3), Nonlinearity("tanh", 4))
print("native" if native_engine._library(torch.float32)[0] else "torch", float(h.sum()))
"""


def start(cache, **environment):
    inherited = {name: value for name, value in os.environ.items() if name != "CXX" or "CXX" in environment}
    return subprocess.Popen([sys.executable, "-c", RUN], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env={**inherited, "XDG_CACHE_HOME": str(cache), **environment})


def finish(process):
    """→ (engine, sum of h, the lines on stderr)"""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    engine, total = out.split()
    return engine, float(total), err.splitlines()


@pytest.fixture(scope="module")
def expected():
    x, kernel, h0 = torch.ones(3, 2, 4), torch.eye(4), torch.zeros(2, 4)
    return float(stair_recurrence(x, kernel, h0, FixedStair("n", 3), Nonlinearity("tanh", 4), "reference").sum())


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A cache that two processes filled at the same time → (folder, what they printed)."""
    cache = tmp_path_factory.mktemp("cache")
    processes = [start(cache), start(cache)]
    return cache / "stair-rnn", [finish(process) for process in processes]


@needs_compiler
def test_two_processes_build_at_once(built, expected):
    folder, results = built
    for engine, total, lines in results:
        assert (engine, lines) == ("native", [])
        assert total == pytest.approx(expected, rel=1e-5)
    assert all(file.suffix == ".so" for file in folder.iterdir())  # no temporary file stays


@needs_compiler
def test_a_damaged_library_is_built_again(tmp_path, built, expected):
    folder = tmp_path / "stair-rnn"
    shutil.copytree(built[0], folder)
    for file in folder.iterdir():
        file.write_bytes(file.read_bytes()[:5000])
    engine, total, lines = finish(start(tmp_path))
    assert (engine, lines) == ("native", [])
    assert total == pytest.approx(expected, rel=1e-5)
    healthy, = folder.iterdir()
    assert native_build._digest(healthy) == healthy.stem.rpartition("-")[2]


def load(path):
    """The library for float32 at `path`, or None."""
    return native_build._load(path, functools.partial(native_engine._agrees, dtype=torch.float32))


@needs_compiler
def test_no_damaged_library_is_loaded(tmp_path, built):
    healthy = next(built[0].iterdir())
    code = healthy.read_bytes()
    assert load(healthy)
    for damaged in (b"", code[:-1], code + b"x", code[:5000] + bytes([code[5000] ^ 1]) + code[5001:]):
        file = tmp_path / healthy.name
        file.write_bytes(damaged)
        assert load(file) is None
    assert load(tmp_path / "missing-0-0.so") is None


@needs_compiler
def test_the_key_tells_everything_apart(monkeypatch, tmp_path):
    """A library of another source, compiler, processor, flag or dtype has another name."""
    compiler = native_build._compiler()
    keys = [native_build._key(compiler, torch.float32), native_build._key(compiler, torch.float64),
            native_build._key([*compiler, "-O1"], torch.float32)]
    assert native_build._key(compiler, torch.float32) == keys[0]
    changed = tmp_path / "native.cpp"
    changed.write_text(native_build.SOURCE.read_text() + "// changed\n")
    for name, value in (("SOURCE", changed), ("FLAGS", native_build.FLAGS[:-1]), ("_processor", lambda: "another")):
        with monkeypatch.context() as patch:
            patch.setattr(native_build, name, value)
            keys.append(native_build._key(compiler, torch.float32))
    assert len(set(keys)) == len(keys)


@needs_compiler
def test_a_library_that_computes_something_else(tmp_path, built):
    """Healthy bytes under the right name that give other numbers do not pass."""
    source = tmp_path / "other.cpp"
    source.write_text('extern "C" { int stair_forward(void *) { return 0; } int stair_backward(void *) { return 0; } '
                      "int stair_states(void *) { return 0; } }\n")
    made = tmp_path / "other.so"
    subprocess.run([*native_build._compiler(), "-shared", "-fPIC", source, "-o", made], check=True)
    named = tmp_path / f"float-0-{native_build._digest(made)}.so"
    made.rename(named)
    assert native_build.Library(named)
    assert load(named) is None


@pytest.mark.parametrize("environment", [{"CXX": "no-such-compiler"}, {"PATH": ""}])
def test_without_a_compiler(tmp_path, expected, environment):
    engine, total, lines = finish(start(tmp_path, **environment))
    assert engine == "torch"
    assert total == pytest.approx(expected, rel=1e-5)
    assert len(lines) == 1
    assert "native" in lines[0]
    assert environment.get("CXX", "no C++ compiler found") in lines[0]


def test_a_compiler_that_fails(tmp_path, expected):
    engine, total, lines = finish(start(tmp_path, CXX="false"))
    assert (engine, len(lines)) == ("torch", 1)
    assert total == pytest.approx(expected, rel=1e-5)


@needs_compiler
def test_a_cache_that_cannot_be_written(tmp_path, expected):
    (tmp_path / "file").write_text("")
    engine, total, lines = finish(start(tmp_path / "file"))
    assert (engine, lines) == ("native", [])
    assert total == pytest.approx(expected, rel=1e-5)
