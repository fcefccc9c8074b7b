"""Tables as Markdown: a row a model, a column a value of a flag, a grid of stair by cell, the best stair of a cell."""

import argparse
import math
import shlex
import statistics
from collections import Counter
from pathlib import Path

from common.errors import UserError, printable
from common.runs import flags
from common.runs.records import is_diverged, read_result
from evidence.published import FINAL, FINAL_TITLE, validation_at
from evidence.rows import (
    RUNS,
    SEEDS,
    SMALL,
    TASKS,
    Row,
    epochs_of,
    find_runs,
    how_far,
    own_rows,
    rows_of,
    select,
    small_rows,
    vary,
)

# result.json's and log.csv's names → title, scale and digits of a column. The first of a task is its main one.
MEASURES = {
    "copytask": {"loss": ("loss over the last 50 updates", 1, ".4f"), "recall": ("recall", 1, ".4f")},
    "sMNIST": {"test_accuracy": ("test accuracy, %", 100, ".2f"),
               "validation_accuracy": ("validation accuracy, %", 100, ".2f")},
    "language": {"test_accuracy": ("test accuracy, %", 100, ".2f"),
                 "test_bits_per_character": ("test bits per character", 1, ".4f"),
                 "validation_accuracy": ("validation accuracy, %", 100, ".2f"),
                 "validation_loss": ("validation bits per character", 1 / math.log(2), ".4f")},
}
TASK_TITLES = {"copytask": "copying memory", "sMNIST": "permuted MNIST", "language": "characters"}
WITHOUT = ("command", "device")  # the columns that --short leaves out


def mean_and_deviation(values: list[float], scale: float, form: str) -> str:
    """As in 0.0012 ± 0.0003; empty without values. Values from 10,000 on are shown as in 1.2e+04."""
    values = [scale * value for value in values]
    form = form if all(abs(value) < 1e4 for value in values) else ".1e"
    deviation = f" ± {statistics.stdev(values):{form.removeprefix('+')}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{deviation}" if values else ""


def at_common_epoch(folders: list[Path]) -> list[dict]:
    """The log's row of every run at the last epoch that all of them have completed; empty before the first one.

    A run that diverged completes no more and is left out.
    """
    logs = [epochs_of(folder) for folder in folders if not is_diverged(folder)]
    last = min(map(len, logs), default=0)
    return [log[last - 1] for log in logs] if last else []


def split(row: Row) -> tuple[list[dict], list[Path]]:
    """The results of a row's finished runs, and the folders of the others."""
    results = {folder: read_result(folder) for folder in row.runs.values()}
    for folder, found in results.items():
        if found is not None and not {"loss", "recall"} <= found.keys() and "test_accuracy" not in found:
            raise UserError(f"{folder}/result.json is damaged (it holds no score); restore it from a copy or leave "
                            "this run out", 1)
    return [r for r in results.values() if r is not None], [folder for folder, r in results.items() if r is None]


def states(folders: list[Path]) -> str:
    """How far runs without a result have come: those that diverged, then those that are unfinished."""
    places = {"diverged": set(), "unfinished": set()}
    for folder in folders:
        places["diverged" if is_diverged(folder) else "unfinished"].add(how_far(folder))
    return "; ".join(f"{what}: {', '.join(sorted(found))}" for what, found in places.items() if found)


def line_of(task: str, row: Row) -> dict[str, str]:
    """A row of the table as {column: cell}."""
    done, unfinished = split(row)
    (main, (title, scale, form)), *others = MEASURES[task].items()
    shown = done or at_common_epoch(unfinished)
    if done:
        ours = f"{mean_and_deviation([r[main] for r in done], scale, form)}, n = {len(done)}"
        ours += f" ({states(unfinished)})" if unfinished else ""
    else:
        ours = f"**{states(unfinished)}**, n = {len(unfinished)}" if unfinished else "not run"
    best = sorted({r["best_epoch"] for r in done if "best_epoch" in r})
    epochs = {int(r.get("best_epoch", r.get("epoch", 0))) for r in shown}   # one, where a curve can be compared
    times = [r["seconds"] for r in shown if "seconds" in r]
    seconds = f"{statistics.median(times):.0f} s" if times else ""
    return {
        "model": row.model, "stair": row.stair,
        FINAL_TITLE[task]:
            FINAL[task].get(row.model.removesuffix(", henaff"), "none known") if row.as_published else "",
        f"ours: {title} (mean ± std, n)": ours,
        **{name: mean_and_deviation([r[key] for r in shown if key in r], scale, form)
           for key, (name, scale, form) in others},
        "published validation accuracy at that epoch, % (± standard error)":
            validation_at(row, *epochs) if task == "sMNIST" and len(epochs) == 1 else "",
        "best epoch": "–".join(map(str, best if len(best) < 2 else (best[0], best[-1]))),
        "time a run": seconds + (" so far" if seconds and not done else ""),
        "command": f"`{shlex.join(row.command())}`", "device": ", ".join(sorted({r.get("device") or "" for r in done})),
    }


