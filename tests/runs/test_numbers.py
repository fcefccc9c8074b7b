"""Numbers: what is not finite stops a run and harms nothing, --clip bounds, W stays orthogonal, bits repeat."""

import math

import pytest
import torch
from conftest import assert_same_run, task_of, tiny

from common.errors import UserError
from common.network import build_network
from common.optim import OrthogonalRMSprop, optimizer_for, step
from common.runs import records, run
from common.stair import FixedStair


@pytest.fixture(autouse=True)
def every_report_is_saved(monkeypatch):
    monkeypatch.setattr(run, "AUTOSAVE_SECONDS", 0)


def spoil_after(monkeypatch, updates):
    """After so many updates the gradient is not a number. → [the good updates that are left]"""
    left, step = [updates], OrthogonalRMSprop.step

    def stepping(self):
        left[0] -= 1
        if left[0] < 0:
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.grad.fill_(math.nan)
        return step(self)

    monkeypatch.setattr(OrthogonalRMSprop, "step", stepping)
    return left


@pytest.mark.parametrize(("script", "net_type"), [("copytask_nvar", "nnRNN"), ("sMNIST_nvar", "expRNN"),
                                                  ("language_nvar", "LSTM"), ("copytask_nvar", "RNN")])
def test_the_last_good_checkpoint_stays(main, monkeypatch, tmp_path, few_images, penn_folder, script, net_type):
    """Stopped within a report of the update that went wrong; what was saved is loaded, and is finite."""
    interval = 3
    length = {"copytask": ("--updates", "60"), "sMNIST": ("--epochs", "20", "--batch", "10"),
              "language": ("--epochs", "20", "--data", penn_folder)}[task_of(script)]
    left = spoil_after(monkeypatch, 7)
    with pytest.raises(UserError, match=r"not finite|is (nan|inf)") as error:
        main(script, *tiny(script), "--net-type", net_type, "--nvar", "none", *length, "--log-interval", interval)
    sentence = str(error.value)
    assert error.value.status == 3
    for part in ("stopped; the last good state is", "last.pt", "What usually helps: --clip 10, a lower --lr"):
        assert part in sentence
    folder, = (tmp_path / "saves" / script).iterdir()
    for name in ("last.pt", "best.pt"):
        if name == "best.pt" and not (folder / name).exists():
            continue                                        # the first epoch had not ended
        weights = torch.load(folder / name, weights_only=True)
        weights = weights["parts"]["model"] if name == "last.pt" else weights
        assert all(value.isfinite().all() for value in weights.values())
    spoiled = [any(records.is_not_finite(*cell) for cell in row.items()) for row in records.log_rows(folder)]
    assert len(spoiled) > 1
    assert not any(spoiled[:-1])
    assert spoiled[-1] == records.is_diverged(folder) == ("loss is nan" in sentence)
    assert -left[0] <= interval                             # so many updates went wrong before it stopped
    assert not (folder / "result.json").exists()


def test_weights_that_are_not_finite_are_not_the_best(main, monkeypatch, tmp_path):
    """The loss before the update was good; what the update left is not, and does not replace best.pt."""
    spoil_after(monkeypatch, 2)
    with pytest.raises(UserError, match="a weight is not finite"):
        main("copytask_nvar", *tiny("copytask_nvar"), "--net-type", "RNN", "--lr", "0.01", "--updates", "20",
             "--log-interval", "1")
    folder, = (tmp_path / "saves" / "copytask_nvar").iterdir()
    assert all(value.isfinite().all() for value in torch.load(folder / "best.pt", weights_only=True).values())


@pytest.mark.parametrize("script", ["copytask_nvar", "copytask_alpha", "copytask_expalpha"])
@pytest.mark.parametrize("typed", [("--lr", "1e30"), ("--net-type", "nnRNN", "--alam", "1e30"),
                                   ("--net-type", "nnRNN", "--lr", "1e30", "--lr_orth", "1e30", "--Tdecay", "1e30"),
                                   ("--optimizer", "Adam", "--lr", "1e30"), ("--clip", "1e30", "--lr", "1e30")])
def test_rates_beyond_all_bounds(main, script, typed):
    """Either it learns nothing and ends, or it says that it diverged."""
    said = "What usually helps"
    try:
        main(script, *tiny(script), *typed, "--updates", "12", "--log-interval", "2")
    except UserError as error:
        said = str(error)
    assert "What usually helps" in said


@pytest.mark.parametrize("script", ["copytask_nvar", "sMNIST_alpha", "language_expalpha"])
def test_clip_bounds_every_update(main, monkeypatch, few_images, penn_folder, script):
    """The norm over all parameters, as the optimizer sees it; without --clip it is larger."""
    norms, step, clip = [], OrthogonalRMSprop.step, 1e-3
    data = ("--data", penn_folder) if task_of(script) == "language" else ()

    def watching(self):
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.cat([g.flatten() for g in gradients]).norm().item())
        return step(self)

    monkeypatch.setattr(OrthogonalRMSprop, "step", watching)
    main(script, *tiny(script), *data)
    free = norms.copy()
    norms.clear()
    main(script, *tiny(script), *data, "--clip", clip)
    assert max(free) > clip
    assert norms
    assert max(norms) <= clip * (1 + 1e-5)


@pytest.mark.parametrize(("net_type", "rinit", "lr_orth"), [
    ("expRNN", "cayley", 1e-3), ("nnRNN", "random", 5e-4)])
def test_orthogonal_after_two_thousand_updates(net_type, rinit, lr_orth):
    """float32, H 64: every update pulls a random gradient of W back through the exponential, as training does."""
    torch.manual_seed(0)
    network = build_network(net_type, 3, 64, FixedStair("none", 1), "modrelu", rinit, "xavier")
    model = torch.nn.ModuleDict({"network": network})
    model.network = network
    optimizer = optimizer_for(model, 1e-3, lr_orth, Tdecay=1e-4)
    rotation = network.cell.rotation
    start, gradients = rotation.logarithm.detach().clone(), torch.randn(50, 64, 64)
    for number in range(2000):
        step(model, optimizer, (rotation() * gradients[number % 50]).sum())
    with torch.no_grad():
        w = rotation().double()
    assert (rotation.logarithm - start).abs().max() > 0.01
    assert (w.t() @ w - torch.eye(64)).abs().max() < 1e-4
    assert torch.linalg.det(w).item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("typed", [
    ("copytask_nvar", "--net-type", "nnRNN", "--nhid", "64", "--T", "60", "--batch", "8", "--threads", "2"),
    ("language_expalpha", "--net-type", "expRNN", "--nhid", "48", "--batch", "8", "--threads", "1")])
def test_the_same_command_gives_the_same_bits(main, run_script, tmp_path, penn_folder, typed):
    """In another process, the same number of threads."""
    script, *arguments = typed
    where = ("--data", penn_folder) if script.startswith("language") else ("--updates", "12", "--log-interval", "4")
    _, folder = main(script, *tiny(script), *where, *arguments)
    done = run_script(script, *tiny(script), *where, *arguments, "--save", "other")
    assert done.returncode == 0, done.stderr
    assert_same_run(next((tmp_path / "other" / script).iterdir()), folder)
