"""The test of the triton engine that `auto` on a GPU rests on, without a GPU: stand-ins for its process."""

import dataclasses
import importlib.util
import itertools
import json
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, environment

from common.errors import UserError
from common.recurrence import automatic, triton_engine, verdicts, verify
from common.recurrence.torch_engine import sequence_recurrence
from common.recurrence.verdicts import Case
from common.stair import NONLINEARITIES, RULES, LearnedStair, Nonlinearity

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
CUDA, CASE = torch.device("cuda", 0), Case(3, 19, "scale", "modrelu", "float32", "ieee")
TYPED = ["--batch", "3", "--hidden", "19"]


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """A GPU of this name, with triton, and a cache folder of its own. → what can be changed about it."""
    found = {"device": ["a GPU", 132, 232448], "driver": "570.1", "torch": "2.13", "triton": "3.7.1", "source": "abc"}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(triton_engine, "unavailable_reason", lambda device: None)
    monkeypatch.setattr(verdicts, "surroundings", lambda device: found)
    verdicts.is_trusted.cache_clear()
    yield found
    verdicts.is_trusted.cache_clear()


def chosen(batch=3, hidden=19, dtype=torch.float32, rule="scale", phi="modrelu") -> str:
    """What `auto` takes on the GPU, as in a new process."""
    verdicts.is_trusted.cache_clear()
    stair = LearnedStair(5)
    stair.rule = rule
    return automatic(SimpleNamespace(shape=(5, batch, hidden), dtype=dtype, device=CUDA), stair, Nonlinearity(phi, 1))


# ── what auto makes of a verdict ─────────────────────────────────────────────────────────────────────────


def test_without_a_verdict_one_line_names_the_command(capsys):
    assert chosen() == "torch"
    assert not verdicts.is_trusted(CASE, CUDA)
    line, = capsys.readouterr().err.splitlines()
    assert line == ("stair: running the PyTorch engine; the triton engine has not been tested here for B 3, H 19, "
                    "scale, modrelu, float32; to test it: python -m common.recurrence.verify --batch 3 --hidden 19 "
                    "--rule scale --nonlin modrelu")


def test_passed(capsys):
    verdicts.write(CASE, CUDA, True, "fine")
    assert chosen() == "triton"
    assert capsys.readouterr().err == ""
    assert chosen(dtype=torch.float16) == "torch"
    assert capsys.readouterr().err == ""


def test_failed(capsys):
    verdicts.write(CASE, CUDA, True, "fine")
    verdicts.write(CASE, CUDA, False, "W is off by 1.0e-01")
    assert chosen() == "torch"
    assert capsys.readouterr().err.endswith("has failed its test for B 3, H 19, scale, modrelu, float32: W is off by "
                                            "1.0e-01\n")


@pytest.mark.parametrize("changed", [
    dict(batch=4), dict(hidden=20), dict(rule="exponential"), dict(phi="tanh"), dict(dtype=torch.float64)])
def test_a_verdict_is_about_its_own_case(changed):
    verdicts.write(CASE, CUDA, True, "fine")
    assert chosen(**changed) == "torch"


@pytest.mark.parametrize("changed", [dict(device=["another", 1, 2]), dict(driver="571"), dict(torch="2.14"),
                                     dict(triton="3.8"), dict(source="abd")])
def test_a_verdict_is_about_its_own_surroundings(machine, changed):
    verdicts.write(CASE, CUDA, True, "fine")
    assert chosen() == "triton"
    machine.update(changed)
    assert chosen() == "torch"


def test_a_verdict_is_about_its_own_products():
    verdicts.write(CASE, CUDA, True, "fine")
    torch.set_float32_matmul_precision("high")
    try:
        assert chosen() == "torch"
        verdicts.write(dataclasses.replace(CASE, precision="tf32"), CUDA, True, "fine")
        assert chosen() == "triton"
        assert Case.of(torch.zeros(1, 3, 19).double(), "scale", "tanh").precision == "ieee"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert chosen() == "triton"


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"passed": true}', b"\xff\xff"])
def test_a_damaged_verdict_is_none(content):
    path = verdicts.write(CASE, CUDA, True, "fine")
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert chosen() == "torch"


