"""A cell, a stair and a nonlinearity as one recurrent network; the LSTM beside it; read-out and loss.

`build_network` makes a network from the names of the command line. A network maps a sequence x to the states
h (T, B, H); `ReadOut` maps states to logits, and `mean_cross_entropy` is their loss.
"""

import math

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from common.cells import NNRNN, RNN, Cell, ExpRNN, check_start, glorot_normal, look_up
from common.recurrence import engine_for, run_recurrence, without_autocast
from common.stair import Nonlinearity


class StairRNN(nn.Module):
    """A cell, a stair and a nonlinearity as one recurrent network."""

    def __init__(self, cell: Cell, stair, nonlinearity: Nonlinearity, engine: str = "auto"):
        super().__init__()
        self.cell, self.stair, self.nonlinearity, self.engine = cell, stair, nonlinearity, engine
        self.hidden_size = cell.hidden_size

    def initial_state(self, batch: int) -> torch.Tensor:
        """The state before the first step: zeros (B, H)."""
        return self.cell.input_weight.new_zeros(batch, self.hidden_size)

    def kernel(self) -> torch.Tensor:
        """W (H, H). An evaluation over many sequences forms it once and hands it to `forward`."""
        with without_autocast(self.cell.input_weight.device):      # a rotation stays one
            return self.cell.kernel(self.engine)

    def forward(self, x, state=None, kernel=None, embedding=None, last_only=False):
        """x as in `Cell.project` → h (T, B, H), or (B, H) with `last_only`; and the last state (B, H)."""
        state = self.initial_state(x.shape[1]) if state is None else state
        kernel = self.kernel() if kernel is None else kernel
        x = self.cell.project(x, embedding).to(kernel.dtype)                               # another one under autocast
        self.engine_that_ran = engine_for(x, self.stair, self.nonlinearity, self.engine)
        h = run_recurrence(self.engine_that_ran, x, kernel, state, self.stair, self.nonlinearity, last_only)
        return h, (h if last_only else h[-1])


class LSTM(nn.Module):
    """The gated baseline of the nnRNN paper: torch.nn.LSTM with the starts of that paper's code.

    Each gate has one matrix over (h, x), Glorot normal N(0, 2/(2H + I)), and one bias vector U(±1/√(H + I)). With
    `rinit` random the part over h is orthogonal. torch.nn.LSTM has a second bias vector: it stays 0.
    """

    cell = stair = None

    def __init__(self, input_size: int, hidden_size: int, rinit: str = "xavier"):
        super().__init__()
        self.input_size, self.hidden_size = input_size, hidden_size
        self.lstm = nn.LSTM(input_size, hidden_size)
        bound = 1 / math.sqrt(hidden_size + input_size)
        with torch.no_grad():
            for over_x, over_h in zip(self.lstm.weight_ih_l0.chunk(4), self.lstm.weight_hh_l0.chunk(4), strict=True):
                gate = glorot_normal(hidden_size, hidden_size + input_size)
                over_x.copy_(gate[:, hidden_size:])
                over_h.copy_(gate[:, :hidden_size]) if rinit == "xavier" else nn.init.orthogonal_(over_h)
            self.lstm.bias_ih_l0.uniform_(-bound, bound)
            self.lstm.bias_hh_l0.zero_()
        self.lstm.bias_hh_l0.requires_grad_(False)

    def initial_state(self, batch: int) -> torch.Tensor:
        """Hidden and cell state before the first step: zeros (2, B, H)."""
        return self.lstm.weight_hh_l0.new_zeros(2, batch, self.hidden_size)

    def kernel(self):
        """An LSTM has no derived matrix to form: None."""
        return None

    def forward(self, x, state=None, kernel=None, embedding=None, last_only=False):
        """As `StairRNN.forward`; the state (2, B, H) holds h and c."""
        state = self.initial_state(x.shape[1]) if state is None else state
        if not x.is_floating_point():
            rows = torch.eye(self.input_size, dtype=state.dtype, device=x.device) if embedding is None else embedding
            x = look_up(x, rows)
        h, (h_last, c_last) = self.lstm(x, (state[:1], state[1:]))
        return (h[-1] if last_only else h), torch.cat((h_last, c_last))


def build_network(net_type: str, input_size: int, hidden_size: int, stair, nonlin, rinit: str, iinit: str,
                  engine: str = "auto") -> nn.Module:
    """The network that the options name: a `StairRNN`, or an `LSTM` (which leaves stair, `nonlin` and `iinit` out).

    nonlin   φ: one of `NONLINEARITIES`, or a function of z
    Raises ValueError for a combination that has no meaning.
    """
    check_start(net_type, rinit)
    if net_type == "LSTM":
        return LSTM(input_size, hidden_size, rinit)
    cell = {"RNN": RNN, "RNN-Orth": RNN, "expRNN": ExpRNN, "nnRNN": NNRNN}[net_type]
    made = cell(input_size, hidden_size, rinit, iinit)     # before φ: both draw from one generator
    return StairRNN(made, stair, nonlin if callable(nonlin) else Nonlinearity(nonlin, hidden_size), engine)


class ReadOut(nn.Linear):
    """torch.nn.Linear with its own start, U(±1/√H) for weight (C, H) and bias. Logits lie class by class, (C, N)."""

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """h (..., H) → logits (..., C)."""
        return class_by_class(h, self.weight, self.bias)


def class_by_class(h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """h (..., H), weight (C, H), bias (C,) → logits (..., C), a view of (C, N) numbers.

    A softmax over few classes then runs along long rows of memory: 7 times faster on a CPU for 9 classes.
    """
    logits = torch.addmm(bias.unsqueeze(1), weight, h.flatten(0, -2).t())                # (C, N)
    return logits.t().unflatten(0, h.shape[:-1])


def mean_cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """torch's cross entropy over all positions: logits (..., C), target (...) → a scalar.

    With C as the second dimension, as in `class_by_class`, it is fast on a CPU, but on a GPU its bits would change.
    """
    logits, target = logits.flatten(0, -2), target.flatten()
    return cross_entropy(logits, target) if logits.is_cuda else cross_entropy(logits.t()[None], target[None])
