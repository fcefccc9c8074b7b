"""Problems for the time loop, and how far an engine is from the float64 reference on them."""

import torch

from common.recurrence.reference_engine import reference_recurrence


def problem(rule, phi, steps, batch, hidden, dtype, device="cpu"):
    """x, W, h0, numbers, b: leaves of a size at which nothing saturates or explodes."""
    random = torch.Generator().manual_seed(1000 * steps + 10 * hidden + batch)
    size = 0.3 if rule == "literal" else 0.8

    def leaf(*shape, scale=1.0, shift=0.0):
        made = torch.randn(shape, generator=random, dtype=torch.float64) * scale + shift
        return made.to(device, dtype).requires_grad_()

    numbers = leaf(steps, scale=0.3, shift=-0.7) if rule == "scale" else leaf(steps, scale=0.05, shift=0.4)
    bias = leaf(hidden, scale=0.1) if phi == "modrelu" else None
    return [leaf(steps, batch, hidden, scale=size, shift=0.1), leaf(hidden, hidden, scale=size / hidden**0.5),
            leaf(batch, hidden, scale=0.5), numbers, bias]


def solve(engine, given, rule, phi, last_only):
    """Value and gradients of a weighted sum of the result, by name."""
    h = engine(*given[:4], rule, phi, given[4], last_only)
    weight = torch.linspace(-1, 2, h.numel(), dtype=h.dtype, device=h.device).view(h.shape)
    wanted = {name: t for name, t in zip(("x", "W", "h0", "numbers", "bias"), given, strict=True)
              if t is not None and t.requires_grad}
    gradients = torch.autograd.grad((h * weight).sum(), list(wanted.values())) if wanted else ()
    return {"h": h.detach(), **dict(zip(wanted, gradients, strict=True))}


def errors(engine, given, rule, phi, last_only) -> dict:
    """Of the result and of every gradient, relative to the largest number of each."""
    exact = [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in given]
    expected = solve(reference_recurrence, exact, rule, phi, last_only)
    found = solve(engine, given, rule, phi, last_only)
    assert found.keys() == expected.keys()
    assert all(value.abs().max() > 0 for value in expected.values())           # each input matters
    return {name: ((found[name] - expected[name]).abs().max() / expected[name].abs().max()).item() for name in found}
