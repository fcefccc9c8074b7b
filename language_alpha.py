"""Characters of the Penn Treebank with a learned stair α_t: predict the next one.

    h_t = α_t · φ(x_t U + h_{t-1} W)                       α_t: learned, one number a step

    python language_alpha.py --net-type expRNN --nhid 256 --epochs 15                sRNN (exponential): 57.60 %
    python language_alpha.py --net-type RNN --rinit henaff --nhid 256 --epochs 15    sRNN from henaff: 45.14 %

Test accuracy of seed 400. On one core --nhid 256 --epochs 15 takes 8 minutes, and one epoch of the default size 5.
"""

from common import language
from common.data import load_characters
from common.errors import run_main
from common.network import build_network
from common.optim import optimizer_for
from common.runs import flags
from common.runs.run import Run, loader
from common.stair import LearnedStair

# What the rows of PAPER do not hold. A typed value wins over a row, a row over these; a new key becomes a flag.
DEFAULTS = dict(
    # network
    net_type="nnRNN",                       # RNN, RNN-Orth, expRNN, nnRNN
    alpha_start=0.98,                       # every α_t before training
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

# The published rows, picked by --net-type and --bptt.
PAPER = {
    "sRNN":                     dict(net_type=("RNN-Orth", "RNN"), lr=1e-4, alpha=0.9, rinit="random"),
    "sRNN (exponential)":       dict(net_type="expRNN", lr=5e-3, lr_orth=1e-4, alpha=0.9, rinit="cayley"),
    "sRNN (non-normal)":        dict(net_type="nnRNN", bptt=150, lr=8e-4, lr_orth=8e-5, alpha=0.9,
                                     alam=1.0, Tdecay=1e-4, rinit="cayley", iinit="linear"),
    "sRNN (non-normal) 300":    dict(net_type="nnRNN", bptt=300, lr=8e-4, lr_orth=6e-5, alpha=0.9,
                                     alam=1e-4, Tdecay=1e-4, rinit="cayley", iinit="linear"),
}


def build(args, vocabulary):
    stair = LearnedStair(args.bptt, args.alpha_start)                           # α_t
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
