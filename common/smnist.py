"""Sequential MNIST: the model and its training loop.

784 pixels, one a step, and a read-out from the last hidden state to 10 classes. Training batches come in
fixed order; after every epoch the validation accuracy decides whether these weights are the best so far; the
best are tested once, at the end.
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from common.cells import ReadOut
from common.data import PixelSequences
from common.optim import update
from common.runs.run import Progress, Run

REVISION = 2  # raised whenever the same options come to compute something else; CHANGES.md says what
CLASSES = 10


class PixelModel(nn.Module):
    """A recurrent network and a linear read-out of its last state."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.readout = ReadOut(network.hidden_size, CLASSES)

    def forward(self, x: torch.Tensor, kernel: torch.Tensor | None = None) -> torch.Tensor:
        """x (T, B, 1) → logits (B, 10)."""
        last, _ = self.network(x, kernel=kernel, last_only=True)                 # (B, H)
        return self.readout(last)


@torch.no_grad()
def evaluate(model: PixelModel, images: PixelSequences, batch: int) -> tuple[float, float]:
    """Mean loss and accuracy over all of `images`."""
    kernel = model.network.kernel()
    sums = torch.zeros(2, device=images.labels.device)
    for start in range(0, len(images), batch):
        x, labels = images.batch(start, batch)
        logits = model(x, kernel)
        sums += torch.stack((cross_entropy(logits, labels, reduction="sum"), (logits.argmax(-1) == labels).sum()))
    loss, accuracy = (sums / len(images)).tolist()
    return loss, accuracy


def train(model: PixelModel, optimizer, train_set: PixelSequences, valid_set: PixelSequences,
          test_set: PixelSequences, run: Run, *, epochs: int, batch: int, log_interval: int, save_freq: int = 1,
          alam: float = 0.0, clip: float = 0.0) -> dict:
    """Train for `epochs` and → the result: the test score of the epoch with the best validation accuracy."""
    train_set, valid_set, test_set = (images.to(run.device) for images in (train_set, valid_set, test_set))
    batches = -(-len(train_set) // batch)
    progress = run.track(REVISION, Progress(epoch=0, batch=0, sums=torch.zeros(3), best_epoch=0, best_accuracy=-1.0),
                         model=model, optimizer=optimizer)
    if (result := run.finished()) is not None:
        return result
    progress.sums = progress.sums.to(run.device)               # loss, hits and images since the last report
    run.show_progress(epochs * batches, progress.epoch * batches + progress.batch, "batch")

    while progress.epoch < epochs:
        while progress.batch < batches:
            x, labels = train_set.batch(progress.batch * batch, batch)           # (784, B, 1), (B,)
            logits = model(x)                                                    # (B, 10)
            loss = cross_entropy(logits, labels)
            update(model, optimizer, loss, alam, clip)

            with torch.no_grad():
                size = len(labels)
                hits = (logits.argmax(-1) == labels).sum()
                progress.sums += torch.stack((loss * size, hits, torch.full_like(loss, size)))
            progress.batch += 1
            run.advance()
            if progress.batch % log_interval == 0 and progress.batch < batches:
                report(progress, run, batches)
                run.checkpoint(autosave=True)
            run.stop_if_asked()

        valid_loss, valid_accuracy = evaluate(model, valid_set, batch)
        progress.epoch += 1
        report(progress, run, batches, valid_loss, valid_accuracy)
        progress.batch = 0
        if valid_accuracy > progress.best_accuracy:
            progress.best_epoch, progress.best_accuracy = progress.epoch, valid_accuracy
            run.save_best()
        run.checkpoint(autosave=progress.epoch % save_freq != 0 and progress.epoch < epochs)
        run.stop_if_asked()

    run.load_best()
    test_loss, test_accuracy = evaluate(model, test_set, batch)
    run.say(f"best validation accuracy {progress.best_accuracy:.4f} in epoch {progress.best_epoch}; "
            f"its test accuracy {test_accuracy:.4f}")
    return run.finish({"epochs": epochs, "best_epoch": progress.best_epoch,
                       "validation_accuracy": progress.best_accuracy, "test_accuracy": test_accuracy,
                       "test_loss": test_loss})


def report(progress: Progress, run: Run, batches: int, valid_loss=None, valid_accuracy=None) -> None:
    """A row of the log: training loss and accuracy since the last one, validation at an epoch's end."""
    loss_sum, hits, images = progress.sums.tolist()
    progress.sums.zero_()
    done = valid_accuracy is not None
    epoch = progress.epoch if done else progress.epoch + 1
    line = f"epoch {epoch:3d}  batch {progress.batch:4d}/{batches}  loss {loss_sum / images:.4f}  " \
           f"accuracy {hits / images:.4f}"
    if done:
        line += f"  validation loss {valid_loss:.4f}  accuracy {valid_accuracy:.4f}"
    run.report(line, epoch=epoch, batch=progress.batch, train_loss=loss_sum / images, train_accuracy=hits / images,
               validation_loss=valid_loss, validation_accuracy=valid_accuracy)
