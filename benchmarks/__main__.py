"""A training step of every task and cell, side by side in one process.

    python -m benchmarks                    the tables of the README
    python -m benchmarks --quick            fewer repetitions
    python -m benchmarks --tasks copying    one task only, and not how the step grows
    python -m benchmarks --growth           how the step grows with T, B and H
    python -m benchmarks --cuda --engine triton --tf32

Contenders take turns, so that a busy machine hurts all of them alike; a time is the median of its turns, with
the quartiles behind it. A whole step is forward, loss, backward and optimizer. A turn of the copying task is ten steps:
its arrays fit into the caches, and in training it is the step before that has filled them, not another contender.

    ours         this project, engine auto (--engine picks another)
    authors      autograd through a Python loop, benchmarks/authors_way.py
    nn.RNN       torch.nn.RNN (tanh) in the place of the cell
    GEMM floor   the 3 · 2 · T B H² operations of the recurrence at the rate of the faster of torch's GEMM libraries
"""

import argparse
import statistics
import time

import torch
from torch import nn

from benchmarks import authors_way
from common import copytask, language, optim, smnist
from common.data import CopyingTask
from common.errors import UserError, start
from common.network import build_network, mean_cross_entropy
from common.optim import OrthogonalRMSprop, parameter_groups
from common.orthogonal import skew_exponential, skew_start
from common.recurrence import ENGINES, stair_recurrence, unavailable_reason
from common.runs.flags import number, one_of
from common.runs.machine import device_name, keep_freed_memory, prepare_machine
from common.stair import FixedStair, Nonlinearity

SHAPES = {  # T, B, H, I, C, a read-out at every step
    "copying": (220, 10, 128, 10, 9, True),
    "psMNIST": (784, 100, 512, 1, 10, False),
    "characters": (150, 128, 1024, 200, 50, True),
}
SMALL = {"copying": (220, 8, 64, 10, 9, True), "psMNIST": (20, 8, 64, 1, 10, False),
         "characters": (9, 8, 64, 6, 7, True)}
CELLS = ("RNN", "RNN-Orth", "expRNN", "nnRNN")
STEPS_IN_A_TURN = {"copying": 10, "psMNIST": 1, "characters": 1}


class TanhRNN(nn.Module):
    """torch.nn.RNN in the shape of our networks."""

    def __init__(self, input_size, hidden_size):
        super().__init__()
        self.hidden_size, self.input_size = hidden_size, input_size
        self.rnn = nn.RNN(input_size, hidden_size)

    def kernel(self):
        return None

    def penalty(self):
        return 0.0

    def forward(self, x, state=None, kernel=None, embedding=None, last_only=False):
        if not x.is_floating_point():
            rows = torch.eye(self.input_size, device=x.device) if embedding is None else embedding
            x = nn.functional.embedding(x, rows)
        h, last = self.rnn(x)
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
    optimizer = OrthogonalRMSprop(parameter_groups(model, 1e-5, 1e-6, alpha=0.9))

    def step():
        out = model(x)
        logits = out[0] if isinstance(out, tuple) else out
        optim.step(model, optimizer, mean_cross_entropy(logits, target), alam=1e-4)

    return step


def authors_step(task: str, net_type: str, device):
    steps, batch, hidden, input_size, classes, every_step = SHAPES[task]
    model = authors_way.AuthorsModel(net_type, input_size, hidden, classes).to(device)
    x, target = inputs(task, device)
    if task == "characters":
        x = nn.functional.embedding(x, torch.randn(classes, input_size, device=device))
    return authors_way.training_step(model, x, target.view(steps, batch) if every_step else target, every_step)


def our_network(task: str, net_type: str, engine: str):
    steps, _, hidden, input_size, _, _ = SHAPES[task]
    rinit = "henaff" if net_type in ("expRNN", "nnRNN") else "random"
    return build_network(net_type, input_size, hidden, FixedStair("expn", steps), "modrelu", rinit, "xavier", engine)


