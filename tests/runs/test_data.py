"""The data: what the tasks feed, bit for bit, and what a person is told when files are missing or wrong."""

import gzip
import hashlib
import io
import json
import math
import os
import shutil
import signal
import tarfile
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import fake_images, fake_text, module_of, tiny, write_idx

from common import data, download, language
from common.copytask import CopyingTask
from common.data import (
    Source,
    load_characters,
    load_mnist,
    load_penn_characters,
    load_text,
    mnist_order_and_split,
    numbers_of,
    text_of,
    vocabulary_in,
)
from common.errors import UserError
from common.language import parallel_streams, segment, segments
from common.runs import flags
from evidence.pages import without_machine

# ── copying memory ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("T", "labels", "c"), [(200, 8, 10), (5, 4, 3), (1, 1, 1), (2, 8, 10)])
def test_copying_layout(T, labels, c):
    x, target = CopyingTask(T, labels, c, seed=1).batch(6)
    assert x.shape == target.shape == (T + 2 * c, 6)
    assert x.dtype == target.dtype == torch.int64
    for column, wanted in zip(x.t().tolist(), target.t().tolist(), strict=True):
        symbols = column[:c]
        assert all(1 <= s <= labels for s in symbols)
        assert column == [*symbols, *[0] * (T - 1), labels + 1, *[0] * c]
        assert wanted == [*[0] * (T + c), *symbols]


def test_copying_symbols_are_uniform():
    x, _ = CopyingTask(1, 8, 10, seed=0).batch(4000)
    counts = torch.bincount(x[:10].flatten(), minlength=9)[1:].double()
    assert (counts - 5000).abs().max() < 5 * math.sqrt(5000)


def test_copying_batches_are_fresh_and_follow_the_seed():
    one, two, other = CopyingTask(seed=1), CopyingTask(seed=1), CopyingTask(seed=2)
    first = one.batch(10)[0]
    assert torch.equal(first, two.batch(10)[0])
    assert not torch.equal(first, other.batch(10)[0])
    assert not torch.equal(first, one.batch(10)[0])


def test_copying_does_not_touch_the_global_generator():
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    CopyingTask(5, vari=True).batch(4)
    assert torch.equal(torch.rand(3), expected)


def test_vari_draws_every_delay():
    task = CopyingTask(T=6, labels=3, c_length=2, vari=True, seed=0)
    delays = []
    for _ in range(600):
        x, target = task.batch(2)
        delay = len(x) - 4
        delays.append(delay)
        assert x[2 + delay - 1].tolist() == [4, 4]          # the marker, one for the batch
        assert (x == 4).sum() == 2
        assert torch.equal(target[-2:], x[:2])
        assert not target[:-2].any()
    counts = torch.bincount(torch.tensor(delays), minlength=7)
    assert counts[0] == 0
    assert len(counts) == 7
    assert (counts[1:] - 100).abs().max() < 50              # 100 ± 9


@pytest.mark.parametrize("vari", [False, True])
def test_copying_state(vari):
    task = CopyingTask(9, vari=vari, seed=1)
    for _ in range(3):
        task.batch(4)
    state = task.state_dict()
    expected = [task.batch(4)[0] for _ in range(4)]
    other = CopyingTask(9, vari=vari, seed=77)
    other.load_state_dict(state)
    for wanted in expected:
        assert torch.equal(other.batch(4)[0], wanted)


def test_copying_sizes():
    task = CopyingTask(200, 8, 10)
    assert (task.steps, task.input_symbols, task.classes) == (220, 10, 9)
    task = CopyingTask(7, 4, 3)
    assert (task.steps, task.input_symbols, task.classes) == (13, 6, 5)


@pytest.mark.parametrize(("task", "loss"), [
    (CopyingTask(200, 8, 10), 0.0945), (CopyingTask(20, 4, 5), 0.2310), (CopyingTask(5, 1, 5), 0.0),
    (CopyingTask(2, 2, 1, vari=True), 0.2022)])             # (ln 2/3 + ln 2/4)/2
def test_memoryless_loss(task, loss):
    assert task.memoryless_loss() == pytest.approx(loss, abs=5e-5)


# ── MNIST ────────────────────────────────────────────────────────────────────────────────────────────────


def number_of(images):
    """The numbers that the fake images carry in their first two pixels."""
    return images.pixels[:, 0].int() + 256 * images.pixels[:, 1].int()


@pytest.fixture(scope="module")
def mnist(mnist_folder):
    return load_mnist(mnist_folder)


@pytest.fixture(scope="module")
def permuted(mnist_folder):
    return load_mnist(mnist_folder, permute=True)


def expected_draws():
    generator = np.random.RandomState(1234)
    order = generator.permutation(784)
    return order, generator.permutation(60_000)


def test_order_and_split_by_hand():
    """The first numbers that RandomState(1234) deals, order first."""
    order, split = mnist_order_and_split()
    assert order[:6].tolist() == [529, 511, 328, 133, 532, 378]
    assert split[:6].tolist() == [8550, 21862, 695, 39481, 32467, 48691]


def test_split(mnist):
    train, valid, test = mnist
    _, split = expected_draws()
    assert [len(part) for part in mnist] == [50_000, 10_000, 10_000]
    assert number_of(train).tolist() == split[:50_000].tolist()
    assert number_of(valid).tolist() == split[50_000:].tolist()
    assert number_of(test).tolist() == list(range(10_000))
    assert train.labels.tolist() == (split[:50_000] * 7 % 10).tolist()
    assert valid.labels.tolist() == (split[50_000:] * 7 % 10).tolist()


