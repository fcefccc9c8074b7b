"""Is anything lost? Tiny runs that are killed, starved and disturbed, and then compared with runs that were let be.

    python -m tests.robustness            the whole campaign → results/robustness.md
    python -m tests.robustness --quick    a small part of it, in half a minute

    sessions.py    tiny runs of the three tasks in forked processes; what makes two runs the same
    moments.py     the places between which a run can be stopped: every open, write, fsync, rename, truncation
    kills.py       SIGKILL at random and at every one of those places, resumed
    troubles.py    signals, full disks, folders that vanish or cannot be written, two processes, other machines
    growth.py      many updates and long sequences: memory, time of a step, size of the files
"""
