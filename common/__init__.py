"""What the nine scripts share, in reading order.

    stair.py         the idea of the paper: ρ schedules, learned α, exponential α; the nonlinearities
    cells.py         RNN, expRNN, nnRNN (and LSTM): input map, recurrent kernel W, penalty
    orthogonal.py    skew-symmetric starts, the matrix exponential and its adjoint
    recurrence/      the time loop h_t = g_t(z_t) φ(z_t): one contract, several engines
    optim.py         OrthogonalRMSprop: one optimizer, parameter groups, one step()
    data.py          copying sequences, MNIST as pixel sequences, Penn Treebank characters, a text of one's own
    download.py      what both downloads share
    copytask.py, smnist.py, language.py    model and training loop of each task
    run.py           a run's folder: config, log, checkpoints, resume, result
    machine.py       device, speed, memory: what a run finds
    cli.py           the flags' meaning, rows of published hyperparameters, where a value came from
    rows.py          the rows of the published tables, and the runs that belong to them
    published.py     what others measured
    launch.py        runs what a table is missing
    table.py         the published tables beside ours: python -m evidence
    plot.py          pictures: learning curves, the shapes of the stairs: python -m evidence.pictures
    pages.py         the pages that show them, made anew from the records

Letters in comments and shapes: B batch, T time steps, I input size, H hidden units, C classes.
Rows are examples, so matrices act on the right: z_t = x_t U + h_{t-1} W.
"""
