"""What others measured, and with which hyperparameters: final values, curves as points, rows (results/published).

Kerg et al. 2019, nnRNN (arXiv 1905.12080): figure 4 and table 4 of the supplement; bits per character from the paper
and its repository. Baselines only: no result of the sRNN paper is known.
"""

import csv
from functools import cache
from pathlib import Path

FINAL = {
    "copytask": {"RNN": "0.0945", "RNN-Orth": "0.0016", "expRNN": "0.0003 (H 176)", "nnRNN": "0.0018",
                 "LSTM": "0.0945 (H 63)", "expRNN, H 176": "0.0003", "LSTM, H 63": "0.0945"},
    "sMNIST": {"RNN": "82.5", "RNN-Orth": "95.3", "expRNN": "96.1", "nnRNN": "94.9", "LSTM": "90.9"},
    "language": {"RNN": "40.01 (2.89)", "RNN-Orth": "66.29 (1.62)", "expRNN": "67.51", "nnRNN": "68.78 (1.47)",
                 "RNN 300": "39.97 (2.90)", "RNN-Orth 300": "65.53 (1.66)", "expRNN 300": "66.89",
                 "nnRNN 300": "68.52"},
}
FINAL_TITLE = {"copytask": "published", "sMNIST": "published: best validation accuracy of 70 epochs, %",
                   "language": "published: test accuracy, % (bits per character)"}
CURVE_HIDDEN = {"expRNN": 722, "LSTM": 257}  # H of the published psMNIST curves where it is not 512
FOLDER = Path(__file__).parent.parent / "results" / "published"


@cache
def curve_points(task: str) -> list[dict]:
    """The points of the published curves: {column: text} (results/published/README.md)."""
    with open(FOLDER / f"{task}.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def curve_of(task: str, row) -> list[tuple[float, float]]:
    """The published curve of a row's model as (update or epoch, value); empty where none is known.

    Of the characters the test accuracy at the end alone is known.
    """
    if task == "language":
        final = FINAL[task].get(row.model) if row.as_published else None
        return [(row.options(400)["epochs"], float(final.split()[0]) / 100)] if final else []
    x = "update" if task == "copytask" else "epoch"
    return [(float(point[x]), float(point[row.model])) for point in curve_points(task) if row.model in point]


def validation_at(row, epoch: int) -> str:
    """Where the published psMNIST curve of the row's cell stands after `epoch`, in %; nothing at another size."""
    point = next((point for point in curve_points("sMNIST") if int(point["epoch"]) == epoch), None)
    name = row.baseline
    if point is None or name not in point or not row.as_published:
        return ""
    label = "" if row.model.removesuffix(", henaff") == name else f"baseline {name}: "
    hidden = f" (H {CURVE_HIDDEN[name]})" if name in CURVE_HIDDEN else ""
    return f"{label}{100 * float(point[name]):.2f} ± {100 * float(point[f'{name} sem']):.2f}{hidden}"
