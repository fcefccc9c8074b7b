"""What others measured, and with which values: rows, final values and curves, from the files of results/published.

A line of rows.csv names a row of the tables (task, model, stair) and a source that used it:

    supplement         of the nnRNN paper: its networks without a stair, with the values and curves that it published
    revision           the later version of the sRNN paper: the stair of each row, and retuned values
    authors' command   one of the commands in the sRNN authors' repository
    measured           what our runs follow the published curve with: a start, or normalized pixels
    H 65, H 103        at a size for two cores: the LSTM with as many parameters as nnRNN

`flags` are typed beside those of the row; without any, the row of the tables is that of the source. Lines "none" of a
source that names stairs are ours: the plain network with the same values, with which such a stair is compared.
"""

import csv
import statistics
from functools import cache
from pathlib import Path
from typing import NamedTuple

VALUE_TITLE = {"copytask": "published", "sMNIST": "published: best validation accuracy of 70 epochs, %",
               "language": "published: test accuracy, % (bits per character)"}
AUTHORS = ("revision", "authors' command")  # the sources that name a stair
FOLDER = Path(__file__).parent.parent / "results" / "published"


class Line(NamedTuple):
    """A line of rows.csv."""

    task: str
    model: str
    stair: str
    source: str
    flags: str
    value: str      # the published score at the end
    curve: str      # the column of the published curve

    @property
    def name(self) -> str:
        """The name of the table's row that holds the runs."""
        return f"{self.model}{f', {self.source}' if self.flags else ''} {self.stair}"


@cache
def lines(task: str) -> list[Line]:
    """The lines of rows.csv about a task."""
    with open(FOLDER / "rows.csv", newline="", encoding="utf-8") as file:
        return [line for line in (Line(**found) for found in csv.DictReader(file)) if line.task == task]


@cache
def curve_points(task: str) -> list[dict]:
    """The points of the published curves: {column: text} (results/published/README.md)."""
    with open(FOLDER / f"{task}.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def curve_of(row) -> list[tuple[float, float]]:
    """The published curve of a row as (update or epoch, value), of the characters the end alone; empty if not known."""
    if row.task == "language":
        value = row.value.split()
        return [(row.options(400)["epochs"], float(value[0]) / 100)] if value and value[0][0].isdigit() else []
    x = "update" if row.task == "copytask" else "epoch"
    return [(float(point[x]), float(point[row.curve])) for point in curve_points(row.task)] if row.curve else []


def published_loss(column: str, first: int, last: int) -> float:
    """The median of the copying curve's points at the updates `first` … `last`."""
    return statistics.median(float(point[column]) for point in curve_points("copytask")
                             if first <= int(point["update"]) <= last)
