"""Pictures: learning curves, the shapes of the stairs, what a run has learned.

    python -m common.plot RUN_FOLDER [RUN_FOLDER ...]      learning curves, a line a run
    python -m common.plot --task copytask --only expn      learning curves, a line a row of the table, over its seeds
    python -m common.plot --stairs                         the schedules ρ_t over t
    python -m common.plot --alpha RUN_FOLDER ...           the learned α_t over t
    python -m common.plot --spectrum RUN_FOLDER ...        the eigenvalues of W in the complex plane

-o names the picture (curves.png). Lines differ in dash as well as in colour, so they can be told apart in
greyscale. Folders are those of runs (common/run.py); α and W are read from their best.pt.
"""

import argparse
import contextlib
import csv
import statistics
from pathlib import Path

from common.cli import UserError, start

DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 2)), (0, (8, 2)))
# What a task's curve shows: columns of log.csv, and the axes' names.
CURVES = {
    "copytask": ("update", "loss_median", "update", "training cross entropy (median of a report)"),
    "sMNIST": ("epoch", "validation_accuracy", "epoch", "validation accuracy"),
    "language": ("epoch", "validation_accuracy", "epoch", "validation accuracy"),
}


def figure(width: float = 7.0, height: float = 4.2):
    """A figure and its axes, drawn without a screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    picture = Figure(figsize=(width, height), layout="constrained", dpi=130)
    FigureCanvasAgg(picture)
    axes = picture.add_subplot()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return picture, axes


def line(number: int, label: str | None) -> dict:
    """The look of line `number`."""
    return dict(linestyle=DASHES[number % len(DASHES)], color=f"C{number % 10}", label=label, linewidth=1.6)


def read_log(folder: Path) -> dict[str, list]:
    """log.csv of a run → {column: numbers}, None where a row leaves a column out."""
    path = Path(folder) / "log.csv"
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); name the folder of a run") from None
    columns = rows[0].keys() if rows else ()
    return {name: [float(row[name]) if row[name] else None for row in rows] for name in columns}


def points(x: list, y: list) -> tuple[list, list]:
    """The pairs in which both are there."""
    both = [(a, b) for a, b in zip(x, y, strict=True) if a is not None and b is not None]
    return [a for a, _ in both], [b for _, b in both]


def task_of(folder: Path) -> str:
    """The task that a run belongs to."""
    from common.run import read_config

    return read_config(folder)["script"].split("_")[0]


def prepare_axes(axes, task: str, memoryless: float | None) -> None:
    """Names, scale and the memoryless line of a task's learning curves."""
    _, _, xlabel, ylabel = CURVES[task]
    axes.set(xlabel=xlabel, ylabel=ylabel)
    if memoryless:
        axes.set_yscale("log")
        axes.axhline(memoryless, color="0.3", linewidth=1.0)
        axes.annotate("memoryless", (1, memoryless), xycoords=("axes fraction", "data"), xytext=(-4, 3),
                      textcoords="offset points", ha="right", fontsize=8)


def memoryless_line(folder: Path) -> float | None:
    """The loss of a memoryless model on a copying run's task; None for the other tasks."""
    from common.data import CopyingTask
    from common.run import read_config

    options = {name: entry["value"] for name, entry in read_config(folder)["options"].items()}
    if "c_length" not in options:
        return None
    return CopyingTask(*(options[name] for name in ("T", "labels", "c_length", "vari"))).memoryless_loss()


def draw_curves(folders: list[Path], path: Path) -> None:
    """One learning curve a run."""
    picture, axes = figure()
    for number, folder in enumerate(map(Path, folders)):
        task, log = task_of(folder), read_log(folder)
        x, y, _, _ = CURVES[task]
        if y in log:
            marker = "o" if sum(value is not None for value in log[y]) < 30 else None
            axes.plot(*points(log[x], log[y]), marker=marker, markersize=3, **line(number, folder.name))
    prepare_axes(axes, task, memoryless_line(folder))
    axes.legend(fontsize=8)
    save(picture, path)


def draw_run(folder: Path) -> None:
    """curves.png of one run, beside its log."""
    draw_curves([folder], Path(folder) / "curves.png")


def draw_rows(task: str, only: str | None, runs: Path, seeds, path: Path) -> None:
    """One learning curve a row of a task's table: the median over its seeds and the span from least to most."""
    from common.table import find_runs, rows_of, select

    rows = select(rows_of(task, []), only)
    find_runs(rows, seeds, runs)
    rows = [row for row in rows if row.runs]
    if not rows:
        raise UserError(f"no run of {task} in {runs} matches; run some with python -m common.table {task} --run")
    picture, axes = figure(7.5, 5.0)
    x, y, _, _ = CURVES[task]
    for number, row in enumerate(rows):
        curves = [dict(zip(*points(log[x], log[y]), strict=True)) for log in map(read_log, row.runs.values()) if log]
        places = sorted(set.union(*map(set, curves)))
        values = [[curve[place] for curve in curves if place in curve] for place in places]
        axes.plot(places, list(map(statistics.median, values)),
                  **line(number, f"{row.model}, {row.stair} (n = {len(curves)})"))
        axes.fill_between(places, list(map(min, values)), list(map(max, values)), color=f"C{number % 10}", alpha=0.12)
    prepare_axes(axes, task, memoryless_line(next(iter(rows[0].runs.values()))))
    axes.legend(fontsize=7)
    save(picture, path)


