"""The flags: each exists where it should, means one thing, changes what it says, and refuses what has no meaning.

The tables below are a second copy of the published ones, typed by hand; the first stands in each script's PAPER.
"""

import difflib
import inspect
import itertools
import math
from pathlib import Path

import pytest
import torch
from conftest import LOOPS, SCRIPTS, module_of, task_of, tiny

from common import data
from common.cells import NNRNN, RNN, ExpRNN
from common.data import PixelSequences
from common.errors import UserError
from common.network import LSTM
from common.runs import flags
from common.stair import SCHEDULES, schedule

NVAR = [s for s in SCRIPTS if s.endswith("nvar")]
LEARNED = [s for s in SCRIPTS if not s.endswith("nvar")]
EXPALPHA = [s for s in SCRIPTS if s.endswith("expalpha")]
COPY = [s for s in SCRIPTS if s.startswith("copytask")]
MNIST = [s for s in SCRIPTS if s.startswith("sMNIST")]
LANGUAGE = [s for s in SCRIPTS if s.startswith("language")]


def parse(script, *arguments):
    module = module_of(script)
    return flags.parse(list(arguments), script, module.__doc__, module.DEFAULTS, module.PAPER,
                       LOOPS[task_of(script)])


def parser_of(script):
    """The argparse parser of a script."""
    module = module_of(script)
    return flags.make_parser(script, module.__doc__, flags.known_flags(script, module.DEFAULTS))


def refused(script, *arguments) -> str:
    """The sentence with which a script refuses its arguments."""
    with pytest.raises(UserError) as error:
        parse(script, *arguments)
    assert error.value.status == 2
    sentence = str(error.value)
    assert len(sentence.splitlines()) == 1
    return sentence


ADAM = ("--optimizer", "Adam")
NN = ("--net-type", "nnRNN")

# scripts, flag, text of its value, the value, what else must be typed for it to have a meaning
FLAGS = [
    (SCRIPTS, "net-type", "RNN", "RNN", ()),
    (SCRIPTS, "nhid", "64", 64, ()),
    (SCRIPTS, "random-seed", "7", 7, ()),
    (SCRIPTS, "seed", "7", 7, ()),
    (SCRIPTS, "batch", "9", 9, ()),
    (SCRIPTS, "lr", "3e-4", 3e-4, ()),
    (SCRIPTS, "lr_orth", "3e-5", 3e-5, ()),
    (SCRIPTS, "optimizer", "Adam", "Adam", ()),
    (SCRIPTS, "alpha", "0.7", 0.7, ()),
    (SCRIPTS, "rinit", "skew", "skew", ()),
    ((*COPY, *MNIST), "iinit", "kaiming", "kaiming", ()),
    (LANGUAGE, "iinit", "xavier", "xavier", ()),
    (SCRIPTS, "nonlin", "tanh", "tanh", ()),
    (SCRIPTS, "alam", "0.5", 0.5, NN),
    (SCRIPTS, "Tdecay", "0.01", 0.01, NN),
    (SCRIPTS, "clip", "5", 5.0, ()),
    (SCRIPTS, "name", "try-1", "try-1", ()),
    (SCRIPTS, "save", "elsewhere", Path("elsewhere"), ()),
    (SCRIPTS, "threads", "2", 2, ()),
    (SCRIPTS, "engine", "reference", "reference", ()),
    (SCRIPTS, "log-interval", "5", 5, ()),
    (NVAR, "nvar", "log2n", "log2n", ()),
    (LEARNED, "alpha-start", "0.5", 0.5, ()),
    (COPY, "T", "30", 30, ()),
    (COPY, "labels", "4", 4, ()),
    (COPY, "c-length", "5", 5, ()),
    (COPY, "updates", "77", 77, ()),
    (MNIST, "epochs", "3", 3, ()),
    (MNIST, "save_freq", "2", 2, ()),
    (MNIST, "data", "there", Path("there").absolute(), ()),
    (LANGUAGE, "epochs", "3", 3, ()),
    (LANGUAGE, "emsize", "33", 33, ()),
    (LANGUAGE, "bptt", "60", 60, ()),
    (LANGUAGE, "data", "there", Path("there").absolute(), ()),
    (LANGUAGE, "text", "mine.txt", Path("mine.txt").absolute(), ()),
]
SWITCHES = [(SCRIPTS, "curves", ()), (SCRIPTS, "tensorboard", ()), (SCRIPTS, "cuda", ()),
            (SCRIPTS, "tf32", ("--cuda",)), (EXPALPHA, "literal", ()), (COPY, "onehot", ()), (COPY, "vari", ()),
            (MNIST, "permute", ()),
            (LANGUAGE, "tied", ("--emsize", "8", "--nhid", "8"))]
