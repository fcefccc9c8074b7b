"""The stairs: ρ against numbers written out by hand, the factors and the nonlinearities one value at a time."""

import math

import pytest
import torch

from common.stair import (
    NONLINEARITIES,
    RULES,
    SCHEDULES,
    ExponentialStair,
    FixedStair,
    LearnedStair,
    Nonlinearity,
    nonlinearity,
    schedule,
    stair_activation,
    stair_factor,
)

# ρ_0 … ρ_4, from the table of the paper with a pocket calculator
BY_HAND = {
    "none": [1, 1, 1, 1, 1],
    "n": [0.5, 0.6666667, 0.75, 0.8, 0.8333333],
    "n2": [0.75, 0.8888889, 0.9375, 0.96, 0.9722222],
    "expn": [0.8646647, 0.9502129, 0.9816844, 0.9932621, 0.9975212],
    "logn": [-0.4426950, 0.0897608, 0.2786525, 0.3786651, 0.4418894],
    "log2n": [0.5191017, 0.5657055, 0.5975704, 0.6210768, 0.6393262],
    "sqrtlogn": [0.0459354, 0.1506782, 0.2117520, 0.2529320, 0.2831330],
}
ALIASES = {"1n": "n", "n^2": "n2", "1n2": "n2"}


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_the_schedules_are_those_of_the_paper():
    assert set(SCHEDULES) == set(BY_HAND)


@pytest.mark.parametrize("name", [*BY_HAND, *ALIASES])
def test_schedule_by_hand(name):
    found = schedule(name, 5)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(BY_HAND[ALIASES.get(name, name)], abs=6e-8)


@pytest.mark.parametrize("name", [*BY_HAND, *ALIASES])
def test_fixed_stair(name):
    stair = FixedStair(name, 5)
    assert stair.rule == "scale"
    assert stair(3).tolist() == pytest.approx(BY_HAND[ALIASES.get(name, name)][:3], abs=1e-6)
    assert list(stair.parameters()) == []
    assert stair.state_dict() == {}


@pytest.mark.parametrize("name", ["", "N", "log", "expn "])
def test_unknown_schedule(name):
    with pytest.raises(ValueError, match="there is no schedule"):
        schedule(name, 3)


@pytest.mark.parametrize("stair", [FixedStair("n", 4), LearnedStair(4), ExponentialStair(4)])
def test_sequence_longer_than_the_stair(stair):
    assert stair(4).shape == (4,)
    with pytest.raises(ValueError, match="4 steps, the sequence 5"):
        stair(5)


def test_learned_stairs_start_where_they_are_told():
    assert LearnedStair(3).numbers.tolist() == [1, 1, 1]
    assert LearnedStair(3, 0.98).numbers.tolist() == pytest.approx([0.98] * 3)
    assert ExponentialStair(2).numbers.tolist() == [20, 20]
    assert ExponentialStair(2, 3).numbers.tolist() == [3, 3]


def test_rules_and_bounds_of_the_stairs():
    assert (LearnedStair(1).rule, LearnedStair(1).minimum) == ("scale", None)
    assert (ExponentialStair(1).rule, ExponentialStair(1).minimum) == ("exponential", 0)
    assert (ExponentialStair(1, literal=True).rule, ExponentialStair(1, literal=True).minimum) == ("literal", 0)


Z = (-2.0, -0.5, 0.0, 0.5, 2.0)
# 1 − e^{−αy} for α = 1.5: y = 0.5 and 2 → 0.5276334, 0.9502129; y = −0.5 and −2 → −1.1170000, −19.0855369
FACTORS = {
    "scale": (1.5, 1.5, 1.5, 1.5, 1.5),
    "exponential": (0.9502129, 0.5276334, 0, 0.5276334, 0.9502129),
    "literal": (-19.0855369, -1.1170000, 0, 0.5276334, 0.9502129),
}


@pytest.mark.parametrize("rule", FACTORS)
def test_factor_by_hand(rule):
    assert set(FACTORS) == set(RULES)
    found = stair_factor(rule, numbers(1.5), numbers(*Z)).expand(5)
    assert found.tolist() == pytest.approx(FACTORS[rule], abs=6e-8)


def test_exponential_factor_is_bounded():
    z = torch.linspace(-30, 30, 6001, dtype=torch.float64)
    for alpha in (0.0, 1e-8, 0.3, 1.0):
        g = stair_factor("exponential", numbers(alpha), z)
        assert g.min() >= 0
        assert g.max() < 1
    assert stair_factor("exponential", numbers(20.0), z).max() <= 1      # 1 − e^{−600} rounds to 1


def test_exponential_factor_keeps_small_numbers():
    assert stair_factor("exponential", numbers(1e-10), numbers(1e-10)).item() == pytest.approx(1e-20, rel=1e-12)


# b = −0.25 below; tanh 0.5 = 0.4621172, tanh 2 = 0.9640276; σ(0.5) = 0.6224593, σ(2) = 0.8807971
PHI = {
    "none": Z,
    "tanh": (-0.9640276, -0.4621172, 0, 0.4621172, 0.9640276),
    "relu": (0, 0, 0, 0.5, 2),
    "sigmoid": (0.1192029, 0.3775407, 0.5, 0.6224593, 0.8807971),
    "modrelu": (-1.75, -0.25, 0, 0.25, 1.75),
}


@pytest.mark.parametrize("name", PHI)
def test_nonlinearity_by_hand(name):
    assert set(PHI) == set(NONLINEARITIES)
    bias = numbers(-0.25) if name == "modrelu" else None
    assert nonlinearity(name, numbers(*Z), bias).tolist() == pytest.approx(PHI[name], abs=6e-8)


@pytest.mark.parametrize(("z", "b", "phi"), [
    (0.2, -0.25, 0), (-0.2, -0.25, 0),         # below the threshold: off
    (0.2, 0.25, 0.45), (-0.2, 0.25, -0.45),    # a positive bias pushes away from zero
    (0.0, 0.25, 0), (0.0, -0.25, 0), (0.25, -0.25, 0)])
def test_modrelu_threshold(z, b, phi):
    assert nonlinearity("modrelu", numbers(z), numbers(b)).item() == pytest.approx(phi, abs=1e-15)


@pytest.mark.parametrize("rule", FACTORS)
@pytest.mark.parametrize("name", PHI)
def test_activation_is_the_product(rule, name):
    bias = numbers(-0.25) if name == "modrelu" else None
    found = stair_activation(numbers(*Z), numbers(1.5), rule, name, bias)
    assert found.tolist() == pytest.approx([g * f for g, f in zip(FACTORS[rule], PHI[name], strict=True)], abs=2e-6)


def test_modrelu_bias_start():
    torch.manual_seed(1)
    bias = Nonlinearity("modrelu", 4000).bias
    assert bias.shape == (4000,)
    assert bias.abs().max() <= 0.01
    assert bias.std().item() == pytest.approx(0.01 / math.sqrt(3), rel=0.05)
    assert abs(bias.mean().item()) < 4 * 0.01 / math.sqrt(3 * 4000)


@pytest.mark.parametrize("name", [n for n in PHI if n != "modrelu"])
def test_the_others_have_no_parameter(name):
    phi = Nonlinearity(name, 3)
    assert list(phi.parameters()) == []
    assert phi(numbers(*Z)).tolist() == pytest.approx(PHI[name], abs=6e-8)


@pytest.mark.parametrize("name", ["", "gelu", "ModReLU"])
def test_unknown_nonlinearity(name):
    with pytest.raises(ValueError, match="there is no nonlinearity"):
        Nonlinearity(name, 3)