def test_a_verdict_under_the_name_of_another_is_none():
    other = verdicts.write(dataclasses.replace(CASE, batch=4), CUDA, True, "fine")
    other.rename(verdicts.write(CASE, CUDA, False, "wrong"))
    assert chosen() == "torch"


def test_without_triton(monkeypatch, capsys):
    monkeypatch.undo()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    verdicts.is_trusted.cache_clear()
    assert chosen() == "torch"
    assert "needs the package triton, which is not installed" in capsys.readouterr().err
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UserError, match="needs the package triton"):
        verify.main(TYPED)


def test_a_triton_that_does_not_load(monkeypatch, capsys):
    def fails(device):
        raise ImportError("libtriton.so")

    monkeypatch.setattr(verdicts, "surroundings", fails)
    assert chosen() == "torch"
    assert "triton cannot be imported (libtriton.so)" in capsys.readouterr().err


# ── the command, with stand-ins for its process ──────────────────────────────────────────────────────────

# The test itself, about another engine than the triton engine.
ANOTHER = """
import sys, torch
from common.recurrence import triton_engine, verify
from common.recurrence.torch_engine import sequence_recurrence
calls = []
def engine(*given):
    calls.append(1)
    return {engine}
triton_engine.triton_recurrence = engine
verify.main(sys.argv[1:])
"""
STAND_INS = {
    "passes": (ANOTHER.format(engine="sequence_recurrence(*given)"), True, "the same bits 20 times"),
    "wrong numbers": (ANOTHER.format(engine="sequence_recurrence(*given) * 1.001"), False, "h is off by 1.0e-03 of"),
    "not numbers": (ANOTHER.format(engine="sequence_recurrence(*given) * float('nan')"), False, "h is off by nan"),
    "a wrong gradient": (ANOTHER.format(engine="sequence_recurrence(*given[:1], given[1].detach() + 0.001 * given[1] - "
                                               "0.001 * given[1].detach(), *given[2:])"), False, "W is off by"),
    "other bits": (ANOTHER.format(engine="sequence_recurrence(*given) * (1 + 1e-6 * (len(calls) == 9))"), False,
                   "came out with other bits in repetition 8"),
    "hangs": ("import time; time.sleep(600)", False, "it did not end within 6 s"),
    "hangs and ignores": ("import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)", False,
                          "it did not end within 6 s"),
    "raises": ("raise RuntimeError('CUDA error: unspecified launch failure')", False,
               "it ended with status 1: RuntimeError: CUDA error: unspecified launch failure"),
    "crashes": ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", False, "it ended with signal 11"),
    "says nothing": ("", False, "it ended with status 0: it said nothing"),
    "says something else": ("print('hello')", False, "it ended with status 0"),
    "lies": ("print('{\"passed\": true, \"reason\": \"x\"}'); raise SystemExit(3)", False, "it ended with status 3"),
}


@needs_triton
@pytest.mark.parametrize("name", STAND_INS)
def test_the_command(monkeypatch, capsys, name):
    code, passes, reason = STAND_INS[name]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    whole = verify.command_of
    monkeypatch.setattr(verify, "command_of", lambda *given: [sys.executable, "-c", code, *whole(*given)[3:]])
    limit = ["--seconds", "6"] if "hangs" in name else []
    began = time.monotonic()
    if passes:
        verify.main([*TYPED, "--steps", "5", *limit])
    else:
        with pytest.raises(SystemExit) as stop:
            verify.main([*TYPED, "--steps", "5", *limit])
        assert stop.value.code == 1
    line, = capsys.readouterr().out.splitlines()
    assert line.startswith(f"triton engine, {CASE}: {'passed' if passes else 'FAILED'} in ")
    assert reason in line
    verdict = verdicts.read(CASE, torch.device("cpu"))
    assert verdict["passed"] == passes
    assert reason in verdict["reason"]
    if "hangs" in name:
        assert time.monotonic() - began < 60


