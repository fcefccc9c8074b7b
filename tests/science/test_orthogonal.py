"""Rotations: the exponential and its adjoint against scipy, the starts against their definitions."""

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.special
import torch
from numpy.polynomial import Polynomial as Poly

from common.orthogonal import (
    LARGEST_NORM,
    MOST_SQUARINGS,
    POLYNOMIAL,
    ROTATION_STARTS,
    haar_rotation,
    rotation_logarithm,
    skew_exponential,
    skew_start,
    squarings_for,
    triangle,
    triangle_indices,
)

SIZES = (1, 2, 3, 8, 33, 64)


def random_skew(size, norm, seed=0):
    upper = np.triu(np.random.default_rng(seed).standard_normal((size, size)), 1)
    skew = upper - upper.T
    return skew * (norm / max(np.linalg.norm(skew, 2), 1e-30))


def skew_part(matrix):
    return (matrix - matrix.T) / 2


@pytest.mark.parametrize("norm", [0.0, 1e-9, 0.04, 0.06, 1.0, 3.14, 30.0, 300.0])
@pytest.mark.parametrize("size", SIZES)
def test_exponential_equals_scipy(size, norm):
    skew = random_skew(size, norm)
    found = skew_exponential(torch.from_numpy(skew)).numpy()
    assert np.abs(found - scipy.linalg.expm(skew)).max() <= 1e-14 * (10 + norm)   # scipy's own error


@pytest.mark.parametrize("norm", [0.04, 1.0, 3.14, 30.0])
@pytest.mark.parametrize("size", [1, 2, 3, 8, 33])
def test_adjoint_equals_scipy(size, norm):
    """The gradient of ⟨G, exp(S)⟩ is the skew part of the Fréchet derivative at Sᵀ in the direction G (Higham 2008)."""
    skew, direction = random_skew(size, norm), np.random.default_rng(1).standard_normal((size, size))
    leaf = torch.from_numpy(skew).requires_grad_()
    skew_exponential(leaf).backward(torch.from_numpy(direction))
    expected = skew_part(scipy.linalg.expm_frechet(skew.T, direction, compute_expm=False))
    assert np.abs(leaf.grad.numpy() - expected).max() <= 2e-14 * (10 + norm) * np.abs(direction).max()


@pytest.mark.parametrize("start", ROTATION_STARTS)
@pytest.mark.parametrize("size", SIZES)
def test_exponential_of_every_start(start, size):
    torch.manual_seed(3)
    skew = skew_start(start, size).double()
    found = skew_exponential(skew)
    assert np.abs(found.numpy() - scipy.linalg.expm(skew.numpy())).max() < 1e-13
    torch.testing.assert_close(found @ found.t(), torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-13)


@pytest.mark.parametrize("most_squarings", [None, 8])
def test_gradcheck(most_squarings):
    upper = torch.from_numpy(np.triu(random_skew(4, 2.0))).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: skew_exponential(a.triu(1) - a.triu(1).t(), most_squarings), upper)


