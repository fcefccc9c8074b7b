"""Data: copying sequences drawn on the spot, MNIST as pixel sequences, Penn Treebank characters.

Files lie in one folder, the data folder beside the scripts unless --data names another:

    MNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte       fetched by torchvision
    pennchar/{train,valid,test}.txt                              fetched from Mikolov's simple-examples.tgz

A file that is missing is downloaded into a temporary folder, checked by its digest, and only then moved to
its place.
"""

import hashlib
import math
import os
import tarfile
import tempfile
import urllib.request
import zlib
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch

from common.cli import UserError

DATA_FOLDER = Path(__file__).resolve().parent.parent / "data"


# ── copying memory ───────────────────────────────────────────────────────────────────────────────────────


class CopyingTask:
    """Copying memory (Hochreiter and Schmidhuber 1997; as in Arjovsky et al. 2016, section 5.1).

        input    c symbols of 1 … labels,  T−1 blanks (0),  the marker (labels + 1),  c blanks
        target   T + c blanks,  the c symbols
    """

    def __init__(self, T: int = 200, labels: int = 8, c_length: int = 10, vari: bool = False, seed: int = 0):
        self.T, self.labels, self.c_length, self.vari = T, labels, c_length, vari
        self.generator = torch.Generator().manual_seed(seed)

    @property
    def steps(self) -> int:
        """Length of the longest sequence, T + 2c."""
        return self.T + 2 * self.c_length

    @property
    def input_symbols(self) -> int:
        """Different symbols in the input: blank, labels, marker."""
        return self.labels + 2

    @property
    def classes(self) -> int:
        """Different symbols in the target: blank and labels."""
        return self.labels + 1

    def memoryless_loss(self) -> float:
        """Cross entropy of a model that knows the task and guesses the symbols: c ln(labels) / (T + 2c)."""
        c, delays = self.c_length, range(1, self.T + 1) if self.vari else (self.T,)
        return sum(c * math.log(self.labels) / (delay + 2 * c) for delay in delays) / len(delays)

    def batch(self, size: int, device=None) -> tuple[torch.Tensor, torch.Tensor]:
        """A fresh batch: input symbols and target classes, both (T + 2c, size) int64."""
        c, delay = self.c_length, self.T
        if self.vari:
            delay = int(torch.randint(1, self.T + 1, (), generator=self.generator))
        symbols = torch.randint(1, self.labels + 1, (c, size), generator=self.generator)
        x = torch.zeros(delay + 2 * c, size, dtype=torch.int64)
        target = torch.zeros_like(x)
        x[:c] = symbols
        x[c + delay - 1] = self.labels + 1
        target[-c:] = symbols
        return x.to(device, non_blocking=True), target.to(device, non_blocking=True)

    def state_dict(self) -> dict:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        self.generator.set_state(state["generator"].cpu())


# ── MNIST ────────────────────────────────────────────────────────────────────────────────────────────────

MNIST_FILES = {"train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
               "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")}
MNIST_SIZES = {"train": 60_000, "test": 10_000}


