"""The time loop: every engine against the plain loop in float64, values and every gradient."""

import itertools

import pytest
import torch
from torch import nn

from common.recurrence import ENGINES, native_build, native_engine, stair_recurrence, torch_engine, unfit_reason
from common.recurrence.reference_engine import reference_recurrence
from common.recurrence.torch_engine import sequence_recurrence
from common.stair import NONLINEARITIES, RULES, FixedStair, LearnedStair, Nonlinearity, Stair

CASES = list(itertools.product(RULES, NONLINEARITIES))
T, B, H = 7, 3, 5


def problem(rule, phi, steps=T, seed=0):
    """x, kernel, h0, numbers, bias: float64 leaves, of a size at which nothing saturates or explodes."""
    generator = torch.Generator().manual_seed(seed)
    size = 0.3 if rule == "literal" else 1.0

    def leaf(*shape, scale=1.0, shift=0.0):
        values = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale + shift
        return values.requires_grad_()

    numbers = leaf(steps, scale=0.4) if rule == "scale" else leaf(steps, scale=0.1, shift=0.5)
    bias = leaf(H, scale=0.2) if phi == "modrelu" else None
    x = leaf(steps, B, H, scale=0.7 * size, shift=0.3)
    return x, leaf(H, H, scale=0.6 * size), leaf(B, H, scale=0.5), numbers, bias


def solve(engine, given, rule, phi, last_only):
    """Value and gradients of a weighted sum of the result."""
    leaves = [t for t in given if t is not None]
    h = engine(*given, last_only) if engine is stair_recurrence else engine(*given[:4], rule, phi, given[4], last_only)
    weight = torch.linspace(-1, 2, h.numel(), dtype=h.dtype).view(h.shape)
    return h.detach(), torch.autograd.grad((h * weight).sum(), leaves)


@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize(("rule", "phi"), CASES)
def test_torch_engine_equals_reference(rule, phi, last_only):
    given = problem(rule, phi)
    h, gradients = solve(sequence_recurrence, given, rule, phi, last_only)
    expected, expected_gradients = solve(reference_recurrence, given, rule, phi, last_only)
    torch.testing.assert_close(h, expected, rtol=1e-12, atol=1e-13)
    for found, want in zip(gradients, expected_gradients, strict=True):
        assert want.abs().max() > 0                         # each input matters
        torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("elements", [1, 2 * B * H, 4 * B * H, T * B * H])
@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize(("rule", "phi"), [("scale", "modrelu"), ("exponential", "modrelu"), ("literal", "tanh")])
def test_chunks(monkeypatch, rule, phi, last_only, elements):
    given = problem(rule, phi)
    monkeypatch.setattr(torch_engine, "CHUNK_ELEMENTS", {"cpu": elements})
    _, gradients = solve(sequence_recurrence, given, rule, phi, last_only)
    _, expected = solve(reference_recurrence, given, rule, phi, last_only)
    for found, want in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize(("rule", "phi"), CASES)
def test_gradcheck(rule, phi, last_only):
    given = problem(rule, phi, steps=4, seed=3)

    def function(*leaves):
        x, kernel, h0, numbers, *bias = leaves
        return sequence_recurrence(x, kernel, h0, numbers, rule, phi, bias[0] if bias else None, last_only)

    assert torch.autograd.gradcheck(function, [t for t in given if t is not None])


@pytest.mark.parametrize("wanted", range(5))
def test_a_gradient_for_one_input_alone(wanted):
    given = problem("exponential", "modrelu")
    _, expected = solve(reference_recurrence, given, "exponential", "modrelu", False)
    alone = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(given)]
    h = sequence_recurrence(*alone[:4], "exponential", "modrelu", alone[4], False)
    weight = torch.linspace(-1, 2, h.numel(), dtype=h.dtype).view(h.shape)
    (h * weight).sum().backward()
    torch.testing.assert_close(alone[wanted].grad, expected[wanted], rtol=1e-10, atol=1e-12)
    assert all(t.grad is None for i, t in enumerate(alone) if i != wanted)


def make_stair(rule, numbers):
    stair = LearnedStair(len(numbers)).double()
    with torch.no_grad():
        stair.numbers.copy_(numbers)
    stair.rule = rule
    return stair


def make_nonlinearity(phi, bias):
    module = Nonlinearity(phi, H).double()
    if bias is not None:
        with torch.no_grad():
            module.bias.copy_(bias)
    return module


