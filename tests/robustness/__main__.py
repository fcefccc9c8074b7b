"""The whole campaign, and the page that says what came of it.

    python -m tests.robustness                           everything, in a quarter of an hour → results/robustness.md
    python -m tests.robustness --quick -o page.md        a few cases of each trouble, in half a minute
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from tests.robustness.sessions import SCRIPTS, at_updates, run_folder, session, workplace
from tests.robustness.troubles import TROUBLES, Tally, Task

PAGE = Path(__file__).resolve().parents[2] / "results" / "robustness.md"
LONG = "--net-type expRNN --nhid 8 --T 4 --c-length 2 --batch 2 --threads 1 --log-interval {} --updates {}"
HEAD = """# What happens to a run that is disturbed

Made by `python -m tests.robustness`{options} in {minutes:.0f} minutes (Linux, Python {python}, torch {torch}).
Tiny runs of the three tasks, a checkpoint at every report, are disturbed and then let go on. All is **well** when the
disturbed session works, or ends in a sentence; when each file is then whole and the log is what the checkpoint counts
on; and when the run that goes on ends bit for bit as the uninterrupted one: weights, optimizer, generators, log, result
and picture, and no file too many. A session that is refused changes no byte.

| trouble | sessions that it ended | runs | well | the sentence holds |
|---|---|---|---|---|"""


def memory() -> float:
    """The most that this process took so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def many_updates(updates: int) -> Tally:
    """A tiny run after a tenth of its updates and at its end: nothing grows but the log."""
    tally, place = Tally(f"{updates:,} updates: nothing grows but the log"), Path(tempfile.mkdtemp())
    early = updates // 10
    points = (early // 2, early, updates - early // 2, updates)

    def note(update: int) -> None:
        sizes = [path.stat().st_size for path in run_folder(Path()).iterdir() if path.name != "log.csv"]
        Path(f"{update}.json").write_text(json.dumps([time.process_time(), memory(), sum(sizes)]))

    typed = LONG.format(early // 4, updates).split()
    outcome = session(place, "copytask_nvar", typed, lambda: at_updates(points, note))
    assert outcome.status == 0, outcome
    times, used, sizes = zip(*(json.loads((place / f"{point}.json").read_text()) for point in points), strict=True)
    steps = [(times[i + 1] - times[i]) * 2000 / early for i in (0, 2)]  # ms
    tally.texts.add(f"after {early:,} and all updates: {steps[0]:.2f} and {steps[1]:.2f} ms an update, {used[1]:.0f} "
                    f"and {used[3]:.0f} MB of memory, {sizes[1]:,} and {sizes[3]:,} bytes of files without the log")
    grows = steps[1] > 2 * steps[0] or used[3] > used[1] + 16 or sizes[3] > 1.02 * sizes[1] + 200
    tally.judge("growth", " ".join(tally.texts) if grows else "")
    return tally


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.robustness", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small part")
    parser.add_argument("-o", "--output", type=Path, default=PAGE, help="default: results/robustness.md")
    args = parser.parse_args(argv)
    started, tallies = time.monotonic(), []

    def campaign():
        tasks = [Task(script, 61 if args.quick else 1) for script in SCRIPTS]
        for number, (what, trouble) in enumerate(TROUBLES.items()):
            tally = Tally(what)
            for task in [tasks[number % len(tasks)]] if args.quick else tasks:
                task.tally = tally
                trouble(task)
            yield tally
        yield many_updates(2_000 if args.quick else 100_000)

    with workplace():
        for tally in campaign():
            tallies.append(tally)
            print(tally, *tally.wrong, f"{time.monotonic() - started:.0f} s", sep="\n", flush=True)
    kills = sum((tally.tried for tally in tallies if "SIGKILL at every" in tally.what), Counter())
    wrong = [f"- {text}" for tally in tallies for text in tally.wrong]
    args.output.write_text("\n".join([
        HEAD.format(options=" --quick" if args.quick else "", minutes=(time.monotonic() - started) / 60,
                    python=sys.version.split()[0], torch=torch.__version__), *map(str, tallies), "",
        "A folder without config.json is one that was killed before the run began: the same command starts beside it. "
        "Each kind of write has moments before, in and after it; so often a kill hit them:", "",
        *(f"- {name} ({count})" for name, count in sorted(kills.items())), "", "## What went wrong", "",
        *(wrong or ["Nothing."]), ""]), encoding="utf-8")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
