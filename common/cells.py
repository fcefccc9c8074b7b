"""The cells: what the recurrent matrix W is.

    net-type   W                                                                       input bias
    RNN        a free matrix (RNN-Orth: started at an orthogonal one)                  yes
    expRNN     exp(S), S skew-symmetric: a rotation by construction                    no
    nnRNN      P (Λ + T) Pᵀ, P = exp(S); Λ blocks γ_k R(θ_k); T strictly upper         no
    LSTM       the gated baseline, without a stair                                     yes

expRNN is arXiv 1901.08428, nnRNN arXiv 1905.12080. A cell knows its parameters, not time: `project` maps
the input, `kernel` forms W (once per sequence; `engine` as in `common.recurrence`), `penalty` is what it adds to the
loss. `common.network` joins a cell, a stair and a nonlinearity into a network.

A triangle is stored as the vector of its size(size−1)/2 free numbers: the optimizer sees no number that is
always 0, and the size of a parameter is the count of its free numbers.
"""

import math

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from common.orthogonal import ROTATION_STARTS, skew_exponential, skew_start, triangle, triangle_indices
from common.recurrence import native_engine

NET_TYPES = ("RNN", "RNN-Orth", "expRNN", "nnRNN", "LSTM")
RECURRENT_STARTS = ("xavier", *ROTATION_STARTS)


def glorot_normal(rows: int, columns: int) -> torch.Tensor:
    """N(0, 2/(rows + columns)) → (rows, columns). Glorot and Bengio 2010, eq. 16."""
    return torch.randn(rows, columns) * math.sqrt(2 / (rows + columns))


INPUT_STARTS = {  # U (I, H)
    "xavier": glorot_normal,                                                             # N(0, 2/(I + H))
    "kaiming": lambda I, H: torch.randn(I, H) * math.sqrt(2 / I),                        # N(0, 2/I)
    "linear": lambda I, H: torch.empty(I, H).uniform_(-1, 1) / math.sqrt(I),             # U(±1/√I), as torch.nn.Linear
}


