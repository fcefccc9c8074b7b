"""Editing a script in place: a new key is a flag, a mistake is a sentence, and no record bears a false name."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import LOOPS, ROOT, SCRIPTS, environment, module_of, task_of, tiny, write_mnist

from common.errors import UserError
from common.runs import flags, records
from evidence import pictures, rows, table
from evidence.__main__ import main as tables


def parse(*typed, script="copytask_nvar", paper=None, without=(), **edited):
    """The options of a script whose DEFAULTS, or rows, were edited."""
    module = module_of(script)
    defaults = {name: value for name, value in {**module.DEFAULTS, **edited}.items() if name not in without}
    return flags.parse(list(typed), script, "", defaults, {**module.PAPER, **(paper or {})}, LOOPS[task_of(script)])


def refused(*typed, **named) -> str:
    with pytest.raises(UserError) as error:
        parse(*typed, **named)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("script", SCRIPTS)
def test_all_that_a_script_reads_stands_in_it(script):
    """Every args.x of main and build is a key of DEFAULTS, one that the rows hold, or a flag of every script."""
    tree = ast.parse((ROOT / f"{script}.py").read_text(encoding="utf-8"))
    read = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name) and node.value.id == "args"}
    assert read <= set(module_of(script).DEFAULTS) | set(flags.FROM_ROW) | set(flags.SHARED)


@pytest.mark.parametrize(("value", "typed", "wanted"), [
    (0.1, ("--dropout", "0.5"), 0.5), (3, ("--dropout=4",), 4), ("sum", ("--dropout", "mean"), "mean"),
    (False, ("--dropout",), True), (True, ("--no-dropout",), False), ((1, 2.5), ("--dropout", "3", "4"), (3, 4.0))])
def test_a_new_key_is_a_flag(value, typed, wanted):
    options = parse(dropout=value)
    assert (options.dropout, options.origin["dropout"]) == (value, "edited")
    assert "new in DEFAULTS: --dropout" in flags.describe(options)
    options = parse(*typed, dropout=value)
    assert (options.dropout, options.origin["dropout"]) == (wanted, "typed")
    assert type(options.dropout) is type(value)


def test_a_new_key_is_in_the_help(capsys):
    with pytest.raises(SystemExit):
        parse("--help", dropout=0.1)
    assert re.search(r"--dropout DROPOUT\s.*\(default: 0.1\)", capsys.readouterr().out, flags=re.DOTALL)


@pytest.mark.parametrize(("edited", "parts"), [
    (dict(lr=7e-4), ("lr=0.0007", "row", "PAPER")), (dict(rinit="cayley"), ("rinit", "PAPER")),
    (dict(log_intervall=10), ("log_intervall=10", "did you mean log_interval")),
    (dict(Nhid=64), ("Nhid=64", "did you mean nhid")), (dict(sizes=[1, 2]), ("sizes=[1, 2]", "list")),
    (dict(seed=3), ("seed=3",)),
    (dict(row=28), ("row=28", "taken")), (dict(task="adding"), ("taken",)),
    (dict(thing=None), ("thing=None", "NoneType"))])
def test_a_key_that_cannot_be(edited, parts):
    said = refused(**edited)
    assert all(part in said for part in ("copytask_nvar.py, DEFAULTS", *parts)), said


def test_a_value_that_a_row_names_too_is_edited_there():
    """The row of nnRNN names iinit, so an edit of DEFAULTS would decide nothing for it."""
    said = refused("--net-type", "nnRNN", iinit="kaiming")
    assert all(part in said for part in ("DEFAULTS: iinit='kaiming'", '"sRNN (non-normal)"', "iinit='linear'")), said
    assert parse(iinit="kaiming").origin["iinit"] == "edited"                                  # expRNN's row does not
    assert parse("--net-type", "nnRNN", "--iinit", "xavier", iinit="kaiming").iinit == "xavier"
    options = parse("--net-type", "nnRNN")
    assert (options.iinit, options.origin["iinit"]) == ("linear", "PAPER sRNN (non-normal)")


@pytest.mark.parametrize("name", ["batch", "nhid", "updates"])
def test_a_missing_key(name):
    with pytest.raises(UserError, match=rf"copytask_nvar.py uses args.{name}, but its DEFAULTS have no {name}"):
        getattr(parse(without=(name,)), name)


def test_the_row_with_the_most_matching_keys_wins():
    small = dict(net_type="expRNN", nhid=64, lr=0.25, lr_orth=0.5, alpha=0.5, rinit="cayley")
    assert parse("--nhid", "64", paper={"small": small}).lr == 0.25
    assert parse(paper={"small": small}).lr == 1e-3
    assert parse("--nhid", "32", paper={"small": {**small, "nhid": (64, 32)}}).lr == 0.25
    assert parse(paper={"small": {**small, "nhid": (64, 128)}}).nhid == 128


@pytest.mark.parametrize("key", ["nhid", "clip"])
def test_a_value_of_a_row_wins_over_defaults(key):
    """Also one that could pick the row."""
    row = dict(net_type="expRNN", lr=1e-3, lr_orth=1e-4, alpha=0.99, rinit="henaff", **{key: 6})
    paper = {"expRNN / sRNN (exponential)": row}
    options = parse(paper=paper)
    assert (getattr(options, key), options.origin[key]) == (6, "edited")
    assert getattr(parse(f"--{key}", "7", paper=paper), key) == 7
    with pytest.raises(UserError, match=rf"DEFAULTS: {key}=5(\.0)? has no effect"):
        parse(paper=paper, **{key: 5})


def test_a_tie_names_both_rows():
    said = refused(paper={"mine": dict(net_type="expRNN", lr=0.1, lr_orth=0.1, alpha=0.9, rinit="cayley")})
    assert '"expRNN / sRNN (exponential)" and "mine"' in said


def test_an_unknown_key_of_a_row():
    said = refused(paper={"mine": dict(net_type="RNN", nhid=3, learning_rate=0.1)})
    assert 'PAPER, "mine": there is no flag learning_rate' in said


@pytest.mark.parametrize("edited", [
    dict(log_interval=0), dict(nvar="expo"), dict(nhid=12.5), dict(onehot=1), dict(vari="yes"),
    dict(clip=float("nan")), dict(betas=(0.9,)), dict(betas=0.9), dict(betas=(0.9, 1.0)), dict(optimizer="adam"),
    dict(random_seed=2**32), dict(engine=None), dict(nhid=True), dict(nonlin=3)])
def test_an_edited_value_passes_the_checks_of_a_typed_one(edited):
    (name, value), = edited.items()
    assert f"copytask_nvar.py, DEFAULTS: {name}={value!r}" in refused(**edited)


@pytest.mark.parametrize("edited", [dict(lr=-1e-3), dict(lr=None), dict(rinit="orthogonal"),
                                    dict(alpha=1.0), dict(Tdecay=-1), dict(net_type="GRU")])
def test_an_edited_value_of_a_row(edited):
    row = {**module_of("copytask_nvar").PAPER["RNN"], **edited}
    (name, value), = edited.items()
    assert f'copytask_nvar.py, PAPER, "RNN": {name}={value!r}' in refused(paper={"RNN": row})


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_scripts_hold_the_published_values(script):
    module, (task, kind) = module_of(script), script.split("_")
    defaults, paper = flags.published(LOOPS[task].NAME, kind)
    assert (defaults, paper) == (module.DEFAULTS, module.PAPER)
    options = parse(script=script)
    assert "edited" not in options.origin.values()


def test_an_edited_value_says_so():
    row = {**module_of("copytask_nvar").PAPER["expRNN / sRNN (exponential)"], "lr": 7e-4}
    options = parse(paper={"expRNN / sRNN (exponential)": row}, T=100)
    assert {name for name, origin in options.origin.items() if origin == "edited"} == {"lr", "T"}
    assert parse("--T", "100").origin["T"] == "typed"


@pytest.fixture
def edited(tmp_path, monkeypatch):
    """A script with `changes` (old text, new text) in a folder of its own, to run in this process → the module."""
    monkeypatch.chdir(tmp_path)

    def make(*changes, name="copytask_nvar"):
        text = (ROOT / "copytask_nvar.py").read_text(encoding="utf-8")
        for old, new in changes:
            assert old in text
            text = text.replace(old, new, 1)
        path = tmp_path / f"{name}.py"
        path.write_text(text, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setitem(sys.modules, name, module)
        return module
    return make


TINY = tiny("copytask_nvar")
STAIR = "FixedStair(args.nvar, task.steps)"
OWN = ("from common.stair import FixedStair\n", """import torch
from common.stair import FixedStair, Stair

