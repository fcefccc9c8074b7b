"""Pictures of what the stairs are, of what a run has learned and of how far back a gradient reaches.

W and the gradients need the best.pt of a run; α is read from stair.csv.
"""

import importlib
import statistics
from pathlib import Path

import torch

from common.cells import NNRNN
from common.copytask import CopyingTask
from common.errors import UserError
from common.network import mean_cross_entropy
from common.recurrence import stair_recurrence
from common.runs.curves import COLOURS, MARKERS, check_lines, figure, labels_of, line, save
from common.runs.records import read_config, read_stair
from common.stair import SCHEDULES, schedule
from evidence.rows import task_of

FAINT = 1e-5  # of a gradient that is 1 at the recall
APART = 45  # steps between two markers of a line


def draw_stairs(path: Path, steps: int = 40) -> None:
    """The schedules ρ_t of nvar over the first `steps` steps."""
    picture, axes = figure()
    for number, name in enumerate(SCHEDULES):
        axes.plot(range(steps), schedule(name, steps).tolist(), **line(number, name), markevery=(number, 9))
    axes.axhline(0, color="0.3", linewidth=0.8)
    axes.set(xlabel="step t", ylabel="ρ_t")
    axes.legend(fontsize=8)
    save(picture, path)


def draw_alpha(folders: list[Path], path: Path) -> None:
    """The learned α_t of runs, an axis a script; the mean over the units where each has a number of its own."""
    check_lines(len(folders), "name fewer folders")
    by_script = {}
    for folder in folders:
        if not (folder / "stair.csv").exists():
            raise UserError(f"{folder} has no learned stair, or has not ended; name another run")
        by_script.setdefault(read_config(folder)["script"], []).append(folder)
    picture, first = figure(8.0, 3.0 * len(by_script))
    first.remove()
    for place, (script, runs) in enumerate(by_script.items(), 1):
        axes = picture.add_subplot(len(by_script), 1, place)
        axes.grid(alpha=0.3)
        for number, (folder, label) in enumerate(zip(runs, labels_of(list(map(read_config, runs))), strict=True)):
            axes.plot(list(map(statistics.mean, read_stair(folder))), **{**line(number, label), "linewidth": 1.2},
                      markevery=(5 * number, APART))
        axes.set(xlabel="step t", ylabel="α_t")
        axes.set_title({"alpha": "g_t = α_t", "expalpha": "g_t = 1 − exp(−α_t |z|)"}.get(script.split("_")[-1]),
                       fontsize=9)
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    save(picture, path)


@torch.no_grad()
def draw_spectrum(folders: list[Path], path: Path) -> None:
    """The eigenvalues of W, of any cell: how far from the unit circle, and where. They come in conjugate pairs.

    The legend tells nnRNN's departure from normality, ‖T‖_F / ‖Λ‖_F.
    """
    check_lines(len(folders), "name fewer folders")
    picture, axes = figure(8.6, 4.4)
    axes.axhline(1.0, color="0.3", linewidth=0.8)
    for number, (folder, label) in enumerate(zip(folders, labels_of(list(map(read_config, folders))), strict=True)):
        network = script_of_run(folder).load(folder)[0].network
        cell = network.cell
        if cell is None:
            raise UserError(f"{folder} has no recurrent matrix W (an LSTM has four); name a run of another cell")
        if isinstance(cell, NNRNN):
            label += f": ‖T‖ / ‖Λ‖ = {(cell.upper.norm() / (2 ** 0.5 * cell.gamma.norm())).item():.2g}"
        eigenvalues = torch.linalg.eigvals(network.kernel().double())
        angle, modulus = eigenvalues.angle().abs(), eigenvalues.abs()
        axes.scatter(angle.tolist(), modulus.tolist(), s=18, marker=MARKERS[number], facecolors="none",
                     edgecolors=COLOURS[number], label=label, linewidths=0.9)
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
    check_lines(len(folders), "name fewer folders")
    picture, left = figure(10.0, 4.4)
    left.remove()
    left, right = picture.subplots(1, 2, sharey=True)
    thin = dict(color="0", linewidth=0.6)
    configs = list(map(read_config, folders))
    for number, (folder, config, label) in enumerate(zip(folders, configs, labels_of(configs), strict=True)):
        if task_of(config) != "copytask" or config["options"]["net_type"]["value"] == "LSTM":
            raise UserError(f"{folder} is no run of the copying task with a stair; name runs of copytask_*.py")
        script = script_of_run(folder)
        trained, options = script.load(folder)
        torch.manual_seed(options.random_seed)
        task, recall = CopyingTask(options.T, options.labels, options.c_length, seed=1), options.T + options.c_length
        for axes, model in ((left, script.build(options).double()), (right, trained.double())):
            norms, stair = gradient_norms(model, task)[:recall], model.network.stair
            axes.semilogy((norms / norms[-1]).tolist(), **line(number, label), markevery=(5 * number, APART))
            if stair.rule == "scale" and stair(1).ndim == 1:
                later = torch.cat((stair(recall).detach()[1:], torch.ones(1))).flip(0)
                axes.semilogy(later.cumprod(0).flip(0).abs().tolist(), **thin)  # of the steps after t
    for axes, title in ((left, "at the start"), (right, "after training")):
        axes.set(xlabel="step t", title=title, ylim=(FAINT, 30))
        axes.grid(alpha=0.3)
    left.set_ylabel("‖∂L/∂h_t‖, L the loss of the recall")
    if any(drawn.get_linewidth() == thin["linewidth"] for drawn in right.lines):
        right.plot([], [], **thin, label="the product of g_t alone")
    right.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    save(picture, path)
