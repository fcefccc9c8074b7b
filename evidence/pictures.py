"""Pictures: learning curves, the shapes of the stairs, what a run has learned.

    python -m evidence.pictures RUN_FOLDER [RUN_FOLDER ...]      learning curves, a line a run
    python -m evidence.pictures --task copytask --only expn      learning curves, a line a row of the table, over seeds
    python -m evidence.pictures --task sMNIST --training --published   the training score in the epochs, and validation
    python -m evidence.pictures --task copytask --vary T 200 500 1000    the score against the value of a flag
    python -m evidence.pictures --stairs                         the schedules ρ_t over t
    python -m evidence.pictures --alpha RUN_FOLDER ...           the learned α_t over t
    python -m evidence.pictures --spectrum RUN_FOLDER ...        the eigenvalues of W, their modulus over their angle

-o names the picture (curves.png). Lines differ in dash and marker as well as in colour, so they can be told apart
in greyscale. --published draws the curves of results/published, where the table has their row. Folders are those of
runs (common/runs/run.py); α and W are read from their best.pt.
"""

import argparse
import math
import statistics
from pathlib import Path

import torch

from common.errors import UserError, start
from common.network import build_network
from common.runs.curves import (
    CURVES,
    MARKERS,
    draw_curves,
    figure,
    kind_of,
    line,
    memoryless_line,
    points,
    prepare_axes,
    read_log,
    save,
)
from common.runs.flags import FLAGS
from common.runs.records import load_tensors, read_config, read_result
from common.stair import SCHEDULES, FixedStair, schedule
from evidence.published import curve_points
from evidence.rows import RUNS, SEEDS, TASKS, find_runs, rows_of, select, task_of, vary


def rows_with_runs(task: str, only: list[str] | None, runs: Path, seeds, extra: list[str]) -> list:
    """The rows of a task's table that have runs."""
    rows = select(rows_of(task, extra), only)
    find_runs(rows, seeds, runs)
    if not any(row.runs for row in rows):
        raise UserError(f"no run of {task} in {runs} matches; run some with python -m evidence {task} --run")
    return [row for row in rows if row.runs]


def draw_runs(folders: list[Path], path: Path) -> None:
    """One learning curve a run."""
    tasks = {task_of(read_config(folder)): folder for folder in folders}
    if len(tasks) > 1:
        raise UserError(f"{' and '.join(map(str, tasks.values()))} are runs of different tasks, whose scores share no "
                        "axis; draw a picture for each task")
    draw_curves(folders, path)


def draw_rows(rows: list, task: str, path: Path, published: bool) -> None:
    """One learning curve a row of a task's table: the median over its seeds and the span from least to most."""
    picture, axes = figure(8.6, 4.4)
    first = next(iter(rows[0].runs.values()))
    x, y, _, _ = CURVES[kind_of(first)]
    for number, row in enumerate(rows):
        curves = [dict(zip(*points(log[x], log[y]), strict=True)) for log in map(read_log, row.runs.values()) if log]
        places = sorted(set().union(*curves))
        values = [[curve[place] for curve in curves if place in curve] for place in places]
        axes.plot(places, list(map(statistics.median, values)), marker=MARKERS[number % 8], markersize=4,
                  markevery=(number % 5, 5), **line(number, f"{row.model}, {row.stair} (n = {len(curves)})"))
        axes.fill_between(places, list(map(min, values)), list(map(max, values)), color=f"C{number % 10}", alpha=0.12)
        if published and task != "language" and row.model in curve_points(task)[0]:
            every = 3 if task == "copytask" else 1           # 150 dots a row would hide each other
            curve = curve_points(task)[number % every::every]
            axes.plot([float(point[x]) for point in curve], [float(point[row.model]) for point in curve],
                      linestyle="none", marker=MARKERS[number % 8], markersize=3, color=f"C{number % 10}",
                      markerfacecolor="none", markeredgewidth=0.7, label=f"{row.model}, published")
    prepare_axes(axes, kind_of(first), memoryless_line(first))
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    save(picture, path)


def draw_training(rows: list, task: str, path: Path, published: bool) -> None:
    """The training score at every report within the epochs, one run a row, and the validation after each of them.

    psMNIST: accuracy; characters: bits per character. `published` adds the published validation of the row's cell.
    """
    names, scale = (("train_accuracy", "validation_accuracy"), 1) if task == "sMNIST" else \
        (("train_loss", "validation_loss"), 1 / math.log(2))
    picture, axes = figure(8.0, 5.0)
    whole = {}                                               # published curve → updates and number of epochs to draw
    for number, row in enumerate(rows):
        log = read_log(next(iter(row.runs.values())))
        if not log:
            continue
        an_epoch = max(log["batch"])
        places = [(epoch - 1) * an_epoch + batch for epoch, batch in zip(log["epoch"], log["batch"], strict=True)]
        train, valid = ([None if value is None else scale * value for value in log[name]] for name in names)
        axes.plot(*points(places, train), **line(number, f"{row.model}, {row.stair}"), marker=MARKERS[number % 8],
                  markersize=4)
        axes.plot(*points(places, valid), linestyle="none", marker=MARKERS[number % 8], markersize=9,
                  markerfacecolor="none", markeredgecolor=f"C{number % 10}", markeredgewidth=1.6)
        whole[row.baseline] = max(whole.get(row.baseline, (0, 0)), (an_epoch, len(points(places, valid)[0])))
    if published and task == "sMNIST":
        draw_published_marks(axes, whole)
    axes.set(xlabel="update", ylabel="accuracy" if task == "sMNIST" else "bits per character")
    axes.set_title("joined: training, the mean since the last report; large: validation after an epoch", fontsize=9)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    save(picture, path)