def literal(cell: str) -> str:
    """A cell whose text, which may come from somebody else's record, ends no cell and starts no tag."""
    return printable(cell).replace("|", "\\|").replace("<", "&lt;")


def markdown(lines: list[dict]) -> str:
    """Lines with the same columns as a Markdown table, without the columns that are empty in all of them."""
    columns = [name for name in lines[0] if any(line[name] for line in lines)] if lines else ["no run is there"]
    cells = [columns, ["---"] * len(columns), *([literal(line[name]) for name in columns] for line in lines)]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def table(task: str, rows: list[Row], short: bool = False) -> str:
    """The table as Markdown; `short` leaves out the command, the device and the rows that were not run."""
    lines = [line_of(task, row) for row in rows if row.runs or not short]
    return markdown([{name: cell for name, cell in line.items() if not short or name not in WITHOUT}
                     for line in lines])


def score(task: str, row: Row) -> str:
    """What a row's runs say, in one cell: the main measure, in the copying task recall too, and how many runs.

    As in 0.0123 ± 0.0020; recall 0.900 ± 0.010; n = 3 of 5, 1 diverged. Empty without a run.
    """
    done, unfinished = split(row)
    if not done:
        return f"**{states(unfinished)}**" if unfinished else ""
    (main, (_, scale, form)), *_ = MEASURES[task].items()
    parts = [mean_and_deviation([r[main] for r in done], scale, form)]
    if task == "copytask":
        parts.append(f"recall {mean_and_deviation([r['recall'] for r in done], 1, '.3f')}")
    gone = sum(map(is_diverged, unfinished))
    parts.append(f"n = {len(done)}" + (f" of {len(row.runs)}" if unfinished else "") +
                 (f", {gone} diverged" if gone else ""))
    return "; ".join(parts)


def vary_table(task: str, name: str, columns: dict[str, list[Row]], short: bool = False) -> str:
    """A column a value of the flag `name`: columns[value] holds the same rows, run with that value."""
    lines = [{"model": rows[0].model, "stair": rows[0].stair,
              **{f"{name} {value}": score(task, row) for value, row in zip(columns, rows, strict=True)}}
             for rows in zip(*columns.values(), strict=True) if not short or any(row.runs for row in rows)]
    memoryless = {f"{name} {value}": f"{r['memoryless_loss']:.4f}" for value, rows in columns.items()
                  for row in rows for r in split(row)[0] if "memoryless_loss" in r}
    if memoryless:  # it depends on T, and shows how good a loss is
        lines.append(dict.fromkeys(lines[0], "") | {"model": "a memoryless model"} | memoryless)
    return markdown(lines)


def paired_cell(task: str, row: Row, plain: Row | None) -> str:
    """How much more a stair's runs reach than those of the same seeds without it: mean ± deviation over the seeds."""
    key, (_, scale, form) = next(iter(MEASURES[task].items()))
    ours, theirs = ({seed: result[key] for seed, folder in (r.runs if r else {}).items()
                     if (result := read_result(folder)) is not None} for r in (row, plain))
    pairs = [ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()]
    return f"{mean_and_deviation(pairs, scale, '+' + form)}; n = {len(pairs)}" if pairs else "not run"


def grid_table(task: str, rows: list[Row], short: bool = False, paired: bool = False) -> str:
    """A line a stair, a column a cell, to see which stair does best on which.

    `paired`: the differences from the same seeds without a stair in the place of the scores. `short` leaves out the
    cells and the stairs of which no row was run.
    """
    if short:
        run = [row for row in rows if row.runs]
        rows = [row for row in rows if row.cell in {r.cell for r in run} and row.stair in {r.stair for r in run}]
    lines = {stair: {"stair": stair, **{row.cell: "" for row in rows}}
             for stair in (*(row.stair for row in rows), "none, published")}
    plain = {row.cell: row for row in rows if row.stair == "none"}
    for row in rows:
        lines[row.stair][row.cell] = paired_cell(task, row, plain.get(row.cell)) if paired and row.stair != "none" \
            else score(task, row) or "not run"
        if row.stair == "none":
            lines["none, published"][row.cell] = FINAL[task].get(row.baseline, "") if row.as_published else ""
    return markdown([line for line in lines.values() if any(line[row.cell] for row in rows)])


