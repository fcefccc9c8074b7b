"""Rotations through their logarithm: W = exp(S), S = A − Aᵀ, A strictly upper triangular.

The matrix exponential here is a Taylor polynomial of degree 8 with scaling and squaring. It keeps its
products, so that its adjoint (the map that pulls a gradient back from exp(S) to S) costs less than two products for
each one of the forward pass, where torch.matrix_exp exponentiates a matrix of twice the size.

Sources: Bader, Blanes, Casas, "Computing the matrix exponential with an optimized Taylor polynomial
approximation", Mathematics 7 (2019) 1174, eq. 12 (degree 8 in three products); Higham, "Functions of
Matrices" (2008), chapter 10 (scaling and squaring, the Fréchet derivative); Lezcano-Casado and
Martínez-Rubio, arXiv 1901.08428 (expRNN), whose starts are below.
"""

import math

import torch
from torch.autograd.function import once_differentiable

ROTATION_STARTS = ("skew", "henaff", "cayley", "random")

# exp(A) ≈ T8(A), degree 8 in three products; the coefficients follow from one free choice, x3 = 2/3.
#   A4 = A² (x1 A + x2 A²),   T8 = 1 + A + y2 A² + (x3 A² + A4) (x4 + x5 A + x6 A² + x7 A4)
_ROOT = math.sqrt(177.0)
_X3 = 2 / 3
_X1 = _X3 * (1 + _ROOT) / 88
_X2 = _X3 * (1 + _ROOT) / 352
_X4 = (-271 + 29 * _ROOT) / (315 * _X3)
_X5 = (-11 + 11 * _ROOT) / (1260 * _X3)
_X6 = (-99 + 11 * _ROOT) / (5040 * _X3)
_X7 = (89 - _ROOT) / (5040 * _X3**2)
_Y2 = (857 - 58 * _ROOT) / 630

# The largest norm x for which T8 is exact to rounding: its error beside S itself, x⁸/9!, ≈ 2⁻²⁵ and 2⁻⁵³.
_LARGEST_NORM = {torch.float32: 0.58, torch.float64: 0.0499}

# Squarings that a GPU always does. Rotations start at a norm of π or less, whose bound (`squarings_for`) is a few times
# that for a dense S, and S grows in training; beyond `largest_norm` exp(S) is NaN there. A squaring costs an update
# three products of H × H matrices: for H = 1024 6.4 GFLOP, beside 121 of the recurrence in a step of the characters.
MOST_SQUARINGS = {torch.float32: 9, torch.float64: 13}


def largest_norm(dtype: torch.dtype = torch.float32) -> float:
    """The bound of ‖S‖ up to which exp(S) is a number on every device: 297 in float32. A CPU has no such limit."""
    return _LARGEST_NORM[dtype] * 2 ** MOST_SQUARINGS[dtype]


def squarings_for(square: torch.Tensor) -> torch.Tensor:
    """How often S must be halved before T8 is exact to rounding in its dtype, from S² (H, H) → a scalar tensor.

    ‖S‖₂ ≤ √‖S²‖₁, much tighter than ‖S‖₁ for a dense S. 0 for an S that is not finite.
    """
    norm = square.abs().sum(1).max().sqrt()               # S² is symmetric: rows are columns
    return (norm / _LARGEST_NORM[square.dtype]).log2().ceil().clamp(min=0).nan_to_num(posinf=0)


def skew_exponential(skew: torch.Tensor, most_squarings: int | None = None) -> torch.Tensor:
    """exp of a skew-symmetric S (H, H) in float32 or float64 → a rotation (H, H), differentiable once.

    The gradient is the skew part of the whole one: the only directions in which S stays skew-symmetric.

    most_squarings   None reads from the device how often to scale and square, on a CPU. A number leaves that to
                     the device: always as many products, whose surplus is thrown away, and no host synchronisation.
                     What would need more of them comes back as NaN.
    """
    if most_squarings is None and skew.device.type != "cpu":
        most_squarings = MOST_SQUARINGS[skew.dtype]
    return _Exponential.apply(skew, most_squarings)