def draw_published_marks(axes, whole: dict) -> None:
    """Bars where the published curves stand after each epoch. whole: {curve: (updates an epoch, epochs)}."""
    marks = {name: [(int(point["epoch"]) * updates, float(point[name])) for point in curve_points("sMNIST")[:epochs]]
             for name, (updates, epochs) in whole.items() if epochs}
    height = -math.inf
    for name, places in sorted(marks.items(), key=lambda item: item[1][-1][1]):
        axes.plot(*zip(*places, strict=True), linestyle="none", marker="_", markersize=16, markeredgewidth=2, color="0")
        low, high = axes.get_ylim()
        height = max(height + 0.035 * (high - low), places[-1][1])          # names of marks that lie close
        axes.annotate(f"{name}, published", (places[-1][0], height), xytext=(12, -3), fontsize=7,
                      textcoords="offset points")
    if marks:
        axes.set_xlim(right=1.25 * axes.dataLim.x1)                         # room for the names


def draw_vary(columns: dict[str, list], task: str, name: str, path: Path) -> None:
    """The score of a task's rows against the value of the flag `name`: mean and standard deviation over seeds.

    Values for which no run has ended take no room.
    """
    try:
        if not all(float(value) > 0 for value in columns):
            raise ValueError
    except ValueError:
        raise UserError(f"--vary {name} {' '.join(columns)} has no place on a logarithmic axis, which takes numbers "
                        f"above 0; python -m evidence {task} --vary makes a table of any values") from None
    columns = {value: rows for value, rows in columns.items()
               if any(read_result(folder) for row in rows for folder in row.runs.values())}
    if not columns:
        raise UserError(f"no run of {task} that has ended matches; run some with python -m evidence {task} --run")
    picture, axes = figure(7.5, 4.6)
    measure, ylabel = ("recall", "recall over the last 50 updates") if task == "copytask" else \
        ("test_accuracy", "test accuracy")
    for number, rows in enumerate(zip(*columns.values(), strict=True)):
        values = {float(value): [r[measure] for r in map(read_result, row.runs.values()) if r is not None]
                  for value, row in zip(columns, rows, strict=True)}
        values = {value: found for value, found in values.items() if found}
        aside = 1 + 0.015 * (number - len(next(iter(columns.values()))) / 2)  # so that no bar hides another
        if values:
            axes.errorbar([value * aside for value in values], list(map(statistics.mean, values.values())),
                          [statistics.stdev(found) if len(found) > 1 else 0 for found in values.values()], capsize=3,
                          marker=MARKERS[number % 8], markersize=5,
                          **line(number, f"{rows[0].model}, {rows[0].stair}"))
    if task == "copytask":
        axes.axhline(1 / 8, color="0.3", linewidth=1.0)
        axes.annotate("memoryless", (1, 1 / 8), xycoords=("axes fraction", "data"), xytext=(-4, 3),
                      textcoords="offset points", ha="right", fontsize=8)
    axes.set(xlabel=f"{name}: {FLAGS[name.replace('-', '_')][2]}", ylabel=ylabel, xscale="log")
    axes.set_xticks([float(value) for value in columns], list(columns))
    axes.minorticks_off()
    axes.legend(fontsize=7)
    save(picture, path)


def draw_stairs(path: Path, steps: int = 40) -> None:
    """The schedules ρ_t of nvar over the first `steps` steps."""
    picture, axes = figure()
    for number, name in enumerate(SCHEDULES):
        axes.plot(range(steps), schedule(name, steps).tolist(), marker=".", markersize=4, **line(number, name))
    axes.axhline(0, color="0.3", linewidth=0.8)
    axes.set(xlabel="step t", ylabel="ρ_t")
    axes.legend(fontsize=8)
    save(picture, path)


def best_weights(folder: Path) -> dict:
    """best.pt of a run."""
    return load_tensors(Path(folder) / "best.pt")


def name_of(folder: Path) -> str:
    """What a run is, for a legend: its row, its start where that was typed, and its stair."""
    config = read_config(folder)
    options, stair = config["options"], config["script"].split("_")[1]
    start_of = [options["rinit"]["value"]] if options["rinit"]["origin"] == "typed" else []
    return ", ".join([config["row"] or Path(folder).name, *start_of, options.get("nvar", {"value": stair})["value"]])