DEST = {"seed": "random_seed"}


def spellings(flag):
    return {f"--{flag.replace('_', '-')}", f"--{flag.replace('-', '_')}"}


@pytest.mark.parametrize(("scripts", "flag", "text", "value", "beside"), FLAGS,
                         ids=[f"{flag[1]}-{len(flag[0])}" for flag in FLAGS])
def test_flag_with_a_value(scripts, flag, text, value, beside):
    dest = DEST.get(flag, flag.replace("-", "_"))
    for script, spelled in itertools.product(scripts, spellings(flag)):
        for typed in ((spelled, text), (f"{spelled}={text}",)):
            options = parse(script, *beside, *typed)
            assert getattr(options, dest) == value
            assert type(getattr(options, dest)) is type(value) or isinstance(value, Path)
            assert options.origin[dest] == "typed"
        assert getattr(parse(script, *beside), dest) != value    # so the value came from the flag
    for script in set(SCRIPTS) - set(scripts):
        if all(script not in other for other, name, *_ in FLAGS if name == flag):
            assert "there is no flag" in refused(script, f"--{flag}", text)


@pytest.mark.parametrize(("scripts", "flag", "beside"), SWITCHES, ids=[s[1] for s in SWITCHES])
def test_switch(scripts, flag, beside):
    for script in scripts:
        assert getattr(parse(script, *beside, f"--{flag}"), flag) is True
        assert getattr(parse(script, *beside, f"--no-{flag}"), flag) is False
        assert getattr(parse(script, *beside, f"--no_{flag}"), flag) is False
        assert getattr(parse(script), flag) is (flag in ("onehot", "curves"))
    for script in set(SCRIPTS) - set(scripts):
        assert "there is no flag" in refused(script, f"--{flag}")


@pytest.mark.parametrize("script", MNIST)
def test_normalize(script):
    assert parse(script, "--normalize", "0.1307", "0.3081").normalize == (0.1307, 0.3081)
    assert parse(script).normalize is None
    assert "0.0" in refused(script, "--normalize", "0.1307", "0.0")
    assert "2 arguments" in refused(script, "--normalize", "0.1307")


@pytest.mark.parametrize("script", SCRIPTS)
def test_betas(script):
    assert parse(script, *ADAM, "--betas", "0", "0.9").betas == (0.0, 0.9)
    assert parse(script, *ADAM).betas == ((0.0, 0.9) if script.startswith("language") else (0.9, 0.999))


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_tested_and_in_the_help(script):
    parser = parser_of(script)
    known = {f[1].replace("_", "-") for f in (*FLAGS, *SWITCHES) if script in f[0]}
    known |= {"betas", "resume", "help", "dry-run", "evaluate", "sample", "prompt"}
    known |= {"normalize"} if script in MNIST else set()
    found = {option.removeprefix("--").removeprefix("no-").replace("_", "-")
             for action in parser._actions for option in action.option_strings if option.startswith("--")}
    assert found == known
    text = parser.format_help()
    for action in parser._actions:
        assert action.help
        assert max(action.option_strings, key=len) in text


