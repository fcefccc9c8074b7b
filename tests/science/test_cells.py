"""The cells: W against its definition written out slowly, what is learned, what each start means."""

import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch.nn.functional import cross_entropy, linear, one_hot

from common.cells import (
    INPUT_STARTS,
    NET_TYPES,
    NNRNN,
    RECURRENT_STARTS,
    RNN,
    ExpRNN,
)
from common.copytask import CopyingTask, CopyModel
from common.language import CharacterModel
from common.network import LSTM, StairRNN, build_network, class_by_class, mean_cross_entropy
from common.optim import optimizer_for, step
from common.smnist import PixelModel
from common.stair import FixedStair, LearnedStair, Nonlinearity

STARTS = ("skew", "henaff", "cayley", "random")


def make(net_type, input_size=4, hidden_size=6, rinit="skew", iinit="xavier", stair=None, nonlin="modrelu", seed=0):
    torch.manual_seed(seed)
    rinit = {"LSTM": "random"}.get(net_type, rinit)
    return build_network(net_type, input_size, hidden_size, stair or FixedStair("n", 20), nonlin, rinit, iinit)


def slow_rotation(rotation) -> np.ndarray:
    """exp(A − Aᵀ) with A filled row by row."""
    size, values = rotation.size, iter(rotation.logarithm.tolist())
    skew = np.zeros((size, size))
    for i in range(size):
        for j in range(i + 1, size):
            skew[i, j] = next(values)
            skew[j, i] = -skew[i, j]
    return scipy.linalg.expm(skew)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("size", [1, 2, 5, 16])
