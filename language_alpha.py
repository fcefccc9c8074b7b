"""Characters of the Penn Treebank with a learned stair α_t: predict the next one.

    h_t = α_t · φ(x_t U + h_{t-1} W)                       α_t: learned, one number a step

    python language_alpha.py                                  sRNN (non-normal), the default: 46.07 %
    python language_alpha.py --net-type RNN --rinit henaff    sRNN from another start: 37.20 %

Validation accuracy after the first of 100 epochs, one seed; an epoch takes about 5 minutes on one core.
"""

from pathlib import Path

from common import language
from common.data import load_characters
from common.errors import start
from common.network import build_network
from common.optim import optimizer_for
from common.runs import flags
from common.runs.run import Run
from common.stair import LearnedStair

SCRIPT = Path(__file__).stem

# What a researcher edits. A value typed on the command line wins, then the PAPER row, then this.
DEFAULTS = dict(
    net_type="nnRNN",     # RNN, RNN-Orth, expRNN, nnRNN
    alpha_start=0.98,     # every α_t before training
    nhid=1024,            # hidden units H
    iinit="kaiming",      # start of U: xavier, kaiming
    emsize=200,           # size of an embedding
    tied=False,           # decoder = embedding (needs emsize = nhid)
    bptt=150,             # steps a segment; published for 150 and 300
    batch=128,            # parallel streams of text
    epochs=100,
    betas=(0.0, 0.9),     # decay rates of Adam, with --optimizer Adam
    log_interval=50,      # segments a report
    data=None,            # folder of the files; None is data/ beside this script
    text=None,            # a UTF-8 text of your own in its place, read by characters
)

# The published rows, picked by --net-type, --bptt.
PAPER = {
    "sRNN":                  dict(net_type=("RNN", "RNN-Orth"), lr=1e-4, alpha=0.9, rinit="random"),
    "sRNN (exponential)":    dict(net_type="expRNN", lr=5e-3, lr_orth=1e-4, alpha=0.9, rinit="cayley"),
    "sRNN (non-normal)":     dict(net_type="nnRNN", bptt=150, lr=8e-4, lr_orth=8e-5, alpha=0.9,
                                  alam=1.0, Tdecay=1e-4, rinit="cayley"),
    "sRNN (non-normal) 300": dict(net_type="nnRNN", bptt=300, lr=8e-4, lr_orth=6e-5, alpha=0.9,
                                  alam=1e-4, Tdecay=1e-4, rinit="cayley"),
}


def main(argv=None):
    args = flags.parse(argv, SCRIPT, __doc__, DEFAULTS, PAPER)
    with Run(args, label=f"{args.net_type}-bptt{args.bptt}") as run:
        corpus = load_characters(args.data, args.text)
        stair = LearnedStair(args.bptt, args.alpha_start)                                   # α_t
        network = build_network(args.net_type, args.emsize, args.nhid, stair, args.nonlin, args.rinit, args.iinit,
                                args.engine)
        model = language.CharacterModel(network, len(corpus.vocabulary), args.emsize, args.tied).to(run.device)
        optimizer = optimizer_for(model, method=args.optimizer, lr=args.lr, lr_orth=args.lr_orth, alpha=args.alpha,
                                  betas=args.betas, Tdecay=args.Tdecay)
        return language.train(model, optimizer, corpus, run, epochs=args.epochs, batch=args.batch, bptt=args.bptt,
                              log_interval=args.log_interval, alam=args.alam, clip=args.clip)


if __name__ == "__main__":
    start(main)
