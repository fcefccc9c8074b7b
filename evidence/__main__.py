"""The published results beside those of this project, from the records of runs alone.

    python -m evidence copytask                     the table, from the runs in results/runs
    python -m evidence copytask --list              the commands of its runs, one a line, for a scheduler
    python -m evidence copytask --missing           the commands of the runs that are not finished
    python -m evidence copytask --run --jobs 2      run what is missing, go on with what is unfinished
    python -m evidence sMNIST --only "expRNN none" "sRNN (exponential)" --seeds 400 --with='--epochs 5'
    python -m evidence sMNIST --seeds 400 --run --until-epoch 1     one epoch of every row; another call goes on
    python -m evidence copytask --short --vary T 200 500 1000       a column a value of --T
    python -m evidence copytask --grid              a line a stair, a column a cell
    python -m evidence --best                       of every task and cell, the plain network beside the best stair
    python -m evidence --update                     write README.md, results/*.md and their pictures anew
    python -m evidence --collect FOLDER ...         copy the records of the runs in FOLDER to results/runs

Rows and which runs belong to them: evidence/rows.py. ± is the standard deviation over seeds. An unfinished run
of a task with epochs shows its last whole epoch, beside the published curve of its cell at that epoch.
"""

import shlex
from pathlib import Path

import torch

from common.errors import UserError, start
from common.runs.records import write_atomically
from evidence import pages
from evidence.launch import commands_of, run_all
from evidence.rows import own_rows
from evidence.table import columns_of, make_parser, text_of


def main(argv=None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.collect:  # first, so that --update beside it shows what came in
        pages.collect(args.collect, args.save[0])
    if args.update:
        pages.update(Path("."), args.drop)
    if args.collect or args.update:
        return
    if args.best:
        return print(text_of(args), end="")
    if args.task is None:
        parser.error("name a task, --best, --update or --collect")
    if args.vary and len(args.vary) < 2:
        parser.error(f"--vary {args.vary[0]} needs values, as in --vary T 200 500")
    if args.until_epoch and args.task == "copytask":
        parser.error("--until-epoch has no meaning here: the copying task has updates and no epochs")
    if args.grid and args.vary:
        parser.error("--grid has a column a cell, --vary one a value; ask for one of them")

    rows = [row for rows in columns_of(args).values() for row in rows]
    more = [*(["--data", args.data] if args.data else []), *(["--cuda"] if args.cuda else [])]
    commands = commands_of(rows, args.seeds, args.save[0], more, left=not args.list, until=args.until_epoch)
    if args.list or args.missing:
        return print("".join(shlex.join(["python", *command]) + "\n" for command in commands), end="")
    threads = ["--threads", str(max(1, torch.get_num_threads() // args.jobs))]
    failed = run_all([[*command, *threads] for command in commands], args.jobs) if args.run else 0
    text = text_of(args)
    print(text, end="")
    if args.run and (apart := own_rows(args.task, args.seeds, *args.save)):
        print("\nRuns that are edited, or of another stair or data, have rows of their own: python -m evidence "
              f"{args.task} --only {shlex.quote(apart[0].name)}")
    if args.output:
        write_atomically(args.output, text.encode(), "then ask for the table again")
    if failed:
        raise UserError(f"{failed} of {len(commands)} runs failed; their sentences stand above", 1)


if __name__ == "__main__":
    start(main)
