"""Pictures: learning curves, what each stair gains, the shapes of the stairs, what a run has learned.

    python -m evidence.pictures RUN_FOLDER [RUN_FOLDER ...]      learning curves, a line for each configuration
    python -m evidence.pictures RUN_FOLDER ... --watch           the same of running runs, drawn again every few seconds
    python -m evidence.pictures --task copytask --only expn      learning curves, a line a row of the table, over seeds
    python -m evidence.pictures --task copytask --vary T 200 500 1000 --only "expRNN none"   the score against a flag
    python -m evidence.pictures --gains                          what each stair gains on each task
    python -m evidence.pictures --stairs                         the schedules ρ_t over t
    python -m evidence.pictures --alpha RUN_FOLDER ...           the learned α_t over t
    python -m evidence.pictures --alpha --task copytask --only "sRNN (exponential) alpha"    the same, of a table's rows
    python -m evidence.pictures --spectrum RUN_FOLDER ...        the eigenvalues of W, their modulus over their angle
    python -m evidence.pictures --gradients RUN_FOLDER ...       how far back a gradient reaches, copying task

-o names the picture (curves.png), by its ending a .png, .pdf or .svg. Lines differ in dash and marker as well as in
colour, so that they can be told apart in greyscale; a picture with more lines than that allows is refused. Folders are
those of runs (common/runs/folder.py).
"""

import argparse
import statistics
import time
from pathlib import Path

from common.errors import UserError, run_main
from common.runs import curves
from common.runs.curves import COLOURS, MARKERS, check_lines, drawing, figure, line, read_log, save
from common.runs.flags import FLAGS
from common.runs.records import read_config, read_result
from evidence import drawings, published
from evidence.rows import (
    GAIN,
    SMALL_CELLS,
    SMALL_STAIRS,
    TASKS,
    Row,
    add_row_options,
    find_runs,
    rows_asked_for,
    rows_at,
    task_of,
)
from evidence.table import TASK_TITLES, gains_of, measures_of

WATCH_SECONDS = 5


def draw_runs(folders: list[Path], path: Path) -> None:
    """A learning curve for each configuration among the runs."""
    tasks = {task_of(read_config(folder)): folder for folder in folders}
    if len(tasks) > 1:
        raise UserError(f"{' and '.join(map(str, tasks.values()))} are runs of different tasks, whose scores share no "
                        "axis; draw a picture for each task")
    curves.draw_curves(folders, path)


def draw_rows(rows: list[Row], path: Path, with_published: bool) -> None:
    """One learning curve a row of a task's table, over its seeds."""
    picture, axes = figure(8.6, 4.4)
    folders = [folder for row in rows for folder in row.runs.values()]
    x, y = curves.columns_of(next(filter(None, map(read_log, folders)), {}))
    for number, row in enumerate(rows):
        found = [curves.points(log[x], log[y]) for log in map(read_log, row.runs.values()) if log]
        curves.draw_band(axes, found, y, **line(number, f"{row.model}, {row.stair} (n = {len(found)})"),
                         markevery=(number % 5, 5) if x == "update" else 1)
        if with_published:
            draw_published(axes, row, number)
    curves.finish_axes(axes, x, y, curves.memoryless_lines(folders), len(folders) > len(rows))
    save(picture, path)


def draw_published(axes, row: Row, number: int) -> None:
    """The published curve of a row, hollow; of the characters its final test score, beside ours."""
    if not (curve := published.curve_of(row)):
        return
    every = 3 if row.task == "copytask" else 1               # 150 dots a row would hide each other
    what, size = ("published test accuracy", 7) if row.task == "language" else ("published", 3)
    dots = dict(linestyle="none", marker=MARKERS[number], markersize=size, color=COLOURS[number])
    if row.task == "language":
        ours = [result for result in row.results if "best_epoch" in result]
        axes.plot([result["best_epoch"] for result in ours], [result["test_accuracy"] for result in ours], **dots,
                  label=f"{row.model}, {row.stair}, test accuracy")
    label = f"{published.of_row(row, 'curve') or row.model}, {what}"
    if label not in axes.get_legend_handles_labels()[1]:     # two starts have one published curve
        axes.plot(*zip(*curve[number % every::every], strict=True), **dots, markerfacecolor="none",
                  markeredgewidth=0.7, label=label)


def draw_vary(columns: dict[str, list[Row]], name: str, path: Path) -> None:
    """The score of rows against the value of the flag `name`: mean and standard deviation over seeds.

    Values for which no run has ended take no room.
    """
    ended = {value: found for value, rows in columns.items() if any(found := [row.results for row in rows])}
    if len(ended) < 2:
        raise UserError(f"runs have ended with {len(ended)} of the values of --{name}, and a line needs two values")
    rows = next(iter(columns.values()))
    lines = [(row, results) for row, *results in zip(rows, *ended.values(), strict=True) if any(results)]
    check_lines(len(lines), f"pick rows with --only, as in --only '{rows[0].name}' '{rows[-1].name}'")
    picture, axes = figure(8.6, 4.4)
    measure = GAIN.get(rows[0].task) or next(iter(measures_of(rows)))
    for number, (row, results) in enumerate(lines):
        scores = {place + 0.03 * (number - len(lines) / 2): [r[measure] for r in found]   # aside: no bar hides another
                  for place, found in enumerate(results) if found}
        axes.errorbar(list(scores), list(map(statistics.mean, scores.values())),
                      [statistics.stdev(found) if len(found) > 1 else 0 for found in scores.values()], capsize=3,
                      **line(number, f"{row.model}, {row.stair}"))
    if rows[0].task == "copytask":
        axes.axhline(1 / 8, color="0.3", linewidth=1.0, label="memoryless")
    help_ = f": {FLAGS[dest].help}" if (dest := name.replace("-", "_")) in FLAGS else ""
    axes.set(xlabel=name + help_, ylabel=measure.replace("_", " "))
    axes.set_xticks(range(len(ended)), list(ended))
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    save(picture, path)


