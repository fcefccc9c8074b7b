"""All that is to be seen on a GPU, in the time there is for one: a report in Markdown, and folders of runs.

    python -m benchmarks.gpu_session --minutes 30 --save FOLDER --data FOLDER
    python -m benchmarks.gpu_session --rehearse --minutes 1 --save FOLDER --data FOLDER      on the CPU, tiny

In this order, each part written to FOLDER/report.md (-2, -3, …) when it is done:

    environment   the GPU and the versions
    tests         those marked gpu; only if those of its numbers pass do the parts below use the triton engine
    benchmark     a training step of every task: triton, torch engine, authors' way, torch.nn.RNN; the targets
    blocks        other ways to cut the recurrence than the one that the triton engine chooses
    rows          published rows, most valuable first, until the time is over; the last one then saves and stops

The same command goes on with the rows where it stopped. All float32 is exact but where tf32 is named.
"""

import argparse
import contextlib
import importlib
import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.__main__ import (
    SHAPES,
    TanhRNN,
    authors_step,
    gemm_rate,
    median,
    our_network,
    our_step,
    shown,
    take_turns,
)
from common.errors import UserError, start
from common.recurrence import triton_engine, unavailable_reason
from common.runs.flags import folder, number
from common.runs.machine import device_name, git_commit, keep_freed_memory, prepare_machine, versions
from evidence import table

ROOT = Path(__file__).resolve().parent.parent
CELLS = ("RNN", "expRNN", "nnRNN")
# milliseconds of a whole training step, and how many times faster than torch.nn.RNN (tanh) in float32
TARGETS = {"psMNIST": (6.0, 3.0), "characters": (4.0, None), "copying": (1.5, None)}
FIRST = (("sRNN (exponential)", "expn"), ("expRNN", "none"), ("nnRNN", "none"), ("sRNN, henaff", "expn"),
         ("RNN-Orth, henaff", "none"))
SEED = 400
STOP_SECONDS = 120      # that a run gets to save and stop
CLOSING_SECONDS = 20    # kept for that and the last lines of the page
BLOCKS_SHARE = 0.1      # of all the time, for other ways to cut the recurrence
# Tests that say nothing of the triton engine's numbers: one of them may fail, and it is used all the same.
ASIDE = {"test_the_other_engines", "test_under_compute_sanitizer", "test_a_batch_reaches_the_gpu_whole",
         "test_the_host_does_not_wait_for_a_training_step", "test_the_exponential_in_a_cuda_graph"}
TINY = {"copying": (220, 8, 64, 10, 9, True), "psMNIST": (20, 8, 64, 1, 10, False),
        "characters": (9, 8, 64, 6, 7, True)}
TINY_FLAGS = {"language": "--nhid 8 --batch 4 --bptt 20 --emsize 5 --epochs 1",
              "sMNIST": "--nhid 8 --batch 500 --epochs 100000"}     # one that ends, one that has to be stopped


class Report:
    """The page: every part is printed, and on the disk as soon as it is there."""

    def __init__(self, path: Path):
        self.path, self.text = path, ""

    def add(self, text: str) -> None:
        print(text, flush=True)
        self.text += text + "\n"
        self.path.write_text(self.text, encoding="utf-8")


def first_line(error: Exception) -> str:
    """What went wrong, in a line; Triton's errors are of a dozen types, some without a word."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


# ── environment, tests ───────────────────────────────────────────────────────────────────────────────────


def environment(device) -> str:
    """What the numbers were measured on."""
    lines = [f"{name} {version}" for name, version in versions().items()]
    if importlib.util.find_spec("triton"):  # whose distribution has other names beside some builds of torch
        lines.append(f"triton {importlib.import_module('triton').__version__}")
    lines.append(f"commit {git_commit()}")
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        lines += [f"CUDA {torch.version.cuda}", f"compute capability {found.major}.{found.minor}",
                  f"{found.multi_processor_count} multiprocessors",
                  f"{found.shared_memory_per_block_optin // 1024} KB of shared memory a program"]
        if shutil.which("nvidia-smi"):
            asked = "driver_version,clocks.max.sm,power.limit"
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                told = subprocess.run(["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"], text=True,
                                      capture_output=True, check=False, timeout=30).stdout.splitlines()
                lines += [f"{asked}: {told[0]}"] if told else []
    return f"# {device_name(device)}\n\n{', '.join(lines)}\n"


def trusted(status: int, said: str) -> tuple[bool, list[str]]:
    """Whether a pytest that ended so leaves no doubt in the triton engine's numbers, and the tests that failed."""
    failed = sorted(set(re.findall(r"^(?:FAILED|ERROR) \S+?::(\w+)", said, flags=re.MULTILINE)))
    return status == 0 or (status == 1 and bool(failed) and ASIDE.issuperset(failed)), failed