@dataclass
class PixelSequences:
    """Images as sequences: pixels (N, 784) uint8 in the order in which they are shown, labels (N,) int64."""

    pixels: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device) -> "PixelSequences":
        return PixelSequences(self.pixels.to(device), self.labels.to(device))

    def batch(self, start: int, size: int, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        """Images start … start + size − 1 → x (784, B, 1) in [0, 1], labels (B,)."""
        x = self.pixels[start:start + size].t().to(dtype) / 255
        return x.unsqueeze(-1), self.labels[start:start + size]


def mnist_order_and_split() -> tuple[np.ndarray, np.ndarray]:
    """The pixel order (784,) of --permute, and the order (60000,) whose first 50,000 images are for training.

    Both come from one generator that --random-seed does not touch, so every run sees the same task.
    """
    generator = np.random.RandomState(1234)
    return generator.permutation(784), generator.permutation(60_000)


def load_mnist(folder: Path | None = None, permute: bool = False, download: bool = True):
    """MNIST pixel by pixel → `PixelSequences` of 50,000 train, 10,000 validation and 10,000 test images.

    Raises UserError when a file is missing and cannot be fetched, or is not what it should be.
    """
    folder = Path(folder or DATA_FOLDER)
    raw = folder / "MNIST" / "raw"
    missing = [name for names in MNIST_FILES.values() for name in names if not (raw / name).exists()]
    if missing:
        if not download:
            raise _missing(missing, raw, "https://ossci-datasets.s3.amazonaws.com/mnist/")
        _download_mnist(raw, missing)
    images, labels = _read_mnist(folder, "train")
    test_images, test_labels = _read_mnist(folder, "test")
    order, split = mnist_order_and_split()
    order = torch.from_numpy(order) if permute else torch.arange(784)
    train, valid = torch.from_numpy(split).split((50_000, 10_000))
    return (PixelSequences(images[train][:, order], labels[train]),
            PixelSequences(images[valid][:, order], labels[valid]),
            PixelSequences(test_images[:, order].contiguous(), test_labels))


def import_torchvision_datasets():
    """torchvision.datasets, also where torchvision was built for another torch than the one installed.

    Its wheel for Linux expects a torch with CUDA; beside a CPU-only one its import stops because the operators
    `nms` and `qnms`, which no data set needs, were never declared. Declaring their schemas lets it go on.
    """
    try:
        from torchvision import datasets
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        from torchvision import datasets
    return datasets


def _read_mnist(folder: Path, part: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 784) uint8 and labels (N,) of a part, through torchvision, checked for size."""
    datasets = import_torchvision_datasets()
    count = MNIST_SIZES[part]
    try:
        dataset = datasets.MNIST(str(folder), train=part == "train", download=False)
        images, labels = dataset.data, dataset.targets
        whole = images.shape == (count, 28, 28) and labels.shape == (count,) and 0 <= labels.min() <= labels.max() <= 9
    except (OSError, ValueError, RuntimeError, AssertionError, TypeError, KeyError):
        whole = False
    if not whole:
        raise UserError(f"{' or '.join(MNIST_FILES[part])} in {folder / 'MNIST' / 'raw'} is not MNIST's {part} file of "
                        f"{count:,} examples; delete it and run again to fetch it", 1)
    return images.reshape(count, 784), labels


def _download_mnist(raw: Path, missing: list[str]) -> None:
    """Fetch the four files through torchvision, which checks their digests, and move them to `raw`."""
    datasets = import_torchvision_datasets()
    with _download_folder(raw, missing) as temporary:
        try:
            datasets.MNIST(temporary, train=True, download=True)
        except (OSError, RuntimeError, ValueError, EOFError) as error:
            raise _missing(missing, raw, "https://ossci-datasets.s3.amazonaws.com/mnist/", error) from None
        for name in missing:
            os.replace(Path(temporary) / "MNIST" / "raw" / name, raw / name)


# ── Penn Treebank characters ─────────────────────────────────────────────────────────────────────────────

PENN_URL = "http://www.fit.vutbr.cz/~imikolov/rnnlm/simple-examples.tgz"
PENN_MEMBER = "simple-examples/data/ptb.char.{part}.txt"
PENN_DIGESTS = {
    "train": "e313d91425e06c4f0a8fb6e881dcce0c291f2a0e9f4dda54833069b122f91da9",
    "valid": "21661f63ec355085879458b6524644d4add5573541b4be14fb52ab2e2e995eb8",
    "test": "1ef5607ac3c463b16e38bfe7900dd3bfc91de5a96e0f21e7eab5188b465b8ebe",
}


@dataclass
class Characters:
    """A corpus as numbers: three vectors (N,) int64 and the symbol of each number."""

    train: torch.Tensor
    valid: torch.Tensor
    test: torch.Tensor
    vocabulary: list[str]


def load_penn_characters(folder: Path | None = None, download: bool = True, url: str = PENN_URL,
                         digests: dict | None = None) -> Characters:
    """The character files of a folder (pennchar/{train,valid,test}.txt): symbols separated by blanks.

    Every line ends in <eos>; symbols are numbered in the order in which train.txt brings them. Raises
    UserError for files that are missing and cannot be fetched, are empty, are no text, or hold a symbol that
    train.txt does not.
    """
    penn = Path(folder or DATA_FOLDER) / "pennchar"
    missing = [f"{part}.txt" for part in PENN_DIGESTS if not (penn / f"{part}.txt").exists()]
    if missing:
        if not download:
            raise _missing(missing, penn, url)
        _download_penn(penn, missing, url, digests or PENN_DIGESTS)

    numbers, vocabulary = {}, []
    for part in PENN_DIGESTS:
        path = penn / f"{part}.txt"
        symbols = _read_symbols(path)
        if part == "train":
            vocabulary = list(dict.fromkeys(symbols))
            number_of = {symbol: number for number, symbol in enumerate(vocabulary)}
        try:
            numbers[part] = torch.tensor(np.fromiter(map(number_of.__getitem__, symbols), np.int64, len(symbols)))
        except KeyError as error:
            raise UserError(f"{path} holds the symbol {error.args[0]!r}, which train.txt never shows; "
                            "the three files must come from one corpus", 1) from None
    return Characters(numbers["train"], numbers["valid"], numbers["test"], vocabulary)


def _read_symbols(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})", 1) from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; it should hold characters separated by blanks", 1) from None
    if "\0" in text:
        raise UserError(f"{path} is a binary file; it should hold characters separated by blanks", 1)
    lines = text.removesuffix("\n").split("\n")
    symbols = [*" <eos> ".join(lines).split(), "<eos>"]
    if len(symbols) == len(lines):
        raise UserError(f"{path} is empty; it should hold characters separated by blanks", 1)
    return symbols


def _download_penn(penn: Path, missing: list[str], url: str, digests: dict) -> None:
    """Fetch the archive and move the missing members, checked, to `penn`. Nothing else is unpacked."""
    with _download_folder(penn, missing) as temporary:
        archive = Path(temporary) / "archive.tgz"
        try:
            with urllib.request.urlopen(url, timeout=60) as response, open(archive, "wb") as file:
                while block := response.read(1 << 20):
                    file.write(block)
            with tarfile.open(archive, "r:gz") as tar:
                for name in missing:
                    part = name.removesuffix(".txt")
                    content = _member(tar, PENN_MEMBER.format(part=part))
                    if hashlib.sha256(content).hexdigest() != digests[part]:
                        raise UserError(f"{name} from {url} has a wrong sha256, so it was thrown away; "
                                        f"fetch it by hand and put it into {penn}", 1)
                    (Path(temporary) / name).write_bytes(content)
        except (OSError, EOFError, KeyError, tarfile.TarError, zlib.error, HTTPException) as error:
            raise _missing(missing, penn, url, error) from None
        for name in missing:
            os.replace(Path(temporary) / name, penn / name)


def _member(tar: tarfile.TarFile, name: str, limit: int = 1 << 26) -> bytes:
    """The content of one regular file of an archive, at most `limit` bytes. Raises KeyError if there is none."""
    for candidate in (name, f"./{name}"):
        try:
            member = tar.getmember(candidate)
        except KeyError:
            continue
        if member.isfile() and member.size <= limit:
            return tar.extractfile(member).read(limit)
    raise KeyError(f"no {name} in the archive")


# ── what the downloads share ─────────────────────────────────────────────────────────────────────────────


def _download_folder(target: Path, missing: list[str]) -> tempfile.TemporaryDirectory:
    """A temporary folder beside `target`, on its disk, so that a finished file can be renamed into place."""
    print(f"{', '.join(missing)} not found in {target}; downloading", flush=True)
    try:
        target.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(dir=target, prefix=".download-")
    except OSError as error:
        raise UserError(f"{', '.join(missing)} not found in {target}, and nothing can be written there "
                        f"({error.strerror}); name another folder with --data", 1) from None


def _missing(missing: list[str], where: Path, url: str, error: Exception | None = None) -> UserError:
    reason = ""
    if error is not None:
        reason = f" The download failed ({(str(error).splitlines() or [type(error).__name__])[0][:80]})."
    return UserError(f"{', '.join(missing)} not found in {where}.{reason} Get the files from {url} and put them "
                     "there, or name the folder that holds them with --data", 1)
