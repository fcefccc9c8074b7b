"""What the tables say: means, counts, a column a value, grids, differences with their intervals, published curves."""

import math
import statistics

import pytest
import scipy.stats
from test_rows import cells, log_of, row_of, write_run

from common.errors import UserError
from evidence import published, rows, table
from evidence.__main__ import main as evidence_main


@pytest.mark.parametrize(("asked", "sentence"), [
    ([], "name a task"), (["copytask", "--vary", "T"], "needs values"), (["smnist"], "there is no task smnist"),
    (["sMNIST", "--curves"], "of the copying task"), (["mine.py", "--differences"], "of the three tasks")])
def test_a_mistake_in_what_is_asked_for(asked, sentence, capsys):
    with pytest.raises(SystemExit):
        evidence_main(asked)
    assert sentence in capsys.readouterr().err


def test_the_published_curves_are_whole():
    curve = published.curve_points("sMNIST")
    assert [int(point["epoch"]) for point in curve] == list(range(1, 71))
    for line in published.lines("sMNIST"):
        if line.curve and line.value:
            best = max(float(point[line.curve]) for point in curve)
            assert 100 * best == pytest.approx(float(line.value), abs=0.2)
    assert len(published.curve_points("copytask")) == 150
    for line in published.lines("copytask"):
        if line.curve and line.value:
            assert published.published_loss(line.curve, 1451, 1500) == pytest.approx(float(line.value), rel=0.2)


def test_an_interval_is_that_of_welch():
    """By the formula: t = 2.776 for the 4 degrees of freedom of two samples of three with the same variance."""
    found = table.difference([3.0, 4.0, 5.0], [0.0, 1.0, 2.0])
    reach = 2.7764451 * math.sqrt(1 / 3 + 1 / 3)
    assert (found.mean, found.low, found.high) == pytest.approx((3, 3 - reach, 3 + reach))
    assert table.is_within(1 + 2.48, [0.0, 1.0, 2.0])                    # 4.3027 / √3 is 2.484
    assert not table.is_within(1 + 2.49, [0.0, 1.0, 2.0])


def test_one_seed_has_no_interval():
    assert math.isnan(table.difference([1.0], [2.0, 3.0]).low)
    assert not table.difference([1.0, 1.0], [2.0, 2.0]).holds


def test_holm_goes_on_until_one_does_not_hold():
    """Of four comparisons with p 0.010, 0.012, 0.03, 0.001: limits 0.05 / 4, 3, 2, 1."""
    shifts = {name: scipy.stats.t.isf(p / 2, 2) for name, p in dict(a=0.010, b=0.012, c=0.03, d=0.001).items()}
    spread = math.sqrt(2)                                     # two of variance 2: the error of a difference is √2
    pairs = {name: ([t * spread - 1, t * spread + 1], [-1.0, 1.0]) for name, t in shifts.items()}
    found = table.judged({**pairs, "not run": ([], [1.0])})
    assert [found[name].p for name in "abcd"] == pytest.approx([0.010, 0.012, 0.03, 0.001], rel=1e-3)
    assert {name for name, one in found.items() if one.holds} == {"a", "b", "d", "c"}
    weaker = {**pairs, "b": ([spread - 1, spread + 1], [-1.0, 1.0])}   # p 0.42: c and b fall, c by the limit 0.05 / 2
    assert {name for name, one in table.judged(weaker).items() if one.holds} == {"a", "d"}


def test_differences_from_the_plain_network(tmp_path, capsys):
    small = ["--nhid", "128", "--epochs", "10"]
    for model, stair, scores in (("expRNN", "none", (0.80, 0.81, 0.82)),
                                 ("sRNN (exponential)", "n2", (0.90, 0.91, 0.92)),
                                 ("sRNN (exponential)", "n", (0.80, 0.84)), ("sRNN (exponential)", "alpha", (0.7,))):
        for seed, score in enumerate(scores, 400):
            write_run(tmp_path, row_of("sMNIST", model, stair, small), seed, result=dict(test_accuracy=score))
    write_run(tmp_path, row_of("sMNIST", "expRNN", "none"), 400, result=dict(test_accuracy=0.99))     # of another size
    evidence_main(["sMNIST", "--small", "--differences", "--save", str(tmp_path)])
    text = capsys.readouterr().out
    assert cells(text, "none")["expRNN"] == "81.00 ± 1.00; n = 3"
    assert cells(text, "n2")["expRNN"] == "**+10.00 (+7.73 … +12.27)**"
    assert cells(text, "n")["expRNN"].startswith("+1.00 (")
    assert cells(text, "alpha")["expRNN"] == "-11.00"
    assert "expn" not in text
    assert text.endswith("Bold: holds after Holm's adjustment for 2 comparisons.\n")


