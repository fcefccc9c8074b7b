"""The PyTorch engine: the whole sequence as one autograd.Function.

Autograd through a loop of T steps keeps T small graphs and adds T gradients of W. Here the loop carries
only what is sequential, and everything else is done for many steps at once:

    forward    z_t = x_t + h_{t-1} W,  h_t = g_t(z_t) φ(z_t)                     one step at a time
    slopes     ∂h_t/∂z_t by autograd through the elementwise formula             a chunk of steps at once
    backward   δh_t = ∂L/∂h_t + δz_{t+1} Wᵀ,  δz_t = δh_t · ∂h_t/∂z_t            one step at a time
    gradients  dW = Σ_t h_{t-1}ᵀ δz_t as one matrix product; numbers and bias a chunk at once

No formula of a stair or nonlinearity stands in this file, so it serves all that pass `is_elementwise`. Gradients are
asked for of scalars: for those of tensors torch imports sympy, which takes 0.6 s.
"""

import torch
from torch.autograd.function import once_differentiable

from common.stair import nonlinearity, stair_activation, stair_factor

# Numbers whose slopes are formed together. On a CPU the temporaries should stay in the cache; elsewhere every operation
# is a launch, and a few large ones cost less than many small ones.
CHUNK_ELEMENTS = {"cpu": 2**18}
CHUNK_ELEMENTS_ELSEWHERE = 2**23


def sequence_recurrence(x, kernel, h0, numbers, rule, phi, bias, last_only):
    """Arguments and result as in `common.recurrence.stair_recurrence`; numbers (T,) or (T, H)."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, kernel, h0, numbers, bias)):
        return _Sequence.apply(x, kernel, h0, numbers, bias, rule, phi, last_only)
    return _run(x, kernel, h0, numbers, bias, rule, phi, z=None, keep_all=not last_only)


def is_elementwise(rule, phi, step, bias, hidden: int) -> bool:
    """Whether slopes are all that `backward` needs of a rule and φ that are functions; `step`: the numbers of a step.

    Each result may depend on its own z and number alone, on nothing random and on no parameter but numbers and bias.
    """
    step, bias = step.detach(), None if bias is None else bias.detach()
    z = torch.linspace(0.5, 1.5, 2 * hidden, dtype=step.dtype, device=step.device).view(2, hidden)
    with torch.enable_grad():
        constant = stair_activation(z, step, rule, phi, bias)
        out = stair_activation(z.requires_grad_(), step, rule, phi, bias)
        if constant.requires_grad or not out.requires_grad or not torch.equal(constant, out):
            return False
        return torch.autograd.grad(out[0, 0], z)[0].count_nonzero().item() <= 1


def _run(x, kernel, h0, numbers, bias, rule, phi, z, keep_all):
    """The forward loop. Fills z (T, B, H) if given; → h (T, B, H) if `keep_all`, else the last h (B, H)."""
    h = torch.empty_like(x) if keep_all else None
    one_z = torch.empty_like(x[0]) if z is None else None
    state = h0
    for t, (x_t, number) in enumerate(zip(x.unbind(0), numbers.unbind(0), strict=True)):
        z_t = one_z if z is None else z[t]
        torch.addmm(x_t, state, kernel, out=z_t)
        state = torch.mul(stair_factor(rule, number, z_t), nonlinearity(phi, z_t, bias), out=h[t] if keep_all else None)
    return h if keep_all else state


class _Sequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kernel, h0, numbers, bias, rule, phi, last_only):
        z = torch.empty_like(x)                                                        # (T, B, H)
        h = _run(x, kernel, h0, numbers, bias, rule, phi, z=z, keep_all=True)          # (T, B, H)
        ctx.rule, ctx.phi, ctx.last_only = rule, phi, last_only
        ctx.save_for_backward(kernel, h0, numbers, bias, z, h)
        return h[-1].clone() if last_only else h

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        kernel, h0, numbers, bias, z, h = ctx.saved_tensors
        steps, batch, hidden = z.shape
        transposed = kernel.t().contiguous()
        dz = torch.empty_like(z)                                                       # (T, B, H)
        d_numbers = torch.zeros_like(numbers)
        d_bias = None if bias is None else torch.zeros_like(bias)

        chunk = max(1, CHUNK_ELEMENTS.get(z.device.type, CHUNK_ELEMENTS_ELSEWHERE) // max(1, batch * hidden))
        for end in range(steps, 0, -chunk):
            start = max(0, end - chunk)
            with torch.enable_grad():
                z_chunk = z[start:end].detach().requires_grad_()
                step = numbers[start:end].view(end - start, 1, -1).detach().requires_grad_(ctx.needs_input_grad[3])
                b = None if bias is None else bias.detach().requires_grad_(ctx.needs_input_grad[4])
                out = stair_activation(z_chunk, step, ctx.rule, ctx.phi, b)            # (chunk, B, H)
                total = out.sum()                                                      # ∂total/∂z is the slope
            slope, = torch.autograd.grad(total, z_chunk, retain_graph=True)
            dh = torch.empty_like(out)
            for t in range(end - 1, start - 1, -1):
                dh_t = dh[t - start]
                if t == steps - 1:
                    dh_t.copy_(grad if ctx.last_only else grad[t])
                elif ctx.last_only:
                    torch.mm(dz[t + 1], transposed, out=dh_t)
                else:
                    torch.addmm(grad[t], dz[t + 1], transposed, out=dh_t)
                torch.mul(dh_t, slope[t - start], out=dz[t])
            wanted = [p for p in (step, b) if p is not None and p.requires_grad]
            if not wanted:
                continue
            with torch.enable_grad():
                total = torch.dot(out.flatten(), dh.flatten())
            for p, found in zip(wanted, torch.autograd.grad(total, wanted), strict=True):
                if p is step:
                    d_numbers[start:end] = found.view_as(d_numbers[start:end])
                else:
                    d_bias += found

        d_kernel = None
        if ctx.needs_input_grad[1]:
            d_kernel = torch.addmm(h0.t() @ dz[0], h[:-1].reshape(-1, hidden).t(), dz[1:].reshape(-1, hidden))
        d_h0 = dz[0] @ transposed if ctx.needs_input_grad[2] else None
        return dz, d_kernel, d_h0, d_numbers, d_bias, None, None, None