def test_permutation(mnist, permuted):
    order, _ = expected_draws()
    for plain, other in zip(mnist, permuted, strict=True):
        assert torch.equal(other.pixels, plain.pixels[:, torch.from_numpy(order)])
        assert torch.equal(other.labels, plain.labels)


def test_neither_depends_on_any_seed(mnist_folder, permuted):
    np.random.seed(5)
    torch.manual_seed(5)
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    again = load_mnist(mnist_folder, permute=True)
    assert (np.random.get_state()[1] == before[0]).all()
    assert torch.equal(torch.get_rng_state(), before[1])
    for one, other in zip(permuted, again, strict=True):
        assert torch.equal(one.pixels, other.pixels)


def test_rows_are_read_left_to_right(mnist):
    pixels = fake_images(10_000, 1)
    assert (mnist[2].pixels.numpy() == pixels).all()


def test_batch_of_pixels(mnist):
    x, labels = mnist[0].batch(200, 100)
    assert x.shape == (784, 100, 1)
    assert x.dtype == torch.float32
    assert x.min() == 0
    assert x.max() == 1
    assert torch.equal(labels, mnist[0].labels[200:300])
    assert torch.equal((x[:, 7, 0] * 255).round().byte(), mnist[0].pixels[207])
    last, _ = mnist[0].batch(49_950, 100)
    assert last.shape == (784, 50, 1)


MNIST_NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


@pytest.mark.parametrize("gone", [*((name,) for name in MNIST_NAMES), MNIST_NAMES])
def test_missing_mnist(tmp_path, gone):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in MNIST_NAMES:
        if name not in gone:
            (raw / name).write_bytes(b"")
    with pytest.raises(UserError) as error:
        load_mnist(tmp_path, download=False)
    sentence = str(error.value)
    assert all((name in sentence.split(" not found in ")[0]) == (name in gone) for name in MNIST_NAMES)
    assert str(raw) in sentence
    assert "http" in sentence
    assert "--data" in sentence


def no_network(*given, **named):
    raise urllib.error.URLError("no route to host")


def test_mnist_download_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte.*The download failed.*https?://.*--data"):
        load_mnist(tmp_path)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_mnist_download_that_works(tmp_path, monkeypatch, mnist_folder):
    """What torchvision fetches ends up in place, and nothing else stays behind."""
    datasets = download.import_torchvision_datasets()

    class Fetch:
        def __init__(self, root, train, download):
            assert download
            shutil.copytree(mnist_folder / "MNIST", Path(root) / "MNIST")

    monkeypatch.setattr(datasets, "MNIST", Fetch)
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte from https.* has a wrong sha256"):
        load_mnist(tmp_path / "new" / "data")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(data, "MNIST_DIGESTS", digests(mnist_folder / "MNIST" / "raw"))
    images = load_mnist(tmp_path / "new" / "data")
    assert files_below(tmp_path / "new" / "data") == sorted(f"MNIST/raw/{name}" for name in MNIST_NAMES)
    assert [p.name for p in tmp_path.rglob("*") if p.is_dir()] == ["new", "data", "MNIST", "raw"]
    assert len(images[2]) == 10_000
    assert images[0].source.official


@pytest.mark.parametrize("damage", ["empty", "text", "short", "other sizes", "labels above 9"])
def test_damaged_mnist(tmp_path, mnist_folder, damage):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in MNIST_NAMES:
        (raw / name).symlink_to(mnist_folder / "MNIST" / "raw" / name)
    images, labels = raw / "t10k-images-idx3-ubyte", raw / "t10k-labels-idx1-ubyte"
    whole = images.read_bytes()
    images.unlink()
    if damage == "labels above 9":
        images.write_bytes(whole)
        labels.unlink()
        write_idx(labels, np.full(10_000, 10))
    elif damage == "other sizes":
        write_idx(images, np.zeros((10_000, 14, 56)))
    else:
        images.write_bytes({"empty": b"", "text": b"<html>no</html>" * 9, "short": whole[:-5000]}[damage])
    said = {"empty": "images-idx3-ubyte.* 0 bytes", "text": "images-idx3-ubyte.* 135 bytes in the place of 7,840,016",
            "short": "images-idx3-ubyte.* 7,835,016 bytes", "other sizes": "images-idx3-ubyte.* its header",
            "labels above 9": "labels-idx1-ubyte.* a label is 10"}[damage].replace(" ", ".*")
    with pytest.raises(UserError, match=f"t10k-{said}"):
        load_mnist(tmp_path)


def digests(folder):
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in MNIST_NAMES}


def packed_mnist(folder, mnist_folder, rename=lambda name: f"{name}.gz") -> Path:
    """The fake MNIST, all but its largest file packed as the mirrors serve them."""
    folder.mkdir(parents=True)
    for name in MNIST_NAMES:
        plain = mnist_folder / "MNIST" / "raw" / name
        if name == MNIST_NAMES[0]:
            (folder / name).symlink_to(plain)
        else:
            (folder / rename(name)).write_bytes(gzip.compress(plain.read_bytes(), 1))
    return folder


