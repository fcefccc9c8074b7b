"""Flags: one table that says all about each; the rows of published hyperparameters; where a value came from.

A script lists its flags with their defaults (`DEFAULTS`) and the rows of the published tables (`PAPER`).
`parse` makes an argparse parser of them and resolves every value:

    typed on the command line  >  PAPER row that the options pick  >  DEFAULTS
    typed, where it may change  >  config.json of the run                           with --resume FOLDER

A row is picked by its keys (`ROW_KEYS`): of the rows whose keys all agree, the one with the most keys. A new key in
DEFAULTS is a new flag, typed by its value. A value that differs from results/published/hyperparameters.json has the
origin "edited". Edited values pass the checks of typed ones. A mistake is one sentence and exit status 2 (`UserError`).
"""

import argparse
import json
import math
import os
import re
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

from common.cells import INPUT_STARTS, NET_TYPES, RECURRENT_STARTS, check_start
from common.errors import UserError, nearest
from common.optim import METHODS
from common.recurrence import ENGINES
from common.runs.records import read_config
from common.stair import NONLINEARITIES, SCHEDULE_ALIASES, SCHEDULES


def one_of(*names, aliases=None):
    """A name of a list; the nearest one is suggested for a misspelled one."""
    def convert(text):
        name = (aliases or {}).get(text, text)
        if name in names:
            return name
        hint = "".join(f"; did you mean {near}?" for near in nearest(text, names))
        raise ArgumentTypeError(f"'{text}' is not one of {', '.join(names)}{hint}")

    convert.metavar = "{" + ",".join(names) + "}"
    return convert


def number(kind, low=-math.inf, high=math.inf, open_low=False, open_high=False):
    """An int or float within bounds; not-a-number and infinity are out of every bound."""
    want = "a whole number" if kind is int else "a number"
    if (low, high) != (-math.inf, math.inf):
        want += f" in {'(' if open_low else '['}{low}, {high}{')' if open_high else ']'}"

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        inside = (low < value if open_low else low <= value) and (value < high if open_high else value <= high)
        if not inside or not math.isfinite(value):
            raise ArgumentTypeError(f"'{text}' is not {want}")
        return value

    return convert


def some_text(text):
    """Any text but an empty one, which is most likely a variable of the shell that was never set."""
    if not text:
        raise ArgumentTypeError("'' is no text")
    return text


def name_part(text):
    """A piece of a folder's name: what every file system and every terminal takes."""
    if not text or text.startswith(".") or any(c in text for c in "/\\") or not text.isprintable() \
            or len(text.encode()) > 100:
        raise ArgumentTypeError(f"'{text}' cannot be part of a folder's name; use at most 100 letters, digits, - and _")
    return text


def path_of(what, absolute=False):
    """The path of a file or folder; an `absolute` one is found from another folder too, where a run goes on."""
    def convert(text):
        if not text or not text.isprintable():
            raise ArgumentTypeError(f"{text!r} is not the name of a {what}")
        path = Path(os.path.expanduser(text))  # a shell leaves --save=~/runs as it is
        return path.absolute() if absolute else path
    return convert


def switch(text):
    """True or False in a script or in config.json; on the command line --x or --no-x."""
    if text not in ("True", "False"):
        raise ArgumentTypeError("is neither True nor False")
    return text == "True"


LARGEST = 1e30  # a float32 ends at 3.4e38, and a rate is multiplied by other numbers
COUNT = number(int, 1, 2**31 - 1)
RATE = number(float, 0, LARGEST, open_low=True)
WEIGHT = number(float, 0, LARGEST)
SMOOTHING = number(float, 0, 1, open_high=True)
FOLDER = path_of("folder")


@dataclass(frozen=True)
class Group:
    title: str                      # of the help
    is_science: bool = True         # its flags decide what is computed
    may_change: bool = False        # when a run is resumed


NETWORK, TASK, OPTIMIZER = Group("network"), Group("task"), Group("optimizer")
LENGTH, TEXT = Group("task"), Group("task", may_change=True)     # a resumed run may become longer
RECORD = Group("record of the run", is_science=False)
MACHINE = Group("machine", is_science=False, may_change=True)
CALL = Group("this call", is_science=False, may_change=True)     # never taken from a run
NEW = Group("new in DEFAULTS")
IN_DEFAULTS = object()              # the default of a flag that the scripts list in their DEFAULTS