@pytest.mark.parametrize("start", ROTATION_STARTS)
def test_float32(start):
    torch.manual_seed(7)
    skew = skew_start(start, 128)
    exact = torch.from_numpy(scipy.linalg.expm(skew.double().numpy()))
    leaf = skew.clone().requires_grad_()
    found = skew_exponential(leaf)
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() < 5e-6
    assert (found @ found.t() - torch.eye(128)).abs().max() < 1e-5
    direction = torch.randn(128, 128)
    found.backward(direction)
    expected = skew_part(scipy.linalg.expm_frechet(skew.double().numpy().T, direction.double().numpy(),
                                                   compute_expm=False))
    assert np.abs(leaf.grad.numpy() - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("norm", [0.0, 0.04, 1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_device_chooses_the_same_squarings(norm, dtype):
    """As on a GPU: without reading the norm, the surplus squarings thrown away. Value and gradient keep their bits."""
    results = []
    for most_squarings in (None, 9):
        leaf = torch.from_numpy(random_skew(9, norm)).to(dtype).requires_grad_()
        found = skew_exponential(leaf, most_squarings)
        found.backward(torch.arange(81, dtype=dtype).view(9, 9).cos())
        results.append((found.detach(), leaf.grad))
    assert all(map(torch.equal, *results))


def test_too_few_squarings_are_loud():
    skew = torch.from_numpy(random_skew(9, 3.0))
    assert skew_exponential(skew, 9).isfinite().all()
    assert skew_exponential(skew, 2).isnan().all()


@pytest.mark.parametrize("dtype", MOST_SQUARINGS)
@pytest.mark.parametrize("name", ROTATION_STARTS)
def test_what_a_gpu_squares_is_enough_for_every_start(name, dtype):
    skew = skew_start(name, 256).to(dtype)
    always = MOST_SQUARINGS[dtype]
    assert squarings_for(skew @ skew) <= always - 2                                 # and S may grow fourfold
    torch.testing.assert_close(skew_exponential(skew, always), skew_exponential(skew), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("dtype", "norm", "squarings"), [
    (torch.float32, 0.9, 0), (torch.float32, 1.0, 1), (torch.float32, 4.0, 3),
    (torch.float64, 0.07, 0), (torch.float64, 0.08, 1), (torch.float64, 3.1, 6)])
def test_squarings_by_hand(dtype, norm, squarings):
    """A 2×2 block [[0, s], [−s, 0]] has S² = −s² 1, so its norm is s exactly."""
    skew = torch.tensor([[0, norm], [-norm, 0]], dtype=dtype)
    assert squarings_for(skew @ skew) == squarings


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 2**-23), (torch.float64, 2**-51)])
def test_the_polynomial_on_the_imaginary_axis(dtype, error):
    """The derivative's error stays within its bound up to the largest norm, and passes it soon after."""
    p = POLYNOMIAL[dtype]
    square, exact = Poly([0, 0, 1]), np.linspace(0, 1.3 * LARGEST_NORM[dtype], 200)
    left = square * Poly([p.x1, p.x2, 1])
    whole = Poly([1, p.y1, p.y2]) + p.y3 * left * (left + Poly([p.x3, p.x4, p.x5]))
    wrong = np.abs(whole.deriv()(1j * exact) - np.exp(1j * exact))
    assert wrong[exact <= LARGEST_NORM[dtype]].max() < error < wrong.max()
    assert whole(0) == 1
    norm, k = LARGEST_NORM[dtype], np.arange(8)                         # in powers of A = iy
    expansion = np.polynomial.chebyshev.cheb2poly(np.where(k, 2, 1) * 1j**k * scipy.special.jv(k, norm))
    assert whole.deriv().coef == pytest.approx((expansion * (-1j / norm) ** k).real, rel=1e-11)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_what_is_not_finite_comes_back_at_once(value):
    skew = torch.zeros(4, 4)
    skew[0, 1], skew[1, 0] = value, -value
    assert not skew_exponential(skew).isfinite().all()


def test_triangle_row_by_row():
    found = triangle(torch.arange(1.0, 7.0), triangle_indices(4), 4)
    assert found.tolist() == [[0, 1, 2, 3], [0, 0, 4, 5], [0, 0, 0, 6], [0, 0, 0, 0]]


@pytest.mark.parametrize("size", SIZES)
def test_triangle_size(size):
    assert len(triangle_indices(size)) == size * (size - 1) // 2


@pytest.mark.parametrize("start", ROTATION_STARTS)
@pytest.mark.parametrize("size", SIZES)
def test_starts_are_skew_symmetric(start, size):
    skew = skew_start(start, size)
    assert skew.shape == (size, size)
    assert skew.dtype == torch.get_default_dtype()
    assert torch.equal(skew, -skew.t())
    assert size < 3 or skew.abs().max() > 0


