"""A training step of every task and cell, side by side in one process.

    python -m benchmarks -o results/speed.md    the page
    python -m benchmarks --quick                fewer repetitions
    python -m benchmarks --tasks copying        one task only
    python -m benchmarks --rows --data data     what a run of each published row costs: memory and hours
    python -m benchmarks --cuda --engine triton --tf32

Contenders take turns, so that a busy machine slows all of them alike. A time is the median of its turns, with the
quartiles behind it; a ratio is the median of the ratios in each turn. A whole step is forward, loss, backward and
optimizer. A turn of the copying task is ten steps: its arrays fit into the caches, and in training the step before has
filled them, not another contender.

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
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from benchmarks import authors_way
from common import copytask, language, optim, smnist
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

SHAPES = {  # T, B, H, I, C, a read-out at every step
    "copying": (220, 10, 128, 10, 9, True),
    "psMNIST": (784, 100, 512, 1, 10, False),
    "characters": (150, 128, 1024, 200, 50, True),
}
SMALL = {"copying": (220, 8, 64, 10, 9, True), "psMNIST": (20, 8, 64, 1, 10, False),
         "characters": (9, 8, 64, 6, 7, True)}
STARTS = {"copying": "henaff", "psMNIST": "cayley", "characters": "cayley"}  # of a rotation, as in the published rows
CELLS = ("RNN", "RNN-Orth", "expRNN", "nnRNN")
SCRIPTS = {"copying": "copytask", "psMNIST": "sMNIST", "characters": "language"}
DRY_RUN = re.compile(r"([\d,]+) parameters;.*an update takes (\S+ s), the (\d+) updates of the run about ([^;\n]+)"
                     r"(?:; this took (\S+ GB) of memory)?", re.DOTALL)
STEPS_IN_A_TURN = {"copying": 10, "psMNIST": 1, "characters": 1}


class TanhRNN(nn.RNN):
    """torch.nn.RNN with the interface of this project's networks."""

    cell = stair = None

    def forward(self, x, state=None, kernel=None, embedding=None, last_only=False):
        if not x.is_floating_point():
            rows = torch.eye(self.input_size, device=x.device) if embedding is None else embedding
            x = nn.functional.embedding(x, rows)
        h, last = super().forward(x)
        return (last[0], last[0]) if last_only else (h, last[0])


def inputs(task: str, device):
    """Input and target of a batch in the shape of a task."""
    steps, batch, _, _, classes, _ = SHAPES[task]
    if task == "copying":
        return CopyingTask().batch(batch, device)
    if task == "psMNIST":
        return torch.rand(steps, batch, 1, device=device), torch.randint(classes, (batch,), device=device)
    return (torch.randint(classes, (steps, batch), device=device),
            torch.randint(classes, (steps * batch,), device=device))


def our_step(task: str, network, device):
    """→ a function that does one update of the task's own model around `network`."""
    _, _, _, input_size, classes, _ = SHAPES[task]
    x, target = inputs(task, device)
    if task == "copying":
        model = copytask.CopyModel(network, classes).to(device)
    elif task == "psMNIST":
        model = smnist.PixelModel(network).to(device)
    else:
        model = language.CharacterModel(network, classes, input_size).to(device)
    optimizer = optimizer_for(model, 1e-5, 1e-6, alpha=0.9)

    def step():
        out = model(x)
        logits = out[0] if isinstance(out, tuple) else out
        optim.step(model, optimizer, mean_cross_entropy(logits, target), alam=1e-4)

    return step


def authors_step(task: str, net_type: str, device):
    steps, batch, hidden, input_size, classes, every_step = SHAPES[task]
    model = authors_way.AuthorsModel(net_type, input_size, hidden, classes, skew_start(STARTS[task], hidden)).to(device)
    x, target = inputs(task, device)
    if task == "characters":
        x = nn.functional.embedding(x, torch.randn(classes, input_size, device=device))
    return authors_way.training_step(model, x, target.view(steps, batch) if every_step else target, every_step)


def our_network(task: str, net_type: str, engine: str):
    steps, _, hidden, input_size, _, _ = SHAPES[task]
    rinit = STARTS[task] if net_type in ("expRNN", "nnRNN") else "random"
    return build_network(net_type, input_size, hidden, FixedStair("expn", steps), "modrelu", rinit, "xavier", engine)


class Turn(NamedTuple):
    """Seconds a step of one turn, by the clock and of all threads together."""

    wall: float
    cpu: float


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

    for step in contenders.values():
        once(step)
    turns = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, step in contenders.items():
            turns[name].append(once(step))
    return turns