def test_copying_beside_the_published_curves(tmp_path, capsys):
    """Of every report that ends at 200, 400, 800 or 1500; other rows of the same cell have no curve beside them."""
    there = published.published_loss("expRNN", 151, 200)
    assert there == statistics.median(float(point["expRNN"]) for point in published.curve_points("copytask")
                                      if point["update"] in ("156", "166", "176", "186", "196"))
    row = next(row for row in rows.rows_of("copytask", []) if row.name == "expRNN, supplement none")
    for seed, factor in ((400, 0.5), (401, 1.0), (402, 2.0)):
        lines = [f"{update},1,{factor * there},0.5,1" for update in range(50, 1501, 50)]
        write_run(tmp_path, row, seed, "update,loss,loss_median,recall,seconds\n" + "\n".join(lines) + "\n",
                  dict(loss=1, recall=0.5))
    evidence_main(["copytask", "--curves", "--save", str(tmp_path)])
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    first, *_, last = [line for line in lines if line[0] == "expRNN, supplement"]
    assert first[1:3] == ["151 to 200", f"{there:.4f}"]
    error = statistics.stdev([0.5 * there, there, 2 * there]) / 3 ** 0.5
    assert first[3:] == [f"{3.5 / 3 * there:.4f} ± {error:.4f}, n = 3", f"{there:.4f}", "1.00", "yes"]
    assert last[1] == "1451 to 1500"
    assert last[-1] == "no"
    assert {line[3] for line in lines if line[0] == "RNN-Orth, henaff"} == {"not run"}
    assert not any(line[0] in ("expRNN", "nnRNN") for line in lines)


def test_vary_makes_a_column_a_value(tmp_path, capsys):
    for value, loss in (("5", 0.25), ("7", 1e20)):
        for seed in (400, 401):
            write_run(tmp_path, row_of("copytask", "expRNN", "none", ["--T", value]), seed,
                      result=dict(loss=loss, recall=0.5, memoryless_loss=0.125))
    write_run(tmp_path, row_of("copytask", "expRNN", "none", ["--T", "9"]), 400)
    write_run(tmp_path, row_of("copytask", "expRNN", "none", ["--T", "7"]), 402)
    asked = ["copytask", "--save", str(tmp_path), "--only", "expRNN none", "LSTM none", "--vary", "T", "5", "7", "9"]
    evidence_main([*asked, "--short"])
    text = capsys.readouterr().out
    assert cells(text, "expRNN") == {"model": "expRNN", "stair": "none",
                                     "T 5": "0.2500 ± 0.0000; recall 0.500 ± 0.000; n = 2",
                                     "T 7": "1.0e+20 ± 0.0e+00; recall 0.500 ± 0.000; n = 2 of 3",
                                     "T 9": "not finished"}
    assert cells(text, "a memoryless model")["T 5"] == "0.1250"
    assert "LSTM" not in text
    evidence_main([*asked, "--missing", "--seeds", "400"])
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == 1 + 3                                               # one to resume, three of the LSTM
    assert sum("--net-type LSTM" in line for line in listed) == 3


def test_a_run_that_diverged_is_told_and_left(tmp_path, capsys):
    """It would diverge again, bit for bit; an interrupted one is gone on with."""
    row = row_of("sMNIST", "sRNN", "n2")
    write_run(tmp_path, row, 400, log_of(0) + "1,200,nan,0.1,,,20\n")
    write_run(tmp_path, row, 401, log_of(1))
    asked = ["sMNIST", "--save", str(tmp_path), "--only", "sRNN n2", "--seeds", "400", "401"]
    evidence_main(asked)
    said = cells(capsys.readouterr().out, "sRNN")
    assert said["ours: test accuracy, % (mean ± std, n)"] == \
        "n = 0 of 2, 1 diverged"
    evidence_main([*asked, "--missing"])
    resumed, = capsys.readouterr().out.splitlines()
    assert "--seed 401" in resumed
    write_run(tmp_path, row_of("copytask", "sRNN", "n2"), 400, "update,loss,seconds\n100,inf,1\n")
    write_run(tmp_path, row_of("copytask", "sRNN", "n2"), 401, result=dict(loss=0.5, recall=0.5))
    evidence_main(["copytask", "--save", str(tmp_path), "--only", "sRNN n2", "--vary", "T", "200"])
    assert cells(capsys.readouterr().out, "sRNN")["T 200"].endswith("; n = 1 of 2, 1 diverged")


