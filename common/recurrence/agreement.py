"""Whether an engine computes the right numbers on this machine: a problem beside the reference engine in float64.

Compiled code depends on a compiler or a driver that nobody here has seen, so it is used only after it has agreed:
a library of the native engine when it was built, a GPU engine before its first step of a case. The test runs in a
process of its own, because code that is wrong may end its process. What it found about a GPU is kept in a file.
"""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

from common.recurrence.native_build import Unavailable, cache_folder, say_once
from common.recurrence.reference_engine import reference_recurrence
from common.stair import stair_activation

# of the largest number of a tensor; tf32 keeps 10 bits of what it multiplies
TOLERANCE = {(torch.float64, "ieee"): 1e-11, (torch.float32, "ieee"): 1e-4, (torch.float32, "tf32"): 4e-2}
GAIN = 0.8                                  # of a gradient in a step of the problem: 150 steps leave about 1e-15 of it
ROOT = Path(__file__).resolve().parents[2]


def solve(engine, given, rule, phi, last_only) -> dict:
    """Value and gradients of a weighted sum of the result, by name. `given`: x, W, h0, numbers, bias."""
    h = engine(*given[:4], rule, phi, given[4], last_only)
    weight = torch.linspace(-1, 2, h.numel(), dtype=h.dtype, device=h.device).view(h.shape)
    wanted = {name: t for name, t in zip(("x", "W", "h0", "numbers", "bias"), given, strict=True)
              if t is not None and t.requires_grad}
    gradients = torch.autograd.grad((h * weight).sum(), list(wanted.values())) if wanted else ()
    return {"h": h.detach(), **dict(zip(wanted, gradients, strict=True))}


def errors(found: dict, given, rule, phi, last_only, tolerance: float = 1.0) -> dict:
    """Errors of what `solve` found against the float64 reference, relative to the largest number of each tensor.

    A tensor so small that its dtype cannot hold `tolerance` of it counts as 0: gradients that have faded to nothing.
    """
    exact = [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in given]
    expected = solve(reference_recurrence, exact, rule, phi, last_only)
    least = torch.finfo(given[0].dtype).tiny / tolerance
    return {name: ((found[name] - expected[name]).abs().max() / expected[name].abs().max().clamp(min=least)).item()
            for name in found}


def problem(steps: int, batch: int, hidden: int, rule: str, phi: str, dtype, device) -> list:
    """x, W, h0, numbers, bias on which an error of an engine shows and rounding does not.

    First every z is drawn, ±0.75 or ±2 and less than 0.2 more: far from where a slope jumps, so that rounding never
    decides on which side of a jump a number lies. Then x_t = z_t − h_{t-1} W follows from them. W is GAIN times a
    rotation, divided by the usual slope: h0 still has a gradient after 150 steps. Its numbers have 11 bits, which tf32
    multiplies as they are; else the same error of W would grow with every step.
    """
    random = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=random, dtype=torch.float64)

    def either(*shape):
        sign, size = (torch.randint(2, shape, generator=random, dtype=torch.float64) for _ in range(2))
        return ((2 * sign - 1) * (0.75 + 1.25 * size)).to(device)

    z = (either(steps, batch, hidden) + 0.05 * draw(steps, batch, hidden).clamp(-3, 3).to(device)).requires_grad_()
    h0, numbers = either(batch, hidden), (0.6 + 0.05 * draw(steps).clamp(-3, 3)).to(device)
    bias = (-1.3 + 0.01 * draw(hidden).clamp(-3, 3)).to(device) if phi == "modrelu" else None
    h = stair_activation(z, numbers.view(-1, 1, 1), rule, phi, bias)
    slope, = torch.autograd.grad(h.sum(), z)
    rotation = torch.linalg.qr(draw(hidden, hidden))[0].to(device)
    mantissa, exponent = torch.frexp(GAIN / slope.square().mean().sqrt() * rotation)
    kernel = torch.ldexp((mantissa * 2**11).round() / 2**11, exponent)
    x = z.detach() - torch.cat((h0.unsqueeze(0), h.detach()[:-1])) @ kernel
    return [None if t is None else t.to(device, dtype).requires_grad_() for t in (x, kernel, h0, numbers, bias)]


