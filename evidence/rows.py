"""The rows of the published tables, and the runs that belong to them.

A task's rows are the published ones (results/published/hyperparameters.json), even where a script was edited:
baselines without a stair, and sRNN rows with every schedule, with a learned and with an exponential stair. Rows of a
free matrix with an orthogonal start come twice, as published and from henaff. Rows whose published curve has another
number of hidden units come twice too. A run belongs to a row when its config.json holds the values that the row's
command resolves to, whatever its folder. A run of another script, of another stair or of edited files has a row of its
own.
"""

import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path

from common import copytask, language, smnist
from common.errors import UserError, nearest
from common.runs import flags
from common.runs.records import is_diverged, is_not_finite, kind_of, log_rows, own_stair, plain, read_config
from common.stair import SCHEDULES

TASKS = {"copytask": copytask, "sMNIST": smnist, "language": language}
KINDS = ("nvar", "alpha", "expalpha")  # of scripts, by the stair
SIZES = {"nhid", "epochs", "updates", "T", "c_length", "labels", "vari"}  # which make another experiment of a row
SEEDS = (400, 401, 402, 403, 404)
RUNS = Path("results/runs")
# A size for two cores, with the published hyperparameters: a run takes some ten minutes of one core.
SMALL = {"copytask": {}, "sMNIST": {"nhid": 128, "epochs": 10}, "language": {"nhid": 256, "epochs": 15}}
SMALL_CELLS, SMALL_STAIRS = ("RNN-Orth, henaff", "expRNN", "nnRNN"), ("none", "n", "n2", "expn", "alpha", "expalpha")
PUBLISHED_SIZES = {"copytask": {"expRNN": 176, "LSTM": 63}}  # H of published curves where the table has another H


@dataclass
class Row:
    """A line of a table: a model with a stair, and the flags that make it."""

    script: str
    model: str
    stair: str
    flags: list
    as_published: bool = True  # the size of the task and of the network, the length of the training
    own: bool = False  # of a script, a stair or an edit that is nobody's but the user's: no command makes it again
    runs: dict = field(default_factory=dict)  # seed → folder

    @property
    def name(self) -> str:
        return f"{self.model} {self.stair}"

    @property
    def baseline(self) -> str:
        """The published model with the same cell; for a row of a published model its own name."""
        model = self.model.removesuffix(", henaff")
        for stair, plain_name in (("sRNN (exponential)", "expRNN"), ("sRNN (non-normal)", "nnRNN"),
                                  ("sRNN", "RNN-Orth")):
            if model.startswith(stair):
                return plain_name + model.removeprefix(stair)
        return model

    @property
    def cell(self) -> str:
        """The cell, with or without a stair: the published model's name and the start."""
        return self.baseline + (", henaff" if self.model.endswith(", henaff") else "")

    def command(self, seed: int | None = None) -> list[str]:
        """The command line, without the interpreter."""
        return [f"{self.script}.py", *self.flags, *(["--seed", str(seed)] if seed is not None else [])]

    def takes(self, flag: str) -> bool:
        """Whether the row's script has the flag `flag`, spelled without dashes in front."""
        return flag.replace("-", "_") in {**flags.SHARED, **flags.FROM_ROW, **flags.published(*self.place)[0]}

    @property
    def place(self) -> tuple[str, str]:
        """The names of the task's module and of the kind of stair."""
        task, kind = self.script.split("_")
        return TASKS[task].NAME, kind

    def options(self, seed: int) -> dict:
        """What the command resolves to, as a run's config.json holds it."""
        task, _ = self.script.split("_")
        resolved = flags.parse(self.command(seed)[1:], self.script, "", *flags.published(*self.place), TASKS[task])
        return flags.science({name: {"value": plain(getattr(resolved, name)), "origin": origin}
                              for name, origin in resolved.origin.items()})


