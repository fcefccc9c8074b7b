"""Tables as Markdown: a row a model, a column a value of a flag, a grid of stair by cell, differences, curves.

Only runs that have ended count. ± is the standard deviation over seeds.
"""

import argparse
import math
import shlex
import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from common.errors import printable
from common.runs import flags
from common.runs.records import is_diverged, log_rows, read_result
from evidence import published
from evidence.rows import GAIN, SMALL, SMALL_GRID, TASKS, Row, add_row_options, find_runs, rows_asked_for, rows_at


class Measure(NamedTuple):
    """A number of result.json, and how a column shows it."""

    key: str
    title: str
    scale: float = 1
    form: str = ".4f"

    def cell(self, results: list[dict]) -> str:
        """As in 0.0012 ± 0.0003; empty without values. Values from 10,000 on are shown as in 1.2e+04."""
        values = [self.scale * result[self.key] for result in results if self.key in result]
        form = self.form if all(abs(value) < 1e4 for value in values) else ".1e"
        deviation = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
        return f"{statistics.mean(values):{form}}{deviation}" if values else ""


TEST = Measure("test_accuracy", "test accuracy, %", 100, ".2f")
VALIDATION = Measure("validation_accuracy", "validation accuracy, %", 100, ".2f")
MEASURES = {  # the first of a task is its main one
    "copytask": [Measure("loss", "loss over the last 50 updates"), Measure("recall", "recall")],
    "sMNIST": [TEST, VALIDATION],
    "language": [TEST, Measure("test_bits_per_character", "test bits per character"), VALIDATION,
                 Measure("validation_loss", "validation bits per character", 1 / math.log(2))],
}
NO_MEASURE = {"updates", "epochs", "best_epoch", "averaged_over", "memoryless_loss", "parameters", "seconds", "threads"}
TASK_TITLES = {"copytask": "copying memory", "sMNIST": "permuted MNIST", "language": "characters"}
WITHOUT = ("command", "device")  # the columns that --short leaves out
LEVEL = 0.05  # of a test
CURVE_UPDATES = (200, 400, 800, 1500)  # the ends of the reports that stand beside the published curves


def measures_of(rows: list[Row]) -> list[Measure]:
    """The measures of a table's rows; of a task of one's own every number in its results."""
    if rows and rows[0].task in TASKS:
        return MEASURES[rows[0].task]
    names = dict.fromkeys(name for row in rows for result in row.results for name, value in result.items()
                          if isinstance(value, (int, float)) and name not in NO_MEASURE)
    return [Measure(name, name.replace("_", " ")) for name in names] or [Measure("", "score")]


def middle(results: list[dict]) -> str:
    """The median over seeds of the last report's median loss: no spike moves it. Empty for other tasks."""
    medians = [result["loss_median"] for result in results if result.get("loss_median") is not None]
    return Measure("median", "").cell([{"median": statistics.median(medians)}]) if medians else ""


def counted(row: Row) -> str:
    """How many runs a row has: n = 3 of 5, 1 diverged."""
    if not row.runs:
        return "not run"
    ended, gone = len(row.results), sum(read_result(run) is None and is_diverged(run) for run in row.runs.values())
    some = f"n = {ended}" + f" of {len(row.runs)}" * (len(row.runs) > ended)
    return (some if ended or gone else "not finished") + f", {gone} diverged" * bool(gone)


def line_of(row: Row, measures: list[Measure]) -> dict[str, str]:
    """A row of the table as {column: cell}."""
    results = row.results
    best = sorted({r["best_epoch"] for r in results if "best_epoch" in r})
    times = [r["seconds"] for r in results if "seconds" in r]
    main, *others = measures
    return {
        "model": row.model, "stair": row.stair,
        published.VALUE_TITLE.get(row.task, "published"): row.value,
        f"ours: {main.title} (mean ± std, n)": ", ".join(filter(None, [main.cell(results), counted(row)])),
        "median": middle(results),
        **{measure.title: measure.cell(results) for measure in others},
        "best epoch": "–".join(map(str, best if len(best) < 2 else (best[0], best[-1]))),
        "time a run": f"{statistics.median(times):.0f} s" if times else "",
        "command": f"`{shlex.join(row.command())}`" if not row.why_no_command else f"none: {row.why_no_command}",
        "device": ", ".join(sorted({r.get("device") or "" for r in results})),
    }