def shown(turns: list[Turn], device) -> str:
    """Median and quartiles in milliseconds; on a CPU those of the CPU time too."""
    def text(seconds):
        low, middle, high = statistics.quantiles((1e3 * second for second in seconds), n=4)
        return f"{middle:.1f} ({low:.1f}–{high:.1f})"

    wall = text(turn.wall for turn in turns)
    return wall if device.type == "cuda" else f"{wall}, CPU {text(turn.cpu for turn in turns)}"


def ratio(slow: list[Turn], fast: list[Turn]) -> float:
    return statistics.median(a.wall / b.wall for a, b in zip(slow, fast, strict=True))


def compare(task: str, rounds: int, engine: str, device, say) -> None:
    """The table of one task: every cell against the authors' way and nn.RNN."""
    steps, batch, hidden, input_size, _, _ = SHAPES[task]
    say(f"\n## {task}: T {steps}, B {batch}, H {hidden}\n")
    say("| cell | ours, ms | authors' way, ms | ratio | nn.RNN (tanh), ms | ratio |\n|---|---|---|---|---|---|")
    for net_type in CELLS:
        turns = take_turns({"ours": our_step(task, our_network(task, net_type, engine), device),
                            "authors": authors_step(task, net_type, device),
                            "nn.RNN": our_step(task, TanhRNN(input_size, hidden), device)},
                           rounds, device, STEPS_IN_A_TURN[task])
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


def around_the_tables(path: Path, place: str) -> list[str]:
    """What stands before and after the tables of a page, which lie between the lines `place` and <!-- end -->."""
    with reading(path, "name a page that is there with -o, or write a new one with > FILE"):
        found = re.split(f"(?<={re.escape(place)}\n).*?(?=<!-- end -->)", path.read_text(encoding="utf-8"), maxsplit=1,
                         flags=re.DOTALL)
    if len(found) < 2:
        raise UserError(f"{path} has no place for the tables: add the two lines {place} and <!-- end -->")
    return found


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=SHAPES, default=list(SHAPES), help="default: all three")
    parser.add_argument("--engine", type=one_of("auto", *ENGINES), default="auto",
                        help="time loop of our step (default: %(default)s)")
    parser.add_argument("--rounds", type=number(int, 2), default=9, help="turns of every contender (default: 9)")
    parser.add_argument("--quick", action="store_true", help="three rounds")
    parser.add_argument("--rows", nargs="?", const="", metavar="TEXT",
                        help="only what a run of each published row costs, of those with TEXT in their name")
    parser.add_argument("--data", help="data folder of --rows")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument("--threads", type=number(int, 1), help="CPU threads (default: all cores)")
    parser.add_argument("--cuda", action="store_true", help="run on the GPU")
    parser.add_argument("--tf32", action="store_true", help="float32 products by the GPU's tensor cores")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="put the tables into their place in FILE too")
    return parser


def main(argv=None) -> None:
    args = make_parser().parse_args(argv)
    if args.tf32 and not args.cuda:
        raise UserError("--tf32 has no meaning on the CPU, whose products are exact; add --cuda or leave it out")
    device = prepare_machine(args.cuda, args.threads, args.tf32)
    keep_freed_memory()
    if (reason := unavailable_reason(args.engine, device)) is not None:
        raise UserError(reason)
    torch.manual_seed(0)
    rounds = 3 if args.quick else args.rounds
    if args.small:
        SHAPES.update(SMALL)
        STEPS_IN_A_TURN.update(copying=1)
    page, place = [], f"<!-- python -m benchmarks{' --rows' * (args.rows is not None)} -->"
    before, after = around_the_tables(args.output, place) if args.output else ("", "")

    def say(text):
        page.append(text)
        print(text, flush=True)

    name = device_name(device) if args.cuda else f"{processor()}, {device_name(device)}"
    say(f"{name}; torch {torch.__version__}, {'tf32' if args.tf32 else 'float32'}; {time.strftime('%Y-%m-%d')}, commit "
        f"{git_commit() or 'unknown'}.")
    if args.rows is not None:
        more = ["--threads", str(torch.get_num_threads()), *["--cuda"] * args.cuda, *["--tf32"] * args.tf32]
        cost_of_rows([SCRIPTS[task] for task in args.tasks], args.rows, more, args.data, say)
    else:
        say(f"Medians of {rounds} turns, quartiles in brackets.")
        for task in args.tasks:
            compare(task, rounds, args.engine, device, say)
    if args.output:
        write_atomically(args.output, "\n".join([before, *page, "", after]).encode(), "or name another file with -o")


if __name__ == "__main__":
    run_main(main)
