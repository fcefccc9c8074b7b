"""Flags: one meaning each, for all nine scripts; rows of published hyperparameters; where a value came from.

A script lists its flags with their defaults (`DEFAULTS`) and the rows of the published tables (`PAPER`).
`parse` makes an argparse parser of them and resolves every value:

    typed on the command line  >  PAPER row that --net-type, --nvar and --bptt pick  >  DEFAULTS

Underscore and dash are the same in a flag's name. What a person typed wrong ends in one sentence and exit
status 2 (`UserError`), never in a traceback.
"""

import argparse
import difflib
import math
import os
import sys
from pathlib import Path

from common.cells import INPUT_STARTS, NET_TYPES, RECURRENT_STARTS, check_start
from common.errors import UserError
from common.optim import METHODS
from common.recurrence import ENGINES
from common.runs.records import read_config
from common.stair import NONLINEARITIES, SCHEDULE_ALIASES, SCHEDULES

ROW_KEYS = ("net_type", "nvar", "bptt")  # what picks a row; everything else in a row is a value


# ── what a flag accepts ──────────────────────────────────────────────────────────────────────────────────


def one_of(*names, aliases=None):
    """A name of a list; the nearest one is suggested for a misspelled one."""
    aliases = aliases or {}

    def convert(text):
        name = aliases.get(text, text)
        if name in names:
            return name
        near = difflib.get_close_matches(text.lower(), [n.lower() for n in names], n=1, cutoff=0.4)
        hint = f"; did you mean {next(n for n in names if n.lower() == near[0])}?" if near else ""
        raise argparse.ArgumentTypeError(f"'{text}' is not one of {', '.join(names)}{hint}")

    convert.names = names
    return convert


def number(kind, low=-math.inf, high=math.inf, open_low=False, open_high=False):
    """An int or float within bounds; not-a-number and infinity are out of every bound."""
    noun = "a whole number" if kind is int else "a number"
    parts = [f"{'above' if open_low else 'at least'} {low}"] if low > -math.inf else []
    parts += [f"{'below' if open_high else 'at most'} {high}"] if high < math.inf else []
    want = ", ".join(filter(None, (noun, " and ".join(parts))))

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}' is not {want}") from None
        inside = (low < value if open_low else low <= value) and (value < high if open_high else value <= high)
        if not inside or (kind is float and not math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"'{text}' is not {want}")
        return value

    return convert


def name_part(text):
    """A piece of a folder's name: what every file system and every terminal takes."""
    if not text or text.startswith(".") or any(c in text for c in "/\\") or not text.isprintable() or len(text) > 100:
        raise argparse.ArgumentTypeError(f"'{text}' cannot be part of a folder's name; use at most 100 letters, "
                                         "digits, - and _")
    return text


def folder(text):
    """The path of a folder. An empty one is most likely a variable of the shell that was never set."""
    if not text or not text.isprintable():
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of a folder")
    return Path(text)


def file(text):
    """The path of a file."""
    if not text or not text.isprintable():
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of a file")
    return Path(text)


LARGEST = 1e30  # a float32 ends at 3.4e38, and a rate is multiplied on its way
COUNT = number(int, 1, 2**31 - 1)
RATE = number(float, 0, LARGEST, open_low=True)
WEIGHT = number(float, 0, LARGEST)
SMOOTHING = number(float, 0, 1, open_high=True)
SWITCH = "switch"

