"""The optimizer: against a slow version with scipy, against torch's own, its groups and bounds."""


import pytest
import torch
from torch import nn

from common.copytask import CopyModel
from common.network import build_network
from common.optim import OrthogonalRMSprop, optimizer_for, step
from common.stair import ExponentialStair, FixedStair, LearnedStair

I, H, B, T, C = 3, 6, 4, 5, 2


def make(net_type, stair=None, rinit="skew", seed=0):
    torch.manual_seed(seed)
    rinit = "random" if net_type == "LSTM" else rinit
    return CopyModel(build_network(net_type, I, H, stair or FixedStair("n", T), "modrelu", rinit, "xavier"), C)


def descend(optimizer_of, steps=60):
    """Parameters after some steps on a function with gradients of every size; they are two, of two shapes."""
    generator = torch.Generator().manual_seed(0)
    a, b = (nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64)) for shape in ((3, 4), (5,)))
    optimizer = optimizer_of([a, b])
    for k in range(steps):
        optimizer.zero_grad()
        (a.pow(4).sum() + (b - k / 10).square().sum() * 1e-3 + (a[0, 0] * b).sum()).backward()
        optimizer.step()
    return torch.cat((a.detach().flatten(), b.detach()))


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("alpha", [0.9, 0.99])
def test_rmsprop_equals_torch(alpha, decay):
    ours = descend(lambda p: OrthogonalRMSprop(p, 1e-2, "RMSprop", alpha=alpha, weight_decay=decay))
    theirs = descend(lambda p: torch.optim.RMSprop(p, 1e-2, alpha=alpha, weight_decay=decay))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.9), (0.5, 0.0)])
def test_adam_equals_torch(betas, decay):
    ours = descend(lambda p: OrthogonalRMSprop(p, 1e-2, "Adam", betas=betas, weight_decay=decay))
    theirs = descend(lambda p: torch.optim.Adam(p, 1e-2, betas=betas, weight_decay=decay))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", ["", "SGD", "adam"])
def test_unknown_method(method):
    with pytest.raises(ValueError, match="there is no method"):
        OrthogonalRMSprop([nn.Parameter(torch.zeros(1))], method=method)


def test_groups_step_by_their_own_rule():
    """Two groups, two methods: each as if it were alone."""
    def both(params):
        return OrthogonalRMSprop([dict(params=params[:1], method="Adam", lr=3e-3), dict(params=params[1:])], 1e-2)

    assert not torch.allclose(descend(both), descend(lambda p: OrthogonalRMSprop(p, 1e-2)))
    p = nn.Parameter(torch.tensor([1.0, -2.0]))
    q = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = OrthogonalRMSprop([dict(params=[p], method="Adam", lr=0.5), dict(params=[q], lr=0.1, alpha=0.75)])
    (p.square().sum() + q.square().sum()).backward()
    optimizer.step()
    assert p.tolist() == pytest.approx([0.5, -1.5])         # Adam's first step is lr, whatever the gradient
    assert q.tolist() == pytest.approx([0.8, -1.8])         # RMSprop's is lr/√(1 − a)


def test_minimum_is_kept():
    p = nn.Parameter(torch.tensor([0.05, 0.3]))
    q = nn.Parameter(torch.tensor([0.05, 0.3]))
    optimizer = OrthogonalRMSprop([dict(params=[p], minimum=0.0), dict(params=[q])], 0.01)
    (p.sum() + q.sum()).backward()
    optimizer.step()                                        # a step of 0.1 down
    assert p.tolist() == pytest.approx([0.0, 0.2], abs=1e-6)
    assert q.tolist() == pytest.approx([-0.05, 0.2], abs=1e-6)


def test_a_parameter_without_gradient_stays():
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = OrthogonalRMSprop([p, q], 0.1, weight_decay=0.5)
    p.sum().backward()
    optimizer.step()
    assert q.tolist() == [1, 1]
    assert p.tolist() != [1, 1]


def groups_of(model, **named):
    """name of a parameter → the group it is in."""
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    groups = optimizer_for(model, 1e-3, 1e-5, **named).param_groups
    listed = [(names[id(p)], group) for group in groups for p in group["params"]]
    assert len(listed) == len({name for name, _ in listed}) == len(names)     # each once, none left out
    return dict(listed)