@pytest.mark.parametrize("rename", [lambda name: f"{name}.gz", lambda name: name])
def test_packed_mnist(tmp_path, mnist_folder, mnist, rename):
    """Whole .gz files are read, also under the names of the unpacked ones; the data are the same."""
    packed_mnist(tmp_path / "MNIST" / "raw", mnist_folder, rename)
    for part, plain in zip(load_mnist(tmp_path, download=False), mnist, strict=True):
        assert torch.equal(part.pixels, plain.pixels)
        assert torch.equal(part.labels, plain.labels)
        assert part.source.digest == plain.source.digest


@pytest.mark.parametrize(("spoil", "said"), [
    (lambda packed: packed[:-20], "Compressed file ended"), (lambda packed: packed[:-8] + bytes(8), "CRC check failed"),
    (lambda packed: packed[:2], "is not"), (lambda packed: packed[:30] + b"x" * 9 + packed[39:], "is not"),
    (lambda packed: gzip.compress(bytes(10**7)), "more than 10,008 bytes")])
def test_packed_mnist_that_is_damaged(tmp_path, mnist_folder, spoil, said):
    raw = packed_mnist(tmp_path / "MNIST" / "raw", mnist_folder)
    labels = raw / "t10k-labels-idx1-ubyte.gz"
    labels.write_bytes(spoil(labels.read_bytes()))
    with pytest.raises(UserError) as error:
        load_mnist(tmp_path, download=False)
    assert str(error.value).startswith(f"{labels} is not MNIST's test file of 10,000 examples (")
    assert said in str(error.value)


@pytest.mark.parametrize(("place", "rename", "advice"), [
    (".", lambda name: name, "put them into {folder}/MNIST/raw$"),
    ("raw", lambda name: f"{name}.gz", "put them into {folder}/MNIST/raw$"),
    ("MNIST", lambda name: name.replace("-idx", ".idx"), "put them into {folder}/MNIST/raw as t10k-images-idx3-ubyte"),
    ("MNIST/raw", lambda name: name.replace("-idx", ".idx"), "put them into {folder}/MNIST/raw as t10k-images-idx3")])
def test_mnist_in_another_place(tmp_path, place, rename, advice):
    """What was found is said, and nothing is fetched in its place."""
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    for name in MNIST_NAMES:
        (tmp_path / place / rename(name)).write_bytes(b"")
    with pytest.raises(UserError, match=advice.format(folder=tmp_path)) as error:
        load_mnist(tmp_path)
    assert rename("train-images-idx3-ubyte") in str(error.value)


def test_a_data_folder_named_too_deep(tmp_path, mnist_folder):
    with pytest.raises(UserError, match=f"name {mnist_folder} with --data"):
        load_mnist(mnist_folder / "MNIST" / "raw")
    folder = write_parts(tmp_path, train="a\n", valid="a\n", test="a\n")
    with pytest.raises(UserError, match=f"name {tmp_path} with --data"):
        load_penn_characters(folder / "pennchar")


@pytest.mark.parametrize("name", ["mnist_train.csv", "mnist.npz", "MNIST.zip"])
def test_mnist_of_another_form(tmp_path, monkeypatch, name):
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match=rf"\({name} is of a form that is not read here\)\. The download failed"):
        load_mnist(tmp_path)
    assert files_below(tmp_path) == [name]


# ── Penn Treebank characters ─────────────────────────────────────────────────────────────────────────────


def write_parts(folder: Path, **parts) -> Path:
    (folder / "pennchar").mkdir(exist_ok=True)
    for part, content in parts.items():
        path = folder / "pennchar" / f"{part}.txt"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def test_tokens_by_hand(tmp_path):
    folder = write_parts(tmp_path, train=" a b _ c \n b a \n", valid=" c \n", test=" a a \n _ \n")
    corpus = load_penn_characters(folder)
    assert corpus.vocabulary == ["a", "b", "_", "c", "<eos>"]
    assert corpus.train.tolist() == [0, 1, 2, 3, 4, 1, 0, 4]
    assert corpus.valid.tolist() == [3, 4]
    assert corpus.test.tolist() == [0, 0, 4, 2, 4]
    assert corpus.train.dtype == torch.int64


@pytest.mark.parametrize("text", ["a b\nc", "a b\nc\n", "a b\r\nc\r\n", "a b\rc\r", "  a   b\n c  \n", "a\tb\n\tc\t\n",
                                  "\ufeffa b\nc\n"])
def test_line_ends_and_blanks(tmp_path, text):
    corpus = load_penn_characters(write_parts(tmp_path, train=text, valid="a\n", test="a\n"))
    assert [corpus.vocabulary[k] for k in corpus.train] == ["a", "b", "<eos>", "c", "<eos>"]


@pytest.mark.parametrize("symbol", [*"\u00a0\u2028\u2029\u3000\f\v\x1c\x85\u200b\ufeff"])
def test_everything_else_is_a_symbol(tmp_path, symbol):
    """Python takes most of these for blanks or line ends; the format does not."""
    corpus = load_penn_characters(write_parts(tmp_path, train=f"a {symbol} b\n", valid="a\n", test=f"a {symbol}\n"))
    assert [corpus.vocabulary[k] for k in corpus.train] == ["a", symbol, "b", "<eos>"]
    assert corpus.unit == "character"