# name: (group, what it accepts, help). The one place where a flag's meaning stands.
FLAGS = {
    "net_type": ("network", one_of(*NET_TYPES), "the cell: what the recurrent matrix W is"),
    "nvar": ("network", one_of(*SCHEDULES, aliases=SCHEDULE_ALIASES), "the stair ρ_t; none is the plain network"),
    "alpha_start": ("network", number(float, -LARGEST, LARGEST), "start of every α_t, the learned stair"),
    "literal": ("network", SWITCH, "1 − exp(−α_t z) as in the authors' code, unbounded for z < 0, for comparison only"),
    "nhid": ("network", COUNT, "hidden units H"),
    "nonlin": ("network", one_of(*NONLINEARITIES, aliases={"None": "none"}), "the nonlinearity φ"),
    "rinit": ("network", one_of(*RECURRENT_STARTS), "start of the recurrent matrix"),
    "iinit": ("network", one_of(*INPUT_STARTS), "start of the input matrix U"),
    "emsize": ("network", COUNT, "size of a symbol's embedding"),
    "tied": ("network", SWITCH, "the decoder shares the embedding's weights (needs emsize = nhid)"),
    "optimizer": ("optimizer", one_of(*METHODS), "the rule that steps every parameter; the rotation takes --lr_orth"),
    "lr": ("optimizer", RATE, "learning rate"),
    "lr_orth": ("optimizer", RATE, "learning rate of the rotation's logarithm (expRNN, nnRNN)"),
    "alpha": ("optimizer", SMOOTHING, "smoothing of RMSprop"),
    "betas": ("optimizer", (SMOOTHING, SMOOTHING), "decay rates of Adam"),
    "alam": ("optimizer", WEIGHT, "weight of Σ (γ − 1)² in the loss (nnRNN; δ in the papers)"),
    "Tdecay": ("optimizer", WEIGHT, "weight decay of T (nnRNN)"),
    "clip": ("optimizer", WEIGHT, "largest norm of the gradient; 0 leaves it alone"),
    "batch": ("task", COUNT, "sequences in a batch B"),
    "T": ("task", COUNT, "delay in steps between the symbols and their recall"),
    "labels": ("task", number(int, 1, 8), "different symbols to remember"),
    "c_length": ("task", COUNT, "symbols to remember"),
    "onehot": ("task", SWITCH, "one input channel a symbol, instead of its number in one channel"),
    "vari": ("task", SWITCH, "every batch draws its delay uniformly from 1 … T"),
    "updates": ("task", COUNT, "optimizer steps"),
    "permute": ("task", SWITCH, "one fixed permutation of the pixels"),
    "epochs": ("task", COUNT, "passes over the training data"),
    "bptt": ("task", COUNT, "steps in a segment of backpropagation through time"),
    "data": ("task", folder, "folder of the data files"),
    "text": ("task", file, "a UTF-8 text of your own in the place of --data, read by characters"),
    "log_interval": ("run", COUNT, "updates between two reports"),
    "save_freq": ("run", COUNT, "epochs between two checkpoints"),
    "random_seed": ("run", number(int, 0, 2**63 - 1), "seed of the weights and of drawn data"),
    "cuda": ("run", SWITCH, "run on the GPU"),
    "tf32": ("run", SWITCH, "float32 products by tensor cores, from 10 bits of mantissa; needs --cuda"),
    "threads": ("run", number(int, 1, 1024), "CPU threads (all cores)"),
    "engine": ("run", one_of("auto", *ENGINES), "time loop of common/recurrence"),
    "name": ("run", name_part, "added to the name of the run's folder"),
    "save": ("run", folder, "folder that runs are written to"),
    "resume": ("run", folder, "go on with the run in this folder; it knows its own options"),
}
ALIASES = {"random_seed": ("--seed",)}
SPELLING = {"net_type": "--net-type", "random_seed": "--random-seed", "c_length": "--c-length",
            "log_interval": "--log-interval", "alpha_start": "--alpha-start"}

# Every script has these; its own DEFAULTS come first.
SHARED = dict(optimizer="RMSprop", betas=(0.9, 0.999), clip=0.0, nonlin="modrelu", random_seed=400, cuda=False,
              tf32=False, threads=None, engine="auto", name=None, save=Path("saves"), resume=None)
FROM_PAPER = dict(lr=None, lr_orth=None, alpha=None, alam=0.0, Tdecay=0.0, rinit=None)  # where a row leaves it out
MAY_CHANGE_ON_RESUME = ("resume", "cuda", "threads", "data", "text")
NEW = ("tf32", "text")  # flags that older runs did not have; what they did is the default


class Parser(argparse.ArgumentParser):
    """argparse with both spellings of a name, one-sentence errors, and only what was typed in its result."""

    def error(self, message):
        raise UserError(message.removeprefix("argument "))

    def parse_args(self, argv=None):
        switches = {action.option_strings[0] for action in self._actions
                    if isinstance(action, argparse.BooleanOptionalAction)}
        spelled = {option.replace("_", "-"): option for action in self._actions for option in action.option_strings}
        tokens = []
        for token in map(str, sys.argv[1:] if argv is None else argv):
            name, equals, value = token.partition("=")
            if name.startswith("--") and len(name) > 2:
                known = spelled.get(name.replace("_", "-"))
                if known is None:
                    near = difflib.get_close_matches(name.replace("_", "-"), spelled, n=1, cutoff=0.7)
                    hint = f"did you mean {spelled[near[0]]}?" if near else "--help lists the flags"
                    raise UserError(f"there is no flag {name}; {hint}")
                if equals and known in switches:
                    raise UserError(f"{known} takes no value; type {known} or --no-{known[2:]}")
                tokens.append(known + equals + value)
            elif _negative(token) and tokens and tokens[-1].startswith("--") and "=" not in tokens[-1]:
                tokens[-1] += f"={token}"  # argparse takes -1e-3 for a flag
            else:
                tokens.append(token)
        return super().parse_args(tokens)


