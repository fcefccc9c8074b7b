"""Pictures: learning curves, the shapes of the stairs, what a run has learned.

    python -m evidence.pictures RUN_FOLDER [RUN_FOLDER ...]      learning curves, a line for each configuration
    python -m evidence.pictures --task copytask --only expn      learning curves, a line a row of the table, over seeds
    python -m evidence.pictures --task copytask --vary T 200 500 1000 --only "expRNN none"   the score against a flag
    python -m evidence.pictures --stairs                         the schedules ρ_t over t
    python -m evidence.pictures --alpha RUN_FOLDER ...           the learned α_t over t
    python -m evidence.pictures --alpha --task copytask --only "sRNN (exponential) alpha"    the same, of a table's rows
    python -m evidence.pictures --spectrum RUN_FOLDER ...        the eigenvalues of W, their modulus over their angle
    python -m evidence.pictures --gradients RUN_FOLDER ...       how far back a gradient reaches, copying task

-o names the picture (curves.png). Lines differ in dash and marker as well as in colour, so that they can be told apart
in greyscale; a picture with more lines than that allows is refused. Folders are those of runs (common/runs/folder.py).
W and the gradients need their best.pt; α is read from stair.csv.
"""

import argparse
import importlib
import shlex
import statistics
from pathlib import Path

import torch

from common.cells import NNRNN
from common.copytask import CopyingTask
from common.errors import UserError, start
from common.network import mean_cross_entropy
from common.recurrence import stair_recurrence
from common.runs.curves import (
    COLOURS,
    MARKERS,
    check_lines,
    columns_of,
    draw_band,
    draw_curves,
    drawing,
    figure,
    finish_axes,
    line,
    memoryless_lines,
    points,
    read_log,
    save,
)
from common.runs.flags import FLAGS
from common.runs.records import read_config, read_stair
from common.stair import SCHEDULES, schedule
from evidence.published import curve_of
from evidence.rows import RUNS, SEEDS, TASKS, find_runs, rows_of, select, stair_of, task_of, vary
from evidence.table import split

FAINT = 1e-5  # of a gradient that is 1 at the recall
APART = 45  # steps between two markers of a line


def rows_with_runs(task: str, only: list[str] | None, runs: list[Path], seeds, extra: list[str]) -> list:
    """The rows of a task's table that have runs; at most as many as a picture can show."""
    rows = select(rows_of(task, extra), only)
    find_runs(rows, seeds, *runs)
    rows = [row for row in rows if row.runs]
    if not rows:
        raise UserError(f"no run of {task} in {' or '.join(map(str, runs))} matches; run some with python -m evidence "
                        f"{task} --run")
    check_lines(len(rows), f"pick rows with --only, as in --only '{rows[0].name}' '{rows[-1].name}'")
    return rows


def draw_runs(folders: list[Path], path: Path) -> None:
    """A learning curve for each configuration among the runs."""
    tasks = {task_of(read_config(folder)): folder for folder in folders}
    if len(tasks) > 1:
        raise UserError(f"{' and '.join(map(str, tasks.values()))} are runs of different tasks, whose scores share no "
                        "axis; draw a picture for each task")
    draw_curves(folders, path)


def draw_rows(rows: list, task: str, path: Path, published: bool) -> None:
    """One learning curve a row of a task's table, over its seeds."""
    picture, axes = figure(8.6, 4.4)
    folders = [folder for row in rows for folder in row.runs.values()]
    x, y = columns_of(next(filter(None, map(read_log, folders)), {}))
    longest = 0
    for number, row in enumerate(rows):
        found = [points(log[x], log[y]) for log in map(read_log, row.runs.values()) if log]
        longest = max(longest, *(len(places) for places, _ in found), 0)
        draw_band(axes, found, y, **line(number, f"{row.model}, {row.stair} (n = {len(found)})"),
                  markevery=(number % 5, 5) if x == "update" else 1)
        if published:
            draw_published(axes, row, task, number)
    if longest < 2:
        raise UserError(f"no run that was picked has two {x}s to join; python -m evidence.pictures RUN_FOLDER draws "
                        "a run from its first report on")
    finish_axes(axes, x, y, memoryless_lines(folders), len(folders) > len(rows))
    save(picture, path)


