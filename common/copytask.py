"""Copying memory: the model and its training loop.

The network reads T + 2c symbols and answers at every step; the loss is the mean cross entropy over all
positions, recall is the accuracy over the last c. Every batch is fresh, so the training loss is the test loss.
"""

import math

import torch
from torch import nn

from common.network import ReadOut, mean_cross_entropy
from common.optim import step
from common.runs.progress import Progress, Recent
from common.runs.run import Run

NAME = "copytask"
REVISION = 3  # raised by every change of what the same options compute; CHANGES.md lists them
AS_BEFORE = {}  # earlier revision: the cells for which the same options still compute the same
LAST = 50  # updates over which the result is averaged


class CopyingTask:
    """Copying memory (Hochreiter and Schmidhuber 1997; as in Arjovsky et al. 2016, section 5.1).

        input    c symbols of 1 … labels,  T−1 blanks (0),  the marker (labels + 1),  c blanks
        target   T + c blanks,  the c symbols
    """

    def __init__(self, T: int = 200, labels: int = 8, c_length: int = 10, vari: bool = False, seed: int = 0):
        self.T, self.labels, self.c_length, self.vari = T, labels, c_length, vari
        self.generator = torch.Generator().manual_seed(seed)
        self.steps = T + 2 * c_length       # length of the longest sequence
        self.input_symbols = labels + 2     # blank, labels, marker
        self.classes = labels + 1           # blank and labels

    def memoryless_loss(self) -> float:
        """Cross entropy of a model that knows the task and guesses the symbols: c ln(labels) / (T + 2c)."""
        c, delays = self.c_length, range(1, self.T + 1) if self.vari else (self.T,)
        return sum(c * math.log(self.labels) / (delay + 2 * c) for delay in delays) / len(delays)

    def batch(self, size: int, device=None) -> tuple[torch.Tensor, torch.Tensor]:
        """A fresh batch: input symbols and target classes, both (T + 2c, size) int64."""
        c, delay = self.c_length, self.T
        if self.vari:
            delay = int(torch.randint(1, self.T + 1, (), generator=self.generator))
        symbols = torch.randint(1, self.labels + 1, (c, size), generator=self.generator)
        # One copy to a GPU, from page-locked memory: the host would wait for a copy from other memory.
        pinned = device is not None and torch.device(device).type == "cuda"
        x, target = both = torch.zeros(2, delay + 2 * c, size, dtype=torch.int64, pin_memory=pinned)
        x[:c] = symbols
        x[c + delay - 1] = self.labels + 1
        target[-c:] = symbols
        x, target = both.to(device, non_blocking=True)
        return x, target

    def state_dict(self) -> dict:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        self.generator.set_state(state["generator"].cpu())


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
          log_interval: int, alam: float = 0.0, clip: float = 0.0, **more) -> dict:
    """Train for `updates` fresh batches → mean loss and recall of the last 50. `more` (a schedule) is saved as well."""
    if run.options.evaluate is not None:
        return run.evaluate(model, "loss {:.4f}, recall {:.4f}".format,
                            validation=lambda: evaluate(model, task, batch, run))
    recent = Recent("loss", "recall", keep=max(LAST, min(log_interval, updates)), device=run.device)
    memoryless = task.memoryless_loss()
    progress = run.begin(Progress(update=0, best=math.inf, recent=recent), steps=task.steps, memoryless=memoryless,
                         model=model, optimizer=optimizer, task=task, **more)
    if (result := run.finished()) is not None:
        return result
    run.say(f"a memoryless model scores {memoryless:.4f}")

    for update in run.updates(progress, until=updates):
        symbols, target = task.batch(batch, run.device)                          # (T + 2c, B) each
        logits = model(symbols)                                                  # (T + 2c, B, C)
        loss = mean_cross_entropy(logits, target)
        step(model, optimizer, loss, alam=alam, clip=clip)

        recent.add(update, loss, recall_of(logits, target, task.c_length))
        if update % log_interval == 0 or update == updates:
            rows = recent.rows(update, last=(update - 1) % log_interval + 1)     # since the last report
            mean_loss, recall = rows.mean(0).tolist()
            run.report(f"update {update:5d}  loss {mean_loss:.4f}  recall {recall:.3f}",
                       update=update, loss=mean_loss, loss_median=rows[:, 0].median().item(), recall=recall)
            if mean_loss < progress.best:
                progress.best = mean_loss
                run.save_best()

    return finish(run, updates, memoryless, *recent.rows(updates, min(LAST, updates)).mean(0).tolist())


def recall_of(logits: torch.Tensor, target: torch.Tensor, c: int) -> torch.Tensor:
    """Accuracy over the last c steps of logits (T + 2c, B, C) and target (T + 2c, B) → a scalar."""
    return (logits[-c:].argmax(-1) == target[-c:]).float().mean()


@torch.no_grad()
def evaluate(model: CopyModel, task: CopyingTask, batch: int, run: Run) -> tuple[float, float]:
    """Mean loss and recall over 50 batches that no training has seen: they are drawn from another seed."""
    task.generator.manual_seed(run.options.random_seed ^ 0xFFFFFFFF)
    sums = torch.zeros(2, device=run.device)
    for _ in range(LAST):
        symbols, target = task.batch(batch, run.device)
        logits = model(symbols)
        sums += torch.stack((mean_cross_entropy(logits, target), recall_of(logits, target, task.c_length)))
    loss, recall = (sums / LAST).tolist()
    return loss, recall


def finish(run: Run, updates: int, memoryless: float, loss: float, recall: float) -> dict:
    """The result: means over the last 50 updates, beside the loss of a model without memory."""
    last = min(LAST, updates)
    run.say(f"mean of the last {last} updates: loss {loss:.4f} (memoryless {memoryless:.4f}), recall {recall:.3f}")
    return run.finish({"updates": updates, "loss": loss, "recall": recall, "averaged_over": last,
                       "memoryless_loss": memoryless})
