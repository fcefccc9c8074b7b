"""Flags: one meaning each, for all scripts; rows of published hyperparameters; where a value came from.

A script lists its flags with their defaults (`DEFAULTS`) and the rows of the published tables (`PAPER`).
`parse` makes an argparse parser of them and resolves every value:

    typed on the command line  >  PAPER row that the options pick  >  DEFAULTS

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
from functools import cache
from pathlib import Path
from types import ModuleType

from common.cells import INPUT_STARTS, NET_TYPES, RECURRENT_STARTS, check_start
from common.errors import UserError, nearest
from common.optim import METHODS
from common.recurrence import ENGINES
from common.runs.records import read_config
from common.stair import NONLINEARITIES, SCHEDULE_ALIASES, SCHEDULES

ROW_KEYS = ("net_type", "nvar", "bptt", "nhid")  # what picks a row; everything else in a row is a value
PUBLISHED = Path(__file__).resolve().parents[2] / "results" / "published" / "hyperparameters.json"


# ── what a flag accepts ──────────────────────────────────────────────────────────────────────────────────


def one_of(*names, aliases=None):
    """A name of a list; the nearest one is suggested for a misspelled one."""
    aliases = aliases or {}

    def convert(text):
        name = aliases.get(text, text)
        if name in names:
            return name
        hint = "".join(f"; did you mean {near}?" for near in nearest(text, names))
        raise argparse.ArgumentTypeError(f"'{text}' is not one of {', '.join(names)}{hint}")

    convert.names = names
    return convert


def text(value):
    """One line."""
    if not value or not value.isprintable():
        raise argparse.ArgumentTypeError(f"{value!r} is not a line of text")
    return value


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

    convert.kind, convert.want = kind, want
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


LARGEST = 1e30  # a float32 ends at 3.4e38, and a rate is multiplied by other numbers
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
    "random_seed": ("run", number(int, 0, 2**32 - 1), "seed of the weights and of drawn data"),
    "cuda": ("run", SWITCH, "run on the GPU"),
    "tf32": ("run", SWITCH, "float32 products by tensor cores, from 10 bits of mantissa; needs --cuda"),
    "threads": ("run", number(int, 1, 1024), "CPU threads (OMP_NUM_THREADS, else the cores that this process may use)"),
    "engine": ("run", one_of("auto", *ENGINES), "time loop of common/recurrence"),
    "name": ("run", name_part, "added to the name of the run's folder"),
    "save": ("run", folder, "folder that runs are written to"),
    "dry_run": ("run", SWITCH, "show every value, the size and about the time of the run, and stop"),
    "resume": ("run", folder, "go on with the run in this folder, with the options that it was started with; auto: "
                              "with the run that the same options started, or a new one"),
    "evaluate": ("run", folder, "print the validation score of best.pt of the run in this folder, and of a finished "
                                "run the test score, and stop"),
    "sample": ("run", COUNT, "with --evaluate of a run of the characters: print this many symbols, drawn by best.pt"),
    "until_epoch": ("run", COUNT, "stop after this epoch, saved; --resume goes on to --epochs"),
    "curves": ("run", SWITCH, "draw curves.png at the end"),
}
ALIASES = {"random_seed": ("--seed",)}
SPELLING = {"dry_run": "--dry-run", "net_type": "--net-type", "random_seed": "--random-seed", "c_length": "--c-length",
            "log_interval": "--log-interval", "alpha_start": "--alpha-start", "until_epoch": "--until-epoch"}

# Every script has these: they decide nothing of what is computed.
SHARED = dict(cuda=False, tf32=False, threads=None, name=None, save=Path("saves"), resume=None, dry_run=False,
              evaluate=None, sample=None, until_epoch=None, curves=True)
FROM_ROW = dict(lr=None, lr_orth=None, alpha=None, alam=0.0, Tdecay=0.0, rinit=None)  # where a row leaves it out
THIS_TIME = ("resume", "dry_run", "evaluate", "sample", "until_epoch")  # what to do now: a resumed run asks anew
MAY_BE_NONE = ("threads", "name", "data", "text", "resume", "evaluate", "sample", "until_epoch")
NOT_SCIENCE = ("save", "name", "threads", "cuda", "tf32", "engine", "data", "log_interval", "save_freq", "curves",
               *THIS_TIME)
AUTO = Path("auto")
MAY_CHANGE_ON_RESUME = ("cuda", "tf32", "threads", "engine", "data", "text", "curves", *THIS_TIME)
MAY_GROW_ON_RESUME = ("updates", "epochs")


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
                    near = nearest(name.replace("_", "-"), spelled, cutoff=0.7)
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


def known_flags(script: str, defaults: dict) -> dict[str, tuple]:
    """{dest: (group, what it accepts, help)} of a script: its flags of `FLAGS`, and its own new keys.

    Raises UserError for a key of DEFAULTS that belongs to a row, or that is nearly a known flag.
    """
    known = {dest: FLAGS[dest] for dest in FLAGS if dest in defaults or dest in FROM_ROW}
    for key, value in defaults.items():
        where = f"{script}.py, DEFAULTS: {key}={value!r}"
        if key in FROM_ROW:
            raise UserError(f"{where} belongs to the rows; edit {key} in a row of PAPER or type {spelled(key)} {value}")
        if key in FLAGS:
            continue
        for near in nearest(key, FLAGS, cutoff=0.8):
            raise UserError(f"{where} is no flag; did you mean {near}?")
        if not re.fullmatch(r"[A-Za-z]\w*", key) or spelled(key) in {o for names in ALIASES.values() for o in names}:
            raise UserError(f"{where} cannot become a flag; use letters, digits and _")
        known[key] = ("new in DEFAULTS", kind_of(value, where), "a flag of this script alone")
    return known


def kind_of(value, where: str):
    """What the flag of a new key accepts: more values of the same type."""
    if isinstance(value, bool):
        return SWITCH
    if isinstance(value, (int, float)):
        return number(type(value))
    if isinstance(value, str):
        return text
    if isinstance(value, tuple) and value and all(isinstance(part, (int, float, str)) for part in value):
        return tuple(number(type(part)) if not isinstance(part, (bool, str)) else text for part in value)
    raise UserError(f"{where} is a {type(value).__name__}; use a number, a text, True or False, or a tuple of these")


def spelled(dest: str) -> str:
    """A flag as the help shows it."""
    return SPELLING.get(dest, f"--{dest}")


def checked(value, dest: str, accepts, where: str):
    """A value that stands in a script, checked as strictly as a typed one. Raises UserError with `where` it stands."""
    where = f"{where}: {dest}={value!r}"
    if value is None and dest in MAY_BE_NONE:
        return None
    if accepts is SWITCH:
        if not isinstance(value, bool):
            raise UserError(f"{where} is neither True nor False")
        return value
    if isinstance(accepts, tuple):
        if not isinstance(value, (tuple, list)) or len(value) != len(accepts):
            raise UserError(f"{where} is not a tuple of {len(accepts)} values")
        return tuple(checked(part, dest, each, where) for part, each in zip(value, accepts, strict=True))
    numeric = getattr(accepts, "kind", None)
    if numeric and (isinstance(value, (bool, str)) or not isinstance(value, (int, float))):
        raise UserError(f"{where} is not {accepts.want}; write it without quotes")
    if not numeric and not isinstance(value, (str, Path)):
        raise UserError(f"{where} is not a text")
    try:
        return accepts(repr(value) if numeric else str(value))
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{where}: {error}") from None


def make_parser(script: str, doc: str, known: dict, shown: dict) -> Parser:
    """The argparse parser of a script: one flag for each of `known`; the help shows the values `shown`."""
    parser = Parser(prog=f"{script}.py", description=doc, allow_abbrev=False, argument_default=argparse.SUPPRESS,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = {}
    for dest, (group, accepts, text_) in known.items():
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        value = shown.get(dest)
        if value is not None:
            if accepts is SWITCH:
                value = "on" if value else "off"
            elif isinstance(value, tuple):
                value = " ".join(map(str, value))
            text_ += f" (default: {value}{', from the PAPER row' if dest in FROM_ROW else ''})".replace("%", "%%")
        options = (spelled(dest), *ALIASES.get(dest, ()))
        if accepts is SWITCH:
            groups[group].add_argument(*options, dest=dest, action=argparse.BooleanOptionalAction, help=text_)
        elif isinstance(accepts, tuple):
            groups[group].add_argument(*options, dest=dest, nargs=len(accepts), metavar="X", help=text_)
        else:
            names = getattr(accepts, "names", None)
            metavar = "{" + ",".join(names) + "}" if names else dest.upper() if len(dest) > 1 else dest
            groups[group].add_argument(*options, dest=dest, type=accepts, metavar=metavar, help=text_)
    return parser


def check_rows(script: str, paper: dict, known: dict) -> dict:
    """PAPER with every value checked. Raises UserError for a key or a value that no flag knows."""
    rows = {}
    for name, row in paper.items():
        where = f'{script}.py, PAPER, "{name}"'
        for key in row:
            if key not in known:
                hint = "".join(f"; did you mean {near}?" for near in nearest(key, known, cutoff=0.6))
                raise UserError(f"{where}: there is no flag {key}{hint}")
        rows[name] = {key: tuple(checked(part, key, known[key][1], where) for part in value)
                      if key in ROW_KEYS and isinstance(value, tuple) else checked(value, key, known[key][1], where)
                      for key, value in row.items()}
    return rows


def picked_row(script: str, paper: dict, choice: dict) -> tuple[str | None, dict]:
    """The row whose keys all agree with `choice`, of several the row with the most keys → (its name, its values).

    A key of a row may be a tuple, of which one must agree. Where no row has the --bptt or --nhid asked for, the first
    row of the same model decides. A name "A / B" is A without a stair, B with one. Raises UserError for a tie.
    """
    for keys in (ROW_KEYS, ("net_type", "nvar")):
        matching = {name: sum(key in row for key in keys) for name, row in paper.items()
                    if all(choice.get(key) in (row[key] if isinstance(row[key], tuple) else (row[key],))
                           for key in keys if key in row)}
        most = max(matching.values(), default=0)
        best = [name for name, count in matching.items() if count == most]
        if len(best) > 1 and keys is ROW_KEYS:
            raise UserError(f'{script}.py, PAPER: the rows "{best[0]}" and "{best[1]}" both match; '
                            f"give one of them another key ({', '.join(ROW_KEYS)})")
        if best:
            row = paper[best[0]]
            plain_name, _, stair_name = best[0].partition(" / ")
            name = plain_name if choice.get("nvar") == "none" or not stair_name else stair_name
            return name, {key: value for key, value in row.items() if key not in ROW_KEYS}
    return None, {}


@cache
def published() -> dict:
    """{task: DEFAULTS and PAPER as published}; empty where results/ was not copied along."""
    try:
        return json.loads(PUBLISHED.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


def is_edited(task: str, row: str | None, dest: str, value, defaults: dict) -> bool:
    """Whether a value of DEFAULTS or PAPER differs from the published value."""
    if task not in published() or dest in SHARED or dest in ("net_type", "nvar"):
        return False
    known = published()[task]
    if dest in FROM_ROW:
        values = next((values for name, values in known["PAPER"].items() if row in name.split(" / ")), {})
        return value != values.get(dest, FROM_ROW[dest])
    kind = next((kind for kind in ("nvar", "expalpha", "alpha") if known[kind].keys() <= defaults.keys()), "nvar")
    values = {**known["DEFAULTS"], **known[kind]}
    return dest not in values or (list(value) if isinstance(value, tuple) else value) != values[dest]


class NotInDefaults(UserError, AttributeError):
    """`args.x` of a name that the script does not list."""


class Options(argparse.Namespace):
    """The resolved values as attributes.

    `origin`  where each came from: typed, PAPER row, default, edited, not used
    `row`     the PAPER row's name;  `script` the stem of the script's file;  `task` the module of the task
    `asked`   the names that the script has read as args.x
    """

    def __getattribute__(self, name):
        values = super().__getattribute__("__dict__")
        if "asked" in values:
            values["asked"].update(values["origin"] if name == "__dict__" else (name,))
        return super().__getattribute__(name)

    def uncounted(self) -> "Options":
        """The same values, whose reading is not counted."""
        values = super().__getattribute__("__dict__")
        return Options(**{name: value for name, value in values.items() if name != "asked"})

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        script = self.__dict__.get("script", "the script")
        raise NotInDefaults(f"{script}.py uses args.{name}, but its DEFAULTS have no {name}; add {name}=VALUE to them")


def parse(argv, script: str, doc: str, defaults: dict, paper: dict, task: ModuleType) -> Options:
    """Resolve every flag of `script`, one of `task`. Raises UserError with one sentence for what has no meaning."""
    options = _resolved(argv, script, doc, defaults, paper, task)
    options.asked = set()  # from here on it is the script that reads
    return options


def _resolved(argv, script: str, doc: str, defaults: dict, paper: dict, task: ModuleType, resuming=False) -> Options:
    argv = list(map(str, sys.argv[1:] if argv is None else argv))
    if not re.fullmatch(r"[\w-]+", script, flags=re.ASCII):
        raise UserError(f"{script}.py cannot be the name of a script; use letters, digits, _ and -")
    own, defaults = defaults, {**SHARED, **defaults}
    known = known_flags(script, defaults)
    defaults = {dest: checked(value, dest, known[dest][1], f"{script}.py, DEFAULTS")
                for dest, value in defaults.items()}
    paper = check_rows(script, paper, known)
    helpless = [token for token in argv if token not in ("-h", "--help")]
    typed = typed_values(make_parser(script, doc, known, {}), known, helpless)
    if len(helpless) < len(argv):
        row = picked_row(script, paper, {**defaults, **typed})[1]
        make_parser(script, doc, known, {**FROM_ROW, **defaults, **row}).parse_args(["--help"])
    if "evaluate" in typed:
        if not typed.keys() <= {"evaluate", "sample", "cuda", "tf32", "threads", "engine", "data", "text"}:
            raise UserError("--evaluate FOLDER takes everything from the folder; beside it only --sample, --data, "
                            "--text, --cuda, --tf32, --threads and --engine have a meaning")
        typed["resume"] = typed["evaluate"].absolute()
    elif "sample" in typed:
        raise UserError("--sample writes from the best weights of a run; name its folder with --evaluate FOLDER")
    if "sample" in typed and "bptt" not in known:
        raise UserError("--sample writes characters, and this task has none; leave it out")
    if "until_epoch" in typed and "epochs" not in known:
        raise UserError("--until-epoch has no meaning here: this task has updates and no epochs; leave it out")
    if typed.get("resume") not in (None, AUTO):
        return _resumed(typed, lambda saved: _resolved(saved, script, doc, own, paper, task, resuming=True), script,
                        known)

    row_name, row = picked_row(script, paper, {**defaults, **typed})
    values, origin = {}, {}
    for dest in known:
        for source, found in (("typed", typed), (f"PAPER {row_name}", row), ("default", defaults)):
            if dest in found:
                values[dest], origin[dest] = found[dest], source
                break
        else:
            values[dest], origin[dest] = FROM_ROW[dest], "not used"
        if origin[dest] != "typed" and is_edited(task.NAME, row_name, dest, values[dest], defaults):
            origin[dest] = "edited"
    options = Options(**values)
    options.origin, options.row, options.script, options.task = origin, row_name, script, task
    check(options, {} if resuming else typed)
    return options


def typed_values(parser: Parser, known: dict, argv: list[str]) -> dict:
    """What was typed, converted."""
    typed = vars(parser.parse_args(argv))
    for dest, value in typed.items():
        accepts = known[dest][1]
        if isinstance(accepts, tuple):
            try:
                typed[dest] = tuple(convert(part) for convert, part in zip(accepts, value, strict=True))
            except argparse.ArgumentTypeError as error:
                raise UserError(f"{spelled(dest)}: {error}") from None
    return typed


def science(options: dict) -> dict:
    """The values that decide what is computed, of options as config.json holds them."""
    return {name: entry["value"] for name, entry in options.items()
            if name not in NOT_SCIENCE and entry["origin"] != "not used" and entry["value"] is not None}


def unread(options: Options, asked: set, group: str | None = None) -> list[str]:
    """The flags that decide what is computed, of one group or of all, and are not in `asked`."""
    return [dest for dest, source in options.origin.items()
            if dest not in asked and source != "not used" and dest not in NOT_SCIENCE
            and (group is None or FLAGS.get(dest, ("new",))[0] == group)]


def new_keys(options: Options) -> list[str]:
    """The flags that the script has of its own."""
    return [dest for dest in options.origin if dest not in FLAGS]


def check(options: Options, typed: dict) -> None:
    """Raises UserError where an option was typed that has no meaning beside the others."""
    net, has = options.net_type, options.origin
    if net == "LSTM" and (options.nvar if "nvar" in has else "") != "none":
        stem = options.script.rpartition("_")[0] or options.script
        script = options.script if "nvar" in has else f"{stem}_nvar"  # the one of the fixed stairs, none among them
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
    if "text" in has and options.text is not None and options.data is not None:
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
            raise UserError(f"{spelled(dest)} has no meaning here: {why}; leave it out")
        if nothing and dest in has and has[dest] != "typed":
            has[dest] = "not used"
    for dest in ("lr", *(["lr_orth"] if rotates else []), *([] if adam else ["alpha"])):
        if getattr(options, dest) is None:
            raise UserError(f'the row "{options.row}" of PAPER in {options.script}.py has no {dest}; add it, or type '
                            f"{spelled(dest)}")


def _resumed(typed: dict, parse_again, script: str, known: dict) -> Options:
    """The options that the folder `typed["resume"]` was started with, turned back into flags and parsed.

    A flag that is newer than the run has its default.
    """
    folder_, config = typed["resume"], read_config(typed["resume"])
    if config["script"] != script:
        raise UserError(f"{folder_} is a run of {config['script']}.py; resume it with that script")
    saved, values = config["options"], {}
    try:
        for dest, entry in {**saved, **_where_data_was(config)}.items():
            if dest not in known:
                raise UserError(f"{script}.py has no {dest}")
            if entry["value"] is not None or (dest not in MAY_BE_NONE and saved[dest]["origin"] != "not used"):
                values[dest] = checked(entry["value"], dest, known[dest][1], "its options")
        options = parse_again([token for dest, value in values.items() for token in tokens(dest, value)
                               if dest not in MAY_CHANGE_ON_RESUME and saved[dest]["origin"] != "not used"])
    except UserError as error:
        raise UserError(f"{folder_ / 'config.json'} is damaged or was written by another version of {script}.py "
                        f"({error}); restore it from a copy or start a new run") from None
    for dest in values.keys() & set(MAY_CHANGE_ON_RESUME) - set(THIS_TIME) - typed.keys():
        setattr(options, dest, values[dest])
    for dest, value in typed.items():
        before = getattr(options, dest)
        grows = dest in MAY_GROW_ON_RESUME and value > before
        if dest not in MAY_CHANGE_ON_RESUME and value != before and not grows:
            raise UserError(f"{spelled(dest)} was {before} when {folder_} was started and cannot become {value} on the "
                            f"way; start a new run")
        setattr(options, dest, value)
        if grows:
            saved[dest]["origin"] = "typed on resume"
    for dest, entry in saved.items():
        if dest in options.origin:
            options.origin[dest] = entry["origin"]
    options.row = config["row"]
    check(options, {})
    return options


def _where_data_was(config: dict) -> dict:
    """The absolute path of --data or --text, where it still exists: a run may go on from another folder."""
    data = config.get("data")
    path = data.get("path") if isinstance(data, dict) else None
    if not isinstance(path, str) or not path.isprintable() or not os.path.exists(path):
        return {}
    return {dest: {"value": path} for dest in ("text", "data")
            if config["options"].get(dest, {}).get("value") is not None}


def tokens(dest: str, value) -> list[str]:
    """The value of a saved option as it is typed."""
    if isinstance(value, bool):
        return [spelled(dest) if value else "--no-" + spelled(dest)[2:]]
    if isinstance(value, tuple):
        return [spelled(dest), *map(str, value)]
    return [f"{spelled(dest)}={value}"]


def describe(options: Options) -> str:
    """The resolved values, grouped by where they came from; a line each."""
    lines = {}
    for dest, source in options.origin.items():
        value = getattr(options, dest)
        if source == "not used" or dest in THIS_TIME \
                or (source == "default" and value is None):
            continue
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
        lines.setdefault(source, []).append(f"{dest}={shown}")
    order = sorted(lines, key=lambda source: {"typed": 0, "edited": 1, "default": 3}.get(source, 2))
    described = [f"{source}: {' '.join(lines[source])}" for source in order]
    if own := new_keys(options):
        described.append(f"new in DEFAULTS: {' '.join(f'{spelled(dest)}' for dest in own)}")
    return "\n".join(described)
