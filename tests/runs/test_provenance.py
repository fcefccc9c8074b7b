"""What a run is a run of: code by content, checkpoints of its own, a folder; what a kill or a link does to it."""

import errno
import json
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import ROOT, environment, module_of, tiny

from common.errors import UserError
from common.optim import OrthogonalRMSprop
from common.runs import folder as folder_module
from common.runs import provenance, records
from common.runs.provenance import content_name, foreign_code, publish_code
from common.runs.run import has_unsaved_schedule

COPY = tiny("copytask_nvar")


def edited(name, *changes):
    """main of a copy of copytask_nvar.py that has another name and the `changes` (old text, new text)."""
    text = (ROOT / "copytask_nvar.py").read_text(encoding="utf-8")
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    space = {"__name__": name, "__file__": str(ROOT / f"{name}.py"), "__doc__": ""}
    exec(compile(text, f"{name}.py", "exec"), space)
    return space["main"]


def test_a_content_has_the_name_that_git_gives_it(tmp_path):
    for content, name in ((b"", "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"),
                          (b"hello\n", "ce013625030ba8dba906f756967f9e9ca394464a"),
                          (b"hello\r\n", "ce013625030ba8dba906f756967f9e9ca394464a")):
        (tmp_path / "file").write_bytes(content)
        assert content_name(tmp_path / "file") == name


def test_config_names_the_script_and_the_code_below_it(main):
    _, folder = main("copytask_nvar", *COPY)
    code = records.read_config(folder)["code"]
    assert next(iter(code)) == "copytask_nvar.py"
    assert {"common/cells.py", "common/copytask.py", "common/recurrence/native.cpp"} <= code.keys()
    assert not any("runs" in name for name in code)
    assert code["common/cells.py"] == content_name(ROOT / "common" / "cells.py")


def test_foreign_code(monkeypatch, tmp_path):
    config = {"script": "copytask_nvar", "code": provenance.code_of(ROOT / "copytask_nvar.py")}
    assert foreign_code(config) == []
    assert foreign_code({**config, "code": {**config["code"], "common/cells.py": "0" * 40}}) == ["common/cells.py"]
    assert foreign_code({"script": "mine", "code": config["code"]}) == ["mine.py"]
    assert foreign_code({"script": "copytask_nvar", "code": {}}) == ["copytask_nvar.py"]
    assert foreign_code({"script": "copytask_nvar"}) == []                               # of before contents were kept
    assert foreign_code({"script": "copytask_nvar", "edited_files": ["common/cells.py 1234567"]}) != []
    assert foreign_code({**config, "edited_files": ["common/cells.py 1234567"]}) != []   # and gone on with since
    assert foreign_code({**config, "code": {**config["code"], "common/mine.py": "0" * 40}}) == []    # nothing reads it
    monkeypatch.setattr(provenance, "PUBLISHED_CODE", tmp_path / "code.json")
    assert foreign_code(config) == list(config["code"])                                  # without a list
    assert "common/cells.py" in publish_code()
    assert publish_code() == foreign_code(config) == []
    listed = json.loads((tmp_path / "code.json").read_text())
    listed["common/cells.py"].insert(0, "0" * 40)                                        # the list grows
    (tmp_path / "code.json").write_text(json.dumps(listed))
    assert foreign_code(config) == []


def test_every_record_here_is_of_the_projects_own_code(monkeypatch):
    monkeypatch.undo()
    for path in (ROOT / "results" / "runs").glob("*/*/config.json"):
        config = records.read_config(path.parent)
        if "code" in config:
            assert foreign_code(config) == [], path


def test_a_run_says_which_files_are_edited_and_is_edited_for_ever(copied):
    """No git is asked; line ends make no edit."""
    def run(*typed, **more):
        done = subprocess.run([sys.executable, "copytask_nvar.py", *typed, "--no-curves"], cwd=copied, text=True,
                              env={**environment(), "PATH": "", **more}, capture_output=True, check=True)
        folder, = (copied / "saves-of-this-test" / "copytask_nvar").iterdir()
        said = [line for line in done.stdout.splitlines() if line.startswith("edited")]
        return said, foreign_code(records.read_config(folder)), folder

    cells = copied / "common" / "cells.py"
    text = cells.read_text(encoding="utf-8")
    cells.write_bytes(text.replace("\n", "\r\n").encode())
    said, foreign, folder = run(*COPY, "--save", "saves-of-this-test")
    assert (said, foreign) == ([], [])
    cells.write_text(text + "# a comment\n", encoding="utf-8")
    edited = ["edited: common/cells.py; tables show this run apart from the published rows"]
    assert run("--resume", folder, "--updates", "6", GIT_DIR=str(ROOT / ".git"))[:2] == (edited, ["common/cells.py"])
    cells.write_text(text, encoding="utf-8")
    assert run("--resume", folder, "--updates", "8")[:2] == ([], ["common/cells.py"])