def look_up(symbols: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The rows (V, N) of symbols of any shape, int64 → (..., N)."""
    if symbols.is_cuda:  # as a product: in the gradients of torch's lookups the order of sums changes from run to run
        return (symbols.unsqueeze(-1) == torch.arange(len(rows), device=symbols.device)).to(rows.dtype) @ rows
    return rows.index_select(0, symbols.flatten()).unflatten(0, symbols.shape)


def check_start(net_type: str, rinit: str) -> None:
    """Raises ValueError where the recurrent start `rinit` has no meaning for `net_type`."""
    starts = {"RNN": RECURRENT_STARTS, "LSTM": ("xavier", "random")}.get(net_type, ROTATION_STARTS)
    if rinit not in starts:
        what = "the gates of an LSTM" if net_type == "LSTM" else f"{net_type}, whose matrix starts orthogonal"
        raise ValueError(f"{rinit} has no meaning for {what}; use {', '.join(starts)}")


class Cell(nn.Module):
    """The input map U (I, H) and its bias. Each cell adds `kernel(engine)` → W (H, H), and sets what it has of

    rotation   a `Rotation`, whose logarithm takes the orthogonal step of the optimizer
    upper      the entries of T, for the weight decay `Tdecay`
    """

    def __init__(self, input_size: int, hidden_size: int, iinit: str, input_bias: bool):
        super().__init__()
        self.input_size, self.hidden_size = input_size, hidden_size
        self.rotation = self.upper = None
        if iinit not in INPUT_STARTS:
            raise ValueError(f"there is no input start '{iinit}'; choose one of {', '.join(INPUT_STARTS)}")
        self.input_weight = nn.Parameter(INPUT_STARTS[iinit](input_size, hidden_size))
        bound = 1 / math.sqrt(input_size)
        self.input_bias = nn.Parameter(torch.empty(hidden_size).uniform_(-bound, bound)) if input_bias else None

    def project(self, x: torch.Tensor, embedding: torch.Tensor | None = None) -> torch.Tensor:
        """x U + bias → (T, B, H), for vectors x (T, B, I) or symbols x (T, B) of an integer dtype.

        A symbol stands for its row of `embedding` (V, I), or for its one-hot row without one. Either way the
        V possible projections are formed once and looked up, which is work for V rows instead of T·B.
        """
        if x.is_floating_point():
            projected = x.flatten(0, 1) @ self.input_weight                              # (T·B, H)
            return (projected if self.input_bias is None else projected + self.input_bias).unflatten(0, x.shape[:2])
        table = self.input_weight if embedding is None else embedding @ self.input_weight
        table = table if self.input_bias is None else table + self.input_bias
        return look_up(x, table)

    def penalty(self):
        """What the cell adds to the loss, before the factor `alam`: 0 except for nnRNN."""
        return 0.0


class RNN(Cell):
    """W is a free matrix, started at `rinit`: Glorot normal (xavier) or an orthogonal matrix."""

    def __init__(self, input_size: int, hidden_size: int, rinit: str = "xavier", iinit: str = "xavier"):
        super().__init__(input_size, hidden_size, iinit, input_bias=True)
        if rinit == "xavier":
            start = glorot_normal(hidden_size, hidden_size)
        elif rinit == "random":
            start = nn.init.orthogonal_(torch.empty(hidden_size, hidden_size))    # Haar on O(H)
        else:
            start = skew_exponential(skew_start(rinit, hidden_size))
        self.recurrent_weight = nn.Parameter(start)

    def kernel(self, engine="auto"):
        return self.recurrent_weight


class Rotation(nn.Module):
    """exp(S) for a skew-symmetric S = A − Aᵀ, whose strict upper triangle A is the parameter."""

    def __init__(self, size: int, rinit: str):
        super().__init__()
        self.size = size
        self.register_buffer("indices", triangle_indices(size), persistent=False)
        self.logarithm = nn.Parameter(skew_start(rinit, size).flatten()[self.indices])   # (H(H−1)/2,)

    def skew(self) -> torch.Tensor:
        """S (H, H)."""
        upper = triangle(self.logarithm, self.indices, self.size)
        return upper - upper.t()

    def forward(self, engine: str = "auto") -> torch.Tensor:
        """exp(S) (H, H), in compiled code where `engine` runs the recurrence in it."""
        if engine in ("auto", "native") and native_engine.serves(self.logarithm):
            return native_engine.native_exponential(self.logarithm, self.size)
        return skew_exponential(self.skew())

    @torch.no_grad()
    def error(self) -> float:
        """max |P Pᵀ − 1| of P = exp(S). The W of nnRNN is not orthogonal."""
        p = self()
        return (p @ p.t() - torch.eye(self.size, dtype=p.dtype, device=p.device)).abs().max().item()


class ExpRNN(Cell):
    """W = exp(S): orthogonal by construction."""

    def __init__(self, input_size: int, hidden_size: int, rinit: str = "cayley", iinit: str = "xavier"):
        super().__init__(input_size, hidden_size, iinit, input_bias=False)
        self.rotation = Rotation(hidden_size, rinit)

    def kernel(self, engine="auto"):
        return self.rotation(engine)


class NNRNN(Cell):
    """W = P (Λ + T) Pᵀ, the real Schur form of a non-normal matrix. H must be even.

    P = exp(S). Λ is block diagonal, block k = γ_k [[cos θ_k, −sin θ_k], [sin θ_k, cos θ_k]]. T is strictly
    upper triangular. Starts: γ = 1, θ ~ U(0, 2π), T = 0.
    """

    def __init__(self, input_size: int, hidden_size: int, rinit: str = "cayley", iinit: str = "xavier"):
        if hidden_size % 2:
            raise ValueError(f"nnRNN pairs its hidden units, so their number must be even, not {hidden_size}")
        super().__init__(input_size, hidden_size, iinit, input_bias=False)
        self.rotation = Rotation(hidden_size, rinit)
        self.gamma = nn.Parameter(torch.ones(hidden_size // 2))
        self.theta = nn.Parameter(torch.empty(hidden_size // 2).uniform_(0, 2 * math.pi))
        self.upper = nn.Parameter(torch.zeros(hidden_size * (hidden_size - 1) // 2))

    def kernel(self, engine="auto"):
        return _SchurProduct.apply(self.rotation(engine), self.upper, self.gamma, self.theta, self.rotation.indices)

    def penalty(self):
        """Σ_k (γ_k − 1)², a scalar tensor."""
        return nn.functional.mse_loss(self.gamma, torch.ones_like(self.gamma), reduction="sum")


class _SchurProduct(torch.autograd.Function):
    """P (Λ + T) Pᵀ from P (H, H), the entries of T, γ and θ (H/2,). One node of autograd replaces a dozen."""

    @staticmethod
    def forward(ctx, p, upper, gamma, theta, indices):
        cos, sin = theta.cos(), theta.sin()
        schur = triangle(upper, indices, len(p))                                         # T
        _blocks(schur).add_((gamma * torch.stack((cos, -sin, sin, cos))).t().view(-1, 2, 2))
        left = p @ schur
        ctx.save_for_backward(p, schur, left, gamma, cos, sin, indices)
        return left @ p.t()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        p, schur, left, gamma, cos, sin, indices = ctx.saved_tensors
        d_left = grad @ p
        d_p = torch.addmm(grad.t() @ left, d_left, schur.t())
        d_schur = p.t() @ d_left
        d_00, d_01, d_10, d_11 = _blocks(d_schur).flatten(1).unbind(1)
        d_cos, d_sin = d_00 + d_11, d_10 - d_01                                          # of γ cos θ and γ sin θ
        return (d_p, d_schur.flatten().index_select(0, indices), cos * d_cos + sin * d_sin,
                gamma * (cos * d_sin - sin * d_cos), None)


def _blocks(matrix: torch.Tensor) -> torch.Tensor:
    """The 2×2 blocks on the diagonal of a contiguous matrix (H, H), as a view (H/2, 2, 2)."""
    size = len(matrix)
    return matrix.as_strided((size // 2, 2, 2), (2 * (size + 1), size, 1))