def tests(seconds: float) -> tuple[bool, str]:
    """Whether the triton engine is to be trusted, and what the tests marked gpu said.

    Several at a time: most of their time is compiling.
    """
    several = ["-n", "4"] if importlib.util.find_spec("xdist") and (os.cpu_count() or 1) >= 4 else []
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/engines/test_gpu.py", "-rfE", "--tb=short",
               *several]
    began = time.monotonic()
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)
        passed, failed = trusted(done.returncode, done.stdout)
        said = (done.stdout + done.stderr)[-6000:]
        if passed and failed:
            said += f"\nthe triton engine's numbers are right, so it is used; what failed: {', '.join(failed)}"
    except FileNotFoundError as error:
        passed, said = False, str(error)
    except subprocess.TimeoutExpired as error:
        passed, said = False, (error.stdout or b"").decode(errors="replace")[-6000:] + "\nnot finished in time"
    return passed, f"## Tests\n\n{time.monotonic() - began:.0f} s\n\n```\n{said.strip()}\n```\n"


# ── benchmark ────────────────────────────────────────────────────────────────────────────────────────────


def times_of(steps: dict, rounds: int, device, at_a_time: int, tf32: bool) -> dict:
    """take_turns in one precision."""
    prepare_machine(device.type == "cuda", None, tf32=tf32 and device.type == "cuda")
    return take_turns(steps, rounds, device, at_a_time)


def benchmark(task: str, engine: str, rounds: int, device) -> tuple[str, list[str]]:
    """The table of a task and what it says about the targets. `engine`: triton, or what stands in for it."""
    sequence, batch, hidden, input_size, _, _ = SHAPES[task]
    floors = []
    for tf32 in (False, True):
        prepare_machine(device.type == "cuda", None, tf32=tf32 and device.type == "cuda")
        floors.append(1e3 * 6 * sequence * batch * hidden**2 / gemm_rate(batch, hidden, sequence, device)[0])

    def rnn():
        return {"nn.RNN": our_step(task, TanhRNN(input_size, hidden).to(device), device)}

    plain = times_of(rnn(), rounds, device, 3, tf32=False)["nn.RNN"]
    fast = times_of(rnn(), rounds, device, 3, tf32=True)["nn.RNN"]
    lines = [f"## {task}: T {sequence}, B {batch}, H {hidden}\n",
             f"A whole training step, milliseconds, medians of {rounds} turns (quartiles). torch.nn.RNN (tanh): "
             f"{shown(plain)}, tf32 {shown(fast)}. GEMM floor: {floors[0]:.2f}, tf32 {floors[1]:.2f}.\n",
             f"| cell | {engine} | {engine}, tf32 | torch engine | authors' way | faster than it | than nn.RNN |",
             "|---|---|---|---|---|---|---|"]
    verdicts = []
    for cell in CELLS:
        def ours(engine, cell=cell):
            return our_step(task, our_network(task, cell, engine), device)

        ten = times_of({"exact": ours(engine)}, rounds, device, 10, tf32=False)["exact"]
        tf32 = times_of({"tf32": ours(engine)}, rounds, device, 10, tf32=True)["tf32"]
        slow = times_of({"torch": ours("torch"), "authors": authors_step(task, cell, device)}, min(rounds, 3), device,
                        1, tf32=False)
        best = median(ten)
        lines.append(f"| {cell} | {shown(ten)} | {shown(tf32)} | {shown(slow['torch'])} | {shown(slow['authors'])} "
                     f"| {median(slow['authors']) / best:.1f}× | {median(plain) / best:.1f}× |")
        limit, times = TARGETS[task]
        verdicts.append(verdict(f"{task}, {cell}: a step of {1e3 * best:.2f} ms, at most {limit} wanted",
                                1e3 * best <= limit))
        if times:
            verdicts.append(verdict(f"{task}, {cell}: {median(plain) / best:.2f} times as fast as torch.nn.RNN (tanh) "
                                    f"in float32, {times} wanted", median(plain) / best >= times))
    return "\n".join(lines) + "\n", verdicts