class _Exponential(torch.autograd.Function):
    @staticmethod
    def forward(ctx, skew, most_squarings):
        a2 = skew @ skew
        needed = squarings_for(a2)
        if most_squarings is None:
            count = int(needed.item())
            scale, squares = 0.5**count, [None] * count
        else:
            wanted = torch.arange(most_squarings, device=skew.device) < needed
            halvings = torch.where(wanted, 0.5, 1.0).prod()   # as exact as exp2, which a GPU compiles on first use
            scale = torch.where(needed > most_squarings, math.nan, halvings)
            squares = wanted.unbind()
        a, a2 = skew * scale, a2 * scale**2                   # exact: powers of two
        # The formula above with x1 and x7 taken out of the sums: fewer passes over H·H numbers.
        a4_left = torch.add(a, a2, alpha=_X2 / _X1)
        left = torch.addmm(a2, a2, a4_left, beta=_X3, alpha=_X1)
        right = torch.add(left, a, alpha=_X5 / _X7).add_(a2, alpha=_X6 / _X7 - _X3)
        right.diagonal().add_(_X4 / _X7)
        power = torch.addmm(a, left, right, alpha=_X7).add_(a2, alpha=_Y2)
        power.diagonal().add_(1.0)
        powers = []
        for wanted in squares:
            powers.append(power)
            power = _where(wanted, power @ power, power)
        ctx.save_for_backward(a, a2, a4_left, left, right, *powers)
        ctx.scale, ctx.squares = scale, squares
        return power

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        a, a2, a4_left, left, right, *powers = ctx.saved_tensors
        for power, wanted in zip(reversed(powers), reversed(ctx.squares), strict=True):           # Y = X X
            grad = _where(wanted, torch.addmm(grad @ power.t(), power.t(), grad), grad)
        d_right = left.t() @ grad                             # T8 = 1 + A + y2 A² + x7 left·right
        d_left = torch.addmm(d_right, grad, right.t())
        d_a4_left = a2 @ d_left                               # left = x3 A² + x1 A² a4_left; A² is symmetric
        d_a2 = torch.addmm(d_a4_left, d_left, a4_left.t(), beta=_X2 * _X7, alpha=_X1 * _X7)
        d_a2.add_(grad, alpha=_Y2).add_(d_right, alpha=_X6 - _X3 * _X7).add_(d_left, alpha=_X3 * _X7)
        d_a = torch.add(grad, d_right, alpha=_X5).add_(d_a4_left, alpha=_X1 * _X7)
        # A² = A A gives D Aᵀ + Aᵀ D, whose skew part is that of −(D + Dᵀ) A: one product for two.
        d_a.addmm_(d_a2 + d_a2.t(), a, alpha=-1)
        return (d_a - d_a.t()).mul_(0.5 * ctx.scale), None


def _where(wanted, new, old):
    """`new` where the device wants it, `old` else; `new` where nothing is left to choose."""
    return new if wanted is None else torch.where(wanted, new, old)


def triangle_indices(size: int, device=None) -> torch.Tensor:
    """Where the strict upper triangle of a (size, size) matrix lies in its flat memory → (size(size−1)/2,) int64."""
    row, column = torch.triu_indices(size, size, offset=1, device=device)
    return row * size + column


def triangle(values: torch.Tensor, indices: torch.Tensor, size: int) -> torch.Tensor:
    """The strictly upper triangular matrix A (size, size) that holds `values` (size(size−1)/2,) row by row."""
    return values.new_zeros(size * size).scatter(0, indices, values).view(size, size)


def skew_start(name: str, size: int) -> torch.Tensor:
    """A skew-symmetric S (size, size) to start exp(S) from.

    skew     the skew part of a matrix of uniform ±1/√size entries (what the authors' sRNN code makes)
    henaff   2×2 blocks [[0, s], [−s, 0]], s ~ U(−π, 0)                              (Henaff et al. 2016)
    cayley   the same with s = −√((1 − cos u)/(1 + cos u)), u ~ U(0, π/2)            (Helfrich et al. 2018)
    random   the logarithm of a Haar-random rotation
    Raises ValueError for another name.
    """
    if name == "skew":
        upper = torch.empty(size, size).uniform_(-1, 1).div_(math.sqrt(size)).triu(1)
        return upper - upper.t()
    if name in ("henaff", "cayley"):
        u = torch.rand(size // 2)
        if name == "henaff":
            s = -math.pi * u
        else:
            cos = torch.cos(u * math.pi / 2)
            s = -torch.sqrt((1 - cos) / (1 + cos))
        superdiagonal = torch.zeros(size - 1)
        superdiagonal[::2] = s
        return torch.diag(superdiagonal, 1) - torch.diag(superdiagonal, -1)
    if name == "random":
        return rotation_logarithm(haar_rotation(size)).to(torch.get_default_dtype())
    raise ValueError(f"there is no orthogonal start '{name}'; choose one of {', '.join(ROTATION_STARTS)}")


def haar_rotation(size: int) -> torch.Tensor:
    """A rotation (size, size) drawn from the Haar measure on SO(size), float64.

    The QR factors of a Gaussian matrix, with R's diagonal made positive (Mezzadri 2007) and det = +1.
    """
    q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))
    q = q * torch.sign(torch.diagonal(r))
    if torch.linalg.det(q) < 0:
        q[:, 0] = -q[:, 0]
    return q


def rotation_logarithm(rotation: torch.Tensor) -> torch.Tensor:
    """The principal logarithm S, skew-symmetric, of a rotation (H, H): exp(S) = rotation. float64.

    Through the Cayley transform K = (R − 1)(R + 1)⁻¹: iK is Hermitian, its eigenvectors are unitary to
    rounding, and an eigenvalue tan(θ/2) of K belongs to the angle θ of R. A rotation by exactly π has no
    Cayley transform; a Haar-random one meets that with probability 0.
    """
    rotation = rotation.double()
    eye = torch.eye(len(rotation), dtype=torch.float64)
    cayley = torch.linalg.solve(rotation + eye, rotation - eye)     # the two factors commute
    cayley = (cayley - cayley.t()) / 2
    tangents, vectors = torch.linalg.eigh(-1j * cayley)             # K = V i·diag(tan(θ/2)) Vᴴ
    angles = 2 * torch.atan(tangents)
    logarithm = ((vectors * (1j * angles)) @ vectors.mH).real
    return (logarithm - logarithm.t()) / 2