@pytest.mark.parametrize("engine", ["auto", "native", "torch", "reference"])
@pytest.mark.parametrize(("rule", "phi"), CASES)
def test_contract(engine, rule, phi):
    """Modules in, (T, B, H) or its last step out; gradients land in the modules."""
    if engine == "native" and not native_engine.serves(torch.empty(0, dtype=torch.float64)):
        pytest.skip("no C++ compiler here")
    x, kernel, h0, numbers, bias = problem(rule, phi)
    stair, module = make_stair(rule, numbers), make_nonlinearity(phi, bias)
    h = stair_recurrence(x, kernel, h0, stair, module, engine)
    last = stair_recurrence(x, kernel, h0, stair, module, engine, last_only=True)
    expected = reference_recurrence(x, kernel, h0, numbers, rule, phi, bias, False)
    torch.testing.assert_close(h, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(last, expected[-1], rtol=1e-12, atol=1e-13)
    h.sum().backward()
    want, = torch.autograd.grad(expected.sum(), numbers)
    torch.testing.assert_close(stair.numbers.grad, want, rtol=1e-10, atol=1e-12)


# ── stairs and nonlinearities of one's own ───────────────────────────────────────────────────────────────


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
    given, stair, phi = problem("scale", "none")[:3], make_stair(), make_phi()
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
    if "native" in able and engine in ("auto", "native") and not native_engine.serves(torch.empty(0).double()):
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
    """native.cpp and the kernels know no name that is added to common/stair.py, and would take it for another."""
    phi = Nonlinearity("tanh", H)
    phi.name = "swish"
    for engine in ("native", "triton"):
        assert unfit_reason(engine, H, FixedStair("n", 3), phi).startswith(f"the {engine} engine computes the nonlin")


@pytest.mark.parametrize("shape", [(T, H + 1), (T, 1), (T, B, H)])
def test_numbers_that_fit_nothing(shape):
    stair = LearnedStair(1)
    stair.numbers = nn.Parameter(torch.ones(shape))
    with pytest.raises(ValueError, match=r"LearnedStair gives numbers of shape \(1, .+\) for one step of 5 units"):
        stair_recurrence(*problem("scale", "none")[:3], stair, Nonlinearity("tanh", H))


def test_a_rule_that_does_not_exist():
    stair = FixedStair("n", T)
    stair.rule = "scales"
    with pytest.raises(ValueError, match="FixedStair has the rule 'scales', which does not exist; choose "):
        stair_recurrence(*problem("scale", "none")[:3], stair, Nonlinearity("tanh", H))


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


@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize(("rule", "phi"), CASES)
def test_without_gradients(rule, phi, last_only):
    given = problem(rule, phi)
    before = [t.detach().clone() for t in given if t is not None]
    with torch.no_grad():
        h = sequence_recurrence(*given[:4], rule, phi, given[4], last_only)
    expected = reference_recurrence(*given[:4], rule, phi, given[4], last_only)
    assert not h.requires_grad
    torch.testing.assert_close(h, expected.detach(), rtol=1e-12, atol=1e-13)
    for old, now in zip(before, (t for t in given if t is not None), strict=True):
        assert torch.equal(old, now)                        # the loop writes into nothing it was given


def test_result_is_the_callers():
    """The result can be written to without harm to the gradient or to the state given."""
    given = problem("scale", "tanh", steps=1)
    h0 = given[2].detach().clone()
    for last_only in (False, True):
        with torch.no_grad():
            sequence_recurrence(*given[:4], "scale", "tanh", None, last_only).zero_()
        assert torch.equal(given[2].detach(), h0)


@pytest.mark.parametrize("last_only", [False, True])
def test_one_step(last_only):
    given = problem("scale", "modrelu", steps=1)
    h, gradients = solve(sequence_recurrence, given, "scale", "modrelu", last_only)
    expected, expected_gradients = solve(reference_recurrence, given, "scale", "modrelu", last_only)
    torch.testing.assert_close(h, expected)
    for found, want in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-12)


def test_float32_long_sequence():
    """784 steps of a rotation: float32 stays close to float64, nothing is lost on the way."""
    torch.manual_seed(0)
    kernel = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64))[0]
    x, h0 = torch.randn(784, 2, 16, dtype=torch.float64) * 0.05, torch.zeros(2, 16, dtype=torch.float64)
    stair = FixedStair("n2", 784)
    phi = Nonlinearity("tanh", 16)
    exact = stair_recurrence(x, kernel, h0, stair, phi, "reference")
    found = stair_recurrence(x.float(), kernel.float(), h0.float(), stair, phi, "torch")
    assert (found - exact).abs().max() < 2e-4
    assert exact[-1].abs().max() > 0.05


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


def test_engines_have_their_names():
    assert ENGINES["reference"] is reference_recurrence
    assert ENGINES["torch"] is sequence_recurrence