@pytest.mark.parametrize(("line", "unit"), [
    ("t h e _ < u n k >", "character"), ("<unk> a <eos> <s> </s>", "character"), ("é 漢", "character"),
    ("the cat", "symbol"), ("a bc <unk>", "symbol"), ("< a <> b", "symbol")])
def test_what_is_counted(tmp_path, line, unit):
    corpus = load_penn_characters(write_parts(tmp_path, train=f"{line}\n", valid=f"{line}\n", test=f"{line}\n"))
    assert corpus.unit == unit
    assert ("the run counts symbols and prints bits per symbol" in corpus.source.note) == (unit == "symbol")


def test_an_empty_line_is_a_line(tmp_path):
    corpus = load_penn_characters(write_parts(tmp_path, train="a\n\nb\n", valid="a\n", test="a\n"))
    assert [corpus.vocabulary[k] for k in corpus.train] == ["a", "<eos>", "<eos>", "b", "<eos>"]


def test_fake_corpus(penn_folder):
    corpus = load_penn_characters(penn_folder)
    for part, lines in (("train", 60), ("valid", 16), ("test", 16)):
        tokens = getattr(corpus, part)
        assert (tokens == corpus.vocabulary.index("<eos>")).sum() == lines
        text = (penn_folder / "pennchar" / f"{part}.txt").read_text()
        assert " ".join(corpus.vocabulary[k] for k in tokens) == " ".join(text.replace("\n", " <eos> ").split())


@pytest.mark.parametrize(("part", "content", "sentence"), [
    ("valid", "a z\n", r"valid\.txt holds the symbol 'z', which train\.txt never shows"),
    ("test", "", r"test\.txt is empty"), ("train", "\n\n", r"train\.txt is empty"),
    ("train", b"a \xff b", r"train\.txt is not UTF-8"), ("valid", b"a\0b", r"valid\.txt is a binary file")])
def test_files_that_are_wrong(tmp_path, part, content, sentence):
    folder = write_parts(tmp_path, **{"train": "a b\n", "valid": "a\n", "test": "b\n", part: content})
    with pytest.raises(UserError, match=sentence):
        load_penn_characters(folder)


@pytest.mark.parametrize(("place", "name"), [(".", "train.txt"), ("simple-examples/data", "ptb.char.train.txt")])
def test_penn_in_another_place(tmp_path, place, name):
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    (tmp_path / place / name).write_text("a\n")
    with pytest.raises(UserError, match=rf"holds {name}; put them into {tmp_path}/pennchar"):
        load_penn_characters(tmp_path)


@pytest.mark.parametrize("gone", [["train"], ["valid", "test"], ["train", "valid", "test"]])
def test_missing_penn(tmp_path, gone):
    folder = write_parts(tmp_path, **{part: "a\n" for part in ("train", "valid", "test") if part not in gone})
    with pytest.raises(UserError) as error:
        load_penn_characters(folder, download=False)
    sentence = str(error.value)
    names = sentence.split(" not found in ")[0]
    assert all((f"{part}.txt" in names) == (part in gone) for part in ("train", "valid", "test"))
    assert str(folder / "pennchar") in sentence
    assert "http://www.fit.vutbr.cz/~imikolov/rnnlm/simple-examples.tgz" in sentence
    assert "--data" in sentence


def test_penn_download_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    with pytest.raises(UserError, match=r"train\.txt.*The download failed .*no route to host.*simple-examples\.tgz"):
        load_penn_characters(tmp_path)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


PARTS = {"train": b" a b \n", "valid": b" a \n", "test": b" b \n"}
DIGESTS = {part: hashlib.sha256(content).hexdigest() for part, content in PARTS.items()}


