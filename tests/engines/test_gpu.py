"""What only a GPU can show: `python -m pytest -m gpu`. Skipped without one.

The triton engine against the float64 reference, the same bits in every repetition, waits that end, training steps that
the host does not wait for.
"""

import importlib.util
import itertools
import subprocess
import sys
from unittest import mock

import problems
import pytest
import torch
from conftest import ROOT, module_of, tiny

from benchmarks.__main__ import SHAPES, our_network, our_step
from common.copytask import CopyingTask
from common.recurrence import ENGINES, agreement, triton_engine
from common.runs.machine import prepare_machine
from common.stair import NONLINEARITIES, RULES

CUDA = torch.device("cuda")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}     # of the largest number of a tensor
FORMULAS = [(*pair, i % 2 == 0) for i, pair in enumerate(itertools.product(RULES, NONLINEARITIES))]  # last_only in turn
SIZES = [(5, 1, 1), (5, 3, 19), (5, 17, 37), (9, 10, 128), (9, 17, 190), (20, 100, 512), (9, 33, 500), (9, 128, 1024),
         (3, 300, 512), (1, 3, 1024)]                       # T, B, H


@pytest.fixture(autouse=True)
def exact():
    """float32 products are exact, whatever a test before has asked for."""
    prepare_machine(True, None)


def problem(*sizes):
    return problems.problem(*sizes, CUDA)


def compare(engine, given, rule, phi, last_only, tolerance):
    found = problems.errors(engine, given, rule, phi, last_only)
    assert max(found.values()) <= tolerance, found


@needs_triton
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rule", "phi", "last_only"), FORMULAS)
def test_formulas(rule, phi, last_only, dtype):
    given = problem(rule, phi, 7, 5, 150, dtype)
    compare(triton_engine.triton_recurrence, given, rule, phi, last_only, TOLERANCE[dtype])


@needs_triton
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("steps", "batch", "hidden"), SIZES)
def test_sizes(steps, batch, hidden, dtype):
    given = problem("scale", "tanh", steps, batch, hidden, dtype)
    compare(triton_engine.triton_recurrence, given, "scale", "tanh", False, TOLERANCE[dtype])


@needs_triton
@pytest.mark.parametrize(("batch", "hidden"), [(10, 128), (100, 512), (128, 1024)])
def test_tf32(batch, hidden):
    prepare_machine(True, None, tf32=True)
    given = problem("scale", "tanh", 9, batch, hidden, torch.float32)
    compare(triton_engine.triton_recurrence, given, "scale", "tanh", False, 2e-2)
    with pytest.raises(AssertionError):     # and it is not the exact product by another name
        compare(triton_engine.triton_recurrence, given, "scale", "tanh", False, TOLERANCE[torch.float32])


@needs_triton
def test_tf32_keeps_the_norm_of_a_state():
    """A rotation over 784 steps: what the tensor core would cut off is rounded before."""
    prepare_machine(True, None, tf32=True)
    torch.manual_seed(0)
    kernel, h0 = torch.linalg.qr(torch.randn(512, 512))[0].to(CUDA), torch.randn(100, 512, device=CUDA)
    x, ones = torch.zeros(784, 100, 512, device=CUDA), torch.ones(784, device=CUDA)
    h = triton_engine.triton_recurrence(x, kernel, h0, ones, "scale", "none", None, True)
    assert (h.norm(dim=1) / h0.norm(dim=1) - 1).abs().max() < 1e-2


@needs_triton
@pytest.mark.parametrize("programs", [1, 7, 40])
def test_more_row_blocks_than_groups(programs):
    """Fewer programs than the GPU takes: groups with several row blocks, or one launch a step."""
    found = triton_engine.capacity(CUDA)
    with mock.patch.object(triton_engine, "capacity", return_value=(programs, found[1])):
        for hidden in (100, 190, 512):
            given = problem("exponential", "modrelu", 9, 200, hidden, torch.float64)
            compare(triton_engine.triton_recurrence, given, "exponential", "modrelu", False, 1e-12)


