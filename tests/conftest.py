"""What the tests share: fake data of the right shapes, and the scripts as modules and as processes."""

import contextlib
import importlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

# A test run that was started in the background ignores Ctrl-C, and so would every script that it starts.
for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(ignored) is signal.SIG_IGN:
        signal.signal(ignored, signal.default_int_handler if ignored is signal.SIGINT else signal.SIG_DFL)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common import copytask, language, smnist  # noqa: E402
from common.data import PixelSequences  # noqa: E402
from common.recurrence import unavailable_reason  # noqa: E402
from common.runs import provenance, records  # noqa: E402
from common.runs.run import Stopped  # noqa: E402

unavailable_reason("native", "cpu")  # compiled before any test: the first run of a machine says two lines more

SCRIPTS = tuple(f"{task}_{stair}" for task in ("sMNIST", "copytask", "language")
                for stair in ("nvar", "alpha", "expalpha"))
LOOPS = {"copytask": copytask, "sMNIST": smnist, "language": language}

# Runs a script as `python SCRIPT ...` does, on the first few images of MNIST only: an epoch in a second.
FEW_IMAGES = f"""
import runpy, sys
sys.path.insert(0, {str(ROOT)!r})
import common.data as data
whole = data.load_mnist
def first(images):
    return data.PixelSequences(images.pixels[:120], images.labels[:120], images.source)
data.load_mnist = lambda *given, **named: tuple(map(first, whole(*given, **named)))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

TINY = {
    "copytask": ("--nhid", "8", "--T", "5", "--c-length", "2", "--batch", "3", "--updates", "4"),
    "sMNIST": ("--nhid", "8", "--batch", "40", "--epochs", "1"),
    "language": ("--nhid", "8", "--batch", "4", "--epochs", "1", "--bptt", "20", "--emsize", "5"),
}


@pytest.fixture(autouse=True)
def one_thread():
    """Small matrices, busy cores: one thread, whatever a run set before."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def list_of_code(tmp_path_factory) -> Path:
    """The list of the project's own code, with the code of this checkout, edited or not."""
    path = Path(shutil.copy(provenance.PUBLISHED_CODE, tmp_path_factory.mktemp("published")))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(provenance, "PUBLISHED_CODE", path)
        provenance.publish_code()
    return path


@pytest.fixture(autouse=True)
def this_code_is_published(monkeypatch, list_of_code):
    """Tables of this process count the runs that the tests make."""
    monkeypatch.setattr(provenance, "PUBLISHED_CODE", list_of_code)


@pytest.fixture
def copied(tmp_path, list_of_code):
    """A copy of the project's code in a folder of its own."""
    for path in (*ROOT.glob("*.py"), ROOT / "common", ROOT / "evidence", ROOT / "results" / "published"):
        target = tmp_path / path.relative_to(ROOT)
        if path.is_dir():
            shutil.copytree(path, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, target)
    shutil.copy(list_of_code, tmp_path / "results" / "published" / "code.json")
    return tmp_path


@pytest.fixture
def float64():
    """New parameters and tensors are float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def write_idx(path: Path, values: np.ndarray) -> None:
    """An idx file of unsigned bytes: magic number, sizes, values."""
    header = bytes([0, 0, 8, values.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in values.shape)
    path.write_bytes(header + np.ascontiguousarray(values, dtype=np.uint8).tobytes())


def fake_images(count: int, seed: int) -> np.ndarray:
    """(count, 784) bytes whose first two pixels tell the image's number."""
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 784), dtype=np.uint8)
    pixels[:, 0], pixels[:, 1] = np.arange(count) & 255, np.arange(count) >> 8
    return pixels


def write_mnist(folder: Path, train=60_000, test=10_000, labels=lambda k: k * 7 % 10) -> Path:
    """A data folder with so many images under MNIST's names, and the labels of their numbers."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for seed, (part, count) in enumerate((("train", train), ("t10k", test))):
        write_idx(raw / f"{part}-images-idx3-ubyte", fake_images(count, seed).reshape(count, 28, 28))
        write_idx(raw / f"{part}-labels-idx1-ubyte", labels(np.arange(count)))
    return folder


def fake_text(lines: int, seed: int) -> str:
    """Lines of symbols separated by blanks, as in ptb.char.*.txt: words that repeat, `_` between them."""
    generator = np.random.default_rng(seed)
    words = ["t h e", "c a t", "s a t", "o n", "m a t", "d o g", "N"]
    rows = [" _ ".join(words[k] for k in generator.integers(0, len(words), 8)) for _ in range(lines)]
    rows[0] = " _ ".join(words)
    return "".join(f" {row} \n" for row in rows)


def write_penn(folder: Path) -> None:
    penn = folder / "pennchar"
    penn.mkdir(parents=True)
    for seed, (part, lines) in enumerate((("train", 60), ("valid", 16), ("test", 16))):
        (penn / f"{part}.txt").write_text(fake_text(lines, seed), encoding="utf-8")


@pytest.fixture(scope="session")
def mnist_folder(tmp_path_factory) -> Path:
    """A data folder with MNIST's four files, full size, random pixels."""
    return write_mnist(tmp_path_factory.mktemp("mnist"))


@pytest.fixture(scope="session")
def penn_folder(tmp_path_factory) -> Path:
    """A data folder with three small character files."""
    folder = tmp_path_factory.mktemp("penn")
    write_penn(folder)
    return folder


