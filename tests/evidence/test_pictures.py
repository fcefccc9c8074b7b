"""The pictures: each kind is drawn, from records or weights as a run leaves them."""

import math

import pytest
from conftest import module_of, tiny
from test_table import log_of, row_of, write_run

from common.errors import UserError
from common.runs.curves import draw_run
from evidence import pictures

ORTHOGONAL = [("expRNN", "none"), ("sRNN, henaff", "alpha")]


@pytest.fixture
def records(tmp_path):
    """Runs of three tasks below tmp_path / "runs"."""
    folder = tmp_path / "runs"
    curve = "update,loss,loss_median,recall,seconds\n50,0.5,0.4,0.1,1\n100,0.1,0.09,0.7,2\n"
    write_run(folder, row_of("copytask", "sRNN", "n"), 400, curve + "150,inf,nan,0,3\n")     # diverged
    for value in ("200", "500"):
        for seed in (400, 401):
            row = row_of("copytask", "expRNN", "none", [] if value == "200" else ["--T", value])
            write_run(folder, row, seed, curve, dict(loss=0.1, recall=0.7 + seed / 1e4, memoryless_loss=0.1))
    for task in ("sMNIST", "language"):
        for name in ORTHOGONAL:
            write_run(folder, row_of(task, *name), 400, log_of(2))
    write_run(folder, row_of("sMNIST", "RNN", "none"), 400)                   # has not reported yet
    write_run(folder, row_of("sMNIST", "sRNN", "n"), 400, log_of(0) + "1,200,nan,0.1,,,20\n")    # diverged
    return folder


@pytest.mark.parametrize("asked", [
    ["--stairs"],
    ["--task", "copytask", "--published"],
    ["--task", "sMNIST", "--published"],
    ["--task", "sMNIST", "--training", "--published"],
    ["--task", "language", "--training", "--only", "expRNN none"],
    ["--task", "copytask", "--vary", "T", "200", "500", "1000", "--only", "expRNN none", "LSTM none"],
], ids=" ".join)
def test_every_kind_is_drawn(asked, records, tmp_path, capsys):
    path = tmp_path / "picture.png"
    pictures.main([*asked, "--save", str(records), "-o", str(path)])
    assert path.read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in tmp_path.iterdir()} == {"runs", "picture.png"}    # nothing temporary is left
    assert str(path) in capsys.readouterr().out


def test_what_a_run_learned_is_drawn(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module_of("copytask_alpha").main([*tiny("copytask_alpha"), "--net-type", "RNN", "--rinit", "henaff"])
    module_of("copytask_expalpha").main([*tiny("copytask_expalpha")])
    learned = sorted(map(str, tmp_path.glob("saves/*/*")))
    for kind in ("--alpha", "--spectrum"):
        pictures.main([kind, *learned, "-o", f"picture{kind}.png"])
        assert (tmp_path / f"picture{kind}.png").stat().st_size > 5000
    assert [pictures.name_of(folder) for folder in learned] == ["sRNN, henaff, alpha", "sRNN (exponential), expalpha"]


def test_training_is_drawn_in_updates_and_bits(records, monkeypatch, tmp_path):
    """Over both epochs of 500 updates; nats become bits; the published marks stand at the ends of the epochs."""
    drawn = {}
    monkeypatch.setattr(pictures, "save", lambda picture, path: drawn.update(axes=picture.axes[0]))
    pictures.main(["--task", "language", "--training", "--only", "expRNN none", "--save", str(records)])
    training, validation = drawn["axes"].lines
    assert list(training.get_xdata()) == [100, 500, 600, 1000, 1100]
    assert training.get_ydata()[0] == pytest.approx(1 / math.log(2))
    assert list(validation.get_xdata()) == [500, 1000]
    pictures.main(["--task", "sMNIST", "--training", "--published", "--only", "expRNN none", "--save", str(records)])
    marks = drawn["axes"].lines[2]
    assert list(zip(*marks.get_data(), strict=True)) == [(500, 0.8401), (1000, 0.8678)]
    assert [text.get_text() for text in drawn["axes"].texts] == ["expRNN, published"]


@pytest.mark.parametrize("loss", [1e-9, 0.1, 1e9])
def test_the_memoryless_line_is_always_seen(loss, tmp_path, recwarn):
    """And the layout holds: a run of the copying task draws this at its end."""
    folder = write_run(tmp_path, row_of("copytask", "expRNN", "none"), 400,
                       f"update,loss,loss_median,recall,seconds\n50,{loss},{loss},0.1,1\n")
    draw_run(folder)
    assert (folder / "curves.png").stat().st_size > 5000
    assert not recwarn.list


@pytest.mark.parametrize(("asked", "sentence"), [
    (["--task", "copytask", "--only", "nothing"], "no row holds 'nothing'"),
    (["--task", "copytask", "--only", "expRNN none"], "no run of copytask"),
    (["--task", "copytask", "--vary", "T", "5", "--only", "expRNN none"], "no run of copytask that has ended"),
    (["--task", "copytask", "--vary", "rinit", "henaff", "--only", "expRNN none"], "takes numbers above 0"),
    (["--task", "copytask", "--vary", "alam", "0", "1", "--only", "nnRNN none"], "takes numbers above 0"),
    (["nowhere"], "is not a run's folder"),
    (["--stairs", "-o", "stairs.docx"], "choose another ending"),
    (["--stairs", "-o", "nowhere/stairs.png"], "then draw it again"),
])
def test_a_mistake_ends_in_a_sentence(asked, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=sentence):
        pictures.main(asked)


@pytest.mark.parametrize("asked", [[], ["--task", "copytask", "--training"], ["--vary", "T", "5"],
                                   ["--task", "copytask", "--vary", "T"]])
def test_what_has_no_meaning_is_refused(asked, capsys):
    with pytest.raises(SystemExit):
        pictures.main(asked)
    assert "error:" in capsys.readouterr().err


def test_runs_of_two_tasks_share_no_axis(tmp_path):
    folders = [write_run(tmp_path, row_of(task, "expRNN", "none"), 400) for task in ("copytask", "sMNIST")]
    with pytest.raises(UserError, match="different tasks"):
        pictures.main([*map(str, folders), "-o", str(tmp_path / "x.png")])


def test_weights_that_are_not_there(tmp_path):
    folder = write_run(tmp_path, row_of("copytask", "expRNN", "none"), 400)
    with pytest.raises(UserError, match=r"best\.pt is missing"):
        pictures.main(["--alpha", str(folder)])