def verdict(sentence: str, reached: bool) -> str:
    return f"- {'reached' if reached else 'MISSED'}: {sentence}"


def blocks(task: str, rounds: int, device, until: float) -> str:
    """Recurrence forward and backward of the triton engine, cut in other ways, as many as there is time for."""
    steps, batch, hidden, _, _, every_step = SHAPES[task]
    programs, shared = triton_engine.capacity(device)
    given = [0.1 * torch.randn(steps, batch, hidden, device=device),
             torch.nn.init.orthogonal_(torch.empty(hidden, hidden, device=device)),
             torch.zeros(batch, hidden, device=device), torch.ones(steps, device=device),
             torch.zeros(hidden, device=device)]
    for t in given:
        t.requires_grad_()
    grad = torch.randn((steps, batch, hidden) if every_step else (batch, hidden), device=device)
    lines = [f"### {task}: how the recurrence is cut\n", "| precision | rows | columns | warps | programs | "
             "forward + backward, ms |", "|---|---|---|---|---|---|"]
    for precision in ("ieee", "tf32"):
        chosen = triton_engine.make_plan(batch, hidden, torch.float32, precision, programs, shared)
        plans = [triton_engine._cut(batch, hidden, torch.float32, precision, room, shared, columns)
                 for columns in triton_engine.WIDTHS for room in (programs, programs // 2, programs // 4)]
        for plan in dict.fromkeys([chosen, *plans]):
            if plan.shared > shared or not plan.resident or plan.parts * plan.columns >= 2 * hidden:
                continue
            if time.monotonic() >= until:
                return "\n".join([*lines, "\nThe time is over; there are more ways."]) + "\n"

            def both(plan=plan):
                h = triton_engine._Sequence.apply(*given, "scale", "modrelu", not every_step, plan)
                torch.autograd.grad(h, given, grad)

            try:
                took = shown(take_turns({"both": both}, rounds, device, 3)["both"])
            except Exception as error:
                took = first_line(error)
            lines.append(f"| {precision}{' (chosen)' if plan == chosen else ''} | {plan.rows} | {plan.columns} "
                         f"| {plan.warps} | {plan.parts * plan.groups} | {took} |")
    return "\n".join(lines) + "\n"


# ── rows ─────────────────────────────────────────────────────────────────────────────────────────────────


def wanted_rows(rehearse: bool) -> list:
    """The rows of permuted MNIST and of the characters (segments of 150), most valuable first."""
    rows = {task: table.rows_of(task, shlex.split(TINY_FLAGS[task]) if rehearse else [])
            for task in (("language", "sMNIST") if rehearse else ("sMNIST", "language"))}
    rows = {task: [row for row in of_task if "300" not in row.model] for task, of_task in rows.items()}
    first = {task: [row for pair in FIRST for row in of_task if (row.model, row.stair) == pair]
             for task, of_task in rows.items()}
    if rehearse:
        return [row for of_task in first.values() for row in of_task[:1]]
    rest = [[row for row in of_task if row not in first[task]] for task, of_task in rows.items()]
    return [row for part in (*first.values(), *rest) for row in part]


def command_of(row, runs: Path, flags: list[str], threads: int) -> list[str] | None:
    """What is left to do for a row: start it, go on with it, or nothing."""
    own = list(flags)
    if "LSTM" in row.flags and "--engine" in own:       # which has its own time loop
        del own[own.index("--engine"):own.index("--engine") + 2]
    table.find_runs([row], [SEED], runs)
    return next(iter(table.missing([row], [SEED], runs, threads, own)), None)


def run_until(command: list[str], deadline: float) -> str:
    """Run a script until it ends or the time is over; then it saves and stops. → how it ended."""
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               text=True)
    stopped = False
    try:
        _, errors = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
    except (KeyboardInterrupt, subprocess.TimeoutExpired) as why:
        stopped = True
        if isinstance(why, subprocess.TimeoutExpired):  # Ctrl-C has reached the script too
            process.send_signal(signal.SIGTERM)         # as Ctrl-C, which a session in the background ignores
        try:
            _, errors = process.communicate(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return "stopped, killed at last; the same command goes on from the last checkpoint"
    if process.returncode == 0:
        return "finished"
    last = (errors.strip().splitlines() or ["it said nothing"])[-1]
    return f"{'stopped; the same command goes on' if stopped else 'failed'} ({last})"


def train_rows(report: Report, save: Path, flags: list[str], deadline: float, rehearse: bool) -> None:
    """Rows until the deadline; then their table."""
    runs, rows = save / "runs", wanted_rows(rehearse)
    report.add("## Rows\n")
    for row in rows:
        if time.monotonic() >= deadline:
            break
        command = command_of(row, runs, flags, 1 if rehearse else os.cpu_count() or 1)
        if command is None:
            continue
        ended = run_until(command, deadline)
        report.add(f"- {row.model}, {row.stair}: {ended}: `{shlex.join(['python', *command])}`")
        if ended.startswith("stopped"):
            break
    table.find_runs(rows, [SEED], runs)
    for task in ("sMNIST", "language"):
        report.add(f"\n{table.table(task, [r for r in rows if r.script.startswith(task) and r.runs], short=True)}")


# ── the session ──────────────────────────────────────────────────────────────────────────────────────────


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_session", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=number(float, 0, open_low=True), default=30.0,
                        help="all there is (default: 30)")
    parser.add_argument("--save", type=folder, default=Path("gpu-session"), help="folder of the report and the runs "
                        "(default: %(default)s)")
    parser.add_argument("--data", type=folder, help="folder of the data files")
    parser.add_argument("--rounds", type=number(int, 1), default=7, help="turns of every contender (default: 7)")
    parser.add_argument("--rehearse", action="store_true", help="the whole session on the CPU, at tiny sizes")
    args = parser.parse_args(argv)

    began = time.monotonic()
    deadline = began + 60 * args.minutes
    if not args.rehearse and not torch.cuda.is_available():
        raise UserError("torch sees no GPU; add --rehearse to try the session on the CPU")
    device = prepare_machine(not args.rehearse, 1 if args.rehearse else None)
    keep_freed_memory()
    save, data = args.save.resolve(), args.data and args.data.resolve()
    try:
        save.mkdir(parents=True, exist_ok=True)
        earlier = len(list(save.glob("report*.md")))
        report = Report(save / (f"report-{earlier + 1}.md" if earlier else "report.md"))
        report.add(environment(device))
    except OSError as error:
        raise UserError(f"{save} cannot be written to ({error.strerror}); choose another place with --save") from None
    if args.rehearse:
        SHAPES.update(TINY)
        report.add("A rehearsal at tiny sizes on the CPU: no number on this page means anything.\n")
    passed, said = tests(max(1.0, (deadline - time.monotonic()) / 3))
    report.add(said)
    reason = unavailable_reason("triton", device) or (None if passed else "its tests failed")
    engine = "torch" if reason else "triton"
    if reason:
        report.add(f"The triton engine is left out: {reason}.\n")

    torch.manual_seed(0)
    verdicts = []
    for task in ("psMNIST", "characters", "copying"):
        try:
            text, more = benchmark(task, engine, args.rounds, device)
        except Exception as error:  # a CUDA error spoils the rest of this process, not the runs below
            text, more, engine = f"## {task}\n\nfailed: {first_line(error)}\n", [], "torch"
        report.add(text)
        verdicts += more or [verdict(f"{task}: not measured", False)]
    report.add("## Targets\n\n" + "\n".join(verdicts) + "\n")
    until = time.monotonic() + BLOCKS_SHARE * 60 * args.minutes
    for task in SHAPES if engine == "triton" else ():
        try:
            report.add(blocks(task, args.rounds, device, until))
        except Exception as error:
            report.add(f"### {task}\n\nfailed: {first_line(error)}\n")

    flags = [*(["--data", str(data)] if data else []), *([] if args.rehearse else ["--cuda", "--engine", engine])]
    if args.rehearse:  # all its time is for the rows: what comes before takes as long as the CPU takes
        deadline = time.monotonic() + 60 * args.minutes
    else:
        deadline -= CLOSING_SECONDS
    try:
        train_rows(report, save, flags, deadline, args.rehearse)
    except Exception as error:
        report.add(f"\nThe rows ended early: {first_line(error)}\n")
    report.add(f"\n{(time.monotonic() - began) / 60:.1f} of {args.minutes:g} minutes")


if __name__ == "__main__":
    start(main)
