"""Pictures: the learning curves of runs, the shapes of the stairs.

    python -m common.plot RUN_FOLDER [RUN_FOLDER ...] -o curves.png     learning curves, one line a run
    python -m common.plot --stairs -o stairs.png                        the schedules ρ_t over t

Lines differ in dash as well as in colour, so that they can be told apart in greyscale.
"""

import argparse
import csv
import sys
from pathlib import Path

from common.cli import UserError, start

DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 2)), (0, (8, 2)))


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


def draw_curves(folders: list[Path], path: Path) -> None:
    """One learning curve a run: the copying loss by update, or the validation score by epoch."""
    picture, axes = figure()
    lines = set()
    for number, folder in enumerate(folders):
        folder, log = Path(folder), read_log(folder)
        style = dict(linestyle=DASHES[number % len(DASHES)], label=folder.name, linewidth=1.6)
        if "update" in log:
            axes.plot(*points(log["update"], log["loss"]), **style)
            axes.set(xlabel="update", ylabel="training cross entropy", yscale="log")
            lines.add(_memoryless(folder))
        elif "epoch" in log:
            steps = max(log["batch"])
            epochs = [e if v is not None else e - 1 + b / steps
                      for e, b, v in zip(log["epoch"], log["batch"], log["validation_loss"], strict=True)]
            language = "lr" in log
            column = "loss" if language else "accuracy"
            axes.plot(*points(epochs, log[f"train_{column}"]), color="0.6", linewidth=1.0,
                      label="training" if number == 0 else None)
            axes.plot(*points(epochs, log[f"validation_{column}"]), marker="o", markersize=3, **style)
            axes.set(xlabel="epoch", ylabel="loss (nats a character)" if language else "accuracy")
    for value in sorted(v for v in lines if v):
        axes.axhline(value, color="0.3", linewidth=1.0)
        axes.annotate("memoryless", (1, value), xycoords=("axes fraction", "data"), xytext=(-4, 3),
                      textcoords="offset points", ha="right", fontsize=8)
    axes.legend(fontsize=8)
    _save(picture, path)


def _memoryless(folder: Path) -> float | None:
    from common.data import CopyingTask
    from common.run import read_config

    options = {name: entry["value"] for name, entry in read_config(folder)["options"].items()}
    return CopyingTask(*(options[name] for name in ("T", "labels", "c_length", "vari"))).memoryless_loss()


def draw_run(folder: Path) -> None:
    """curves.png of one run, beside its log."""
    draw_curves([folder], Path(folder) / "curves.png")


def draw_stairs(path: Path, steps: int = 40) -> None:
    """The schedules ρ_t of nvar over the first `steps` steps."""
    from common.stair import SCHEDULES, schedule

    picture, axes = figure()
    for number, name in enumerate(SCHEDULES):
        axes.plot(range(steps), schedule(name, steps).tolist(), marker="." if steps <= 50 else None, markersize=4,
                  linestyle=DASHES[number % len(DASHES)], label=name, linewidth=1.4)
    axes.axhline(0, color="0.3", linewidth=0.8)
    axes.set(xlabel="step t", ylabel="ρ_t")
    axes.legend(fontsize=8)
    _save(picture, path)


def _save(picture, path: Path) -> None:
    temporary = Path(path).with_name(f".{Path(path).name}.tmp")
    try:
        picture.savefig(temporary, format=Path(path).suffix.lstrip(".") or "png")
        temporary.replace(path)
    except (OSError, ValueError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path} could not be written ({error})", 1) from None


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m common.plot", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="folders of runs")
    parser.add_argument("--stairs", action="store_true", help="draw the schedules of nvar instead")
    parser.add_argument("-o", "--output", type=Path, default=Path("curves.png"),
                        help="the picture (default: %(default)s)")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    if args.stairs:
        draw_stairs(args.output)
    elif args.runs:
        draw_curves(args.runs, args.output)
    else:
        parser.error("name the folders of one or more runs, or --stairs")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    start(main)