def rows_of(task: str, extra: list[str]) -> list[Row]:
    """Every row of a task's table; `extra` flags are added to each command."""
    rows = []
    for kind, with_stair in (("nvar", False), ("nvar", True), ("alpha", True), ("expalpha", True)):
        script = f"{task}_{kind}"
        stairs = [s for s in SCHEDULES if s != "none"] if kind == "nvar" else [kind]
        for names, row in flags.published(TASKS[task].NAME, kind)[1].items():
            if with_stair and "nvar" in row:
                continue
            model = names.split(" / ")[with_stair and kind == "nvar"]
            nets = row["net_type"] if isinstance(row["net_type"], tuple) else (row["net_type"],)
            lengths = [row["bptt"]] if "bptt" in row else [150, 300] if task == "language" else [None]
            for stair, bptt in itertools.product(stairs if with_stair else ["none"], lengths):
                typed = ["--net-type", nets[-1 if with_stair else 0]]
                typed += ["--nvar", stair] if kind == "nvar" else []
                typed += ["--bptt", str(bptt)] if bptt else []
                typed += ["--permute"] if task == "sMNIST" else []
                name = model.removesuffix(" 300") + (" 300" if bptt == 300 else "")
                rows.append(Row(script, name, stair, [*typed, *extra]))
                if row["rinit"] == "random":
                    rows.append(Row(script, f"{name}, henaff", stair, [*typed, "--rinit", "henaff", *extra]))
                if hidden := PUBLISHED_SIZES.get(task, {}).get(model):
                    rows.append(Row(script, f"{name}, H {hidden}", stair, [*typed, *extra, "--nhid", str(hidden)]))
    other = {word[2:].partition("=")[0].replace("-", "_") for word in extra} & SIZES
    for row in rows:
        row.as_published = not other
    return rows


def small_rows(task: str, extra: list[str]) -> list[Row]:
    """The rows of a task's table at a size for two cores; all rows of the copying task, which is small as published."""
    rows = rows_of(task, [word for flag, value in SMALL[task].items() for word in (f"--{flag}", str(value))] + extra)
    return [row for row in rows if not SMALL[task] or (row.cell in SMALL_CELLS and row.stair in SMALL_STAIRS)
            or row.name == "LSTM none"]


def select(rows: list[Row], only: list[str] | None) -> list[Row]:
    """The rows that the texts `only` pick, all rows without texts. A text picks the row of this name, or else all rows
    whose names hold it.

    Raises UserError for a text that no row holds, which is most likely misspelled.
    """
    if not only:
        return rows
    names = {row.name for row in rows}
    for text in only:
        if not any(text in name for name in names):
            near = [f"'{name}'" for name in nearest(text, names, most=3)]
            raise UserError(f"no row holds '{text}'; "
                                + (f"near it are {', '.join(near)}" if near else "the table without --only shows all"))
    return [row for row in rows if any(text == row.name or (text not in names and text in row.name) for text in only)]


def vary(task: str, flag: str, values: list[str], extra: list[str], only: list[str] | None) -> dict[str, list[Row]]:
    """{value: the task's rows with this value of a flag}; rows whose script has no such flag are left out."""
    columns = {value: [row for row in select(rows_of(task, [*extra, f"--{flag}", value]), only) if row.takes(flag)]
               for value in values}
    if not any(columns.values()):
        raise UserError(f"no row that was asked for has a flag --{flag}; the flags of a script: "
                            f"python {task}_nvar.py --help")
    return columns


def find_runs(rows: list[Row], seeds, *folders: Path, data: str | None = None) -> None:
    """Give every row the folders of its runs below `folders`; of several with the same values, the first finished one.

    A run on other data than the published counts only where `data` names their folder.
    """
    found = {}
    for run, config in records_below(*folders):
        differences = differences_of(config)
        if differences == ["other data"] and data and config["data"].get("path") == str(Path(data).absolute()):
            differences = []
        if not differences and own_stair(config) is None and is_current(config):
            science = json.dumps(flags.science(config["options"]), sort_keys=True)
            key = (config["script"], science)
            if key not in found or ((run / "result.json").exists() and not (found[key] / "result.json").exists()):
                found[key] = run
    for row in rows:
        for seed in seeds:
            key = (row.script, json.dumps(row.options(seed), sort_keys=True))
            if key in found:
                row.runs[seed] = found[key]


