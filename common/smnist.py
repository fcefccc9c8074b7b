"""Sequential MNIST: the model and its training loop.

784 pixels, one a step, and a read-out from the last hidden state to the C classes, 10 for MNIST. Training batches come
in fixed order. The weights of the epoch with the best validation accuracy are kept and tested once, at the end.
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from common.data import PixelSequences
from common.network import ReadOut
from common.optim import step
from common.runs.progress import Meter, Progress
from common.runs.run import Run

NAME = "sMNIST"
REVISION = 3  # raised by every change of what the same options compute; CHANGES.md lists them
AS_BEFORE = {2: ("RNN", "RNN-Orth", "expRNN", "nnRNN")}  # earlier revision: cells that compute the same


class PixelModel(nn.Module):
    """A recurrent network and a linear read-out of its last state."""

    def __init__(self, network, classes: int = 10):
        super().__init__()
        self.network = network
        self.readout = ReadOut(network.hidden_size, classes)

    def forward(self, x: torch.Tensor, kernel: torch.Tensor | None = None) -> torch.Tensor:
        """x (T, B, 1) → logits (B, C)."""
        last, _ = self.network(x, kernel=kernel, last_only=True)                 # (B, H)
        return self.readout(last)


@torch.no_grad()
def evaluate(model: PixelModel, images: PixelSequences, batch: int, stop=lambda: None) -> tuple[float, float]:
    """Mean loss and accuracy over all of `images`; between two batches `stop` may end the run."""
    kernel = model.network.kernel()
    sums = torch.zeros(2, device=images.labels.device)
    for start in range(0, len(images), batch):
        x, labels = images.batch(start, batch)
        logits = model(x, kernel)
        sums += torch.stack((cross_entropy(logits, labels, reduction="sum"), (logits.argmax(-1) == labels).sum()))
        stop()
    loss, accuracy = (sums / len(images)).tolist()
    return loss, accuracy


def train(model: PixelModel, optimizer, train_set: PixelSequences, valid_set: PixelSequences,
          test_set: PixelSequences, run: Run, *, epochs: int, batch: int, log_interval: int, save_freq: int = 1,
          alam: float = 0.0, clip: float = 0.0, **more) -> dict:
    """Train → the test score of the epoch with the best validation accuracy. `more` (a schedule) is saved as well."""
    train_set, valid_set, test_set = (images.to(run.device) for images in (train_set, valid_set, test_set))
    if run.options.evaluate is not None:
        return evaluate_best(run, model, valid_set, test_set, batch)
    batches = -(-len(train_set) // batch)
    meter = Meter("train_loss", "train_accuracy", device=run.device)
    progress = Progress(epoch=0, batch=0, sums=meter.sums, best_epoch=0, best_accuracy=-1.0)
    run.begin(progress, steps=len(train_set.pixels[0]), data=train_set.source, model=model, optimizer=optimizer, **more)
    if (result := run.finished()) is not None:
        return result

    for epoch in run.epochs(progress, until=epochs, updates=batches, save_every=save_freq):
        for index in run.updates(progress, until=batches, counter="batch"):
            x, labels = train_set.batch((index - 1) * batch, batch)              # (784, B, 1), (B,)
            logits = model(x)                                                    # (B, 10)
            loss = cross_entropy(logits, labels)
            step(model, optimizer, loss, alam=alam, clip=clip)

            meter.add(loss * len(labels), (logits.argmax(-1) == labels).sum(), count=len(labels))
            if index % log_interval == 0 and index < batches:
                report(run, epoch, index, batches, meter)

        valid_loss, valid_accuracy = evaluate(model, valid_set, batch, run.stop_if_asked)
        report(run, epoch, batches, batches, meter, valid_loss, valid_accuracy)
        if valid_accuracy > progress.best_accuracy:
            progress.best_epoch, progress.best_accuracy = epoch, valid_accuracy
            run.save_best()
    return finish(run, progress, epochs, model, test_set, batch)


def evaluate_best(run: Run, model: PixelModel, valid_set: PixelSequences, test_set: PixelSequences, batch: int) -> dict:
    """What --evaluate asks for: the scores of the best weights."""
    return run.evaluate(model, "loss {:.4f}, accuracy {:.4f}".format, valid_set.source,
                        validation=lambda: evaluate(model, valid_set, batch, run.stop_if_asked),
                        test=lambda: evaluate(model, test_set, batch, run.stop_if_asked))


def report(run: Run, epoch: int, index: int, batches: int, meter: Meter, valid_loss=None, valid_accuracy=None) -> None:
    """A row of the log: training loss and accuracy since the last one, validation at an epoch's end."""
    means = meter.pop_means()
    line = f"epoch {epoch:3d}  batch {index:4d}/{batches}  loss {means['train_loss']:.4f}  " \
           f"accuracy {means['train_accuracy']:.4f}"
    if valid_accuracy is not None:
        line += f"  validation loss {valid_loss:.4f}  accuracy {valid_accuracy:.4f}"
    run.report(line, epoch=epoch, batch=index, **means, validation_loss=valid_loss, validation_accuracy=valid_accuracy)


def finish(run: Run, progress: Progress, epochs: int, model: PixelModel, test_set: PixelSequences, batch: int) -> dict:
    """The result: the weights of the best validation, tested once."""
    run.load_best()
    test_loss, test_accuracy = evaluate(model, test_set, batch, run.stop_if_asked)
    run.say(f"best validation accuracy {progress.best_accuracy:.4f} in epoch {progress.best_epoch}; "
            f"its test accuracy {test_accuracy:.4f}")
    return run.finish({"epochs": epochs, "best_epoch": progress.best_epoch,
                       "validation_accuracy": progress.best_accuracy, "test_accuracy": test_accuracy,
                       "test_loss": test_loss})
