"""Bad input: numbers, names, files, archives and folders that are wrong. Each ends in one sentence, never a traceback.

A case is a line of a table: what is typed or lies on the disk, and what the sentence must hold (the value or the file,
and the way out). It is tried in every script that it applies to, in this process, as `start` runs it.
"""

import contextlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SCRIPTS, command, environment, module_of, stopped_after, tiny

from common.errors import UserError, run_main
from common.runs import flags


def told(script, *arguments) -> tuple[int, str]:
    """Exit status and sentence of a script that must refuse its arguments, run as `python SCRIPT ...` runs it."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = [f"{script}.py", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stop:
            run_main(module_of(script).main)
    finally:
        sys.argv = before
    lines = err.getvalue().splitlines()
    assert len(lines) == 1, err.getvalue()
    assert "Traceback" not in out.getvalue() + err.getvalue()
    assert stop.value.code in (1, 2)
    return stop.value.code, lines[0]


def refused(script, arguments, *parts, status=2):
    code, sentence = told(script, *arguments)
    assert code == status, sentence
    for part in parts:
        assert part in sentence, (part, sentence)
    return sentence


COUNTS = ("0", "-1", "1.5", "nan", "inf", "1e999", "", "many", "1e3", "0x10", str(2**31), "9" * 40)
RATES = ("0", "-1e-3", "nan", "inf", "-inf", "1e999", "", "fast", "1,5", "1e300")
WEIGHTS = ("-1", "nan", "inf", "1e999", "", "heavy", "1e300")
NUMBERS = {
    **dict.fromkeys(("nhid", "batch", "log_interval", "T", "c_length", "updates", "epochs", "save_freq", "bptt",
                     "emsize"), COUNTS),
    "threads": (*COUNTS, "1025", "100000"), "labels": (*COUNTS, "9"),
    "random_seed": ("-1", "1.5", "nan", "inf", "", "x", str(2**63)),
    "lr": RATES, "lr_orth": RATES, "alam": WEIGHTS, "Tdecay": WEIGHTS, "clip": WEIGHTS,
    "alpha": ("1", "-0.1", "nan", "inf", "1e999", "", "x", "1.5"),
    "alpha_start": ("nan", "inf", "-inf", "1e999", "", "x", "1e300", "-1e300"),
}


def has(script, dest):
    return dest in {**flags.SHARED, **module_of(script).DEFAULTS} or dest in flags.FROM_ROW


@pytest.mark.parametrize("dest", NUMBERS)
def test_a_number_out_of_range(dest):
    script = next(script for script in SCRIPTS if has(script, dest))
    for value in NUMBERS[dest]:
        refused(script, [f"{flags.spelled(dest)}={value}"], flags.spelled(dest), f"'{value}'", "is not a")


def test_two_dashes_are_no_value_of_any_flag():
    """argparse takes `--lr=--` for a flag without a value and would let it pass."""
    for dest, flag in flags.FLAGS.items():
        script = next(script for script in SCRIPTS if has(script, dest))
        refused(script, [f"{flag.spelling}=--"], f"{flag.spelling}")
    refused("copytask_nvar", ["--lr", "--"], "--lr: expected one argument")


NAMES = {"net_type": (("ExpRnn", "expRNN"), ("nnrnn", "nnRNN")), "nvar": (("log2", "log2n"), ("exp", "expn")),
         "nonlin": (("modReLU", "modrelu"), ("tan", "tanh")), "rinit": (("henaf", "henaff"), ("Cayley", "cayley")),
         "iinit": (("xavir", "xavier"), ("kaimin", "kaiming")), "optimizer": (("rmsprop", "RMSprop"), ("adam", "Adam")),
         "engine": (("pytorch", "torch"), ("nativ", "native"))}


@pytest.mark.parametrize("dest", NAMES)
def test_an_unknown_name(dest):
    flag = flags.spelled(dest)
    for value, near in NAMES[dest]:
        refused("copytask_nvar", [flag, value], flag, f"'{value}'", f"did you mean {near}?")
    refused("copytask_nvar", [f"{flag}="], flag, "'' is not one of")


@pytest.mark.parametrize("value", ["", "a/b", "/", "../up", ".", "a\\b", "a\nb", "a\x07b", "a\udcffb", "x" * 101,
                                   "例" * 90])
def test_a_name_that_makes_no_folder(value):
    refused("copytask_nvar", [f"--name={value}"], "--name", "use at most 100 letters, digits, - and _")


@pytest.mark.parametrize("flag", ["--save", "--data", "--resume"])
@pytest.mark.parametrize("value", ["", "a\udcffb", "a\x1bb"])
def test_a_path_that_is_none(flag, value):
    refused("sMNIST_nvar", [f"{flag}={value}"], flag, "is not the name of a folder")


def test_resume_of_what_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "nothing", tmp_path, tmp_path / "file" / "in", "x" * 5000):
        refused("copytask_nvar", ["--resume", place], str(place), "is not a run's folder", "name another one or start")


def test_a_save_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "file" / "in", "/dev/null", "x" * 5000):
        refused("copytask_nvar", [*tiny("copytask_nvar"), "--save", place], "cannot be written to", str(place),
                "choose another place with --save")


def put(path, content):
    if content is None:
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """script, typed → the folder of a run that was stopped after its second update."""
    made, place = {}, tmp_path_factory.mktemp("saved")

    def make(script, *typed):
        if (script, typed) not in made:
            save = place / str(len(made))
            with stopped_after(2):
                module_of(script).main([*tiny(script), *typed, "--save", str(save)])
            made[script, typed], = save.glob("*/*")
        return made[script, typed]
    return make


def json_of(change):
    """For a config.json: change its options."""
    def spoil(folder, saved, script):
        config = json.loads((folder / "config.json").read_text())
        change(config["options"])
        (folder / "config.json").write_text(json.dumps(config))
    return spoil


def value_of(dest, value):
    return json_of(lambda options: options[dest].update(value=value))


def state_with(change):
    """For a last.pt: change what it holds."""
    def spoil(folder, saved, script):
        state = torch.load(folder / "last.pt", weights_only=True)
        change(state)
        torch.save(state, folder / "last.pt")
    return spoil


def content_of(name, content):
    def spoil(folder, saved, script):
        path = folder / name
        put(path, content(path.read_bytes()) if callable(content) else content)
    return spoil


def checkpoint_from(*typed):
    def spoil(folder, saved, script):
        shutil.copy(saved(script, *typed) / "last.pt", folder / "last.pt")
    return spoil


class Code:
    """What would write a file if it were unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def zipped_code(folder, saved, script):
    torch.save({"parts": Code()}, folder / "last.pt")