@dataclass(frozen=True)
class Flag:
    """A flag of the scripts; `help` is what --help prints."""

    spelling: str                   # as the help shows it; - and _ mean the same when typed
    group: Group
    accepts: Callable               # text → value
    help: str
    default: object = IN_DEFAULTS   # else every script has the flag
    in_row: bool = False            # it stands in the rows of PAPER; `default` where a row leaves it out
    or_none: bool = False           # None is a value of it in DEFAULTS
    needs: tuple | None = None      # (whether it has a meaning beside the other options, why not)
    count: int = 0                  # of values, where the flag takes several
    alias: str = ""

    @property
    def dest(self) -> str:
        return self.spelling[2:].replace("-", "_")


def only_for(*net_types, why: str):
    return lambda options: options.net_type in net_types, "{net_type} has " + why


WITH_STAIR = tuple(name for name in NET_TYPES if name != "LSTM")
WITH_ADAM = (lambda options: options.optimizer == "Adam", "RMSprop has no betas; add --optimizer Adam")
WITHOUT_ADAM = (lambda options: options.optimizer != "Adam", "Adam has no smoothing; use --betas")

FLAGS = {flag.dest: flag for flag in (
    Flag("--net-type", NETWORK, one_of(*NET_TYPES), "the cell: what the recurrent matrix W is"),
    Flag("--nvar", NETWORK, one_of(*SCHEDULES, aliases=SCHEDULE_ALIASES), "the stair ρ_t; none is the plain network"),
    Flag("--alpha-start", NETWORK, number(float, -LARGEST, LARGEST), "start of every α_t, the learned stair"),
    Flag("--literal", NETWORK, switch,
         "1 − exp(−α_t z) as in the authors' code, unbounded for z < 0, for comparison only"),
    Flag("--nhid", NETWORK, COUNT, "hidden units H"),
    Flag("--nonlin", NETWORK, one_of(*NONLINEARITIES, aliases={"None": "none"}), "the nonlinearity φ",
         needs=only_for(*WITH_STAIR, why="its own gates")),
    Flag("--rinit", NETWORK, one_of(*RECURRENT_STARTS), "start of the recurrent matrix", None, in_row=True),
    Flag("--iinit", NETWORK, one_of(*INPUT_STARTS), "start of the input matrix U",
         needs=only_for(*WITH_STAIR, why="one start for the whole matrix of a gate")),
    Flag("--emsize", NETWORK, COUNT, "size of a symbol's embedding"),
    Flag("--tied", NETWORK, switch, "the decoder shares the embedding's weights (needs emsize = nhid)"),
    Flag("--optimizer", OPTIMIZER, one_of(*METHODS),
         "the rule that steps every parameter; the rotation takes --lr_orth"),
    Flag("--lr", OPTIMIZER, RATE, "learning rate", None, in_row=True),
    Flag("--lr_orth", OPTIMIZER, RATE, "learning rate of the rotation's logarithm (expRNN, nnRNN)", None, in_row=True,
         needs=only_for("expRNN", "nnRNN", why="no rotation")),
    Flag("--alpha", OPTIMIZER, SMOOTHING, "smoothing of RMSprop", None, in_row=True, needs=WITHOUT_ADAM),
    Flag("--betas", OPTIMIZER, SMOOTHING, "decay rates of Adam", needs=WITH_ADAM, count=2),
    Flag("--alam", OPTIMIZER, WEIGHT, "weight of Σ (γ − 1)² in the loss (nnRNN; δ in the papers)", 0.0, in_row=True,
         needs=only_for("nnRNN", why="no γ")),
    Flag("--Tdecay", OPTIMIZER, WEIGHT, "weight decay of T (nnRNN)", 0.0, in_row=True,
         needs=only_for("nnRNN", why="no T")),
    Flag("--clip", OPTIMIZER, WEIGHT, "largest norm of the gradient; 0 leaves it alone"),
    Flag("--batch", TASK, COUNT, "sequences in a batch B"),
    Flag("--T", TASK, COUNT, "length of the task in steps: the delay of the copying task"),
    Flag("--labels", TASK, number(int, 1, 8), "different symbols to remember"),
    Flag("--c-length", TASK, COUNT, "symbols to remember"),
    Flag("--onehot", TASK, switch, "one input channel a symbol, instead of its number in one channel"),
    Flag("--vari", TASK, switch, "every batch draws its delay uniformly from 1 … T"),
    Flag("--updates", LENGTH, COUNT, "optimizer steps"),
    Flag("--permute", TASK, switch, "one fixed permutation of the pixels"),
    Flag("--normalize", TASK, RATE, "mean and deviation of pixels in [0, 1]: taken from them, and divided by",
         or_none=True, count=2),
    Flag("--epochs", LENGTH, COUNT, "passes over the training data"),
    Flag("--bptt", TASK, COUNT, "steps in a segment of backpropagation through time"),
    Flag("--text", TEXT, path_of("file", absolute=True),
         "a UTF-8 text of your own in the place of --data, read by characters", or_none=True),
    Flag("--random-seed", TASK, number(int, 0, 2**32 - 1), "seed of the weights and of drawn data", alias="--seed"),
    Flag("--name", RECORD, name_part, "added to the name of the run's folder", None),
    Flag("--save", RECORD, FOLDER, "folder that runs are written to", Path("saves")),
    Flag("--log-interval", RECORD, COUNT, "updates between two reports"),
    Flag("--save_freq", RECORD, COUNT, "epochs between two checkpoints"),
    Flag("--data", MACHINE, path_of("folder", absolute=True), "folder of the data files", or_none=True),
    Flag("--cuda", MACHINE, switch, "run on the GPU", False),
    Flag("--tf32", MACHINE, switch, "float32 products by tensor cores, from 10 bits of mantissa; needs --cuda", False),
    Flag("--threads", MACHINE, number(int, 1, 1024),
         "CPU threads (OMP_NUM_THREADS, else the cores that this process may use)", None),
    Flag("--engine", MACHINE, one_of("auto", *ENGINES), "time loop of common/recurrence", "auto",
         needs=only_for(*WITH_STAIR, why="its own time loop")),
    Flag("--curves", MACHINE, switch, "draw curves.png at the end", True),
    Flag("--tensorboard", MACHINE, switch, "write the rows of log.csv for TensorBoard too", False),
    Flag("--dry-run", CALL, switch, "show every value, the size and about the time of the run, and stop", False),
    Flag("--resume", CALL, FOLDER,
         "go on with the run in this folder, with the options that it was started with; auto: with the run that the "
         "same options started, or a new one", None),
    Flag("--evaluate", CALL, FOLDER,
         "print the validation score of best.pt of the run in this folder, and of a finished run the score of the test "
         "data, if the task has any, and stop", None),
    Flag("--sample", CALL, COUNT,
         "with --evaluate of a run of the characters: print this many symbols, drawn by best.pt; --seed decides which",
         None),
    Flag("--prompt", CALL, some_text, "with --sample: the text that the sample goes on from", None),
)}
AUTO = Path("auto")                                               # of --resume
TAKEN = ("origin", "row", "script", "file", "argv", "task", "asked", "options",  # what else args.x holds
         "seed", "help")
