"""The published results beside those of this project, from the records of runs alone.

    python -m evidence copytask                     the table, from the runs in results/runs
    python -m evidence copytask --list              the commands of its runs, one a line, for a scheduler
    python -m evidence copytask --missing           the commands of the runs that are not finished
    python -m evidence copytask --run --jobs 2      run what is missing, go on with what is unfinished
    python -m evidence sMNIST --only "expRNN none" "sRNN (exponential)" --seeds 400 --with='--epochs 5'
    python -m evidence copytask --short --vary T 200 500 1000       a column a value of --T
    python -m evidence examples/adding.py --vary lr 3e-4 1e-3 --seeds 1 2 --run --save saves    a script of your own
    python -m evidence copytask --grid              a line a stair, a column a cell
    python -m evidence sMNIST --small --differences what the stairs gain, with 95 % intervals
    python -m evidence --best                       of every task and cell, the plain network beside the best stair
    python -m evidence --update                     write README.md, results/*.md and their pictures anew
    python -m evidence --collect FOLDER ...         copy the records of the runs in FOLDER to results/runs

Rows and which runs belong to them: evidence/rows.py. ± is the standard deviation over seeds.
"""

import shlex
import sys
from pathlib import Path

import torch

from common.errors import UserError, run_main
from common.runs.provenance import publish_code
from common.runs.records import write_atomically
from evidence import pages
from evidence.launch import commands_of, run_all
from evidence.rows import TASKS, records_below, task_of
from evidence.table import make_parser, tables_asked_for, text_of


def main(argv=None) -> None:
    parser = make_parser()
    parser.description = __doc__
    args = parser.parse_args(argv)
    if args.publish_code:
        return print(*[f"new: {name}" for name in publish_code()] or ["nothing is new"], sep="\n")
    if args.collect:  # first, so that --update beside it shows what came in
        pages.collect(args.collect, args.save[0])
    if args.update:
        pages.update(Path("."))
    if args.collect or args.update:
        return
    if args.vary and len(args.vary) < 2:
        parser.error(f"--vary {args.vary[0]} needs values, as in --vary T 200 500")
    if args.task and ((args.curves and args.task != "copytask") or (args.differences and args.task not in TASKS)):
        parser.error("--curves is of the copying task, --differences of the three tasks")
    if args.task is None and not (args.best or args.paper):
        parser.error("name a task, --best, --paper, --update or --collect")
    if args.task and args.task not in TASKS and not (args.task.endswith(".py") and Path(args.task).is_file()):
        parser.error(f"there is no task {args.task}; name {', '.join(TASKS)}, or a script of your own as in mine.py")

    if args.list or args.missing or args.run:
        rows = [row for rows in tables_asked_for(args).values() for row in rows]
        more = [*(["--data", args.data] if args.data else []), *(["--cuda"] if args.cuda else [])]
        commands = commands_of(rows, args.seeds, args.save[0], more, left=not args.list)
        for row in rows:
            if row.why_no_command:
                print(f"no command makes runs of {row.name}: {row.why_no_command}", file=sys.stderr)
    if args.list or args.missing:
        return print("".join(shlex.join(["python", *command]) + "\n" for command in commands), end="")
    threads = ["--threads", str(max(1, torch.get_num_threads() // args.jobs))]
    failed = run_all([command if "--threads" in command else [*command, *threads] for command in commands],
                     args.jobs) if args.run else 0
    text = text_of(args)
    print(text, end="")
    is_empty = not args.differences and "n = " not in text
    if is_empty and (count := sum(task_of(config) == args.task for _, config in records_below(*args.save))):
        print(f"none of the {count} runs of {args.task} below {' and '.join(map(str, args.save))} is of these rows, "
              "flags and seeds; a script in the place of the task shows all of its runs", file=sys.stderr)
    if args.output:
        write_atomically(args.output, text.encode(), "or name another file with -o")
    if failed:
        raise UserError(f"{failed} of {len(commands)} runs failed; their sentences stand above", 1)


if __name__ == "__main__":
    run_main(main)
