"""Learning curves of runs, drawn from whatever columns their logs have.

A curve shows a column of validation over the epochs or updates, of a log without one the loss. Runs that differ in
nothing but the seed are one line with a band; a line's label says in what it differs from the other lines.
"""

import contextlib
import io
import itertools
import json
import math
import os
import re
import statistics
import warnings
from pathlib import Path

from common.errors import UserError, printable
from common.runs.flags import kind_of, science
from common.runs.provenance import foreign_code, own_stair
from common.runs.records import log_rows, read_config, read_result, write_atomically

# Okabe and Ito's colours, which the colour-blind tell apart; the weakest on white comes last.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000", "#F0E442")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 2)), (0, (8, 2)), (0, (3, 1, 1, 1)))
MARKERS = "osD^vP<*"
MOST_LINES = 8  # that can be told apart in one picture, in greyscale too
COUNTED = ("update", "epoch", "batch", "seconds", "lr", "orthogonality_error")  # columns that no curve shows
WANTED = ("validation.*accuracy", "validation", "loss_median", "loss", "")      # the others, best first
BLOWN_UP = 30.0  # a larger loss is cut off: it would press all others together


@contextlib.contextmanager
def drawing():
    """Within this context matplotlib has its own defaults, not the user's, and an error of it is a `UserError`."""
    backend = os.environ.pop("MPLBACKEND", None)  # that of a notebook may not exist here; none is needed
    try:
        import matplotlib  # here: its import takes as long as 20 updates

        with matplotlib.rc_context(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about letters of a name that the font does not have
            matplotlib.rcdefaults()
            matplotlib.rcParams["axes.prop_cycle"] = matplotlib.cycler(color=COLOURS)
            matplotlib.rcParams["pdf.fonttype"] = 42  # TrueType, which journals ask for
            yield
    except (ImportError, ValueError, RuntimeError) as error:
        raise UserError(f"the picture cannot be drawn ({printable(str(error))[:200]})", 1) from error
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend


def figure(width: float = 8.6, height: float = 4.2, rows: int = 1, columns: int = 1):
    """A figure, drawn without a screen, and the axes of its panels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    picture = Figure(figsize=(width, height), layout="constrained", dpi=150)
    FigureCanvasAgg(picture)
    panels = picture.subplots(rows, columns, sharey="row", squeeze=False).ravel()
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return picture, panels


def line(number: int, label: str) -> dict:
    """The look of line `number`, whose name is `label`: dash, marker and colour of its own."""
    label = (" " * label.startswith("_") + printable(label)).replace("$", r"\$")  # else a formula
    return dict(linestyle=DASHES[number % len(DASHES)], marker=MARKERS[number % len(MARKERS)], markersize=4,
                color=COLOURS[number % len(COLOURS)], label=label, linewidth=1.6)


def check_lines(count: int) -> None:
    """Raises UserError where a picture would hold more lines than can be told apart."""
    if count > MOST_LINES:
        raise UserError(f"{count} lines in one picture cannot be told apart; {MOST_LINES} can: name fewer folders, or "
                        "pick rows with --only, as in --only 'expRNN none'")


def read_log(folder: Path) -> dict[str, list]:
    """log.csv of a run → {column: numbers}, None where a row leaves a column out."""
    read_config(folder)  # raises UserError for a folder that is no run
    rows = log_rows(folder)
    return {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}


def columns_of(log: dict[str, list]) -> tuple[str, str]:
    """The columns that a curve shows, over which and what."""
    names = [name for name in log if name not in COUNTED]
    shown = [name for pattern in WANTED for name in names if re.search(pattern, name)]
    if not shown:
        raise UserError("there is nothing to draw: log.csv has no report, or nothing but the time in it")
    return ("update" if "update" in log else "epoch"), shown[0]


def points(x: list, y: list) -> tuple[list, list]:
    """The pairs in which both values exist and y is finite; the last loss of a diverged run is not."""
    both = [(a, b) for a, b in zip(x, y, strict=True) if None not in (a, b) and math.isfinite(b)]
    return [a for a, _ in both], [b for _, b in both]


def facts_of(config: dict) -> dict:
    """What a run computes but for its seed: script, row, stair, options, code that is not the project's own, data."""
    options, own = config["options"], own_stair(config)
    values = {name: value for name, value in science(options).items()
              if name != "random_seed" and (own or name != "nvar")}
    return {"script": f"{config['script']}.py", "row": config["row"] or options["net_type"]["value"],
            "stair": own or options.get("nvar", {}).get("value") or kind_of(options), **values,
            "code": " ".join(f"{name} {config.get('code', {}).get(name, '')[:7]}" for name in foreign_code(config)),
            "data": (config.get("data") or {}).get("digest", "")[:7]}


def labels_of(configs: list[dict]) -> list[str]:
    """What each run differs in from the others, as in "sRNN, expn" or "lr 0.01"; what its row names follows from it."""
    facts, speaking = list(map(facts_of, configs)), ("script", "row", "stair")
    of_rows = {name for config in configs for name, entry in config["options"].items()
               if entry["origin"].startswith("PAPER")}
    chosen = [{name: "as its row" if name in of_rows and config["options"][name]["origin"] not in ("typed", "edited")
               else str(value) for name, value in fact.items()} for fact, config in zip(facts, configs, strict=True)]
    names = [name for name in dict.fromkeys(name for fact in facts for name in fact)
             if len({own[name] for own in chosen if name in own}) > 1] or [*speaking[1:]]
    if len({fact["row"] for fact in facts}) == len({(fact["row"], fact.get("net_type")) for fact in facts}):
        names = [name for name in names if name != "net_type"]  # the row tells it
    labels = [", ".join(str(fact[name]) if name in speaking else f"{name} {fact[name]}"
                        for name in names if fact.get(name) not in (None, "")) for fact in facts]
    return [f"{label}, seed {config['options']['random_seed']['value']}" if labels.count(label) > 1 else label
            for label, config in zip(labels, configs, strict=True)]


def draw_band(axes, curves: list[tuple[list, list]], column: str, **look) -> None:
    """One line for the `curves` of several seeds, and the span from their least to their most behind it.

    The line is the median of a loss, which a spike of one seed does not move, and the mean of another column.
    """
    curves = [dict(zip(*curve, strict=True)) for curve in curves]
    places = sorted(set().union(*curves))
    values = [[curve[place] for curve in curves if place in curve] for place in places]
    axes.plot(places, list(map(statistics.median if "loss" in column else statistics.mean, values)), **look)
    if len(curves) > 1:
        axes.fill_between(places, list(map(min, values)), list(map(max, values)), color=look["color"], alpha=0.12)


def finish_axes(axes, x: str, y: str, memoryless: set[float], has_bands: bool, has_training: bool) -> None:
    """Names and scale of the axes, a line for each loss without memory, and a legend where no curve runs."""
    axes.set(xlabel=x, ylabel=y.replace("_", " ").replace("loss median", "loss, median of a report"))
    axes.set_xlim(left=0)
    for dash, loss in zip(itertools.cycle(DASHES), sorted(memoryless), strict=False):
        axes.axhline(loss, color="0.3", linewidth=1.0, linestyle=dash, label=f"memoryless, {loss:.4f}")
    if "loss" in y and axes.dataLim.ymin > 0:
        axes.set_yscale("log")
        axes.set_ylim(top=min(axes.get_ylim()[1], BLOWN_UP))
    notes = [f"{'median' if 'loss' in y else 'mean'} of the runs; band: least to most"] * has_bands
    notes += ["thin: training"] * has_training
    show_legend(axes, "\n".join(notes))


def show_legend(axes, title: str = "", fontsize: float = 8) -> None:
    """Beside the curves, or below them where a label is long: beside them it would leave no room."""
    handles, labels = axes.get_legend_handles_labels()
    look = dict(title=title, title_fontsize=8, fontsize=fontsize)
    if max(map(len, labels), default=0) > 40:
        axes.figure.legend(handles, labels, loc="outside lower left", **look)
    else:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), **look)


