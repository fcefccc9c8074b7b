"""The rows of the published tables, and the runs that belong to them.

A task's rows are those of its scripts' PAPER: baselines with --nvar none, sRNN rows with every schedule, with a
learned and with an exponential stair; rows of a free matrix that starts orthogonal twice, as published and from
henaff; rows whose published curve has another number of hidden units twice. A run belongs to a row when its
config.json holds the values that the row's command resolves to, wherever its folder lies and whatever it is called.
"""

import difflib
import importlib
import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path

from common import copytask, language, smnist
from common.errors import UserError
from common.runs import flags
from common.runs.records import is_not_finite, log_rows, plain, read_config
from common.stair import SCHEDULES

TASKS = ("copytask", "sMNIST", "language")
STAIRS = ("nvar", "alpha", "expalpha")
SEEDS = (400, 401, 402, 403, 404)
RUNS = Path("results/runs")
REVISIONS = {"copytask": copytask.REVISION, "sMNIST": smnist.REVISION, "language": language.REVISION}
PUBLISHED_SIZES = {"copytask": {"expRNN": 176, "LSTM": 63}}  # H of published curves where the table has another H
NOT_SCIENCE = ("save", "name", "resume", "threads", "cuda", "tf32", "engine", "data", "log_interval", "save_freq")


@dataclass
class Row:
    """A line of a table: a model with a stair, and the flags that make it."""

    script: str
    model: str
    stair: str
    flags: list
    runs: dict = field(default_factory=dict)  # seed → folder

    @property
    def name(self) -> str:
        return f"{self.model} {self.stair}"

    @property
    def baseline(self) -> str:
        """The published model with the same cell, its own name where the row is one."""
        model = self.model.removesuffix(", henaff")
        for stair, plain_name in (("sRNN (exponential)", "expRNN"), ("sRNN (non-normal)", "nnRNN"),
                                  ("sRNN", "RNN-Orth")):
            if model.startswith(stair):
                return plain_name + model.removeprefix(stair)
        return model

    @property
    def cell(self) -> str:
        """What it shares with the same network without a stair: the published model's name and the start."""
        return self.baseline + (", henaff" if self.model.endswith(", henaff") else "")

    def command(self, seed: int | None = None) -> list[str]:
        """The command line, without the interpreter."""
        return [f"{self.script}.py", *self.flags, *(["--seed", str(seed)] if seed is not None else [])]

    def takes(self, flag: str) -> bool:
        """Whether the row's script has the flag `flag`, spelled without dashes in front."""
        defaults = importlib.import_module(self.script).DEFAULTS
        return flag.replace("-", "_") in {**flags.SHARED, **flags.FROM_PAPER, **defaults}

    def options(self, seed: int) -> dict:
        """What the command resolves to, as a run's config.json holds it."""
        module = importlib.import_module(self.script)
        resolved = flags.parse(self.command(seed)[1:], self.script, module.__doc__, module.DEFAULTS, module.PAPER)
        return science({name: {"value": plain(getattr(resolved, name)), "origin": origin}
                        for name, origin in resolved.origin.items()})


def science(options: dict) -> dict:
    """The values that decide what is computed, of options as config.json holds them."""
    return {name: entry["value"] for name, entry in options.items()
            if name not in NOT_SCIENCE and entry["origin"] != "not used" and entry["value"] is not None}


def rows_of(task: str, extra: list[str]) -> list[Row]:
    """Every row of a task's table; `extra` flags are added to each command."""
    rows = []
    for kind in STAIRS:
        script = f"{task}_{kind}"
        module = importlib.import_module(script)
        for model, row in module.PAPER.items():
            nets = row["net_type"] if isinstance(row["net_type"], tuple) else (row["net_type"],)
            stairs = [row["nvar"]] if "nvar" in row else [s for s in SCHEDULES if s != "none"]
            lengths = [row["bptt"]] if "bptt" in row else [150, 300] if task == "language" else [None]
            for stair, bptt in itertools.product(stairs if kind == "nvar" else [kind], lengths):
                flags = ["--net-type", nets[0]]
                flags += ["--nvar", stair] if kind == "nvar" else []
                flags += ["--bptt", str(bptt)] if bptt else []
                flags += ["--permute"] if task == "sMNIST" else []
                name = model.removesuffix(" 300") + (" 300" if bptt == 300 else "")
                rows.append(Row(script, name, stair, [*flags, *extra]))
                if row["rinit"] == "random":
                    rows.append(Row(script, f"{name}, henaff", stair, [*flags, "--rinit", "henaff", *extra]))
                if hidden := PUBLISHED_SIZES.get(task, {}).get(model):
                    rows.append(Row(script, f"{name}, H {hidden}", stair, [*flags, *extra, "--nhid", str(hidden)]))
    return rows


def select(rows: list[Row], only: list[str] | None) -> list[Row]:
    """The rows called one of the texts `only`, or that hold one which is no row's whole name; all without texts.

    Raises UserError for a text that no row holds: a row left out for a slip of the keyboard would not be missed.
    """
    if not only:
        return rows
    names = {row.name for row in rows}
    for text in only:
        if not any(text in name for name in names):
            near = [f"'{name}'" for name in difflib.get_close_matches(text, names, n=3, cutoff=0.4)]
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


def find_runs(rows: list[Row], seeds, folder: Path) -> None:
    """Give every row the folders of its runs below `folder`; of several with the same values, a finished one.

    A run whose task has another REVISION by now computed something else. A record without the number is of the first.
    """
    found = {}
    for config_path in sorted(Path(folder).glob("*/*/config.json")):
        config = read_config(config_path.parent)
        key = (config["script"], config.get("revision", 1), json.dumps(science(config["options"]), sort_keys=True))
        if key not in found or (config_path.parent / "result.json").exists():
            found[key] = config_path.parent
    for row in rows:
        for seed in seeds:
            key = (row.script, REVISIONS[row.script.split("_")[0]], json.dumps(row.options(seed), sort_keys=True))
            if key in found:
                row.runs[seed] = found[key]


# ── what a run says ──────────────────────────────────────────────────────────────────────────────────────


def epochs_of(folder: Path) -> list[dict]:
    """The rows of the log that end an epoch: those with a validation, and with losses that are finite.

    The copying task has no epochs.
    """
    return [row for row in log_rows(folder)
            if row.get("validation_accuracy") is not None and not any(is_not_finite(*cell) for cell in row.items())]


def diverged(folder: Path) -> bool:
    """Whether an unfinished run ended in a loss that is not finite: it would again, so it is not gone on with.

    Where the losses were finite to the last and the weights no more, the log does not show it: such a run counts as
    unfinished, and stops at the same place when it is resumed.
    """
    return any(is_not_finite(name, value) for row in log_rows(folder)[-1:] for name, value in row.items())


def how_far(folder: Path) -> str:
    """The place that an unfinished run has reached."""
    rows, options = log_rows(folder), read_config(folder)["options"]
    if not rows:
        return "started"
    if "update" in rows[-1]:
        return f"update {rows[-1]['update']:.0f}"
    if diverged(folder):
        return f"batch {rows[-1]['batch']:.0f} of epoch {rows[-1]['epoch']:.0f}"
    return f"epoch {len(epochs_of(folder))} of {options['epochs']['value']}"