@pytest.fixture(scope="session")
def data_folder(mnist_folder, penn_folder):
    """script → the arguments that name its data."""
    return lambda script: {"sMNIST": ("--data", mnist_folder), "language": ("--data", penn_folder),
                           "copytask": ()}[script.split("_")[0]]


def task_of(script: str) -> str:
    return script.split("_")[0]


def tiny(script: str) -> tuple:
    """Arguments for a run of a second or two."""
    return (*TINY[task_of(script)], "--threads", "1")


def command(script: str, *arguments, few_images: bool = False) -> list[str]:
    head = [sys.executable, "-c", FEW_IMAGES] if few_images else [sys.executable]
    return [*head, str(ROOT / f"{script}.py"), *map(str, arguments)]


def environment() -> dict:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "COV"))}
    return {**kept, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


@contextlib.contextmanager
def stopped_after(updates: int, number: int = signal.SIGINT):
    """Within this context a signal comes after so many steps of an optimizer, and stops the run."""
    count = itertools.count(1)

    def stepped(*_):
        if next(count) == updates:
            signal.raise_signal(number)

    hook = register_optimizer_step_post_hook(stepped)
    try:
        with pytest.raises(Stopped, match="stopped and saved; go on with") as stop:
            yield
        assert stop.value.status == 128 + number
    finally:
        hook.remove()


@pytest.fixture
def main(tmp_path, monkeypatch):
    """Run a script's main in this process, runs below tmp_path → its result and the folder of a new run.

    `stop_after`: it is stopped after so many updates, and has no result.
    """
    monkeypatch.chdir(tmp_path)

    def call(script, *arguments, stop_after=None, number=signal.SIGINT):
        place, result = tmp_path / "saves" / script, None
        before = set(place.glob("*"))
        with stopped_after(stop_after, number) if stop_after else contextlib.nullcontext():
            result = module_of(script).main([*map(str, arguments)])
        new = set(place.glob("*")) - before
        return result, new.pop() if new else None
    return call


@pytest.fixture
def few_images(monkeypatch):
    """24 training, 7 validation and 9 test images of 15 random pixels, in the place of MNIST."""
    generator = torch.Generator().manual_seed(0)
    images = [PixelSequences(torch.randint(0, 256, (count, 15), generator=generator, dtype=torch.uint8),
                             torch.randint(0, 10, (count,), generator=generator)) for count in (24, 7, 9)]
    for stair in ("nvar", "alpha", "expalpha"):
        monkeypatch.setattr(module_of(f"sMNIST_{stair}"), "load_mnist", lambda *given: images)
    return images


@pytest.fixture
def run_script(tmp_path):
    """Run a script to its end, from a folder that is not the project's → CompletedProcess."""
    def run(script, *arguments, few_images=False, timeout=120):
        return subprocess.run(command(script, *arguments, few_images=few_images), cwd=tmp_path, env=environment(),
                              capture_output=True, text=True, timeout=timeout, check=False)
    return run


@pytest.fixture
def start_script(tmp_path):
    """Start a script, wait for its first report → Popen that is still running."""
    running = []

    def start(script, *arguments, few_images=False, until="loss"):
        process = subprocess.Popen(command(script, *arguments, few_images=few_images), cwd=tmp_path,
                                   env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        running.append(process)
        for line in process.stdout:
            if until in line and "memoryless" not in line:
                return process
        raise AssertionError(f"no report: {process.stderr.read()}")

    yield start
    for process in running:
        process.kill()
        process.communicate()


def module_of(script: str):
    return importlib.import_module(script)


def plain(value):
    """A nest of dicts, lists and tensors without tensors, and without what the clock decides."""
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()
                if name not in ("seconds", "log_size", "run", "command", "commit")}
    if isinstance(value, (list, tuple)):
        return list(map(plain, value))
    return (value.dtype, value.tolist()) if torch.is_tensor(value) else value


def assert_same_run(found: Path, expected: Path) -> None:
    """Bit for bit: weights, optimizer, progress, generators, log and result."""
    for name in ("last.pt", "best.pt"):
        one, other = (plain(torch.load(folder / name, weights_only=True)) for folder in (found, expected))
        assert one == other
    for read in (records.log_rows, records.read_result):
        assert plain(read(found)) == plain(read(expected))


@pytest.fixture
def capture(monkeypatch, tmp_path, penn_folder):
    """Everything a script makes of its options, without the training: capture(script, *arguments)."""
    def made(script, *arguments, images=None):
        module, loop, found = module_of(script), LOOPS[task_of(script)], SimpleNamespace()

        def train(model, optimizer, *data_and_run, **named):
            found.model, found.optimizer, found.loop = model, optimizer, named
            *data, found.run = data_and_run
            found.data = data[0] if len(data) == 1 else data

        small = PixelSequences(torch.zeros(2, 784, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))
        monkeypatch.setattr(loop, "train", train)
        if task_of(script) == "sMNIST" and images is None:
            monkeypatch.setattr(module, "load_mnist", lambda *given: (small, small, small))
        given = [*tiny(script), "--save", tmp_path]
        if task_of(script) == "language":
            given += ["--data", penn_folder]
        module.main([*given, *arguments])
        monkeypatch.undo()
        return found
    return made