BAD_RUNS = {
    "last.pt of more units": (checkpoint_from("--nhid", "10"), 1, "last.pt cannot be used (it belongs to another run)"),
    "last.pt without its end": (content_of("last.pt", lambda whole: whole[:-100]), 1, "last.pt cannot be used ("),
    "last.pt is a zip with code": (zipped_code, 1, "last.pt cannot be used ("),
    "a place that is not there": (state_with(lambda s: s["parts"].update(progress={})), 1, "last.pt cannot be used ("),
    "a weight that is NaN": (state_with(lambda s: next(iter(s["parts"]["model"].values())).fill_(float("nan"))), 1,
                             "last.pt cannot be used (a weight is not finite)"),
    "a log that was cut": (state_with(lambda s: s.update(log_size=10**6)), 1, "log.csv is shorter"),
    "config.json of nhid 'many'": (value_of("nhid", "many"), 2, "nhid='many'"),
    "config.json of nhid null": (value_of("nhid", None), 2, "nhid=None"),
    "config.json of a climbing name": (value_of("name", "../../up"), 2, "name='../../up'"),
    "config.json of three betas": (value_of("betas", [0.1, 0.2, 0.3]), 2, "betas=[0.1, 0.2, 0.3]"),
    "config.json of units that do not fit": (value_of("nhid", 12), 1, "last.pt cannot be used ("),
    "config.json with one more option": (json_of(lambda options: options.update(warp={"value": 1, "origin": "typed"})),
                                         2, "there is no flag warp"),
    "config.json of lists in lists": (content_of("config.json", b"[" * 100_000), 1, "config.json cannot be used ("),
    "config.json is a folder": (content_of("config.json", None), 1, "config.json cannot be used (Is a directory)"),
    "result.json is half": (lambda folder, *given: (folder / "result.json").write_text('{"loss": 1'), 1,
                            "result.json cannot be used ("),
}


@pytest.mark.parametrize("case", BAD_RUNS)
def test_a_run_that_was_spoiled(saved, tmp_path, monkeypatch, case):
    """Nothing runs, nothing is written, and what lies there stays as it is."""
    spoil, status, sentence = BAD_RUNS[case]
    monkeypatch.chdir(tmp_path)
    script, folder = "copytask_nvar", tmp_path / "run"
    shutil.copytree(saved(script), folder)
    spoil(folder, saved, script)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    refused(script, ["--resume", folder], sentence, "restore it from a copy" if status == 1 else "", status=status)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    assert not (tmp_path / "ran").exists()


PROCESSES = [
    ("copytask_nvar", ("--lr", "1e300"), 2, "'1e300' is not a number"),
    ("sMNIST_alpha", ("--data", "/dev/null"), 1, "not found in /dev/null/MNIST/raw. The download failed"),
    ("copytask_expalpha", (b"--save=\xff\xfe",), 2, "is not the name of a folder"),
]


@pytest.mark.parametrize(("script", "typed", "status", "sentence"), PROCESSES, ids=[case[0] for case in PROCESSES])
def test_as_a_process(tmp_path, script, typed, status, sentence):
    done = subprocess.run([*command(script), *typed], cwd=tmp_path, env=environment(), capture_output=True, timeout=60,
                          check=False)
    err = done.stderr.decode()
    assert (done.returncode, len(err.splitlines())) == (status, 1), err
    assert sentence in err
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_knows_no_greek(tmp_path):
    done = subprocess.run(command("copytask_nvar", "--help"), cwd=tmp_path, capture_output=True, timeout=60,
                          check=False, env={**environment(), "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"--nvar" in done.stdout


@pytest.mark.parametrize(("typed", "said"), [
    ("--cuda", "--cuda was given but torch sees no GPU; leave it out to run on the CPU"),
    ("--tf32", "--tf32 has no meaning on the CPU, .*; add --cuda or leave it out")])
def test_what_needs_a_gpu(monkeypatch, tmp_path, typed, said):
    script = "copytask_nvar"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=said):
        module_of(script).main([*tiny(script), typed, "--save", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_is_missing(tmp_path):
    code = "import sys; sys.modules['scipy'] = None; from common.errors import run_main; from evidence import table\n" \
           "run_main(lambda: table.is_within(1.0, [1.0, 2.0]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True,
                          timeout=60, check=False)
    assert (done.returncode, done.stderr) == (1, "-c: the package scipy is missing; pip install -r requirements.txt\n")
