"""What the nine scripts share, in reading order.

    stair.py         the idea of the paper: ρ schedules, learned α, exponential α; the nonlinearities
    orthogonal.py    skew-symmetric starts, the matrix exponential and its adjoint
    cells.py         RNN, expRNN, nnRNN: input map, recurrent matrix W, penalty
    network.py       a cell and a stair as one network; the LSTM; the read-out and its loss
    recurrence/      the time loop h_t = g_t(z_t) φ(z_t): one contract, several engines
    optim.py         OrthogonalRMSprop, the parameter groups of a model, one step
    data.py          copying sequences, MNIST as pixel sequences, Penn Treebank characters, any other text
    download.py      fetches missing data files and checks them
    copytask.py, smnist.py, language.py    model and training loop of each task
    errors.py        mistakes of a person as sentences; the start and the end of a script

    runs/            the bookkeeping of a run; changes of the science never need it
        flags.py     every flag with its meaning; rows of published hyperparameters; the origin of a value
        records.py   the files of a run: written whole, checked when they are read
        curves.py    curves.png from log.csv
        machine.py   device, threads, versions; whether an update fits into memory
        progress.py  what a loop counts: its place, means, recent values
        folder.py    a run's folder on the disk: its name, log, checkpoints, result; what `--resume` finds there
        run.py       what a training loop sees: the counted loop `updates`, reports, signals

Layers: a module imports only from those below it, at the top of its file (tests/test_layers.py holds this).

    errors, stair, orthogonal, optim < recurrence, download, data < cells, network < runs < the three tasks < scripts

The way of a batch: script → task loop → data → network (cell, stair) → recurrence → an engine → back to the loop's
loss → optim.step.

Letters in comments and shapes: B batch, T time steps, I input size, H hidden units, C classes.
Rows are examples, so matrices act on the right: z_t = x_t U + h_{t-1} W.

A new task needs data, a model and a loop. The adding problem: of T numbers in [0, 1] two are marked, one in each half,
and the network answers their sum at the last step. A network that always answers the mean, 1, has a loss of 1/6.

    import torch
    from torch import nn
    from common.network import build_network
    from common.optim import optimizer_for, step
    from common.stair import FixedStair

    def batch(T, size):                                            # numbers and marks (T, B, 2), sums (B,)
        numbers, marks = torch.rand(T, size), torch.zeros(T, size)
        for low, high in ((0, T // 2), (T // 2, T)):
            marks[torch.randint(low, high, (size,)), torch.arange(size)] = 1
        return torch.stack((numbers, marks), 2), (numbers * marks).sum(0)

    class Adder(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network, self.readout = network, nn.Linear(network.hidden_size, 1)

        def forward(self, x):
            h, _ = self.network(x, last_only=True)                                        # (B, H)
            return self.readout(h).squeeze(1)                                             # (B,)

    model = Adder(build_network("expRNN", 2, 64, FixedStair("expn", 30), "relu", rinit="cayley", iinit="xavier"))
    optimizer = optimizer_for(model, method="Adam", lr=3e-3, lr_orth=1e-3)
    for update in range(600):
        x, target = batch(T=30, size=50)
        loss = nn.functional.mse_loss(model(x), target)
        step(model, optimizer, loss)
"""
