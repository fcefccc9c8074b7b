"""Small runs that must learn: far below what a network without memory scores, in a few seconds."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from common.copytask import CopyingTask, CopyModel
from common.data import PixelSequences
from common.language import CharacterModel, evaluate, parallel_streams, segments
from common.network import build_network
from common.optim import optimizer_for, step
from common.smnist import PixelModel
from common.stair import ExponentialStair, FixedStair, LearnedStair

COPYING = [
    ("expRNN", lambda steps: FixedStair("expn", steps), "henaff", 3e-3, 3e-4),
    ("expRNN", lambda steps: LearnedStair(steps), "henaff", 3e-3, 3e-4),
    ("expRNN", lambda steps: ExponentialStair(steps), "henaff", 3e-3, 3e-4),
    ("nnRNN", lambda steps: FixedStair("expn", steps), "henaff", 2e-3, 1e-5),
    ("RNN-Orth", lambda steps: FixedStair("none", steps), "henaff", 1e-3, None),
]


@pytest.mark.parametrize(("net_type", "stair", "rinit", "lr", "lr_orth"), COPYING,
                         ids=["expRNN-expn", "expRNN-alpha", "expRNN-expalpha", "nnRNN-expn", "RNN-Orth"])
def test_copying_is_learned(net_type, stair, rinit, lr, lr_orth):
    """5 symbols over 20 steps: a third of the memoryless loss at most, and most symbols recalled."""
    torch.manual_seed(0)
    task = CopyingTask(20, 8, 5, seed=0)
    network = build_network(net_type, task.input_symbols, 64, stair(task.steps), "modrelu", rinit, "xavier")
    model = CopyModel(network, task.classes)
    optimizer = optimizer_for(model, lr, lr_orth, Tdecay=1e-4)
    losses, recalls = [], []
    for _ in range(400):
        symbols, target = task.batch(20)
        logits = model(symbols)
        loss = cross_entropy(logits.flatten(0, 1), target.flatten())
        step(model, optimizer, loss, alam=1e-4)
        losses.append(loss.item())
        recalls.append((logits[-5:].argmax(-1) == target[-5:]).double().mean().item())
    last = sum(losses[-30:]) / 30
    assert last < task.memoryless_loss() / 3
    assert sum(recalls[-30:]) / 30 > 0.75


def test_the_memoryless_line_is_what_it_says():
    """A model that knows when to answer and guesses the symbols scores exactly the line."""
    task = CopyingTask(20, 8, 5, seed=0)
    _, target = task.batch(50)
    logits = torch.zeros(task.steps, 50, task.classes)
    logits[:-5, :, 0] = 50.0
    logits[-5:, :, 0] = -50.0
    assert cross_entropy(logits.flatten(0, 1), target.flatten()).item() == pytest.approx(task.memoryless_loss())


@pytest.mark.parametrize("net_type", ["expRNN", "nnRNN"])
def test_pixels_are_learned(net_type):
    """Twelve images of 784 pixels, three classes by the brightness of the last 44: told apart."""
    torch.manual_seed(0)
    pixels, labels = torch.zeros(12, 784, dtype=torch.uint8), torch.arange(12) % 3
    pixels[:, 740:] = torch.tensor([0, 100, 255], dtype=torch.uint8)[labels, None]
    x, labels = PixelSequences(pixels, labels).batch(0, 12)
    model = PixelModel(build_network(net_type, 1, 16, FixedStair("n2", 784), "modrelu", "cayley", "xavier"))
    optimizer = optimizer_for(model, 3e-3, 1e-3)
    losses = []
    for _ in range(70):
        loss = cross_entropy(model(x), labels)
        step(model, optimizer, loss, alam=0.1, clip=10)
        losses.append(loss.item())
    assert losses[0] > 1.5
    assert max(losses[-5:]) < 0.75                          # log 3 = 1.10 without a look at the image
    assert (model(x).argmax(1) == labels).double().mean() > 0.9


def test_characters_are_learned():
    """A text that repeats every seven symbols is known by heart after a while."""
    torch.manual_seed(0)
    tokens = torch.tensor([0, 1, 2, 1, 3, 2, 4]).repeat(300)
    streams, held_out = parallel_streams(tokens, 10), parallel_streams(tokens[3:], 5)
    network = build_network("nnRNN", 8, 32, FixedStair("expn", 20), "modrelu", "cayley", "kaiming")
    model = CharacterModel(network, 5, 8)
    optimizer = optimizer_for(model, 5e-3, 5e-4, alpha=0.9)
    before, _ = evaluate(model, held_out, 20)
    for _ in range(8):
        state = network.initial_state(10)
        for symbols, target in segments(streams, 20):
            logits, state = model(symbols, state.detach())
            step(model, optimizer, cross_entropy(logits, target), alam=1e-4)
    after, accuracy = evaluate(model, held_out, 20)
    assert before > 1.4
    assert after < 0.2
    assert accuracy > 0.95


def test_engines_train_alike(float64):
    """One seed, two engines: the loss curves agree until rounding separates them, long after the first updates."""
    curves = {}
    for engine in ("auto", "torch"):
        torch.manual_seed(3)
        task = CopyingTask(T=100, seed=3)
        network = build_network("expRNN", task.input_symbols, 64, FixedStair("expn", task.steps), "modrelu", "henaff",
                        "xavier", engine)
        model = CopyModel(network, task.classes)
        optimizer = optimizer_for(model, 1e-3, 1e-4)
        curves[engine] = []
        for _ in range(40):
            symbols, target = task.batch(10)
            loss = cross_entropy(model(symbols).flatten(0, 1), target.flatten())
            step(model, optimizer, loss)
            curves[engine].append(loss.item())
    assert curves["auto"] == pytest.approx(curves["torch"], rel=1e-8)
    assert curves["auto"][-1] < curves["auto"][0] / 2
