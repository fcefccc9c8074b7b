"""What the nine scripts share, in reading order.

    stair.py         the idea of the paper: ρ schedules, learned α, exponential α; the nonlinearities
    orthogonal.py    skew-symmetric starts, the matrix exponential and its adjoint
    cells.py         RNN, expRNN, nnRNN: input map, recurrent matrix W, penalty
    network.py       a cell and a stair as one network; the LSTM; the read-out and its loss
    recurrence/      the time loop h_t = g_t(z_t) φ(z_t): one contract, several engines
    optim.py         OrthogonalRMSprop, the groups of a model's parameters, one step
    data.py          MNIST and its relatives as pixel sequences, Penn Treebank characters, any other text
    download.py      fetches missing data files and checks them
    copytask.py, smnist.py, language.py    model and training loop of each task
    errors.py        mistakes of a person as sentences; the start and the end of a script

    runs/            the bookkeeping of a run, which changes of the science never need: every flag (flags), the folder
                     and its files (folder, records, provenance), what a training loop sees (run, progress),
                     pictures (curves), device and threads (machine)

Layers: a module imports only from those below it, at the top of its file (tests/test_layers.py holds this).

    errors, stair, orthogonal, optim < recurrence, download, data < cells, network < runs < the three tasks < scripts

The way of a batch: script → task loop → data → network (cell, stair) → recurrence → an engine → loss → optim.step.

Letters in comments and shapes: B batch, T time steps, I input size, H hidden units, C classes.
Rows are examples, so matrices act on the right: z_t = x_t U + h_{t-1} W.

A task of your own is one script; examples/adding.py is one, whole, to copy. It has:

    NAME, REVISION   of the module that flags.parse is given: the task's name, and a number to raise when the same
                     options come to compute something else, so that tables do not mix the two
    DEFAULTS, PAPER  every option with its value, and a row with lr, rinit, ... for each --net-type; a name of
                     flags.FLAGS means what it means there, another one is a new flag of this script
    build(args)      → the model, an nn.Module with the attribute `network`, from network.build_network
    load             = loader(build, __file__, DEFAULTS, PAPER): opens a run, as evidence does for some pictures
    run.begin(...)   makes the run's folder or restores it: of a Progress its numbers and tensors, of every other object
                     its state_dict; `steps` is the longest sequence, which the stair must reach
    run.finished()   the result where the run has ended before, else None
    run.evaluate(model, show, validation=FUNCTION)    before begin, where args.evaluate is a folder: prints what
                     FUNCTION() measures with the best weights of that run
    run.updates(...) yields the numbers of the updates that are left, in one loop, or within run.epochs(...)
    run.report(line, update=..., loss=...)    prints the line and adds a row to log.csv: `update`, or `epoch` and
                     `batch`, then any numbers under the names of the first row. A curve shows the column with
                     "validation" in its name, else that with "loss". A loss that is not finite ends the run
    run.save_best()  keeps the weights in best.pt
    run.finish(...)  a dict of numbers, which result.json keeps and tables show; a sweep shows its first score
"""
