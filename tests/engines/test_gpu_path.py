"""What --cuda runs, without a GPU: the scripts on the device meta, whose tensors have no numbers, and what is said.

No training step may mix tensors of two devices, copy between them so that the host waits, read one back, or call what
a GPU compiles on first use. What a kernel computes only a GPU shows (test_gpu.py).
"""

import os
import sys

import pytest
import torch
from conftest import SCRIPTS, module_of, task_of, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.data import PixelSequences
from common.errors import run_main
from common.network import build_network
from common.optim import OrthogonalRMSprop
from common.orthogonal import LARGEST_NORM, MOST_SQUARINGS, skew_exponential
from common.runs.machine import prepare_machine
from common.runs.run import Run
from common.stair import LearnedStair

META, aten = torch.device("meta"), torch.ops.aten
READS = (aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.is_nonzero.default,
         aten.masked_select.default, aten._unique2.default)
COMPILED_ON_FIRST_USE = (aten.exp2.default,)


class Enough(Exception):
    """As many updates as the test wants."""


class Gpu(TorchDispatchMode):
    """Raises AssertionError for what a GPU would refuse and, unless the host may `read`, for what it would wait for."""

    read = True
    number = 1.0        # what the host reads

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)]
        there = any(t.is_meta for t in tensors)
        assert func not in COMPILED_ON_FIRST_USE or not there, f"a GPU compiles {func} on first use"
        if func in (aten._to_copy.default, aten.copy_.default):
            return self.copy(func, args, kwargs)
        if there and func in READS:
            assert self.read, f"{func} reads from the GPU"
            return self.number
        devices = {t.device for t in tensors if t.dim()}           # a CPU's number may go into a GPU's kernel
        by_the_host = self.read and func is aten.index.Tensor      # whose indices may lie on the CPU
        assert len(devices) < 2 or by_the_host, f"{func} mixes {devices}"
        return func(*args, **kwargs)

    def copy(self, func, args, kwargs):
        """A copy between devices: towards the GPU without waiting, back only where the host may read."""
        if func is aten.copy_.default:
            target, source, now = args[0], args[1], kwargs.get("non_blocking", len(args) > 2 and args[2])
            to, dtype = target.device, target.dtype
        else:
            source, now = args[0], kwargs.get("non_blocking")
            to, dtype = torch.device(kwargs.get("device") or source.device), kwargs.get("dtype") or source.dtype
        if source.is_meta and to != META:
            assert self.read, f"{func} reads from the GPU"
            made = torch.full(source.shape, self.number).to(dtype)
            return made if func is aten._to_copy.default else target.copy_(made)
        assert self.read or now or source.is_meta or to != META, f"{func} waits for the GPU"
        return func(*args, **kwargs)


@pytest.fixture
def run_on_meta(monkeypatch, tmp_path, penn_folder):
    """run_on_meta(script, net_type, gpu, *arguments): the script's main with `gpu` watching, 20 pixels an image."""
    images = PixelSequences(torch.zeros(200, 784, dtype=torch.uint8), torch.zeros(200, dtype=torch.int64))
    whole = PixelSequences.batch

    def twenty(*given):
        pixels, labels = whole(*given)
        return pixels[:20], labels

    monkeypatch.setattr("common.runs.run.prepare_machine", lambda *given: META)
    monkeypatch.setattr(PixelSequences, "batch", twenty)
    for script in SCRIPTS:
        monkeypatch.setattr(module_of(script), "load_mnist", lambda *given: (images,) * 3, raising=False)

    def run(script, net_type, gpu, *arguments):
        stair = ("--nvar", "none") if net_type == "LSTM" else ()
        data = ("--data", str(penn_folder)) if task_of(script) == "language" else ()
        typed = [*tiny(script), "--net-type", net_type, *stair, *data, "--save", str(tmp_path), *arguments]
        with gpu:
            return module_of(script).main(typed)
    return run


CASES = [(script, net_type) for script in SCRIPTS for net_type in ("RNN", "expRNN", "nnRNN", "LSTM")
         if net_type != "LSTM" or script.endswith("nvar")]


