"""OrthogonalRMSprop: one optimizer for free weights and for the logarithms of rotations.

A rotation W = exp(A − Aᵀ) is learned through A. Autograd pulls ∂L/∂W back to A through the adjoint of the
exponential's derivative (`common.orthogonal`), A takes a step with its own rate `lr_orth`, and the
next `kernel()` forms W anew: W never leaves the rotations. What is left for the optimizer is to step groups
of parameters, each by its own rule (arXiv 1901.08428, section 4; arXiv 1905.12080, section 4):

    RMSprop    v ← a v + (1 − a) g²,   p ← p − lr · g / (√v + ε)                    (as torch.optim.RMSprop)
    Adam       the bias-corrected update of Kingma and Ba 2015                      (as torch.optim.Adam)
"""

import inspect

import torch

METHODS = ("RMSprop", "Adam")


class OrthogonalRMSprop(torch.optim.Optimizer):
    """Steps parameter groups, each with its own `method`, rate and bounds.

    A group is a dict with `params` and any of
        method         "RMSprop" or "Adam"
        lr, eps        learning rate and ε
        alpha, betas   RMSprop's smoothing a; Adam's two decay rates
        weight_decay   λ: adds λ p to the gradient
        minimum        the parameters are kept at or above it (None: no bound)
    What a group leaves out is taken from the arguments. `optimizer_for` makes the groups of a model.
    """

    # torch wraps these four so that the first call imports its compiler: 1.4 s and 150 MB that no run here needs.
    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)

    def __init__(self, params, lr=1e-3, method="RMSprop", alpha=0.99, betas=(0.9, 0.999), eps=1e-8,
                 weight_decay=0.0, minimum=None):
        if method not in METHODS:
            raise ValueError(f"there is no method '{method}'; choose one of {', '.join(METHODS)}")
        super().__init__(params, dict(lr=lr, method=method, alpha=alpha, betas=betas, eps=eps,
                                      weight_decay=weight_decay, minimum=minimum))

    @torch.no_grad()
    def step(self):
        """One step of every group; reads nothing back from the device."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            grads = [p.grad.add(p, alpha=group["weight_decay"]) if group["weight_decay"] else p.grad for p in params]
            if group["method"] == "Adam":
                for p, g in zip(params, grads, strict=True):
                    self._adam(p, g, self.state[p], group)
            elif params:
                self._rmsprop(params, grads, group)
            if group["minimum"] is not None:
                for p in params:
                    p.clamp_(min=group["minimum"])

    def _rmsprop(self, params, grads, group):
        """Of all parameters of a group at once: they are small and many."""
        for p in params:
            if p not in self.state:
                self.state[p]["square_avg"] = torch.zeros_like(p)
        squares = [self.state[p]["square_avg"] for p in params]
        torch._foreach_mul_(squares, group["alpha"])
        torch._foreach_addcmul_(squares, grads, grads, 1 - group["alpha"])
        roots = torch._foreach_sqrt(squares)
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_addcdiv_(params, grads, roots, -group["lr"])

    @staticmethod
    def _adam(p, g, state, group):
        if not state:
            state["step"], state["exp_avg"], state["exp_avg_sq"] = 0, torch.zeros_like(p), torch.zeros_like(p)
        state["step"] += 1
        first, second = group["betas"]
        m, v = state["exp_avg"], state["exp_avg_sq"]
        m.lerp_(g, 1 - first)
        v.mul_(second).addcmul_(g, g, value=1 - second)
        unbiased = (v / (1 - second ** state["step"])).sqrt_().add_(group["eps"])
        p.addcdiv_(m, unbiased, value=-group["lr"] / (1 - first ** state["step"]))


def optimizer_for(model, lr: float, lr_orth: float, method: str = "RMSprop", alpha: float = 0.99,
                  betas=(0.9, 0.999), Tdecay: float = 0.0) -> OrthogonalRMSprop:
    """The optimizer of a task's model: each group of its parameters with the rate and the rule that belong to it."""
    cell, stair = model.network.cell, model.network.stair
    rotation = [cell.rotation.logarithm] if cell and cell.rotation else []              # A
    triangular = [cell.upper] if cell and cell.upper is not None else []                # T of nnRNN
    bounded = list(stair.parameters()) if stair and stair.minimum is not None else []
    named = {id(p) for p in (*rotation, *triangular, *bounded)}
    free = [p for p in model.parameters() if p.requires_grad and id(p) not in named]

    groups = [dict(params=free),
              dict(params=rotation, lr=lr_orth),
              dict(params=triangular, weight_decay=Tdecay),
              dict(params=bounded, minimum=stair.minimum if stair else None)]
    return OrthogonalRMSprop([group for group in groups if group["params"]], lr, method, alpha, betas)


def step(model, optimizer, loss: torch.Tensor, *, alam: float = 0.0, clip: float = 0.0) -> None:
    """One update of a task's model from `loss` + `alam` · penalty; `clip` > 0 bounds the norm of the gradient."""
    optimizer.zero_grad()
    if alam and model.network.cell:
        loss = loss + alam * model.network.cell.penalty()
    loss.backward()
    if clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