def draw_stairs(path: Path, steps: int = 40) -> None:
    """The schedules ρ_t of nvar over the first `steps` steps."""
    from common.stair import SCHEDULES, schedule

    picture, axes = figure()
    for number, name in enumerate(SCHEDULES):
        axes.plot(range(steps), schedule(name, steps).tolist(), marker=".", markersize=4, **line(number, name))
    axes.axhline(0, color="0.3", linewidth=0.8)
    axes.set(xlabel="step t", ylabel="ρ_t")
    axes.legend(fontsize=8)
    save(picture, path)


def best_weights(folder: Path) -> dict:
    """best.pt of a run."""
    from common.run import load_tensors

    return load_tensors(Path(folder) / "best.pt")


def draw_alpha(folders: list[Path], path: Path) -> None:
    """The learned α_t of runs of the alpha and expalpha scripts."""
    picture, axes = figure()
    for number, folder in enumerate(map(Path, folders)):
        weights = best_weights(folder)
        if "network.stair.numbers" not in weights:
            raise UserError(f"{folder} has no learned stair; name runs of the alpha or expalpha scripts")
        axes.plot(weights["network.stair.numbers"].tolist(), **line(number, folder.name))
    axes.set(xlabel="step t", ylabel="α_t")
    axes.legend(fontsize=8)
    save(picture, path)


def draw_spectrum(folders: list[Path], path: Path) -> None:
    """The eigenvalues of W, of any cell, beside the unit circle."""
    import torch

    from common import cells
    from common.run import read_config
    from common.stair import FixedStair

    picture, axes = figure(5.0, 5.0)
    circle = torch.linspace(0, 2 * torch.pi, 400)
    axes.plot(circle.cos().tolist(), circle.sin().tolist(), color="0.6", linewidth=0.8)
    for number, folder in enumerate(map(Path, folders)):
        options = {name: entry["value"] for name, entry in read_config(folder)["options"].items()}
        weights = {name.removeprefix("network."): value for name, value in best_weights(folder).items()
                   if name.startswith("network.cell.")}
        if not weights:
            raise UserError(f"{folder} has no recurrent matrix W (an LSTM has four); name a run of another cell")
        network = cells.build(options["net_type"], weights["cell.input_weight"].shape[0], options["nhid"],
                              FixedStair("none", 1), "none", options["rinit"], options["iinit"])
        network.load_state_dict(weights)
        with torch.no_grad():
            eigenvalues = torch.linalg.eigvals(network.kernel().double())
        axes.scatter(eigenvalues.real.tolist(), eigenvalues.imag.tolist(), s=10, marker="o+x^sDv"[number % 7],
                     color=f"C{number % 10}", label=folder.name, linewidths=0.8)
    axes.set(xlabel="real part", ylabel="imaginary part", aspect="equal")
    axes.legend(fontsize=8)
    save(picture, path)


def save(picture, path: Path) -> None:
    """Write the picture under a temporary name, then rename it."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        picture.savefig(temporary, format=path.suffix.lstrip(".") or "png")
        temporary.replace(path)
    except (OSError, ValueError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(f"{path} could not be written ({error}); free the disk or its permissions", 1) from None


def main(argv=None) -> None:
    from common import table

    parser = argparse.ArgumentParser(prog="python -m common.plot", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="folders of runs")
    parser.add_argument("--task", choices=CURVES, help="draw the rows of a task's table")
    parser.add_argument("--only", help="rows whose model and stair hold this text")
    parser.add_argument("--seeds", type=int, nargs="+", default=table.SEEDS, help="with --task; default: 400 to 404")
    parser.add_argument("--save", type=Path, default=table.RUNS, help="with --task, where runs are: %(default)s")
    parser.add_argument("--stairs", action="store_true", help="draw the schedules of nvar")
    parser.add_argument("--alpha", action="store_true", help="draw the learned α_t of the runs")
    parser.add_argument("--spectrum", action="store_true", help="draw the eigenvalues of W of the runs")
    parser.add_argument("-o", "--output", type=Path, default=Path("curves.png"), help="default: %(default)s")
    args = parser.parse_args(argv)
    if args.stairs:
        draw_stairs(args.output)
    elif args.task:
        draw_rows(args.task, args.only, args.save, args.seeds, args.output)
    elif args.runs:
        draw = draw_alpha if args.alpha else draw_spectrum if args.spectrum else draw_curves
        draw(args.runs, args.output)
    else:
        parser.error("name the folders of one or more runs, --task or --stairs")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    start(main)