def test_vary_asks_the_scripts_that_have_the_flag(tmp_path, capsys):
    evidence_main(["copytask", "--list", "--vary", "alpha-start", "2", "--only", "expalpha", "--seeds", "400", "--save",
                str(tmp_path)])
    assert capsys.readouterr().out.count("copytask_expalpha.py") == 4
    with pytest.raises(UserError, match="has a flag --warp"):
        evidence_main(["copytask", "--vary", "warp", "9"])


def test_a_list_does_not_depend_on_what_was_run(tmp_path, capsys):
    """Nor on the machine that lists; --missing does."""
    asked = ["copytask", "--only", "expRNN none", "nnRNN none", "--seeds", "400", "401", "--save", str(tmp_path)]
    evidence_main([*asked, "--list"])
    before = capsys.readouterr().out
    assert len(before.splitlines()) == 4
    assert all("--resume auto" in line and "--threads" not in line for line in before.splitlines())
    write_run(tmp_path, row_of("copytask", "expRNN", "none"), 400, result=dict(loss=0.5, recall=0.5))
    evidence_main([*asked, "--list"])
    assert capsys.readouterr().out == before
    evidence_main([*asked, "--missing"])
    assert capsys.readouterr().out.splitlines() == before.splitlines()[1:]


def test_runs_of_several_folders(tmp_path, capsys):
    row = row_of("copytask", "expRNN", "none")
    for seed, place in ((400, "a"), (401, "b"), (402, "b")):
        write_run(tmp_path / place, row, seed, result=dict(loss=0.5, recall=0.5))
    evidence_main(["copytask", "--only", "expRNN none", "--save", str(tmp_path / "a"), str(tmp_path / "b")])
    assert "n = 3" in capsys.readouterr().out
    evidence_main(["--collect", str(tmp_path / "a"), str(tmp_path / "b"), "--save", str(tmp_path / "c")])
    assert "3 new" in capsys.readouterr().out


def test_the_best_stair_of_every_cell(tmp_path, capsys):
    """The highest mean recall or test accuracy of the runs that have ended."""
    for model, stair, recalls in (("expRNN", "none", (0.9, 0.7)), ("sRNN (exponential)", "n", (0.99, 0.3)),
                                  ("sRNN (exponential)", "n2", (0.8, 0.6)), ("sRNN (non-normal)", "n", (1.0,))):
        for seed, recall in enumerate(recalls, 400):
            write_run(tmp_path, row_of("copytask", model, stair), seed, result=dict(loss=0.5, recall=recall))
    write_run(tmp_path, row_of("sMNIST", "expRNN", "none"), 400, result=dict(test_accuracy=0.9))
    write_run(tmp_path, row_of("sMNIST", "sRNN (exponential)", "n"), 400, log_of(2, 0.99))     # has not ended
    evidence_main(["--best", "--save", str(tmp_path)])
    _, _, *lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    found = {tuple(line[:2]): line[2:] for line in lines}
    assert found == {("copying memory: recall, %", "expRNN"): ["80.00 ± 14.14; n = 2", "n2: 70.00 ± 14.14; n = 2"]}


@pytest.mark.parametrize(("asked", "sentence"), [(["--with='"], "cannot be read"),
                                                 (["--with=--nhdi 3"], "there is no flag --nhdi"),
                                                 (["-o", "nowhere/table.md"], "nowhere/table.md could not be written")])
def test_a_mistake_ends_in_a_sentence(asked, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=sentence):
        evidence_main(["copytask", *asked])


@pytest.mark.parametrize(("name", "text"), [("result.json", '{"loss": '), ("log.csv", "update,loss\n50,a\n"),
                                            ("log.csv", "update\n50,1\n")])
def test_a_spoiled_record_ends_in_a_sentence(name, text, tmp_path):
    folder = write_run(tmp_path, row_of("copytask", "expRNN", "none"), 400)
    (folder / name).write_text(text)
    with pytest.raises(UserError, match="cannot be used"):
        evidence_main(["copytask", "--save", str(tmp_path), "--only", "expRNN none"])
