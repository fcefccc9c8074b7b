"""A training step of every task and cell, side by side in one process.

    python -m benchmarks -o results/speed.md                     the page
    python -m benchmarks --rounds 3 --tasks copying              fewer repetitions, one task only
    python -m benchmarks --rows --data data                      what a run of each published row costs
    python -m benchmarks --cuda --engine triton --tf32

Contenders take turns, so that a busy machine slows all of them alike. A time is the median of its turns, with the
quartiles behind it; a ratio is the median of the ratios in each turn. A turn of the copying task is ten steps: its
arrays fit into the caches, and in training the step before has filled them, not another contender.

    ours         this project, engine auto (--engine picks another)
    authors      autograd through a Python loop, benchmarks/authors_way.py
    nn.RNN       torch.nn.RNN (tanh) in the place of the cell

CPU time counts all threads of this process, also threads that wait for others in a loop, and no other program.
"""

import argparse
import platform
import re
import statistics
import subprocess
import sys
import time
from collections import namedtuple
from functools import partial
from pathlib import Path

import torch
from torch import nn

from benchmarks import authors_way
from common import cells, copytask, language, optim, smnist
from common.copytask import CopyingTask
from common.errors import UserError, run_main
from common.network import build_network, mean_cross_entropy
from common.optim import optimizer_for
from common.orthogonal import skew_start
from common.recurrence import ENGINES, unavailable_reason
from common.runs.flags import number, one_of
from common.runs.machine import device_name, keep_freed_memory, prepare_machine
from common.runs.provenance import git_commit
from common.runs.records import reading, write_atomically
from common.stair import FixedStair
from evidence.rows import rows_of

# of a task: its script, sizes, whether every step is read out, the published start of a rotation, steps in a turn
Shape = namedtuple("Shape", "task steps batch hidden input_size classes every_step rinit in_a_turn")
SHAPES = {
    "copying": Shape("copytask", 220, 10, 128, 10, 9, True, "henaff", in_a_turn=10),
    "psMNIST": Shape("sMNIST", 784, 100, 512, 1, 10, False, "cayley", in_a_turn=1),
    "characters": Shape("language", 150, 128, 1024, 200, 50, True, "cayley", in_a_turn=1),
}
Turn = namedtuple("Turn", "wall cpu")  # seconds of a step, by the clock and of all threads together
CELLS = ("RNN", "RNN-Orth", "expRNN", "nnRNN")
DRY_RUN = re.compile(r"([\d,]+) parameters;.*an update takes (\S+ s), the (\d+) updates of the run about ([^;\n]+)"
                     r"(?:; this took (\S+ GB) of memory)?", re.DOTALL)


class TanhRNN(nn.RNN):
    """torch.nn.RNN with the interface of this project's networks."""

    cell = stair = None

    def forward(self, x, state=None, kernel=None, embedding=None, last_only=False):
        if not x.is_floating_point():
            rows = torch.eye(self.input_size, device=x.device) if embedding is None else embedding
            x = cells.look_up(x, rows)
        h, last = super().forward(x)
        return (last[0], last[0]) if last_only else (h, last[0])


def inputs(shape: Shape, device):
    """Input and target of a batch in the shape of a task."""
    _, steps, batch, _, _, classes, *_ = shape
    if shape.task == "copytask":
        return CopyingTask().batch(batch, device)
    if shape.task == "sMNIST":
        return torch.rand(steps, batch, 1, device=device), torch.randint(classes, (batch,), device=device)
    return torch.randint(classes, (2, steps, batch), device=device).unbind()


def our_step(shape: Shape, network, device):
    """→ a function that does one update of the task's own model around `network`."""
    x, target = inputs(shape, device)
    if shape.task == "copytask":
        model = copytask.CopyModel(network, shape.classes).to(device)
    elif shape.task == "sMNIST":
        model = smnist.PixelModel(network).to(device)
    else:
        model = language.CharacterModel(network, shape.classes, shape.input_size).to(device)
    optimizer = optimizer_for(model, 1e-5, 1e-6, alpha=0.9)

    def step():
        out = model(x)
        logits = out[0] if isinstance(out, tuple) else out
        optim.step(model, optimizer, mean_cross_entropy(logits, target), alam=1e-4)

    return step


def authors_step(shape: Shape, net_type: str, device):
    _, _, _, hidden, input_size, classes, every_step, rinit, _ = shape
    model = authors_way.AuthorsModel(net_type, input_size, hidden, classes, skew_start(rinit, hidden)).to(device)
    x, target = inputs(shape, device)
    if shape.task == "language":
        x = nn.functional.embedding(x, torch.randn(classes, input_size, device=device))
    return authors_way.training_step(model, x, target, every_step)


def our_network(shape: Shape, net_type: str, engine: str):
    rinit = shape.rinit if net_type in ("expRNN", "nnRNN") else "random"
    return build_network(net_type, shape.input_size, shape.hidden, FixedStair("expn", shape.steps), "modrelu", rinit,
                         "xavier", engine)


