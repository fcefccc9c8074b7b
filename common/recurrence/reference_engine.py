"""The reference engine: the equation, one step at a time, differentiated by autograd."""

import torch

from common.stair import stair_activation


def reference_recurrence(x, kernel, h0, numbers, rule, phi, bias, last_only):
    """Arguments and result as in `common.recurrence.stair_recurrence`; numbers (T,) or (T, H)."""
    h, states = h0, []
    for t in range(x.shape[0]):
        z = x[t] + h @ kernel                                    # (B, H)
        h = stair_activation(z, numbers[t], rule, phi, bias)     # (B, H)
        states.append(h)
    return h if last_only else torch.stack(states)               # (T, B, H)
