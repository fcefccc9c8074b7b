"""Characters of the Penn Treebank: the model and its training loop.

The text is cut into parallel streams, read in segments of `bptt` steps. The hidden state goes on from one
segment to the next without gradient; the stair starts again at t = 0 in every segment. Both learning rates
halve after every epoch without a better validation loss.
"""

import math
import sys

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from common.data import Characters, numbers_of, symbols_of, text_of
from common.errors import UserError, printable
from common.network import class_by_class, mean_cross_entropy
from common.optim import step
from common.runs.progress import Meter, Progress
from common.runs.records import read_config
from common.runs.run import Run, best_model

EVALUATION_STREAMS = 10
NAME = "language"
REVISION = 2  # raised by every change of what the same options compute; CHANGES.md lists them
AS_BEFORE = {1: ("RNN", "RNN-Orth", "expRNN", "nnRNN")}  # earlier revision: cells that compute the same


class CharacterModel(nn.Module):
    """Embedding, recurrent network, linear decoder. `tied`: the decoder's weights are the embedding's."""

    def __init__(self, network, symbols: int, emsize: int, tied: bool = False):
        super().__init__()
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
        raise UserError(f"the {len(tokens):,} symbols of the {part} text are too few for {streams:,} parallel streams"
                        + ("; choose a smaller --batch" if part == "train" else "; it needs a longer text"))
    return tokens[:length * streams].view(streams, length).t().contiguous()