GONE = ("until_epoch",)  # flags of earlier versions, which decided nothing of what was computed
ROW_KEYS = ("net_type", "nvar", "bptt", "nhid")  # what picks a row; the last two are values of it too
FROM_ROW = {dest: flag.default for dest, flag in FLAGS.items() if flag.in_row}
SHARED = {dest: flag.default for dest, flag in FLAGS.items()      # of every script
          if flag.default is not IN_DEFAULTS and not flag.in_row}
PUBLISHED = Path(__file__).resolve().parents[2] / "results" / "published" / "hyperparameters.json"


def spelled(dest: str) -> str:
    """A flag as the help shows it."""
    return FLAGS[dest].spelling if dest in FLAGS else f"--{dest}"


def known_flags(script: str, defaults: dict) -> dict[str, Flag]:
    """The flags of a script by dest: its part of `FLAGS`, and its own new keys.

    Raises UserError for a key of DEFAULTS that belongs to a row, or that is nearly a known flag.
    """
    known = {dest: flag for dest, flag in FLAGS.items() if dest in {**SHARED, **FROM_ROW, **defaults}}
    for key, value in defaults.items():
        where = f"{script}.py, DEFAULTS: {key}={value!r}"
        if key in FROM_ROW:
            raise UserError(f"{where} belongs to the rows; edit {key} in a row of PAPER or type {spelled(key)} {value}")
        if key in FLAGS:
            continue
        for near in nearest(key, FLAGS, cutoff=0.8):
            raise UserError(f"{where} is no flag; did you mean {near}?")
        taken = key in TAKEN or (key.startswith("no_") and key[3:] in {**FLAGS, **defaults})
        if taken or not re.fullmatch(r"[A-Za-z]\w*", key):
            why = "the name is taken" if taken else "use letters, digits and _"
            raise UserError(f"{where} cannot become a flag; {why}")
        known[key] = Flag(f"--{key}", NEW, kind_of_new(value, where), "a flag of this script alone",
                          count=len(value) if isinstance(value, tuple) else 0)
    return known