def markdown(lines: list[dict]) -> str:
    """Lines as a Markdown table, without the columns that are empty in all of them.

    No text, which may come from somebody else's record, ends a cell or starts a tag.
    """
    names = dict.fromkeys(name for line in lines for name in line)
    columns = [name for name in names if any(line.get(name) for line in lines)] or ["not run"]
    cells = [columns, ["---"] * len(columns), *(
        [printable(line.get(name, "")).replace("|", "\\|").replace("<", "&lt;") for name in columns] for line in lines)]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def table(rows: list[Row], short: bool = False) -> str:
    """The table as Markdown; `short` leaves out the command, the device and the rows without a run that has ended."""
    shown = [row for row in rows if not short or row.results]
    measures = measures_of(shown)
    return markdown([{name: cell for name, cell in line_of(row, measures).items() if not short or name not in WITHOUT}
                     for row in shown])


def score(row: Row, main: Measure) -> str:
    """What a row's runs say, in one cell: the measure; beside a loss of the copying task the median and the recall.

    As in 0.0123 ± 0.0020, median 0.0018; recall 0.900 ± 0.010; n = 3 of 5, 1 diverged.
    """
    results, parts = row.results, [main.cell(row.results)]
    if main.key == "loss" and results and "recall" in results[0]:
        parts = [", median ".join(filter(None, [parts[0], middle(results)])),
                 f"recall {Measure('recall', '', form='.3f').cell(results)}"]
    return "; ".join(filter(None, [*parts, counted(row)]))


def vary_table(name: str, columns: dict[str, list[Row]], short: bool = False) -> str:
    """A column a value of the flag `name`: columns[value] holds the same rows, run with that value."""
    main = measures_of([row for rows in columns.values() for row in rows])[0]
    lines = [{"model": rows[0].model, "stair": rows[0].stair,
              **{f"{name} {value}": score(row, main) for value, row in zip(columns, rows, strict=True)}}
             for rows in zip(*columns.values(), strict=True) if not short or any(row.runs for row in rows)]
    memoryless = {f"{name} {value}": f"{r['memoryless_loss']:.4f}" for value, rows in columns.items()
                  for row in rows for r in row.results if "memoryless_loss" in r}
    if memoryless:  # it depends on T, and shows how good a loss is
        lines.append({"model": "a memoryless model"} | memoryless)
    median = "; median: over the seeds, of the median loss of the last report; recall" * bool(memoryless)
    return f"{markdown(lines)}\nEach entry: {main.title}, mean ± standard deviation over n seeds{median}.\n"


@dataclass
class Difference:
    """mean a − mean b, its 95 % interval (not a number with one seed), and whether it holds in its family."""

    mean: float
    low: float = math.nan
    high: float = math.nan
    p: float = 1.0
    holds: bool = False


def difference(a: list[float], b: list[float]) -> Difference:
    """The difference of the means of `a` and `b`, not yet judged."""
    mean = statistics.mean(a) - statistics.mean(b)
    if min(len(a), len(b)) < 2 or len({*a}) == len({*b}) == 1:
        return Difference(mean)
    from scipy import stats  # here: its import takes as long as a table

    found = stats.ttest_ind(a, b, equal_var=False)
    return Difference(mean, *map(float, found.confidence_interval(1 - LEVEL)), float(found.pvalue))


def is_within(value: float, sample: list[float]) -> bool:
    """Whether `value` lies in the 95 % t interval of the mean of `sample`."""
    from scipy import stats

    return bool(stats.ttest_1samp(sample, value).pvalue >= LEVEL)


def judged(pairs: dict) -> dict[object, Difference]:
    """{name: (a, b)} → {name: the difference}, with Holm's adjustment over all that have an interval.

    Of m comparisons, taken by their p values from the smallest on, the k-th (from 0) holds where p < 0.05 / (m − k) and
    all before it hold. Then the chance that any of the differences said to hold is none is at most 5 %.
    """
    found = {name: difference(*pair) for name, pair in pairs.items() if all(pair)}
    family = sorted((d for d in found.values() if not math.isnan(d.low)), key=lambda d: d.p)
    for place, one in enumerate(family):
        if one.p >= LEVEL / (len(family) - place):
            break
        one.holds = True
    return found


