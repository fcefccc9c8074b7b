"""The rows of the tables, and the runs that belong to them.

A task's rows are the published ones (results/published/hyperparameters.json), even where a script was edited:
baselines without a stair, and sRNN rows with every schedule, with a learned and with an exponential stair. Rows of a
free matrix with an orthogonal start come twice, as published and from henaff. After a row stand those that type other
values beside it, each under the name of its source (evidence/published.py). A run belongs to a row when its config.json
holds the values that the row's command resolves to, whatever its folder. A run of another script, stair, data or of
edited files belongs to a row of its own: one for each script and what was typed.
"""

import itertools
import json
import os
import shlex
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from common import copytask, language, smnist
from common.errors import UserError, nearest
from common.runs import flags
from common.runs.curves import facts_of, labels_of
from common.runs.provenance import as_json, code_of, foreign_code, own_stair
from common.runs.records import log_rows, read_config, read_result, reading
from common.stair import SCHEDULES
from evidence import published

TASKS = {task.NAME: task for task in (copytask, smnist, language)}
GAIN = {"copytask": "recall", "sMNIST": "test_accuracy", "language": "test_accuracy"}  # what a stair is to raise
OLD_NAMES = {"smnist": "sMNIST"}  # of tasks, in older records
KINDS = ("nvar", "alpha", "expalpha")  # of scripts, by the stair
SIZES = {"nhid", "epochs", "updates", "T", "c_length", "labels", "vari", "permute"}  # which make another experiment
SEEDS = (400, 401, 402, 403, 404)
RUNS = Path("results/runs")
OTHER_DATA = "other data"
# A size for two cores, with the published values of everything else: a run takes some ten minutes of one core.
SMALL = {"copytask": "", "sMNIST": "--nhid 128 --epochs 10", "language": "--nhid 256 --epochs 15"}
SMALL_GRID = ("RNN-Orth, henaff", "expRNN", "nnRNN"), ("none", "n", "n2", "expn", "alpha", "expalpha")  # cells, stairs


@dataclass
class Row:
    """A line of a table: a model with a stair, and the flags that make it."""

    script: str
    model: str
    stair: str
    flags: list
    task: str = ""
    cell: str = ""              # the name of the row without a stair; with its start
    source: str = ""            # who typed other values than the tables have (evidence/published.py)
    value: str = ""             # the score that was published with these values
    curve: str = ""             # the column of the published curve
    path: str = ""              # the file of a script of one's own
    why_no_command: str = ""    # of a row that no command makes again
    runs: dict = field(default_factory=dict)  # seed → folder; complete before the results are asked for

    def __post_init__(self):
        self.task = self.task or self.script.split("_")[0]
        self.cell = self.cell or self.model

    @property
    def name(self) -> str:
        return f"{self.model} {self.stair}"

    @property
    def line(self) -> str:
        """Its line of a grid, where the column tells the cell; of one's own with what was typed."""
        return f"{self.stair}, {self.model.partition(', ')[2]}" if self.path else self.stair

    @cached_property
    def results(self) -> list[dict]:
        """The results of the runs that have ended; of the copying task with the median of the last report."""
        results = []
        for folder in self.runs.values():
            if (found := read_result(folder)) is None:
                continue
            if self.task in TASKS:
                with reading(folder / "result.json", "restore it from a copy or leave this run out"):
                    float(found[GAIN[self.task]])
                found["loss_median"] = next(iter(log_rows(folder)[-1:]), {}).get("loss_median")
            results.append(found)
        return results

    def command(self, seed: int | None = None) -> list[str]:
        """The command line, without the interpreter."""
        return [self.path or f"{self.script}.py", *self.flags, *(["--seed", str(seed)] if seed is not None else [])]

    def takes(self, flag: str) -> bool:
        """Whether the row's script has the flag `flag`, spelled without dashes in front."""
        return flag.replace("-", "_") in flags.known_flags(self.script, flags.published(*self.script.split("_"))[0])

    def options(self, seed: int) -> dict:
        """What the command of a published row resolves to, as a run's config.json holds it."""
        resolved = flags.parse(self.command(seed)[1:], self.script, "", *flags.published(*self.script.split("_")),
                               TASKS[self.task])
        return flags.science({name: {"value": as_json(getattr(resolved, name)), "origin": origin}
                              for name, origin in resolved.origin.items()})


def by_flag(words: list[str]) -> dict[str, list[str]]:
    """The words of a command line by the flag that they belong to: {dest: its words}. --no-x is the flag x."""
    found, dest = {}, None
    for word in words:
        if word.startswith("--"):
            dest = word[2:].partition("=")[0].replace("-", "_").removeprefix("no_")
            found[dest] = []
        if dest is not None:
            found[dest].append(word)
    return found


