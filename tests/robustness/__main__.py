"""The whole campaign, and the page that says what came of it.

    python -m tests.robustness                           everything, in a quarter of an hour → results/robustness.md
    python -m tests.robustness --quick -o page.md        a small part, in about half a minute
"""

import argparse
import platform
import re
import sys
import time
from pathlib import Path

import torch

from tests.robustness.growth import Growth, early_point, many_updates, one_long_sequence, one_too_long
from tests.robustness.kills import Campaign, aimed_kills, random_kills
from tests.robustness.sessions import TASKS, Workplace
from tests.robustness.troubles import Trouble, all_troubles

PAGE = Path(__file__).resolve().parents[2] / "results" / "robustness.md"


def kills_table(campaigns: list[Campaign]) -> list[str]:
    lines = ["| SIGKILL | task | kills | runs | the same as the uninterrupted run |", "|---|---|---|---|---|"]
    lines += [f"| {c.what} | {c.task} | {c.kills} | {c.runs} | {c.same} |" for c in campaigns]
    lines.append(f"| **all** | | **{sum(c.kills for c in campaigns)}** | **{sum(c.runs for c in campaigns)}** | "
                 f"**{sum(c.same for c in campaigns)}** |")
    return lines


def moments_table(campaigns: list[Campaign]) -> list[str]:
    """How often a kill hit each moment, all tasks and sessions together."""
    counts = {}
    for campaign in campaigns:
        for name, count in campaign.detail.items():
            counts[name] = counts.get(name, 0) + count
    files = {}
    for name, count in counts.items():
        file, moment = name.split(": ")
        files.setdefault(file, []).append(f"{moment} ({count})")
    return ["| file | moments, and how often a kill hit them |", "|---|---|",
            *(f"| {file} | {'; '.join(moments)} |" for file, moments in sorted(files.items()))]


def troubles_table(troubles: list[Trouble]) -> list[str]:
    lines = ["| trouble | tried | as it should be | the sentence holds |", "|---|---|---|---|"]
    for trouble in troubles:
        sentences = "; ".join(f"“{part}”" for part in sorted(trouble.sentences)) or "nothing: it works"
        lines.append(f"| {trouble.what} | {trouble.tried} | {trouble.well} | {sentences} |")
    return lines


def growth_lines(growth: Growth, updates: int, foretold: float, measured: float, ending: str, refused: str,
                 seconds: float) -> list[str]:
    early, late = growth.early, growth.late
    return [f"| | after {early_point(updates):,} updates | after {updates:,} |", "|---|---|---|",
            f"| memory of the process | {early['memory'] / 1e6:.0f} MB | {late['memory'] / 1e6:.0f} MB |",
            f"| time of an update | {early['step'] * 1e3:.2f} ms | {late['step'] * 1e3:.2f} ms |",
            f"| log.csv | {early['log']:,} bytes | {late['log']:,} bytes |",
            f"| all other files | {early['folder'] - early['log']:,} bytes | {late['folder'] - late['log']:,} bytes |",
            "", f"A row of the log has {growth.log_bytes_a_row:.0f} bytes. " +
            ("Nothing else grows." if growth.holds else "**Something else grows.**"), "",
            f"- T = 100,000 at H = 128, batch 10: {ending}. Foretold {foretold / 1e9:.1f} GB at the peak of an update, "
            f"measured {measured / 1e9:.1f} GB.",
            f"- T = 2,000,000,000: refused after {seconds:.1f} s, before anything is made: "
            f"“{re.sub(r'[0-9.,]+ GB are free', '… GB are free', refused)}”"]


HEAD = """# What happens to a run that is disturbed

Made by `python -m tests.robustness`{options} in {minutes:.0f} minutes ({machine}). Tiny runs of the three tasks, a
checkpoint
at every report, are disturbed and then let go on. **The same** means bit for bit: weights, optimizer and generators of
last.pt, best.pt, every row of log.csv but for the clock, result.json but for the clock, and no file too many. After
every disturbance each file in the folder is whole, and the log is what the checkpoint counts on.
"""


def page(head: str, campaigns, troubles, growth: list[str]) -> str:
    wrong = [f"- {text}" for entry in (*campaigns, *troubles) for text in entry.wrong]
    parts = [head, "## Killed", *kills_table(campaigns), "",
             "Every kind of write has moments before, in and after it. A folder without config.json is one that was "
             "killed before the run began: it is started again.", "", *moments_table(campaigns), "",
             "## Disturbed", *troubles_table(troubles), "", "## Long and large", *growth, "",
             "## What went wrong", *(wrong or ["Nothing."])]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts).replace("\n##", "\n\n##")) + "\n"


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.robustness", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small part")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments (default: 0)")
    parser.add_argument("--kills", type=int, default=70, help="random kills a task (default: 70)")
    parser.add_argument("--updates", type=int, default=100_000, help="of the long run (default: 100,000)")
    parser.add_argument("-o", "--output", type=Path, default=PAGE, help="default: results/robustness.md")
    args = parser.parse_args(argv)
    every = 25 if args.quick else 1
    kills, updates = (4, 3000) if args.quick else (args.kills, args.updates)
    started, campaigns, troubles = time.monotonic(), [], []
    with Workplace() as workplace:
        for task in TASKS:
            for tried in (lambda task: random_kills(workplace, task, kills, args.seed, seconds=300),
                          lambda task: aimed_kills(workplace, task, every=every),
                          lambda task: aimed_kills(workplace, task, resumed=True, every=every)):
                campaign = tried(task)
                campaigns.append(campaign)
                print(f"{task}, killed {campaign.what}: {campaign.kills} kills, {campaign.same} of {campaign.runs} "
                      f"runs the same  {time.monotonic() - started:.0f} s", flush=True)
        for trouble in all_troubles(workplace, args.seed, 3 if args.quick else 40, every):
            troubles.append(trouble)
            print(f"{trouble.what}: {trouble.well} of {trouble.tried} well  {time.monotonic() - started:.0f} s",
                  flush=True)
        growth = growth_lines(many_updates(workplace, updates), updates, *one_long_sequence(workplace),
                              *one_too_long(workplace))
    machine = f"{platform.system()}, {platform.machine()}, Python {platform.python_version()}, " \
              f"torch {torch.__version__}"
    head = HEAD.format(options=" --quick" if args.quick else "", minutes=(time.monotonic() - started) / 60,
                       machine=machine)
    args.output.write_text(page(head, campaigns, troubles, growth), encoding="utf-8")
    print(f"wrote {args.output}")
    sys.exit(any(entry.wrong for entry in (*campaigns, *troubles)))


if __name__ == "__main__":
    main()