@pytest.mark.parametrize("more", [(), ("--optimizer", "Adam", "--clip", "1")], ids=["RMSprop", "Adam"])
@pytest.mark.parametrize(("script", "net_type"), CASES)
def test_no_step_waits_or_mixes(run_on_meta, monkeypatch, script, net_type, more):
    """From the second update to the fourth; what comes before may wait."""
    gpu, done, step = Gpu(), [], OrthogonalRMSprop.step

    def counting(self):
        step(self)
        done.append(1)
        gpu.read = len(done) < 2
        if len(done) == 4:
            gpu.read = True
            raise Enough

    monkeypatch.setattr(OrthogonalRMSprop, "step", counting)
    with pytest.raises(Enough):
        run_on_meta(script, net_type, gpu, *more, "--updates" if task_of(script) == "copytask" else "--epochs", "9")


class Gaussian(LearnedStair):
    def rule(self, step, z):
        return torch.exp(-step * z**2)


@pytest.mark.parametrize(("stair", "phi"), [(Gaussian(5), "tanh"), (LearnedStair(5), torch.sin)])
def test_no_step_waits_with_a_rule_or_phi_of_ones_own(stair, phi):
    """What fits them is asked in the first step, where the host may wait."""
    gpu, network = Gpu(), build_network("RNN", 3, 8, stair, phi, "xavier", "xavier").to(META)
    x = torch.ones(5, 2, 3, device=META)
    with gpu:
        for _ in range(3):
            network(x)[0].sum().backward()
            gpu.read = False
    assert network.engine_that_ran == "torch"


@pytest.mark.parametrize("net_type", ["nnRNN", "LSTM"])
@pytest.mark.parametrize("script", ["copytask_nvar", "sMNIST_nvar", "language_nvar"])
def test_a_run_to_its_end_mixes_no_devices(run_on_meta, monkeypatch, script, net_type):
    """Reports, evaluations, checkpoints: the host may read there. Weights of meta are no checkpoint to be loaded."""
    monkeypatch.setattr(Run, "load_best", lambda self: None)
    assert run_on_meta(script, net_type, Gpu(), "--log-interval", "2", "--batch", "20")


@pytest.mark.parametrize("act", [
    lambda there, here: there.sum().item(), lambda there, here: there.tolist(), lambda there, here: there.cpu(),
    lambda there, here: here.copy_(there), lambda there, here: there + here, lambda there, here: here.to(META),
    lambda there, here: there.copy_(here), lambda there, here: there[there > 0], lambda there, here: there.exp2()])
def test_what_the_watch_sees(act):
    gpu = Gpu()
    gpu.read = False
    with gpu, pytest.raises((AssertionError, NotImplementedError)):
        act(torch.ones(3, device=META), torch.ones(3))


@pytest.mark.parametrize(("before", "after"), [(None, ":4096:8"), (":16:8", ":16:8")])
def test_workspaces_of_one_size(monkeypatch, before, after):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    prepare_machine(False, None)
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    if before:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", before)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert prepare_machine(True, None) == torch.device("cuda")
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == after


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried")])
def test_no_memory_is_one_sentence(error, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["copytask_nvar.py"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)               # not started as python -m pytest
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: raised(error))
    assert stop.value.code == 1
    assert capsys.readouterr().err.startswith("copytask_nvar.py: this does not fit into memory; choose a smaller")


@pytest.mark.parametrize("said", [
    "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be reported elsewhere",
    "CUDA error: unspecified launch failure"])
def test_an_error_of_the_gpu_is_one_sentence(said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["copytask_nvar.py"])
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: raised(RuntimeError(said)))
    assert stop.value.code == 1
    line, = capsys.readouterr().err.splitlines()
    assert said.splitlines()[0] in line
    assert "last good state" in line
    assert "--engine torch" in line


@pytest.mark.parametrize("said", [
    "Unsupported memory format", "view size is not compatible: the tensors share memory"])
def test_a_fault_of_the_program_is_not_a_lack_of_memory(said):
    with pytest.raises(RuntimeError, match=said[:20]):
        run_main(lambda: raised(RuntimeError(said)))


def raised(error):
    raise error


def test_the_largest_norm_of_a_gpu():
    """A block [[0, s], [−s, 0]] has the norm s: a number up to the bound, NaN beyond it, as on no CPU."""
    bound = LARGEST_NORM[torch.float32] * 2 ** MOST_SQUARINGS[torch.float32]
    for scale, finite in ((0.99, True), (1.01, False)):
        skew = torch.tensor([[0.0, 1.0], [-1.0, 0.0]]) * bound * scale
        assert skew_exponential(skew, MOST_SQUARINGS[torch.float32]).isfinite().all() == finite
        assert skew_exponential(skew).isfinite().all()