@needs_triton
def test_the_test_itself_through_the_interpreter(tmp_path):
    """The command as it is typed, the triton engine's own kernels on the CPU; then what was kept is read."""
    command = [sys.executable, "-m", "common.recurrence.verify", *TYPED, "--steps", "2", "--rule", "exponential"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False,
                          env={**environment(), "TRITON_INTERPRET": "1", "XDG_CACHE_HOME": str(tmp_path)})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout
    path, = tmp_path.glob("stair-rnn/triton-*.json")
    verdict = json.loads(path.read_text())
    assert verdict["passed"]
    assert verdict["about"]["case"] == [3, 19, "exponential", "modrelu", "float32", "ieee"]
    assert set(verdict["about"]) == {"case", "device", "driver", "torch", "triton", "source"}


def test_the_line_of_a_run_is_a_command_for_the_same_case(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    kept = []
    monkeypatch.setattr(verify, "outcome", lambda command, seconds: (True, "fine"))
    monkeypatch.setattr(verdicts, "write", lambda case, *given: kept.append(case))
    cases = [CASE, Case(1, 2, "literal", "tanh", "float64", "ieee"),
             Case(5, 6, "exponential", "relu", "float32", "tf32")]
    for case in cases:
        verify.main(case.flags())
    assert kept == cases


@pytest.mark.parametrize("typed", [["--tf32", "--dtype", "float64"], []])
def test_what_cannot_be_tested_is_one_sentence(monkeypatch, typed):
    if typed:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    else:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no meaning for float64" if typed else "torch sees no GPU"):
        verify.main([*TYPED, *typed])


def test_a_cache_that_cannot_be_written_is_one_sentence(monkeypatch, tmp_path):
    (tmp_path / "stair-rnn").write_text("a file")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(verify, "outcome", lambda command, seconds: (True, "fine"))
    with pytest.raises(UserError, match="XDG_CACHE_HOME can name another folder"):
        verify.main(TYPED)


# ── the problem ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("rule", "phi"), list(itertools.product(RULES, NONLINEARITIES)))
def test_rounding_alone_passes(rule, phi):
    """No slope jumps within rounding: another engine in float32 agrees, and so it does with the digits of tf32."""
    given = verify.problem(Case(64, 256, rule, phi, "float32", "ieee"), 30, "cpu")
    found = verify.errors(sequence_recurrence, given, rule, phi, False)
    assert max(found.values()) < verify.TOLERANCE["float32", "ieee"] / 4

    def fewer_digits(x, kernel, h0, *rest):
        exact = kernel.detach()
        rounded = (exact.view(torch.int32) + 0x1000 & -0x2000).view(torch.float32)
        return sequence_recurrence(x, kernel + (rounded - exact), h0, *rest)

    found = verify.errors(fewer_digits, given, rule, phi, False)
    assert 1e-6 < max(found.values()) < verify.TOLERANCE["float32", "tf32"] / 4


@pytest.mark.parametrize("stale", [0, 3])
def test_an_old_state_fails(stale):
    """One row that reads a state of the step before the last, at one step: within no tolerance."""
    case = Case(64, 256, "scale", "modrelu", "float32", "ieee")
    given = verify.problem(case, 8, "cpu")

    def old(x, kernel, h0, numbers, rule, phi, bias, last_only):
        h = sequence_recurrence(x, kernel, h0, numbers, rule, phi, bias, False)
        missed = torch.zeros_like(x)
        before = h0 if stale == 0 else h[stale - 1]
        missed[stale + 1, 5] = ((before - h[stale])[5] @ kernel).detach()
        return sequence_recurrence(x + missed, kernel, h0, numbers, rule, phi, bias, last_only)

    assert verify.errors(old, given, "scale", "modrelu", False)["h"] > verify.TOLERANCE["float32", "tf32"]
