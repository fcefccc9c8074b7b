"""The adding problem (Hochreiter and Schmidhuber 1997), a task of one's own: copy this file and change it.

Of T numbers in [0, 1] two are marked, one in each half; the network answers their sum at the last step. A network that
always answers 1, the mean, has a loss of 1/6 = 0.1667. The contract of a task is in common/__init__.py.

    python examples/adding.py                                    expRNN with the stair expn
    python examples/adding.py --net-type RNN-Orth --nvar none    without a stair, another cell
"""

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where common/ is

from common.errors import run_main
from common.network import build_network
from common.optim import optimizer_for, step
from common.runs import flags
from common.runs.progress import Progress, Recent
from common.runs.run import Run, loader
from common.stair import FixedStair

NAME, REVISION = "adding", 1
DEFAULTS = dict(net_type="expRNN", nvar="expn", nhid=64, nonlin="relu", iinit="xavier",                 # network
                T=50, batch=50, updates=1000, log_interval=50, random_seed=400,                         # task
                optimizer="Adam", betas=(0.9, 0.999), clip=0.0)                                         # optimizer
PAPER = {"adding": dict(net_type=("RNN", "RNN-Orth", "expRNN"), lr=3e-3, lr_orth=1e-3, rinit="henaff")}


def batch_of(T: int, size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers and marks (T, B, 2), and the sums of the marked numbers (B,)."""
    generator = torch.Generator().manual_seed(seed)
    numbers, marks = torch.rand(T, size, generator=generator), torch.zeros(T, size)
    for low, high in ((0, T // 2), (T // 2, T)):
        marks[torch.randint(low, max(high, low + 1), (size,), generator=generator), torch.arange(size)] = 1
    return torch.stack((numbers, marks), 2), (numbers * marks).sum(0)


class Adder(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network, self.readout = network, nn.Linear(network.hidden_size, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, _ = self.network(x, last_only=True)                                   # (T, B, 2) → (B, H)
        return self.readout(h).squeeze(1)                                        # (B,)


def build(args) -> Adder:
    stair = FixedStair(args.nvar, args.T)                                        # ρ_t
    return Adder(build_network(args.net_type, 2, args.nhid, stair, args.nonlin, args.rinit, args.iinit, args.engine))


load = loader(build, __file__, DEFAULTS, PAPER)  # load(FOLDER) → the best weights of a run in its model, the options


def main(argv=None):
    args = flags.parse(argv, __file__, __doc__, DEFAULTS, PAPER, sys.modules[__name__])
    with Run(args) as run:
        model = build(args).to(run.device)
        optimizer = optimizer_for(model, args.lr, args.lr_orth, args.optimizer, alpha=args.alpha, betas=args.betas)
        def loss_of(number: int, size: int) -> torch.Tensor:
            x, sums = batch_of(args.T, size, 10**6 * args.random_seed + number)
            return nn.functional.mse_loss(model(x.to(run.device)), sums.to(run.device))
        if args.evaluate:
            return run.evaluate(model, "loss {:.4f}".format, validation=lambda: (loss_of(0, 1000).item(),))
        recent = Recent("loss", keep=50, device=run.device)
        progress = run.begin(Progress(update=0, best=float("inf"), recent=recent), steps=args.T, memoryless=1 / 6,
                             model=model, optimizer=optimizer)
        if (result := run.finished()) is not None:
            return result
        for update in run.updates(progress, until=args.updates):
            loss = loss_of(update, args.batch)
            step(model, optimizer, loss, clip=args.clip)
            recent.add(update, loss)
            if update % args.log_interval == 0 or update == args.updates:
                mean = recent.rows(update, min(update, 50)).mean().item()
                run.report(f"update {update:5d}  loss {mean:.4f}", update=update, loss=mean)
                if mean < progress.best:
                    progress.best = mean
                    run.save_best()
        mean = recent.rows(args.updates, min(args.updates, 50)).mean().item()
        return run.finish({"updates": args.updates, "loss": mean})


if __name__ == "__main__":
    run_main(main)