def best_table(tables: dict[str, list[Row]], small: bool) -> str:
    """A line a task and cell: the plain network beside the stair that did best on this cell, and what was published.

    Best is the highest mean over the finished runs: of the recall in the copying task, of the test accuracy in the
    others.
    """
    lines = []
    for task, rows in tables.items():
        size = ", ".join(f"{flag} {value}" for flag, value in SMALL[task].items())
        title = f"{TASK_TITLES[task]} ({size})" if small and size else TASK_TITLES[task]
        main, (measured, _, _) = next(iter(MEASURES[task].items()))
        key, measured = ("recall", "loss; recall") if task == "copytask" else (main, measured)
        means = {row.name: statistics.mean([r[key] for r in done]) for row in rows if (done := split(row)[0])}
        found = []
        for plain in (row for row in rows if row.stair == "none" and row.runs):
            stairs = [r for r in rows if r.cell == plain.cell and r.stair != "none" and r.name in means]
            if stairs:
                best = max(stairs, key=lambda row: means[row.name])
                published = FINAL[task].get(plain.baseline, "none known") if plain.as_published else "of another size"
                found.append({"task": f"{title}, {plain.cell}", "measured": measured,
                              "plain network": score(task, plain), "best stair": f"{best.stair}: {score(task, best)}",
                              "published, without a stair": published})
        lines += found or [{"task": title, "measured": "", "plain network": "not run", "best stair": "not run",
                            "published, without a stair": ""}]
    return markdown(lines)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m evidence", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=list(TASKS), nargs="?")
    parser.add_argument("--update", action="store_true", help="write the tables and pictures of the pages anew")
    parser.add_argument("--drop", action="store_true", help="with --update: drop values whose records are gone")
    parser.add_argument("--collect", type=Path, nargs="+", metavar="FOLDER", help="copy the records of runs to --save")
    parser.add_argument("--run", action="store_true", help="run what is missing, then print the table")
    parser.add_argument("--list", action="store_true", help="print the commands of all runs, one a line, and stop")
    parser.add_argument("--missing", action="store_true", help="print the commands of the runs that are missing")
    parser.add_argument("--until-epoch", type=flags.number(int, 1), metavar="K",
                        help="with --run, --list and --missing: every run stops after this epoch, saved")
    parser.add_argument("--short", action="store_true", help="without commands, devices and what was not run")
    parser.add_argument("--only", nargs="+", metavar="TEXT",
                        help="the rows with this model and stair, as in 'expRNN none'; or all that hold the text")
    parser.add_argument("--grid", action="store_true", help="a line a stair, a column a cell")
    parser.add_argument("--paired", action="store_true",
                        help="with --grid, how much more than the same seeds without a stair")
    parser.add_argument("--small", action="store_true",
                        help="the rows at a size for two cores: psMNIST H 128, 10 epochs; characters H 256, 15 epochs")
    parser.add_argument("--best", action="store_true",
                        help="of every task, a line a cell: the plain network beside the best stair")
    parser.add_argument("--vary", nargs="+", metavar=("FLAG", "VALUE"),
                        help="a column a value of this flag of the scripts, as in --vary T 200 500")
    parser.add_argument("--seeds", type=flags.FLAGS["random_seed"].accepts, nargs="+", default=SEEDS,
                        help="default: 400 to 404")
    parser.add_argument("--jobs", type=flags.number(int, 1), default=1, help="runs at a time (default: %(default)s)")
    parser.add_argument("--with", dest="extra", default="", metavar="FLAGS",
                        help="flags added to every command, as in --with='--T 500'")
    parser.add_argument("--data", help="data folder of the runs")
    parser.add_argument("--cuda", action="store_true", help="run on the GPU")
    parser.add_argument("--save", type=Path, nargs="+", default=[RUNS], metavar="FOLDER",
                        help=f"where runs are; new ones go to the first (default: {RUNS})")
    parser.add_argument("-o", "--output", type=Path, help="write the table to this file too")
    return parser


def columns_of(args) -> dict[str, list[Row]]:
    """The rows that were asked for, with their runs: a list for each value of --vary, each task of --best, or one."""
    try:
        extra = shlex.split(args.extra)
    except ValueError as error:
        raise UserError(f"--with {args.extra} cannot be read ({error}); quote it as in --with='--T 500'") from None
    every = small_rows if args.small else rows_of
    if args.best:
        columns = {task: every(task, extra) for task in TASK_TITLES}
    elif args.vary:
        columns = vary(args.task, args.vary[0].lstrip("-"), args.vary[1:], extra, args.only)
    else:
        own = [] if args.grid or args.small else own_rows(args.task, args.seeds, *args.save)
        columns = {"": select(every(args.task, extra) + own, args.only)}
    for rows in columns.values():
        find_runs([row for row in rows if not row.own], args.seeds, *args.save, data=args.data)
    return columns


def text_of(args) -> str:
    """The table that was asked for, and a line where its runs are of different engines."""
    columns = columns_of(args)
    if args.best:
        text = best_table(columns, args.small)
    elif args.vary:
        text = vary_table(args.task, args.vary[0].lstrip("-"), columns, args.short)
    elif args.grid:
        text = grid_table(args.task, columns[""], args.short, args.paired)
    else:
        text = table(args.task, *columns.values(), args.short)
    engines = Counter(result["engine"] for rows in columns.values() for row in rows for result in split(row)[0]
                      if result.get("engine"))
    counts = ", ".join(f"{engine} {count}" for engine, count in sorted(engines.items()))
    note = f"\nRuns of different engines, whose last digits differ: {literal(counts)}.\n"
    return text + note * (len(engines) > 1)


