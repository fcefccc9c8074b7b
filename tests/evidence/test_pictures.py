"""The pictures: each kind is drawn, from records or weights as a run leaves them."""

import json
import os
import stat
import threading

import pytest
import torch
from conftest import module_of, tiny
from test_rows import log_of, row_of, write_run

from common.copytask import CopyingTask, CopyModel
from common.errors import UserError
from common.network import build_network, mean_cross_entropy
from common.runs import curves
from common.runs.curves import draw_curves
from common.stair import LearnedStair, stair_activation
from evidence import pictures, rows
from evidence.__main__ import main as evidence_main

CURVE = "update,loss,loss_median,recall,seconds\n50,0.5,0.4,0.1,1\n100,{0},{0},0.7,2\n"
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
    ["--task", "language", "--published", "--only", "expRNN none"],
    ["--task", "copytask", "--vary", "T", "200", "500", "1000", "--only", "expRNN none", "LSTM none"],
    ["--gains"],
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


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """The axes of the last picture, in the place of its file."""
    kept = {}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(curves, "save", lambda picture, path: kept.update(axes=picture.axes, _=path.touch()))
    return kept


def test_the_published_curves_stand_beside_the_rows(records, drawn):
    """Of the characters the last value, the test accuracy after as many epochs as the row has, and our test score."""
    write_run(records, row_of("sMNIST", "expRNN, supplement, H 722", "none"), 400, log_of(2))
    pictures.main(["--task", "sMNIST", "--only", "expRNN, supplement, H 722 none", "--published", "--save",
                   str(records)])
    _, marks = drawn["axes"][0].lines
    assert list(zip(*marks.get_data(), strict=True))[:2] == [(1, 0.8401), (2, 0.8678)]
    assert len(marks.get_xdata()) == 70
    write_run(records, row_of("language", "expRNN", "none"), 401, log_of(3), dict(test_accuracy=0.66, best_epoch=3))
    pictures.main(["--task", "language", "--only", "expRNN none", "--published", "--save", str(records)])
    _, tested, mark = drawn["axes"][0].lines
    assert list(zip(*tested.get_data(), strict=True)) == [(3, 0.66)]
    assert list(zip(*mark.get_data(), strict=True)) == [(100, pytest.approx(0.6751))]
    assert mark.get_label() == "expRNN, published test accuracy"


def test_seeds_of_one_configuration_are_one_line_with_their_span(tmp_path, drawn):
    seeds = {400: 0.1, 401: 0.3, 402: 0.9}
    folders = [str(write_run(tmp_path, row_of("copytask", model, "none"), seed, CURVE.format(loss)))
               for model in ("expRNN", "nnRNN") for seed, loss in seeds.items()]
    pictures.main(folders)
    axes, = drawn["axes"]
    for line, model in zip(axes.lines, ("expRNN", "nnRNN"), strict=False):
        assert line.get_label().startswith(f"{model}, ")
        assert line.get_label().endswith(", n = 3")
    assert list(axes.lines[0].get_ydata()) == pytest.approx([0.4, 0.3])         # the median of each report
    assert len(axes.collections) == 2                                           # the spans
    low, high = axes.collections[0].get_paths()[0].vertices[:, 1].min(), \
        axes.collections[0].get_paths()[0].vertices[:, 1].max()
    assert (low, high) == pytest.approx((0.1, 0.9))


def test_a_run_of_one_epoch_is_more_than_a_dot(tmp_path, drawn):
    pictures.main([str(write_run(tmp_path, row_of("language", "expRNN", "none"), 400, log_of(1)))])
    axes, = drawn["axes"]
    training, validation = axes.lines
    assert list(training.get_xdata()) == pytest.approx([0.2, 1, 1.2])
    assert list(validation.get_xdata()) == [1]
    assert axes.get_xlim()[0] == 0
    assert axes.get_xlim()[1] > 1