def archive(path: Path, members: dict, prefix="") -> str:
    """A .tgz of members; → its URL."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(prefix + name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path.as_uri()


def penn_members(**changed):
    parts = {**PARTS, **changed}
    return {f"simple-examples/data/ptb.char.{part}.txt": content for part, content in parts.items()}


@pytest.fixture
def target(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


def files_below(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("prefix", ["", "./"])
def test_penn_download_that_works(tmp_path, target, prefix):
    url = archive(tmp_path / "simple.tgz", {"simple-examples/README": b"more", **penn_members()}, prefix)
    corpus = load_penn_characters(target, url=url, digests=DIGESTS)
    assert corpus.vocabulary == ["a", "b", "<eos>"]
    assert files_below(target) == ["pennchar/test.txt", "pennchar/train.txt", "pennchar/valid.txt"]
    assert [p.name for p in (target / "pennchar").iterdir() if p.is_dir()] == []
    assert (target / "pennchar" / "train.txt").read_bytes() == PARTS["train"]


def test_only_missing_files_are_fetched(tmp_path, target):
    write_parts(target, train="a b c\n")
    load_penn_characters(target, url=archive(tmp_path / "simple.tgz", penn_members()), digests=DIGESTS)
    assert (target / "pennchar" / "train.txt").read_text() == "a b c\n"
    assert (target / "pennchar" / "test.txt").read_bytes() == PARTS["test"]


def test_wrong_digest_leaves_nothing_behind(tmp_path, target):
    url = archive(tmp_path / "simple.tgz", penn_members(test=b" b b \n"))
    with pytest.raises(UserError, match=r"test\.txt from file:.* wrong sha256"):
        load_penn_characters(target, url=url, digests=DIGESTS)
    assert files_below(target) == []


def test_the_published_digests_are_checked_by_default(tmp_path, target):
    with pytest.raises(UserError, match="wrong sha256"):
        load_penn_characters(target, url=archive(tmp_path / "simple.tgz", penn_members()))
    assert data.PENN_DIGESTS == {
        "train": "e313d91425e06c4f0a8fb6e881dcce0c291f2a0e9f4dda54833069b122f91da9",
        "valid": "21661f63ec355085879458b6524644d4add5573541b4be14fb52ab2e2e995eb8",
        "test": "1ef5607ac3c463b16e38bfe7900dd3bfc91de5a96e0f21e7eab5188b465b8ebe"}


def test_nothing_is_unpacked_outside(tmp_path, target):
    """Members that climb, absolute ones, and others nobody asked for stay in the archive."""
    url = archive(tmp_path / "evil.tgz", {"../../climbed.txt": b"x", str(tmp_path / "absolute.txt"): b"x",
                                          "pennchar/other.txt": b"x", **penn_members()})
    load_penn_characters(target, url=url, digests=DIGESTS)
    assert files_below(tmp_path) == ["data/pennchar/test.txt", "data/pennchar/train.txt", "data/pennchar/valid.txt",
                                     "evil.tgz"]


def test_a_link_in_the_archive_is_not_followed(tmp_path, target):
    secret = tmp_path / "secret.txt"
    secret.write_bytes(PARTS["train"])
    with tarfile.open(tmp_path / "evil.tgz", "w:gz") as tar:
        for name in penn_members():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, str(secret)
            tar.addfile(info)
    with pytest.raises(UserError, match="The download failed"):
        load_penn_characters(target, url=(tmp_path / "evil.tgz").as_uri(), digests=DIGESTS)
    assert files_below(target) == []


def spoiled(kind: str) -> bytes:
    """What a broken download may hold."""
    noise = np.random.default_rng(0).integers(97, 110, 200_000, dtype=np.uint8).tobytes()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in penn_members(train=noise).items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    whole = buffer.getvalue()
    if kind == "flipped":
        middle = bytearray(whole)
        for k in range(1000, len(middle) - 2000, 997):
            middle[k] ^= 0xFF
        return bytes(middle)
    return {"empty": b"", "page": b"<html>404</html>", "cut": whole[:len(whole) // 2], "gzip of text":
            gzip.compress(b"hello" * 999), "no members": gzip.compress(b"\0" * 10240)}[kind]


@pytest.mark.parametrize("kind", ["empty", "page", "cut", "flipped", "gzip of text", "no members"])
def test_archives_that_are_none(tmp_path, target, kind):
    (tmp_path / "broken.tgz").write_bytes(spoiled(kind))
    with pytest.raises(UserError) as error:
        load_penn_characters(target, url=(tmp_path / "broken.tgz").as_uri(), digests=DIGESTS)
    assert "\n" not in str(error.value)
    assert files_below(target) == []


def test_a_mistyped_folder_stays_unmade(tmp_path, monkeypatch):
    """Neither a failed download nor one of another text leaves a folder behind."""
    mistyped = tmp_path / "dtaa" / "more"
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    for load in (load_mnist, load_penn_characters):
        with pytest.raises(UserError, match="The download failed"):
            load(mistyped)
    monkeypatch.undo()
    with pytest.raises(UserError, match="wrong sha256"):
        load_penn_characters(mistyped, url=archive(tmp_path / "simple.tgz", penn_members()))
    assert [p.name for p in tmp_path.iterdir()] == ["simple.tgz"]
    load_penn_characters(mistyped, url=(tmp_path / "simple.tgz").as_uri(), digests=DIGESTS)
    assert files_below(mistyped) == ["pennchar/test.txt", "pennchar/train.txt", "pennchar/valid.txt"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_data_folder_that_cannot_be_written(target):
    target.chmod(0o555)
    with pytest.raises(UserError, match="nothing can be written there"):
        load_penn_characters(target)


def test_data_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    for load in (load_penn_characters, load_mnist):
        with pytest.raises(UserError, match="--data"):
            load(tmp_path / "file")


# ── a text of one's own ──────────────────────────────────────────────────────────────────────────────────


def write_text(folder, content) -> Path:
    path = folder / "own.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_a_text_by_hand(tmp_path):
    path = write_text(tmp_path, "ba\r\nc é漢" + "x" * 13)
    corpus = load_text(path)
    assert corpus.vocabulary == ["\n", " ", "a", "b", "c", "x", "é", "漢"]
    assert corpus.train.tolist() == [3, 2, 0, 4, 1, 6, 7, *[5] * 11]
    assert corpus.valid.tolist() == corpus.test.tolist() == [5]
    assert corpus.train.dtype == torch.int64
    assert corpus.unit == "character"
    assert corpus.source.note == f"{path}: 20 characters, 8 different; 18 to train on, 1 to validate, 1 to test"


@pytest.mark.parametrize("length", [1, 19, 100, 1003])
def test_a_text_is_cut_and_nothing_lost(tmp_path, length):
    text = "".join(chr(97 + k * k % 23) for k in range(length))
    corpus = load_text(write_text(tmp_path, text))
    assert text_of(torch.cat((corpus.train, corpus.valid, corpus.test)), corpus.vocabulary) == text
    assert abs(len(corpus.train) - 0.9 * length) <= 1
    assert abs(len(corpus.valid) - 0.05 * length) <= 1


def test_line_ends_and_marks_of_a_text(tmp_path):
    texts = [load_text(write_text(tmp_path, text)) for text in ("a\nb\n", "\ufeffa\nb\n", "a\r\nb\r\n", "a\rb\r")]
    for corpus in texts:
        assert corpus.vocabulary == ["\n", "a", "b"]
        assert corpus.train.tolist() == [1, 0, 2]
    rare = "\u00a0\u2028\f\v\x85\x1c\t "
    assert load_text(write_text(tmp_path, rare)).vocabulary == sorted(rare)


@pytest.mark.parametrize(("content", "said"), [
    (b"", "is empty"), ("\ufeff", "is empty"), (b"a\xff", "is not UTF-8"), ("abc".encode("utf-16"), "is not UTF-8"),
    (b"a\0b", "is a binary file"), (b"\x1f\x8b\x08\0", "is not UTF-8")])
def test_texts_that_are_none(tmp_path, content, said):
    with pytest.raises(UserError, match=rf"own\.txt {said}.*--text"):
        load_text(write_text(tmp_path, content))


@pytest.mark.parametrize(("path", "said"), [
    ("nothing", "does not exist"), (".", "is not a file"), ("x" * 5000, "does not"), ("/dev/zero", "is not a file")])
def test_a_text_that_is_no_file(tmp_path, path, said):
    with pytest.raises(UserError, match=f"{said}.*--text"):
        load_text(tmp_path / path)


def test_a_text_takes_the_place_of_the_folder(tmp_path, penn_folder):
    own = write_text(tmp_path, "ab" * 20)
    assert load_characters(penn_folder, own).vocabulary == ["a", "b"]
    assert load_characters(penn_folder).vocabulary == load_penn_characters(penn_folder).vocabulary


def test_a_text_as_the_data_folder(tmp_path):
    own = write_text(tmp_path, "ab" * 20)
    with pytest.raises(UserError, match=r"own\.txt is not a folder; .*--data, or a text of your own with --text"):
        load_characters(own)
    with pytest.raises(UserError, match=r"own\.txt is not a folder; .*MNIST"):
        load_mnist(own)


# ── which data it was ────────────────────────────────────────────────────────────────────────────────────


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_digests_by_hand(tmp_path):
    """What `sha256sum` prints: of a text its digest; of a folder's files the digest of its lines."""
    parts = {"train": b"a b\n", "valid": b"a\n", "test": b"b\n"}
    corpus = load_penn_characters(write_parts(tmp_path, **parts))
    lines = "".join(f"{sha256(content)}  {part}.txt\n" for part, content in parts.items())
    assert corpus.source.digest == sha256(lines.encode())
    assert load_text(write_text(tmp_path, "\ufeffa\r\nb")).source.digest == sha256("\ufeffa\r\nb".encode())