def is_same(value, words: list[str]) -> bool:
    """Whether the words of a flag on a command line mean the value of an option. --x is True, --no-x False."""
    flag, *texts = [*words[0].split("=", 1), *words[1:]]
    text = " ".join(texts) or str(not flag.startswith("--no-"))
    try:
        return float(value) == float(text)
    except (TypeError, ValueError):
        return (" ".join(map(str, value)) if isinstance(value, list) else str(value)) == text


def rows_of(task: str, extra: list[str]) -> list[Row]:
    """Every row of a task's table; `extra` flags are added to each command."""
    rows, typed_too, schedules = [], by_flag(extra).keys(), [name for name in SCHEDULES if name != "none"]
    for kind, stairs in (("nvar", ["none"]), ("nvar", schedules), ("alpha", ["alpha"]), ("expalpha", ["expalpha"])):
        for names, published_row in flags.published(task, "nvar")[1].items():
            cell, _, with_stair = names.replace(" 300", "").partition(" / ")
            model = cell if stairs == ["none"] else with_stair
            if not model:
                continue
            nets = published_row["net_type"]
            net_type = nets if isinstance(nets, str) else nets[model == with_stair]
            lengths = [published_row["bptt"]] if "bptt" in published_row else [150, 300] if task == "language" else [0]
            has_henaff = published_row["rinit"] == "random" and "rinit" not in typed_too
            for stair, bptt, start in itertools.product(stairs, lengths, ["", "henaff"] if has_henaff else [""]):
                typed = ["--net-type", net_type]
                typed += ["--nvar", stair] if kind == "nvar" else []
                typed += ["--bptt", str(bptt)] if bptt else []
                typed += ["--permute"] if task == "sMNIST" and "permute" not in typed_too else []
                typed += ["--rinit", start] if start else []
                name = " 300" * (bptt == 300) + f", {start}" * bool(start)
                row = Row(f"{task}_{kind}", model + name, stair, [*typed, *extra], cell=cell + name)
                rows += [row, *rows_beside(row, is_published=not typed_too & SIZES)]
    return rows


def rows_beside(row: Row, is_published: bool) -> list[Row]:
    """The rows that type the values of other sources beside those of `row`. Each gets what its source published."""
    rows = []
    for line in published.lines(row.task):
        if (line.model, line.stair) != (row.model, row.stair):
            continue
        found, source = row, f", {line.source}"
        if line.flags:  # a stair is compared with the plain network that has the same values
            rows.append(found := replace(row, model=row.model + source, cell=row.cell + source, source=line.source,
                                         value="", curve="", flags=[*row.flags, *line.flags.split()], runs={}))
        if is_published:
            found.value, found.curve = line.value or found.value, line.curve or found.curve
    return rows


def rows_at(task: str, small: bool, extra: list[str]) -> list[Row]:
    """The rows of a task's table at the published size, or with `small` those at a size for two cores."""
    if not small or not SMALL[task]:
        return [row for row in rows_of(task, extra) if not row.source.startswith("H ")]
    named = {line.name for line in published.lines(task) if line.source in published.AUTHORS}
    rows = [row for row in rows_of(task, [*SMALL[task].split(), *extra]) if " 300" not in row.model]
    plain = {f"{row.cell} none" for row in rows if row.name in named}  # what a named stair is compared with
    return [row for row in rows if (row.cell in SMALL_GRID[0] and row.stair in SMALL_GRID[1])
            or row.name in {*named, *plain, "LSTM none"} or row.source.startswith("H ")]


def select(rows: list[Row], only: list[str] | None) -> list[Row]:
    """The rows that the texts `only` pick, all rows without texts. A text picks the row of this name, or else all rows
    whose names hold it. Raises UserError for a text that no row holds, which is most likely misspelled.
    """
    if not only:
        return rows
    names = {row.name for row in rows}
    for text in only:
        if not any(text in name for name in names):
            near = " ".join(f"'{name}'" for name in nearest(text, names, most=3))
            raise UserError(f"no row holds '{text}'; {f'near it are {near}' if near else 'see all without --only'}")
    return [row for row in rows if any(text == row.name or (text not in names and text in row.name) for text in only)]