def test_rows_run_with_other_flags(records, drawn):
    pictures.main(["--task", "copytask", "--only", "expRNN none", "--with=--T 500", "--save", str(records)])
    assert drawn["axes"][0].lines[0].get_label() == "expRNN, none, n = 2"
    with pytest.raises(UserError, match="no run of copytask"):
        pictures.main(["--task", "copytask", "--only", "expRNN none", "--with=--T 700", "--save", str(records)])


def test_what_cannot_be_read_is_refused(tmp_path):
    """With what to pick: too many lines, an axis of one value."""
    runs = tmp_path / "runs"
    for row in [row for row in rows.rows_of("copytask", []) if not row.source][:9]:
        write_run(runs, row, 400, CURVE.format(0.1), dict(loss=0.1, recall=0.7, memoryless_loss=0.1))
    nine = [str(path.parent) for path in runs.glob("*/*/config.json")]
    write_run(runs, row_of("language", "expRNN", "none"), 400, log_of(1))
    for asked, sentence in ((["--task", "copytask"], "9 lines .* pick rows with --only, as in --only 'expRNN none'"),
                            (nine, "9 lines .* name fewer folders"),
                            (["--spectrum", *nine], "9 lines"),
                            (["--task", "copytask", "--vary", "T", "200", "500"], "a line needs two values")):
        with pytest.raises(UserError, match=sentence):
            pictures.main([*asked, "--save", str(runs), "-o", str(tmp_path / "x.png")])
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("onehot", [True, False])
def test_the_gradient_of_every_step(onehot, float64):
    """Against autograd through a loop that keeps every h_t: the whole derivative, through all later steps."""
    torch.manual_seed(0)
    task = CopyingTask(T=6, labels=3, c_length=2, seed=1)
    network = build_network("expRNN", 5 if onehot else 1, 8, LearnedStair(10, 0.9), "modrelu", "cayley", "xavier")
    model = CopyModel(network, 4, onehot)
    found = pictures.gradient_norms(model, task, batch=3)

    symbols, target = CopyingTask(T=6, labels=3, c_length=2, seed=1).batch(3)
    x = network.cell.project(symbols if onehot else symbols.unsqueeze(-1).double())
    states, h = [], network.initial_state(3)
    for t in range(10):
        h = stair_activation(x[t] + h @ network.kernel(), network.stair.numbers[t], "scale", "modrelu",
                             network.nonlinearity.bias)
        h.retain_grad()
        states.append(h)
    mean_cross_entropy(model.readout(torch.stack(states))[-2:], target[-2:]).backward()
    expected = [3 * state.grad.norm(dim=1).mean().item() for state in states[:-1]]
    assert found.tolist() == pytest.approx(expected, rel=1e-9)


def test_gradients_are_drawn(tmp_path, monkeypatch, drawn):
    monkeypatch.chdir(tmp_path)
    module_of("copytask_nvar").main([*tiny("copytask_nvar"), "--nvar", "n"])
    module_of("copytask_expalpha").main([*tiny("copytask_expalpha")])
    folders = sorted(map(str, tmp_path.glob("saves/*/*")))
    pictures.main(["--gradients", *folders])
    assert [axes.get_title() for axes in drawn["axes"]] == ["at the start", "after training"]
    for axes in drawn["axes"]:
        lines = [line for line in axes.lines if len(line.get_ydata())]       # one stands in the legend alone
        assert len(lines) == 3                                               # expalpha has no product
        assert all(line.get_ydata()[-1] == pytest.approx(1) for line in lines)
    with pytest.raises(UserError, match="no run of the copying task with a stair"):
        pictures.main(["--gradients", str(write_run(tmp_path, row_of("sMNIST", "expRNN", "none"), 400))])


@pytest.mark.parametrize("loss", [1e-9, 0.1, 1e9])
def test_the_memoryless_line_is_always_seen(loss, tmp_path, recwarn):
    """And the layout holds: a run of the copying task draws this at its end."""
    folder = write_run(tmp_path, row_of("copytask", "expRNN", "none"), 400,
                       f"update,loss,loss_median,recall,seconds\n50,{loss},{loss},0.1,1\n")
    draw_curves([folder], folder / "curves.png")
    assert (folder / "curves.png").stat().st_size > 5000
    assert not recwarn.list


