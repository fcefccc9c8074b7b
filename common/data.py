"""Data: copying sequences drawn on the spot, MNIST as pixel sequences, Penn Treebank characters.

Files lie in one folder, the data folder beside the scripts unless --data names another:

    MNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte       fetched by torchvision
    pennchar/{train,valid,test}.txt                              fetched from Mikolov's simple-examples.tgz

A file that is missing is downloaded into a temporary folder, checked by its digest, and only then moved to
its place.
"""

import gzip
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

from common.errors import UserError

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
        # One copy to a GPU, from page-locked memory: from any other the host would wait for it.
        pinned = device is not None and torch.device(device).type == "cuda"
        x, target = both = torch.zeros(2, delay + 2 * c, size, dtype=torch.int64, pin_memory=pinned)
        x[:c] = symbols
        x[c + delay - 1] = self.labels + 1
        target[-c:] = symbols
        x, target = both.to(device, non_blocking=True)
        return x, target

    def state_dict(self) -> dict:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        self.generator.set_state(state["generator"].cpu())


# ── MNIST ────────────────────────────────────────────────────────────────────────────────────────────────

MNIST_FILES = {"train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
               "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")}
MNIST_SIZES = {"train": 60_000, "test": 10_000}
MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"


@dataclass
class PixelSequences:
    """Images as sequences: pixels (N, 784) uint8 in the order in which they are shown, labels (N,) int64."""

    pixels: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device) -> "PixelSequences":
        return PixelSequences(self.pixels.to(device), self.labels.to(device))

    def batch(self, start: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Images start … start + size − 1 → x (784, B, 1) in [0, 1] in the default dtype, labels (B,)."""
        x = self.pixels[start:start + size].t().to(torch.get_default_dtype()) / 255
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
    missing = [name for names in MNIST_FILES.values() for name in names if not os.path.exists(raw / name)]
    if missing:
        if not download:
            raise _missing(missing, raw, MNIST_URL)
        _download_mnist(raw, missing)
    images, labels = _read_mnist(raw, "train")
    test_images, test_labels = _read_mnist(raw, "test")
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


def _read_mnist(raw: Path, part: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 784) uint8 and labels (N,) int64 of a part. Raises UserError for files that are not MNIST's."""
    count, names = MNIST_SIZES[part], MNIST_FILES[part]
    try:
        images, labels = _read_idx(raw / names[0], count, 28, 28), _read_idx(raw / names[1], count)
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}); name another folder with --data", 1) \
            from None
    except ValueError:
        labels = None
    if labels is None or labels.max() > 9:
        raise UserError(f"{' or '.join(names)} in {raw} is not MNIST's {part} file of {count:,} examples; delete it "
                        "and run again to fetch it", 1)
    return images.view(count, 784), labels.long()


def _read_idx(path: Path, *shape: int) -> torch.Tensor:
    """An idx file of unsigned bytes: 0, 0, 8, dimensions, their sizes as big-endian int32, the values.

    Raises ValueError for any other, whose size is looked at before anything is read.
    """
    header = bytes((0, 0, 8, len(shape))) + b"".join(size.to_bytes(4, "big") for size in shape)
    size = len(header) + math.prod(shape)
    if os.stat(path).st_size != size:
        raise ValueError(f"{path} is no idx file of {shape}")
    with open(path, "rb") as file:
        if file.read(len(header)) != header:
            raise ValueError(f"{path} is no idx file of {shape}")
        return torch.frombuffer(bytearray(file.read()), dtype=torch.uint8).view(shape)


def _download_mnist(raw: Path, missing: list[str]) -> None:
    """Fetch the four files through torchvision, which checks their digests, and move them to `raw`."""
    with _download_folder(raw, missing) as temporary:
        try:
            import_torchvision_datasets().MNIST(temporary, train=True, download=True)
            for name in missing:
                os.replace(Path(temporary) / "MNIST" / "raw" / name, raw / name)
        except (ImportError, OSError, RuntimeError, ValueError, EOFError, HTTPException) as error:
            raise _missing(missing, raw, MNIST_URL, error) from None


