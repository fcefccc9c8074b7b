"""The time loop: every engine of a CPU against the plain loop in float64, values and every gradient."""

import itertools
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from problems import FORMULAS, problem, worst
from torch import nn

from common.cells import RNN
from common.network import StairRNN, build_network
from common.recurrence import ENGINES, native_build, stair_recurrence, torch_engine, unavailable_reason, unfit_reason
from common.recurrence.reference_engine import reference_recurrence
from common.recurrence.torch_engine import sequence_recurrence
from common.stair import ExponentialStair, FixedStair, LearnedStair, Nonlinearity, Stair, stair_activation

REASON = unavailable_reason("native", torch.device("cpu"))
NATIVE = pytest.param("native", marks=pytest.mark.skipif(REASON is not None, reason=f"no native engine: {REASON}"))
FAST = ["torch", NATIVE]
T, B, H = 7, 3, 5
SIZES = [(1, 1, 1), (2, 3, 7), (2, 13, 65), (33, 3, 7), (33, 10, 65), (2, 10, 190), (33, 1, 190)]  # T, B, H


@pytest.mark.parametrize("engine", FAST)
@pytest.mark.parametrize(("rule", "phi"), FORMULAS)
def test_equals_the_reference(engine, rule, phi):
    for sizes, last_only in itertools.product(SIZES, (False, True)):
        given = problem(rule, phi, *sizes)
        assert worst(ENGINES[engine], given, rule, phi, last_only) < 1e-12
        constant = [None if t is None else t.detach() for t in given]
        before = [t.clone() for t in constant if t is not None]
        assert worst(ENGINES[engine], constant, rule, phi, last_only) < 1e-12
        assert all(map(torch.equal, before, (t for t in constant if t is not None)))     # nothing given is written to


