"""Data from files: MNIST as pixel sequences, characters of a text.

Files lie in one folder, the data folder beside the scripts unless --data names another:

    MNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte       plain or .gz; fetched by torchvision
    pennchar/{train,valid,test}.txt                              fetched from Mikolov's simple-examples.tgz

`load_text` reads any other text. Data from files carries its `Source`: a run records the digest and is resumed with
the same data only.
"""

import gzip
import hashlib
import math
import os
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from common.download import fetch, get_members, get_mnist, missing_files
from common.errors import UserError

DATA_FOLDER = Path(__file__).resolve().parent.parent / "data"


# ── where data came from ─────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Source:
    """Where the data of a run came from, and what it is.

    path        what --data or --text named, absolute
    digest      sha256 of a file's bytes (unpacked); of several files, of the lines that `sha256sum` prints for them
    official    whether every file is the published one
    note        lines for people, empty where there is nothing to say
    vocabulary  of a text: the symbol of each number
    """

    path: Path
    digest: str
    official: bool
    note: str = ""
    vocabulary: tuple[str, ...] = ()

    def identity(self) -> dict:
        """What result.json of a run keeps."""
        return {"digest": self.digest, "official": self.official}

    def record(self) -> dict:
        """What config.json of a run keeps, enough to find the data again and to map numbers to symbols."""
        vocabulary = {"vocabulary": list(self.vocabulary)} if self.vocabulary else {}
        return {**self.identity(), "path": str(self.path), **vocabulary}

    def compare(self, record) -> str:
        """A line for people about the record that a run was started with, empty where it is the same data.

        Raises UserError when the run was started on other data, or the record is damaged.
        """
        if record is None:
            return ("this run was started by a version that kept no digest of its data; it goes on with the data in "
                    f"{self.path}")
        digest = record.get("digest") if isinstance(record, dict) else None
        if not isinstance(digest, str):
            raise UserError(f"what config.json says of the data is damaged ({str(record)[:40]!r}); restore it from a "
                            "copy or start a new run", 1)
        if digest != self.digest:
            raise UserError(f"this run was started on other data than {self.path} holds (sha256 {digest[:12]}…, now "
                            f"{self.digest[:12]}…); name the place of the same data or start a new run", 1)
        return ""


def digest_of(contents: dict[str, str]) -> str:
    """One digest of several files {name: sha256}: that of the lines that `sha256sum` prints for them in this order."""
    return hashlib.sha256("".join(f"{digest}  {name}\n" for name, digest in contents.items()).encode()).hexdigest()


def _folder(named: Path | None, home: str, advice: str = "") -> Path:
    """The data folder as an absolute path. Raises UserError for a file; `home` is what the folder should hold."""
    folder = Path(named or DATA_FOLDER).absolute()
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise UserError(f"{folder} is not a folder; name the folder that holds {home} with --data{advice}", 1)
    return folder


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


# ── MNIST ────────────────────────────────────────────────────────────────────────────────────────────────

MNIST_FILES = {"train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
               "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")}
MNIST_SIZES = {"train": 60_000, "test": 10_000}
MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
MNIST_DIGESTS = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


@dataclass
class PixelSequences:
    """Images as sequences: pixels (N, 784) uint8 in the order in which they are shown, labels (N,) int64."""

    pixels: torch.Tensor
    labels: torch.Tensor
    source: Source | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device) -> "PixelSequences":
        return replace(self, pixels=self.pixels.to(device), labels=self.labels.to(device))

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


def load_mnist(folder: Path | None = None, permute: bool = False, download: bool = True) -> tuple[PixelSequences, ...]:
    """MNIST pixel by pixel → `PixelSequences` of 50,000 train, 10,000 validation and 10,000 test images.

    Raises UserError when a file is missing and cannot be fetched, or is not what it should be.
    """
    folder = _folder(folder, "MNIST/raw/train-images-idx3-ubyte")
    raw = folder / "MNIST" / "raw"
    missing = [name for name in MNIST_DIGESTS if not os.path.exists(_plain_or_gz(raw, name))]
    if missing:
        found = _found_instead(folder, Path("MNIST", "raw"), missing, ("raw", "MNIST"), OTHER_MNIST)
        if not download:
            raise missing_files(missing, raw, MNIST_URL, found)
        fetch(raw, {name: MNIST_DIGESTS[name] for name in missing}, MNIST_URL, get_mnist, found)
    (images, labels), (test_images, test_labels), digests = _read_mnist(raw)
    wrong = [name for name, digest in digests.items() if digest != MNIST_DIGESTS[name]]
    source = Source(folder, digest_of(digests), not wrong, _unofficial("MNIST", wrong, raw))
    order, split = mnist_order_and_split()
    order = torch.from_numpy(order) if permute else torch.arange(784)
    train, valid = torch.from_numpy(split).split((50_000, 10_000))
    return (PixelSequences(images[train][:, order], labels[train], source),
            PixelSequences(images[valid][:, order], labels[valid], source),
            PixelSequences(test_images[:, order].contiguous(), test_labels, source))