def test_the_digest_sees_every_part(tmp_path):
    """A line moved from one file to the next is another corpus."""
    whole = [load_penn_characters(write_parts(tmp_path, **parts)).source.digest for parts in (
        {"train": "a\nb\n", "valid": "a\n", "test": "b\n"}, {"train": "a\nb\na\n", "valid": "b\n", "test": "b\n"},
        {"train": "a\nb\n", "valid": "a\nb\n", "test": "b\n"}, {"train": "a\nb\n", "valid": "a\n", "test": "a\n"})]
    assert len(set(whole)) == 4


def test_files_that_are_not_the_official_ones(tmp_path, mnist):
    """Fake MNIST of the right sizes, any other text: named in a line, and in the record."""
    source = mnist[0].source
    assert not source.official
    assert all(name in source.note for name in MNIST_NAMES)
    assert "not the official MNIST" in source.note
    corpus = load_penn_characters(write_parts(tmp_path, **PARTS))
    assert not corpus.source.official
    assert corpus.source.note.startswith("train.txt, valid.txt, test.txt in ")
    own = load_text(write_text(tmp_path, "ab" * 20))
    assert own.source.identity() == {"digest": sha256(b"ab" * 20), "official": False}


def test_all_parts_carry_one_source(mnist):
    assert mnist[0].source == mnist[1].source == mnist[2].source
    assert mnist[0].to("cpu").source == mnist[0].source


def test_the_record_of_a_text_maps_numbers_to_symbols(tmp_path, monkeypatch):
    write_parts(tmp_path, train=" t h e _ <unk> \n", valid="t\n", test="h\n")
    monkeypatch.chdir(tmp_path)
    corpus = load_penn_characters(Path("."))
    record = json.loads(json.dumps(corpus.source.record()))
    assert record == {"digest": corpus.source.digest, "official": False, "path": str(tmp_path),
                      "vocabulary": ["t", "h", "e", "_", "<unk>", "<eos>"]}
    vocabulary = vocabulary_in(record)
    assert vocabulary == corpus.vocabulary
    assert text_of(corpus.train, vocabulary) == "the_<unk>\n"
    assert torch.equal(numbers_of(["t", "h", "e", "_", "<unk>", "<eos>"], vocabulary), corpus.train)
    assert text_of([1, 0, 2], ["the", "cat", "<eos>"]) == "cat the \n"
    with pytest.raises(KeyError):
        numbers_of("thz", vocabulary)