def test_help_ends_well(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("sMNIST_nvar", "--help")
    assert stop.value.code == 0
    assert "--lr_orth" in capsys.readouterr().out


@pytest.mark.parametrize("task", LOOPS)
def test_the_scripts_of_a_task_differ_only_in_the_stair(task):
    nvar, alpha, expalpha = (module_of(f"{task}_{stair}") for stair in ("nvar", "alpha", "expalpha"))
    own = {"nvar", "alpha_start", "literal"}
    plain = [{k: v for k, v in m.DEFAULTS.items() if k not in own} for m in (nvar, alpha, expalpha)]
    assert plain[0] == plain[1] == plain[2]
    assert set(nvar.DEFAULTS) & own == {"nvar"}
    assert set(alpha.DEFAULTS) & own == {"alpha_start"}
    assert set(expalpha.DEFAULTS) & own == {"alpha_start", "literal"}
    assert alpha.PAPER == expalpha.PAPER
    assert {name.split(" / ")[1]: row for name, row in nvar.PAPER.items() if " / " in name} == alpha.PAPER
    source = ["".join(map(inspect.getsource, (m.build, m.main))).splitlines()
              for m in (nvar, alpha, expalpha)]
    for one, other in itertools.combinations(source, 2):
        for line in difflib.ndiff(one, other):
            if line[0] in "+-":
                assert "stair = " in line, line


def row(lr, lr_orth, alpha, alam, tdecay, rinit, **more):
    return dict(lr=lr, lr_orth=lr_orth, alpha=alpha, alam=alam, Tdecay=tdecay, rinit=rinit, **more)


PIXELS = {
    "RNN": row(1e-4, None, 0.9, 0, 0, "xavier"),
    "RNN-Orth": row(5e-5, None, 0.99, 0, 0, "random"),
    "expRNN": row(5e-4, 5e-5, 0.99, 0, 0, "cayley"),
    "nnRNN": row(2e-4, 2e-5, 0.99, 0.1, 1e-4, "cayley", iinit="linear"),
    "LSTM": row(5e-4, None, 0.9, 0, 0, "xavier"),
}
CHARACTERS_150 = {
    "RNN": row(1e-5, None, 0.9, 0, 0, "xavier"),
    "RNN-Orth": row(1e-4, None, 0.9, 0, 0, "random"),
    "expRNN": row(5e-3, 1e-4, 0.9, 0, 0, "cayley"),
    "nnRNN": row(8e-4, 8e-5, 0.9, 1, 1e-4, "cayley", iinit="linear"),
    "LSTM": row(8e-3, None, 0.9, 0, 0, "xavier"),
}
CHARACTERS_300 = {**CHARACTERS_150, "nnRNN": row(8e-4, 6e-5, 0.9, 1e-4, 1e-4, "cayley", iinit="linear")}
COPYING = {
    "RNN": row(1e-3, None, 0.9, 0, 0, "xavier"),
    "RNN-Orth": row(2e-4, None, 0.99, 0, 0, "random"),
    "expRNN": row(1e-3, 1e-4, 0.99, 0, 0, "henaff"),
    "nnRNN": row(5e-4, 1e-6, 0.99, 1e-4, 1e-4, "henaff", iinit="linear"),
    "LSTM": row(5e-4, None, 0.99, 0, 0, "xavier"),
}
TABLES = [("sMNIST", PIXELS, ()), ("language", CHARACTERS_150, ()), ("language", CHARACTERS_150, ("--bptt", "150")),
          ("language", CHARACTERS_300, ("--bptt", "300")), ("copytask", COPYING, ())]
STAIRED = {"sRNN": ("RNN", "RNN-Orth"), "sRNN (exponential)": ("expRNN",), "sRNN (non-normal)": ("nnRNN",)}


def commands():
    """script, one short command, the model it means, the row of the table."""
    for task, table, beside in TABLES:
        for model, values in table.items():
            yield f"{task}_nvar", ("--net-type", model, "--nvar", "none", *beside), model, values
        for model, net_types in STAIRED.items():
            for net_type in net_types:
                typed = ("--net-type", net_type, *beside)
                for name in SCHEDULES:
                    if name != "none":
                        yield f"{task}_nvar", (*typed, "--nvar", name), model, table[net_types[-1]]
                for stair in ("nvar", "alpha", "expalpha"):
                    yield f"{task}_{stair}", typed, model, table[net_types[-1]]


@pytest.mark.parametrize(("script", "arguments", "model", "values"), list(commands()))
def test_published_row(script, arguments, model, values):
    options = parse(script, *arguments)
    assert {dest: getattr(options, dest) for dest in values} == values
    assert options.row.removesuffix(" 300") == model
    used = {dest for dest, value in values.items() if value not in (None, 0)}
    assert {options.origin[dest] for dest in used} == {f"PAPER {options.row}"}
    assert {options.origin[dest] for dest in set(values) - used} <= {"not used"}
    assert options.nonlin == "modrelu"
    assert options.optimizer == "RMSprop"


@pytest.mark.parametrize(("script", "model"), [
    *((s, "sRNN (exponential)") for s in (*COPY, *MNIST)), *((s, "sRNN (non-normal)") for s in LANGUAGE)])
def test_nothing_typed_runs_an_srnn_row(script, model):
    assert parse(script).row == model


@pytest.mark.parametrize("bptt", [149, 200, 301])
def test_another_bptt_takes_the_first_row_of_the_model(bptt):
    options = parse("language_nvar", "--net-type", "nnRNN", "--nvar", "none", "--bptt", str(bptt))
    assert (options.bptt, options.lr_orth, options.alam) == (bptt, 8e-5, 1)


AUTHORS = {
    "--net-type RNN --nvar log2n --permute --lr 5e-5 --nhid 512 --alpha 0.9 --rinit random":
        dict(net_type="RNN", nvar="log2n", permute=True, lr=5e-5, nhid=512, alpha=0.9, rinit="random", alam=0),
    "--net-type expRNN --nvar expn --nhid 512 --permute --lr 5e-4 --lr_orth 5e-5 --alpha 0.99 --rinit cayley":
        dict(net_type="expRNN", nvar="expn", nhid=512, permute=True, lr=5e-4, lr_orth=5e-5, alpha=0.99,
             rinit="cayley"),
    "--net-type nnRNN --nvar n2 --nhid 512 --permute --lr 2e-4 --lr_orth 2e-5 --alpha 0.99 --alam 0.1 --Tdecay 1e-4 "
    "--rinit cayley":
        dict(net_type="nnRNN", nvar="n2", nhid=512, permute=True, lr=2e-4, lr_orth=2e-5, alpha=0.99, alam=0.1,
             Tdecay=1e-4, rinit="cayley", iinit="linear"),
}


@pytest.mark.parametrize("typed", AUTHORS)
def test_the_authors_commands(typed):
    for cuda in ((), ("--cuda",)):
        options = parse("sMNIST_nvar", *typed.split(), *cuda)
        wanted = {"iinit": "xavier", **AUTHORS[typed], "cuda": bool(cuda), "batch": 100, "epochs": 100}
        assert {dest: getattr(options, dest) for dest in wanted} == wanted
        assert all(options.origin[token[2:].replace("-", "_")] == "typed" for token in typed.split()
                   if token.startswith("--"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_is_typed_wins(script):
    net = parse(script).net_type
    options = parse(script, "--lr", "0.125", "--rinit", "skew", "--nhid", "10")
    assert (options.lr, options.rinit, options.nhid, options.net_type) == (0.125, "skew", 10, net)
    origin = options.origin
    assert (origin["lr"], origin["rinit"], origin["nhid"]) == ("typed",) * 3
    assert origin["lr_orth"] == origin["alpha"] == f"PAPER {options.row}"
    assert origin["net_type"] == origin["batch"] == origin["nonlin"] == "default"


def test_the_origins_are_printed():
    options = parse("copytask_nvar", "--lr", "0.125")
    lines = dict(line.split(": ", 1) for line in flags.describe(options).splitlines())
    assert lines["typed"] == "lr=0.125"
    assert set(lines["PAPER sRNN (exponential)"].split()) == {"rinit=henaff", "lr_orth=0.0001", "alpha=0.99"}
    assert "nvar=expn" in lines["default"]
    assert "alam" not in flags.describe(options)


LSTM_ = "--net-type LSTM --nvar none"
NONE = "--nvar none"
MEANINGLESS = [
    ("copytask_nvar", "--net-type LSTM", "LSTM has no stair"),
    ("sMNIST_nvar", "--net-type LSTM --nvar expn", "sMNIST_nvar.py --net-type LSTM --nvar none"),
    ("language_alpha", "--net-type LSTM", "language_nvar.py"),
    ("copytask_expalpha", "--net-type LSTM", "copytask_nvar.py"),
    ("copytask_nvar", "--net-type expRNN --rinit xavier", "--rinit xavier"),
    ("sMNIST_alpha", "--net-type nnRNN --rinit xavier", "henaff"),
    ("language_nvar", f"--net-type RNN-Orth {NONE} --rinit xavier", "--net-type RNN"),
    ("copytask_nvar", f"{LSTM_} --rinit henaff", "--rinit henaff"),
    ("copytask_nvar", f"{LSTM_} --rinit cayley", "--rinit cayley"),
    ("copytask_nvar", f"{LSTM_} --rinit skew", "--rinit skew"),
    ("copytask_nvar", f"{LSTM_} --nonlin tanh", "--nonlin"),
    ("copytask_nvar", f"{LSTM_} --engine torch", "--engine"),
    ("copytask_nvar", f"{LSTM_} --lr_orth 1e-3", "--lr_orth"),
    ("copytask_nvar", "--net-type nnRNN --nhid 127", "even, not 127"),
    ("language_expalpha", "--nhid 7", "even, not 7"),
    ("language_nvar", "--tied", "200 and 1024"),
    ("copytask_nvar", "--net-type RNN --lr_orth 1e-4", "--lr_orth"),
    ("sMNIST_alpha", "--net-type RNN-Orth --lr-orth 1e-4", "--lr_orth"),
    ("copytask_nvar", "--net-type expRNN --alam 1", "--alam"),
    ("copytask_nvar", "--net-type expRNN --Tdecay 1e-4", "--Tdecay"),
    ("language_alpha", "--net-type RNN --alam 1", "--alam"),
    ("copytask_nvar", "--betas 0.9 0.99", "--optimizer Adam"),
    ("copytask_nvar", "--net-type RNN --optimizer Adam --alpha 0.9", "--betas"),
    ("language_nvar", "--net-type nnRNN --optimizer Adam --alpha 0.9", "--betas"),
    ("copytask_expalpha", "--alpha-start -1", "--alpha-start"),
    ("copytask_expalpha", "--alpha-start=-1e-9 --literal", "--alpha-start"),
]


@pytest.mark.parametrize(("script", "typed", "part"), MEANINGLESS)
def test_a_combination_without_meaning(script, typed, part):
    assert part in refused(script, *typed.split())


@pytest.mark.parametrize("text", ["-1", "-0.5", "-1e-3", "-2.5E-1"])
def test_a_negative_number_is_a_value(text):
    assert parse("copytask_alpha", "--alpha-start", text).alpha_start == float(text)
    assert parse("copytask_alpha", f"--alpha-start={text}").alpha_start == float(text)


@pytest.mark.parametrize(("script", "typed", "hint"), [
    ("copytask_nvar", "--nhdi 8", "--nhid"), ("copytask_nvar", "--net_typ RNN", "--net-type"),
    ("copytask_nvar", "--lrorth 1", "--lr_orth"), ("language_nvar", "--emb-size 3", "--emsize"),
    ("sMNIST_nvar", "--permuted", "--permute")])
def test_suggestions(script, typed, hint):
    assert f"did you mean {hint}?" in refused(script, *typed.split())


@pytest.mark.parametrize("typed", ["--nh 8", "--bat 3", "stray", "-n 8", "--onehot=False", "--lr", "--xyzzyq"])
def test_what_is_no_flag(typed):
    assert refused("copytask_nvar", *typed.split())


@pytest.mark.parametrize(("name", "value"), [("1n", "n"), ("n^2", "n2"), ("1n2", "n2")])
def test_the_other_names_of_a_schedule(name, value):
    assert parse("copytask_nvar", "--nvar", name).nvar == value


ONE_EACH = ("copytask_nvar", "sMNIST_nvar", "language_nvar")


@pytest.mark.parametrize("script", ONE_EACH)
@pytest.mark.parametrize(("net_type", "cell"), [("RNN", RNN), ("RNN-Orth", RNN), ("expRNN", ExpRNN), ("nnRNN", NNRNN)])
def test_net_type(capture, script, net_type, cell):
    assert type(capture(script, "--net-type", net_type).model.network.cell) is cell
    assert type(capture(script, "--net-type", "LSTM", "--nvar", "none").model.network) is LSTM


@pytest.mark.parametrize("script", NVAR)
@pytest.mark.parametrize("name", SCHEDULES)
def test_nvar(capture, script, name):
    stair = capture(script, "--nvar", name).model.network.stair
    steps = {"copytask": 5 + 2 * 2, "sMNIST": 784, "language": 20}[task_of(script)]
    assert stair.rule == "scale"
    assert list(stair.parameters()) == []
    torch.testing.assert_close(stair.numbers.double(), schedule(name, steps), rtol=0, atol=1e-7)


@pytest.mark.parametrize("script", LEARNED)
@pytest.mark.parametrize("start", [0.25, 3.0])
def test_alpha_start(capture, script, start):
    stair = capture(script, "--alpha-start", str(start)).model.network.stair
    assert stair.numbers.tolist() == [start] * {"copytask": 9, "sMNIST": 784, "language": 20}[task_of(script)]
    assert stair.numbers.requires_grad


@pytest.mark.parametrize("script", LEARNED)
def test_learned_alpha_is_optimized(capture, script):
    made = capture(script)
    group = group_with(made, "stair.numbers")
    assert group["lr"] == parse(script).lr
    assert group["minimum"] == (0.0 if script in EXPALPHA else None)


@pytest.mark.parametrize("script", EXPALPHA)
def test_literal(capture, script):
    assert capture(script, "--literal").model.network.stair.rule == "literal"
    assert capture(script).model.network.stair.rule == "exponential"


@pytest.mark.parametrize("script", SCRIPTS)
def test_nhid(capture, script):
    made = capture(script, "--nhid", "14")
    assert made.model.network.hidden_size == 14
    assert made.model.network.kernel().shape == (14, 14)


@pytest.mark.parametrize("script", ONE_EACH)
@pytest.mark.parametrize("nonlin", ["none", "tanh", "relu", "modrelu", "sigmoid"])
def test_nonlin(capture, script, nonlin):
    network = capture(script, "--nonlin", nonlin).model.network
    size = network.cell.input_size
    z = torch.linspace(-2, 2, 8)
    by_hand = {"none": z, "tanh": z.tanh(), "relu": z.clamp(min=0), "sigmoid": 1 / (1 + (-z).exp()),
               "modrelu": z.sign() * (z.abs() + network.nonlinearity.bias).clamp(min=0)
               if nonlin == "modrelu" else None}[nonlin]
    torch.testing.assert_close(network.nonlinearity(z), by_hand)
    h, _ = network(torch.ones(1, 1, size))
    expected = network.stair.numbers[0] * network.nonlinearity(network.cell.project(torch.ones(1, 1, size)))
    torch.testing.assert_close(h, expected)


@pytest.mark.parametrize("script", ONE_EACH)
@pytest.mark.parametrize("net_type", ["RNN", "RNN-Orth", "expRNN", "nnRNN", "LSTM"])
def test_rinit(capture, script, net_type):
    """Every start that is allowed makes another matrix; everything drawn before it stays the same."""
    starts = {"RNN": ("xavier", "skew", "henaff", "cayley", "random"), "LSTM": ("xavier", "random")}.get(
        net_type, ("skew", "henaff", "cayley", "random"))
    found = {}
    for rinit in starts:
        network = capture(script, "--net-type", net_type, "--nvar", "none", "--rinit", rinit).model.network
        matrix = {"LSTM": lambda n: n.lstm.weight_hh_l0, "nnRNN": lambda n: n.cell.rotation()}.get(
            net_type, lambda n: n.kernel())(network)
        found[rinit] = matrix.detach()
    for one, other in itertools.combinations(found.values(), 2):
        assert (one - other).abs().max() > 1e-2


@pytest.mark.parametrize("script", ONE_EACH)
def test_iinit(capture, script):
    """The same seed, the same draws: kaiming is √((I + H)/I) times xavier."""
    kaiming, xavier = (capture(script, "--iinit", name).model.network.cell.input_weight.detach()
                       for name in ("kaiming", "xavier"))
    inputs, hidden = kaiming.shape
    torch.testing.assert_close(kaiming, xavier * math.sqrt((inputs + hidden) / inputs))


def group_with(made, ending):
    names = {id(p): name for name, p in made.model.named_parameters()}
    group, = [g for g in made.optimizer.param_groups if any(names[id(p)].endswith(ending) for p in g["params"])]
    return group


@pytest.mark.parametrize("script", SCRIPTS)
def test_optimizer_options(capture, script):
    made = capture(script, *NN, "--lr", "0.5", "--lr_orth", "0.25", "--alpha", "0.75", "--Tdecay", "0.125",
                   "--alam", "2", "--clip", "3")
    for ending in ("input_weight", "gamma", "theta", "nonlinearity.bias", "upper"):
        group = group_with(made, ending)
        assert (group["method"], group["lr"], group["alpha"]) == ("RMSprop", 0.5, 0.75)
        assert group["weight_decay"] == (0.125 if ending == "upper" else 0)
    rotation = group_with(made, "logarithm")
    assert (rotation["method"], rotation["lr"], rotation["alpha"]) == ("RMSprop", 0.25, 0.75)
    assert (made.loop["alam"], made.loop["clip"]) == (2, 3)


@pytest.mark.parametrize("script", SCRIPTS)
def test_adam_options(capture, script):
    made = capture(script, *NN, *ADAM, "--betas", "0.25", "0.5", "--lr_orth", "0.125")
    for ending in ("input_weight", "gamma", "upper", "logarithm"):
        assert (group_with(made, ending)["method"], group_with(made, ending)["betas"]) == ("Adam", (0.25, 0.5))
    assert group_with(made, "logarithm")["lr"] == 0.125


@pytest.mark.parametrize("script", SCRIPTS)
def test_random_seed(capture, script):
    def weights(*typed):
        made = capture(script, *typed)
        return torch.nn.utils.parameters_to_vector(made.model.parameters()).detach()

    assert torch.equal(weights("--seed", "3"), weights("--random-seed", "3"))
    assert not torch.equal(weights("--seed", "3"), weights("--seed", "4"))


@pytest.mark.parametrize("script", COPY)
def test_random_seed_of_the_data(capture, script):
    one, same, other = (capture(script, "--seed", seed).data.batch(4)[0] for seed in ("3", "3", "4"))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("script", COPY)
def test_the_copying_options(capture, script):
    made = capture(script, "--T", "13", "--labels", "4", "--c-length", "3", "--updates", "21", "--batch", "6",
                   "--log-interval", "7", "--vari")
    task = made.data
    assert (task.T, task.labels, task.c_length, task.vari) == (13, 4, 3, True)
    assert len({len(task.batch(2)[0]) for _ in range(60)}) > 5
    assert made.model.network.cell.input_size == 4 + 2
    assert made.model.readout.weight.shape[0] == 4 + 1
    assert {k: made.loop[k] for k in ("updates", "batch", "log_interval")} == dict(updates=21, batch=6, log_interval=7)
    assert len({len(capture(script, "--T", "13").data.batch(2)[0]) for _ in range(5)}) == 1


@pytest.mark.parametrize("script", COPY)
def test_onehot(capture, script):
    symbols = torch.tensor([[3], [0], [9]])
    for flag, inputs in (("--onehot", 10), ("--no-onehot", 1)):
        model = capture(script, flag).model
        assert model.network.cell.input_weight.shape[0] == inputs
        vectors = torch.eye(10)[symbols] if inputs == 10 else symbols[..., None].float()
        expected = model.readout(model.network(vectors)[0])
        torch.testing.assert_close(model(symbols), expected)


@pytest.mark.parametrize("script", MNIST)
def test_permute_and_data(capture, monkeypatch, tmp_path, script):
    asked = []
    small = PixelSequences(torch.zeros(2, 784, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))
    for typed in ((), ("--permute", "--data", str(tmp_path), "--normalize", "0.1307", "0.3081")):
        monkeypatch.setattr(module_of(script), "load_mnist", lambda *given: asked.append(given) or (small,) * 3)
        capture(script, *typed, images="given")
    assert asked == [(None, False, None), (tmp_path, True, (0.1307, 0.3081))]


@pytest.mark.parametrize("script", MNIST)
def test_the_pixel_options(capture, script):
    made = capture(script, "--epochs", "3", "--batch", "7", "--save_freq", "2", "--log-interval", "5")
    wanted = dict(epochs=3, batch=7, save_freq=2, log_interval=5)
    assert {k: made.loop[k] for k in wanted} == wanted


@pytest.mark.parametrize("script", LANGUAGE)
def test_the_character_options(capture, script, penn_folder):
    made = capture(script, "--epochs", "3", "--batch", "7", "--bptt", "11", "--log-interval", "5", "--emsize", "6")
    wanted = dict(epochs=3, batch=7, bptt=11, log_interval=5)
    assert {k: made.loop[k] for k in wanted} == wanted
    symbols = len(made.data.vocabulary)
    assert made.model.embedding.shape == (symbols, 6)
    assert made.model.decoder.shape == (symbols, 8)
    assert len(made.model.network.stair.numbers) == 11
    assert torch.equal(made.data.train, data.load_characters(penn_folder).train)


@pytest.mark.parametrize("script", LANGUAGE)
def test_tied(capture, script):
    tied, free = (capture(script, "--emsize", "8", *flag).model for flag in (("--tied",), ()))
    assert tied.decoder is tied.embedding
    assert free.decoder is not free.embedding


@pytest.mark.parametrize("engine", ["auto", "torch", "reference"])
def test_engine(capture, engine):
    assert capture("copytask_nvar", "--engine", engine).model.network.engine == engine


@pytest.mark.parametrize(("typed", "folder"), [
    (("copytask_nvar",), "expRNN-expn-s400"), (("copytask_nvar", "--seed", "3"), "expRNN-expn-s3"),
    (("copytask_nvar", "--name", "x"), "expRNN-expn-s400-x"), (("copytask_alpha", "--net-type", "RNN"), "RNN-s400"),
    (("copytask_nvar", "--nvar", "n^2"), "expRNN-n2-s400")])
def test_name_and_save(tmp_path, typed, folder):
    script, *more = typed
    save = tmp_path / "there" / "deep"
    module_of(script).main([*tiny(script), *more, "--updates", "1", "--save", str(save)])
    assert [p.name for p in (save / script).iterdir()] == [folder]
    assert (save / script / folder / "result.json").exists()
