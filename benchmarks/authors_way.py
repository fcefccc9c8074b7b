"""How the authors' code computes a training step, written anew for comparison: autograd through a Python loop.

Every time step is a one-hot input where the task has symbols, an input map, a matrix product, a stair factor, a
modReLU of five operations and, where the task asks for one, a read-out with its own loss. W = exp(S) is formed by
torch.matrix_exp and differentiated by its own backward, in the place of their own expm. As in the public nnRNN
code, every γ_k and θ_k is a parameter of its own, Λ is filled number by number, and the penalty is summed term by
term. Two torch.optim.RMSprop objects step the parameters.
"""

import math

import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss, one_hot


class AuthorsModel(nn.Module):
    """Input map, recurrent matrix of `net_type`, stair ρ_t = 1 − e^−(t+2), modReLU, read-out.

    `skew` (H, H) is the logarithm that a rotation starts from.
    """

    def __init__(self, net_type: str, input_size: int, hidden_size: int, classes: int, skew: torch.Tensor):
        super().__init__()
        self.net_type, self.hidden_size = net_type, hidden_size
        self.input = nn.Linear(input_size, hidden_size, bias=net_type.startswith("RNN"))
        self.bias = nn.Parameter(torch.empty(hidden_size).uniform_(-0.01, 0.01))
        self.readout = nn.Linear(hidden_size, classes)
        if net_type.startswith("RNN"):
            self.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(hidden_size, hidden_size)))
        else:
            self.log_rotation = nn.Parameter(skew.triu(1))
        if net_type == "nnRNN":
            self.gamma = nn.ParameterList(torch.ones(1) for _ in range(hidden_size // 2))
            self.theta = nn.ParameterList(2 * math.pi * torch.rand(1) for _ in range(hidden_size // 2))
            self.upper = nn.Parameter(torch.zeros(hidden_size, hidden_size))

    def kernel(self):
        """W (H, H)."""
        if self.net_type.startswith("RNN"):
            return self.weight
        a = self.log_rotation.triu(1)
        rotation = torch.matrix_exp(a - a.t())
        if self.net_type == "expRNN":
            return rotation
        turn, size = torch.zeros_like(rotation), torch.zeros_like(rotation)
        for k, (gamma, theta) in enumerate(zip(self.gamma, self.theta, strict=True)):
            i, j = 2 * k, 2 * k + 1
            turn[i, i], turn[i, j], turn[j, i], turn[j, j] = theta.cos(), -theta.sin(), theta.sin(), theta.cos()
            size[i, i] = size[i, j] = size[j, i] = size[j, j] = gamma
        return rotation @ (self.upper.triu(1) + size * turn) @ rotation.t()

    def penalty(self):
        """Σ_k (γ_k − 1)²."""
        return sum(mse_loss(gamma, torch.ones_like(gamma)) for gamma in self.gamma) if self.net_type == "nnRNN" else 0.0

    def states(self, x):
        """x (T, B, I), or symbols (T, B), → a list of T hidden states (B, H)."""
        kernel = self.kernel()
        h = kernel.new_zeros(x.shape[1], self.hidden_size)
        states = []
        for t in range(x.shape[0]):
            x_t = x[t] if x.is_floating_point() else one_hot(x[t], self.input.in_features).to(h.dtype)
            z = self.input(x_t) + h @ kernel
            h = (1 - math.exp(-(t + 2))) * (torch.sign(z) * torch.relu(torch.abs(z) + self.bias))
            states.append(h)
        return states


def training_step(model: AuthorsModel, x, target, every_step: bool):
    """→ a function that does one update: loss at every step for target (T, B), else from the last state."""
    others = [p for name, p in model.named_parameters() if name != "log_rotation"]
    optimizers = [torch.optim.RMSprop(others, lr=1e-5, alpha=0.9)]
    if not model.net_type.startswith("RNN"):
        optimizers.append(torch.optim.RMSprop([model.log_rotation], lr=1e-6, alpha=0.9))

    def step():
        for optimizer in optimizers:
            optimizer.zero_grad()
        states = model.states(x)
        answered = list(zip(states, target.view(len(x), -1), strict=True)) if every_step else [(states[-1], target)]
        loss = sum(cross_entropy(model.readout(h), answer) for h, answer in answered) / len(answered)
        (loss + 1e-4 * model.penalty()).backward()
        for optimizer in optimizers:
            optimizer.step()

    return step
