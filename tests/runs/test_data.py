"""The data: what the tasks feed, bit for bit, and what a person is told when files are missing or wrong."""

import gzip
import hashlib
import io
import math
import os
import shutil
import tarfile
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import fake_images, write_idx

from common import data
from common.data import CopyingTask, load_mnist, load_penn_characters, mnist_order_and_split
from common.errors import UserError
from common.language import parallel_streams, segment, segments

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
    assert all((name in sentence) == (name in gone) for name in MNIST_NAMES)
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
    datasets = data.import_torchvision_datasets()

    class Fetch:
        def __init__(self, root, train, download):
            assert download
            shutil.copytree(mnist_folder / "MNIST", Path(root) / "MNIST")

    with monkeypatch.context() as patched:
        patched.setattr(datasets, "MNIST", Fetch)
        data._download_mnist(tmp_path / "MNIST" / "raw", list(MNIST_NAMES))
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == sorted(MNIST_NAMES)
    assert [p.name for p in (tmp_path / "MNIST" / "raw").iterdir() if p.is_dir()] == []
    assert len(load_mnist(tmp_path, download=False)[2]) == 10_000


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
    with pytest.raises(UserError, match="t10k-images-idx3-ubyte or t10k-labels-idx1-ubyte"):
        load_mnist(tmp_path)


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


@pytest.mark.parametrize("text", ["a b\nc", "a b\nc\n", "a b\r\nc\r\n", "  a   b\n c  \n"])
def test_line_ends_and_blanks(tmp_path, text):
    corpus = load_penn_characters(write_parts(tmp_path, train=text, valid="a\n", test="a\n"))
    assert [corpus.vocabulary[k] for k in corpus.train] == ["a", "b", "<eos>", "c", "<eos>"]


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


@pytest.mark.parametrize("gone", [["train"], ["valid", "test"], ["train", "valid", "test"]])
def test_missing_penn(tmp_path, gone):
    folder = write_parts(tmp_path, **{part: "a\n" for part in ("train", "valid", "test") if part not in gone})
    with pytest.raises(UserError) as error:
        load_penn_characters(folder, download=False)
    sentence = str(error.value)
    assert all((f"{part}.txt" in sentence) == (part in gone) for part in ("train", "valid", "test"))
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
    assert (len(corpus.train), len(corpus.valid), len(corpus.test)) == (5_017_483, 393_043, 442_424)


@pytest.mark.skipif(not REAL, reason="STAIR_DATA names no folder with the real files")
def test_real_mnist():
    train, valid, test = load_mnist(Path(REAL), download=False)
    assert [len(part) for part in (train, valid, test)] == [50_000, 10_000, 10_000]
    digits = torch.bincount(torch.cat((train.labels, valid.labels)))
    assert digits.tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert test.labels[:5].tolist() == [7, 2, 1, 0, 4]