def test_a_collected_record_keeps_the_vocabulary(tmp_path):
    """The places of a machine are cut, symbols that look like a path are not."""
    symbols = ("/", "\\", '"', "=", "//", "\n", "a")
    record = Source(tmp_path / "mine", "ab", False, "", symbols).record()
    collected = json.loads(without_machine(json.dumps(record, indent=2)))
    assert vocabulary_in(collected) == [*symbols]
    assert collected["path"] == "mine"


@pytest.mark.parametrize("record", [None, [], {"digest": "ab"}, {"vocabulary": "ab"}, {"vocabulary": []},
                                    {"vocabulary": ["a", 1]}])
def test_records_without_a_vocabulary(record):
    with pytest.raises(UserError, match="holds no vocabulary"):
        vocabulary_in(record)


def test_the_data_of_a_resumed_run(tmp_path):
    source = Source(tmp_path, "ab" * 32, True)
    assert source.compare(source.record()) == ""
    assert source.compare(Source(tmp_path / "moved", "ab" * 32, True).record()) == ""
    assert "kept no digest" in source.compare(None)
    with pytest.raises(UserError, match=rf"data than {tmp_path} holds \(sha256 cdcdcdcdcdcd…, now abababababab…\)"):
        source.compare(Source(tmp_path, "cd" * 32, True).record())
    for damaged in (1, [], "ab", {}, {"digest": None}, {"digest": ["ab"]}):
        with pytest.raises(UserError, match=r"config\.json says of the data is damaged"):
            source.compare(damaged)


# ── what a run keeps of its data ─────────────────────────────────────────────────────────────────────────

LANGUAGE = ("language_nvar", *tiny("language_nvar"), "--log-interval", "1")


def folder_of(place):
    return next(place.glob("saves/*/*"))


@pytest.fixture
def main(tmp_path, monkeypatch):
    """Run a script's main in this process and in `tmp_path` → its result."""
    monkeypatch.chdir(tmp_path)
    return lambda script, *typed: module_of(script).main([*map(str, typed)])


