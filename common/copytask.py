"""Copying memory: the model and its training loop.

The network reads T + 2c symbols and answers at every step; the loss is the mean cross entropy over all
positions, recall is the accuracy over the last c. Every batch is fresh, so the training loss is the test loss.
"""

import math

import torch
from torch import nn

from common.cells import ReadOut, mean_cross_entropy
from common.data import CopyingTask
from common.optim import update
from common.runs.run import Progress, Run

REVISION = 2  # raised whenever the same options come to compute something else; CHANGES.md says what
LAST = 50  # updates over which the result is averaged


class CopyModel(nn.Module):
    """A recurrent network and a linear read-out at every step."""

    def __init__(self, network, classes: int, onehot: bool = True):
        super().__init__()
        self.network, self.onehot = network, onehot
        self.readout = ReadOut(network.hidden_size, classes)
        nn.init.xavier_normal_(self.readout.weight)            # as in all public repositories; the bias is U(±1/√H)

    def forward(self, symbols: torch.Tensor) -> torch.Tensor:
        """symbols (T, B) int64 → logits (T, B, C)."""
        x = symbols if self.onehot else symbols.unsqueeze(-1).to(self.readout.weight.dtype)
        h, _ = self.network(x)                                                   # (T, B, H)
        return self.readout(h)                                                   # (T, B, C)


def train(model: CopyModel, optimizer, task: CopyingTask, run: Run, *, updates: int, batch: int,
          log_interval: int, alam: float = 0.0, clip: float = 0.0) -> dict:
    """Train for `updates` fresh batches and → the result: mean loss and recall over the last 50."""
    device, c = run.device, task.c_length
    window = max(LAST, min(log_interval, updates))
    progress = run.track(REVISION, Progress(update=0, best=math.inf, recent=torch.zeros(window, 2)),
                         model=model, optimizer=optimizer, task=task)
    if (result := run.finished()) is not None:
        return result
    recent = progress.recent = progress.recent.to(device)      # (n, 2): loss and recall of the last n updates
    run.say(f"a memoryless model scores {task.memoryless_loss():.4f}")
    run.show_progress(updates, progress.update, "update")

    while progress.update < updates:
        symbols, target = task.batch(batch, device)                              # (T + 2c, B) each
        logits = model(symbols)                                                  # (T + 2c, B, C)
        loss = mean_cross_entropy(logits, target)
        update(model, optimizer, loss, alam, clip)

        with torch.no_grad():
            recall = (logits[-c:].argmax(-1) == target[-c:]).float().mean()
            recent[progress.update % len(recent)] = torch.stack((loss.detach(), recall))
        progress.update += 1
        run.advance()

        since = (progress.update - 1) % log_interval + 1
        if since == log_interval or progress.update == updates:
            rows = recent[torch.arange(progress.update - since, progress.update) % len(recent)]
            mean_loss, mean_recall = rows.mean(0).tolist()
            run.report(f"update {progress.update:5d}  loss {mean_loss:.4f}  recall {mean_recall:.3f}",
                       update=progress.update, loss=mean_loss, loss_median=rows[:, 0].median().item(),
                       recall=mean_recall)
            if mean_loss < progress.best:
                progress.best = mean_loss
                run.save_best()
            run.checkpoint(autosave=progress.update < updates)
        run.stop_if_asked()

    last = min(LAST, updates)
    loss, recall = recent[torch.arange(updates - last, updates) % len(recent)].mean(0).tolist()
    memoryless = task.memoryless_loss()
    run.say(f"mean of the last {last} updates: loss {loss:.4f} (memoryless {memoryless:.4f}), recall {recall:.3f}")
    return run.finish({"updates": updates, "loss": loss, "recall": recall, "averaged_over": last,
                       "memoryless_loss": memoryless})