def take_turns(contenders: dict, rounds: int, device, steps: int = 1) -> dict[str, list[float]]:
    """Seconds a step of every contender, `rounds` times in turn after one warm-up each.

    `steps` at a time show what a step takes when the next one follows, as in training: caches are warm, and the host
    runs ahead of a GPU.
    """
    def once(step):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(steps):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / steps

    for step in contenders.values():
        once(step)
    times = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, step in contenders.items():
            times[name].append(once(step))
    return times


def median(times: list[float]) -> float:
    return statistics.median(times)


def shown(times: list[float]) -> str:
    """Median and quartiles in milliseconds."""
    low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else (times[0],) * 3
    return f"{1e3 * median(times):.1f} ({1e3 * low:.1f}–{1e3 * high:.1f})"


def gemm_rate(batch: int, hidden: int, steps: int, device) -> tuple[float, str]:
    """FLOP/s of the faster GEMM library on the recurrence's own two products: per step, and for dW."""
    a, w = torch.randn(batch, hidden, device=device), torch.randn(hidden, hidden, device=device)
    out = torch.empty_like(a)
    tall, grad = (torch.randn(min(steps * batch, 20_000), hidden, device=device) for _ in range(2))
    libraries = {"torch.mm": (lambda: torch.mm(a, w, out=out), lambda: tall.t() @ grad)}
    if device.type == "cpu" and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        def linear(x, weight):
            return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
        libraries["oneDNN"] = (lambda: linear(a, w), lambda: linear(tall.t(), grad.t()))
    best, name_of_best = 0.0, ""
    repeat = max(1, int(2e8 / (2 * batch * hidden**2)))
    for name, (small, large) in libraries.items():
        times = take_turns({"small": lambda s=small: [s() for _ in range(repeat)], "large": large}, 7, device)
        seconds = 2 * steps * median(times["small"]) / repeat + median(times["large"]) * steps * batch / len(tall)
        rate = 6 * steps * batch * hidden**2 / seconds
        if rate > best:
            best, name_of_best = rate, name
    return best, name_of_best


def compare(task: str, rounds: int, engine: str, device) -> None:
    """The table of one task: every cell against the authors' way, nn.RNN and the floor."""
    steps, batch, hidden, input_size, _, _ = SHAPES[task]
    rate, library = gemm_rate(batch, hidden, steps, device)
    floor = 6 * steps * batch * hidden**2 / rate
    print(f"\n{task}: T {steps}, B {batch}, H {hidden}; GEMM floor {1e3 * floor:.1f} ms "
          f"({rate / 1e9:.0f} GFLOP/s, {library})\n")
    print("| cell | ours, ms (quartiles) | authors' way, ms | ratio | nn.RNN (tanh), ms | ratio | ours / floor |")
    print("|---|---|---|---|---|---|---|")
    ours = {}
    for net_type in CELLS:
        times = take_turns({"ours": our_step(task, our_network(task, net_type, engine), device),
                            "authors": authors_step(task, net_type, device),
                            "nn.RNN": our_step(task, TanhRNN(input_size, hidden), device)},
                           rounds, device, STEPS_IN_A_TURN[task])
        ours[net_type] = median(times["ours"])
        print(f"| {net_type} | {shown(times['ours'])} | {shown(times['authors'])} "
              f"| {median(times['authors']) / ours[net_type]:.1f}× | {shown(times['nn.RNN'])} "
              f"| {median(times['nn.RNN']) / ours[net_type]:.1f}× | {ours[net_type] / floor:.2f} |", flush=True)
    where_the_time_goes(task, rounds, engine, device, floor)


