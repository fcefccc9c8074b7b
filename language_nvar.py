"""Characters of the Penn Treebank with a fixed stair ρ_t: predict the next one.

    h_t = ρ_t · φ(x_t U + h_{t-1} W)                       ρ_t: a fixed schedule, --nvar

    python language_nvar.py --net-type expRNN --nhid 256 --epochs 15    sRNN (exponential): 57.26 %
    python language_nvar.py --net-type expRNN --nvar none               expRNN, a baseline: 67.05 %

Test accuracy of seed 400. On one core --nhid 256 --epochs 15 takes 8 minutes, and one epoch of the default size 5.
"""

from common import language
from common.data import load_characters
from common.errors import run_main
from common.network import build_network
from common.optim import optimizer_for
from common.runs import flags
from common.runs.run import Run, loader
from common.stair import FixedStair

# What the rows of PAPER do not hold. A typed value wins over a row, a row over these; a new key becomes a flag.
DEFAULTS = dict(
    # network
    net_type="nnRNN",                       # RNN, RNN-Orth, expRNN, nnRNN, LSTM
    nvar="expn",                            # none, n, n2, expn, logn, log2n, sqrtlogn
    nhid=1024,                              # hidden units H
    nonlin="modrelu",                       # none, tanh, relu, modrelu, sigmoid
    iinit="kaiming",                        # start of U: xavier, kaiming, linear
    emsize=200, tied=False,                 # size of the embedding; the decoder shares it, needs emsize = nhid
    # task
    bptt=150,                               # steps a segment; published for 150 and 300
    batch=128, epochs=100,                  # parallel streams; passes over the text
    log_interval=50, random_seed=400,       # segments per report; seed of the weights
    data=None, text=None,                   # folder of the files, None is data/ here; the file of a text of your own
    # optimizer
    optimizer="RMSprop", betas=(0.0, 0.9),  # RMSprop, Adam; decay rates of Adam
    clip=0.0,                               # largest norm of the gradient; 0 leaves it alone
)

# The published rows, picked by --net-type and --bptt. A / B: A with --nvar none (a baseline), B with a stair.
PAPER = {
    "RNN":                               dict(net_type="RNN", nvar="none", lr=1e-5, alpha=0.9, rinit="xavier"),
    "RNN-Orth / sRNN":                   dict(net_type=("RNN-Orth", "RNN"), lr=1e-4, alpha=0.9, rinit="random"),
    "expRNN / sRNN (exponential)":       dict(net_type="expRNN", lr=5e-3, lr_orth=1e-4, alpha=0.9, rinit="cayley"),
    "nnRNN / sRNN (non-normal)":         dict(net_type="nnRNN", bptt=150, lr=8e-4, lr_orth=8e-5, alpha=0.9,
                                              alam=1.0, Tdecay=1e-4, rinit="cayley", iinit="linear"),
    "nnRNN 300 / sRNN (non-normal) 300": dict(net_type="nnRNN", bptt=300, lr=8e-4, lr_orth=6e-5, alpha=0.9,
                                              alam=1e-4, Tdecay=1e-4, rinit="cayley", iinit="linear"),
    "LSTM":                              dict(net_type="LSTM", nvar="none", lr=8e-3, alpha=0.9, rinit="xavier"),
}


def build(args, vocabulary):
    stair = FixedStair(args.nvar, args.bptt)                                    # ρ_t
    network = build_network(args.net_type, args.emsize, args.nhid, stair, args.nonlin, args.rinit, args.iinit,
                            args.engine)
    return language.CharacterModel(network, len(vocabulary), args.emsize, args.tied)  # V symbols


load = loader(build, __file__, DEFAULTS, PAPER)  # load(FOLDER) → the best weights of a run in its model, the options


def main(argv=None):
    args = flags.parse(argv, __file__, __doc__, DEFAULTS, PAPER, language)
    if args.sample:
        return language.print_sample(build, args)
    with Run(args, label=f"bptt{args.bptt}") as run:
        corpus = load_characters(args.data, args.text)
        model = build(args, corpus.vocabulary).to(run.device)
        optimizer = optimizer_for(model, args.lr, args.lr_orth, args.optimizer, args.alpha, args.betas, args.Tdecay)
        return language.train(model, optimizer, corpus, run, epochs=args.epochs, batch=args.batch, bptt=args.bptt,
                              log_interval=args.log_interval, alam=args.alam, clip=args.clip)


if __name__ == "__main__":
    run_main(main)