def kind_of_new(value, where: str):
    """What the flag of a new key accepts: more values of the same type."""
    if isinstance(value, bool):
        return switch
    kinds = {type(part) for part in (value if isinstance(value, tuple) else (value,))}
    for known, accepts in (({int}, number(int)), ({int, float}, number(float)), ({str}, some_text)):
        if kinds and kinds <= known:
            return accepts
    raise UserError(f"{where} is a {type(value).__name__}; use a number, a text, True or False, or a tuple of numbers "
                    "or of texts")


def checked(dest: str, value, known: dict[str, Flag], where: str, is_row=False):
    """A value that stands in a script or in config.json, checked as strictly as a typed one. Raises UserError.

    In a row of PAPER a key that picks the row may stand for a tuple of values.
    """
    if is_row and dest in ROW_KEYS and isinstance(value, tuple):
        return tuple(checked(dest, one, known, where) for one in value)
    if dest not in known:
        hint = "".join(f"; did you mean {near}?" for near in nearest(dest, known, cutoff=0.6))
        raise UserError(f"{where}: there is no flag {dest}{hint}")
    flag = known[dest]
    if value is None and (flag.or_none or (flag.default is None and not flag.in_row)):
        return None
    try:
        if not flag.count:
            return flag.accepts(str(value))
        if not isinstance(value, (tuple, list)) or len(value) != flag.count:
            raise ArgumentTypeError(f"it is not a tuple of {flag.count} values")
        return tuple(flag.accepts(str(part)) for part in value)
    except ArgumentTypeError as error:
        raise UserError(f"{where}: {dest}={value!r}: {error}") from None


def picked_row(script: str, paper: dict, choice: dict) -> tuple[str | None, dict]:
    """The row whose keys all agree with `choice`, of several the row with the most keys → (its name, its values).

    A key of a row may be a tuple, of which one must agree. Where no row has the bptt or nhid of the choice, the
    first row of the same model decides. A name "A / B" is A without a stair, B with one. Raises UserError for a tie.
    """
    for keys in (ROW_KEYS, ("net_type", "nvar")):
        matching = {name: sum(key in row for key in keys) for name, row in paper.items()
                    if all(choice.get(key) in (row[key] if isinstance(row[key], tuple) else (row[key],))
                           for key in keys if key in row)}
        best = [name for name, count in matching.items() if count == max(matching.values())]
        if len(best) > 1 and keys is ROW_KEYS:
            raise UserError(f'{script}.py, PAPER: the rows "{best[0]}" and "{best[1]}" both match; '
                            f"give one of them another key ({', '.join(ROW_KEYS)})")
        if best:
            plain_name, _, stair_name = best[0].partition(" / ")
            name = plain_name if choice.get("nvar") == "none" or not stair_name else stair_name
            return name, {key: value for key, value in paper[best[0]].items() if key not in ("net_type", "nvar")
                          and not (key in ROW_KEYS and isinstance(value, tuple))}  # several values pick and give none
    return None, {}