def _negative(text: str) -> bool:
    """Whether `text` is a negative number."""
    try:
        return text.startswith("-") and float(text) <= 0
    except ValueError:
        return False


def make_parser(script: str, doc: str, defaults: dict) -> Parser:
    """The argparse parser of a script: one flag for each of its defaults."""
    parser = Parser(prog=f"{script}.py", description=doc, allow_abbrev=False, argument_default=argparse.SUPPRESS,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = {}
    for dest in (d for d in FLAGS if d in defaults or d in FROM_PAPER):
        group, accepts, text = FLAGS[dest]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        if dest in defaults and accepts is not SWITCH and defaults[dest] is not None:
            shown = " ".join(map(str, defaults[dest])) if dest == "betas" else defaults[dest]
            text += f" (default: {shown})"
        elif dest in FROM_PAPER:
            text += " (default: the PAPER row's)"
        options = (SPELLING.get(dest, f"--{dest}"), *ALIASES.get(dest, ()))
        if accepts is SWITCH:
            text += f" (default: {'on' if defaults[dest] else 'off'})"
            groups[group].add_argument(*options, dest=dest, action=argparse.BooleanOptionalAction, help=text)
        elif isinstance(accepts, tuple):
            groups[group].add_argument(*options, dest=dest, type=accepts[0], nargs=2, metavar="X", help=text)
        else:
            names = getattr(accepts, "names", None)
            metavar = "{" + ",".join(names) + "}" if names else dest.upper() if len(dest) > 1 else dest
            groups[group].add_argument(*options, dest=dest, type=accepts, metavar=metavar, help=text)
    return parser


def published_row(paper: dict, choice: dict) -> tuple[str | None, dict]:
    """The first row whose keys agree with `choice` → (its name, its values). A row without a key takes any.

    Where no row has the --bptt asked for, the first row of the same model decides.
    """
    def agrees(row, keys):
        return all(choice[key] in (row[key] if isinstance(row[key], tuple) else (row[key],))
                   for key in keys if key in row)

    for keys in (ROW_KEYS, ("net_type", "nvar")):
        for name, row in paper.items():
            if agrees(row, keys):
                return name, {key: value for key, value in row.items() if key not in ROW_KEYS}
    return None, {}


class Options(argparse.Namespace):
    """The resolved values as attributes, and `origin`: where each came from; `row`: the PAPER row's name."""


def parse(argv, script: str, doc: str, defaults: dict, paper: dict) -> Options:
    """Resolve every flag of `script`. Raises UserError with one sentence for what has no meaning."""
    defaults = {**SHARED, **defaults}
    typed = vars(make_parser(script, doc, defaults).parse_args(argv))
    if "betas" in typed:
        typed["betas"] = tuple(typed["betas"])
    if typed.get("resume"):
        return _resumed(script, defaults, typed)

    row_name, row = published_row(paper, {**defaults, **typed})
    values, origin = {}, {}
    for dest in (d for d in FLAGS if d in defaults or d in FROM_PAPER):
        for source, found in (("typed", typed), (f"PAPER {row_name}", row), ("default", defaults)):
            if dest in found:
                values[dest], origin[dest] = found[dest], source
                break
        else:
            values[dest], origin[dest] = FROM_PAPER[dest], "not used"
    options = Options(**values)
    options.origin, options.row, options.script = origin, row_name, script
    check(options, typed)
    return options


def check(options: Options, typed: dict) -> None:
    """Raises UserError where an option was typed that has no meaning beside the others."""
    net, flag = options.net_type, {d: SPELLING.get(d, f"--{d}") for d in FLAGS}
    if net == "LSTM" and getattr(options, "nvar", None) != "none":
        task = options.script.split("_")[0]
        raise UserError(f"--net-type LSTM has no stair; use {task}_nvar.py --net-type LSTM --nvar none")
    try:
        check_start(net, options.rinit)
    except ValueError as error:
        raise UserError(str(error)) from None
    if net == "nnRNN" and options.nhid % 2:
        raise UserError(f"nnRNN pairs its hidden units, so --nhid must be even, not {options.nhid}")
    if getattr(options, "tied", False) and options.emsize != options.nhid:
        raise UserError(f"--tied shares the embedding with the decoder and needs --emsize equal to --nhid, "
                        f"not {options.emsize} and {options.nhid}")
    if options.origin.get("alpha_start") == "typed" and options.alpha_start < 0 and hasattr(options, "literal"):
        raise UserError(f"--alpha-start must be at least 0 for the exponential stair, not {options.alpha_start}")
    if getattr(options, "text", None) is not None and options.data is not None:
        raise UserError("--text FILE takes the place of --data FOLDER; leave one of them out")
    if options.tf32 and not options.cuda:
        raise UserError("--tf32 has no meaning on the CPU, whose products are exact; add --cuda or leave it out")
    rotates, adam = net in ("expRNN", "nnRNN"), options.optimizer == "Adam"
    means_nothing = {
        "lr_orth": (not rotates, f"{net} has no rotation"),
        "alam": (net != "nnRNN", f"{net} has no γ"),
        "Tdecay": (net != "nnRNN", f"{net} has no T"),
        "nonlin": (net == "LSTM", "LSTM has its own gates"),
        "engine": (net == "LSTM", "LSTM has its own time loop"),
        "betas": (not adam, "RMSprop has no betas; add --optimizer Adam"),
        "alpha": (adam, "Adam has no smoothing; use --betas"),
    }
    for dest, (nothing, why) in means_nothing.items():
        if nothing and dest in typed:
            raise UserError(f"{flag[dest]} has no meaning here: {why}; leave it out")
        if nothing and options.origin[dest] != "typed":
            options.origin[dest] = "not used"


def _resumed(script: str, defaults: dict, typed: dict) -> Options:
    """The options that the folder `typed["resume"]` was started with."""
    config = read_config(typed["resume"])
    if config["script"] != script:
        raise UserError(f"{typed['resume']} is a run of {config['script']}.py; resume it with that script")
    saved = _saved_values(typed["resume"], config["options"], defaults)
    for dest, value in typed.items():
        if dest not in MAY_CHANGE_ON_RESUME and value != saved.get(dest):
            raise UserError(f"{SPELLING.get(dest, f'--{dest}')} was {saved.get(dest)} when {typed['resume']} was "
                            f"started and cannot become {value} on the way; start a new run")
    options = Options(**{**saved, **_where_data_was(config, saved), **typed})
    options.origin = {dest: entry["origin"] for dest, entry in config["options"].items()}
    options.row, options.script = config["row"], script
    check(options, {})
    return options


def _where_data_was(config: dict, saved: dict) -> dict:
    """The absolute path of --data or --text, where it still exists: a run may go on from another folder."""
    data = config.get("data")
    path = data.get("path") if isinstance(data, dict) else None
    if not isinstance(path, str) or not path.isprintable() or not os.path.exists(path):
        return {}
    return {dest: Path(path) for dest in ("text", "data") if saved.get(dest) is not None}


def _saved_values(run: Path, entries: dict, defaults: dict) -> dict:
    """The values in a config.json, as strict as if they were typed. Raises UserError for a foreign or spoiled one."""
    path, known = run / "config.json", {dest for dest in FLAGS if dest in defaults or dest in FROM_PAPER}
    entries = {**{dest: {"value": defaults[dest], "origin": "default"} for dest in NEW if dest in defaults}, **entries}
    if entries.keys() != known:
        which = ", ".join(sorted(map(str, entries.keys() ^ known)))
        raise UserError(f"{path} was written by another version of this project (the options differ in {which}); "
                        "go on with that version or start a new run")
    values = {}
    for dest, entry in entries.items():
        value, accepts = entry["value"], FLAGS[dest][1]
        try:
            if value is None:
                fits = defaults.get(dest) is None and (dest not in FROM_PAPER or entry["origin"] == "not used")
            elif accepts is SWITCH:
                fits = isinstance(value, bool)
            elif isinstance(accepts, tuple):
                fits = value == [convert(str(part)) for convert, part in zip(accepts, value, strict=True)]
                value = tuple(value)
            elif accepts in (folder, file):
                fits, value = isinstance(value, str), accepts(value)
            else:
                fits = value == accepts(str(value))
        except (argparse.ArgumentTypeError, TypeError, ValueError, AttributeError):
            fits = False
        if not fits:
            raise UserError(f"{path} is damaged: {dest} is {str(value)[:40]!r}; restore it from a copy "
                            "or start a new run")
        values[dest] = value
    return values


def describe(options: Options) -> str:
    """The resolved values, grouped by where they came from; a line each."""
    lines = {}
    for dest, source in options.origin.items():
        value = getattr(options, dest)
        if source == "not used" or dest == "resume" or (source == "default" and value is None):
            continue
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
        lines.setdefault(source, []).append(f"{dest}={shown}")
    order = sorted(lines, key=lambda source: {"typed": 0, "default": 2}.get(source, 1))
    return "\n".join(f"{source}: {' '.join(lines[source])}" for source in order)
