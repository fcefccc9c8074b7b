"""Whether an engine computes the right numbers on this machine: a short problem beside the reference engine in float64.

native_engine asks when it has loaded a library, triton_engine before its first step of a case on a GPU. Compiled code
depends on a compiler or a driver that nobody here has seen, so it is used only after it has agreed.
"""

import torch

from common.recurrence.reference_engine import reference_recurrence

# of the largest number of a tensor; tf32 keeps 10 bits of what it multiplies
TOLERANCE = {(torch.float64, "ieee"): 1e-11, (torch.float32, "ieee"): 2e-5, (torch.float32, "tf32"): 5e-3}


def solve(engine, given, rule, phi, last_only) -> dict:
    """Value and gradients of a weighted sum of the result, by name. `given`: x, W, h0, numbers, bias."""
    h = engine(*given[:4], rule, phi, given[4], last_only)
    weight = torch.linspace(-1, 2, h.numel(), dtype=h.dtype, device=h.device).view(h.shape)
    wanted = {name: t for name, t in zip(("x", "W", "h0", "numbers", "bias"), given, strict=True)
              if t is not None and t.requires_grad}
    gradients = torch.autograd.grad((h * weight).sum(), list(wanted.values())) if wanted else ()
    return {"h": h.detach(), **dict(zip(wanted, gradients, strict=True))}


def errors(engine, given, rule, phi, last_only) -> dict:
    """Errors of the result and every gradient against the float64 reference, relative to the largest number of each.

    Numbers below 1e-20 count as 0: the gradient of h0 fades with every step, in float32 to nothing.
    """
    exact = [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in given]
    expected = solve(reference_recurrence, exact, rule, phi, last_only)
    found = solve(engine, given, rule, phi, last_only)
    return {name: ((found[name] - expected[name]).abs().max() / expected[name].abs().max().clamp(min=1e-20)).item()
            for name in found}


def problem(steps: int, batch: int, hidden: int, phi: str, dtype, device) -> list:
    """x, W, h0, numbers, bias whose every z is far from where a slope jumps: z = ±0.75 or ±2 and less than 0.5 more.

    Without this gap, of millions of numbers some would lie so near to a jump that rounding decides their side.
    """
    random = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=random, dtype=torch.float64)

    def either(*shape):
        sign, size = (torch.randint(2, shape, generator=random, dtype=torch.float64) for _ in range(2))
        return (2 * sign - 1) * (0.75 + 1.25 * size)

    given = [either(steps, batch, hidden), 0.04 * draw(hidden, hidden) / hidden**0.5, either(batch, hidden),
             0.6 + 0.05 * draw(steps).clamp(-3, 3),
             -1.3 + 0.01 * draw(hidden).clamp(-3, 3) if phi == "modrelu" else None]
    return [None if t is None else t.to(device, dtype).requires_grad_() for t in given]


def disagreement(engine, steps: int, batch: int, hidden: int, rule: str, phi: str, dtype, precision="ieee",
                 device="cpu", repetitions: int = 3) -> str | None:
    """What is wrong with the engine's numbers for this case, in words; None if nothing is."""
    with torch.inference_mode(False), torch.enable_grad():
        given, tolerance = problem(steps, batch, hidden, phi, dtype, device), TOLERANCE[dtype, precision]
        for last_only in (False, True):
            for name, error in errors(engine, given, rule, phi, last_only).items():
                if not error <= tolerance:
                    return f"{name} is off by {error:.1e} of its largest number, {tolerance:.0e} is tolerated"
            first, *again = (solve(engine, given, rule, phi, last_only) for _ in range(repetitions))
            if any(not torch.equal(first[name], other[name]) for other in again for name in first):
                return f"the same problem gave other bits within {repetitions} repetitions"
    return None