def find_runs(rows: list[Row], seeds, *folders: Path, data: str | None = None) -> None:
    """Give every row the folders of its runs below `folders`; of several with the same values, the first finished one.

    A run on other data than the published counts only where `data` names their folder.
    """
    found = {}
    for run, config in records_below(*folders):
        differences = differences_of(config)
        if data and config.get("data", {}).get("path") == os.path.abspath(data):
            differences = [difference for difference in differences if not difference.startswith(OTHER_DATA)]
        if not differences and not own_stair(config) and is_current(config):
            science = json.dumps(flags.science(config["options"]), sort_keys=True)
            key = (config["script"], science)
            if key not in found or ((run / "result.json").exists() and not (found[key] / "result.json").exists()):
                found[key] = run
    for row in rows:
        options = row.options(0)
        for seed in seeds:
            key = (row.script, json.dumps({**options, "random_seed": seed}, sort_keys=True))
            if key in found:
                row.runs[seed] = found[key]


def own_rows(target: str, seeds, folders, words: list[str], flag: str, values: list[str]) -> list[tuple[Row, dict]]:
    """The rows of scripts, stairs, edits and data of one's own below `folders` → (row, {value of --flag: its runs}).

    `target` is a task or the path of a script. Only runs with the values `words` count. Runs are of one row where all
    that they compute is the same, but for the seed and the flag. Rows of one name tell what they differ in, too. Where
    no seeds were typed, all count.
    """
    groups, dest = {}, flag.replace("-", "_")
    wanted = {name: typed for name, typed in by_flag(words).items() if flags.is_science(name)}
    for run, config in records_below(*folders):
        options, seed = config["options"], config["options"]["random_seed"]["value"]
        has_row = config["script"] == Path(target).stem if target not in TASKS else \
            task_of(config) == target and is_current(config) and (differences_of(config) or own_stair(config))
        is_wanted = all(name in options and is_same(options[name]["value"], typed) for name, typed in wanted.items())
        if not (has_row and is_wanted and (seeds is SEEDS or seed in seeds)):
            continue
        for value in values:
            if not flag or (dest in options and is_same(options[dest]["value"], [f"--{flag}", value])):
                config["options"] = {name: entry for name, entry in options.items() if name != dest}
                runs = groups.setdefault(json.dumps(facts_of(config), sort_keys=True), (config, {}))[1]
                if not (runs.setdefault(value, {}).get(seed, Path()) / "result.json").exists():  # a finished run stays
                    runs[value][seed] = run
    sizes = [word for name in SIZES & wanted.keys() for word in wanted[name]]
    configs = [config for config, _ in groups.values()]
    tables = rows_of(target, sizes) if target in TASKS and configs else []
    plain = {row.cell: row.options(0) for row in tables if row.stair == "none"}
    of_model = {row.model: (row.cell, plain.get(row.cell, {})) for row in tables}
    rows = [own_row(config, target, of_model) for config in configs]
    names = [row.name for row in rows]
    for row, config in zip(rows, configs, strict=True):
        alike = [other for other, name in zip(configs, names, strict=True) if name == row.name]
        if len(alike) > 1:
            row.model += f", {labels_of(alike)[alike.index(config)]}"
    return [(row, runs) for row, (_, runs) in zip(rows, groups.values(), strict=True)]


def own_row(config: dict, target: str, published_rows: dict[str, tuple[str, dict]]) -> Row:
    """The row of a run that is of no published row, without runs. Of those: {model: (cell, options of its network)}."""
    differences, file, typed = differences_of(config), f"{config['script']}.py", {}
    for name, entry in config["options"].items():
        value, flag = entry["value"], flags.spelled(name)
        if entry["origin"].startswith("typed") and flags.is_science(name) and name != "random_seed":
            typed[name] = [flag if value else f"--no-{flag[2:]}"] if isinstance(value, bool) else \
                [flag, *map(str, value if isinstance(value, list) else [value])]
    parts = [config["row"], *differences, *(" ".join(words).removeprefix("--") for name, words in typed.items()
                                            if name != "nvar" and (name != "net_type" or task_of(config) not in TASKS))]
    parts += [f"{name}={entry['value']}" for name, entry in config["options"].items() if entry["origin"] == "edited"]
    path, facts, why_no_command = Path(config["argv"][0] if config["argv"] else file), facts_of(config), ""
    path, cell = path if path.name == file else Path(file), config["row"] or ""
    if target in TASKS:  # it is compared with the plain network of the published row, at the same size
        cell, plain = published_rows.get(f"{cell}, henaff" if "henaff" in typed.get("rinit", ()) else cell, ("", {}))
        if any(name in config["options"] and config["options"][name]["value"] != plain[name]
               for name in SIZES & plain.keys()):
            cell = ""
    if target in TASKS and (differences[:1] != [file] or OTHER_DATA in " ".join(differences)):
        why_no_command = "it needs an edited script or other data"
    elif path.is_file() and facts_of({**config, "code": code_of(path)}) != facts:
        why_no_command = f"{file}, or what it imports, has changed since"
    return Row(config["script"], ", ".join(filter(None, parts)), facts["stair"], list(itertools.chain(*typed.values())),
               task=task_of(config), cell=cell, path=str(path), why_no_command=why_no_command)