def gains_of(rows: list[Row]) -> dict[str, Difference]:
    """{name of a row with a stair: how much more it reaches than the plain network of its cell}, as one family.

    In points of 100. Rows without a run that has ended, or without one of the plain network, are left out.
    """
    def scores(row):
        return [100 * result[GAIN[row.task]] for result in row.results]

    plain = {(row.task, row.cell): scores(row) for row in rows if row.stair == "none"}
    return judged({(row.task, row.name): (scores(row), plain.get((row.task, row.cell), []))
                   for row in rows if row.stair != "none"})


def shown_gain(gain: Difference | None) -> str:
    """As in **+0.90 (0.31 … 1.49)**, bold where it holds."""
    if gain is None:
        return "not run"
    interval = "" if math.isnan(gain.low) else f" ({gain.low:+.2f} … {gain.high:+.2f})"
    return f"**{gain.mean:+.2f}{interval}**" if gain.holds else f"{gain.mean:+.2f}{interval}"


def family_note(gains: dict) -> str:
    compared = sum(not math.isnan(gain.low) for gain in gains.values())
    return f"\nIn brackets the 95 % interval. Bold: holds after Holm's adjustment for {compared} comparisons.\n"


def grid_table(rows: list[Row], short: bool = False) -> str:
    """A line a stair, a column a cell, to see which stair does best on which.

    `short` leaves out the cells and the stairs of which no row was run.
    """
    rows = [row for row in rows if row.source not in published.AUTHORS]
    if short:
        run = [row for row in rows if row.runs]
        rows = [row for row in rows if row.cell in {r.cell for r in run} and row.line in {r.line for r in run}]
    main = measures_of(rows)[0]
    there = {("none, published", row.cell): row.value for row in rows if row.stair == "none"}
    return grid({(row.line, row.cell): score(row, main) for row in rows} | (there if any(there.values()) else {}))


def grid(texts: dict[tuple[str, str], str]) -> str:
    """{(stair, cell): text} as a line a stair and a column a cell, in the order in which they come."""
    cells = dict.fromkeys(cell for _, cell in texts)
    return markdown([{"stair": stair, **{cell: texts.get((stair, cell), "") for cell in cells}}
                     for stair in dict.fromkeys(stair for stair, _ in texts)])


def differences_table(rows: list[Row]) -> str:
    """The grid of what the stairs gain, of the cells and the stairs that were run; the plain network in percent."""
    gains = gains_of([row for row in rows if row.source not in published.AUTHORS])
    shown = [row for row in rows if (row.task, row.name) in gains]
    plain = [row for row in rows if row.stair == "none" and row.cell in {r.cell for r in shown}]
    return grid({(row.stair, row.cell): in_percent(row) for row in plain}
                | {(row.line, row.cell): shown_gain(gains[row.task, row.name]) for row in shown}) + family_note(gains)


def in_percent(row: Row | None) -> str:
    """What a stair is to raise, in one cell."""
    return score(row, Measure(GAIN[row.task], "", 100, ".2f")) if row else "not run"


def title_of(task: str, small: bool) -> str:
    size = f" ({SMALL[task].removeprefix('--').replace(' --', ', ')})" if small and SMALL[task] else ""
    return f"{TASK_TITLES[task]}{size}: {GAIN[task].replace('_', ' ')}, %"


def paper_table(tables: dict[str, list[Row]], small: bool) -> str:
    """Which stair the authors name for a row, and what it gains beside the plain network with the same values."""
    rows = {(task, row.name): row for task, found in tables.items() for row in found}
    named = [(line, rows[task, line.name]) for task in tables for line in published.lines(task)
             if line.source in published.AUTHORS and line.stair != "none" and (task, line.name) in rows]
    plain = {(row.task, row.cell): row for row in rows.values() if row.stair == "none"}
    gains = gains_of([*plain.values(), *(row for _, row in named)])
    return markdown([{"task": title_of(line.task, small), "row": line.model, "stair": line.stair,
                      "named by": line.source, "typed": line.flags,
                      "plain network": in_percent(plain.get((line.task, row.cell))), "with the stair": in_percent(row),
                      "gain, points": shown_gain(gains.get((row.task, row.name)))} for line, row in named]) \
        + family_note(gains)