def _plain_or_gz(raw: Path, name: str) -> Path:
    """Where a file of MNIST lies: unpacked, or packed as the mirrors serve it."""
    packed = raw / f"{name}.gz"
    return packed if os.path.exists(packed) and not os.path.exists(raw / name) else raw / name


def _read_mnist(raw: Path) -> tuple:
    """→ (images (N, 784) uint8, labels (N,) int64) of both parts and {file: sha256}. Raises UserError."""
    parts, digests = [], {}
    for part, names in MNIST_FILES.items():
        count, tensors = MNIST_SIZES[part], []
        for name, shape in zip(names, ((count, 28, 28), (count,)), strict=True):
            path = _plain_or_gz(raw, name)
            try:
                values, digests[name] = _read_idx(path, *shape)
                if name == names[1] and values.max() > 9:
                    raise ValueError(f"a label is {values.max()}")
            except (ValueError, EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise UserError(f"{path} is not MNIST's {part} file of {count:,} examples ({error}); delete it "
                                "and run again to fetch it", 1) from None
            except OSError as error:
                raise UserError(f"{path} cannot be read ({error.strerror}); name another folder with --data", 1) \
                    from None
            tensors.append(values)
        parts.append((tensors[0].view(count, 784), tensors[1].long()))
    return *parts, digests


def _read_idx(path: Path, *shape: int) -> tuple[torch.Tensor, str]:
    """An idx file of unsigned bytes → its values and its sha256. Its bytes may be packed by gzip.

    It holds 0, 0, 8, the number of dimensions, their sizes as big-endian int32, the values. Raises ValueError for
    any other file, and reads no more bytes than a right file has.
    """
    header = bytes((0, 0, 8, len(shape))) + b"".join(size.to_bytes(4, "big") for size in shape)
    size = len(header) + math.prod(shape)
    if not path.is_file():  # a pipe or a device would be read for ever
        raise ValueError("it is not a file")
    with open(path, "rb") as file:
        content = file.read(size + 1)
        if content[:2] == b"\x1f\x8b":
            file.seek(0)
            with gzip.GzipFile(fileobj=file) as unpacked:
                content = unpacked.read(size + 1)
    if len(content) != size:
        has = f"more than {size:,}" if len(content) > size else f"{len(content):,}"
        raise ValueError(f"it has {has} bytes in the place of {size:,}")
    if not content.startswith(header):
        raise ValueError(f"its header is not that of {' × '.join(map(str, shape))} bytes")
    values = torch.frombuffer(bytearray(content[len(header):]), dtype=torch.uint8).view(shape)
    return values, hashlib.sha256(content).hexdigest()


# ── texts ────────────────────────────────────────────────────────────────────────────────────────────────

PENN_URL = "http://www.fit.vutbr.cz/~imikolov/rnnlm/simple-examples.tgz"
PENN_MEMBER = "simple-examples/data/ptb.char.{part}.txt"
PENN_DIGESTS = {
    "train": "e313d91425e06c4f0a8fb6e881dcce0c291f2a0e9f4dda54833069b122f91da9",
    "valid": "21661f63ec355085879458b6524644d4add5573541b4be14fb52ab2e2e995eb8",
    "test": "1ef5607ac3c463b16e38bfe7900dd3bfc91de5a96e0f21e7eab5188b465b8ebe",
}
END_OF_LINE = "<eos>"
MARKER = re.compile(r"<[^<>]+>")  # <eos>, <unk> and the like count as one character


@dataclass
class Characters:
    """A corpus as numbers: three vectors (N,) int64 and the symbol of each number."""

    train: torch.Tensor
    valid: torch.Tensor
    test: torch.Tensor
    vocabulary: list[str]
    source: Source | None = None

    @property
    def unit(self) -> str:
        """What is counted: "character", or "symbol" where a symbol is longer."""
        return "symbol" if _long_symbol(self.vocabulary) else "character"


def load_characters(folder: Path | None = None, text: Path | None = None) -> Characters:
    """The text file `text` if there is one, else the character files of the data folder."""
    return load_penn_characters(folder) if text is None else load_text(text)


def load_penn_characters(folder: Path | None = None, download: bool = True, url: str = PENN_URL,
                         digests: dict | None = None) -> Characters:
    """The character files of a folder (pennchar/{train,valid,test}.txt): symbols separated by blanks.

    A line ends in <eos>; symbols are numbered in the order in which train.txt brings them. Raises UserError for
    files that are missing and cannot be fetched, are empty, are no text, or hold a symbol that train.txt does not.
    """
    folder = _folder(folder, "pennchar/train.txt", ", or a text of your own with --text")
    penn = folder / "pennchar"
    names = {part: f"{part}.txt" for part in PENN_DIGESTS}
    missing = [part for part, name in names.items() if not os.path.exists(penn / name)]
    if missing:
        found = _found_instead(folder, Path("pennchar"), [names[part] for part in missing],
                               ("simple-examples", "simple-examples/data", "data"), OTHER_PENN)
        if not download:
            raise missing_files([names[part] for part in missing], penn, url, found)
        members = {names[part]: PENN_MEMBER.format(part=part) for part in missing}
        fetch(penn, {names[part]: (digests or PENN_DIGESTS)[part] for part in missing}, url,
              lambda temporary: get_members(temporary, url, members), found)

    symbols, contents = {}, {}
    for part, name in names.items():
        symbols[part], contents[name] = _read_symbols(penn / name)
    vocabulary = list(dict.fromkeys(symbols["train"]))
    numbers = {}
    for part, name in names.items():
        try:
            numbers[part] = numbers_of(symbols.pop(part), vocabulary)
        except KeyError as error:
            raise UserError(f"{penn / name} holds the symbol {error.args[0][:40]!r}, which train.txt never shows; "
                            "the three files must come from one corpus", 1) from None
    wrong = [name for part, name in names.items() if contents[name] != PENN_DIGESTS[part]]
    note = _unofficial("Penn Treebank", wrong, penn)
    if (long := _long_symbol(vocabulary)) is not None:
        note += f"\nits symbols are longer than a character ({long[:20]!r}): the run counts symbols and prints " \
                "bits per symbol; --text FILE reads a text by characters"
    source = Source(folder, digest_of(contents), not wrong, note, tuple(vocabulary))
    return Characters(**numbers, vocabulary=vocabulary, source=source)


def load_text(path: Path) -> Characters:
    """A UTF-8 text by characters, line ends included: 90 % to train on, then 5 % to validate and 5 % to test.

    Symbols are numbered in the order of Unicode. Raises UserError for a file that cannot be read, is no text or empty.
    """
    text, digest = _read_text(path, "--text")
    if not text:
        raise UserError(f"{path} is empty; name another file with --text", 1)
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    shown = np.zeros(0x110000, np.bool_)  # a place for each character that Unicode can have
    shown[codes] = True
    numbers = torch.from_numpy((np.cumsum(shown, dtype=np.int64) - 1)[codes])
    vocabulary = [chr(code) for code in np.flatnonzero(shown)]
    cuts = [len(text) * 90 // 100, len(text) * 95 // 100]
    train, valid, test = numbers.tensor_split(cuts)
    note = f"{path}: {len(text):,} characters, {len(vocabulary):,} different; {len(train):,} to train on, " \
           f"{len(valid):,} to validate, {len(test):,} to test"
    return Characters(train, valid, test, vocabulary,
                      Source(Path(path).absolute(), digest, False, note, tuple(vocabulary)))


def numbers_of(symbols: Iterable[str], vocabulary: Iterable[str]) -> torch.Tensor:
    """Symbols → their numbers (N,) int64. Raises KeyError for a symbol that is not in the vocabulary."""
    number_of = {symbol: number for number, symbol in enumerate(vocabulary)}
    return torch.from_numpy(np.fromiter(map(number_of.__getitem__, symbols), np.int64))


def text_of(numbers: Iterable[int], vocabulary: list[str]) -> str:
    """Numbers → a text to be read: <eos> ends a line, symbols longer than a character stand apart."""
    separator = "" if _long_symbol(vocabulary) is None else " "
    return separator.join("\n" if vocabulary[k] == END_OF_LINE else vocabulary[k] for k in map(int, numbers))


def vocabulary_in(record) -> list[str]:
    """The vocabulary in a record of `Source.record`, as config.json keeps it. Raises UserError where there is none."""
    vocabulary = record.get("vocabulary") if isinstance(record, dict) else None
    if not isinstance(vocabulary, list) or not vocabulary or not all(isinstance(symbol, str) for symbol in vocabulary):
        raise UserError("config.json of this run holds no vocabulary: it is damaged or older, or of another task", 1)
    return vocabulary


def _long_symbol(vocabulary: Iterable[str]) -> str | None:
    """The first symbol longer than a character, markers such as <unk> left out."""
    return next((symbol for symbol in vocabulary if len(symbol) > 1 and not MARKER.fullmatch(symbol)), None)


def _read_text(path: Path, flag: str) -> tuple[str, str]:
    """A UTF-8 file → its text and the sha256 of its bytes. A byte-order mark is dropped; CR LF and CR are line ends."""
    if not os.path.isfile(path):  # a pipe or a device would be read for ever
        what = "is not a file" if os.path.exists(path) else "does not exist"
        raise UserError(f"{path} {what}; name another with {flag}", 1)
    try:
        content = Path(path).read_bytes()
        text = content.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); name another with {flag}", 1) from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8 or name another with {flag}", 1) from None
    if "\0" in text:
        raise UserError(f"{path} is a binary file; name a text with {flag}", 1)
    return text, hashlib.sha256(content).hexdigest()