def take_turns(contenders: dict, rounds: int, device, steps: int = 1) -> dict[str, list[Turn]]:
    """`rounds` turns of every contender, after one warm-up each.

    `steps` at a time show what a step takes when the next one follows, as in training: caches are warm, and the host
    runs ahead of a GPU.
    """
    synchronize = torch.cuda.synchronize if device.type == "cuda" else torch.cpu.synchronize

    def once(step):
        synchronize()
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            step()
        synchronize()
        return Turn((time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps)

    turns = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, step in contenders.items():
            turns[name].append(once(step))
    return {name: found[1:] for name, found in turns.items()}


def shown(turns: list[Turn], device) -> str:
    """Median and quartiles in milliseconds; on a CPU those of the CPU time too."""
    def text(seconds):
        low, middle, high = statistics.quantiles((1e3 * second for second in seconds), n=4)
        return f"{middle:.1f} ({low:.1f}–{high:.1f})"

    wall = text(turn.wall for turn in turns)
    return wall if device.type == "cuda" else f"{wall}, CPU {text(turn.cpu for turn in turns)}"


def ratio(slow: list[Turn], fast: list[Turn]) -> float:
    return statistics.median(a.wall / b.wall for a, b in zip(slow, fast, strict=True))


def compare(name: str, shape: Shape, rounds: int, engine: str, device, say) -> None:
    """The table of one task: every cell against the authors' way and nn.RNN."""
    say(f"\n## {name}: T {shape.steps}, B {shape.batch}, H {shape.hidden}\n")
    say("| cell | ours, ms | authors' way, ms | ratio | nn.RNN (tanh), ms | ratio |\n|---|---|---|---|---|---|")
    for net_type in CELLS:
        turns = take_turns({"ours": our_step(shape, our_network(shape, net_type, engine), device),
                            "authors": authors_step(shape, net_type, device),
                            "nn.RNN": our_step(shape, TanhRNN(shape.input_size, shape.hidden), device)},
                           rounds, device, shape.in_a_turn)
        say(f"| {net_type} | {shown(turns['ours'], device)} | {shown(turns['authors'], device)} "
            f"| {ratio(turns['authors'], turns['ours']):.1f}× | {shown(turns['nn.RNN'], device)} "
            f"| {ratio(turns['nn.RNN'], turns['ours']):.1f}× |")


def cost_of_rows(tasks, text: str, more: list[str], data: str | None, say) -> None:
    """What each row without a stair takes, as its own --dry-run finds; a stair costs nothing beside it."""
    say("\n| task | row | parameters | memory | an update | updates | the run |\n|---|---|---|---|---|---|---|")
    for task in tasks:
        where = ["--data", data] if data and task != "copytask" else []
        for row in rows_of(task, []):
            if row.stair == "none" and "henaff" not in row.model and not row.source and text in row.name:
                command = [*row.command(), "--dry-run", *more, *where]
                done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
                if (said := DRY_RUN.search(done.stdout)) is None:
                    raise UserError(f"python {' '.join(command)} ended with {done.stderr.strip() or done.stdout}", 1)
                parameters, update, updates, whole, memory = said.groups()
                say(f"| {task} | {row.model} | {parameters} | {memory or '—'} | {update} | {updates} | {whole} |")


def processor() -> str:
    """The name of the processor, where the system tells it."""
    told = Path("/proc/cpuinfo")
    found = told.exists() and re.search(r"^model name\s*: (.+)$", told.read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def page_with(tables: str, path: Path, place: str) -> str:
    """The page `path` with `tables` between its lines `place` and <!-- end -->."""
    with reading(path, "name a page that is there with -o, or write a new one with > FILE"):
        text, count = re.subn(f"(?<={re.escape(place)}\n).*?(?=<!-- end -->)", lambda found: tables,
                              path.read_text(encoding="utf-8"), count=1, flags=re.DOTALL)
    if not count:
        raise UserError(f"{path} has no place for the tables: add the two lines {place} and <!-- end -->")
    return text


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    option, switch = parser.add_argument, partial(parser.add_argument, action="store_true")
    option("--tasks", nargs="+", choices=SHAPES, default=list(SHAPES), help="default: all three")
    option("--engine", type=one_of("auto", *ENGINES), default="auto", help="time loop of our step (default: auto)")
    option("--rounds", type=number(int, 2), default=9, help="turns of every contender (default: 9)")
    option("--rows", nargs="?", const="", metavar="TEXT", help="what a run of each row costs, of those that hold TEXT")
    option("--data", help="data folder of --rows")
    switch("--small", help="H 64 and 8 sequences, to see that it works")
    option("--threads", type=number(int, 1), help="CPU threads (default: all cores)")
    switch("--cuda", help="run on the GPU")
    switch("--tf32", help="float32 products by the GPU's tensor cores")
    option("-o", "--output", type=Path, metavar="FILE", help="put the tables into their place in FILE too")
    return parser


def main(argv=None) -> None:
    args = make_parser().parse_args(argv)
    device = prepare_machine(args.cuda, args.threads, args.tf32)
    keep_freed_memory()
    if (reason := unavailable_reason(args.engine, device)) is not None:
        raise UserError(reason)
    torch.manual_seed(0)
    shapes = {name: SHAPES[name]._replace(**dict(batch=8, hidden=64) if args.small else {}) for name in args.tasks}
    page, place = [], f"<!-- python -m benchmarks{' --rows' * (args.rows is not None)} -->"
    if args.output:
        page_with("", args.output, place)  # a wrong name is told before the work

    def say(text):
        page.append(text)
        print(text, flush=True)

    name = device_name(device) if args.cuda else f"{processor()}, {device_name(device)}"
    say(f"{name}; torch {torch.__version__}, {'tf32' if args.tf32 else 'float32'}; {time.strftime('%Y-%m-%d')}, commit "
        f"{git_commit() or 'unknown'}.")
    if args.rows is not None:
        more = ["--threads", str(torch.get_num_threads()), *["--cuda"] * args.cuda, *["--tf32"] * args.tf32]
        cost_of_rows([shape.task for shape in shapes.values()], args.rows, more, args.data, say)
    else:
        say(f"Medians of {args.rounds} turns, quartiles in brackets.")
        for name, shape in shapes.items():
            compare(name, shape, args.rounds, args.engine, device, say)
    if args.output:
        text = page_with("\n".join(["", *page, "", ""]), args.output, place)
        write_atomically(args.output, text.encode(), "or name another file with -o")


if __name__ == "__main__":
    run_main(main)