def test_checkpoints_of_another_run_are_refused(main):
    (_, mine), (_, other) = (main("copytask_nvar", *COPY, "--seed", seed) for seed in (400, 401))
    shutil.copy(other / "best.pt", mine / "best.pt")
    script = module_of("copytask_nvar")
    for refused in (lambda: main("copytask_nvar", "--evaluate", mine), lambda: script.load(mine)):
        with pytest.raises(UserError, match=r"s400/best\.pt cannot be used \(it belongs to another run\)"):
            refused()
    shutil.copy(other / "last.pt", mine / "last.pt")
    with pytest.raises(UserError, match=r"s400/last\.pt cannot be used \(it belongs to another run\)"):
        main("copytask_nvar", "--resume", mine, "--updates", "9")
    assert (mine / "result.json").exists()
    moved = mine.rename(mine.with_name("moved"))                                         # a folder may move as a whole
    shutil.copytree(other, other.with_name("copy"))
    assert main("copytask_nvar", "--evaluate", other.with_name("copy"))[0].keys() == {"validation"}
    assert moved.exists()


def test_a_hard_link_to_the_log_keeps_what_it_says(main, tmp_path):
    _, folder = main("copytask_nvar", *COPY, "--log-interval", "1")
    (tmp_path / "kept.csv").hardlink_to(folder / "log.csv")
    kept = (folder / "log.csv").read_bytes()
    main("copytask_nvar", "--resume", folder, "--updates", "6")
    assert len(records.log_rows(folder)) == 6
    (folder / "last.pt").unlink()
    (folder / "result.json").unlink()
    main("copytask_nvar", "--resume", folder)
    assert (tmp_path / "kept.csv").read_bytes() == kept


@pytest.mark.parametrize("linked", ["saves", "saves/copytask_nvar", "saves/copytask_nvar/expRNN-expn-s400"])
def test_a_link_to_another_disk(main, tmp_path, linked):
    """Of saves/, of a run's folder, and of its files."""
    main("copytask_nvar", *COPY)
    folder = Path("saves/copytask_nvar/expRNN-expn-s400")
    shutil.move(linked, tmp_path / "disk")
    Path(linked).symlink_to(tmp_path / "disk")
    for name in ("last.pt", "log.csv"):
        shutil.move(folder / name, tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
    assert main("copytask_nvar", "--resume", folder, "--updates", "6")[0]["updates"] == 6
    assert (folder / "last.pt").is_symlink()
    assert (folder / "log.csv").is_symlink()
    main("copytask_nvar", *COPY, "--resume", "auto", "--updates", "6")
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("typed", [(), ("--resume", "auto")])
def test_a_folder_without_config_is_no_run(main, typed):
    """A start was killed between the two, or it is a person's. The same command starts beside it."""
    other = Path("saves/copytask_nvar/expRNN-expn-s400")
    other.mkdir(parents=True)
    (other / ".config.json.tmp").write_text("{")
    _, folder = main("copytask_nvar", *COPY, *typed)
    assert folder.name == "expRNN-expn-s400-2"
    assert [path.name for path in other.iterdir()] == [".config.json.tmp"]


def test_where_nothing_can_be_locked_a_run_goes_on(main, monkeypatch):
    """On Windows there is no fcntl; some disks of a network refuse."""
    def refuse(*given):
        raise OSError(errno.ENOLCK, "No locks available")

    _, folder = main("copytask_nvar", *COPY)
    monkeypatch.setattr(folder_module.fcntl, "flock", refuse)
    assert main("copytask_nvar", *COPY, "--resume", "auto", "--updates", "6")[0]["updates"] == 6
    monkeypatch.setattr(folder_module, "fcntl", None)
    assert main("copytask_nvar", "--resume", folder, "--updates", "6")[0]["updates"] == 6


def test_an_argv_with_half_a_surrogate_pair(main):
    _, folder = main("copytask_nvar", *COPY)
    config = records.read_config(folder)
    records.write_json(folder / "config.json", {**config, "argv": [*config["argv"], "\ud800"]})
    assert main("copytask_nvar", "--resume", folder, "--updates", "6")[0]["command"][-1] == "\ud800"
    assert records.read_result(folder)["command"][-1] == "\ud800"


def test_in_a_thread(tmp_path):
    run, typed = module_of("copytask_nvar").main, [*COPY[:-2], "--no-curves", "--save", str(tmp_path)]
    before, found = torch.get_num_threads(), []
    thread = threading.Thread(target=lambda: found.append(run([*typed, "--threads", "2"])))
    thread.start()
    thread.join()
    assert (found[0]["updates"], found[0]["threads"], torch.get_num_threads()) == (4, 2, before)
    assert found[0]["command"] == ["copytask_nvar.py", *typed, "--threads", "2"]
    with ThreadPoolExecutor(2) as pool:
        seeds = [pool.submit(run, [*typed, "--seed", str(seed)]) for seed in (1, 2)]
        together = [job.result()["loss"] for job in seeds]                               # torch has one generator
    assert together == [run([*typed, "--seed", str(seed)])["loss"] for seed in (1, 2)]
    run([*typed, "--threads", "2", "--name", "here"])
    assert torch.get_num_threads() == before
    assert run(["--evaluate", str(tmp_path / "copytask_nvar" / "expRNN-expn-s400-here"), "--threads", "2"])
    assert torch.get_num_threads() == before


def test_a_schedule_of_ones_own_resumes_and_is_named(main, capsys):
    """A warm-up: every update has a larger rate than the one before."""
    warm = ("        return copytask",
            "        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 + k)\n"
            "        optimizer.register_step_post_hook(lambda *_: schedule.step())\n        return copytask")
    run = edited("warm", warm, ("from common import copytask", "import torch\nfrom common import copytask"))
    run([*COPY, "--save", "saves"])
    folder, = Path("saves/warm").iterdir()
    assert run(["--resume", str(folder), "--updates", "6"])["updates"] == 6
    assert capsys.readouterr().out.count("a checkpoint does not hold the place of this learning-rate schedule") == 2


def test_a_schedule_that_is_handed_to_train_goes_on_where_it_was(main, capsys):
    warm = ("        return copytask.train(model, optimizer, task, run,",
            "        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 + k)\n"
            "        optimizer.register_step_post_hook(lambda *_: schedule.step())\n"
            "        return copytask.train(model, optimizer, task, run, schedule=schedule,")
    run = edited("warm", warm, ("from common import copytask", "import torch\nfrom common import copytask"))
    run([*COPY, "--save", "saves"])
    folder, = Path("saves/warm").iterdir()
    resumed = run(["--resume", str(folder), "--updates", "6"])["loss"]
    assert resumed == run([*COPY, "--updates", "6", "--save", "whole"])["loss"]
    assert "does not hold the place" not in capsys.readouterr().out


@pytest.mark.parametrize("method", ["RMSprop", "Adam"])
def test_a_schedule_that_is_a_part_is_saved(method):
    model = torch.nn.Linear(2, 2)
    optimizer = OrthogonalRMSprop(model.parameters(), method=method)
    assert not has_unsaved_schedule([model, optimizer])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9, cycle_momentum=method == "Adam")
    assert has_unsaved_schedule([model, optimizer])
    assert not has_unsaved_schedule([model, optimizer, schedule])


