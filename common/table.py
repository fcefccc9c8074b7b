"""The published tables beside ours: which runs they need, which are there, and what those say.

    python -m common.table copytask                     the table, from the runs in results/runs
    python -m common.table copytask --list              the commands of its runs, one a line, for a scheduler
    python -m common.table copytask --run --jobs 2      run what is missing, resume what is unfinished
    python -m common.table sMNIST --only "expRNN" --seeds 400 --with='--epochs 5'

A task's rows are those of its scripts' PAPER: baselines with --nvar none, sRNN rows with every schedule, with a
learned and with an exponential stair; rows of a free matrix that starts orthogonal twice, as published and from
henaff. A run belongs to a row when its config.json holds the values that the row's command resolves to, wherever
its folder lies and whatever it is called. Numbers come from result.json alone.
"""

import argparse
import importlib
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from common import cli
from common.run import plain, read_config
from common.stair import SCHEDULES

TASKS = ("copytask", "sMNIST", "language")
STAIRS = ("nvar", "alpha", "expalpha")
SEEDS = (400, 401, 402, 403, 404)
RUNS = Path("results/runs")
NOT_SCIENCE = ("save", "name", "resume", "threads", "cuda", "tf32", "engine", "data", "log_interval", "save_freq")

# Kerg et al. 2019 (arXiv 1905.12080), figure 4 and table 4 of the supplement. No result of the sRNN paper is known.
PUBLISHED = {
    "copytask": {"RNN": "0.0945", "RNN-Orth": "0.0016", "expRNN": "0.0003 (H 176)", "nnRNN": "0.0018",
                 "LSTM": "0.0945"},
    "sMNIST": {"RNN": "82.5", "RNN-Orth": "95.3", "expRNN": "96.1 (H 722)", "nnRNN": "94.9", "LSTM": "90.9 (H 257)"},
    "language": {"RNN": "40.01", "RNN-Orth": "66.29", "expRNN": "67.51", "nnRNN": "68.78", "RNN 300": "39.97",
                 "RNN-Orth 300": "65.53", "expRNN 300": "66.89", "nnRNN 300": "68.52"},
}
MEASURE = {
    "copytask": ("loss", "recall", "loss over the last 50 updates", 1, ".4f"),
    "sMNIST": ("test_accuracy", "validation_accuracy", "test accuracy, %", 100, ".2f"),
    "language": ("test_accuracy", "test_bits_per_character", "test accuracy, %", 100, ".2f"),
}


@dataclass
class Row:
    """A line of a table: a model with a stair, and the flags that make it."""

    script: str
    model: str
    stair: str
    flags: list
    runs: dict = field(default_factory=dict)  # seed → folder

    def command(self, seed: int | None = None) -> list[str]:
        """The command line, without the interpreter."""
        return [f"{self.script}.py", *self.flags, *(["--seed", str(seed)] if seed is not None else [])]

    def options(self, seed: int) -> dict:
        """What the command resolves to, as a run's config.json holds it."""
        module = importlib.import_module(self.script)
        resolved = cli.parse(self.command(seed)[1:], self.script, module.__doc__, module.DEFAULTS, module.PAPER)
        return science({name: plain(getattr(resolved, name)) for name in resolved.origin})


def science(options: dict) -> dict:
    """The options that decide what is computed."""
    return {name: value for name, value in options.items() if name not in NOT_SCIENCE}


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
    return rows


def select(rows: list[Row], only: str | None) -> list[Row]:
    """The rows whose "model stair" holds the text `only`; all without one."""
    return [row for row in rows if only is None or only in f"{row.model} {row.stair}"]


def find_runs(rows: list[Row], seeds, folder: Path) -> None:
    """Give every row the folders of its runs below `folder`; of several with the same values, a finished one."""
    found = {}
    for config_path in sorted(Path(folder).glob("*/*/config.json")):
        config = read_config(config_path.parent)
        options = science({name: entry["value"] for name, entry in config["options"].items()})
        key = (config["script"], json.dumps(options, sort_keys=True))
        if key not in found or (config_path.parent / "result.json").exists():
            found[key] = config_path.parent
    for row in rows:
        for seed in seeds:
            key = (row.script, json.dumps(row.options(seed), sort_keys=True))
            if key in found:
                row.runs[seed] = found[key]


def result(folder: Path) -> dict | None:
    """result.json of a run, None if it is not finished."""
    path = folder / "result.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def how_far(folder: Path) -> str:
    """The place that an unfinished run has reached."""
    log = folder / "log.csv"
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    if len(lines) < 2:
        return "started"
    last = dict(zip(lines[0].split(","), lines[-1].split(","), strict=True))
    return f"update {last['update']}" if "update" in last else f"epoch {last['epoch']}"


def mean_and_deviation(values: list[float], scale: float, form: str) -> str:
    values = [scale * value for value in values]
    deviation = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{deviation}"