@pytest.mark.parametrize("engine", [*FAST, "reference"])
@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize(("rule", "phi"), FORMULAS)
def test_gradcheck(engine, rule, phi, last_only):
    given = problem(rule, phi, 3, 2, 5)

    def function(*leaves):
        x, kernel, h0, numbers, *bias = leaves
        return ENGINES[engine](x, kernel, h0, numbers, rule, phi, bias[0] if bias else None, last_only)

    assert torch.autograd.gradcheck(function, [t for t in given if t is not None], eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("engine", FAST)
@pytest.mark.parametrize("rule", ["scale", "exponential"])
def test_only_what_is_needed(engine, rule):
    """Gradients of any subset of the inputs, and None for the others."""
    whole = problem(rule, "modrelu", 3, 2, 5)
    for wanted in itertools.product([False, True], repeat=5):
        given = [t.detach().requires_grad_(w) for t, w in zip(whole, wanted, strict=True)]
        assert worst(ENGINES[engine], given, rule, "modrelu", False) < 1e-12


@pytest.mark.parametrize("engine", FAST)
@pytest.mark.parametrize("last_only", [False, True])
def test_strides(engine, last_only):
    """Transposed, expanded and sliced inputs and gradients."""
    x, kernel, h0, numbers, bias = (t.detach() for t in problem("scale", "modrelu", 5, 4, 9))
    kinds = [x.transpose(0, 1).contiguous().transpose(0, 1), x[..., :1].expand_as(x),
             x.permute(2, 0, 1).contiguous().permute(1, 2, 0), torch.stack([x, x], -1)[..., 0]]
    for other in kinds:
        given = [t.requires_grad_() for t in (other.detach(), kernel.t(), h0[:1].expand_as(h0),
                                              torch.stack([numbers, numbers], 1)[:, 0], bias[:1].expand_as(bias))]
        assert worst(ENGINES[engine], given, "scale", "modrelu", last_only) < 1e-12
        sums = [e(*given[:4], "scale", "modrelu", given[4], last_only).sum()              # a gradient that is expanded
                for e in (ENGINES[engine], reference_recurrence)]
        for found, want in zip(*(torch.autograd.grad(total, given) for total in sums), strict=True):
            torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("engine", FAST)
@pytest.mark.parametrize("rule", ["scale", "exponential"])
def test_backward_twice(engine, rule):
    given = problem(rule, "tanh", 4, 3, 8)[:4]
    h = ENGINES[engine](*given, rule, "tanh", None, False)
    first, second = (torch.autograd.grad(h.sum(), given, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("engine", [*FAST, "reference"])
@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize("rule", ["scale", "exponential"])
def test_an_empty_batch_has_gradients_of_zero(engine, rule, last_only):
    given = problem(rule, "modrelu", T, 0, H)
    h = ENGINES[engine](*given[:4], rule, "modrelu", given[4], last_only)
    assert h.shape == ((0, H) if last_only else (T, 0, H))
    for leaf, found in zip(given, torch.autograd.grad(h.sum(), given), strict=True):
        assert torch.equal(found, torch.zeros_like(leaf))


@pytest.mark.parametrize("engine", [*FAST, "reference"])
def test_the_gradient_of_alpha_keeps_its_digits(engine):
    """∂/∂α (1 − e^{−α|z|}) z = |z| z e^{−α|z|}, in float32 too, where e^{−α|z|} is as small as 1e-7."""
    z, alpha = torch.linspace(-1.5, 1.5, 30).view(1, 30, 1), torch.tensor([20.0], requires_grad=True)
    h = ENGINES[engine](z, torch.zeros(1, 1), torch.zeros(30, 1), alpha, "exponential", "none", None, True)
    for row in range(30):
        found, = torch.autograd.grad(h[row, 0], alpha, retain_graph=True)
        exact = z[0, row, 0].double()
        assert found.item() == pytest.approx(float(exact * exact.abs() * torch.exp(-20 * exact.abs())), rel=1e-5)


@pytest.mark.parametrize("rule", ["exponential", "literal"])
def test_derivatives_of_the_exponential_stair(rule):
    """First and second ones, by difference quotients."""
    z = torch.linspace(-1.3, 1.2, 6, dtype=torch.float64, requires_grad=True)
    step = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda step, z: stair_activation(z, step, rule, "tanh", None), (step, z))
    assert torch.autograd.gradgradcheck(lambda step, z: stair_activation(z, step, rule, "tanh", None), (step, z))


@pytest.mark.parametrize("elements", [1, 2 * B * H, T * B * H])
@pytest.mark.parametrize(("rule", "phi"), [("scale", "modrelu"), ("exponential", "modrelu"), ("literal", "tanh")])
def test_slopes_in_chunks(monkeypatch, rule, phi, elements):
    monkeypatch.setattr(torch_engine, "CHUNK_ELEMENTS", {"cpu": elements})
    for last_only in (False, True):
        assert worst(sequence_recurrence, problem(rule, phi, T, B, H), rule, phi, last_only) < 1e-12


def make_nonlinearity(phi, bias):
    module = Nonlinearity(phi, H).double()
    if bias is not None:
        module.bias = nn.Parameter(bias.detach().double())
    return module


class PerUnit(LearnedStair):
    """A number for every step and unit, (T, H)."""

    def __init__(self):
        super().__init__(1)
        self.numbers = nn.Parameter(torch.linspace(0.2, 1.2, T * H, dtype=torch.float64).view(T, H))


class Gaussian(LearnedStair):
    def __init__(self):
        super().__init__(1)
        self.numbers = nn.Parameter(torch.linspace(0.3, 0.8, T, dtype=torch.float64))

    def rule(self, step, z):
        return torch.exp(-step * z**2)


class GaussianPerUnit(PerUnit):
    rule = Gaussian.rule


class WithPower(Gaussian):
    """A rule with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.power = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def rule(self, step, z):
        return torch.exp(-step * z.abs() ** self.power)


class Shaped(Stair):
    """Two learned parameters make the numbers."""

    def __init__(self):
        super().__init__()
        self.ends = nn.Parameter(torch.tensor([1.1, 0.4], dtype=torch.float64))

    def forward(self, steps):
        return self.ends[0] + (self.ends[1] - self.ends[0]) * torch.arange(steps) / T


class PhiOfItsOwn(Nonlinearity):
    def forward(self, z):
        return torch.sin(2 * z)


def leaky():
    return nn.PReLU().double()


def modrelu():
    return make_nonlinearity("modrelu", torch.linspace(-0.2, 0.1, H))


OWN = {  # the stair, φ, and the engines that compute them, the fastest on a CPU first
    "numbers per unit": (PerUnit, modrelu, ("torch",)),
    "a rule": (Gaussian, modrelu, ("torch",)),
    "a rule per unit": (GaussianPerUnit, modrelu, ("torch",)),
    "made numbers": (Shaped, modrelu, ("native", "torch")),
    "a rule that learns": (WithPower, modrelu, ()),
    "a function": (Gaussian, lambda: torch.sin, ("torch",)),
    "a subclass": (Shaped, lambda: PhiOfItsOwn("tanh", H), ("torch",)),
    "a φ that learns": (Shaped, leaky, ()),
    "a φ that mixes units": (Shaped, lambda: nn.Softmax(-1), ()),
    "a φ that mixes rows": (Shaped, lambda: nn.Softmax(0), ()),
}


def solve_own(engine, make_stair, make_phi, last_only):
    """Value, and gradients of x, W, h0 and every parameter of the stair and φ."""
    given, stair, phi = problem("scale", "none", T, B, H)[:3], make_stair(), make_phi()
    leaves = [*given, *stair.parameters(), *(phi.parameters() if isinstance(phi, nn.Module) else ())]
    h = stair_recurrence(*given, stair, phi, engine, last_only)
    weight = torch.linspace(-1, 2, h.numel(), dtype=h.dtype).view(h.shape)
    return h.detach(), torch.autograd.grad((h * weight).sum(), leaves)


@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize("engine", ["auto", "native", "torch", "triton"])
@pytest.mark.parametrize("name", OWN)
def test_a_stair_of_ones_own(name, engine, last_only, capsys):
    """An engine computes what the reference does, or says in a sentence that it cannot; `auto` takes the next one."""
    native_build.say_once.cache_clear()
    make_stair, make_phi, able = OWN[name]
    if "native" in able and engine in ("auto", "native") and REASON is not None:
        pytest.skip("no C++ compiler here")
    if engine == "triton" and "native" in able:
        assert unfit_reason("triton", H, make_stair(), make_phi()) is None
        return
    if engine not in ("auto", *able):
        with pytest.raises(ValueError, match=rf"^the {engine} engine .+; choose the engine auto or reference$"):
            solve_own(engine, make_stair, make_phi, last_only)
        return
    h, gradients = solve_own(engine, make_stair, make_phi, last_only)
    said = capsys.readouterr().err.splitlines()
    expected, expected_gradients = solve_own("reference", make_stair, make_phi, last_only)
    torch.testing.assert_close(h, expected, rtol=1e-12, atol=1e-13)
    for found, want in zip(gradients, expected_gradients, strict=True):
        assert want.abs().max() > 0
        torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-12)
    taken = (*able, "reference")[0]
    assert len(said) == (engine == "auto" and taken != "native")
    assert all(line.startswith(f"stair: running the {taken} engine; the ") for line in said)


def test_a_random_function_is_for_the_reference_alone():
    assert "not random" in unfit_reason("torch", H, Shaped(), nn.Dropout())
    assert unfit_reason("reference", H, Shaped(), nn.Dropout()) is None


def test_a_new_name_is_not_given_to_a_compiled_engine():
    """native.cpp and the kernels have no formula for a name that is added to common/stair.py."""
    phi = Nonlinearity("tanh", H)
    phi.name = "swish"
    for engine in ("native", "triton"):
        assert unfit_reason(engine, H, FixedStair("n", 3), phi).startswith(f"the {engine} engine computes the nonlin")


NEW_NAME = """
import torch
from common.recurrence import engine_for, stair_recurrence
from common.stair import FixedStair, Nonlinearity
for name in ("swish", "tanh", "modrelu"):
    given = torch.ones(3, 2, 5), torch.eye(5) / 2, torch.zeros(2, 5), FixedStair("n", 3), Nonlinearity(name, 5)
    found, want = (stair_recurrence(*given, engine) for engine in ("auto", "reference"))
    print(name, engine_for(given[0], *given[3:]), torch.allclose(found, want))
"""


@pytest.mark.skipif(REASON is not None, reason=f"no native engine: {REASON}")
def test_a_new_name_before_the_others(tmp_path):
    """The compiled engine takes its places from common/stair.py, so that no name becomes another."""
    shutil.copytree(ROOT / "common", tmp_path / "common")
    stair = tmp_path / "common" / "stair.py"
    text = stair.read_text(encoding="utf-8").replace(
        "NONLINEARITIES = {", 'NONLINEARITIES = {"swish": lambda z, b: z * torch.sigmoid(z),')
    stair.write_text(text, encoding="utf-8")
    done = subprocess.run([sys.executable, "-c", NEW_NAME], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["swish torch True", "tanh native True", "modrelu native True"], done.stderr


class Counting(Gaussian):
    """Counts the calls of its rule."""

    calls = 0

    def rule(self, step, z):
        self.calls += 1
        return super().rule(step, z)


def test_what_fits_is_asked_once():
    """The question reads numbers, for which a GPU's host would wait in every step."""
    stair, given = Counting(), problem("scale", "none", T, B, H)[:3]
    network = StairRNN(RNN(2, H).double(), stair, make_nonlinearity("tanh", None))
    with torch.no_grad():
        for run in (lambda: stair_recurrence(*given, stair, torch.sin), lambda: network(torch.ones(T, B, 2).double())):
            run()
            before = stair.calls
            run()
            assert stair.calls == before + T


@pytest.mark.parametrize("engine", ["auto", "torch", "reference"])
@pytest.mark.parametrize("net_type", ["RNN", "expRNN", "nnRNN"])
def test_autocast_around_a_network(net_type, engine):
    """Only the input's product is of fewer bits: W stays as it is, and so do the states and the gradients."""
    torch.manual_seed(0)
    network = build_network(net_type, 3, 8, ExponentialStair(T), "modrelu", "random", "xavier", engine)
    x = torch.randn(T, B, 3)
    exact = network(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        h = network(x)[0]
        kernel = network.kernel()
    assert (h.dtype, kernel.dtype) == (torch.float32, torch.float32)
    assert torch.equal(kernel, network.kernel())
    torch.testing.assert_close(h, exact, rtol=0, atol=0.05)
    h.sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("shape", [(T, H + 1), (T, 1), (T, B, H)])
def test_numbers_that_fit_nothing(shape):
    stair = LearnedStair(1)
    stair.numbers = nn.Parameter(torch.ones(shape))
    with pytest.raises(ValueError, match=r"LearnedStair gives numbers of shape \(1, .+\) for one step of 5 units"):
        stair_recurrence(*problem("scale", "none", T, B, H)[:3], stair, Nonlinearity("tanh", H))


def test_a_rule_that_does_not_exist():
    stair = FixedStair("n", T)
    stair.rule = "scales"
    with pytest.raises(ValueError, match="FixedStair has the rule 'scales', which does not exist; choose "):
        stair_recurrence(*problem("scale", "none", T, B, H)[:3], stair, Nonlinearity("tanh", H))


@pytest.mark.parametrize("engine", ["torch", "reference"])
def test_by_hand(engine):
    """Two steps of one unit: h_0 = ½(1 + 2·0.5) = 1, h_1 = ⅔(−3 + 1·0.5) = −5/3 (ρ = ½, ⅔; φ the identity)."""
    x = torch.tensor([[[1.0]], [[-3.0]]], dtype=torch.float64)
    stair = FixedStair("n", 2).double()
    h = stair_recurrence(x, torch.full((1, 1), 0.5).double(), torch.full((1, 1), 2.0).double(), stair,
                         Nonlinearity("none", 1), engine)
    assert h.flatten().tolist() == pytest.approx([1.0, -5 / 3], abs=1e-7)


def test_rows_are_examples():
    """z = h W, not W h: a shift matrix moves the state to the right."""
    kernel = torch.zeros(3, 3)
    kernel[0, 1] = kernel[1, 2] = 1.0
    h = stair_recurrence(torch.zeros(2, 1, 3), kernel, torch.tensor([[1.0, 2.0, 3.0]]), FixedStair("none", 2),
                         Nonlinearity("none", 3))
    assert h[:, 0].tolist() == [[0, 1, 2], [0, 0, 1]]


def bad(**changed):
    given = dict(x=torch.zeros(3, 2, 4), kernel=torch.zeros(4, 4), h0=torch.zeros(2, 4), stair=FixedStair("n", 3),
                 nonlinearity=Nonlinearity("tanh", 4))
    return stair_recurrence(**{**given, **changed})


@pytest.mark.parametrize(("changed", "sentence"), [
    (dict(x=torch.zeros(0, 2, 4)), "empty"),
    (dict(x=torch.zeros(4, 2, 4)), "3 steps, the sequence 4"),
    (dict(kernel=torch.zeros(4, 5)), r"kernel \(4, 4\)"),
    (dict(kernel=torch.zeros(5, 5)), r"got \(5, 5\)"),
    (dict(h0=torch.zeros(4)), "h0"),
    (dict(h0=torch.zeros(1, 4)), r"h0 \(2, 4\)"),
    (dict(engine="warp"), "there is no engine 'warp'"),
])
def test_errors(changed, sentence):
    assert bad().shape == (3, 2, 4)
    with pytest.raises(ValueError, match=sentence):
        bad(**changed)
