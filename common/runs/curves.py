"""The learning curve of runs, drawn from their logs."""

import io
import json
import math
import statistics
import warnings
from pathlib import Path

from common.errors import UserError, printable
from common.runs.flags import science
from common.runs.records import log_rows, read_config, write_atomically

DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 2)), (0, (8, 2)), (0, (3, 1, 1, 1)))
MARKERS = "osD^vP<*"
MOST_LINES = 8  # that can be told apart in one picture, in greyscale too
# What a log counts: the columns of log.csv that a curve shows, and the names of the axes.
CURVES = {
    "update": ("update", "loss_median", "update", "training cross entropy (median of a report)"),
    "epoch": ("epoch", "validation_accuracy", "epoch", "accuracy"),
}
BLOWN_UP = 30.0  # the picture ends here: a larger loss would press all others together


def figure(width: float = 7.0, height: float = 4.2):
    """A figure and its axes, drawn without a screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # here: its import takes as long as 20 updates
    from matplotlib.figure import Figure

    picture = Figure(figsize=(width, height), layout="constrained", dpi=100)
    FigureCanvasAgg(picture)
    axes = picture.add_subplot()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return picture, axes


def literal(text: str) -> str:
    """A name as matplotlib shows it: `$` starts no formula, and a leading `_` hides no line from the legend."""
    return (" " * text.startswith("_") + printable(text)).replace("$", r"\$")


def line(number: int, label: str) -> dict:
    """The look of line `number`, whose name is `label`: dash, marker and colour of its own."""
    return dict(linestyle=DASHES[number % len(DASHES)], marker=MARKERS[number % len(MARKERS)], markersize=4,
                color=f"C{number % 10}", label=literal(label), linewidth=1.6)


def check_lines(count: int, advice: str) -> None:
    """Raises UserError where a picture would hold more lines than can be told apart."""
    if count > MOST_LINES:
        raise UserError(f"{count} lines in one picture cannot be told apart; {MOST_LINES} can: {advice}")


def read_log(folder: Path) -> dict[str, list]:
    """log.csv of a run → {column: numbers}, None where a row leaves a column out."""
    read_config(folder)  # raises UserError for a folder that is no run
    rows = log_rows(folder)
    return {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}


def points(x: list, y: list) -> tuple[list, list]:
    """The pairs in which both values exist and y is finite; the last loss of a diverged run is not."""
    both = [(a, b) for a, b in zip(x, y, strict=True) if None not in (a, b) and math.isfinite(b)]
    return [a for a, _ in both], [b for _, b in both]


def kind_of(folder: Path) -> str:
    """What the log of a run counts: "update" or "epoch"."""
    options = read_config(folder)["options"]
    return "epoch" if "epochs" in options else "update"


def draw_band(axes, curves: list[tuple[list, list]], kind: str, **look) -> None:
    """One line for the `curves` of several seeds, and the span from their least to their most behind it.

    The line is the median of a loss, which a spike of one seed does not move, and the mean of an accuracy.
    """
    curves = [dict(zip(*curve, strict=True)) for curve in curves]
    places = sorted(set().union(*curves))
    values = [[curve[place] for curve in curves if place in curve] for place in places]
    middle = statistics.median if kind == "update" else statistics.mean
    axes.plot(places, list(map(middle, values)), **look)
    if len(curves) > 1:
        axes.fill_between(places, list(map(min, values)), list(map(max, values)), color=look["color"], alpha=0.12)


def prepare_axes(axes, kind: str, memoryless: float | None) -> None:
    """Names, scale and the memoryless line of a task's learning curves."""
    _, _, xlabel, ylabel = CURVES[kind]
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_xlim(left=0)
    if memoryless:
        axes.set_yscale("log")
        mark_memoryless(axes, memoryless)
        if axes.get_ylim()[1] > BLOWN_UP:
            axes.set_ylim(top=BLOWN_UP)


def mark_memoryless(axes, level: float) -> None:
    """A line at the score of a model without memory."""
    axes.axhline(level, color="0.3", linewidth=1.0)
    axes.annotate("memoryless", (1, level), xycoords=("axes fraction", "data"), xytext=(-4, 3),
                  textcoords="offset points", ha="right", fontsize=8)


def memoryless_line(folder: Path) -> float | None:
    """The loss of a memoryless model on a copying run's task (`common.copytask`); None for the other tasks."""
    options = {name: entry["value"] for name, entry in read_config(folder)["options"].items()}
    if "c_length" not in options:
        return None
    try:
        T, labels, c, vari = (options[name] for name in ("T", "labels", "c_length", "vari"))
        return statistics.mean(c * math.log(labels) / (delay + 2 * c) for delay in (range(1, T + 1) if vari else (T,)))
    except (LookupError, TypeError, ValueError, ArithmeticError):
        raise UserError(f"{folder}/config.json is damaged (its T, labels, c_length or vari); restore it from a copy or "
                        "leave this run out", 1) from None


def by_configuration(folders: list[Path]) -> list[list[Path]]:
    """The folders, grouped by what their runs compute: all but the seed is the same within a group."""
    groups = {}
    for folder in map(Path, folders):
        config = read_config(folder)
        same = {**science(config["options"]), "random_seed": None}
        groups.setdefault((config["script"], json.dumps(same, sort_keys=True)), []).append(folder)
    return list(groups.values())


def draw_curves(folders: list[Path], path: Path) -> None:
    """A curve for each configuration among the runs, all of one task: several seeds are one line with their span."""
    groups = by_configuration(folders)
    check_lines(len(groups), "name the folders of fewer configurations")
    picture, axes = figure()
    kind = kind_of(folders[0])
    x, y, _, _ = CURVES[kind]
    for number, group in enumerate(groups):
        logs = [log for log in map(read_log, group) if y in log]
        label = group[0].name + (f" and {len(group) - 1} more" if len(group) > 1 else "")
        look = line(number, label)
        if kind == "epoch":
            draw_band(axes, [points(within_epochs(log), log["train_accuracy"]) for log in logs], kind,
                      **{**look, "label": f"{label}: training", "linewidth": 1.0, "markersize": 2})
            look.update(label=f"{label}: validation", linestyle="none")
        curves = [points(log[x], log[y]) for log in logs]
        longest = max((len(places) for places, _ in curves), default=1)
        draw_band(axes, curves, kind, **{**look, "markersize": 6}, markerfacecolor="none",
                  markevery=1 if kind == "epoch" else 1 + longest // 30)
    prepare_axes(axes, kind, memoryless_line(folders[0]))
    axes.legend(fontsize=8)
    save(picture, path)


def within_epochs(log: dict[str, list]) -> list[float]:
    """Where each report of a log stands, in epochs: half of the first one is 0.5."""
    longest = max(log["batch"])
    return [epoch - 1 + batch / longest for epoch, batch in zip(log["epoch"], log["batch"], strict=True)]


def draw_run(folder: Path) -> None:
    """curves.png of one run, beside its log."""
    draw_curves([folder], Path(folder) / "curves.png")


def save(picture, path: Path) -> None:
    """Write the picture, whole or not at all."""
    path, buffer = Path(path), io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about letters of a name that the font does not have
            picture.savefig(buffer, format=path.suffix.lstrip(".") or "png")
    except ValueError as error:
        raise UserError(f"{path} cannot be drawn ({error}); choose another ending, such as .png") from None
    write_atomically(path, buffer.getvalue(), "then draw it again")