def draw_published(axes, row, task: str, number: int) -> None:
    """The published curve of the row's model, hollow; of the characters its final test score, beside ours."""
    curve = curve_of(task, row)
    if not curve:
        return
    every = 3 if task == "copytask" else 1                   # 150 dots a row would hide each other
    what, size = ("published test accuracy", 7) if task == "language" else ("published", 3)
    dots = dict(linestyle="none", marker=MARKERS[number], markersize=size, color=COLOURS[number])
    if task == "language":
        ours = [result for result in split(row)[0] if {"best_epoch", "test_accuracy"} <= result.keys()]
        axes.plot([result["best_epoch"] for result in ours], [result["test_accuracy"] for result in ours], **dots,
                  label=f"{row.model}, {row.stair}, test accuracy")
    axes.plot(*zip(*curve[number % every::every], strict=True), **dots, markerfacecolor="none", markeredgewidth=0.7,
              label=f"{row.model}, {what}")


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
    ended = {value: [split(row)[0] for row in rows] for value, rows in columns.items()}
    columns = {value: columns[value] for value, results in ended.items() if any(results)}
    if not columns:
        raise UserError(f"no run of {task} that has ended matches; run some with python -m evidence {task} --run")
    if len(columns) < 2:
        raise UserError(f"only with --{name} {next(iter(columns))} has a run ended; a line needs two values")
    lines = [(rows[0], [ended[value][number] for value in columns])
             for number, rows in enumerate(zip(*columns.values(), strict=True))]
    lines = [(row, results) for row, results in lines if any(results)]
    check_lines(len(lines), f"pick rows with --only, as in --only '{lines[0][0].name}' '{lines[-1][0].name}'")
    picture, axes = figure(8.6, 4.4)
    measure, ylabel = ("recall", "recall over the last 50 updates") if task == "copytask" else \
        ("test_accuracy", "test accuracy")
    for number, (row, results) in enumerate(lines):
        values = {float(value): [r[measure] for r in found] for value, found in zip(columns, results, strict=True)
                  if found}
        aside = 1 + 0.015 * (number - len(lines) / 2)  # so that no bar hides another
        axes.errorbar([value * aside for value in values], list(map(statistics.mean, values.values())),
                      [statistics.stdev(found) if len(found) > 1 else 0 for found in values.values()], capsize=3,
                      **line(number, f"{row.model}, {row.stair}"))
    if task == "copytask":
        axes.axhline(1 / 8, color="0.3", linewidth=1.0, label="memoryless")
    axes.set(xlabel=f"{name}: {FLAGS[name.replace('-', '_')].help}", ylabel=ylabel, xscale="log")
    axes.set_xticks([float(value) for value in columns], list(columns))
    axes.minorticks_off()
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    save(picture, path)


def draw_stairs(path: Path, steps: int = 40) -> None:
    """The schedules ρ_t of nvar over the first `steps` steps."""
    picture, axes = figure()
    for number, name in enumerate(SCHEDULES):
        axes.plot(range(steps), schedule(name, steps).tolist(), **line(number, name), markevery=(number, 9))
    axes.axhline(0, color="0.3", linewidth=0.8)
    axes.set(xlabel="step t", ylabel="ρ_t")
    axes.legend(fontsize=8)
    save(picture, path)


def name_of(folder: Path) -> str:
    """What a run is, for a legend: its row, its start where that was typed, and its stair."""
    config = read_config(folder)
    options = config["options"]
    start_of = [options["rinit"]["value"]] if options["rinit"]["origin"] == "typed" else []
    return ", ".join([config["row"] or Path(folder).name, *start_of, stair_of(config)])


def learned_numbers(folder: Path) -> list[float]:
    """The numbers α_t of a run's learned stair, from stair.csv."""
    if not (Path(folder) / "stair.csv").exists():
        raise UserError(f"{folder} has no learned stair (stair.csv); name runs of the alpha or expalpha scripts that "
                        "have ended")
    return read_stair(folder)


