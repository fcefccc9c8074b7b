"""Copying memory with a learned exponential stair: remember 10 symbols over a delay of T steps.

    h_t = (1 − exp(−α_t |z_t|)) · φ(z_t)                  z_t = x_t U + h_{t-1} W; α_t ≥ 0: learned, one number a step

    python copytask_expalpha.py                                  sRNN (exponential), the default: recall 0.997 ± 0.001
    python copytask_expalpha.py --net-type RNN --rinit henaff    sRNN from another start: recall 0.982 ± 0.018

Recall: the mean ± standard deviation over five seeds. A run takes 10 to 20 seconds on one core.
"""

from common import copytask
from common.errors import run_main
from common.network import build_network
from common.optim import optimizer_for
from common.runs import flags
from common.runs.run import Run, loader
from common.stair import ExponentialStair

# What the rows of PAPER do not hold. A typed value wins over a row, a row over these; a new key becomes a flag.
DEFAULTS = dict(
    # network
    net_type="expRNN",                        # RNN, RNN-Orth, expRNN, nnRNN
    alpha_start=20.0,                         # every α_t before training; near 0 the network forgets
    literal=False,                            # z in the place of |z|, as in the authors' code
    nhid=128,                                 # hidden units H
    nonlin="modrelu",                         # none, tanh, relu, modrelu, sigmoid
    iinit="xavier",                           # start of U: xavier, kaiming, linear
    # task
    T=200, vari=False,                        # delay in steps; whether every batch draws it from 1 … T
    labels=8, c_length=10,                    # size of the alphabet, 1 to 8; symbols to remember
    onehot=True,                              # one input channel a symbol
    batch=10, updates=1500,                   # sequences per update; optimizer steps
    log_interval=50, random_seed=400,         # updates per report; seed of weights and sequences
    # optimizer
    optimizer="RMSprop", betas=(0.9, 0.999),  # RMSprop, Adam; decay rates of Adam
    clip=0.0,                                 # largest norm of the gradient; 0 leaves it alone
)

# The published rows, picked by --net-type.
PAPER = {
    "sRNN":                 dict(net_type=("RNN-Orth", "RNN"), lr=2e-4, alpha=0.99, rinit="random"),
    "sRNN (exponential)":   dict(net_type="expRNN", lr=1e-3, lr_orth=1e-4, alpha=0.99, rinit="henaff"),
    "sRNN (non-normal)":    dict(net_type="nnRNN", lr=5e-4, lr_orth=1e-6, alpha=0.99, alam=1e-4, Tdecay=1e-4,
                                 rinit="henaff", iinit="linear"),
}


def build(args):
    task = copytask.CopyingTask(args.T, args.labels, args.c_length, args.vari)
    stair = ExponentialStair(task.steps, args.alpha_start, args.literal)        # 1 − exp(−α_t |z|)
    network = build_network(args.net_type, task.input_symbols if args.onehot else 1, args.nhid, stair, args.nonlin,
                            args.rinit, args.iinit, args.engine)
    return copytask.CopyModel(network, task.classes, args.onehot)               # a read-out at every step


load = loader(build, __file__, DEFAULTS, PAPER)  # load(FOLDER) → the best weights of a run in its model, the options


def main(argv=None):
    args = flags.parse(argv, __file__, __doc__, DEFAULTS, PAPER, copytask)
    with Run(args) as run:
        task = copytask.CopyingTask(args.T, args.labels, args.c_length, args.vari, seed=args.random_seed)
        model = build(args).to(run.device)
        optimizer = optimizer_for(model, args.lr, args.lr_orth, args.optimizer, args.alpha, args.betas, args.Tdecay)
        return copytask.train(model, optimizer, task, run, updates=args.updates, batch=args.batch,
                              log_interval=args.log_interval, alam=args.alam, clip=args.clip)


if __name__ == "__main__":
    run_main(main)
