"""Runs: the scripts as processes from another folder, what they leave on disk, how they stop and go on."""

import contextlib
import fcntl
import os
import pty
import shutil
import signal
import struct
import subprocess
import sys
import termios
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SCRIPTS, TINY, assert_same_run, command, environment, module_of, task_of, tiny

from common import data, language, smnist
from common.data import Characters
from common.errors import UserError
from common.network import build_network
from common.runs import records, run
from common.stair import FixedStair

FILES = {"config.json", "log.csv", "last.pt", "best.pt", "curves.png", "result.json"}


def visible(folder):
    """The files of a run, but for what a learned stair leaves beside them."""
    return {p.name for p in Path(folder).iterdir() if not p.name.startswith(".")} - {"stair.csv"}


def only_run(save, script):
    folder, = (Path(save) / script).iterdir()
    return folder


def checkpoint_of(folder):
    return torch.load(folder / "last.pt", weights_only=True)


def one_sentence(result, status, *parts):
    """A process that ended with `status` and said why in a line."""
    assert result.returncode == status, result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr
    for part in parts:
        assert part in result.stderr


RESULT_KEYS = {
    "copytask": {"updates", "loss", "recall", "averaged_over", "memoryless_loss"},
    "sMNIST": {"epochs", "best_epoch", "validation_accuracy", "test_accuracy", "test_loss"},
    "language": {"epochs", "best_epoch", "validation_loss", "validation_accuracy", "test_loss", "test_perplexity",
                 "test_bits_per_character", "test_accuracy"},
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_from_another_folder(run_script, data_folder, tmp_path, script):
    done = run_script(script, *tiny(script), *data_folder(script), "--name", "try", few_images=True)
    assert done.returncode == 0, done.stderr
    folder = only_run(tmp_path / "saves", script)
    assert folder.name.endswith("-s400-try")
    assert visible(folder) == FILES

    assert done.stderr == ""                                # piped: no progress bar
    assert "\r" not in done.stdout
    for part in (f"{script}: sRNN", "typed: ", "PAPER sRNN", "default: ", f"writing to saves/{script}/", "result in"):
        assert part in done.stdout
    assert "memoryless" in done.stdout or task_of(script) != "copytask"

    config = records.read_config(folder)
    assert config["script"] == script
    assert config["argv"][1:] == list(map(str, (*tiny(script), *data_folder(script), "--name", "try")))
    assert config["options"]["nhid"] == {"value": 8, "origin": "typed"}
    assert config["options"]["lr"]["origin"] == f"PAPER {config['row']}"
    assert config["options"]["nonlin"] == {"value": "modrelu", "origin": "default"}
    assert {"versions", "device", "commit", "threads", "started"} <= set(config)

    result = records.read_result(folder)
    assert RESULT_KEYS[task_of(script)] <= set(result)
    assert {"row", "parameters", "seconds", "device", "versions", "commit", "command"} <= set(result)
    assert all(value == value for value in result.values())             # no not-a-number
    weights = torch.load(folder / "best.pt", weights_only=True)
    assert result["parameters"] == sum(w.numel() for w in weights.values())
    last = checkpoint_of(folder)
    assert set(last["parts"]["model"]) == set(weights)
    assert not any("kernel" in name for name in weights)
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "seconds" in records.log_rows(folder)[0]
    assert len(records.log_rows(folder)) == 1


def test_a_run_imports_nothing_heavy(tmp_path):
    """torch's compiler, sympy and matplotlib take longer to import than a short run takes."""
    code = "import sys, copytask_alpha; copytask_alpha.main(sys.argv[1:]); " \
           "print(sorted({name for name in sys.modules} & {'torch._dynamo', 'sympy', 'matplotlib'}))"
    typed = [*tiny("copytask_alpha"), "--engine", "torch", "--no-curves", "--save", str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", code, *typed], cwd=ROOT, env=environment(), capture_output=True,
                          text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_sequential_mnist_at_full_size(start_script, data_folder, tmp_path):
    """All of the images, the ordinary script; stopped after its first report."""
    process = start_script("sMNIST_nvar", "--nhid", "8", "--batch", "20", "--log-interval", "1", "--permute",
                           "--threads", "1", *data_folder("sMNIST"))
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    folder = only_run(tmp_path / "saves", "sMNIST_nvar")
    assert folder.name == "expRNN-expn-permuted-s400"
    assert f"sMNIST_nvar.py --resume saves/sMNIST_nvar/{folder.name}" in errors
    assert checkpoint_of(folder)["parts"]["progress"]["batch"] >= 1


COPY = ("copytask_nvar", *tiny("copytask_nvar"))


def test_a_second_run_overwrites_nothing(main):
    _, first = main(*COPY)
    kept = {p.name: p.read_bytes() for p in first.iterdir()}
    _, second = main(*COPY)
    _, third = main(*COPY)
    assert [p.name for p in (first, second, third)] == ["expRNN-expn-s400", "expRNN-expn-s400-2",
                                                        "expRNN-expn-s400-3"]
    assert {p.name: p.read_bytes() for p in first.iterdir()} == kept
    assert_same_run(second, first)                          # and the same run is the same run


@pytest.mark.parametrize(("updates", "interval", "reported"), [
    (10, 5, [5, 10]), (10, 4, [4, 8, 10]), (3, 50, [3]), (120, 60, [60, 120]), (1, 1, [1])])
def test_log_interval_and_updates(main, updates, interval, reported):
    result, folder = main(*COPY, "--updates", updates, "--log-interval", interval)
    assert [row["update"] for row in records.log_rows(folder)] == reported
    assert result["updates"] == updates
    assert result["averaged_over"] == min(50, updates)


def test_the_copying_log_holds_means(main):
    """Every update reported alone, then in fives: the mean, the median and the last rows agree."""
    _, single = main(*COPY, "--updates", 12, "--log-interval", 1)
    result, fives = main(*COPY, "--updates", 12, "--log-interval", 5)
    losses, recalls = ([row[name] for row in records.log_rows(single)] for name in ("loss", "recall"))
    for row, (start, end) in zip(records.log_rows(fives), ((0, 5), (5, 10), (10, 12)), strict=True):
        assert row["loss"] == pytest.approx(sum(losses[start:end]) / (end - start), rel=1e-5)
        assert row["recall"] == pytest.approx(sum(recalls[start:end]) / (end - start), rel=1e-5)
        assert row["loss_median"] == pytest.approx(sorted(losses[start:end])[(end - start - 1) // 2], rel=1e-5)
    assert result["loss"] == pytest.approx(sum(losses) / 12, rel=1e-5)
    assert result["recall"] == pytest.approx(sum(recalls) / 12, rel=1e-5)


@pytest.mark.parametrize("typed", [
    ("--vari",), ("--labels", "4"), ("--no-onehot",), ("--optimizer", "Adam"), ("--net-type", "nnRNN"),
    ("--net-type", "RNN-Orth"), ("--net-type", "LSTM", "--nvar", "none"), ("--net-type", "RNN", "--nvar", "none"),
    ("--clip", "0.1"), ("--engine", "reference"), ("--c-length", "1", "--T", "1"), ("--labels", "1"),
    *(("--nonlin", phi) for phi in ("none", "tanh", "relu", "sigmoid"))])
def test_the_variants_train(main, typed):
    result, folder = main(*COPY, *typed)
    assert result["loss"] > 0
    start = torch.load(folder / "best.pt", weights_only=True)
    assert all(value.isfinite().all() for value in start.values())


@pytest.mark.parametrize("stair", ["copytask_alpha", "copytask_expalpha"])
@pytest.mark.parametrize("net_type", ["RNN", "RNN-Orth", "expRNN", "nnRNN"])
def test_every_step_of_a_learned_stair_learns(main, stair, net_type):
    # Of an exponential stair that starts at 20 only what |z| is small for moves, so it starts low here.
    _, folder = main(stair, *tiny(stair), "--net-type", net_type, "--alpha-start", "0.5")
    numbers = torch.load(folder / "best.pt", weights_only=True)["network.stair.numbers"]
    assert (numbers != 0.5).all()


MNIST = ("sMNIST_nvar", "--nhid", "8", "--threads", "1")


def test_epochs_batches_and_reports(main, few_images, monkeypatch):
    seen = []
    forward = smnist.PixelModel.forward

    def spy(self, x, kernel=None):
        seen.append((x.shape[1], torch.is_grad_enabled(), x[:, :, 0].clone()))
        return forward(self, x, kernel)

    monkeypatch.setattr(smnist.PixelModel, "forward", spy)
    result, folder = main(*MNIST, "--batch", "10", "--epochs", "3", "--log-interval", "2")
    epoch = [(10, True), (10, True), (4, True), (7, False)]
    assert [s[:2] for s in seen] == [*epoch * 3, (9, False)]
    for k in range(3):
        assert torch.equal(seen[k][2], seen[k + 4][2])      # the same order in every epoch
    assert [(row["epoch"], row["batch"]) for row in records.log_rows(folder)] == \
        [(epoch, batch) for epoch in (1, 2, 3) for batch in (2, 3)]
    assert result["epochs"] == 3


def test_the_best_epoch_is_tested_once(main, few_images, monkeypatch):
    scores, parts, weights = iter([0.2, 0.5, 0.5, 0.4, 0.9]), [], []

    def evaluate(model, images, batch, run):
        parts.append(len(images))
        weights.append(model.readout.bias.detach().clone())
        return 1.0, next(scores)

    monkeypatch.setattr(smnist, "evaluate", evaluate)
    result, _ = main(*MNIST, "--batch", "10", "--epochs", "4")
    assert parts == [7, 7, 7, 7, 9]                         # validation four times, the test once
    assert (result["best_epoch"], result["validation_accuracy"], result["test_accuracy"]) == (2, 0.5, 0.9)
    assert torch.equal(weights[4], weights[1])              # the first of equals
    assert not torch.equal(weights[3], weights[1])


@pytest.mark.parametrize(("frequency", "saves"), [(1, 5), (2, 4), (3, 3), (9, 2)])
def test_save_freq(main, few_images, monkeypatch, frequency, saves):
    """Checkpoints at the first report, epochs that it divides and the end; the clock's own come only every minute."""
    written = []
    save = records.save_tensors
    monkeypatch.setattr(records, "save_tensors", lambda path, content: written.append(path.name) or save(path, content))
    main(*MNIST, "--epochs", "5", "--save_freq", frequency)
    assert written.count("last.pt") == saves


def test_evaluation_counts_every_image(few_images):
    model = smnist.PixelModel(build_network("RNN", 1, 4, FixedStair("none", 15), "tanh", "xavier", "xavier"))
    x, labels = few_images[0].batch(0, 24)
    logits = model(x).detach()
    expected = torch.nn.functional.cross_entropy(logits, labels).item(), \
        (logits.argmax(1) == labels).float().mean().item()
    for batch in (24, 10, 1):
        assert smnist.evaluate(model, few_images[0], batch) == pytest.approx(expected, rel=1e-5)


LANGUAGE = ("language_nvar", *TINY["language"], "--threads", "1")


def test_both_rates_halve_without_a_better_loss(main, penn_folder, monkeypatch):
    losses = iter([3.0, 2.0, 2.5, 2.0, 1.0, 0.5])
    monkeypatch.setattr(language, "evaluate", lambda *given: (next(losses), 0.5))
    result, folder = main(*LANGUAGE, "--epochs", "5", "--data", penn_folder, "--lr", "0.008", "--lr_orth", "0.004")
    groups = checkpoint_of(folder)["parts"]["optimizer"]["param_groups"]
    assert sorted({g["lr"] for g in groups}) == pytest.approx([0.001, 0.002])
    assert (result["best_epoch"], result["validation_loss"]) == (5, 1.0)
    ends = [row["lr"] for row in records.log_rows(folder) if row["validation_loss"]]
    assert ends == pytest.approx([0.008, 0.008, 0.008, 0.004, 0.002])


def test_the_state_carries_over_and_starts_at_zero(main, penn_folder, monkeypatch):
    calls = []
    forward = language.CharacterModel.forward

    def spy(self, symbols, state=None, kernel=None):
        logits, new = forward(self, symbols, state, kernel)
        calls.append((torch.is_grad_enabled(), symbols.shape[1], len(symbols), state, new.detach().clone()))
        return logits, new

    monkeypatch.setattr(language.CharacterModel, "forward", spy)
    main(*LANGUAGE, "--epochs", "2", "--bptt", "50", "--data", penn_folder)
    assert {c[1] for c in calls if c[0]} == {4}             # --batch streams train
    assert {c[1] for c in calls if not c[0]} == {10}        # ten evaluate
    previous = None
    for call in calls:
        if previous is None or call[0] != previous[0] or previous[2] < 50 or \
                (call[0] and previous[2] < 50):
            assert not call[3].any()
        else:
            assert torch.equal(call[3], previous[4])
            assert not call[3].requires_grad
        previous = call
    assert max(c[2] for c in calls) == 50


def test_language_evaluation_by_hand():
    """Ten streams, the state carried: the same as one long segment, whatever bptt, without a stair."""
    torch.manual_seed(0)
    network = build_network("RNN", 3, 4, FixedStair("none", 60), "tanh", "xavier", "xavier")
    model = language.CharacterModel(network, 7, 3)
    streams = language.parallel_streams(torch.randint(0, 7, (603,)), 10)
    logits, _ = model(streams[:-1])
    expected = torch.nn.functional.cross_entropy(logits, streams[1:].flatten()).item()
    for bptt in (59, 20, 7):
        assert language.evaluate(model, streams, bptt)[0] == pytest.approx(expected, rel=1e-5)


def test_more_streams_than_symbols(main, penn_folder):
    """A --batch that leaves no segment is a sentence, not a division by zero."""
    with pytest.raises(UserError, match="--batch"):
        main(*LANGUAGE, "--data", penn_folder, "--batch", "3000")


def test_a_validation_file_too_short_for_ten_streams(main, monkeypatch):
    corpus = Characters(torch.arange(400) % 5, torch.arange(12) % 5, torch.arange(200) % 5, list("abcde"))
    monkeypatch.setattr(module_of("language_nvar"), "load_characters", lambda folder, text: corpus)
    with pytest.raises(UserError, match=r"valid"):
        main(*LANGUAGE)


LONG = {
    "copytask_nvar": ("--net-type", "nnRNN", "--vari", "--nhid", "12", "--T", "20", "--c-length", "5",
                      "--updates", "300", "--log-interval", "10"),
    "sMNIST_nvar": ("--net-type", "LSTM", "--nvar", "none", "--nhid", "12", "--batch", "10", "--epochs", "3",
                    "--log-interval", "2", "--permute"),
    "language_expalpha": ("--net-type", "expRNN", "--nhid", "12", "--batch", "4", "--bptt", "10", "--emsize", "5",
                          "--epochs", "4", "--log-interval", "5", "--optimizer", "Adam"),
}


@pytest.mark.parametrize(("script", "signals"), [
    ("copytask_nvar", (signal.SIGKILL, signal.SIGINT)), ("sMNIST_nvar", (signal.SIGTERM,)),
    ("language_expalpha", (signal.SIGINT,))])
def test_resume_ends_where_the_uninterrupted_run_ends(start_script, main, monkeypatch, data_folder, tmp_path, script,
                                                      signals):
    """Processes are stopped or killed after a report, and resumed; compared with a run that was let be."""
    arguments = (*LONG[script], "--threads", "1", *data_folder(script))
    typed, folder = arguments, None
    for number in signals:
        process = start_script(script, *typed, few_images=True)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        folder = only_run(tmp_path / "saves", script)
        typed = ("--resume", f"saves/{script}/{folder.name}")
        assert not (folder / "result.json").exists()
        if number == signal.SIGKILL:                        # no checkpoint yet: again from the beginning
            assert process.returncode == -number
            assert not (folder / "last.pt").exists()
            assert len(records.log_rows(folder)) >= 1
        else:
            assert process.returncode == 128 + number
            sentence, = errors.splitlines()
            assert sentence.startswith(f"{script}.py: stopped and saved; go on with python ")
            assert sentence.endswith(f"{script}.py --resume saves/{script}/{folder.name}")

    load_mnist = data.load_mnist                            # in this process; the processes did the same
    monkeypatch.setattr(module_of("sMNIST_nvar"), "load_mnist", lambda *given: [
        replace(images, pixels=images.pixels[:120], labels=images.labels[:120]) for images in load_mnist(*given)])
    main(script, *typed)
    _, whole = main(script, *arguments)
    assert visible(folder) == FILES
    assert_same_run(folder, whole)


@pytest.mark.parametrize("task", ["copytask", "sMNIST", "language"])
@pytest.mark.parametrize(("after", "net_type"), [(1, "RNN"), (3, "LSTM"), (4, "nnRNN"), (7, "expRNN")])
def test_resume_from_every_kind_of_place(main, penn_folder, few_images, task, net_type, after):
    """First update, middle, end of an epoch and beyond: here three updates make an epoch."""
    more = {"copytask": ("--vari", "--updates", "9", "--log-interval", "4"),
            "sMNIST": ("--epochs", "3", "--batch", "10", "--log-interval", "2"),
            "language": ("--epochs", "3", "--bptt", "200", "--log-interval", "3", "--data", penn_folder)}[task]
    arguments = (f"{task}_nvar", *tiny(f"{task}_nvar"), "--net-type", net_type, "--nvar", "none", *more)
    _, whole = main(*arguments)
    _, folder = main(*arguments, stop_after=after)
    main(f"{task}_nvar", "--resume", folder)
    assert_same_run(folder, whole)


def test_rows_after_the_checkpoint_are_cut(main):
    """Killed between a report and the next checkpoint: the log holds no row twice."""
    arguments = (*COPY, "--updates", "9", "--log-interval", "1")
    _, whole = main(*arguments)
    _, folder = main(*arguments, stop_after=4)
    with open(folder / "log.csv", "a", encoding="utf-8") as file:
        file.write("5,1.0,1.0,0.5,0.1\n6,1.0,1")
    (folder / ".last.pt.123.tmp").write_bytes(b"half a checkpoint")
    main("copytask_nvar", "--resume", folder)
    assert_same_run(folder, whole)


@pytest.mark.parametrize("script", ["copytask_nvar", "sMNIST_nvar"])
def test_a_finished_run_is_left_as_it_is(main, few_images, script):
    """A run is tested once: resuming a finished one tells the same result."""
    first, folder = main(script, *tiny(script))
    kept = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert main(script, "--resume", folder)[0] == first
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == kept


@pytest.fixture
def stopped(main):
    """The folder of a copying run that was stopped after two updates."""
    return main(*COPY, stop_after=2)[1]


@pytest.mark.parametrize("typed", [
    ("--nhid", "16"), ("--updates", "3"), ("--no-onehot",), ("--seed", "1"), ("--name", "x"), ("--net-type", "RNN")])
def test_an_option_cannot_change_on_the_way(main, stopped, typed):
    with pytest.raises(UserError, match=rf"^{typed[0].replace('--no-', '--').replace('--seed', '--random-seed')} is "
                                        r".*start a new run") as error:
        main("copytask_nvar", "--resume", stopped, *typed)
    assert error.value.status == 2


def test_the_same_options_can_be_typed_again(main, stopped):
    result, _ = main("copytask_nvar", "--resume", stopped, *COPY[1:], "--threads", "1")
    assert result["updates"] == 4


def test_resume_with_another_script(main, stopped):
    with pytest.raises(UserError, match=r"is a run of copytask_nvar\.py; resume it with that script"):
        main("copytask_alpha", "--resume", stopped)


@pytest.mark.parametrize("spoiled", ["gone", "another model"])
def test_best_weights_that_are_wrong(main, few_images, monkeypatch, spoiled):
    _, folder = main(*MNIST, "--epochs", "2", "--batch", "10", stop_after=5)
    best = folder / "best.pt"
    monkeypatch.setattr(run.Run, "save_best", lambda self: None)
    if spoiled == "gone":
        best.unlink()
    else:
        torch.save({"weight": torch.zeros(2)}, best)
    with pytest.raises(UserError, match=r"best\.pt"):
        main("sMNIST_nvar", "--resume", folder)


def test_a_loss_that_is_not_finite(run_script, tmp_path):
    done = run_script("copytask_nvar", *tiny("copytask_nvar"), "--net-type", "RNN", "--nonlin", "none",
                      "--lr", "1e30", "--updates", "50", "--log-interval", "10")
    one_sentence(done, 3, "stopped", "--lr", "copytask_nvar.py: the loss is ")
    folder = only_run(tmp_path / "saves", "copytask_nvar")
    assert not (folder / "result.json").exists()
    assert records.is_diverged(folder)                            # the log says so, until the run is resumed
    log = (folder / "log.csv").read_bytes()
    done = run_script("copytask_nvar", "--resume", folder)
    one_sentence(done, 3, "stopped", "--lr", "copytask_nvar.py: the loss is ")
    assert len((folder / "log.csv").read_bytes().splitlines()) == len(log.splitlines())


def test_two_signals_before_there_is_a_folder(main, monkeypatch):
    """Ctrl-C twice while the data loads: nothing was saved, so nothing is said to go on from."""
    def loads_slowly(*given):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(module_of("sMNIST_nvar"), "load_mnist", loads_slowly)
    with pytest.raises(run.Stopped) as stop:
        main(*MNIST)
    assert "None" not in str(stop.value)
    assert "--resume" not in str(stop.value)


def test_handlers_are_put_back(main):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    main(*COPY)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_disk_that_is_full(main, monkeypatch, tmp_path):
    """A checkpoint that cannot be written leaves the old one whole and no temporary file."""
    _, folder = main(*COPY)
    kept = (folder / "last.pt").read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"could not be written \(No space left on device\)"):
        records.save_tensors(folder / "last.pt", {"new": torch.zeros(3)})
    assert (folder / "last.pt").read_bytes() == kept
    assert not list(folder.glob(".last*"))


def test_a_terminal_sees_a_progress_bar(tmp_path):
    outer, inner = pty.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    process = subprocess.Popen(command("copytask_nvar", *tiny("copytask_nvar"), "--updates", "60"), cwd=tmp_path,
                               env=environment(), stdout=subprocess.DEVNULL, stderr=inner)
    os.close(inner)
    seen = []
    with contextlib.suppress(OSError):                      # Linux says EIO where the other side has closed
        while block := os.read(outer, 1000):
            seen.append(block)
    os.close(outer)
    assert process.wait(60) == 0
    assert b"/60" in b"".join(seen)
    assert b"\r" in b"".join(seen)


def test_a_folder_can_move(main, stopped, tmp_path):
    """Everything is in the folder: it goes on from anywhere."""
    moved = tmp_path / "elsewhere"
    shutil.move(stopped, moved)
    main("copytask_nvar", "--resume", moved)
    assert visible(moved) == FILES