@pytest.mark.parametrize("engine", ["torch", "reference"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_other_engines(engine, dtype):
    compare(ENGINES[engine], problem("scale", "tanh", 20, 100, 512, dtype), "scale", "tanh", False, TOLERANCE[dtype])


@needs_triton
@pytest.mark.parametrize(("steps", "batch", "hidden", "tf32"), [
    (220, 10, 128, False), (100, 100, 512, False), (60, 128, 1024, False), (100, 100, 512, True)])
def test_200_repetitions_give_the_same_bits(steps, batch, hidden, tf32):
    """A load that overtakes a store on another multiprocessor would show here, and nowhere else."""
    prepare_machine(True, None, tf32=tf32)
    given = problem("scale", "modrelu", steps, batch, hidden, torch.float32)

    def solve():
        return agreement.solve(triton_engine.triton_recurrence, given, "scale", "modrelu", False).values()

    first = list(solve())
    same = torch.ones((), dtype=torch.bool, device=CUDA)
    for _ in range(200):
        for one, other in zip(first, solve(), strict=True):
            same &= (one == other).all()
    assert same.item()


STUCK = """
import torch
from common.recurrence import triton_engine
whole = triton_engine.arrivals
triton_engine.arrivals = lambda *given: whole(*given).sub_(10**6)   # nobody will ever have arrived
x = torch.zeros(3, 8, 512, device="cuda")
triton_engine.triton_recurrence(x, x.new_zeros(512, 512), x[0], x.new_zeros(3), "scale", "tanh", None, False)
torch.cuda.synchronize()
"""


@needs_triton
def test_a_wait_that_cannot_end_is_an_error():
    done = subprocess.run([sys.executable, "-c", STUCK], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "CUDA error" in done.stderr


@pytest.mark.parametrize("task", SHAPES)
@pytest.mark.parametrize("net_type", ["RNN", "expRNN", "nnRNN", "LSTM"])
@pytest.mark.parametrize("engine", ["torch", pytest.param("triton", marks=needs_triton)])
def test_the_host_does_not_wait_for_a_training_step(task, net_type, engine):
    step = our_step(SHAPES[task], our_network(SHAPES[task], net_type, engine), CUDA)
    step()                                  # the first one compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_an_lstm_keeps_its_bits():
    x, target = torch.randn(100, 32, 8, device=CUDA), torch.randn(100, 32, 64, device=CUDA)
    lstm = torch.nn.LSTM(8, 64).to(CUDA)

    def gradients():
        return torch.autograd.grad((lstm(x)[0] - target).square().mean(), list(lstm.parameters()))

    first = gradients()
    for _ in range(20):
        assert all(map(torch.equal, gradients(), first))


@pytest.mark.parametrize("task", SHAPES)
@pytest.mark.parametrize("net_type", ["RNN", "nnRNN", "LSTM"])
@pytest.mark.parametrize("engine", ["torch", pytest.param("triton", marks=needs_triton)])
def test_training_keeps_its_bits(task, net_type, engine):
    """So a run that was resumed ends as one that was not."""
    def weights():
        torch.manual_seed(0)
        network = our_network(SHAPES[task], net_type, engine)
        step = our_step(SHAPES[task], network, CUDA)
        for _ in range(3):
            step()
        return network.state_dict().values()

    first = list(weights())
    for _ in range(3):
        assert all(map(torch.equal, weights(), first))


def test_a_batch_reaches_the_gpu_whole():
    task, other = CopyingTask(seed=3), CopyingTask(seed=3)
    for _ in range(50):
        for there, here in zip(task.batch(10, CUDA), other.batch(10), strict=True):
            assert torch.equal(there.cpu(), here)


@pytest.mark.parametrize("engine", ["torch", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("script", ["copytask_nvar", "copytask_alpha", "copytask_expalpha"])
def test_a_script_trains_as_on_the_cpu(tmp_path, script, engine):
    arguments = [*tiny(script), "--updates", "20", "--log-interval", "20"]
    here = module_of(script).main([*arguments, "--save", str(tmp_path / "cpu")])
    there = module_of(script).main([*arguments, "--save", str(tmp_path / "gpu"), "--cuda", "--engine", engine])
    assert there["loss"] == pytest.approx(here["loss"], rel=1e-3)
