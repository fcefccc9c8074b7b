"""Characters of the Penn Treebank: the model and its training loop.

The text is cut into parallel streams, read in segments of `bptt` steps. The hidden state goes on from one
segment to the next without gradient; the stair starts again at t = 0 in every segment. Both learning rates
halve after every epoch without a better validation loss.
"""

import math

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from common.cells import class_by_class, mean_cross_entropy
from common.data import Characters
from common.errors import UserError
from common.optim import update
from common.runs.run import Progress, Run

EVALUATION_STREAMS = 10
REVISION = 1  # raised whenever the same options come to compute something else; CHANGES.md says what


class CharacterModel(nn.Module):
    """Embedding, recurrent network, linear decoder. `tied`: the decoder's weights are the embedding's."""

    def __init__(self, network, symbols: int, emsize: int, tied: bool = False):
        super().__init__()
        if tied and emsize != network.hidden_size:
            raise ValueError(f"a tied decoder needs emsize {emsize} equal to the hidden size {network.hidden_size}")
        self.network = network
        self.embedding = nn.Parameter(torch.empty(symbols, emsize).uniform_(-0.1, 0.1))          # (V, E)
        self.decoder = self.embedding if tied else \
            nn.Parameter(torch.empty(symbols, network.hidden_size).uniform_(-0.1, 0.1))          # (V, H)
        self.decoder_bias = nn.Parameter(torch.zeros(symbols))

    def forward(self, symbols, state=None, kernel=None) -> tuple[torch.Tensor, torch.Tensor]:
        """symbols (T, B) int64, state (B, H) → logits (T·B, V) and the last state."""
        h, state = self.network(symbols, state, kernel, embedding=self.embedding)                # (T, B, H)
        return class_by_class(h.flatten(0, 1), self.decoder, self.decoder_bias), state


def parallel_streams(tokens: torch.Tensor, streams: int, part: str = "train") -> torch.Tensor:
    """tokens (N,) → (N // streams, streams): column k is the k-th stretch of the text; the rest is dropped.

    Raises UserError when a stream would hold fewer than the two symbols that an input and its target need.
    """
    length = len(tokens) // streams
    if length < 2:
        raise UserError(f"the {len(tokens):,} symbols of {part}.txt are too few for {streams:,} parallel streams"
                        + ("; choose a smaller --batch" if part == "train" else "; it needs a longer text"))
    return tokens[:length * streams].view(streams, length).t().contiguous()