def test_learned_numbers_of_every_shape_are_kept(main):
    own = ("    stair = FixedStair(args.nvar, task.steps) ", "    stair = LearnedStair(task.steps)\n"
           "    stair.numbers = torch.nn.Parameter(torch.rand(task.steps, args.nhid)) ")
    imports = ("from common.stair import FixedStair", "import torch\n\nfrom common.stair import LearnedStair")
    edited("units", own, imports)([*COPY, "--save", "saves"])
    folder, = Path("saves/units").iterdir()
    numbers = torch.load(folder / "last.pt", weights_only=True)["parts"]["model"]["network.stair.numbers"]
    torch.testing.assert_close(torch.tensor(records.read_stair(folder)), numbers, rtol=1e-6, atol=0)
    _, folder = main("copytask_alpha", *COPY)
    numbers = torch.load(folder / "last.pt", weights_only=True)["parts"]["model"]["network.stair.numbers"]
    torch.testing.assert_close(torch.tensor(records.read_stair(folder)), numbers[:, None], rtol=1e-6, atol=0)


def test_weights_that_no_engine_computes(main):
    half = edited("half", (".to(run.device)", ".bfloat16().to(run.device)"))
    with pytest.raises(UserError, match=r"is torch\.bfloat16, which no engine computes; use float32 or float64"):
        half([*COPY, "--save", "saves"])
    assert not Path("saves").exists()


@pytest.mark.parametrize("script", ["copytask_nvar", "language_alpha"])
def test_tensorboard_has_the_rows_of_the_log(main, data_folder, script):
    """Also after a run went on, whose log was cut."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    interval = ("--log-interval", "1" if script == "copytask_nvar" else "2")
    _, folder = main(script, *tiny(script), *data_folder(script), *interval, "--tensorboard")
    longer = ("--updates", "6") if script == "copytask_nvar" else ("--epochs", "2")
    main(script, "--resume", folder, *longer)
    found = events.EventAccumulator(str(folder)).Reload()
    rows = records.log_rows(folder)
    wanted = [row["loss" if "loss" in row else "train_loss"] for row in rows]
    scalars = found.Scalars("loss" if script == "copytask_nvar" else "train_loss")
    assert [event.value for event in scalars] == pytest.approx(wanted, rel=1e-6)
    steps = [event.step for event in scalars]
    assert steps == sorted(set(steps))
    assert steps[-1] == (6 if script == "copytask_nvar" else 2 * max(row["batch"] for row in rows))
    assert b"nhid=8" in found.Tensors("options/text_summary")[0].tensor_proto.string_val[0]


def test_tensorboard_without_its_package(main, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UserError, match="--tensorboard needs the package tensorboard"):
        main("copytask_nvar", *COPY, "--tensorboard")
    assert not Path("saves").exists()