@pytest.mark.parametrize(("asked", "sentence"), [
    (["--task", "copytask", "--only", "nothing"], "no row holds 'nothing'"),
    (["--task", "copytask", "--only", "expRNN none"], "no run of copytask"),
    (["--task", "copytask", "--vary", "T", "5", "--only", "expRNN none"], "ended with 0 of the values"),
    (["nowhere"], "is not a run's folder"),
    (["--stairs", "-o", "stairs.docx"], "Format 'docx' is not supported"),
    (["--stairs", "-o", "nowhere/stairs.png"], "nowhere/stairs.png could not be written"),
])
def test_a_mistake_ends_in_a_sentence(asked, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=sentence):
        pictures.main(asked)


@pytest.mark.parametrize("asked", [[], ["--vary", "T", "5"], ["--task", "copytask", "--spectrum"],
                                   ["--task", "copytask", "--vary", "T"]])
def test_what_has_no_meaning_is_refused(asked, capsys):
    with pytest.raises(SystemExit):
        pictures.main(asked)
    assert "error:" in capsys.readouterr().err


def test_runs_of_two_tasks_share_no_axis(tmp_path):
    folders = [write_run(tmp_path, row_of(task, "expRNN", "none"), 400) for task in ("copytask", "sMNIST")]
    with pytest.raises(UserError, match="different tasks"):
        pictures.main([*map(str, folders), "-o", str(tmp_path / "x.png")])


@pytest.mark.parametrize("kind", ["--gradients", "--spectrum"])
def test_a_script_that_is_not_there(tmp_path, kind):
    folder = write_run(tmp_path, row_of("copytask", "expRNN", "none"), 400)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "task": "copytask", "script": "my-copy"}))
    with pytest.raises(UserError, match=r"there is no my-copy\.py here"):
        pictures.main([kind, str(folder)])


def test_weights_that_are_not_there(tmp_path):
    folder = write_run(tmp_path, row_of("copytask", "expRNN", "none"), 400)
    with pytest.raises(UserError, match=r"best\.pt cannot be used"):
        pictures.main(["--spectrum", str(folder)])
    with pytest.raises(UserError, match="has no learned stair"):
        pictures.main(["--alpha", str(folder)])


@pytest.mark.skipif(os.name == "nt", reason="no FIFO")
def test_output_goes_into_what_is_there(tmp_path, monkeypatch):
    """A FIFO gets the bytes, a link's target too; neither is replaced. A folder is refused."""
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.png")
    (tmp_path / "link.png").symlink_to("target.png")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe.png").read_bytes()))
    reader.start()
    pictures.main(["--stairs", "-o", "pipe.png"])
    reader.join(10)
    pictures.main(["--stairs", "-o", "link.png"])
    assert read[0].startswith(b"\x89PNG")
    assert stat.S_ISFIFO(os.stat("pipe.png").st_mode)
    assert (tmp_path / "link.png").is_symlink()
    assert (tmp_path / "target.png").read_bytes() == read[0]
    pictures.main(["--stairs", "-o", os.devnull])
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    for ask in (pictures.main, evidence_main):
        with pytest.raises(UserError, match="name another file with -o"):
            ask(["--stairs" if ask is pictures.main else "--best", "-o", "."])


def test_a_running_run_is_drawn_again_until_it_has_ended(tmp_path, monkeypatch, capsys):
    folder = write_run(tmp_path, row_of("copytask", "expRNN", "none"), 400, CURVE.format(0.1))
    monkeypatch.setattr(pictures.time, "sleep", lambda seconds: (folder / "result.json").write_text("{}"))
    pictures.main([str(folder), "--watch", "-o", str(tmp_path / "now.svg")])
    assert capsys.readouterr().out.count("wrote") == 2
    assert b"<svg" in (tmp_path / "now.svg").read_bytes()
