"""The native engine: the reference's numbers for every rule, nonlinearity and odd size, and a cache that cannot lie."""

import functools
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY

from common.copytask import CopyModel
from common.network import build_network, mean_cross_entropy
from common.orthogonal import skew_exponential, triangle, triangle_indices
from common.recurrence import native_build, native_engine, stair_recurrence, unavailable_reason
from common.recurrence.reference_engine import reference_recurrence
from common.stair import NONLINEARITIES, RULES, FixedStair, Nonlinearity

ROOT = Path(native_engine.__file__).resolve().parents[2]
REASON = native_engine._library(torch.float64)[1] or native_engine._library(torch.float32)[1]
run = native_build.Library.run
needs_compiler = pytest.mark.skipif(REASON is not None, reason=f"no native engine on this machine: {REASON}")
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
        runs.append(solve(native_engine.native_recurrence, given, rule, phi, False))
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
        h = native_engine.native_recurrence(x, kernel, h0, numbers, "scale", "tanh", None, False)
        grad_x, grad_kernel = torch.autograd.grad((h * torch.cos(h.detach())).sum(), (x, kernel))
        before = torch.cat((h0.unsqueeze(0), h[:-1])).detach().double().flatten(0, 1)
        assert_close([grad_kernel.double()], [before.t() @ grad_x.double().flatten(0, 1)],
                     1e-5 if dtype is torch.float32 else 1e-13)


@needs_compiler
def test_the_yardstick_counts_multiply_adds():
    """Twice the rounds are twice the operations. The least number of a stair, whatever its sign."""
    library = native_engine._library(torch.float32)[0]
    assert library.multiply_adds(2000) == 2 * library.multiply_adds(1000) > 0
    assert library.smallest(torch.tensor([0.5, -0.25, float("nan"), 3]).data_ptr(), 4) == 0.25


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


# ── the exponential, the read-out and its loss ───────────────────────────────────────────────────────────


def rotation_in_python(logarithm, size):
    upper = triangle(logarithm, triangle_indices(size), size)
    return skew_exponential(upper - upper.t())