def _read_symbols(path: Path) -> tuple[list[str], str]:
    """A file of symbols that blanks and tabs separate → symbols, with <eos> at the end of each line, and its sha256.

    Every other character, a no-break space or a form feed too, is a symbol.
    """
    text, digest = _read_text(path, "--data")
    lines = text.removesuffix("\n").split("\n")
    symbols = f" {END_OF_LINE} ".join([*lines, ""]).replace("\t", " ").split(" ")
    symbols = [symbol for symbol in symbols if symbol]
    if len(symbols) == len(lines):
        raise UserError(f"{path} is empty; it should hold characters separated by blanks", 1)
    return symbols, digest


# ── files that are missing or wrong ──────────────────────────────────────────────────────────────────────────

OTHER_MNIST = re.compile(r"mnist.*\.(csv|npz|parquet|pkl|gz|zip|pt|mat|arff)$", re.IGNORECASE)
OTHER_PENN = re.compile(r"^ptb\.|simple-examples", re.IGNORECASE)


def _unofficial(corpus: str, wrong: list[str], place: Path) -> str:
    return f"{', '.join(wrong)} in {place}: not the official {corpus}; the result says so" if wrong else ""


def _found_instead(folder: Path, home: Path, missing: list[str], places: tuple[str, ...], other: re.Pattern) -> str:
    """The files `other`, of a form that is not read here, in a data folder whose `home` lacks the files `missing`.

    Raises UserError where the missing files lie in another place or have another name, so that nothing is fetched.
    """
    listed = [path for place in (folder, folder / home, *(folder / name for name in places)) for path in _listed(place)]
    there = [path for path in listed if _usual_name(path) in missing][:4]
    if there:
        place, names = there[0].parent, ", ".join(path.name for path in there)
        if folder.parts[-len(home.parts):] == home.parts and place == folder:
            advice = f"name {Path(*folder.parts[:-len(home.parts)])} with --data"
        else:
            usual = ", ".join(map(_usual_name, there))
            advice = f"put them into {folder / home}" + (f" as {usual}" if usual != names.replace(".gz", "") else "")
        raise UserError(f"{', '.join(missing)} not found in {folder / home}, but {place} holds {names}; {advice}", 1)
    others = [str(path.relative_to(folder)) for path in listed if other.search(path.name)][:3]
    return f" ({', '.join(others)} is of a form that is not read here)" if others else ""


def _usual_name(path: Path) -> str:
    """The name under which a file of MNIST or the Penn Treebank is read here, from another spelling of it."""
    return path.name.lower().removesuffix(".gz").replace(".idx", "-idx").removeprefix("ptb.char.")
