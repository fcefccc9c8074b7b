"""Rotations through their logarithm: W = exp(S), S = A − Aᵀ, A strictly upper triangular.

The matrix exponential here is a Taylor polynomial of degree 8 with scaling and squaring. It keeps its
products, so that its adjoint (the map that pulls a gradient back from exp(S) to S) costs two products for
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
_ROOT = math.sqrt(177.0)
_X3 = 2 / 3
_X1 = _X3 * (1 + _ROOT) / 88
_X2 = _X3 * (1 + _ROOT) / 352
_X4 = (-271 + 29 * _ROOT) / (315 * _X3)
_X5 = (-11 + 11 * _ROOT) / (1260 * _X3)
_X6 = (-99 + 11 * _ROOT) / (5040 * _X3)
_X7 = (89 - _ROOT) / (5040 * _X3**2)
_Y2 = (857 - 58 * _ROOT) / 630

# The largest norm for which T8 is exact to rounding: x⁹/9! ≈ 2⁻²⁵ and 2⁻⁵³.
_LARGEST_NORM = {torch.float32: 0.58, torch.float64: 0.0499}


def squarings_for(square: torch.Tensor) -> int:
    """How often S must be halved before T8 is exact to rounding in its dtype, from S² (H, H).

    ‖S‖₂ ≤ √‖S²‖₁, much tighter than ‖S‖₁ for a dense S. Reads one number from the device.
    """
    norm = math.sqrt(square.abs().sum(0).max().item())
    if not math.isfinite(norm) or norm == 0.0:
        return 0  # what is not finite has an exponential that is not finite: the caller's loss shows it
    return max(0, math.ceil(math.log2(norm / _LARGEST_NORM[square.dtype])))


def matrix_exponential(matrix: torch.Tensor, squarings: int | None = None) -> torch.Tensor:
    """exp of `matrix` (H, H) in float32 or float64 → (H, H), differentiable once.

    squarings   how often to scale and square. None measures it from the norm, which waits for the device;
                a number keeps the call free of host synchronisation (too large costs digits, too small all).
    """
    return _Exponential.apply(matrix, squarings)


class _Exponential(torch.autograd.Function):
    @staticmethod
    def forward(ctx, matrix, squarings):
        a2 = matrix @ matrix
        if squarings is None:
            squarings = squarings_for(a2)
        a, a2 = matrix / 2**squarings, a2 / 4**squarings      # exact: powers of two
        a4_left = _X1 * a + _X2 * a2
        a4 = a2 @ a4_left
        left = _X3 * a2 + a4
        right = (_X5 * a).add_(a2, alpha=_X6).add_(a4, alpha=_X7)
        right.diagonal().add_(_X4)
        power = torch.addmm(a, left, right).add_(a2, alpha=_Y2)
        power.diagonal().add_(1.0)
        powers = []
        for _ in range(squarings):
            powers.append(power)
            power = power @ power
        ctx.save_for_backward(a, a2, a4_left, left, right, *powers)
        ctx.squarings = squarings
        return power

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        a, a2, a4_left, left, right, *powers = ctx.saved_tensors
        for power in reversed(powers):                        # Y = X X
            grad = torch.addmm(grad @ power.t(), power.t(), grad)
        d_left, d_right = grad @ right.t(), left.t() @ grad   # T8 = 1 + A + y2 A² + left·right
        d_a4 = torch.add(d_left, d_right, alpha=_X7)
        d_a4_left = a2.t() @ d_a4                             # A⁴-term = A² · a4_left
        d_a2 = torch.addmm(_Y2 * grad + _X3 * d_left + _X6 * d_right + _X2 * d_a4_left, d_a4, a4_left.t())
        d_a = grad + _X5 * d_right + _X1 * d_a4_left
        d_a = d_a.addmm_(d_a2, a.t()).addmm_(a.t(), d_a2)     # A² = A A
        return d_a.div_(2**ctx.squarings), None


def triangle_indices(size: int, device=None) -> torch.Tensor:
    """Where the strict upper triangle of a (size, size) matrix lies in its flat memory → (size(size−1)/2,) int64."""
    row, column = torch.triu_indices(size, size, offset=1, device=device)
    return row * size + column


def triangle(values: torch.Tensor, indices: torch.Tensor, size: int) -> torch.Tensor:
    """The strictly upper triangular matrix A (size, size) that holds `values` (size(size−1)/2,) row by row."""
    return values.new_zeros(size * size).index_copy(0, indices, values).view(size, size)


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
