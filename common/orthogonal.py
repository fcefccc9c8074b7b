"""Rotations through their logarithm: W = exp(S), S = A − Aᵀ, A strictly upper triangular.

The matrix exponential here is a polynomial of degree 8 with scaling and squaring. It keeps its products, so that its
adjoint (the map that pulls a gradient back from exp(S) to S) costs less than two products for each one of the forward
pass, where torch.matrix_exp exponentiates a matrix of twice the size. The eigenvalues of S are imaginary, so the
polynomial need only be near exp on a stretch of the imaginary axis: its derivative is Chebyshev's expansion there,
which serves almost twice the norm that Taylor's does with the same error.

Sources: Tal-Ezer and Kosloff, "An accurate and efficient scheme for propagating the time dependent Schrödinger
equation", J. Chem. Phys. 81 (1984) 3967 (Chebyshev's expansion); Bader, Blanes, Casas, "Computing the matrix
exponential with an optimized Taylor polynomial approximation", Mathematics 7 (2019) 1174, eq. 12 (degree 8 in three
products); Higham, "Functions of Matrices" (2008), chapter 10 (scaling and squaring, the Fréchet derivative);
Lezcano-Casado and Martínez-Rubio, arXiv 1901.08428 (expRNN), whose starts are below.
"""

import math
from collections import namedtuple

import torch
from torch.autograd.function import once_differentiable

ROTATION_STARTS = ("skew", "henaff", "cayley", "random")

# The largest norm x that the polynomial serves: the error of its derivative, 2 J₈(x), is 2⁻²³ and 2⁻⁵², a rounding, and
# so is that of exp(S) beside S.
LARGEST_NORM = {torch.float32: 0.94, torch.float64: 0.076}

# Squarings that a GPU always does. Rotations start at a norm of π or less, whose bound (`squarings_for`) is a few times
# that for a dense S, and S grows in training; where it needs more (a norm of 481 in float32), exp(S) is NaN there.
MOST_SQUARINGS = {torch.float32: 9, torch.float64: 13}


# p(A) = 1 + y1 A + y2 A² + y3 L R in three products: L = A² (x1 + x2 A + A²), R = L + x3 + x4 A + x5 A². Its derivative
# is e^{iy} = J₀(x) + 2 Σ iᵏ Jₖ(x) Tₖ(y / x), up to k = 7, for the largest norm x (Jacobi and Anger);
# tests/science/test_orthogonal.py works these numbers out.
Polynomial = namedtuple("Polynomial", "x1 x2 x3 x4 x5 y1 y2 y3")
POLYNOMIAL = {
    torch.float32: Polynomial(25.246082659821692, 3.9841727499692956, 598.4607364013153, 179.1963725937529,
                              -8.82017932167114, 0.9999998844710278, 0.1354989756871326, 2.4125096330068664e-05),
    torch.float64: Polynomial(24.61242254620678, 3.999896855074194, 597.2426165192293, 176.02104018655749,
                              -9.213911972607292, 0.9999999999999998, 0.13549269400680186, 2.4797110974191835e-05),
}


def squarings_for(square: torch.Tensor) -> torch.Tensor:
    """How often S must be halved before the polynomial serves it, from S² (H, H) → a scalar tensor.

    ‖S‖₂ ≤ √‖S²‖₁, much tighter than ‖S‖₁ for a dense S. 0 for an S that is not finite.
    """
    norm = square.abs().sum(1).max().sqrt()               # S² is symmetric: rows are columns
    return (norm / LARGEST_NORM[square.dtype]).log2().ceil().clamp(min=0).nan_to_num(posinf=0)


def skew_exponential(skew: torch.Tensor, most_squarings: int | None = None) -> torch.Tensor:
    """exp of a skew-symmetric S (H, H) in float32 or float64 → a rotation (H, H), differentiable once.

    The gradient is the skew part of the whole one: the only directions in which S stays skew-symmetric.

    most_squarings   None, on a CPU: as many squarings as S needs. A number: always so many products, of which the
                     device keeps those that S needs, so that the host need not wait for it. NaN where S needs more.
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
        p = POLYNOMIAL[skew.dtype]
        inner = torch.add(a2, a, alpha=p.x2)
        inner.diagonal().add_(p.x1)
        left = a2 @ inner
        right = torch.add(left, a, alpha=p.x4).add_(a2, alpha=p.x5)
        right.diagonal().add_(p.x3)
        power = torch.addmm(a, left, right, beta=p.y1, alpha=p.y3).add_(a2, alpha=p.y2)
        power.diagonal().add_(1.0)
        powers = []
        for wanted in squares:
            powers.append(power)
            squared = power @ power                           # on a CPU `wanted` is None: the number is known
            power = squared if wanted is None else torch.where(wanted, squared, power)
        ctx.save_for_backward(a, a2, inner, left, right, *powers)
        ctx.scale, ctx.squares = scale, squares
        return power

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        a, a2, inner, left, right, *powers = ctx.saved_tensors
        # On transposed gradients: the adjoint at S is the derivative at S in the direction of the transposed gradient.
        grad = grad.t().contiguous()
        for power, wanted in zip(reversed(powers), reversed(ctx.squares), strict=True):           # Y = X X
            squared = torch.addmm(power @ grad, grad, power)
            grad = squared if wanted is None else torch.where(wanted, squared, grad)
        p = POLYNOMIAL[grad.dtype]
        scaled = grad * p.y3
        d_right = scaled @ left
        d_left = torch.addmm(d_right, right, scaled)          # R = L + …
        d_inner = d_left @ a2                                 # L = A² · inner
        d_a2 = torch.addmm(d_inner, inner, d_left).add_(grad, alpha=p.y2).add_(d_right, alpha=p.x5)
        d_a = torch.mul(grad, p.y1).add_(d_right, alpha=p.x4).add_(d_inner, alpha=p.x2)
        # A² = A A gives A D + D A, whose skew part is that of A (D + Dᵀ): one product for two.
        d_a.addmm_(a, d_a2 + d_a2.t())
        return (d_a.t() - d_a).mul_(0.5 * ctx.scale), None


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
        cos = torch.cos(u * math.pi / 2)
        superdiagonal = torch.zeros(size - 1)
        superdiagonal[::2] = -math.pi * u if name == "henaff" else -torch.sqrt((1 - cos) / (1 + cos))
        return torch.diag(superdiagonal, 1) - torch.diag(superdiagonal, -1)
    if name == "random":
        return rotation_logarithm(haar_rotation(size)).to(torch.get_default_dtype())
    raise ValueError(f"there is no orthogonal start '{name}'; choose one of {', '.join(ROTATION_STARTS)}")


def haar_rotation(size: int) -> torch.Tensor:
    """A rotation (size, size) drawn from the Haar measure on SO(size), float64: det = +1 made of one of O(size)."""
    q = torch.nn.init.orthogonal_(torch.empty(size, size, dtype=torch.float64))
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