class Own(Stair):
    def __init__(self, *size):
        super().__init__()
        self.numbers = torch.nn.Parameter(torch.full(size, 0.5))
""")


def own_row():
    """The one row and the one folder of an edited script's runs."""
    (own, runs), = rows.own_rows("copytask", (400,), [Path("saves")], [], "", [""])
    folder, = runs[""].values()
    return own, folder


def test_a_copy_works_under_any_name_and_is_tabled_as_itself(copied, monkeypatch):
    monkeypatch.chdir(copied)
    text = Path("copytask_nvar.py").read_text(encoding="utf-8")
    Path("my-copy.py").write_text(text.replace("T=200, ", "T=6, "), encoding="utf-8")
    typed = ["--nhid", "8", "--c-length", "2", "--updates", "3", "--threads", "1"]
    done = subprocess.run([sys.executable, "my-copy.py", *typed], env=environment(), capture_output=True, text=True,
                          timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    own, folder = own_row()
    config = records.read_config(folder)
    assert (config["script"], config["task"], config["stair"]) == ("my-copy", "copytask", "FixedStair")
    assert config["options"]["T"] == {"value": 6, "origin": "edited"}
    assert (folder / "result.json").exists()
    assert (folder / "curves.png").exists()
    found = rows.rows_of("copytask", [])
    rows.find_runs(found, (400,), Path("saves"))
    assert not any(row.runs for row in found)
    assert own.model == "sRNN (exponential), my-copy.py, nhid 8, c-length 2, updates 3, T=6"
    assert "my-copy.py" in table.table([own])


def test_a_stair_of_ones_own_has_a_row_of_its_own(edited, capsys):
    script = edited(OWN, (STAIR, "Own(task.steps)"))
    script.main(TINY)
    own, folder = own_row()
    assert (own.model.split(", ")[0], own.stair) == ("sRNN (exponential)", "Own")
    assert (folder.name, records.read_config(folder)["stair"]) == ("expRNN-Own-s400", "Own")
    script.main([*TINY, "--name", "b", "--dry-run"])
    assert f"would be written to {folder}-b" in capsys.readouterr().out
    tables(["copytask", "--save", "saves", "--only", "Own"])
    tables(["copytask", "--save", "saves", "--missing", "--seeds", "400", "401"])
    said = capsys.readouterr().out
    assert re.search(r"\| sRNN \(exponential\), edited copytask_nvar\.py, nhid 8.* \| Own \|", said)
    assert "copytask_nvar.py --seed" not in said                               # no command makes such a run again
    with pytest.raises(UserError, match=r"the stair has 8 steps, the sequence 9; build a longer stair"):
        edited(OWN, (STAIR, "Own(task.steps - 1)")).main([*TINY, "--name", "c"])
    assert [path.name for path in Path("saves/copytask_nvar").iterdir()] == [folder.name]

    script = edited()                                                          # the edit goes: weights fit, numbers not
    for call in (lambda: script.main(["--evaluate", folder]), lambda: script.main(["--resume", folder]),
                 lambda: script.load(folder)):
        with pytest.raises(UserError, match="is a run with the stair Own, and the script now builds FixedStair"):
            call()


def test_another_stair_of_ours_bears_its_own_name(edited):
    """A learned stair in the script of the fixed ones is not a run of --nvar."""
    edited(("import FixedStair", "import LearnedStair"), (STAIR, "LearnedStair(task.steps)")).main(TINY)
    own, folder = own_row()
    assert (own.stair, folder.name) == ("LearnedStair", "expRNN-LearnedStair-s400")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_reads_all_of_its_values(capture, script):
    for net in ("RNN", "nnRNN", *(["LSTM"] if script.endswith("_nvar") else [])):
        run_ = capture(script, "--net-type", net, *(["--nvar", "none"] if net == "LSTM" else [])).run
        assert flags.unread(run_.options, run_.asked) == []


@pytest.mark.parametrize("read", [lambda args: args.nvar, lambda args: vars(args)["nvar"], lambda args: {**vars(args)}])
def test_a_value_counts_as_read_before_the_run_begins(read):
    options = parse("--nvar", "n2")
    assert "nvar" in flags.unread(options.options, options.asked)
    read(options)
    assert "nvar" not in flags.unread(options.options, options.asked)


def test_auto_goes_on_with_the_same_code_only(edited):
    """As tables do, it keeps the runs of a script of one's own apart that was edited in between."""
    for said in ("# one", "# two", "# two"):
        edited(("# ρ_t", said)).main([*TINY, "--resume", "auto"])
    names = sorted(path.name for path in Path("saves/copytask_nvar").iterdir())
    assert names == ["expRNN-expn-s400", "expRNN-expn-s400-2"]


def test_a_value_that_nothing_reads_is_named(edited, capsys):
    """A schedule, a cell or a rate that stands in the line itself: what the options say of it is not recorded."""
    changes = [("    # network", "    dropout=0.1,\n    # network"), ("clip=args.clip", "clip=0.5"),
               ("FixedStair(args.nvar,", 'FixedStair("n2",')]
    script = edited(*changes)
    for asked in (["--nvar", "n"], ["--dry-run"]):
        script.main([*TINY, *asked])
        said = re.findall(r"(.*) (?:is never used by this script, so its value|are not used so far; where no later "
                          r"line uses them, their values) had no effect", capsys.readouterr().out)
        assert said == ["args.nvar", "args.clip, args.dropout"]
    own, folder = own_row()
    assert (own.stair, folder.name) == ("FixedStair", "expRNN-FixedStair-s400")
    script.main(["--resume", folder])
    rows.find_runs(published_rows := rows.rows_of("copytask", list(TINY)), (400,), Path("saves"))
    assert not any(row.runs for row in published_rows)

    assert edited(*changes, ("build_network(args.net_type,", 'build_network("nnRNN",')).main(TINY)["row"] == "NNRNN"
    folder = Path("saves", "copytask_nvar", "NNRNN-FixedStair-s400")
    for kind in ("--spectrum", "--gradients"):
        pictures.main([kind, str(folder)])
        assert capsys.readouterr().out.endswith("wrote curves.png\n")


def test_numbers_per_unit_name_the_engine_before_a_folder_is_made(edited, capsys):
    script = edited(OWN, (STAIR, "Own(task.steps, args.nhid)"))
    said = "^the native engine takes one number a step, and Own has one for every unit; choose the engine auto or refer"
    with pytest.raises(UserError, match=said):
        script.main([*TINY, "--engine", "native"])
    assert not Path("saves").exists()
    script.main(TINY)
    _, folder = own_row()
    assert len(records.read_stair(folder)[0]) == 8                             # a number for every unit


@pytest.fixture
def typed(tmp_path, penn_folder):
    """script → what is typed for a short run on its data."""
    def words(script):
        data = {"sMNIST": write_mnist(tmp_path / "data", 120, 40), "language": penn_folder}.get(task_of(script))
        return [*tiny(script), *(["--data", data] if data else [])]
    return words


@pytest.mark.parametrize("script", ["copytask_alpha", "sMNIST_nvar", "language_expalpha"])
def test_load(script, main, typed):
    _, folder = main(script, *typed(script), "--net-type", "nnRNN")
    model, args = module_of(script).load(folder)
    saved = torch.load(folder / "best.pt", weights_only=True)
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    assert (args.nhid, args.net_type, model.training) == (8, "nnRNN", False)


@pytest.mark.parametrize("script", ["copytask_nvar", "sMNIST_alpha", "language_nvar"])
def test_dry_run(script, main, typed, capsys, tmp_path):
    asked = typed(script)
    before = set(tmp_path.rglob("*"))
    assert main(script, *asked, "--batch", "5", "--dry-run") == (None, None)
    said = capsys.readouterr().out
    for part in ("typed: ", "default: ", "PAPER ", "parameters; a run would be", "an update takes", "updates",
                 "GB of memory"):
        assert part in said
    assert set(tmp_path.rglob("*")) == before