def draw_alpha(folders: list[Path], path: Path) -> None:
    """The learned α_t of runs of the alpha and expalpha scripts; an axis for each of the two."""
    scripts = list(dict.fromkeys(read_config(folder)["script"].split("_")[1] for folder in folders))
    picture, first = figure(7.5, 3.0 * len(scripts))
    first.remove()
    for place, script in enumerate(scripts):
        axes = picture.add_subplot(len(scripts), 1, place + 1)
        axes.grid(alpha=0.3)
        for number, folder in enumerate(f for f in folders if read_config(f)["script"].endswith(f"_{script}")):
            weights = best_weights(folder)
            if "network.stair.numbers" not in weights:
                raise UserError(f"{folder} has no learned stair; name runs of the alpha or expalpha scripts")
            axes.plot(weights["network.stair.numbers"].tolist(), **{**line(number, name_of(folder)), "linewidth": 1.2})
        axes.set(xlabel="step t", ylabel="α_t")
        axes.set_title({"alpha": "g_t = α_t", "expalpha": "g_t = 1 − exp(−α_t |z|)"}.get(script), fontsize=9)
        axes.legend(fontsize=8)
    save(picture, path)


def draw_spectrum(folders: list[Path], path: Path) -> None:
    """The eigenvalues of W, of any cell: how far from the unit circle, and where. They come in conjugate pairs."""
    picture, axes = figure()
    axes.axhline(1.0, color="0.3", linewidth=0.8)
    for number, folder in enumerate(map(Path, folders)):
        options = {name: entry["value"] for name, entry in read_config(folder)["options"].items()}
        weights = {name.removeprefix("network."): value for name, value in best_weights(folder).items()
                   if name.startswith("network.cell.")}
        if not weights:
            raise UserError(f"{folder} has no recurrent matrix W (an LSTM has four); name a run of another cell")
        network = build_network(options["net_type"], weights["cell.input_weight"].shape[0], options["nhid"],
                              FixedStair("none", 1), "none", options["rinit"], options["iinit"])
        network.load_state_dict(weights)
        with torch.no_grad():
            eigenvalues = torch.linalg.eigvals(network.kernel().double())
        angle, modulus = eigenvalues.angle().abs(), eigenvalues.abs()
        axes.scatter(angle.tolist(), modulus.tolist(), s=18, marker=MARKERS[number % 8], facecolors="none",
                     edgecolors=f"C{number % 10}", label=name_of(folder), linewidths=0.9)
    axes.set(xlabel="|angle of λ|, radians", ylabel="|λ|")
    axes.legend(fontsize=8)
    save(picture, path)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m evidence.pictures", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="folders of runs")
    parser.add_argument("--task", choices=list(TASKS), help="draw the rows of a task's table")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="rows as --only of tables picks them")
    parser.add_argument("--seeds", type=FLAGS["random_seed"][1], nargs="+", default=SEEDS,
                        help="with --task; default: 400 to 404")
    parser.add_argument("--save", type=Path, default=RUNS, help="with --task, where runs are: %(default)s")
    parser.add_argument("--training", action="store_true", help="with --task sMNIST or language: within the epochs")
    parser.add_argument("--vary", nargs="+", metavar=("FLAG", "VALUE"),
                        help="with --task, the score against the value of this flag, as in --vary T 200 500")
    parser.add_argument("--published", action="store_true", help="with --task, draw the published curves in")
    parser.add_argument("--stairs", action="store_true", help="draw the schedules of nvar")
    parser.add_argument("--alpha", action="store_true", help="draw the learned α_t of the runs")
    parser.add_argument("--spectrum", action="store_true", help="draw the eigenvalues of W of the runs")
    parser.add_argument("-o", "--output", type=Path, default=Path("curves.png"), help="default: %(default)s")
    return parser


def main(argv=None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.training and args.task not in ("sMNIST", "language"):
        parser.error("--training needs --task sMNIST or language; the copying task's curve is its training")
    if args.vary and (len(args.vary) < 2 or not args.task):
        parser.error("--vary needs --task, a flag and its values, as in --task copytask --vary T 200 500")
    if args.stairs:
        draw_stairs(args.output)
    elif args.vary:
        name, *values = args.vary[0].lstrip("-"), *args.vary[1:]
        columns = vary(args.task, name, values, [], args.only)
        for rows in columns.values():
            find_runs(rows, args.seeds, args.save)
        draw_vary(columns, args.task, name, args.output)
    elif args.task:
        rows = rows_with_runs(args.task, args.only, args.save, args.seeds, [])
        (draw_training if args.training else draw_rows)(rows, args.task, args.output, args.published)
    elif args.runs:
        draw = draw_alpha if args.alpha else draw_spectrum if args.spectrum else draw_runs
        draw(args.runs, args.output)
    else:
        parser.error("name the folders of one or more runs, --task or --stairs")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    start(main)
