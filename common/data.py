"""Data from files: MNIST and its relatives as pixel sequences, characters of a text.

Files lie in one folder, the data folder beside the scripts unless --data names another:

    MNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte       MNIST is fetched by torchvision
    pennchar/{train,valid,test}.txt                              fetched from Mikolov's simple-examples.tgz

Any idx data set of 28 × 28 images may lie there under MNIST's names. `load_text` reads any other text. Files may be
packed by gzip. Data carry their `source`, which a run keeps in config.json; it is resumed with the same digest only:

    digest                  sha256 of a text's bytes, unpacked; of several files, of what `sha256sum` prints for them
    official                whether every file is the published one
    path                    what --data or --text named, absolute
    vocabulary or classes   what the model must fit: the symbol of each number, or how many labels there are
"""

import gzip
import hashlib
import os
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from common.download import get_members, get_mnist, provide
from common.errors import UserError, printable

DATA_FOLDER = Path(__file__).resolve().parent.parent / "data"


def read_set(name: str, folder: Path | None, home: str, published: dict, url: str, get, parse) -> tuple[list, dict]:
    """The parsed files of a data set, in `home` of a data folder, and their source. `published`: {file: sha256}."""
    folder = Path(folder or DATA_FOLDER).absolute()
    place = provide(folder, home, published, url, get)
    contents, digests = [], {}
    for file in published:
        content, digests[file] = read_file(place / file, parse)
        contents.append(content)
    if other := [file for file in published if digests[file] != published[file]]:
        print(printable(f"{', '.join(other)} in {place}: not the official {name}; the result says so"), flush=True)
    lines = "".join(f"{digest}  {file}\n" for file, digest in digests.items())
    digest = hashlib.sha256(lines.encode()).hexdigest()
    return contents, {"digest": digest, "official": not other, "path": str(folder)}