def segments(streams: torch.Tensor, bptt: int) -> int:
    """How many segments of at most `bptt` steps the streams hold; the last symbol is only a target."""
    return -(-(len(streams) - 1) // bptt)


def segment(streams: torch.Tensor, index: int, bptt: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Segment `index` → symbols (L, B) and the symbols that follow them (L·B,)."""
    start = index * bptt
    end = min(start + bptt, len(streams) - 1)
    return streams[start:end], streams[start + 1:end + 1].flatten()


@torch.no_grad()
def evaluate(model: CharacterModel, streams: torch.Tensor, bptt: int) -> tuple[float, float]:
    """Mean loss (nats a character) and accuracy over `streams` (N, B), the state carried from start to end."""
    kernel, state = model.network.kernel(), model.network.start(streams.shape[1])
    sums = torch.zeros(2, dtype=torch.float64, device=streams.device)
    for index in range(segments(streams, bptt)):
        symbols, target = segment(streams, index, bptt)
        logits, state = model(symbols, state, kernel)
        sums += torch.stack((cross_entropy(logits, target, reduction="sum"), (logits.argmax(-1) == target).sum()))
    loss, accuracy = (sums / streams[1:].numel()).tolist()
    return loss, accuracy


def train(model: CharacterModel, optimizer, corpus: Characters, run: Run, *, epochs: int, batch: int, bptt: int,
          log_interval: int, alam: float = 0.0, clip: float = 0.0) -> dict:
    """Train for `epochs` and → the result: the test score of the epoch with the best validation loss."""
    train_set = parallel_streams(corpus.train, batch, "train").to(run.device)                             # (N, B)
    valid_set = parallel_streams(corpus.valid, EVALUATION_STREAMS, "valid").to(run.device)
    test_set = parallel_streams(corpus.test, EVALUATION_STREAMS, "test").to(run.device)
    batches = segments(train_set, bptt)
    start = Progress(epoch=0, batch=0, state=model.network.start(batch), sums=torch.zeros(3),
                     best_epoch=0, best_loss=math.inf, best_accuracy=0.0)
    progress = run.track(REVISION, start, model=model, optimizer=optimizer)
    if (result := run.finished()) is not None:
        return result
    progress.sums = progress.sums.to(run.device)               # loss, hits and symbols since the last report
    run.show_progress(epochs * batches, progress.epoch * batches + progress.batch, "segment")

    while progress.epoch < epochs:
        while progress.batch < batches:
            symbols, target = segment(train_set, progress.batch, bptt)                           # (L, B), (L·B,)
            logits, state = model(symbols, progress.state)                                       # (L·B, V)
            loss = mean_cross_entropy(logits, target)
            update(model, optimizer, loss, alam, clip)

            with torch.no_grad():
                progress.state = state.detach().clone()  # the rest of h can go
                hits = (logits.argmax(-1) == target).sum()
                progress.sums += torch.stack((loss * len(target), hits, torch.full_like(loss, len(target))))
            progress.batch += 1
            run.advance()
            if progress.batch % log_interval == 0 and progress.batch < batches:
                report(progress, run, batches, optimizer)
                run.checkpoint(autosave=True)
            run.stop_if_asked()

        valid_loss, valid_accuracy = evaluate(model, valid_set, bptt)
        progress.epoch += 1
        report(progress, run, batches, optimizer, valid_loss, valid_accuracy)
        progress.batch, progress.state = 0, model.network.start(batch)
        if valid_loss < progress.best_loss:
            progress.best_epoch, progress.best_loss, progress.best_accuracy = progress.epoch, valid_loss, valid_accuracy
            run.save_best()
        else:
            for group in optimizer.param_groups:
                group["lr"] /= 2
        run.checkpoint()
        run.stop_if_asked()

    run.load_best()
    test_loss, test_accuracy = evaluate(model, test_set, bptt)
    run.say(f"best validation loss {progress.best_loss:.4f} in epoch {progress.best_epoch}; test {scores(test_loss)}, "
            f"accuracy {test_accuracy:.4f}")
    return run.finish({"epochs": epochs, "best_epoch": progress.best_epoch, "validation_loss": progress.best_loss,
                       "validation_accuracy": progress.best_accuracy, "test_loss": test_loss,
                       "test_perplexity": math.exp(min(test_loss, 700)),
                       "test_bits_per_character": test_loss / math.log(2), "test_accuracy": test_accuracy})


def scores(loss: float) -> str:
    """A loss in nats, its perplexity and its bits per character, for people."""
    return f"loss {loss:.4f}, perplexity {math.exp(min(loss, 700)):.3f}, {loss / math.log(2):.4f} bits per character"


def report(progress: Progress, run: Run, batches: int, optimizer, valid_loss=None, valid_accuracy=None) -> None:
    """A row of the log: training loss and accuracy since the last one, validation at an epoch's end."""
    loss_sum, hits, count = progress.sums.tolist()
    progress.sums.zero_()
    done = valid_loss is not None
    epoch = progress.epoch if done else progress.epoch + 1
    loss = loss_sum / count
    line = f"epoch {epoch:3d}  segment {progress.batch:4d}/{batches}  loss {loss:.4f}  " \
           f"{loss / math.log(2):.4f} bits  accuracy {hits / count:.4f}"
    if done:
        line += f"  validation {scores(valid_loss)}, accuracy {valid_accuracy:.4f}"
    run.report(line, epoch=epoch, batch=progress.batch, lr=optimizer.param_groups[0]["lr"], train_loss=loss,
               train_accuracy=hits / count, validation_loss=valid_loss, validation_accuracy=valid_accuracy)