def best_table(tables: dict[str, list[Row]], small: bool) -> str:
    """A line a task and cell: the plain network beside the stair with the highest mean on this cell."""
    lines = []
    for task, rows in tables.items():
        ended = [row for row in rows if not row.source and row.results and (not small or row.cell in SMALL_GRID[0])]
        for plain in (row for row in ended if row.stair == "none"):
            if stairs := [row for row in ended if row.cell == plain.cell and row.stair != "none"]:
                best = max(stairs, key=lambda row: statistics.mean([r[GAIN[row.task]] for r in row.results]))
                lines.append({"task": title_of(task, small), "cell": plain.cell, "plain network": in_percent(plain),
                              "best stair": f"{best.stair}: {in_percent(best)}"})
    return markdown(lines)


def curves_table(rows: list[Row]) -> str:
    """The copying task beside the published curves: of both the median loss of the same 50 updates.

    The interval is that of the logarithms, because one seed's loss may be ten times another's.
    """
    lines = []
    for row in (row for row in rows if row.curve):
        logs = [{log["update"]: log["loss_median"] for log in log_rows(folder)} for folder in row.runs.values()
                if read_result(folder) is not None]
        for update in CURVE_UPDATES:
            there = published.published_loss(row.curve, update - 49, update)
            ours = [log[update] for log in logs  # whose report is of 50 updates
                    if update in log and max((k for k in log if k < update), default=0) == update - 50]
            line = {"row": row.model, "updates": f"{update - 49} to {update}", "published": f"{there:.4f}",
                    "ours: mean ± standard error": "not run"}
            if len(ours) > 1:
                error, median = statistics.stdev(ours) / math.sqrt(len(ours)), statistics.median(ours)
                is_inside = is_within(math.log(there), list(map(math.log, ours)))
                line |= {"ours: mean ± standard error": f"{statistics.mean(ours):.4f} ± {error:.4f}, n = {len(ours)}",
                         "median": f"{median:.4f}", "our median ÷ published": f"{median / there:.2f}",
                         "published within our 95 % interval": "yes" if is_inside else "no"}
            lines.append(line)
    return markdown(lines)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m evidence", formatter_class=argparse.RawDescriptionHelpFormatter)
    option, switch = parser.add_argument, partial(parser.add_argument, action="store_true")
    option("task", nargs="?", metavar="TASK", help=f"{', '.join(TASKS)}, or the path of your own script")
    switch("--update", help="write the tables and pictures of the pages anew")
    option("--collect", type=Path, nargs="+", metavar="FOLDER", help="copy the records of runs to --save")
    switch("--publish-code", help="from now on the code as it stands here counts as the project's own")
    switch("--run", help="run what is missing, then print the table")
    switch("--list", help="print the commands of all runs, one a line, and stop")
    switch("--missing", help="print the commands of the runs that are missing")
    switch("--short", help="without commands, devices and what was not run")
    switch("--grid", help="a line a stair, a column a cell")
    switch("--differences", help="what the stairs gain over the plain network, with 95 %% intervals")
    switch("--curves", help="the copying task beside the published curves")
    switch("--paper", help="which stair the authors name, and what it gains here")
    switch("--best", help="of every task, a line a cell: the plain network beside the best stair")
    add_row_options(parser)
    option("--jobs", type=flags.number(int, 1), default=1, help="runs at a time (default: %(default)s)")
    switch("--cuda", help="run on the GPU")
    option("-o", "--output", type=Path, help="write the table to this file too")
    return parser


def tables_asked_for(args) -> dict[str, list[Row]]:
    """The rows with their runs: a list for each value of --vary, each task of --best and --paper, or one."""
    if not (args.best or args.paper):
        return rows_asked_for(args.task, args)
    tables = {task: rows_at(task, args.small, []) for task in TASKS}
    for rows in tables.values():
        find_runs(rows, args.seeds, *args.save)
    return tables


def text_of(args) -> str:
    """The table that was asked for."""
    columns = tables_asked_for(args)
    if args.best or args.paper:
        return (best_table if args.best else paper_table)(columns, args.small)
    if args.vary:
        return vary_table(args.vary[0].lstrip("-"), columns, args.short)
    if args.curves or args.differences:
        return (curves_table if args.curves else differences_table)(columns[""])
    return (grid_table if args.grid else table)(columns[""], args.short)
