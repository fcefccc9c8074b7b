"""The triton engine on the CPU: kernels run by Triton's interpreter, against the float64 reference.

`python interpreted.py DTYPE GROUP ...` runs groups of cases and prints a JSON object: group → case → the error of the
result and of every gradient, relative to the largest number of each. Its own process, because triton decides at its
import whether kernels are interpreted. The programs of a launch run one after the other, so a launch whose programs
wait for each other is not run here but its steps one by one; what waits is tested on a GPU.
"""

import contextlib
import itertools
import json
import os
import sys
from pathlib import Path
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import problems
import torch
import triton
import triton.language as tl
from problems import problem

from common.recurrence import agreement, triton_engine
from common.recurrence.reference_engine import reference_recurrence

FORMULAS = [(*pair, last_only) for pair in problems.FORMULAS for last_only in (False, True)]


def errors(*given) -> dict:
    return problems.errors(triton_engine.triton_recurrence, *given)


def formulas(dtype):
    """Every rule, nonlinearity and kind of result."""
    for rule, phi, last_only in FORMULAS:
        yield f"{rule} {phi} {last_only}", errors(problem(rule, phi, 3, 3, 5, dtype), rule, phi, last_only)


def sizes(dtype):
    """Sizes that no block fits, one step, one row, several parts."""
    for steps, batch, hidden in [(2, batch, hidden) for batch in (1, 3, 17) for hidden in (5, 19, 37, 190)] + [
            (1, 3, 37), (1, 1, 1), (4, 2, 128), (3, 2, 129)]:
        given = problem("scale", "modrelu", steps, batch, hidden, dtype)
        yield f"T {steps} B {batch} H {hidden}", errors(given, "scale", "modrelu", steps % 2 == 0)


def loops(dtype):
    """More row blocks than groups, in one launch (H 19) and with several parts (H 190, 300)."""
    for programs, hidden, batch in ((1, 19, 40), (2, 19, 70), (4, 190, 40), (2, 300, 33)):
        with mock.patch.object(triton_engine, "capacity", return_value=(programs, triton_engine.HOPPER[1])):
            plan = triton_engine.make_plans(batch, hidden, dtype, "ieee", programs, triton_engine.HOPPER[1])[0]
            assert plan.blocks > plan.groups
            given = problem("exponential", "modrelu", 2, batch, hidden, dtype)
            yield f"{programs} programs H {hidden} B {batch}", errors(given, "exponential", "modrelu", False)


def gradients(dtype):
    """One input alone wants a gradient; or none does, and what was given stays as it was."""
    for wanted in range(5):
        given = [t.detach().requires_grad_(i == wanted)
                 for i, t in enumerate(problem("exponential", "modrelu", 3, 3, 19, dtype))]
        yield f"input {wanted}", errors(given, "exponential", "modrelu", wanted % 2 == 0)
    for last_only, hidden in itertools.product((False, True), (19, 190)):
        given = [t.detach() for t in problem("scale", "modrelu", 4, 3, hidden, dtype)]
        before = [t.clone() for t in given]
        yield f"none, last only {last_only} H {hidden}", errors(given, "scale", "modrelu", last_only)
        assert all(torch.equal(old, now) for old, now in zip(before, given, strict=True))


def layouts(dtype):
    """Inputs that are views of others: transposed, strided, the same row for all; and a gradient that is."""
    plain = problem("scale", "modrelu", 3, 4, 19, dtype)
    x, kernel, h0, numbers, bias = (t.detach() for t in plain)
    views = {"x, strided": (0, torch.stack((x, x), -1).flatten(-2)[..., ::2]),
             "x, batch first": (0, x.transpose(0, 1).contiguous().transpose(0, 1)),
             "W": (1, kernel.t().contiguous().t()), "h0": (2, h0[:1].expand(4, 19)),
             "numbers": (3, numbers[:1].expand(3)), "bias": (4, bias[:1].expand(19))}
    for name, (place, view) in views.items():
        given = [*plain[:place], view.requires_grad_(), *plain[place + 1:]]
        yield name, errors(given, "scale", "modrelu", False)

    def summed(engine, leaf):                            # the gradient of a sum is one number, expanded
        rest = [t.detach().to(leaf.dtype) for t in plain]
        return torch.autograd.grad(engine(leaf, *rest[1:4], "scale", "modrelu", rest[4], False).sum(), leaf)[0]

    expected = summed(reference_recurrence, x.double().requires_grad_())
    found = summed(triton_engine.triton_recurrence, x.clone().requires_grad_())
    yield "gradient", {"x": ((found - expected).abs().max() / expected.abs().max()).item()}


def not_finite(dtype):
    """What is not finite shows, as in the reference: an error of 0, or 1 where it does not."""
    for (rule, phi, last_only), value in itertools.product(FORMULAS, (float("nan"), float("inf"))):
        given = [None if t is None else t.detach() for t in problem(rule, phi, 3, 2, 19, dtype)]
        given[0][1, 0, 3] = value
        expected = reference_recurrence(*given[:4], rule, phi, given[4], last_only)
        found = triton_engine.triton_recurrence(*given[:4], rule, phi, given[4], last_only)
        same = torch.allclose(found, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
        yield f"{rule} {phi} {last_only} {value}", {"h": 0.0 if same else 1.0}


def tensor_cores(dtype):
    """A rotation keeps the norm of a state. Its error by tf32 on a tensor core that cuts bits off, in two cases.

    As the kernels round, and where they leave it to the core.
    """
    from triton._C.libtriton import ir
    from triton.runtime.interpreter import InterpreterBuilder

    from common.recurrence import triton_kernels

    exact = InterpreterBuilder.create_dot

    def cut_off(builder, a, b, acc, precision, *rest):
        if precision == ir.INPUT_PRECISION.TF32:
            a, b = (TensorHandle((t.data.view("int32") & -0x2000).view("float32"), t.dtype) for t in (a, b))
        return exact(builder, a, b, acc, precision, *rest)

    TensorHandle = type(InterpreterBuilder().get_fp32(0.0))
    torch.manual_seed(1)
    torch.set_float32_matmul_precision("high")
    kernel, h0 = torch.linalg.qr(torch.randn(64, 64))[0], torch.randn(2, 64)
    as_it_is = mock.patch.object(triton_kernels, "_rounded", triton.jit(unrounded))
    steps = 80
    for name, rounds in (("rounded", contextlib.nullcontext()), ("left to the core", as_it_is)):
        with rounds, mock.patch.object(InterpreterBuilder, "create_dot", cut_off):
            x, numbers = torch.zeros(steps, 2, 64), torch.ones(steps)
            h = triton_engine.triton_recurrence(x, kernel, h0, numbers, "scale", "none", None, True)
        yield name, {"norm": ((h.norm(dim=1) / h0.norm(dim=1)) - 1).abs().max().item()}


def unrounded(x, PRECISION: tl.constexpr):
    return x


def gate(dtype):
    """The test that a GPU engine has to pass, at its own number of steps; a case, and its largest error or 1."""
    wrong = agreement.disagreement(triton_engine.triton_recurrence, 2, 5, "scale", "modrelu", dtype, repetitions=1)
    yield wrong or "passed", {"h": 0.0 if wrong is None else 1.0}


GROUPS = {group.__name__: group
          for group in (formulas, sizes, loops, gradients, layouts, not_finite, tensor_cores, gate)}

if __name__ == "__main__":
    torch.set_num_threads(1)
    name, *groups = sys.argv[1:]
    print(json.dumps({group: dict(GROUPS[group](getattr(torch, name))) for group in groups}))
