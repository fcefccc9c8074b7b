"""Sequential MNIST with a learned exponential stair: a digit read pixel by pixel, 784 steps.

    h_t = (1 − exp(−α_t |z_t|)) · φ(z_t)                  z_t = x_t U + h_{t-1} W; α_t ≥ 0: learned, one number a step

    python sMNIST_expalpha.py --permute --nhid 128 --epochs 10                                  exponential: 85.37 %
    python sMNIST_expalpha.py --net-type RNN --permute --rinit henaff --nhid 128 --epochs 10    from henaff: 83.52 %

Test accuracy of seed 400. On one core these commands take 10 minutes, and one epoch of the default size takes 8.
"""

from common import smnist
from common.data import load_mnist
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
    nhid=512,                                 # hidden units H
    nonlin="modrelu",                         # none, tanh, relu, modrelu, sigmoid
    iinit="xavier",                           # start of U: xavier, kaiming, linear
    # task
    permute=False, normalize=None,            # one fixed order of the pixels; mean and deviation to take
    batch=100, epochs=100,                    # images per update; passes over the images
    log_interval=100, save_freq=1,            # updates per report; epochs per checkpoint
    random_seed=400,                          # seed of the weights
    data=None,                                # folder of the files; None is data/ beside this script
    # optimizer
    optimizer="RMSprop", betas=(0.9, 0.999),  # RMSprop, Adam; decay rates of Adam
    clip=0.0,                                 # largest norm of the gradient; 0 leaves it alone
)

# The published rows, of --permute, picked by --net-type.
PAPER = {
    "sRNN":                 dict(net_type=("RNN-Orth", "RNN"), lr=5e-5, alpha=0.99, rinit="random"),
    "sRNN (exponential)":   dict(net_type="expRNN", lr=5e-4, lr_orth=5e-5, alpha=0.99, rinit="cayley"),
    "sRNN (non-normal)":    dict(net_type="nnRNN", lr=2e-4, lr_orth=2e-5, alpha=0.99, alam=0.1, Tdecay=1e-4,
                                 rinit="cayley", iinit="linear"),
}


def build(args, classes=10):
    stair = ExponentialStair(784, args.alpha_start, args.literal)               # 1 − exp(−α_t |z|)
    network = build_network(args.net_type, 1, args.nhid, stair, args.nonlin, args.rinit, args.iinit, args.engine)
    return smnist.PixelModel(network, classes)                                  # a read-out of the last state


load = loader(build, __file__, DEFAULTS, PAPER)  # load(FOLDER) → the best weights of a run in its model, the options


def main(argv=None):
    args = flags.parse(argv, __file__, __doc__, DEFAULTS, PAPER, smnist)
    with Run(args, label="permuted" if args.permute else "") as run:
        images = load_mnist(args.data, args.permute, args.normalize)
        model = build(args, images[0].classes).to(run.device)
        optimizer = optimizer_for(model, args.lr, args.lr_orth, args.optimizer, args.alpha, args.betas, args.Tdecay)
        return smnist.train(model, optimizer, *images, run, epochs=args.epochs, batch=args.batch,
                            log_interval=args.log_interval, save_freq=args.save_freq, alam=args.alam, clip=args.clip)


if __name__ == "__main__":
    run_main(main)