@cache
def published(task: str, kind: str) -> tuple[dict, dict]:
    """DEFAULTS and PAPER of a published script, whatever the script says by now; empty for another task."""
    text = PUBLISHED.read_text(encoding="utf-8") if PUBLISHED.exists() else "{}"
    known = json.loads(text, object_hook=lambda values: {name: tuple(value) if isinstance(value, list) else value
                                                         for name, value in values.items()})
    if task not in known:
        return {}, {}
    paper = known[task]["PAPER"]
    if kind != "nvar":
        paper = {name.split(" / ")[-1]: row for name, row in paper.items() if "nvar" not in row}
    return {**known[task]["DEFAULTS"], **known[task][kind]}, paper


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The docstring of a script as it is, and the default of a flag behind its help."""


class Parser(argparse.ArgumentParser):
    """argparse with both spellings of a name, one-sentence errors, and only what was typed in its result."""

    def error(self, message):
        raise UserError(message.removeprefix("argument "))

    def parse_args(self, argv):
        spelled = {option.replace("_", "-"): option for action in self._actions for option in action.option_strings}
        tokens = []
        for token in argv:
            name, equals, value = token.partition("=")
            if name.startswith("--") and len(name) > 2:
                known = spelled.get(name.replace("_", "-"))
                if known is None:
                    near = nearest(name.replace("_", "-"), spelled, cutoff=0.7)
                    hint = f"did you mean {spelled[near[0]]}?" if near else "--help lists the flags"
                    raise UserError(f"there is no flag {name}; {hint}")
                if value == "--":  # which argparse takes for the end of all flags
                    raise UserError(f"{known}: '--' is no value")
                tokens.append(known + equals + value)
            elif re.match(r"-\.?\d", token) and tokens and tokens[-1].startswith("--") and "=" not in tokens[-1]:
                tokens[-1] += f"={token}"  # argparse takes -1e-3 for a flag
            else:
                tokens.append(token)
        return super().parse_args(tokens)


def make_parser(script: str, doc: str, known: dict[str, Flag]) -> Parser:
    """The argparse parser of a script."""
    parser = Parser(prog=f"{script}.py", description=doc, allow_abbrev=False, argument_default=argparse.SUPPRESS,
                    formatter_class=Help)
    groups = {flag.group.title: parser.add_argument_group(flag.group.title) for flag in known.values()}
    for dest, flag in known.items():
        how = dict(action=argparse.BooleanOptionalAction) if flag.accepts is switch else dict(
            type=flag.accepts, nargs=flag.count or None, metavar=getattr(flag.accepts, "metavar", None))
        names = filter(None, (flag.spelling, flag.alias))
        groups[flag.group.title].add_argument(*names, dest=dest, help=flag.help, **how)
    return parser


def typed_values(script: str, doc: str, known: dict[str, Flag], defaults: dict, paper: dict, argv: list[str]) -> dict:
    """What was typed, converted; --help prints the values of the row that is typed beside it, and stops."""
    parser = make_parser(script, doc, known)
    without_help = [token for token in argv if token not in ("-h", "--help")]
    typed = {dest: tuple(value) if known[dest].count else value
             for dest, value in vars(parser.parse_args(without_help)).items()}
    if len(without_help) < len(argv):
        row = picked_row(script, paper, {**defaults, **typed})[1]
        parser.set_defaults(**{dest: f"{value}, from the PAPER row" if dest in row.keys() & FROM_ROW else value
                               for dest, value in {**FROM_ROW, **defaults, **row}.items() if value is not None})
        parser.print_help()
        sys.exit(0)
    if "sample" in typed and "bptt" not in known:
        raise UserError("--sample writes characters, and this task has none; leave it out")
    if typed.keys() & {"sample", "prompt"} and "evaluate" not in typed:
        raise UserError("--sample N writes from the best weights of a run; name its folder with --evaluate FOLDER")
    if "evaluate" in typed:
        typed["resume"] = typed["evaluate"].absolute()
    return typed


class NotInDefaults(UserError, AttributeError):
    """`args.x` of a name that the script does not list; for getattr and hasattr a missing attribute."""


class Options(argparse.Namespace):
    """The resolved values as attributes.

    `origin`  where each came from: typed, PAPER row, default, edited, not used
    `row`     the PAPER row's name;  `task` the module of the task;  `argv` the command line, script and arguments
    `script`  the stem of the script's `file`
    """

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        script = vars(self).get("script", "the script")
        raise NotInDefaults(f"{script}.py uses args.{name}, but its DEFAULTS have no {name}; add {name}=VALUE to them")


class Args(Options):
    """The options as a script sees them: `asked` holds the names that it has read, all of them for vars(args)."""

    def __getattribute__(self, name):
        values = super().__getattribute__("__dict__")
        values["asked"].update(values if name == "__dict__" else (name,))
        return super().__getattribute__(name)


def parse(argv, script: str, doc: str, defaults: dict, paper: dict, task: ModuleType | None = None) -> Args:
    """Resolve every flag of the file `script`. argv: what was typed, None for that of this process.

    task   the module with the NAME and REVISION of what a run computes; not needed to open a run

    Raises UserError with one sentence for what has no meaning.
    """
    file, script = Path(script), Path(script).stem
    argv = sys.argv if argv is None else [f"{script}.py", *map(str, argv)]
    if not re.fullmatch(r"[\w-]+", script, flags=re.ASCII):
        raise UserError(f"{script}.py cannot be the name of a script; use letters, digits, _ and -")
    known = known_flags(script, defaults)
    defaults = {dest: checked(dest, value, known, f"{script}.py, DEFAULTS")
                for dest, value in {**SHARED, **defaults}.items()}
    paper = {name: {dest: checked(dest, value, known, f'{script}.py, PAPER, "{name}"', is_row=True)
                    for dest, value in row.items()} for name, row in paper.items()}
    typed = typed_values(script, doc, known, defaults, paper, argv[1:])
    options = Options(script=script, file=file, argv=argv, task=task, origin={}, **FROM_ROW, **defaults)
    if typed.get("resume") not in (None, AUTO):
        _as_started(options, typed, known)
    else:
        _as_typed(options, typed, known, defaults, paper)
    return Args(asked=set(), options=options, **vars(options))


def _as_typed(options: Options, typed: dict, known: dict, defaults: dict, paper: dict) -> None:
    """The values of a new run, and where they come from."""
    choice = {**defaults, **typed}
    options.row, row = picked_row(options.script, paper, choice)
    usual, usual_paper = published(options.task.NAME, kind_of(defaults))
    for dest in row.keys() & usual.keys() - typed.keys():
        if defaults.get(dest, usual[dest]) not in (usual[dest], row[dest]):
            raise UserError(f'{options.script}.py, DEFAULTS: {dest}={defaults[dest]!r} has no effect, because the row '
                            f'"{options.row}" of PAPER names {dest}={row[dest]!r}; edit it there, or type '
                            f"{spelled(dest)}")
    usual = usual and {**SHARED, **FROM_ROW, **usual, **picked_row(options.script, usual_paper, choice)[1]}
    sources = {"typed": typed, f"PAPER {options.row}": row, "default": defaults, "not used": FROM_ROW}
    for dest in known:
        source, values = next((source, values) for source, values in sources.items() if dest in values)
        if usual and source != "typed" and dest not in ("net_type", "nvar") and values[dest] != usual.get(dest):
            source = "edited"
        setattr(options, dest, values[dest])
        options.origin[dest] = source
    check(options, typed, known)


def _as_started(options: Options, typed: dict, known: dict) -> None:
    """The values that the run in the folder typed["resume"] was started with, and what may be typed beside them.

    A flag that is newer than the run has its default.
    """
    folder, config = typed["resume"], read_config(typed["resume"])
    if config["script"] != options.script:
        raise UserError(f"{folder} is a run of {config['script']}.py; resume it with that script")
    options.row = config["row"]
    options.origin = {dest: "default" if dest not in FROM_ROW else "not used" for dest in known}
    try:
        for dest, entry in config["options"].items():
            if dest in GONE or (dest in known and known[dest].group is CALL):
                continue
            options.origin[dest] = entry["origin"]
            if (entry["value"], entry["origin"]) != (None, "not used"):
                setattr(options, dest, checked(dest, entry["value"], known, "its options"))
        check(options, {}, known)
    except UserError as error:
        raise UserError(f"{folder / 'config.json'} is damaged or was written by another version of {options.script}.py "
                        f"({error}); restore it from a copy or start a new run") from None
    for dest, value in typed.items():
        before, group = getattr(options, dest), known[dest].group
        if group is LENGTH and value > before:
            options.origin[dest] = "typed on resume"
        elif not group.may_change and value != before and not (dest == "random_seed" and "sample" in typed):
            raise UserError(f"{spelled(dest)} is {before} in {folder} and cannot become {value}; start a new run")
        setattr(options, dest, value)
    check(options, {}, known)


def check(options: Options, typed: dict, known: dict[str, Flag]) -> None:
    """Raises UserError where an option was typed that has no meaning beside the others."""
    net, has = options.net_type, options.origin
    if net == "LSTM" and (options.nvar if "nvar" in has else "") != "none":
        script = options.script if "nvar" in has else re.sub("_[a-z]+$", "_nvar", options.script)
        raise UserError(f"--net-type LSTM has no stair; use {script}.py --net-type LSTM --nvar none")
    if options.rinit is None:
        raise UserError(f"no row of PAPER in {options.script}.py is for --net-type {net}; add a row, or type --rinit, "
                        "--lr and --alpha")
    try:
        check_start(net, options.rinit)
    except ValueError as error:
        raise UserError(f"--net-type {net} cannot start from --rinit {options.rinit}: {error}") from None
    if net == "nnRNN" and options.nhid % 2:
        raise UserError(f"nnRNN pairs its hidden units, so --nhid must be even, not {options.nhid}")
    if "tied" in has and options.tied and options.emsize != options.nhid:
        raise UserError(f"--tied shares the embedding with the decoder and needs --emsize equal to --nhid, "
                        f"not {options.emsize} and {options.nhid}")
    if "literal" in has and options.alpha_start < 0:
        raise UserError(f"--alpha-start must be at least 0 for the exponential stair, not {options.alpha_start}")
    for dest, flag in known.items():
        has_meaning, why_not = flag.needs or (lambda o: True, "")
        if not has_meaning(options):
            if dest in typed:
                raise UserError(f"{flag.spelling} has no meaning here: {why_not.format(**vars(options))}; leave it out")
            has[dest] = has[dest] if has[dest] == "typed" else "not used"
        elif flag.in_row and getattr(options, dest) is None:
            raise UserError(f'the row "{options.row}" of PAPER in {options.script}.py has no {dest}; add it, or type '
                            f"{flag.spelling}")


def kind_of(options) -> str:
    """The kind of stair of a script with these options: nvar, alpha or expalpha."""
    return "nvar" if "nvar" in options else "expalpha" if "literal" in options else "alpha"


def is_science(dest: str) -> bool:
    """Whether a flag decides what is computed; one that a script has of its own does."""
    return FLAGS[dest].group.is_science if dest in FLAGS else dest not in GONE


def science(options: dict) -> dict:
    """The values that decide what is computed, of options as config.json holds them."""
    return {name: entry["value"] for name, entry in options.items()
            if is_science(name) and entry["origin"] != "not used" and entry["value"] is not None}


def unread(options: Options, asked: set, group: Group | None = None) -> list[str]:
    """The flags that decide what is computed, of one group or of all, and are not in `asked`."""
    return [dest for dest, source in options.origin.items() if dest not in asked and source != "not used"
            and is_science(dest) and (group is None or (dest in FLAGS and FLAGS[dest].group is group))]


def describe(options: Options) -> str:
    """The resolved values, grouped by where they came from; a line each."""
    lines, new = {}, [spelled(dest) for dest in options.origin if dest not in FLAGS]
    for dest, source in options.origin.items():
        value = getattr(options, dest)
        if not (source == "not used" or (source == "default" and value is None)
                or (dest in FLAGS and FLAGS[dest].group is CALL)):
            shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
            lines.setdefault(source, []).append(f"{dest}={shown}")
    order = sorted(lines, key=lambda source: {"typed": 0, "edited": 1, "default": 3}.get(source, 2))
    return "\n".join([*(f"{source}: {' '.join(lines[source])}" for source in order),
                      *([f"new in DEFAULTS: {' '.join(new)}"] if new else [])])