def read_file(path: Path, parse, flag: str = "--data") -> tuple:
    """What `parse` makes of the bytes of a file, or of FILE.gz in its place, and their sha256, unpacked where packed.

    Raises UserError for what cannot be read; `flag` names the flag that chooses another.
    """
    try:
        packed = path.with_name(f"{path.name}.gz")
        content = (packed if packed.exists() and not path.exists() else path).read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
        return parse(content), hashlib.sha256(content).hexdigest()
    except (OSError, EOFError, ValueError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read ({reason}); name another place with {flag}", 1) from None


MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
MNIST_DIGESTS = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


@dataclass
class PixelSequences:
    """Images as sequences: pixels (N, 784) uint8 in the order in which they are shown, labels (N,) int64 from 0 on."""

    pixels: torch.Tensor
    labels: torch.Tensor
    source: dict | None = None
    classes: int = 10
    normalize: tuple[float, float] | None = None    # a mean and a deviation

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device) -> "PixelSequences":
        return replace(self, pixels=self.pixels.to(device), labels=self.labels.to(device))

    def batch(self, start: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Images start … start + size − 1 → x (784, B, 1), in [0, 1] or normalized, default dtype; labels (B,)."""
        x = self.pixels[start:start + size].t().to(torch.get_default_dtype()) / 255
        x = (x - self.normalize[0]) / self.normalize[1] if self.normalize else x
        return x.unsqueeze(-1), self.labels[start:start + size]


def load_mnist(folder: Path | None = None, permute: bool = False, normalize=None) -> tuple[PixelSequences, ...]:
    """MNIST pixel by pixel → `PixelSequences` of 50,000 train, 10,000 validation and 10,000 test images.

    Another data set is split in the same way, five sixths to train; labels that start at 1 are counted from 0. Raises
    UserError when a file is missing and cannot be fetched, or does not fit.
    """
    arrays, source = read_set("MNIST", folder, "MNIST/raw", MNIST_DIGESTS, MNIST_URL, get_mnist, idx_values)
    images, labels, test_images, test_labels = arrays
    for part, pixels, numbers in (("train", images, labels), ("t10k", test_images, test_labels)):
        if pixels.shape[1:] != (28, 28) or numbers.shape != pixels.shape[:1] or len(numbers) < 2:
            raise UserError(f"{source['path']}/MNIST/raw/{part}-*: arrays of {tuple(pixels.shape)} and "
                            f"{tuple(numbers.shape)} are not 28 × 28 images and a label for each; name another folder "
                            "with --data", 1)
    first = min(labels.min(), test_labels.min())
    classes = int(max(labels.max(), test_labels.max()) - first) + 1
    generator = np.random.RandomState(1234)  # --random-seed does not touch it, so every run sees the same task
    order, split = (torch.from_numpy(generator.permutation(count)) for count in (784, len(labels)))
    order = order if permute else torch.arange(784)
    train, valid = split.tensor_split([len(split) * 5 // 6])
    return tuple(PixelSequences(pixels.flatten(1)[:, order].contiguous(), numbers - first,
                                {**source, "classes": classes}, classes, normalize)
                 for pixels, numbers in ((images[train], labels[train]), (images[valid], labels[valid]),
                                         (test_images, test_labels)))


def idx_values(content: bytes) -> torch.Tensor:
    """The values of an idx file of unsigned bytes: uint8 images or int64 labels.

    It holds 0, 0, 8, the number of dimensions, their sizes as big-endian int32, the values. Raises ValueError.
    """
    sizes = np.frombuffer(content, ">u4", int.from_bytes(content[3:4]), 4)
    values = np.frombuffer(content, np.uint8, offset=4 + sizes.nbytes).reshape(sizes)
    if content[:3] != b"\0\0\x08":
        raise ValueError("an idx file of bytes begins with 0, 0, 8")
    values = torch.from_numpy(values.copy())
    return values.long() if values.dim() == 1 else values


PENN_URL = "http://www.fit.vutbr.cz/~imikolov/rnnlm/simple-examples.tgz"
PENN_DIGESTS = {
    "train.txt": "e313d91425e06c4f0a8fb6e881dcce0c291f2a0e9f4dda54833069b122f91da9",
    "valid.txt": "21661f63ec355085879458b6524644d4add5573541b4be14fb52ab2e2e995eb8",
    "test.txt": "1ef5607ac3c463b16e38bfe7900dd3bfc91de5a96e0f21e7eab5188b465b8ebe",
}
END_OF_LINE = "<eos>"
SHOWN = {END_OF_LINE: "\n", "_": " "}  # symbols of the character files as a person reads them
MARKER = re.compile(r"<[^<>]+>")  # <eos>, <unk> and the like count as one character


@dataclass
class Characters:
    """A corpus as numbers: three vectors (N,) int64 and the symbol of each number."""

    train: torch.Tensor
    valid: torch.Tensor
    test: torch.Tensor
    vocabulary: list[str]
    source: dict | None = None

    @property
    def unit(self) -> str:
        """What is counted: "character", or "symbol" where a symbol is longer."""
        return "symbol" if has_words(self.vocabulary) else "character"


def load_characters(folder: Path | None = None, text: Path | None = None) -> Characters:
    """The text file `text` if there is one, else the character files of a folder (pennchar/{train,valid,test}.txt).

    In those, blanks and tabs separate symbols, and every line ends in <eos>; symbols are numbered in the order in which
    train.txt brings them. Raises UserError for files that are missing and cannot be fetched, are no text, or hold a
    symbol that train.txt does not.
    """
    if None not in (text, folder):
        raise UserError("--text FILE takes the place of --data FOLDER; leave one of them out")
    if text is not None:
        return load_text(text)
    if folder is not None and os.path.isfile(folder):
        raise UserError(f"{folder} is not a folder; a text of your own is read with --text", 1)
    get = partial(get_members, url=PENN_URL, prefix="simple-examples/data/ptb.char.", names=PENN_DIGESTS)
    texts, source = read_set("Penn Treebank", folder, "pennchar", PENN_DIGESTS, PENN_URL, get, utf8_text)
    vocabulary, numbers = [], []
    for name, content in zip(PENN_DIGESTS, texts, strict=True):
        symbols = [END_OF_LINE if symbol == "\n" else symbol
                   for symbol in re.findall(r"\n|[^ \t\n]+", content.removesuffix("\n") + "\n")]
        vocabulary = vocabulary or list(dict.fromkeys(symbols))
        try:
            numbers.append(numbers_of(symbols, vocabulary))
        except KeyError as error:
            raise UserError(f"{source['path']}/pennchar/{name} holds the symbol {error.args[0][:40]!r}, which "
                            "train.txt never shows; the three files must come from one corpus", 1) from None
    return Characters(*numbers, vocabulary, {**source, "vocabulary": vocabulary})


def load_text(path: Path) -> Characters:
    """A UTF-8 text by characters, line ends included: 90 % to train on, then 5 % to validate and 5 % to test.

    Symbols are numbered in the order of Unicode. Raises UserError for a file that cannot be read or is no text.
    """
    text, digest = read_file(Path(path), utf8_text, "--text")
    vocabulary = sorted(set(text))
    parts = numbers_of(text, vocabulary).tensor_split([len(text) * 90 // 100, len(text) * 95 // 100])
    train, valid, test = map(len, parts)
    print(printable(f"{path}: {len(text):,} characters, {len(vocabulary):,} different; {train:,} to train on, "
                    f"{valid:,} to validate, {test:,} to test"), flush=True)
    source = {"digest": digest, "official": False, "path": str(Path(path).absolute()), "vocabulary": vocabulary}
    return Characters(*parts, vocabulary, source)


def numbers_of(symbols: Iterable[str], vocabulary: Iterable[str]) -> torch.Tensor:
    """Symbols → their numbers (N,) int64. Raises KeyError for a symbol that is not in the vocabulary."""
    number_of = {symbol: number for number, symbol in enumerate(vocabulary)}
    return torch.from_numpy(np.fromiter(map(number_of.__getitem__, symbols), np.int64))


def text_of(numbers: Iterable[int], vocabulary: list[str]) -> str:
    """Numbers → a text to be read. Symbols longer than a character stand apart."""
    shown = SHOWN if END_OF_LINE in vocabulary else {}
    between = " " if has_words(vocabulary) else ""
    return between.join(shown.get(vocabulary[k], vocabulary[k]) for k in map(int, numbers))


def symbols_of(text: str, vocabulary: list[str]) -> list[str]:
    """The symbols of a text, the inverse of `text_of`."""
    symbol_of = {shown: symbol for symbol, shown in SHOWN.items()} if END_OF_LINE in vocabulary else {}
    pieces = re.findall(r"\n|[^ \n]+", text) if has_words(vocabulary) else text
    return [symbol_of.get(piece, piece) for piece in pieces]


def has_words(vocabulary: Iterable[str]) -> bool:
    """Whether a symbol is longer than a character, markers such as <unk> left out."""
    return any(len(symbol) > 1 and not MARKER.fullmatch(symbol) for symbol in vocabulary)


def utf8_text(content: bytes) -> str:
    """A text in UTF-8. A byte-order mark is dropped; CR LF and CR are line ends. Raises ValueError."""
    text = content.decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    if "\0" in text:
        raise ValueError("a zero byte is no part of a text in UTF-8")
    return text
