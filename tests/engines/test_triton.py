"""The triton engine without a GPU: its arithmetic through Triton's interpreter, its kernels compiled for sm_90.

Compiling shows that the kernels fit (registers, shared memory) and that what synchronises them stands in the order that
it must; that it works, and how fast, only a GPU can show (test_gpu.py).
"""

import collections
import contextlib
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, module_of, tiny

from common.errors import UserError
from common.recurrence import native_build, stair_recurrence, triton_engine, unavailable_reason
from common.recurrence.triton_engine import HOPPER, make_plans
from common.stair import FixedStair, Nonlinearity

MISSING = importlib.util.find_spec("triton") is None
needs_triton = pytest.mark.skipif(MISSING, reason="triton is not installed (requirements-dev.txt names it)")


@needs_triton
def test_equals_the_float64_reference():
    """Groups of cases, told in interpreted.py. In float64, whose errors hide nothing."""
    for group, cases in interpreted("float64", "formulas", "sizes", "loops", "gradients", "layouts", "not_finite"):
        assert len(cases) >= 4
        wrong = {case: found for case, found in cases.items() if not max(found.values()) < 1e-13}
        assert not wrong, group


@needs_triton
def test_in_float32():
    """The gate lets it pass, at its own number of steps. And tf32 rounds.

    A tensor core cuts bits off, always towards 0, so that a state would wither over the steps: the kernels round.
    """
    (_, gate), (_, norms) = interpreted("float32", "gate", "tensor_cores")
    assert list(gate) == ["passed"]
    assert norms["rounded"]["norm"] < 0.01
    assert norms["left to the core"]["norm"] > 0.04


def interpreted(dtype: str, *groups: str):
    """Pairs: a group and its cases. In one process, because Triton takes seconds to start."""
    program = ROOT / "tests" / "engines" / "interpreted.py"
    done = subprocess.run([sys.executable, program, dtype, *groups], capture_output=True, text=True, timeout=600,
                          check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout).items()


SHAPES = [(10, 128), (100, 512), (128, 1024)]                                           # B, H of the three tasks
MODES = [(torch.float32, "ieee"), (torch.float32, "tf32"), (torch.float64, "ieee")]