def disagreement(engine, batch: int, hidden: int, rule: str, phi: str, dtype, precision="ieee", device="cpu",
                 steps: int = 150, repetitions: int = 20) -> str | None:
    """What is wrong with the engine's numbers for this case, in words; None if nothing is."""
    with torch.inference_mode(False), torch.enable_grad():
        given, tolerance = problem(steps, batch, hidden, rule, phi, dtype, device), TOLERANCE[dtype, precision]
        for last_only in (False, True):
            first = solve(engine, given, rule, phi, last_only)
            for name, error in errors(first, given, rule, phi, last_only, tolerance).items():
                if not error <= tolerance:
                    what = name if name == "h" else f"the gradient of {name}"
                    return f"{what} is off by {error:.1e} of its largest number, {tolerance:.0e} is tolerated"
            for _ in range(repetitions - 1):
                again = solve(engine, given, rule, phi, last_only)
                if not all(torch.equal(first[name], again[name]) for name in first):
                    return f"the same problem gave other bits within {repetitions} repetitions"
    return None


class ChildFailed(Exception):
    """How a process ended that should have given a result, in a sentence; `told`: whether that says something of it."""

    def __init__(self, sentence: str, told: bool = True):
        super().__init__(sentence)
        self.told = told


def in_child(module: str, function: str, *arguments, seconds: float = 300):
    """What module.function(*arguments) gives in a Python process of its own. Arguments and result are JSON's.

    Raises ChildFailed for a process that crashes, hangs longer than `seconds` or cannot be started.
    """
    code = f"import json, sys; from {module} import {function} as f; print(json.dumps(f(*json.loads(sys.argv[1]))))"
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        child = subprocess.run([sys.executable, "-c", code, json.dumps(arguments)], stdin=subprocess.DEVNULL,
                               capture_output=True, text=True, errors="replace", timeout=seconds, check=False,
                               start_new_session=True, env={**os.environ, "PYTHONPATH": paths})
    except OSError as error:
        raise ChildFailed(f"no process could be started for it ({error.strerror})", told=False) from None
    except subprocess.TimeoutExpired:
        raise ChildFailed(f"it did not end within {seconds:g} s") from None
    if child.returncode == 0:
        return json.loads(child.stdout.splitlines()[-1])
    lines = [line.strip() for line in child.stderr.splitlines() if line.strip()]
    how = f"signal {-child.returncode}" if child.returncode < 0 else f"status {child.returncode}"
    stopped = -child.returncode in (signal.SIGINT, signal.SIGTERM, 9)  # by a person, or for want of memory
    raise ChildFailed(f"it ended with {how}: {lines[-1][:200] if lines else 'it said nothing'}", told=not stopped)


def verdict(name: str, about: list, line: str = "", *call) -> tuple[dict, Path | None]:
    """What a trial has found about engine `name`, and the file in the user's cache folder that keeps it, if one does.

    about   all that the result depends on; another `about` is another file
    line    said before a trial: that it takes time
    call    the trial, as for `in_child` → {"reason": why the engine is not right here, or None, ...}, or a dict without
            a reason, which is not kept. Without a call only what is kept is told, else {}.
    """
    path = None
    with contextlib.suppress(Unavailable, OSError, ValueError, TypeError, AttributeError):
        path = cache_folder() / f"{name}-{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]}.json"
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept.get("about") == about and "reason" in kept:
            return kept, path
    if not call:
        return {}, None
    say_once(line)
    try:
        found = in_child(*call, seconds=900)
    except ChildFailed as error:
        found = {"reason" if error.told else "untested": f"its test failed: {error}"}
    with contextlib.suppress(OSError):  # a full disk, say: what is half written cannot be read, and is tested again
        if path is not None and "reason" in found:
            path.write_text(json.dumps({**found, "about": about}, indent=2), encoding="utf-8")
            return found, path
    return found, None
