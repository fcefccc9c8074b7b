"""Learning curves: which columns of a log they show, what their lines are called, and what they owe to no setting."""

import json
import subprocess
import sys

import matplotlib
import pytest
from conftest import ROOT, environment

from common.errors import UserError
from common.runs import curves

ADDING = "update,loss,seconds\n" + "".join(f"{k},{1 / k},{k}\n" for k in range(1, 9))
EPOCHS = "epoch,batch,train_f1,validation_f1,seconds\n1,5,0.1,,1\n1,10,0.2,0.3,2\n2,5,0.4,,3\n2,10,0.5,0.6,4\n"


def write_run(folder, name="run", log=ADDING, script="mine", row=None, origin="PAPER", **options):
    place = folder / name
    place.mkdir()
    options = {"net_type": "RNN", "random_seed": 400, "lr": 0.1, "nvar": "n", **options}
    entries = {name: {"value": value, "origin": origin} for name, value in options.items()}
    (place / "config.json").write_text(json.dumps({"script": script, "row": row, "argv": [], "options": entries}))
    (place / "log.csv").write_text(log)
    return place


@pytest.fixture
def drawn(monkeypatch):
    found = []
    monkeypatch.setattr(curves, "save", lambda picture, path: found.append(picture.axes[0]))
    return found


def legend_of(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


@pytest.mark.parametrize(("log", "x", "y"), [
    (ADDING, "update", "loss"), ("update,validation_loss,seconds\n1,-2,1\n2,-3,2\n", "update", "validation_loss"),
    (EPOCHS, "epoch", "validation_f1"),
    ("update,loss,loss_median,recall,seconds\n1,1,1,0,1\n", "update", "loss_median"),
    ("epoch,batch,lr,train_loss,train_accuracy,validation_loss,validation_accuracy\n1,1,1,1,1,1,1\n", "epoch",
     "validation_accuracy"),
    ("update,error,orthogonality_error,seconds\n1,1,1,1\n", "update", "error")])
def test_the_columns_decide_what_is_drawn(tmp_path, drawn, log, x, y):
    folder = write_run(tmp_path, log=log)
    curves.draw_curves([folder], folder / "curves.png")
    axes, = drawn
    assert (axes.get_xlabel(), axes.get_ylabel().startswith(y.split("_")[0])) == (x, True)
    shown = axes.lines[-1]
    read = curves.read_log(folder)
    assert list(zip(*shown.get_data(), strict=True)) == [
        (a, b) for a, b in zip(read[x], read[y], strict=True) if b is not None]
    assert axes.get_yscale() == ("log" if "loss" in y and min(filter(None, read[y])) > 0 else "linear")


def test_an_empty_frame_is_a_sentence(tmp_path):
    for number, log in enumerate(("", "update,seconds\n1,1\n")):
        with pytest.raises(UserError, match="nothing to draw"):
            curves.draw_curves([write_run(tmp_path, str(number), log)], tmp_path / "x.png")


@pytest.mark.parametrize(("one", "two", "labels"), [
    ({"lr": 0.0001, "origin": "typed"}, {"lr": 0.01, "origin": "typed"}, ["lr 0.0001", "lr 0.01"]),
    ({"row": "expRNN"}, {"row": "expRNN", "lr": 0.3, "origin": "typed"}, ["lr 0.1", "lr 0.3"]),
    ({"row": "expRNN", "net_type": "expRNN"}, {"row": "sRNN", "lr": 0.2, "rinit": "random"}, ["expRNN", "sRNN"]),
    ({"row": "a", "origin": "typed"}, {"row": "a", "net_type": "expRNN", "origin": "typed"},
     ["net_type RNN", "net_type expRNN"]),
    ({"script": "mine"}, {"script": "mine_too"}, ["mine.py", "mine_too.py"]),
    ({"nvar": "n2"}, {"nvar": "expn"}, ["n2", "expn"]),
    ({}, {"random_seed": 401}, ["RNN, n, n = 2"])])
def test_a_label_is_what_differs(tmp_path, drawn, one, two, labels):
    curves.draw_curves([write_run(tmp_path, str(number), **made) for number, made in enumerate((one, two))], "x.png")
    assert legend_of(drawn[0]) == labels
    assert [line.get_color() for line in drawn[0].lines] == list(curves.COLOURS[:len(labels)])
    assert ("band: least to most" in drawn[0].get_legend().get_title().get_text()) == (len(labels) == 1)


def test_a_line_for_each_loss_without_memory(tmp_path, drawn):
    folders = [write_run(tmp_path, str(T), T=T) for T in (200, 1000)]
    for folder, loss in zip(folders, (0.0945, 0.0204), strict=True):
        (folder / "result.json").write_text(json.dumps({"memoryless_loss": loss}))
    curves.draw_curves(folders, "x.png")
    assert legend_of(drawn[0])[2:] == ["memoryless, 0.0204", "memoryless, 0.0945"]
    assert [line.get_ydata()[0] for line in drawn[0].lines[2:]] == [0.0204, 0.0945]


def test_the_users_matplotlib_changes_nothing(tmp_path):
    """Settings that would break the picture or restyle it, and a backend that is not installed."""
    folder = write_run(tmp_path, "$ run_1")
    curves.draw_curves([folder], folder / "curves.png")
    usual = (folder / "curves.png").read_bytes()
    with matplotlib.rc_context({"text.usetex": True, "axes.facecolor": "black", "font.size": 30}):
        curves.draw_curves([folder], folder / "curves.png")
        assert matplotlib.rcParams["text.usetex"] is True
    assert (folder / "curves.png").read_bytes() == usual
    code = "import sys; from common.runs import curves; curves.draw_curves([sys.argv[1]], sys.argv[1] + '/curves.png')"
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, timeout=60, cwd=ROOT,
                   env={**environment(), "MPLBACKEND": "module://no_such_backend"})
    assert (folder / "curves.png").read_bytes() == usual


def test_a_picture_that_cannot_be_drawn_is_a_sentence(tmp_path):
    folder = write_run(tmp_path)
    with pytest.raises(UserError, match=r"cannot be drawn.*docx"):
        curves.draw_curves([folder], tmp_path / "x.docx")
    assert not (tmp_path / "x.docx").exists()