def segments(streams: torch.Tensor, bptt: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Streams (N, B) → of each segment of at most `bptt` steps the symbols (L, B) and those that follow them (L·B,)."""
    following = [target.flatten() for target in streams[1:].split(bptt)]
    return list(zip(streams[:-1].split(bptt), following, strict=True))


@torch.no_grad()
def evaluate(model: CharacterModel, streams: torch.Tensor, bptt: int, stop=lambda: None) -> tuple[float, float]:
    """Mean loss (nats a symbol) and accuracy over `streams` (N, B); between segments `stop` may end the run."""
    kernel, state = model.network.kernel(), model.network.initial_state(streams.shape[1])
    sums = torch.zeros(2, dtype=torch.float64, device=streams.device)
    for symbols, target in segments(streams, bptt):
        logits, state = model(symbols, state, kernel)
        sums += torch.stack((cross_entropy(logits, target, reduction="sum"), (logits.argmax(-1) == target).sum()))
        stop()
    loss, accuracy = (sums / streams[1:].numel()).tolist()
    return loss, accuracy


def train(model: CharacterModel, optimizer, corpus: Characters, run: Run, *, epochs: int, batch: int, bptt: int,
          log_interval: int, alam: float = 0.0, clip: float = 0.0, **more) -> dict:
    """Train → the test score of the epoch with the best validation loss. `more` (a schedule) is saved as well."""
    train_set, valid_set, test_set = streams_of(corpus, batch, run.device)                       # (N, B) each
    if run.options.evaluate is not None:
        return evaluate_best(run, model, corpus, valid_set, test_set, bptt)
    batches = len(train_segments := segments(train_set, bptt))
    meter = Meter("train_loss", "train_accuracy", device=run.device)
    progress = Progress(epoch=0, batch=0, state=model.network.initial_state(batch), sums=meter.sums, best_epoch=0,
                        best_loss=math.inf, best_accuracy=0.0)
    run.begin(progress, steps=bptt, data=corpus.source, model=model, optimizer=optimizer, **more)
    if (result := run.finished()) is not None:
        return result

    for epoch in run.epochs(progress, until=epochs, updates=batches, unit="segment"):
        for index in run.updates(progress, until=batches, counter="batch"):
            symbols, target = train_segments[index - 1]                                          # (L, B), (L·B,)
            logits, state = model(symbols, progress.state)                                       # (L·B, V)
            loss = mean_cross_entropy(logits, target)
            step(model, optimizer, loss, alam=alam, clip=clip)

            progress.state = state.detach().clone()            # a view would keep all of h in memory
            meter.add(loss * len(target), (logits.argmax(-1) == target).sum(), count=len(target))
            if index % log_interval == 0 and index < batches:
                report(run, epoch, index, batches, meter, optimizer)

        valid_loss, valid_accuracy = evaluate(model, valid_set, bptt, run.stop_if_asked)
        report(run, epoch, batches, batches, meter, optimizer, valid_loss, valid_accuracy, corpus.unit)
        progress.state = model.network.initial_state(batch)
        keep_or_slow_down(run, progress, optimizer, epoch, valid_loss, valid_accuracy)
    return finish(run, progress, epochs, model, test_set, bptt, corpus.unit)


def evaluate_best(run: Run, model: CharacterModel, corpus: Characters, valid_set: torch.Tensor,
                  test_set: torch.Tensor, bptt: int) -> dict:
    """What --evaluate asks for: the scores of the best weights."""
    return run.evaluate(model, lambda loss, accuracy: f"{scores(loss, corpus.unit)}, accuracy {accuracy:.4f}",
                        corpus.source, validation=lambda: evaluate(model, valid_set, bptt, run.stop_if_asked),
                        test=lambda: evaluate(model, test_set, bptt, run.stop_if_asked))


def print_sample(build, args) -> str:
    """--sample: print and → the text --prompt and the symbols that the best weights of a run draw after it."""
    model = best_model(build, args, args.evaluate)
    vocabulary = read_config(args.evaluate)["data"]["vocabulary"]
    try:
        first = numbers_of(symbols_of(args.prompt or "", vocabulary), vocabulary).tolist()
    except KeyError as error:
        raise UserError(f"--prompt: {error.args[0]!r} is no symbol of the text that this run was trained on; its "
                        f"symbols are {' '.join(map(printable, vocabulary))[:200]}") from None
    torch.manual_seed(args.random_seed)
    text = text_of(first + sample(model, first or [0], args.sample, args.bptt), vocabulary)
    print(printable(text, keep="\n\t") if sys.stdout.isatty() else text)  # nothing that controls a terminal
    return text


@torch.no_grad()
def sample(model: CharacterModel, first: list[int], count: int, bptt: int) -> list[int]:
    """`count` symbols after the symbols `first`, each drawn from the probabilities that the model gives it.

    The stair starts again after every `bptt` symbols, as in training, so each segment is read from its start.
    """
    kernel, state, drawn = model.network.kernel(), model.network.initial_state(1), []
    for _ in range(count):
        while len(first) > bptt:
            state, first = model(torch.tensor(first[:bptt]).unsqueeze(1), state, kernel)[1], first[bptt:]
        logits, _ = model(torch.tensor(first).unsqueeze(1), state, kernel)                          # (L, V)
        drawn.append(torch.multinomial(logits[-1].softmax(-1), 1).item())
        first = [*first, drawn[-1]]
    return drawn


def streams_of(corpus: Characters, batch: int, device) -> list[torch.Tensor]:
    """Training, validation and test text as parallel streams (N, B)."""
    return [parallel_streams(getattr(corpus, part), streams, part).to(device)
            for part, streams in (("train", batch), ("valid", EVALUATION_STREAMS), ("test", EVALUATION_STREAMS))]


def keep_or_slow_down(run: Run, progress: Progress, optimizer, epoch: int, loss: float, accuracy: float) -> None:
    """After an epoch: keep the weights of a better validation loss, else halve every learning rate."""
    if loss < progress.best_loss:
        progress.best_epoch, progress.best_loss, progress.best_accuracy = epoch, loss, accuracy
        run.save_best()
    else:
        for group in optimizer.param_groups:
            group["lr"] /= 2


def scores(loss: float, unit: str) -> str:
    """A loss in nats, its perplexity and its bits per `unit`, as text."""
    perplexity = math.exp(min(loss, 700))
    shown = f"{perplexity:.3f}" if perplexity < 1e6 else f"{perplexity:.3g}"
    return f"loss {loss:.4f}, perplexity {shown}, {loss / math.log(2):.4f} bits per {unit}"


def report(run: Run, epoch: int, index: int, batches: int, meter: Meter, optimizer, valid_loss=None,
           valid_accuracy=None, unit: str = "character") -> None:
    """A row of the log: training loss and accuracy since the last one, validation at an epoch's end."""
    means = meter.pop_means()
    loss = means["train_loss"]
    line = f"epoch {epoch:3d}  segment {index:4d}/{batches}  loss {loss:.4f}  {loss / math.log(2):.4f} bits  " \
           f"accuracy {means['train_accuracy']:.4f}"
    if valid_loss is not None:
        line += f"  validation {scores(valid_loss, unit)}, accuracy {valid_accuracy:.4f}"
    run.report(line, epoch=epoch, batch=index, lr=optimizer.param_groups[0]["lr"], **means,
               validation_loss=valid_loss, validation_accuracy=valid_accuracy)


def finish(run: Run, progress: Progress, epochs: int, model: CharacterModel, test_set: torch.Tensor, bptt: int,
           unit: str) -> dict:
    """The result: the weights of the best validation, tested once."""
    run.load_best()
    loss, accuracy = evaluate(model, test_set, bptt, run.stop_if_asked)
    run.say(f"best validation loss {progress.best_loss:.4f} in epoch {progress.best_epoch}; "
            f"test {scores(loss, unit)}, accuracy {accuracy:.4f}")
    return run.finish({"epochs": epochs, "best_epoch": progress.best_epoch, "validation_loss": progress.best_loss,
                       "validation_accuracy": progress.best_accuracy, "test_loss": loss,
                       "test_perplexity": math.exp(min(loss, 700)),
                       f"test_bits_per_{unit}": loss / math.log(2), "test_accuracy": accuracy})