# ── Penn Treebank characters ─────────────────────────────────────────────────────────────────────────────

PENN_URL = "http://www.fit.vutbr.cz/~imikolov/rnnlm/simple-examples.tgz"
PENN_MEMBER = "simple-examples/data/ptb.char.{part}.txt"
PENN_DIGESTS = {
    "train": "e313d91425e06c4f0a8fb6e881dcce0c291f2a0e9f4dda54833069b122f91da9",
    "valid": "21661f63ec355085879458b6524644d4add5573541b4be14fb52ab2e2e995eb8",
    "test": "1ef5607ac3c463b16e38bfe7900dd3bfc91de5a96e0f21e7eab5188b465b8ebe",
}


# In bytes. The archive has 34 million, its largest wanted member 10 million; what grows beyond these is a trap.
ARCHIVE_LIMIT, UNPACKED_LIMIT, MEMBER_LIMIT = 1 << 28, 1 << 29, 1 << 26


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
    missing = [f"{part}.txt" for part in PENN_DIGESTS if not os.path.exists(penn / f"{part}.txt")]
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
            raise UserError(f"{path} holds the symbol {error.args[0][:40]!r}, which train.txt never shows; "
                            "the three files must come from one corpus", 1) from None
    return Characters(numbers["train"], numbers["valid"], numbers["test"], vocabulary)


def _read_symbols(path: Path) -> list[str]:
    if not path.is_file():  # a pipe or a device would be read for ever
        raise UserError(f"{path} is not a file; name another folder with --data", 1)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); name another folder with --data", 1) from None
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
                    if file.tell() > ARCHIVE_LIMIT:
                        raise ValueError(f"the archive is larger than {ARCHIVE_LIMIT:,} bytes")
                    file.write(block)
            contents = _members(archive, [PENN_MEMBER.format(part=name.removesuffix(".txt")) for name in missing])
            for name, content in zip(missing, contents, strict=True):
                if hashlib.sha256(content).hexdigest() != digests[name.removesuffix(".txt")]:
                    raise UserError(f"{name} from {url} has a wrong sha256, so it was thrown away; "
                                    f"fetch it by hand and put it into {penn}", 1)
                (Path(temporary) / name).write_bytes(content)
            for name in missing:
                os.replace(Path(temporary) / name, penn / name)
        except (OSError, EOFError, ValueError, LookupError, tarfile.TarError, zlib.error, HTTPException) as error:
            raise _missing(missing, penn, url, error) from None


class _Bounded:
    """A file that is read from front to back and refuses to yield more than `limit` bytes, whatever it claims."""

    def __init__(self, file, limit: int):
        self.file, self.left = file, limit

    def read(self, size: int) -> bytes:
        block = self.file.read(size)
        self.left -= len(block)
        if self.left < 0:
            raise ValueError("the archive holds more than it should")
        return block


def _members(archive: Path, names: list[str]) -> list[bytes]:
    """The contents of regular files of a .tgz. Raises LookupError where one is not there or is too large."""
    found = {}
    with gzip.open(archive) as unpacked, tarfile.open(fileobj=_Bounded(unpacked, UNPACKED_LIMIT), mode="r|") as tar:
        for member in tar:
            if member.size > UNPACKED_LIMIT:  # to skip it would take as long as it claims to be
                raise ValueError(f"{member.name[:40]} in the archive claims to have {member.size:,} bytes")
            name = member.name.removeprefix("./")
            if name in names and member.isfile() and member.size <= MEMBER_LIMIT:
                found[name] = tar.extractfile(member).read()
            if len(found) == len(names):
                break
    for name in names:
        if name not in found:
            raise LookupError(f"no {name} in the archive")
    return [found[name] for name in names]


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


def load_characters(folder: Path | None = None, text: Path | None = None) -> Characters:
    """The characters of the Penn Treebank."""
    return load_penn_characters(folder)