@pytest.mark.parametrize("size", [2, 7, 2000, 2001])
@pytest.mark.parametrize("start", ["henaff", "cayley"])
def test_block_starts(start, size):
    """2×2 blocks only; s within its range, and distributed over it as its definition says."""
    torch.manual_seed(0)
    skew = skew_start(start, size)
    s = skew.diagonal(1)[::2]
    assert len(s) == size // 2
    assert skew.count_nonzero() == 2 * s.count_nonzero()
    if size % 2:
        assert not skew[-1].any()
    low = -math.pi if start == "henaff" else -1.0          # √((1 − cos u)/(1 + cos u)) = tan(u/2), u < π/2
    assert low <= s.min()
    assert s.max() <= 0
    if size >= 2000:
        u = -s.double() / math.pi if start == "henaff" else 4 / math.pi * torch.atan(-s.double())
        assert u.mean().item() == pytest.approx(0.5, abs=4 / math.sqrt(12 * len(u)))     # u is uniform on (0, 1)
        assert u.var().item() == pytest.approx(1 / 12, rel=0.1)


def test_skew_start_is_uniform():
    torch.manual_seed(0)
    size = 400
    values = skew_start("skew", size)[tuple(torch.triu_indices(size, size, 1))]
    assert values.abs().max() <= 1 / math.sqrt(size)
    assert values.var().item() == pytest.approx(1 / (3 * size), rel=0.02)


def test_starts_differ_and_follow_the_seed():
    def draw(name, seed):
        torch.manual_seed(seed)
        return skew_start(name, 6)

    for name in ROTATION_STARTS:
        assert torch.equal(draw(name, 1), draw(name, 1))
        assert not torch.equal(draw(name, 1), draw(name, 2))
        assert all(not torch.equal(draw(name, 1), draw(other, 1)) for other in ROTATION_STARTS if other != name)


@pytest.mark.parametrize("name", ["", "xavier", "Henaff"])
def test_unknown_start(name):
    with pytest.raises(ValueError, match="there is no orthogonal start"):
        skew_start(name, 4)


@pytest.mark.parametrize("size", SIZES)
def test_haar_rotation_is_a_rotation(size):
    for seed in range(6):
        torch.manual_seed(seed)
        rotation = haar_rotation(size)
        assert rotation.dtype == torch.float64
        torch.testing.assert_close(rotation @ rotation.t(), torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-13)
        assert torch.linalg.det(rotation).item() == pytest.approx(1)


def test_haar_rotation_has_no_preferred_direction():
    """Every entry of a Haar rotation in three dimensions is uniform on (−1, 1): mean 0, second moment 1/3."""
    torch.manual_seed(0)
    draws = torch.stack([haar_rotation(3) for _ in range(3000)])
    assert draws.mean(0).abs().max() < 4.5 / math.sqrt(3 * 3000)
    assert (draws.square().mean(0) - 1 / 3).abs().max() < 0.03
    first = draws[:, :, 0].sort(0).values                           # Kolmogorov-Smirnov by hand, at 1e-5
    uniform = torch.linspace(-1, 1, 3000, dtype=torch.float64)[:, None]
    assert (first - uniform).abs().max() / 2 < 2.5 / math.sqrt(3000)


@pytest.mark.parametrize("size", SIZES)
def test_logarithm_inverts_the_exponential(size):
    torch.manual_seed(11)
    rotation = haar_rotation(size)
    logarithm = rotation_logarithm(rotation)
    assert torch.equal(logarithm, -logarithm.t())
    assert np.linalg.norm(logarithm.numpy(), 2) <= math.pi + 1e-9
    assert np.abs(scipy.linalg.expm(logarithm.numpy()) - rotation.numpy()).max() < 1e-10


@pytest.mark.parametrize("angle", [0.0, 1e-8, 1.0, -2.5, 3.1])
def test_logarithm_by_hand(angle):
    rotation = torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]],
                            dtype=torch.float64)
    logarithm = rotation_logarithm(rotation)
    torch.testing.assert_close(logarithm, torch.tensor([[0, angle], [-angle, 0]], dtype=torch.float64),
                               rtol=1e-12, atol=1e-15)
