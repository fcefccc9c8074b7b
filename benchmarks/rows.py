"""What the published rows cost on this machine: the memory and the hours that --dry-run of each script finds.

    python -m benchmarks.rows --threads 1 --data data -o results/speed.md

A stair costs nothing beside the plain network of its cell, so the rows without one stand for all.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

from benchmarks.__main__ import around_the_tables, processor
from common.errors import UserError, start
from common.runs.records import write_atomically
from evidence.rows import TASKS, rows_of

PLACE = "<!-- python -m benchmarks.rows -->\n"
SAID = re.compile(r"([\d,]+) parameters;.*an update takes (\S+ s), the (\d+) updates of the run about ([^;\n]+)"
                  r"(?:; this took (\S+ GB) of memory)?", re.DOTALL)


def line_of(row, more: list[str]) -> str:
    """A row's line of the table, from what its dry run says."""
    command = [*row.command(), "--dry-run", *more]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    if (said := SAID.search(done.stdout)) is None:
        raise UserError(f"python {' '.join(command)} ended with {done.stderr.strip() or done.stdout.strip()}", 1)
    parameters, update, updates, whole, memory = said.groups()
    return f"| {row.script.split('_')[0]} | {row.model} | {parameters} | {memory or '—'} | {update} | {updates} | " \
           f"{whole} |"


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rows", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="default: all three")
    parser.add_argument("--only", default="", help="of the rows with this text in their name")
    parser.add_argument("--data", help="data folder of the runs")
    parser.add_argument("--threads", default="1", help="CPU threads (default: %(default)s)")
    parser.add_argument("--cuda", action="store_true", help="on the GPU")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="put the table into its place in FILE too")
    args = parser.parse_args(argv)
    before, after = around_the_tables(args.output, PLACE) if args.output else ("", "")
    page = [f"{processor()}, {args.threads} thread{'s' * (args.threads != '1')}.\n",
            "| task | row | parameters | memory | an update | updates | the run |", "|---|---|---|---|---|---|---|"]
    print("\n".join(page), flush=True)
    for task in args.tasks:
        data = ["--data", args.data] if args.data and task != "copytask" else []
        more = ["--threads", args.threads, *data, *(["--cuda"] if args.cuda else [])]
        for row in rows_of(task, []):
            if row.stair == "none" and "henaff" not in row.model and not row.source and args.only in row.name:
                page.append(line_of(row, more))
                print(page[-1], flush=True)
    if args.output:
        write_atomically(args.output, (before + "\n".join(page) + "\n" + after).encode())


if __name__ == "__main__":
    start(main)