class NoGPU:
    """As much of a GPU's driver as Triton asks before it compiles."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Runs the engine as on a GPU, but for the launches: compiled(x, W, h0, numbers, …) → the kernels, by name."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(triton_engine, "unavailable_reason", lambda device: None)
    monkeypatch.setattr(triton_engine, "interpreted", lambda: False)
    kernels, run = {}, JITFunction.run

    def only_compile(kernel, *given, grid, warmup, **named):
        made = run(kernel, *given, grid=grid, warmup=True, **named)
        kernels.setdefault(kernel.__name__, made)
        return made

    def made(given, rule, phi, last_only):
        h = triton_engine.triton_recurrence(*given[:4], rule, phi, given[4], last_only)
        if h.requires_grad:
            torch.autograd.grad(h, [t for t in given if t is not None], torch.ones_like(h))
        return kernels

    monkeypatch.setattr(JITFunction, "run", only_compile)
    for kernel in (triton_engine._kernels().forward, triton_engine._kernels().backward):   # a GPU's own, if any
        monkeypatch.setattr(kernel, "device_caches", collections.defaultdict(kernel.create_binder))
    triton_engine.make_plans.cache_clear()
    driver.set_active(NoGPU())
    yield made
    with contextlib.suppress(RuntimeError):             # there is no other
        driver.reset_active()
    triton_engine.make_plans.cache_clear()


def leaves(batch, hidden, dtype, steps=2):
    """x, W, h0, numbers, b."""
    shapes = ((steps, batch, hidden), (hidden, hidden), (batch, hidden), (steps,), (hidden,))
    return [torch.zeros(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def resources(compiled, folder) -> dict:
    """Registers, bytes of stack (spilled registers) and shared memory, as the binary says."""
    import triton

    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    told = subprocess.run([tool, "-res-usage", binary], capture_output=True, text=True, check=True).stdout
    found = {name: int(re.search(rf"{name}:(\d+)", told)[1]) for name in ("REG", "STACK", "LOCAL")}
    return {**found, "SHARED": compiled.metadata.shared}


def events(ptx: str) -> list[str]:
    """What the kernel does to memory that others see, in the order of the program text."""
    kinds = {r"ld\.acquire\.gpu": "acquire", r"red\.release\.gpu": "release", r"bar\.sync": "barrier",
             r"\btrap;": "trap", r"ld\.global\S*\.cg": "load h", r"ld\.global": "load", r"st\.global": "store"}
    found = (next((kind for pattern, kind in kinds.items() if re.search(pattern, line)), None)
             for line in ptx.splitlines())
    return [kind for kind in found if kind]


@needs_triton
@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(("dtype", "precision"), MODES)
@pytest.mark.parametrize(("batch", "hidden"), SHAPES)
def test_compiles_for_hopper(compiled, monkeypatch, tmp_path, batch, hidden, dtype, precision):
    """No spilled registers, the shared memory that the plan foresees, the synchronisation in its order."""
    monkeypatch.setattr(triton_engine, "precision", lambda dtype: precision)
    plan = make_plans(batch, hidden, dtype, precision, *HOPPER)[0]
    assert plan.resident
    assert plan.parts * plan.groups <= HOPPER[0]
    kernels = compiled(leaves(batch, hidden, dtype), "scale", "modrelu", False)
    assert kernels.keys() == {"forward", "backward"}
    for kernel in kernels.values():
        used = resources(kernel, tmp_path)
        assert used["STACK"] <= spilled_at_most(), used
        assert used["LOCAL"] == 0
        assert used["SHARED"] <= plan.shared <= HOPPER[1]
        assert used["REG"] * 32 * plan.warps <= triton_engine.REGISTERS
        assert kernel.metadata.launch_cooperative_grid == plan.waits
        assert kernel.metadata.num_stages == 1
        check_order(kernel.asm["ptx"], plan.waits)


@needs_triton
@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(("rule", "phi", "last_only", "wanted"), [
    ("exponential", "modrelu", False, True), ("literal", "tanh", True, True), ("scale", "sigmoid", True, False),
    ("exponential", "relu", False, False)])
def test_every_formula_compiles(compiled, rule, phi, last_only, wanted):
    given = leaves(3, 19, torch.float32)
    if phi != "modrelu":
        given[4] = None
    for t in filter(torch.is_tensor, given):
        t.requires_grad_(wanted)
    kernels = compiled(given, rule, phi, last_only)
    assert len(kernels) == 1 + wanted
    # A GPU's plain maximum of NaN and 0 is 0, which the interpreter's is not: what blows up would look like silence.
    assert not any(re.search(r"\bmax\.f\d", kernel.asm["ptx"]) for kernel in kernels.values())


def spilled_at_most() -> int:
    """Bytes: none. Triton 3.6 and 3.9 leave a few numbers of a step at H 1024 out of the registers."""
    import triton
    return 0 if triton.__version__.startswith("3.7.") else 64


def check_order(ptx: str, waits: bool) -> None:
    """store, barrier, release; acquire within its bound, barrier, load."""
    order = events(ptx)
    if not waits:
        assert not {"acquire", "release", "trap"} & set(order)
        after = order[order.index("store", order.index("load h")):]
        assert next(kind for kind in after if kind != "store") == "barrier"             # before the next step's loads
        return
    assert [order.count(kind) for kind in ("acquire", "trap", "release")] == [1, 1, 1]
    acquire, release = order.index("acquire"), order.index("release")
    loads = [i for i, kind in enumerate(order) if kind == "load h"]
    assert loads
    assert order[acquire:acquire + 3] == ["acquire", "trap", "barrier"]
    assert acquire + 2 < min(loads)
    assert max(loads) < release
    assert order[release - 1] == "barrier"
    stores = [i for i, kind in enumerate(order[:release]) if kind == "store"]
    assert stores
    assert min(stores) > max(loads)
    assert max(stores) == release - 2


@pytest.mark.parametrize(("dtype", "precision"), MODES)
@pytest.mark.parametrize("machine", [HOPPER, (114, 227 * 1024), (108, 163 * 1024), (24, 99 * 1024)])
def test_plans_cover_and_fit(machine, dtype, precision):
    programs, shared = machine
    for batch in (1, 3, 10, 17, 100, 128, 1000):
        for hidden in (1, 5, 19, 37, 128, 190, 256, 500, 512):
            plans = make_plans(batch, hidden, dtype, precision, programs, shared)
            assert 1 <= len(plans) <= 4
            for plan in plans:
                assert plan.shared <= shared
                assert plan.parts * plan.columns >= hidden
                assert plan.chunks * plan.slices * triton_engine.DEPTH >= hidden
                assert plan.blocks * plan.rows >= batch
                assert plan.groups <= plan.blocks
                assert plan.parts * plan.groups <= programs or not plan.resident
                assert 4 <= plan.warps <= 16


@pytest.mark.parametrize(("batch", "hidden", "programs", "shared", "most"), [
    (128, 1024, 108, 163, 48), (128, 1024, 114, 227, 48), (128, 1024, 132, 227, 32), (128, 1386, 132, 227, 48),
    (100, 722, 132, 227, 12), (100, 512, 132, 227, 8), (100, 512, 114, 227, 8), (100, 512, 108, 163, 8),
    (10, 128, 132, 227, 4)])
def test_the_busiest_program_does_little(batch, hidden, programs, shared, most):
    """Rows of a step on an A100, an H100 by PCIe and an H100; no row block is lower than it has to be for that."""
    first, *others = make_plans(batch, hidden, torch.float32, "ieee", programs, shared * 1024)
    assert first.busiest <= most
    assert all(plan.rows < first.rows or plan.busiest > first.busiest for plan in others)


def test_rows_far_apart_are_copied():
    """The kernels count inside a step in 32 bits."""
    near = torch.empty(2, 3, 8, device="meta").transpose(0, 1)
    far = torch.empty(2**34, device="meta").as_strided((2, 4, 8), (8, 2**30, 1))
    assert triton_engine._rows(near) is near
    assert triton_engine._rows(far).stride() == (32, 8, 1)


def test_plans_of_a_small_and_of_an_odd_matrix():
    """H = 128 is one part, which waits for nobody; H = 190 costs 192."""
    assert not any(make_plans(batch, 128, torch.float32, "ieee", *HOPPER)[0].waits for batch in (1, 10, 128))
    plan = make_plans(10, 190, torch.float32, "ieee", *HOPPER)[0]
    assert plan.parts * plan.columns == plan.chunks * plan.slices * triton_engine.DEPTH == 192


def test_sizes_that_do_not_fit():
    assert not make_plans(64, 3072, torch.float32, "ieee", *HOPPER)[0].resident         # launched step by step
    assert make_plans(64, 3600, torch.float32, "ieee", *HOPPER) == []
    assert make_plans(64, 1540, torch.float32, "ieee", 24, 99 * 1024) == []
    assert make_plans(2**22, 512, torch.float32, "ieee", *HOPPER) == []


@needs_triton
def test_a_size_that_does_not_fit_takes_the_pytorch_engine(monkeypatch, capsys):
    monkeypatch.setattr(triton_engine, "unavailable_reason", lambda device: None)
    native_build.say_once.cache_clear()
    x = torch.zeros(2, 1, 3700)
    for _ in range(2):
        h = stair_recurrence(x, torch.zeros(3700, 3700), x[0], FixedStair("n", 2), Nonlinearity("tanh", 1), "triton")
    assert h.shape == x.shape
    assert capsys.readouterr().err.splitlines() == [
        "stair: running the PyTorch engine, the triton one has no room for H = 3700 in torch.float32"]


@pytest.mark.parametrize("script", ["copytask_nvar", "sMNIST_alpha", "language_expalpha"])
@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="the interpreter runs it on the CPU")
def test_without_a_gpu_is_one_sentence(tmp_path, script):
    with pytest.raises(UserError, match="the triton engine needs") as error:
        module_of(script).main([*tiny(script), "--engine", "triton", "--save", str(tmp_path)])
    assert len(str(error.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_without_triton_is_one_sentence(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "not installed" in unavailable_reason("triton", torch.device("cuda"))
    with pytest.raises(ValueError, match="not installed"):
        stair_recurrence(torch.zeros(1, 1, 1), torch.zeros(1, 1), torch.zeros(1, 1), FixedStair("n", 1),
                         Nonlinearity("none", 1), "triton")


def test_the_other_engines_and_their_devices():
    assert "runs on the CPU" in unavailable_reason("native", torch.device("cuda"))
    for engine, device in itertools.product(("auto", "torch", "reference"), ("cpu", "cuda")):
        assert unavailable_reason(engine, torch.device(device)) is None


@needs_triton
def test_other_dtypes_are_one_sentence(monkeypatch):
    monkeypatch.setattr(triton_engine, "unavailable_reason", lambda device: None)
    half = torch.zeros(1, 1, 1, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"needs float32 or float64 tensors, all alike, on one GPU; got torch.float16"):
        stair_recurrence(half, half[0], half[0], FixedStair("n", 1), Nonlinearity("none", 1), "triton")


def test_a_gpu_that_is_not_nvidias_is_one_sentence(monkeypatch, capsys):
    """Of AMD's GPUs torch says that they are cuda; auto takes the PyTorch engine there, and a line says so."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    if not MISSING:
        assert "NVIDIA" in unavailable_reason("triton", torch.device("cuda"))
    native_build.say_once.cache_clear()
    triton_engine.is_right.cache_clear()
    case = (3, 19, "scale", "modrelu", torch.float32, torch.device("cuda", 0), "ieee")
    assert [triton_engine.is_right(*case) for _ in range(2)] == [False, False]
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("stair: running the PyTorch engine; triton: the triton engine ")


@needs_triton
def test_an_empty_batch(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    given = [t.detach()[:, :0].requires_grad_() if t.dim() == 3 else t for t in leaves(3, 5, torch.float64)]
    given[2] = given[2].detach()[:0].requires_grad_()
    h = triton_engine.triton_recurrence(*given[:4], "scale", "modrelu", given[4], False)
    assert not any(found.any() for found in torch.autograd.grad(h.sum(), given))