def rows_asked_for(target: str, args) -> dict[str, list[Row]]:
    """The rows that a command line asks for, with their runs: a list for each value of --vary, or one.

    All lists have the same rows in the same order. Raises UserError where no row is left.
    """
    flag, *values = args.vary or ["", ""]
    flag, columns = flag.lstrip("-"), {}
    dest = flag.replace("-", "_")
    if flag and (not flags.is_science(dest) or dest in ("net_type", "nvar", "random_seed", "seed")):
        raise UserError(f"--vary takes a flag that decides what a row computes; --{flag} does not, or it picks the row")
    try:
        words = shlex.split(args.extra)
    except ValueError as error:
        raise UserError(f"--with {args.extra} cannot be read ({error}); quote it as in --with='--T 500'") from None
    small = SMALL.get(target, "").split() if args.small else []
    own = own_rows(target, args.seeds, args.save, [*small, *words], flag, values)
    typed, beside = ([word for name, found in by_flag(words).items() if flags.is_science(name) == science
                      for word in found] for science in (True, False))
    if target not in TASKS and all(row.why_no_command for row, _ in own):  # before the first run of the script as it is
        own.append((Row(Path(target).stem, " ".join([Path(target).name, *words]), "", typed, path=target), {}))
    for value in values:
        extra = [f"--{flag}", value] if flag else []
        rows = rows_at(target, args.small, [*words, *extra]) if target in TASKS else []
        rows = [row for row in rows if not flag or row.takes(flag)]
        rows += [replace(row, flags=[*row.flags, *beside, *extra], runs=runs.get(value, {})) for row, runs in own]
        if not rows:
            raise UserError(f"no row that was asked for has a flag --{flag}; the flags of a script: "
                            f"python {target}_nvar.py --help")
        columns[value] = rows = select(rows, args.only)
        find_runs([row for row in rows if not row.path], args.seeds, *args.save, data=args.data)
    return columns


def add_row_options(parser) -> None:
    """The options that pick rows and their runs."""
    option, seed = parser.add_argument, flags.FLAGS["random_seed"].accepts
    option("--only", nargs="+", metavar="TEXT", help="the row of this name, as in 'expRNN none', or all that hold TEXT")
    option("--small", action="store_true", help="psMNIST H 128, 10 epochs; characters H 256, 15 epochs: for two cores")
    option("--vary", nargs="+", metavar=("FLAG", "VALUE"), help="a column a value of a flag, as in --vary T 200 500")
    option("--with", dest="extra", default="", metavar="FLAGS", help="more flags of the rows, as in --with='--T 500'")
    option("--seeds", type=seed, nargs="+", default=SEEDS, help="default: 400 to 404")
    option("--save", type=Path, nargs="+", default=[RUNS], metavar="FOLDER",
           help=f"where runs are; new ones go to the first (default: {RUNS})")
    option("--data", help="data folder of the runs")


def records_below(*folders: Path) -> list[tuple[Path, dict]]:
    """(folder, config.json) of every run below each of `folders`."""
    return [(path.parent, read_config(path.parent))
            for folder in folders for path in sorted(Path(folder).glob("*/*/config.json"))]


def is_current(config: dict) -> bool:
    """Whether the run's options compute today what they computed then. A record without a number is of revision 1."""
    task, cell, number = TASKS.get(task_of(config)), config["options"]["net_type"]["value"], config.get("revision", 1)
    return task is not None and (number == task.REVISION or cell in task.AS_BEFORE.get(number, ()))


def task_of(config: dict) -> str:
    """The task's name; an older record names the task in its script only."""
    name = config.get("task") or config["script"].split("_")[0]
    return OLD_NAMES.get(name, name)


def differences_of(config: dict) -> list[str]:
    """What makes a run none of a published row, whatever its options: its script, its data, edited files."""
    task, _, kind = config["script"].partition("_")
    found = [] if task in TASKS and kind in KINDS else [f"{config['script']}.py"]
    if isinstance(config.get("data"), dict) and config["data"].get("official") is False:
        found.append(f"{OTHER_DATA} {str(config['data'].get('digest'))[:7]}")
    if files := [name for name in foreign_code(config) if not found or Path(name).stem != config["script"]]:
        found.append(f"edited {', '.join(files[:2])}" + f" and {len(files) - 2} more" * (len(files) > 2))
    return found