def draw_alpha(folders: list[Path], path: Path) -> None:
    """The learned α_t of runs of the alpha and expalpha scripts; an axis for each of the two."""
    check_lines(len(folders), "name fewer folders")
    scripts = list(dict.fromkeys(read_config(folder)["script"] for folder in folders))
    picture, first = figure(8.0, 3.0 * len(scripts))
    first.remove()
    for place, script in enumerate(scripts):
        axes = picture.add_subplot(len(scripts), 1, place + 1)
        axes.grid(alpha=0.3)
        for number, folder in enumerate(f for f in folders if read_config(f)["script"] == script):
            axes.plot(learned_numbers(folder), **{**line(number, name_of(folder)), "linewidth": 1.2},
                      markevery=(5 * number, APART))
        axes.set(xlabel="step t", ylabel="α_t")
        axes.set_title({"alpha": "g_t = α_t", "expalpha": "g_t = 1 − exp(−α_t |z|)"}.get(script.split("_")[-1]),
                       fontsize=9)
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    save(picture, path)


def departure(cell) -> str:
    """nnRNN's departure from normality, ‖T‖_F / ‖Λ‖_F, for a legend; nothing for another cell."""
    return f": ‖T‖ / ‖Λ‖ = {(cell.upper.norm() / (2 ** 0.5 * cell.gamma.norm())).item():.2g}" \
        if isinstance(cell, NNRNN) else ""


@torch.no_grad()
def draw_spectrum(folders: list[Path], path: Path) -> None:
    """The eigenvalues of W, of any cell: how far from the unit circle, and where. They come in conjugate pairs."""
    check_lines(len(folders), "name fewer folders")
    picture, axes = figure(8.6, 4.4)
    axes.axhline(1.0, color="0.3", linewidth=0.8)
    for number, folder in enumerate(map(Path, folders)):
        network = script_of_run(folder).load(folder)[0].network
        if network.cell is None:
            raise UserError(f"{folder} has no recurrent matrix W (an LSTM has four); name a run of another cell")
        eigenvalues = torch.linalg.eigvals(network.kernel().double())
        angle, modulus = eigenvalues.angle().abs(), eigenvalues.abs()
        axes.scatter(angle.tolist(), modulus.tolist(), s=18, marker=MARKERS[number], facecolors="none",
                     edgecolors=COLOURS[number], label=name_of(folder) + departure(network.cell), linewidths=0.9)
    low, high = axes.get_ylim()
    axes.set(xlabel="|angle of λ|, radians", ylabel="|λ|", ylim=(min(low, 0.99), max(high, 1.01)))  # no rounding errors
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    save(picture, path)


def gradient_norms(model, task: CopyingTask, batch: int = 100) -> torch.Tensor:
    """‖∂L/∂h_t‖ of a copying model, the mean over `batch` sequences → (T + 2c − 1,). L is the loss of the recall.

    The recurrence returns h; its gradient through the next step is that of z_{t+1} times Wᵀ.
    """
    symbols, target = task.batch(batch)
    x = symbols if model.onehot else symbols.unsqueeze(-1).to(model.readout.weight.dtype)
    network, c = model.network, task.c_length
    with torch.no_grad():
        projected, kernel = network.cell.project(x), network.kernel()
    projected.requires_grad_()
    h = stair_recurrence(projected, kernel, network.start(batch), network.stair, network.nonlinearity)
    h.retain_grad()
    mean_cross_entropy(model.readout(h)[-c:], target[-c:]).backward()
    through = h.grad[:-1] + projected.grad[1:] @ kernel.t()                              # (T + 2c − 1, B, H)
    return batch * through.norm(dim=2).mean(1)


def script_of_run(folder: Path):
    """The script of a run as a module: it builds the model."""
    name = read_config(folder)["script"]
    if not (Path(__file__).parents[1] / f"{name}.py").exists():
        raise UserError(f"there is no {name}.py here, which made the run; draw in the folder of the scripts")
    return importlib.import_module(name)


def product_after(numbers: torch.Tensor) -> torch.Tensor:
    """|∏ of the numbers after step t| for each t, 1 at the last one: (T,) → (T,)."""
    after = torch.cat((numbers[1:], numbers.new_ones(1)))
    return after.flip(0).cumprod(0).flip(0).abs()