@pytest.mark.parametrize("method", ["RMSprop", "Adam"])
@pytest.mark.parametrize("net_type", ["RNN", "RNN-Orth", "expRNN", "nnRNN", "LSTM"])
def test_groups(net_type, method):
    groups = groups_of(make(net_type), method=method, alpha=0.8, betas=(0.1, 0.2), Tdecay=0.3)
    for name, group in groups.items():
        rotates = name.endswith("logarithm")
        assert group["method"] == method
        assert group["lr"] == (1e-5 if rotates else 1e-3)
        assert group["alpha"] == 0.8
        assert group["betas"] == (0.1, 0.2)
        assert group.get("weight_decay", 0) == (0.3 if name.endswith("cell.upper") else 0)
        assert group.get("minimum") is None
    assert any(name.endswith("logarithm") for name in groups) == (net_type in ("expRNN", "nnRNN"))
    assert any(name.endswith("cell.upper") for name in groups) == (net_type == "nnRNN")


@pytest.mark.parametrize(("stair", "minimum"), [
    (LearnedStair(T), None), (ExponentialStair(T), 0.0), (ExponentialStair(T, literal=True), 0.0)])
def test_group_of_the_stair(stair, minimum):
    groups = groups_of(make("nnRNN", stair), Tdecay=0.3)
    assert groups["network.stair.numbers"].get("minimum") == minimum
    assert groups["network.stair.numbers"]["lr"] == 1e-3
    assert groups["network.stair.numbers"].get("weight_decay", 0) == 0
    assert all(group.get("minimum") is None for name, group in groups.items() if name != "network.stair.numbers")


def test_exponential_stair_stays_positive():
    """A loss that pulls every α_t below zero meets the bound, and the step after it still works."""
    model = make("expRNN", ExponentialStair(T, 0.02))
    optimizer = optimizer_for(model, 0.05, 1e-3)
    for _ in range(3):
        h, _ = model.network(torch.ones(T, 2, I))
        step(model, optimizer, h.square().sum())
        assert model.network.stair.numbers.min() >= 0
    assert model.network.stair.numbers.min() == 0


@pytest.mark.parametrize("method", ["RMSprop", "Adam"])
@pytest.mark.parametrize("net_type", ["nnRNN", "LSTM"])
def test_state_round_trip(net_type, method, tmp_path):
    """Through a file that loads with weights_only: the next steps are the same, bit for bit."""
    def parts(seed):
        model = make(net_type, seed=seed)
        return model, optimizer_for(model, 1e-3, 1e-3, method, Tdecay=1e-2)

    def go_on(model, optimizer, first):
        for k in range(first, first + 5):
            x = torch.randn(T, B, I, generator=torch.Generator().manual_seed(k))
            h, _ = model.network(x)
            step(model, optimizer, model.readout(h).square().mean(), alam=0.1)
        return torch.nn.utils.parameters_to_vector(model.parameters()).detach()

    model, optimizer = parts(0)
    go_on(model, optimizer, 0)
    for group in optimizer.param_groups:
        group["lr"] /= 2
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
    expected = go_on(model, optimizer, 5)

    other, its_optimizer = parts(1)
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    other.load_state_dict(weights)
    its_optimizer.load_state_dict(state)
    assert torch.equal(go_on(other, its_optimizer, 5), expected)


def test_alam_pulls_gamma_to_one():
    model = make("nnRNN")
    with torch.no_grad():
        model.network.cell.gamma.copy_(torch.tensor([0.2, 1.0, 3.0]))
    optimizer = optimizer_for(model, 1e-2, 1e-3)
    step(model, optimizer, model.readout.weight.sum() * 0, alam=0.5)
    gamma = model.network.cell.gamma.detach()
    assert gamma[0] > 0.2
    assert gamma[1] == 1
    assert gamma[2] < 3
    step(model, optimizer, model.readout.weight.sum() * 0, alam=0.0)
    assert model.network.cell.gamma.grad is None or not model.network.cell.gamma.grad.any()


@pytest.mark.parametrize(("clip", "norm"), [(0.0, 1e3), (0.5, 0.5), (1e6, 1e3)])
def test_clip_bounds_the_norm(clip, norm):
    model = make("RNN")
    with torch.no_grad():
        model.readout.weight.zero_()[0, 0] = 1.0
    optimizer = optimizer_for(model, 1e-3, 1e-3)
    step(model, optimizer, 500 * model.readout.weight.square().sum(), clip=clip)
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    assert torch.cat(grads).norm().item() == pytest.approx(norm, rel=1e-4)


def test_gradients_do_not_add_up():
    model = make("RNN")
    optimizer = optimizer_for(model, 1e-9, 1e-9)
    for _ in range(2):
        step(model, optimizer, model.readout.bias.sum())
    assert model.readout.bias.grad.tolist() == [1.0] * C