def test_exprnn_kernel(start, size):
    cell = ExpRNN(3, size, start)
    assert np.abs(cell.kernel().detach().numpy() - slow_rotation(cell.rotation)).max() < 3e-6


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("size", [2, 6, 16])
def test_nnrnn_kernel(float64, start, size):
    torch.manual_seed(2)
    cell = NNRNN(3, size, start)
    with torch.no_grad():                                   # away from the start: γ ≠ 1, T ≠ 0
        cell.gamma.uniform_(0.5, 1.5)
        cell.upper.normal_()
    gamma, theta, upper = cell.gamma.tolist(), cell.theta.tolist(), iter(cell.upper.tolist())
    schur = np.zeros((size, size))
    for i in range(size):
        for j in range(i + 1, size):
            schur[i, j] = next(upper)
    for k in range(size // 2):
        block = gamma[k] * np.array([[math.cos(theta[k]), -math.sin(theta[k])],
                                     [math.sin(theta[k]), math.cos(theta[k])]])
        schur[2 * k:2 * k + 2, 2 * k:2 * k + 2] += block
    p = slow_rotation(cell.rotation)
    np.testing.assert_allclose(cell.kernel().detach().numpy(), p @ schur @ p.T, atol=1e-13)


class Kernel(torch.nn.Module):
    """A cell's kernel as a module, for torch.func."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self):
        return self.cell.kernel()


@pytest.mark.parametrize("size", [2, 4, 6])
def test_nnrnn_kernel_gradients(float64, size):
    torch.manual_seed(2)
    cell = NNRNN(3, size, "random")
    with torch.no_grad():
        cell.gamma.uniform_(0.5, 1.5)
        cell.upper.normal_()
    names = ("rotation.logarithm", "upper", "gamma", "theta")
    leaves = [dict(cell.named_parameters())[name].detach().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(
        lambda *values: torch.func.functional_call(
            Kernel(cell), {f"cell.{name}": value for name, value in zip(names, values, strict=True)}, ()), leaves)


def test_nnrnn_start():
    torch.manual_seed(0)
    cell = NNRNN(3, 2000, "henaff")
    assert torch.equal(cell.gamma, torch.ones(1000))
    assert not cell.upper.any()
    assert 0 <= cell.theta.min() < 0.1
    assert 2 * math.pi - 0.1 < cell.theta.max() <= 2 * math.pi
    assert cell.theta.mean().item() == pytest.approx(math.pi, abs=4 * 2 * math.pi / math.sqrt(12 * 1000))


def test_nnrnn_penalty():
    cell = NNRNN(3, 6)
    assert cell.penalty().item() == 0
    with torch.no_grad():
        cell.gamma.copy_(torch.tensor([1.0, 0.5, 3.0]))
    assert cell.penalty().item() == pytest.approx(0.25 + 4)
    cell.penalty().backward()
    assert cell.gamma.grad.tolist() == pytest.approx([0, -1, 4])


@pytest.mark.parametrize("size", [1, 7])
def test_nnrnn_needs_pairs(size):
    with pytest.raises(ValueError, match=f"must be even, not {size}"):
        NNRNN(3, size)


@pytest.mark.parametrize(("net_type", "rinit"), list(itertools.product(NET_TYPES, RECURRENT_STARTS)))
def test_every_start_of_every_cell(net_type, rinit):
    """Valid, and another W than every other start; or one sentence that says what to use.

    Of nnRNN it is P that is started: 2×2 rotations commute, so with T = 0 and γ = 1 a block diagonal P leaves W = Λ.
    """
    meaningless = (rinit == "xavier" and net_type in ("RNN-Orth", "expRNN", "nnRNN")) or \
                  (net_type == "LSTM" and rinit in ("skew", "henaff", "cayley"))

    def draw(start, seed=5):
        torch.manual_seed(seed)
        network = build_network(net_type, 3, 8, FixedStair("n", 2), "tanh", start, "xavier")
        if net_type == "nnRNN":
            return network.cell.rotation().detach()
        return network.lstm.weight_hh_l0.detach() if net_type == "LSTM" else network.kernel().detach()

    if meaningless:
        with pytest.raises(ValueError, match=rf"^{rinit} .*use "):
            draw(rinit)
        return
    w = draw(rinit)
    assert w.isfinite().all()
    assert torch.equal(w, draw(rinit))
    assert not torch.allclose(w, draw(rinit, seed=6), atol=1e-3)
    for other in RECURRENT_STARTS:
        if other == rinit or (other == "xavier" and net_type not in ("RNN", "LSTM")) or \
                (net_type == "LSTM" and other not in ("xavier", "random")):
            continue
        assert not torch.allclose(w, draw(other), atol=1e-3), other


@pytest.mark.parametrize("rinit", STARTS)
@pytest.mark.parametrize("net_type", ["RNN", "RNN-Orth"])
def test_rnn_starts_orthogonal(net_type, rinit):
    w = make(net_type, hidden_size=32, rinit=rinit).kernel().detach()
    assert (w @ w.t() - torch.eye(32)).abs().max() < 1e-5


@pytest.mark.parametrize("net_type", NET_TYPES)
def test_input_start_of_every_cell(net_type):
    """The same seed draws the same numbers: the normal starts differ by √((I + H)/I) and in nothing else."""
    def u(iinit):
        network = make(net_type, 4, 60, iinit=iinit)
        return network.lstm.weight_ih_l0.detach() if net_type == "LSTM" else network.cell.input_weight.detach()

    torch.testing.assert_close(u("kaiming"), u("xavier") * (1 if net_type == "LSTM" else math.sqrt(64 / 4)))
    assert torch.equal(u("linear"), u("xavier")) == (net_type == "LSTM")          # which has no start of U


@pytest.mark.parametrize("name", ["", "uniform", "Xavier"])
def test_unknown_input_start(name):
    assert name not in INPUT_STARTS
    with pytest.raises(ValueError, match="there is no input start"):
        RNN(2, 3, iinit=name)


def test_mean_cross_entropy_equals_torch():
    """In any layout; and the logits of the read-out are those of torch.nn.functional.linear."""
    h, target = torch.randn(7, 3, 6, dtype=torch.float64), torch.randint(5, (7, 3))
    weight, bias = (torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((5, 6), (5,)))
    logits, plain = class_by_class(h, weight, bias), linear(h, weight, bias)
    torch.testing.assert_close(logits, plain, rtol=1e-14, atol=1e-14)
    expected = cross_entropy(plain.flatten(0, 1), target.flatten())
    for loss in (mean_cross_entropy(logits, target), mean_cross_entropy(plain, target)):
        torch.testing.assert_close(loss, expected, rtol=1e-14, atol=0)
        torch.testing.assert_close(torch.autograd.grad(loss, (weight, bias), retain_graph=True),
                                   torch.autograd.grad(expected, (weight, bias), retain_graph=True))


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("net_type", ["expRNN", "nnRNN"])
def test_orthogonal_after_200_updates(net_type, start):
    """Real updates with large steps on S: exp(S) is still a rotation to 1e-5 in float32."""
    torch.manual_seed(0)
    task = CopyingTask(5, 8, 3)
    model = CopyModel(build_network(net_type, 10, 48, FixedStair("expn", task.steps), "modrelu", start, "xavier"), 9)
    optimizer = optimizer_for(model, 1e-3, 1e-2)
    rotation = model.network.cell.rotation
    before = rotation().detach()
    for _ in range(200):
        symbols, target = task.batch(4)
        step(model, optimizer, cross_entropy(model(symbols).flatten(0, 1), target.flatten()), alam=1e-4)
    after = rotation().detach()
    assert (after - before).abs().max() > 0.1               # it has moved
    assert (after @ after.t() - torch.eye(48)).abs().max() <= 1e-5
    if net_type == "expRNN":
        assert torch.equal(after, model.network.kernel().detach())


def count(module):
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def test_published_copying_count():
    """expRNN, H 176, one-hot: 10·176 + 176·175/2 + 176 (modReLU) + 176·9 + 9."""
    assert count(CopyModel(make("expRNN", 10, 176), 9)) == 18_929


def test_published_character_count():
    """expRNN, H 1386, emsize 200, 50 symbols: 50·200 + 200·1386 + 1386·1385/2 + 1386 + 50·1386 + 50."""
    assert count(CharacterModel(make("expRNN", 200, 1386, rinit="henaff"), 50, 200)) == 1_317_741


@pytest.mark.parametrize(("net_type", "parameters"), [
    ("RNN", 4 * 6 + 6 + 36 + 6), ("RNN-Orth", 4 * 6 + 6 + 36 + 6), ("expRNN", 4 * 6 + 15 + 6),
    ("nnRNN", 4 * 6 + 15 + 3 + 3 + 15 + 6), ("LSTM", 4 * (4 * 6 + 36 + 6))])
def test_count_by_hand(net_type, parameters):
    assert count(make(net_type)) == parameters


def test_a_learned_stair_counts_its_steps():
    assert count(make("expRNN", stair=LearnedStair(20))) == count(make("expRNN")) + 20


def test_a_tied_decoder_is_not_counted_twice():
    network = make("RNN", input_size=6)
    assert count(CharacterModel(network, 50, 6)) - count(CharacterModel(network, 50, 6, tied=True)) == 50 * 6


def test_nothing_derived_is_saved():
    names = set(make("nnRNN").state_dict())
    assert names == {"cell.input_weight", "cell.rotation.logarithm", "cell.gamma", "cell.theta", "cell.upper",
                     "nonlinearity.bias"}


@pytest.mark.parametrize("net_type", ["RNN", "expRNN", "nnRNN"])
def test_a_symbol_is_its_one_hot_row(float64, net_type):
    cell = make(net_type).cell
    symbols = torch.randint(0, 4, (7, 3))
    torch.testing.assert_close(cell.project(symbols), cell.project(one_hot(symbols, 4).double()))


@pytest.mark.parametrize("net_type", ["RNN", "expRNN", "nnRNN"])
def test_a_symbol_is_its_embedding(float64, net_type):
    cell = make(net_type).cell
    embedding = torch.randn(9, 4)
    symbols = torch.randint(0, 9, (7, 3))
    torch.testing.assert_close(cell.project(symbols, embedding), cell.project(embedding[symbols]))


@pytest.mark.parametrize("net_type", ["RNN", "LSTM"])
def test_a_gpu_computes_the_same_in_another_way(float64, net_type, monkeypatch):
    """Lookups and the loss have functions of their own there, whose sums keep their order."""
    model = CharacterModel(make(net_type), 9, 4)
    symbols, target = torch.randint(0, 9, (2, 7, 3)).unbind()

    def gradients():
        return torch.autograd.grad(mean_cross_entropy(model(symbols)[0], target), [p for p in model.parameters()
                                                                                   if p.requires_grad])

    here = gradients()
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    torch.testing.assert_close(gradients(), here)


@pytest.mark.parametrize("net_type", NET_TYPES)
@pytest.mark.parametrize("last_only", [False, True])
def test_network_on_symbols_equals_vectors(float64, net_type, last_only):
    network = make(net_type)
    symbols = torch.randint(0, 4, (7, 3))
    found, state = network(symbols, last_only=last_only)
    expected, expected_state = network(one_hot(symbols, 4).double(), last_only=last_only)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(state, expected_state)
    assert found.shape == ((3, 6) if last_only else (7, 3, 6))


@pytest.mark.parametrize("net_type", NET_TYPES)
def test_state_carries_over(float64, net_type):
    """Two halves with the state handed on are the whole, under a stair that does not change with t."""
    network = make(net_type, stair=FixedStair("none", 20))
    x = torch.randn(8, 3, 4)
    whole, last = network(x)
    first, state = network(x[:4])
    second, end = network(x[4:], state)
    torch.testing.assert_close(torch.cat((first, second)), whole)
    torch.testing.assert_close(end, last)


def test_the_stair_starts_again_with_every_sequence(float64):
    network = make("expRNN", stair=FixedStair("n", 20))
    x = torch.randn(4, 3, 4)
    _, state = network(x)
    second, _ = network(x, state)
    rho, h, w = [1 / 2, 2 / 3, 3 / 4, 4 / 5], state, network.kernel()
    for t in range(4):
        h = rho[t] * network.nonlinearity(x[t] @ network.cell.input_weight + h @ w)
        torch.testing.assert_close(second[t], h)


@pytest.mark.parametrize("net_type", NET_TYPES)
def test_the_kernel_can_be_handed_in(net_type):
    network, x = make(net_type), torch.randn(5, 2, 4)
    assert torch.equal(network(x, kernel=network.kernel())[0], network(x)[0])


def test_state_starts_at_zero():
    assert not make("RNN").initial_state(3).any()
    assert make("RNN").initial_state(3).shape == (3, 6)
    assert not make("LSTM").initial_state(3).any()
    assert make("LSTM").initial_state(3).shape == (2, 3, 6)


@pytest.mark.parametrize("rinit", ["xavier", "random"])
def test_lstm_start(rinit):
    """Of the nnRNN paper: one matrix a gate over (h, x), N(0, 2/(2H + I)), and one bias vector, U(±1/√(H + I))."""
    torch.manual_seed(0)
    network = LSTM(40, 100, rinit)
    for gate in network.lstm.weight_hh_l0.detach().chunk(4):
        orthogonal = (gate @ gate.t() - torch.eye(100)).abs().max() < 1e-5
        assert orthogonal == (rinit == "random")
        assert gate.std().item() == pytest.approx(math.sqrt(2 / 240) if rinit == "xavier" else 0.1, rel=0.05)
    for gate in network.lstm.weight_ih_l0.detach().chunk(4):
        assert gate.std().item() == pytest.approx(math.sqrt(2 / 240), rel=0.05)
        assert gate.abs().max() > 3 * math.sqrt(2 / 240)                # normal, not uniform
    bias, bound = network.lstm.bias_ih_l0.detach(), 140**-0.5
    assert 0.95 * bound < bias.abs().max().item() <= bound
    assert bias.var().item() == pytest.approx(bound**2 / 3, rel=0.15)
    assert not network.lstm.bias_hh_l0.any()


@pytest.mark.parametrize("method", ["RMSprop", "Adam"])
def test_lstm_learns_one_bias_vector(method):
    """Two vectors with the same gradient would step the bias twice as far."""
    torch.manual_seed(0)
    model = PixelModel(LSTM(1, 7))
    optimizer, before = optimizer_for(model, method=method, lr=1e-2, lr_orth=1.0), model.network.lstm.bias_ih_l0.clone()
    step(model, optimizer, model(torch.rand(5, 3, 1)).square().sum())
    assert not torch.equal(model.network.lstm.bias_ih_l0, before)
    assert not model.network.lstm.bias_hh_l0.any()


def test_parts_compose():
    """Any cell, any stair, any nonlinearity, joined by hand."""
    network = StairRNN(RNN(3, 4), LearnedStair(5), Nonlinearity("tanh", 4))
    h, _ = network(torch.randn(5, 2, 3))
    h.sum().backward()
    assert network.stair.numbers.grad.abs().min() > 0


def test_a_seed_draws_the_cell_before_the_nonlinearity():
    """The recorded runs have drawn so: another order gives other weights for the same seed."""
    torch.manual_seed(3)
    network = build_network("RNN", 3, 4, LearnedStair(5), "modrelu", rinit="xavier", iinit="xavier")
    torch.manual_seed(3)
    cell, phi = RNN(3, 4), Nonlinearity("modrelu", 4)
    assert torch.equal(network.cell.recurrent_weight, cell.recurrent_weight)
    assert torch.equal(network.nonlinearity.bias, phi.bias)