def draw_gains(seeds, folders: list[Path], path: Path) -> None:
    """A panel a task: what each stair gains on each cell beside the plain network, with its 95 % interval.

    Of the tables at a size for two cores. A filled point holds after Holm's adjustment over its panel.
    """
    picture, first = figure(10.0, 3.9)
    first.remove()
    panels = picture.subplots(1, len(TASKS), sharey=True)
    stairs = SMALL_STAIRS[1:]
    for axes, task in zip(panels, TASKS, strict=True):
        rows = [row for row in rows_at(task, True, [])
                if row.cell in SMALL_CELLS and row.stair in SMALL_STAIRS and not row.source]
        find_runs(rows, seeds, *folders)
        gains = gains_of(rows)
        for number, cell in enumerate(SMALL_CELLS):
            look = {**line(number, cell), "linestyle": "none", "markersize": 5}
            axes.plot([], [], **look)
            for row in rows:
                if row.cell == cell and (gain := gains.get((task, row.name))):
                    reach = [[gain.mean - gain.low], [gain.high - gain.mean]]
                    axes.errorbar([gain.mean], [stairs.index(row.stair) + 0.2 * (number - 1)], xerr=reach, capsize=2,
                                  **{**look, "label": None, "markerfacecolor": None if gain.holds else "white"})
        axes.axvline(0, color="0.3", linewidth=1.0)
        axes.set(title=TASK_TITLES[task], xlabel=f"gain in {GAIN[task].replace('_', ' ')}, points")
        axes.grid(alpha=0.3)
    panels[0].set_yticks(range(len(stairs)), stairs)
    panels[0].set(ylabel="stair", ylim=(len(stairs) - 0.5, -0.5))
    panels[-1].plot([], [], color="0.3", marker="o", linestyle="none", label="filled: holds\n(Holm, 5 %)")
    panels[-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    save(picture, path)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m evidence.pictures", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="folders of runs")
    parser.add_argument("--task", help="draw the rows of a task's table, or of a script of your own")
    add_row_options(parser)
    parser.add_argument("--published", action="store_true",
                        help="with --task: the published curves of the same rows too; of the characters the last value")
    parser.add_argument("--watch", action="store_true", help="draw again every few seconds, until the runs have ended")
    parser.add_argument("--gains", action="store_true", help="draw what each stair gains on each task")
    parser.add_argument("--stairs", action="store_true", help="draw the schedules of nvar")
    parser.add_argument("--alpha", action="store_true", help="draw the learned α_t of runs, or of the rows of --task")
    parser.add_argument("--spectrum", action="store_true", help="draw the eigenvalues of W of the runs")
    parser.add_argument("--gradients", action="store_true", help="draw ‖∂L/∂h_t‖ over t of runs of the copying task")
    parser.add_argument("-o", "--output", type=Path, default=Path("curves.png"), help="default: %(default)s")
    return parser


def draw(args, parser) -> None:
    """Draw what was asked for."""
    path = args.output
    if args.stairs:
        drawings.draw_stairs(path)
    elif args.gains:
        draw_gains(args.seeds, args.save, path)
    elif args.vary:
        draw_vary(rows_asked_for(args.task, args), args.vary[0].lstrip("-"), path)
    elif args.task:
        rows = [row for row in rows_asked_for(args.task, args)[""] if row.runs]
        if not rows:
            raise UserError(f"no run of {args.task} in {' or '.join(map(str, args.save))} matches; run some with "
                            f"python -m evidence {args.task} --run")
        check_lines(len(rows), f"pick rows with --only, as in --only '{rows[0].name}' '{rows[-1].name}'")
        if args.alpha:
            drawings.draw_alpha([next(iter(row.runs.values())) for row in rows], path)
        else:
            draw_rows(rows, path, args.published)
    elif args.runs:
        draw_folders = drawings.draw_alpha if args.alpha else drawings.draw_spectrum if args.spectrum else \
            drawings.draw_gradients if args.gradients else draw_runs
        draw_folders(args.runs, path)
    else:
        parser.error("name the folders of one or more runs, --task, --gains or --stairs")


@drawing()
def main(argv=None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.vary and (len(args.vary) < 2 or not args.task):
        parser.error("--vary needs --task, a flag and its values, as in --task copytask --vary T 200 500")
    if args.task and (args.runs or args.spectrum or args.gradients):
        parser.error("--task draws rows; leave it out to draw the folders of runs")
    while True:
        draw(args, parser)
        print(f"wrote {args.output}", flush=True)
        if not args.watch or all(read_result(folder) is not None for folder in args.runs):
            return
        time.sleep(WATCH_SECONDS)


if __name__ == "__main__":
    run_main(main)