def table(task: str, rows: list[Row], short: bool = False) -> str:
    """The table as Markdown; `short` leaves out the command, the device and the rows that were not run."""
    main, beside, title, scale, form = MEASURE[task]
    columns = ["model", "stair", "published", f"ours: {title} (mean ± std, n)", beside.replace("_", " "), "best epoch",
               "time a run", "command", "device"]
    lines = []
    for row in rows:
        results = {seed: result(folder) for seed, folder in row.runs.items()}
        done = [r for r in results.values() if r is not None]
        open_ones = [how_far(row.runs[seed]) for seed, r in results.items() if r is None]
        ours = f"{mean_and_deviation([r[main] for r in done], scale, form)}, n = {len(done)}" if done else "not run"
        if open_ones:
            ours += f" (unfinished: {', '.join(open_ones)})"
        epochs = sorted({r["best_epoch"] for r in done if "best_epoch" in r})
        line = [row.model, row.stair, PUBLISHED[task].get(row.model.replace(", henaff", ""), "none known"), ours,
                mean_and_deviation([r[beside] for r in done], 1, ".4f") if done else "",
                "–".join(map(str, (epochs[0], epochs[-1]) if len(epochs) > 1 else epochs)),
                f"{statistics.median([r['seconds'] for r in done]):.0f} s" if done else "",
                f"`{shlex.join(row.command())}`", ", ".join(sorted({r["device"] for r in done}))]
        if done or open_ones or not short:
            lines.append(line)
    if short:
        wanted = [i for i, name in enumerate(columns[:7]) if name != "best epoch" or any(line[i] for line in lines)]
        columns, lines = [columns[i] for i in wanted], [[line[i] for i in wanted] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in [columns, ["---"] * len(columns), *lines])


def missing(rows: list[Row], seeds, folder: Path, threads: int, more: list[str]) -> list[list[str]]:
    """The commands that would finish the table: a new run, or --resume for one that is not finished."""
    commands = []
    for seed in seeds:  # one seed of everything first
        for row in rows:
            if seed not in row.runs:
                commands.append([*row.command(seed), "--save", str(folder), "--threads", str(threads), *more])
            elif result(row.runs[seed]) is None:
                commands.append([f"{row.script}.py", "--resume", str(row.runs[seed]), "--threads", str(threads)])
    return commands


def run_all(commands: list[list[str]], jobs: int) -> int:
    """Run the commands, `jobs` at a time, in this folder; → how many failed. Ctrl-C lets each save and stop."""
    waiting, running, failed, done = list(commands), [], 0, 0
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                command = waiting.pop(0)
                process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL,
                                           stderr=subprocess.PIPE, text=True)
                running.append((process, command))
            time.sleep(0.2)
            for process, command in [pair for pair in running if pair[0].poll() is not None]:
                running.remove((process, command))
                done += 1
                errors = process.stderr.read().strip()
                failed += process.returncode != 0
                state = "done" if process.returncode == 0 else f"FAILED ({errors.splitlines()[-1] if errors else ''})"
                print(f"{done}/{len(commands)} {shlex.join(command)}: {state}", flush=True)
    except KeyboardInterrupt:
        print("stopping: every run saves first", flush=True)
        for process, _ in running:
            process.wait()
        raise cli.UserError("stopped; the same command goes on", 130) from None
    return failed


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m common.table", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--run", action="store_true", help="run what is missing, then print the table")
    parser.add_argument("--list", action="store_true", help="print the missing commands, one a line, and stop")
    parser.add_argument("--short", action="store_true", help="without commands, devices and rows that were not run")
    parser.add_argument("--only", help="rows whose model and stair hold this text, as in 'expRNN' or 'sRNN expn'")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="default: 400 to 404")
    parser.add_argument("--jobs", type=cli.number(int, 1), default=1, help="runs at a time (default: %(default)s)")
    parser.add_argument("--with", dest="extra", default="", metavar="FLAGS",
                        help="flags added to every command, as in --with='--T 500'")
    parser.add_argument("--data", help="data folder of the runs")
    parser.add_argument("--cuda", action="store_true", help="run on the GPU")
    parser.add_argument("--save", type=Path, default=RUNS, help="where runs are (default: %(default)s)")
    parser.add_argument("-o", "--output", type=Path, help="write the table to this file too")
    args = parser.parse_args(argv)

    rows = select(rows_of(args.task, shlex.split(args.extra)), args.only)
    find_runs(rows, args.seeds, args.save)
    more = [*(["--data", args.data] if args.data else []), *(["--cuda"] if args.cuda else [])]
    commands = missing(rows, args.seeds, args.save, max(1, (os.cpu_count() or 1) // args.jobs), more)
    if args.list:
        print("\n".join(shlex.join(["python", *command]) for command in commands))
        return
    failed = run_all(commands, args.jobs) if args.run else 0
    find_runs(rows, args.seeds, args.save)
    text = table(args.task, rows, args.short)
    print(text, end="")
    if args.output:
        args.output.write_text(text, encoding="utf-8")
    if failed:
        raise cli.UserError(f"{failed} of {len(commands)} runs failed; their sentences stand above", 1)


if __name__ == "__main__":
    cli.start(main)
