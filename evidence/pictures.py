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
those of runs (common/runs/folder.py): W and the gradients need best.pt, α is read from stair.csv.
"""

import argparse
import importlib
import statistics
import time
from functools import partial
from pathlib import Path

import torch

from common.cells import NNRNN
from common.copytask import CopyingTask
from common.errors import UserError, run_main
from common.network import mean_cross_entropy
from common.recurrence import stair_recurrence
from common.runs import curves
from common.runs.flags import FLAGS
from common.runs.records import read_config, read_result, read_stair
from common.stair import SCHEDULES, schedule
from evidence import published
from evidence.rows import GAIN, SMALL_GRID, TASKS, Row, add_row_options, find_runs, rows_asked_for, rows_at, task_of
from evidence.table import TASK_TITLES, gains_of, measures_of

WATCH_SECONDS = 5
FAINT = 1e-5  # of a gradient that is 1 at the recall
APART = 45    # steps between two markers of a line over t


def draw_published(axes, row: Row, number: int) -> None:
    """The published curve of a row, hollow; of the characters its final test score, beside ours."""
    if not (curve := published.curve_of(row)):
        return
    every = 3 if row.task == "copytask" else 1               # 150 dots a row would hide each other
    what, size = ("published test accuracy", 7) if row.task == "language" else ("published", 3)
    dots = dict(linestyle="none", marker=curves.MARKERS[number], markersize=size, color=curves.COLOURS[number])
    if row.task == "language":
        ours = [result for result in row.results if "best_epoch" in result]
        axes.plot([result["best_epoch"] for result in ours], [result["test_accuracy"] for result in ours], **dots,
                  label=f"{row.model}, {row.stair}, test accuracy")
    label = f"{row.curve or row.model}, {what}"
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
    curves.check_lines(len(lines))
    picture, (axes,) = curves.figure()
    measure = GAIN.get(rows[0].task) or measures_of(rows)[0].key
    for number, (row, results) in enumerate(lines):
        scores = {place + 0.03 * (number - (len(lines) - 1) / 2): [r[measure] for r in found]   # no bar hides another
                  for place, found in enumerate(results) if found}
        axes.errorbar(list(scores), list(map(statistics.mean, scores.values())),
                      [statistics.stdev(found) if len(found) > 1 else 0 for found in scores.values()], capsize=3,
                      **curves.line(number, f"{row.model}, {row.stair}"))
    if rows[0].task == "copytask":
        axes.axhline(1 / 8, color="0.3", linewidth=1.0, label="memoryless")
    help_ = f": {FLAGS[dest].help}" if (dest := name.replace("-", "_")) in FLAGS else ""
    axes.set(xlabel=name + help_, ylabel=f"{measure.replace('_', ' ')}, mean ± standard deviation")
    axes.set_xticks(range(len(ended)), list(ended))
    curves.show_legend(axes, fontsize=7)
    curves.save(picture, path)


def draw_gains(seeds, folders: list[Path], path: Path) -> None:
    """A panel a task: what each stair gains on each cell beside the plain network, with its 95 % interval.

    Of the tables at a size for two cores. A filled point holds after Holm's adjustment over its panel.
    """
    picture, panels = curves.figure(10.0, 3.9, columns=len(TASKS))
    cells, (none, *stairs) = SMALL_GRID
    for axes, task in zip(panels, TASKS, strict=True):
        rows = [row for row in rows_at(task, True, [])
                if row.cell in cells and row.stair in (none, *stairs) and not row.source]
        find_runs(rows, seeds, *folders)
        gains = gains_of(rows)
        for number, cell in enumerate(cells):
            look = {**curves.line(number, cell), "linestyle": "none", "markersize": 5}
            axes.plot([], [], **look)
            for row in rows:
                if row.cell == cell and (gain := gains.get((task, row.name))):
                    reach = [[gain.mean - gain.low], [gain.high - gain.mean]]
                    axes.errorbar([gain.mean], [stairs.index(row.stair) + 0.2 * (number - 1)], xerr=reach, capsize=2,
                                  **{**look, "label": None, "markerfacecolor": None if gain.holds else "white"})
        axes.axvline(0, color="0.3", linewidth=1.0)
        axes.set(title=TASK_TITLES[task], xlabel=f"gain in {GAIN[task].replace('_', ' ')}, points")
    panels[0].set_yticks(range(len(stairs)), stairs)
    panels[0].set(ylabel="stair", ylim=(len(stairs) - 0.5, -0.5))
    panels[-1].plot([], [], color="0.3", marker="o", linestyle="none", label="filled: holds\n(Holm, 5 %)")
    curves.show_legend(panels[-1])
    curves.save(picture, path)


def draw_stairs(path: Path, steps: int = 40) -> None:
    """The schedules ρ_t of nvar over the first `steps` steps."""
    picture, (axes,) = curves.figure()
    for number, name in enumerate(SCHEDULES):
        axes.plot(range(steps), schedule(name, steps).tolist(), **curves.line(number, name), markevery=(number, 9))
    axes.axhline(0, color="0.3", linewidth=0.8)
    axes.set(xlabel="step t", ylabel="ρ_t")
    axes.legend(fontsize=8)
    curves.save(picture, path)


def looks_of(folders: list[Path]):
    """(folder, its config.json, the look of its line) of runs that share a picture."""
    curves.check_lines(len(folders))
    configs = list(map(read_config, folders))
    for number, (folder, config, label) in enumerate(zip(folders, configs, curves.labels_of(configs), strict=True)):
        yield folder, config, curves.line(number, label)


def draw_alpha(folders: list[Path], path: Path) -> None:
    """The learned α_t of runs, an axis a script; the mean over the units where each has a number of its own."""
    by_script = {}
    for folder in folders:
        if not (folder / "stair.csv").exists():
            raise UserError(f"{folder} has no learned stair, or has not ended; name another run")
        by_script.setdefault(read_config(folder)["script"], []).append(folder)
    picture, panels = curves.figure(8.0, 3.0 * len(by_script), rows=len(by_script))
    for axes, (script, runs) in zip(panels, by_script.items(), strict=True):
        for number, (folder, _, look) in enumerate(looks_of(runs)):
            axes.plot(list(map(statistics.mean, read_stair(folder))), **{**look, "linewidth": 1.2},
                      markevery=(5 * number, APART))
        axes.set(xlabel="step t", ylabel="α_t")
        axes.set_title({"alpha": "g_t = α_t", "expalpha": "g_t = 1 − exp(−α_t |z|)"}.get(script.split("_")[-1]),
                       fontsize=9)
        curves.show_legend(axes)
    curves.save(picture, path)


@torch.no_grad()
def draw_spectrum(folders: list[Path], path: Path) -> None:
    """The eigenvalues of W, of any cell: how far from the unit circle, and where. They come in conjugate pairs.

    The legend tells nnRNN's departure from normality, ‖T‖_F / ‖Λ‖_F.
    """
    picture, (axes,) = curves.figure()
    axes.axhline(1.0, color="0.3", linewidth=0.8)
    for folder, _, look in looks_of(folders):
        network = script_of_run(folder).load(folder)[0].network
        cell = network.cell
        if cell is None:
            raise UserError(f"{folder} has no recurrent matrix W (an LSTM has four); name a run of another cell")
        if isinstance(cell, NNRNN):
            look["label"] += f": ‖T‖ / ‖Λ‖ = {(cell.upper.norm() / (2 ** 0.5 * cell.gamma.norm())).item():.2g}"
        eigenvalues = torch.linalg.eigvals(network.kernel().double())
        angle, modulus = eigenvalues.angle().abs(), eigenvalues.abs()
        axes.scatter(angle.tolist(), modulus.tolist(), s=18, marker=look["marker"], facecolors="none",
                     edgecolors=look["color"], label=look["label"], linewidths=0.9)
    low, high = axes.get_ylim()
    axes.set(xlabel="|angle of λ|, radians", ylabel="|λ|", ylim=(min(low, 0.99), max(high, 1.01)))  # no rounding errors
    curves.show_legend(axes)
    curves.save(picture, path)


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
    h = stair_recurrence(projected, kernel, network.initial_state(batch), network.stair, network.nonlinearity)
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


def draw_gradients(folders: list[Path], path: Path) -> None:
    """How far back the gradient of the recall reaches, at the start and after training; thin: the product of g_t alone.

    Each line is divided by its value at the last step before the recall. What falls below FAINT leaves the picture.
    """
    picture, (left, right) = curves.figure(10.0, 4.4, columns=2)
    thin = dict(color="0", linewidth=0.6)
    for number, (folder, config, look) in enumerate(looks_of(folders)):
        if task_of(config) != "copytask" or config["options"]["net_type"]["value"] == "LSTM":
            raise UserError(f"{folder} is no run of the copying task with a stair; name runs of copytask_*.py")
        script = script_of_run(folder)
        trained, options = script.load(folder)
        torch.manual_seed(options.random_seed)
        task, recall = CopyingTask(options.T, options.labels, options.c_length, seed=1), options.T + options.c_length
        for axes, model in ((left, script.build(options).double()), (right, trained.double())):
            norms, stair = gradient_norms(model, task)[:recall], model.network.stair
            axes.semilogy((norms / norms[-1]).tolist(), **look, markevery=(5 * number, APART))
            if stair.rule == "scale" and stair(1).ndim == 1:
                later = torch.cat((stair(recall).detach()[1:], torch.ones(1))).flip(0)
                axes.semilogy(later.cumprod(0).flip(0).abs().tolist(), **thin)  # of the steps after t
    for axes, title in ((left, "at the start"), (right, "after training")):
        axes.set(xlabel="step t", title=title, ylim=(FAINT, 30))
    left.set_ylabel("‖∂L/∂h_t‖, L the loss of the recall")
    if any(drawn.get_linewidth() == thin["linewidth"] for drawn in right.lines):
        right.plot([], [], **thin, label="the product of g_t alone")
    curves.show_legend(right)
    curves.save(picture, path)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m evidence.pictures", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    option, switch = parser.add_argument, partial(parser.add_argument, action="store_true")
    option("runs", nargs="*", type=Path, help="folders of runs")
    option("--task", help="draw the rows of a task's table, or of a script of your own")
    add_row_options(parser)
    switch("--published", help="with --task: the published curves of the rows too; of the characters the last value")
    switch("--watch", help="draw again every few seconds, until the runs have ended")
    switch("--gains", help="draw what each stair gains on each task")
    switch("--stairs", help="draw the schedules of nvar")
    kind = partial(option, dest="draw_folders", action="store_const", default=curves.draw_curves)
    kind("--alpha", const=draw_alpha, help="draw the learned α_t of runs, or of --task's rows")
    kind("--spectrum", const=draw_spectrum, help="draw the eigenvalues of W of the runs")
    kind("--gradients", const=draw_gradients, help="draw ‖∂L/∂h_t‖ over t of copying runs")
    option("-o", "--output", type=Path, default=Path("curves.png"), help="default: %(default)s")
    return parser


def draw(args, parser) -> None:
    """Draw what was asked for."""
    path = args.output
    if args.stairs:
        draw_stairs(path)
    elif args.gains:
        draw_gains(args.seeds, args.save, path)
    elif args.vary:
        draw_vary(rows_asked_for(args.task, args), args.vary[0].lstrip("-"), path)
    elif args.task:
        rows = [row for row in rows_asked_for(args.task, args)[""] if row.runs]
        if not rows:
            raise UserError(f"no run of {args.task} in {' or '.join(map(str, args.save))} matches; run some with "
                            f"python -m evidence {args.task} --run")
        if args.draw_folders is draw_alpha:
            draw_alpha([next(iter(row.runs.values())) for row in rows], path)
        else:
            beside = [partial(draw_published, row=row, number=k) for k, row in enumerate(rows) if args.published]
            curves.draw_groups([(f"{row.model}, {row.stair}", list(row.runs.values())) for row in rows], path,
                               with_training=False, beside=beside)
    elif args.runs:
        args.draw_folders(args.runs, path)
    else:
        parser.error("name the folders of one or more runs, --task, --gains or --stairs")


@curves.drawing()
def main(argv=None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.vary and (len(args.vary) < 2 or not args.task):
        parser.error("--vary needs --task, a flag and its values, as in --task copytask --vary T 200 500")
    if args.task and (args.runs or args.draw_folders in (draw_spectrum, draw_gradients)):
        parser.error("--task draws rows; leave it out to draw the folders of runs")
    while True:
        draw(args, parser)
        print(f"wrote {args.output}", flush=True)
        if not args.watch or all(read_result(folder) is not None for folder in args.runs):
            return
        time.sleep(WATCH_SECONDS)


if __name__ == "__main__":
    run_main(main)