def changed_config(folder, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def stopped(tmp_path, start_script, penn_folder):
    """The folder of a run that was started with a relative --data, and stopped."""
    shutil.copytree(penn_folder, tmp_path / "mine")
    process = start_script(*LANGUAGE, "--data", "mine", "--epochs", "9")
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    return folder_of(tmp_path)


def test_a_run_goes_on_with_the_same_data_only(stopped, run_script, tmp_path):
    (tmp_path / "mine" / "pennchar" / "train.txt").write_text(fake_text(50, 7))
    before = files_below(stopped)
    done = run_script("language_nvar", "--resume", stopped)
    assert done.returncode == 1
    assert f"this run was started on other data than {tmp_path / 'mine'} holds" in done.stderr
    assert done.stderr.count("\n") == 1
    assert files_below(stopped) == before


def test_a_relative_folder_is_found_from_elsewhere(stopped, run_script, tmp_path, monkeypatch):
    """The absolute path stands in config.json, beside what was typed; data that moved are named anew."""
    config = json.loads((stopped / "config.json").read_text())
    assert config["options"]["data"] == {"value": "mine", "origin": "typed"}
    assert config["data"]["path"] == str(tmp_path / "mine")
    assert config["data"]["vocabulary"] == load_penn_characters(tmp_path / "mine").vocabulary
    elsewhere = tmp_path / "else" / "where"
    elsewhere.mkdir(parents=True)
    monkeypatch.chdir(elsewhere)
    assert flags_of("--resume", stopped).data == tmp_path / "mine"
    (tmp_path / "mine").rename(tmp_path / "moved")
    assert flags_of("--resume", stopped).data == Path("mine")
    done = run_script("language_nvar", "--resume", stopped, "--data", "moved")
    assert done.returncode == 0, done.stderr
    assert "kept no digest" not in done.stdout
    result = json.loads((stopped / "result.json").read_text())
    assert result["data"] == {"digest": config["data"]["digest"], "official": False}
    assert list(elsewhere.iterdir()) == []


def flags_of(*typed):
    module = module_of("language_nvar")
    return flags.parse(typed, "language_nvar", module.__doc__, module.DEFAULTS, module.PAPER, language)


def test_a_run_of_before_goes_on(stopped, run_script, tmp_path):
    """Its record has no digest and no --text."""
    def as_before(config):
        del config["data"], config["options"]["text"]

    changed_config(stopped, as_before)
    done = run_script("language_nvar", "--resume", stopped)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("this run was started by a version that kept no digest of its data") == 1
    assert json.loads((stopped / "result.json").read_text())["data"]["official"] is False


@pytest.mark.parametrize(("dest", "value"), [("data", 5), ("data", ["a"]), ("data", ""), ("text", {"a": 1}),
                                             ("text", True), ("threads", "x"), ("threads", 2.5), ("cuda", "no"),
                                             ("engine", 7)])
def test_options_that_may_change_and_are_damaged(main, tmp_path, penn_folder, dest, value):
    """What a resumed run may be given anew is checked as strictly as the rest of its record."""
    main(*LANGUAGE, "--data", penn_folder)

    def damage(config):
        del config["data"]
        config["options"][dest]["value"] = value

    changed_config(folder_of(tmp_path), damage)
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        main("language_nvar", "--resume", folder_of(tmp_path))


def test_a_record_of_the_data_that_is_damaged(stopped, run_script):
    changed_config(stopped, lambda config: config.update(data={"digest": ["\x1b[31m"], "path": 7}))
    done = run_script("language_nvar", "--resume", stopped)
    assert done.returncode == 1
    assert "what config.json says of the data is damaged" in done.stderr
    assert done.stderr.count("\n") == 1
    assert "\x1b" not in done.stderr


@pytest.mark.parametrize(("text", "unit", "other"), [("t h e _ c a t \n", "character", "symbol"),
                                                     ("the cat sat <unk> \n", "symbol", "character")])
def test_words_are_not_called_characters(main, capsys, tmp_path, text, unit, other):
    write_parts(tmp_path, train=text * 60, valid=text * 20, test=text * 20)
    result = main(*LANGUAGE, "--data", tmp_path)
    said = capsys.readouterr().out
    assert said.count(f"bits per {unit}") == (2 if unit == "character" else 3)     # the note, validation, test
    assert f"bits per {other}" not in said
    assert "not the official Penn Treebank; the result says so" in said
    assert result[f"test_bits_per_{unit}"] == pytest.approx(result["test_loss"] / math.log(2))
    assert f"test_bits_per_{other}" not in result
    assert result["data"]["official"] is False


@pytest.mark.parametrize("script", ["language_nvar", "language_alpha", "language_expalpha"])
def test_a_run_of_ones_own_text(main, capsys, tmp_path, script):
    """A language in which b follows a, learned."""
    own = write_text(tmp_path, "ab\n" * 4000)
    result = main(script, *tiny(script), "--text", "own.txt", "--lr", "0.05")
    said = capsys.readouterr().out
    assert "own.txt: 12,000 characters, 3 different; 10,800 to train on, 600 to validate, 600 to test" in said
    assert "bits per character" in said
    assert result["test_bits_per_character"] < 0.8                  # log2 3 = 1.585 without learning
    assert result["data"] == {"digest": sha256(own.read_bytes()), "official": False}
    config = json.loads((folder_of(tmp_path) / "config.json").read_text())
    assert config["data"] == {**result["data"], "path": str(own), "vocabulary": ["\n", "a", "b"]}


@pytest.mark.parametrize(("text", "typed", "said"), [
    ("ab" * 10, (), "the 1 symbols of the valid text are too few for 10 parallel streams; it needs a longer text"),
    ("ab" * 500, ("--batch", "600"), "the 900 symbols of the train text are too few for 600 parallel streams; choose"),
    ("ab" * 500, ("--data", "."), "--text FILE takes the place of --data FOLDER; leave one of them out"),
    ("", (), "own.txt is empty")])
def test_a_text_that_does_not_do(main, tmp_path, text, typed, said):
    write_text(tmp_path, text)
    with pytest.raises(UserError, match=said):
        main(*LANGUAGE, "--text", "own.txt", *typed)
    assert not (tmp_path / "saves").exists()


def test_a_run_on_images_keeps_their_digest(run_script, tmp_path, mnist_folder, mnist):
    done = run_script("sMNIST_nvar", *tiny("sMNIST_nvar"), "--data", mnist_folder, few_images=True)
    assert done.returncode == 0, done.stderr
    assert "not the official MNIST; the result says so" in done.stdout
    result, config = (json.loads((folder_of(tmp_path) / name).read_text()) for name in ("result.json", "config.json"))
    assert result["data"] == {"digest": mnist[0].source.digest, "official": False}
    assert config["data"] == {**result["data"], "path": str(mnist_folder)}


# ── streams and segments ─────────────────────────────────────────────────────────────────────────────────


def test_streams_by_hand():
    streams = parallel_streams(torch.arange(11), 3)
    assert streams.tolist() == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]


@pytest.mark.parametrize(("length", "bptt"), [(11, 5), (10, 5), (3, 5), (7, 1), (6, 5)])
def test_segments_cover_every_symbol_once(length, bptt):
    streams = parallel_streams(torch.arange(2 * length), 2)
    inputs, targets = [], []
    for k in range(segments(streams, bptt)):
        symbols, target = segment(streams, k, bptt)
        assert 1 <= len(symbols) <= bptt
        inputs.append(symbols)
        targets.append(target.view(-1, 2))
    assert torch.equal(torch.cat(inputs), streams[:-1])
    assert torch.equal(torch.cat(targets), streams[1:])


# ── the real files ───────────────────────────────────────────────────────────────────────────────────────

REAL = os.environ.get("STAIR_DATA")


@pytest.mark.skipif(not REAL, reason="STAIR_DATA names no folder with the real files")
def test_real_penn_treebank():
    corpus = load_penn_characters(Path(REAL), download=False)
    assert len(corpus.vocabulary) == 50
    assert (corpus.source.official, corpus.source.note, corpus.unit) == (True, "", "character")
    assert (len(corpus.train), len(corpus.valid), len(corpus.test)) == (5_017_483, 393_043, 442_424)


@pytest.mark.skipif(not REAL, reason="STAIR_DATA names no folder with the real files")
def test_real_mnist():
    train, valid, test = load_mnist(Path(REAL), download=False)
    assert [len(part) for part in (train, valid, test)] == [50_000, 10_000, 10_000]
    assert (train.source.official, train.source.note) == (True, "")
    digits = torch.bincount(torch.cat((train.labels, valid.labels)))
    assert digits.tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert test.labels[:5].tolist() == [7, 2, 1, 0, 4]