def draw_gradients(folders: list[Path], path: Path) -> None:
    """How far back the gradient of the recall reaches, at the start and after training; thin: the product of g_t alone.

    Each line is divided by its value at the last step before the recall. What falls below FAINT leaves the picture.
    """
    check_lines(len(folders), "name fewer folders")
    picture, left = figure(10.0, 4.4)
    left.remove()
    left, right = picture.subplots(1, 2, sharey=True)
    thin = dict(color="0", linewidth=0.6)
    for number, folder in enumerate(map(Path, folders)):
        config = read_config(folder)
        if task_of(config) != "copytask" or config["options"]["net_type"]["value"] == "LSTM":
            raise UserError(f"{folder} is no run of the copying task with a stair; name runs of copytask_*.py")
        script = script_of_run(folder)
        trained, options = script.load(folder)
        torch.manual_seed(options.random_seed)
        task, recall = CopyingTask(options.T, options.labels, options.c_length, seed=1), options.T + options.c_length
        for axes, model in ((left, script.build(options).double()), (right, trained.double())):
            norms, stair = gradient_norms(model, task)[:recall], model.network.stair
            axes.semilogy((norms / norms[-1]).tolist(), **line(number, name_of(folder)), markevery=(5 * number, APART))
            if stair.rule == "scale" and stair(1).ndim == 1:
                axes.semilogy(product_after(stair(recall).detach()).tolist(), **thin)
    for axes, title in ((left, "at the start"), (right, "after training")):
        axes.set(xlabel="step t", title=title, ylim=(FAINT, 30))
        axes.grid(alpha=0.3)
    left.set_ylabel("‖∂L/∂h_t‖, L the loss of the recall")
    if any(drawn.get_linewidth() == thin["linewidth"] for drawn in right.lines):
        right.plot([], [], **thin, label="the product of g_t alone")
    right.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    save(picture, path)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m evidence.pictures", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="folders of runs")
    parser.add_argument("--task", choices=list(TASKS), help="draw the rows of a task's table")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="with --task: the rows that --only of tables picks")
    parser.add_argument("--with", dest="extra", default="", metavar="FLAGS",
                        help="with --task: of the rows run with these flags, as in --with='--T 500'")
    parser.add_argument("--seeds", type=FLAGS["random_seed"].accepts, nargs="+", default=SEEDS,
                        help="with --task; default: 400 to 404")
    parser.add_argument("--save", type=Path, nargs="+", default=[RUNS], help="with --task: the folders of runs")
    parser.add_argument("--vary", nargs="+", metavar=("FLAG", "VALUE"),
                        help="with --task: the score against the values of a flag, as in --vary T 200 500")
    parser.add_argument("--published", action="store_true",
                        help="with --task: the published curves of the same rows too; of the characters the last value")
    parser.add_argument("--stairs", action="store_true", help="draw the schedules of nvar")
    parser.add_argument("--alpha", action="store_true", help="draw the learned α_t of runs, or of the rows of --task")
    parser.add_argument("--spectrum", action="store_true", help="draw the eigenvalues of W of the runs")
    parser.add_argument("--gradients", action="store_true", help="draw ‖∂L/∂h_t‖ over t of runs of the copying task")
    parser.add_argument("-o", "--output", type=Path, default=Path("curves.png"), help="default: %(default)s")
    return parser


@drawing()
def main(argv=None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.published and (not args.task or args.vary or args.alpha):
        parser.error("--published needs --task, and learning curves")
    if args.vary and (len(args.vary) < 2 or not args.task):
        parser.error("--vary needs --task, a flag and its values, as in --task copytask --vary T 200 500")
    if args.task and (args.runs or args.spectrum or args.gradients):
        parser.error("--task draws rows; leave it out to draw the folders of runs")
    try:
        extra = shlex.split(args.extra)
    except ValueError as error:
        parser.error(f"--with {args.extra} cannot be read ({error}); quote it as in --with='--T 500'")
    if args.stairs:
        draw_stairs(args.output)
    elif args.vary:
        name, *values = args.vary[0].lstrip("-"), *args.vary[1:]
        columns = vary(args.task, name, values, extra, args.only)
        for rows in columns.values():
            find_runs(rows, args.seeds, *args.save)
        draw_vary(columns, args.task, name, args.output)
    elif args.task:
        rows = rows_with_runs(args.task, args.only, args.save, args.seeds, extra)
        if args.alpha:
            draw_alpha([next(iter(row.runs.values())) for row in rows], args.output)
        else:
            draw_rows(rows, args.task, args.output, args.published)
    elif args.runs:
        draw = draw_alpha if args.alpha else draw_spectrum if args.spectrum else draw_gradients if args.gradients \
            else draw_runs
        draw(args.runs, args.output)
    else:
        parser.error("name the folders of one or more runs, --task or --stairs")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    start(main)