def draw_curves(folders: list[Path], path: Path) -> None:
    """A curve for each configuration among the runs, all of one task: several seeds are one line with their span."""
    groups, tasks = {}, {}
    for folder in map(Path, folders):
        config = read_config(folder)
        groups.setdefault(json.dumps(facts_of(config), sort_keys=True), (config, []))[1].append(folder)
        tasks[(config.get("task") or config["script"].split("_")[0]).lower()] = folder  # "smnist" in older records
    if len(tasks) > 1:
        raise UserError(f"{' and '.join(map(str, tasks.values()))} are runs of different tasks, whose scores share no "
                        "axis; draw a picture for each task")
    labels = labels_of([config for config, _ in groups.values()])
    draw_groups([(label, group) for label, (_, group) in zip(labels, groups.values(), strict=True)], path)


def draw_groups(groups: list[tuple[str, list[Path]]], path: Path, with_training=True, beside=()) -> None:
    """A curve for each (label, folders of its seeds); `beside`: functions that draw more into the axes."""
    check_lines(len(groups))
    folders = [folder for _, group in groups for folder in group]
    first = next(filter(None, map(read_log, folders)), {})
    x, y = columns_of(first)
    training = y.replace("validation", "train")
    has_training = with_training and training != y and training in first
    with drawing():
        picture, (axes,) = figure()
        for number, (label, group) in enumerate(groups):
            logs = [log for log in map(read_log, group) if y in log]
            look = line(number, label + (f", n = {len(logs)}" if len(logs) > 1 else ""))
            for log in logs if has_training else ():
                whole = max(log.get("batch", [1]))
                places = log[x] if x == "update" else [epoch - 1 + batch / whole for epoch, batch
                                                       in zip(log["epoch"], log["batch"], strict=True)]
                axes.plot(*points(places, log[training]), color=look["color"], linewidth=0.5)
            curves = [points(log[x], log[y]) for log in logs]
            every = 1 + max((len(places) for places, _ in curves), default=1) // 15
            draw_band(axes, curves, y, **look, markevery=(number % every, every))
        for draw in beside:
            draw(axes)
        memoryless = {found["memoryless_loss"] for folder in folders for read in (read_config, read_result)
                      if (found := read(folder)) and found.get("memoryless_loss")}  # of older runs in the result only
        finish_axes(axes, x, y, memoryless, len(folders) > len(groups), has_training)
        save(picture, path)


def save(picture, path: Path) -> None:
    """Write the picture. The ending of `path` is its format."""
    buffer = io.BytesIO()
    picture.savefig(buffer, format=Path(path).suffix.lstrip(".") or "png")
    write_atomically(Path(path), buffer.getvalue(), "or name another file with -o")
