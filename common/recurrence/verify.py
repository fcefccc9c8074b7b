"""Tests the triton engine on this GPU and keeps the verdict: `--engine auto` takes the engine only where it passed.

    python -m common.recurrence.verify --batch 100 --hidden 512
    python -m common.recurrence.verify --batch 128 --hidden 1024 --rule exponential --nonlin tanh --tf32

The result and every gradient must agree with the reference engine in float64, and 20 repetitions must give the same
bits. The test runs in a process of its own for at most --seconds. A hang or a crash there counts as failed.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from common.errors import UserError, start
from common.recurrence import triton_engine, verdicts
from common.recurrence.reference_engine import reference_recurrence
from common.recurrence.verdicts import Case
from common.stair import NONLINEARITIES, RULES

ROOT = Path(__file__).resolve().parents[2]
# of the largest number of a tensor; tf32 keeps 10 bits of what it multiplies
TOLERANCE = {("float64", "ieee"): 1e-11, ("float32", "ieee"): 2e-5, ("float32", "tf32"): 5e-3}


# ── an engine beside the reference ───────────────────────────────────────────────────────────────────────


def solve(engine, given, rule, phi, last_only) -> dict:
    """Value and gradients of a weighted sum of the result, by name. `given`: x, W, h0, numbers, bias."""
    h = engine(*given[:4], rule, phi, given[4], last_only)
    weight = torch.linspace(-1, 2, h.numel(), dtype=h.dtype, device=h.device).view(h.shape)
    wanted = {name: t for name, t in zip(("x", "W", "h0", "numbers", "bias"), given, strict=True)
              if t is not None and t.requires_grad}
    gradients = torch.autograd.grad((h * weight).sum(), list(wanted.values())) if wanted else ()
    return {"h": h.detach(), **dict(zip(wanted, gradients, strict=True))}


def errors(engine, given, rule, phi, last_only) -> dict:
    """Errors of the result and every gradient against the float64 reference, relative to the largest number of each."""
    exact = [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in given]
    expected = solve(reference_recurrence, exact, rule, phi, last_only)
    found = solve(engine, given, rule, phi, last_only)
    return {name: ((found[name] - expected[name]).abs().max() / expected[name].abs().max()).item() for name in found}


def problem(case: Case, steps: int, device) -> list:
    """x, W, h0, numbers, bias whose every z is far from where a slope jumps: z = ±0.75 or ±2 and less than 0.5 more.

    Without this gap, of millions of numbers some would lie so near to a jump that rounding decides their side.
    """
    random = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=random, dtype=torch.float64)

    def either(*shape):
        sign, size = (torch.randint(2, shape, generator=random, dtype=torch.float64) for _ in range(2))
        return (2 * sign - 1) * (0.75 + 1.25 * size)

    bias = -1.3 + 0.01 * draw(case.hidden).clamp(-3, 3) if case.phi == "modrelu" else None
    given = [either(steps, case.batch, case.hidden), 0.04 * draw(case.hidden, case.hidden) / case.hidden**0.5,
             either(case.batch, case.hidden), 0.6 + 0.05 * draw(steps).clamp(-3, 3), bias]
    return [None if t is None else t.to(device, getattr(torch, case.dtype)).requires_grad_() for t in given]


def result_of(case: Case, steps: int, repetitions: int, device) -> tuple[bool, str]:
    """The test itself: whether the engine passed, and what was found."""
    if triton_engine.make_plan(case.batch, case.hidden, getattr(torch, case.dtype), case.precision,
                               *triton_engine.capacity(device)) is None:
        return False, f"it has no room for H = {case.hidden}"
    given, worst, tolerance = problem(case, steps, device), 0.0, TOLERANCE[case.dtype, case.precision]
    for last_only in (False, True):
        for name, error in errors(triton_engine.triton_recurrence, given, case.rule, case.phi, last_only).items():
            if not error <= tolerance:
                return False, f"{name} is off by {error:.1e} of its largest number, {tolerance:.0e} is tolerated"
            worst = max(worst, error)
        first = solve(triton_engine.triton_recurrence, given, case.rule, case.phi, last_only)
        for repetition in range(1, repetitions):
            again = solve(triton_engine.triton_recurrence, given, case.rule, case.phi, last_only)
            other = [name for name in first if not torch.equal(first[name], again[name])]
            if other:
                return False, f"{', '.join(other)} came out with other bits in repetition {repetition + 1}"
    return True, f"errors of at most {worst:.1e}, the same bits {repetitions} times"


# ── the process ──────────────────────────────────────────────────────────────────────────────────────────


def outcome(command: list[str], seconds: float) -> tuple[bool, str]:
    """Run a test in its own process → whether it passed, and a line about it, also for a crash or a hang."""
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                             errors="replace", start_new_session=True)     # so that the compiler is killed with it
    try:
        said, complaint = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        return False, f"it did not end within {seconds:g} s"
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):               # the driver may hold it for a while
                child.communicate(timeout=10)
    if child.returncode == 0:
        with contextlib.suppress(ValueError, LookupError, TypeError):
            verdict = json.loads(said.splitlines()[-1])
            return bool(verdict["passed"]), str(verdict["reason"])
    lines = [line for line in complaint.splitlines() if line.strip()]
    how = f"signal {-child.returncode}" if child.returncode < 0 else f"status {child.returncode}"
    return False, f"it ended with {how}: {lines[-1].strip()[:200] if lines else 'it said nothing'}"


def command_of(case: Case, steps: int, repetitions: int) -> list[str]:
    return [sys.executable, "-m", "common.recurrence.verify", *case.flags(), "--steps", str(steps),
            "--repetitions", str(repetitions), "--here"]


def at_least_one(text: str) -> int:
    if (value := int(text)) < 1:
        raise ValueError
    return value


at_least_one.__name__ = "whole number above 0"


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m common.recurrence.verify", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=at_least_one, required=True, help="B")
    parser.add_argument("--hidden", type=at_least_one, required=True, help="H, the scripts' --nhid")
    parser.add_argument("--rule", choices=RULES, default="scale", help="scale serves nvar and alpha (default)")
    parser.add_argument("--nonlin", choices=NONLINEARITIES, default="modrelu", help="default: modrelu")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32", help="default: float32")
    parser.add_argument("--tf32", action="store_true", help="float32 products by tensor cores")
    parser.add_argument("--steps", type=at_least_one, default=150, help="T of the test (default: 150)")
    parser.add_argument("--repetitions", type=at_least_one, default=20, help="runs of the test (default: 20)")
    parser.add_argument("--seconds", type=at_least_one, default=300, help="its time limit (default: 300)")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)      # the test itself, in this process
    args = parser.parse_args(argv)

    device = torch.device("cpu")
    if not triton_engine.interpreted():
        if not torch.cuda.is_available():
            raise UserError("torch sees no GPU, so there is nothing to test")
        device = torch.device("cuda", torch.cuda.current_device())
    if (reason := triton_engine.unavailable_reason(device)) is not None:
        raise UserError(reason)
    if args.tf32 and args.dtype != "float32":
        raise UserError("--tf32 has no meaning for float64; leave one of them out")
    case = Case(args.batch, args.hidden, args.rule, args.nonlin, args.dtype, "tf32" if args.tf32 else "ieee")
    if args.here:
        torch.set_float32_matmul_precision("high" if args.tf32 else "highest")
        passed, reason = result_of(case, args.steps, args.repetitions, device)
        return print(json.dumps({"passed": passed, "reason": reason}))
    began = time.monotonic()
    passed, reason = outcome(command_of(case, args.steps, args.repetitions), args.seconds)
    try:
        path = verdicts.write(case, device, passed, reason)
    except (OSError, RuntimeError) as error:
        raise UserError(f"the verdict could not be kept ({error}); XDG_CACHE_HOME can name another folder", 1) from None
    print(f"triton engine, {case}: {'passed' if passed else 'FAILED'} in {time.monotonic() - began:.0f} s, {reason}; "
          f"kept in {path}", flush=True)
    if not passed:
        sys.exit(1)


if __name__ == "__main__":
    start(main)