def logarithm_of(size, norm, dtype=torch.float64):
    """The numbers of a dense S (size, size) with ‖S‖₂ = norm."""
    numbers = torch.randn(size * (size - 1) // 2, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    upper = triangle(numbers, triangle_indices(size), size)
    found = float(torch.linalg.matrix_norm(upper - upper.t(), 2))
    return (numbers * norm / max(found, 1e-30)).to(dtype).requires_grad_()


@needs_compiler
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
        assert_close(*(result if size > 1 else result[:1] for result in results), tolerance)


@needs_compiler
def test_gradcheck_of_the_exponential():
    assert torch.autograd.gradcheck(lambda numbers: native_engine.native_exponential(numbers, 5), logarithm_of(5, 2.0))


@needs_compiler
def test_an_exponential_that_is_not_finite_shows():
    for value in (float("nan"), float("inf"), 1e30):
        assert not native_engine.native_exponential(torch.tensor([0.1, value, 0.2]), 3).isfinite().all()


@needs_compiler
def test_same_bits_of_the_exponential_for_any_number_of_threads(monkeypatch):
    monkeypatch.setattr(native_engine, "WORK_PER_THREAD", 1)
    leaf, direction, runs = logarithm_of(70, 3.0, torch.float32), torch.randn(70, 70), []
    for threads in (1, 1, 2, 3, 16):
        torch.set_num_threads(threads)
        w = native_engine.native_exponential(leaf, 70)
        runs.append([w.detach(), *torch.autograd.grad(w, leaf, direction)])
    for found in runs[1:]:
        assert all(torch.equal(ours, first) for ours, first in zip(found, runs[0], strict=True))


@needs_compiler
@pytest.mark.parametrize("engine", ["auto", "native", "torch", "reference"])
def test_the_engine_decides_about_the_exponential(monkeypatch, engine):
    """--engine torch runs no compiled code; auto and native run the exponential in it."""
    ran = []

    def noted(library, name, call):
        ran.append(name)
        run(library, name, call)

    monkeypatch.setattr(native_build.Library, "run", noted)
    model = CopyModel(build_network("nnRNN", 4, 6, FixedStair("n", 5), "modrelu", "henaff", "xavier", engine), 3)
    mean_cross_entropy(model(torch.randint(4, (5, 2))), torch.randint(3, (5, 2))).backward()
    compiled = {"square", "exponential", "exponential_backward"}
    assert compiled & set(ran) == (compiled if engine in ("auto", "native") else set())


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
    for file in folder.iterdir():
        assert (file.suffix, file.stat().st_mode & 0o777) == (".so", 0o700)  # no temporary file stays


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
    """The library for float32 at `path`."""
    return native_build._load(path, functools.partial(native_engine._agrees, dtype=torch.float32))


@needs_compiler
def test_no_damaged_library_is_loaded(tmp_path, built):
    healthy = next(built[0].iterdir())
    code = healthy.read_bytes()
    assert load(healthy)
    file = tmp_path / healthy.name
    for damaged in (b"", code[:-1], code + b"x", code[:5000] + bytes([code[5000] ^ 1]) + code[5001:]):
        file.write_bytes(damaged)
        with pytest.raises(native_build.Unavailable, match="damaged"):
            load(file)
    with pytest.raises(native_build.Unavailable, match="does not load"):
        load(tmp_path / "missing-0-0.so")


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


def compile_into(folder, name, code):
    """A library of the C++ source `code`, named as the cache names one → its path."""
    source, made = folder / "source.cpp", folder / "made.so"
    source.write_text(code)
    subprocess.run([*native_build._compiler(), "-shared", "-fPIC", source, "-o", made], check=True)
    source.unlink()
    made.chmod(0o700)
    return made.rename(folder / f"{name}-{native_build._digest(made)}.so")


ENTRIES = ('extern "C" { ' + "".join(f"int stair_{name}(void *) {{ return 0; }} " for name in native_build.PASSES) +
           "double stair_smallest(void *, long) { return 1; } double stair_multiply_adds(long) { return 0; } }\n")


@needs_compiler
def test_a_library_that_computes_something_else(tmp_path):
    """Healthy bytes under the right name that give other numbers do not pass."""
    made = compile_into(tmp_path, "float-0", ENTRIES)
    assert native_build.Library(made)
    with pytest.raises(native_build.Unavailable, match="does not give the numbers of the PyTorch engine"):
        load(made)


@needs_compiler
def test_a_library_that_does_not_load(tmp_path):
    for code in ("int x;\n", 'extern "C" int nowhere(); int x = nowhere();\n'):  # no entries; a symbol that is nowhere
        with pytest.raises(native_build.Unavailable, match=r"does not load: .*(stair_forward|nowhere)"):
            load(compile_into(tmp_path, "float-0", code))


# ── a cache that somebody else can write to ──────────────────────────────────────────────────────────────


def plant(folder, built, name="mark"):
    """A library in `folder`, under the right name, that leaves a mark when it is loaded → (file, mark)."""
    mark = folder.parent / name
    key = next(built[0].iterdir()).stem.rpartition("-")[0]
    return compile_into(folder, key, f'#include <cstdio>\nstatic FILE *mark = fopen("{mark}", "w");\n{ENTRIES}'), mark


@pytest.fixture
def cache_folder(tmp_path):
    folder = tmp_path / "stair-rnn"
    folder.mkdir()
    return folder


@needs_compiler
def test_only_libraries_of_our_own_are_loaded(tmp_path, cache_folder, built, expected):
    """Writable by others, by a group, of another user, a link: none is loaded, all go, and the engine is built."""
    planted = {name: plant(cache_folder, built, name) for name in ("open", "group", "link", "foreign")}
    assert native_build.Library(plant(cache_folder, built, "own")[0])
    assert (tmp_path / "own").exists()  # as every mark below would, were its library loaded
    planted["open"][0].chmod(0o707)
    planted["group"][0].chmod(0o770)
    link = planted["link"][0]
    link.symlink_to(link.rename(tmp_path / link.name))
    if os.getuid() == 0:  # only root can make a file of another user
        os.chown(planted["foreign"][0], 12345, 12345)
    else:
        planted.pop("foreign")[0].unlink()
    engine, total, lines = finish(start(tmp_path))
    assert (engine, lines) == ("native", [])
    assert total == pytest.approx(expected, rel=1e-5)
    for file, mark in planted.values():
        assert not mark.exists()
        assert not file.is_symlink()
        assert not file.exists()


@needs_compiler
def test_an_open_cache_of_our_own_is_tightened(tmp_path, built):
    folder = tmp_path / "stair-rnn"
    shutil.copytree(built[0], folder)
    folder.chmod(0o777)
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert finish(start(tmp_path))[::2] == ("native", [])
    assert folder.stat().st_mode & 0o777 == 0o755
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before  # used, not built again


@needs_compiler
@pytest.mark.parametrize("how", ["a folder of another user", "an open folder above"])
def test_a_cache_that_others_can_replace(tmp_path, cache_folder, built, expected, how):
    """Nothing is loaded from it; the engine is compiled for this process alone, and a line says so."""
    file, mark = plant(cache_folder, built)
    place = tmp_path if how == "an open folder above" else cache_folder
    if place == tmp_path:
        tmp_path.chmod(0o777)
    elif os.getuid() == 0:
        os.chown(cache_folder, 12345, 12345)
    else:
        pytest.skip("only root can make a folder of another user")
    engine, total, lines = finish(start(tmp_path))
    assert (engine, lines) == ("native", ["stair: the native engine was compiled for this process alone, because "
                                          f"others can write to {place}"])
    assert total == pytest.approx(expected, rel=1e-5)
    assert file.exists()
    assert not mark.exists()


@needs_compiler
def test_an_open_folder_above_with_the_sticky_bit(tmp_path, built):
    """As /tmp: everybody can add to it, nobody can replace what another made."""
    shutil.copytree(built[0], tmp_path / "stair-rnn")
    tmp_path.chmod(0o1777)
    assert finish(start(tmp_path))[::2] == ("native", [])


@pytest.mark.skipif(getattr(os, "getuid", int)() != 0 or os.name == "nt", reason="only root can make folders of others")
@pytest.mark.parametrize(("owner", "group", "mode", "is_safe"), [
    (0, 0, 0o755, True), (native_build.UNMAPPED, 0, 0o755, True), (12345, 0, 0o755, False), (0, 0, 0o757, False),
    (0, 7, 0o775, False), (0, 0, 0o775, True), (0, 0, 0o1777, True)])
def test_who_can_replace_a_folder(tmp_path, cache_folder, owner, group, mode, is_safe):
    tmp_path.chmod(mode)
    os.chown(tmp_path, owner, group)
    assert native_build._writable_by_others(cache_folder) == (None if is_safe else tmp_path)


@needs_compiler
def test_a_cache_that_cannot_be_written(tmp_path, expected):
    (tmp_path / "file").write_text("")
    engine, total, lines = finish(start(tmp_path / "file"))
    assert (engine, lines) == ("native", ["stair: the native engine was compiled for this process alone, because "
                                          f"{tmp_path / 'file' / 'stair-rnn'} cannot be written to (Not a directory)"])
    assert total == pytest.approx(expected, rel=1e-5)


@needs_compiler
@pytest.mark.skipif(not hasattr(os, "ST_NOEXEC"), reason="this system does not tell how a disk is mounted")
def test_a_disk_that_runs_no_program(monkeypatch, capsys, tmp_path):
    """A cache on it is left for a temporary folder; where that lies on such a disk too, the reason is this one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native_build.say_once.cache_clear()
    disks = [tmp_path]
    monkeypatch.setattr(os, "statvfs", lambda folder: SimpleNamespace(
        f_flag=os.ST_NOEXEC if any(disk in folder.parents for disk in disks) else 0))
    assert native_build.load_or_build(torch.float32, lambda library: True)
    reason = f"no program may be run from {tmp_path / 'stair-rnn'}, which is mounted noexec"
    assert capsys.readouterr().err.endswith(f"for this process alone, because {reason}\n")
    disks.append(Path(tempfile.gettempdir()))
    with pytest.raises(native_build.Unavailable, match=r"no program may be run from .*, which is mounted noexec"):
        native_build.load_or_build(torch.float32, lambda library: True)


# ── compilers that are none ──────────────────────────────────────────────────────────────────────────────

WRITES_TEXT = '#!/bin/sh\nfor last; do :; done\n[ "$last" = --version ] || echo text > "$last"\n'


@pytest.mark.parametrize(("environment", "reason"), [
    ({"PATH": ""}, "no C++ compiler found"),
    ({"CXX": "no-such-compiler"}, "CXX is 'no-such-compiler', which is not a program"),
    ({"CXX": '""'}, "CXX is '\"\"', which is not a program"),
    ({"CXX": "g++ '"}, "CXX is 'g++ '', which is not a command: no closing quotation"),
    ({"CXX": "g++ \\"}, "CXX is 'g++ \\', which is not a command: no escaped character"),
    ({"CXX": "false"}, "'false' could not compile native.cpp: exit status 1"),
    ({"CXX": "true"}, "'true' could not compile native.cpp: it wrote no library"),
    ({"CXX": "SCRIPT"}, "'SCRIPT --version' failed"),
    ({"CXX": "SCRIPT"}, "the compiled library does not load"),
])
def test_without_a_usable_compiler(tmp_path, expected, environment, reason):
    """One line with the reason that happened, and the PyTorch engine."""
    if environment.get("CXX") == "SCRIPT":  # a file that no system can run, or one that writes something else
        script = tmp_path / "compiler"
        script.write_text("\0" if "--version" in reason else WRITES_TEXT)
        script.chmod(0o700)
        environment, reason = {"CXX": str(script)}, reason.replace("SCRIPT", str(script))
    engine, total, lines = finish(start(tmp_path, **environment))
    assert engine == "torch"
    assert total == pytest.approx(expected, rel=1e-5)
    line, = lines
    assert line.startswith(f"stair: running the PyTorch engine, the native one is not available: {reason}")


@needs_compiler
def test_available_where_it_was_built():
    assert unavailable_reason("native", torch.device("cpu")) is None


@pytest.mark.parametrize("compiler", ["no-such-compiler", "g++ '", "false"])
def test_asked_for_by_name_without_a_compiler(tmp_path, compiler):
    """A run with --engine native ends in one sentence, before it makes a folder."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "CXX": compiler}
    done = subprocess.run([sys.executable, ROOT / "copytask_nvar.py", *TINY["copytask"], "--engine", "native",
                           "--save", "saves"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    sentence, = done.stderr.splitlines()
    assert sentence.startswith("copytask_nvar.py: the native engine is not available: ")
    assert compiler in sentence
    assert sentence.endswith("choose the engine torch, which needs no compiler")
    assert not (tmp_path / "saves").exists()