def own_rows(task: str, seeds, *folders: Path) -> list[Row]:
    """A row for the runs of each script, stair or edit of one's own below `folders`, under its own name."""
    rows = {}
    for run, config in records_below(*folders):
        differences, stair = differences_of(config), own_stair(config)
        if not (differences or stair) or task_of(config) != TASKS[task].NAME or not is_current(config):
            continue
        options = {name: entry["value"] for name, entry in config["options"].items()}
        science_ = {name: value for name, value in flags.science(config["options"]).items() if name != "random_seed"}
        key = (config["script"], stair, *differences, json.dumps(science_, sort_keys=True))
        model = ", ".join([config["row"], *differences])
        row = rows.setdefault(key, Row(config["script"], model, stair_of(config), [], own=True))
        if options["random_seed"] in seeds:
            row.runs[options["random_seed"]] = run
    return [row for row in rows.values() if row.runs]


def records_below(*folders: Path) -> list[tuple[Path, dict]]:
    """(folder, config.json) of every run below each of `folders`."""
    return [(path.parent, read_config(path.parent))
            for folder in folders for path in sorted(Path(folder).glob("*/*/config.json"))]


def is_current(config: dict) -> bool:
    """Whether the run's options compute today what they computed then. A record without a number is of revision 1."""
    task = next((task for task in TASKS.values() if task_of(config) == task.NAME), None)
    number, cell = config.get("revision", 1), config["options"]["net_type"]["value"]
    return task is not None and (number == task.REVISION or cell in task.AS_BEFORE.get(number, ()))


def task_of(config: dict) -> str:
    """The task's name; an older record names the task in its script only."""
    return config.get("task") or config["script"].split("_")[0].lower()


def stair_of(config: dict) -> str:
    """The name of a run's stair: a class of one's own, a schedule, or the kind that is learned."""
    options = config["options"]
    schedule = options.get("nvar", {}).get("value")
    return own_stair(config) or schedule or kind_of(options)


def differences_of(config: dict) -> list[str]:
    """What makes a run none of a published row, whatever its options: its script, its data, edited files."""
    task, _, kind = config["script"].partition("_")
    found = [] if task in TASKS and kind in KINDS else [f"{config['script']}.py"]
    if isinstance(config.get("data"), dict) and config["data"].get("official") is False:
        found.append("other data")
    if config.get("edited_files"):
        values = [f"{name}={entry['value']}" for name, entry in config["options"].items()
                  if entry["origin"] == "edited"]
        found.append(" ".join(["edited", ", ".join(config["edited_files"]), *values]))
    return found


# ── what a run says ──────────────────────────────────────────────────────────────────────────────────────


def epochs_of(folder: Path) -> list[dict]:
    """The rows of the log that end an epoch: those with a validation, and with losses that are finite.

    The copying task has no epochs.
    """
    return [row for row in log_rows(folder)
            if row.get("validation_accuracy") is not None and not any(is_not_finite(*cell) for cell in row.items())]


def how_far(folder: Path) -> str:
    """The place that an unfinished run has reached."""
    rows, options = log_rows(folder), read_config(folder)["options"]
    if not rows:
        return "started"
    if "update" in rows[-1]:
        return f"update {rows[-1]['update']:.0f}"
    if is_diverged(folder):
        return f"batch {rows[-1]['batch']:.0f} of epoch {rows[-1]['epoch']:.0f}"
    return f"epoch {len(epochs_of(folder))} of {options['epochs']['value']}"