def where_the_time_goes(task: str, rounds: int, engine: str, device, floor: float) -> None:
    """The parts of a step, each timed alone."""
    steps, batch, hidden, _, _, every_step = SHAPES[task]
    stair, phi = FixedStair("expn", steps).to(device), Nonlinearity("modrelu", hidden).to(device)
    x = (0.1 * torch.randn(steps, batch, hidden, device=device)).requires_grad_()
    skew = skew_start("henaff", hidden).to(device).requires_grad_()
    kernel = skew_exponential(skew).detach().requires_grad_()
    h0 = torch.zeros(batch, hidden, device=device)
    grad = torch.randn((steps, batch, hidden) if every_step else (batch, hidden), device=device) / (batch * steps)
    grad_kernel = torch.randn(hidden, hidden, device=device)

    def forward():
        return stair_recurrence(x, kernel, h0, stair, phi, engine=engine, last_only=not every_step)

    def both():
        torch.autograd.grad(forward(), (x, kernel, phi.bias), grad)

    def exponential():
        torch.autograd.grad(skew_exponential(skew), skew, grad_kernel)

    def torch_exponential():
        torch.autograd.grad(torch.matrix_exp(skew), skew, grad_kernel)

    times = take_turns({"forward": forward, "both": both, "exp": exponential, "torch exp": torch_exponential,
                        "step": our_step(task, our_network(task, "expRNN", engine), device)},
                       rounds, device, STEPS_IN_A_TURN[task])
    t = {name: 1e3 * median(values) for name, values in times.items()}
    print(f"\nan expRNN step of {t['step']:.1f} ms: recurrence forward {t['forward']:.1f}, backward with dW "
          f"{t['both'] - t['forward']:.1f} (together {floor / (t['both'] / 1e3):.0%} of the GEMM rate), matrix "
          f"exponential and adjoint {t['exp']:.1f} (torch.matrix_exp {t['torch exp']:.1f}), "
          f"input, read-out, loss, optimizer {t['step'] - t['both'] - t['exp']:.1f}")


def growth(rounds: int, engine: str, device) -> None:
    """Recurrence forward and backward as T, B and H grow from (200, 32, 256)."""
    print("\n| T | B | H | forward + backward, ms (quartiles) | ns per T·B·H² |")
    print("|---|---|---|---|---|")
    base = {"T": 200, "B": 32, "H": 256}
    grid = {"T": (50, 200, 800, 3200), "B": (1, 8, 32, 128, 512), "H": (64, 128, 190, 256, 512, 1024)}
    for name, values in grid.items():
        for value in values:
            steps, batch, hidden = {**base, name: value}.values()
            stair, phi = FixedStair("expn", steps).to(device), Nonlinearity("modrelu", hidden).to(device)
            x = (0.1 * torch.randn(steps, batch, hidden, device=device)).requires_grad_()
            kernel = nn.init.orthogonal_(torch.empty(hidden, hidden, device=device)).requires_grad_()
            h0, grad = torch.zeros(batch, hidden, device=device), torch.randn(steps, batch, hidden, device=device)

            def both(x=x, kernel=kernel, h0=h0, stair=stair, phi=phi, grad=grad):
                h = stair_recurrence(x, kernel, h0, stair, phi, engine=engine)
                torch.autograd.grad(h, (x, kernel, phi.bias), grad)

            times = take_turns({"both": both}, rounds, device)["both"]
            print(f"| {steps} | {batch} | {hidden} | {shown(times)} "
                  f"| {1e9 * median(times) / (steps * batch * hidden**2):.3f} |", flush=True)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=SHAPES, default=list(SHAPES), help="default: all three")
    parser.add_argument("--engine", type=one_of("auto", *ENGINES), default="auto",
                        help="time loop of our step (default: %(default)s)")
    parser.add_argument("--rounds", type=number(int, 1), default=9, help="turns of every contender (default: 9)")
    parser.add_argument("--quick", action="store_true", help="three rounds")
    parser.add_argument("--growth", action="store_true", help="only the table of growth")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument("--threads", type=number(int, 1), help="CPU threads (default: all cores)")
    parser.add_argument("--cuda", action="store_true", help="run on the GPU")
    parser.add_argument("--tf32", action="store_true", help="float32 products by the GPU's tensor cores")
    args = parser.parse_args(argv)
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
    products = "tf32" if args.tf32 else "float32"
    print(f"{device_name(device)}, torch {torch.__version__}, {products}; medians of {rounds} turns")
    if not args.growth:
        for task in args.tasks:
            compare(task, rounds, args.engine, device)
    if args.growth or len(args.tasks) == len(SHAPES):
        growth(rounds, args.engine, device)


if __name__ == "__main__":
    start(main)
