"""The data: what the tasks feed, bit for bit, and what a person is told when files are missing or wrong."""

import contextlib
import gzip
import hashlib
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tarfile
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, fake_images, fake_text, module_of, tiny, write_mnist
from test_texts import write_parts, write_text

from common import data, download, language
from common.copytask import CopyingTask
from common.data import load_characters, load_mnist, load_text
from common.errors import UserError
from common.language import parallel_streams, segments
from common.runs import flags
from evidence.pages import ABSOLUTE


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


def test_copying_batches_are_fresh_and_follow_the_seed():
    one, two, other = CopyingTask(seed=1), CopyingTask(seed=1), CopyingTask(seed=2)
    first = one.batch(10)[0]
    assert torch.equal(first, two.batch(10)[0])
    assert not torch.equal(first, other.batch(10)[0])
    assert not torch.equal(first, one.batch(10)[0])


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


@pytest.mark.parametrize(("task", "loss"), [
    (CopyingTask(200, 8, 10), 0.0945), (CopyingTask(20, 4, 5), 0.2310), (CopyingTask(5, 1, 5), 0.0),
    (CopyingTask(2, 2, 1, vari=True), 0.2022)])             # (ln 2/3 + ln 2/4)/2
def test_memoryless_loss(task, loss):
    assert task.memoryless_loss() == pytest.approx(loss, abs=5e-5)


MNIST_NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def number_of(images):
    """The numbers that the fake images carry in their first two pixels."""
    return images.pixels[:, 0].int() + 256 * images.pixels[:, 1].int()


@pytest.fixture(scope="module")
def mnist(mnist_folder):
    return load_mnist(mnist_folder)


def expected_draws():
    """The pixel order and the split of RandomState(1234), order first; their first numbers are written down here."""
    generator = np.random.RandomState(1234)
    order, split = generator.permutation(784), generator.permutation(60_000)
    assert order[:6].tolist() == [529, 511, 328, 133, 532, 378]
    assert split[:6].tolist() == [8550, 21862, 695, 39481, 32467, 48691]
    return order, split


def test_split(mnist):
    train, valid, test = mnist
    _, split = expected_draws()
    assert [len(part) for part in mnist] == [50_000, 10_000, 10_000]
    assert number_of(train).tolist() == split[:50_000].tolist()
    assert number_of(valid).tolist() == split[50_000:].tolist()
    assert (test.pixels.numpy() == fake_images(10_000, 1)).all()             # rows are read left to right
    assert train.labels.tolist() == (split[:50_000] * 7 % 10).tolist()
    assert valid.labels.tolist() == (split[50_000:] * 7 % 10).tolist()


def test_permutation(tmp_path):
    """One order for every run, whatever was seeded; no generator of others is touched."""
    order, _ = expected_draws()
    plain, found = load_mnist(write_mnist(tmp_path, 60, 12)), []
    for seed in (5, 6):
        np.random.seed(seed)
        torch.manual_seed(seed)
        before = np.random.get_state()[1].copy(), torch.get_rng_state()
        found.append(load_mnist(tmp_path, permute=True))
        assert (np.random.get_state()[1] == before[0]).all()
        assert torch.equal(torch.get_rng_state(), before[1])
    for parts in zip(plain, *found, strict=True):
        for part in parts[1:]:
            assert torch.equal(part.pixels, parts[0].pixels[:, torch.from_numpy(order)])
            assert torch.equal(part.labels, parts[0].labels)


def test_batch_of_pixels(mnist):
    x, labels = mnist[0].batch(200, 100)
    assert x.shape == (784, 100, 1)
    assert x.dtype == torch.float32
    assert x.min() == 0
    assert x.max() == 1
    assert torch.equal(labels, mnist[0].labels[200:300])
    assert torch.equal((x[:, 7, 0] * 255).round().byte(), mnist[0].pixels[207])
    normalized, _ = replace(mnist[0], normalize=(0.1307, 0.3081)).batch(200, 100)
    torch.testing.assert_close(normalized * 0.3081 + 0.1307, x)
    last, _ = mnist[0].batch(49_950, 100)
    assert last.shape == (784, 50, 1)


@pytest.mark.parametrize(("count", "labels", "classes"), [
    (120, lambda k: k % 26 + 1, 26), (66, lambda k: k % 47, 47), (48, lambda k: k % 10, 10)])
def test_relatives_of_mnist(tmp_path, count, labels, classes):
    """The letters of EMNIST are labelled 1 … 26; its other sets have up to 62 classes, and any number of images."""
    parts = load_mnist(write_mnist(tmp_path, count, 60, labels))
    assert [len(part) for part in parts] == [count * 5 // 6, count // 6, 60]
    assert sorted(number_of(parts[0]).tolist() + number_of(parts[1]).tolist()) == list(range(count))
    for part in parts:
        assert part.classes == classes
        expected = labels(number_of(part).numpy())
        assert part.labels.tolist() == (expected - 1 if classes == 26 else expected).tolist()
    assert parts[0].source["classes"] == classes
    assert parts[0].source["official"] is False


def test_a_run_on_letters(main, tmp_path):
    """26 classes from the data to the read-out, through a resume and `load`; the result says that it is not MNIST."""
    folder = write_mnist(tmp_path / "letters", 120, 52, lambda k: k % 26 + 1)
    result, run = main("sMNIST_nvar", *tiny("sMNIST_nvar"), "--data", folder)
    assert result["data"] == {"digest": load_mnist(folder)[0].source["digest"], "official": False}
    config = json.loads((run / "config.json").read_text())
    assert config["data"] == {**result["data"], "path": str(folder), "classes": 26}
    model, _ = module_of("sMNIST_nvar").load(run)
    assert model.readout.weight.shape == (26, 8)
    assert main("sMNIST_nvar", "--resume", run, "--epochs", "2")[0]["epochs"] == 2


def no_network(*given, **named):
    raise urllib.error.URLError("no route to host")


@pytest.mark.parametrize("packed", [(), MNIST_NAMES[1:], MNIST_NAMES])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_packed_mnist(tmp_path, packed, suffix):
    """Files as the mirrors serve them, also under the names of the unpacked ones, are the same data."""
    write_mnist(tmp_path / "plain", 60, 12)
    raw = write_mnist(tmp_path / "packed", 60, 12) / "MNIST" / "raw"
    for name in packed:
        content = gzip.compress((raw / name).read_bytes())
        (raw / name).unlink()
        (raw / f"{name}{suffix}").write_bytes(content)
    for part, plain in zip(load_mnist(tmp_path / "packed"), load_mnist(tmp_path / "plain"), strict=True):
        assert torch.equal(part.pixels, plain.pixels)
        assert torch.equal(part.labels, plain.labels)
        assert part.source["digest"] == plain.source["digest"]


IMAGES, LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
BAD_FILES = {  # (name, what happens to its bytes): what the sentence says
    "empty": (LABELS, lambda whole: b"", "cannot be read"),
    "a web page": (LABELS, lambda whole: b"<html>not found</html>", "cannot be read"),
    "half": (IMAGES, lambda whole: whole[:len(whole) // 2], "cannot be read"),
    "one byte more": (LABELS, lambda whole: whole + b"\0", "cannot be read"),
    "signed bytes": (LABELS, lambda whole: b"\0\0\x09" + whole[3:], "an idx file of bytes begins with 0, 0, 8"),
    "other sizes": (IMAGES, lambda whole: whole[:8] + bytes([0, 0, 0, 14, 0, 0, 0, 56]) + whole[16:], "28 × 28 images"),
    "fewer labels": (LABELS, lambda whole: b"\0\0\x08\x01\0\0\0\x03abc", "a label for each"),
    "a packed file cut": (LABELS, lambda whole: gzip.compress(whole)[:-20], "cannot be read"),
    "a packed file damaged": (LABELS, lambda whole: gzip.compress(whole)[:-8] + bytes(8), "cannot be read"),
    "a folder": (LABELS, None, "Is a directory"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_damaged_mnist(tmp_path, case):
    """One sentence names the place; no file of a person is to be deleted."""
    name, spoil, said = BAD_FILES[case]
    path = write_mnist(tmp_path, 60, 12) / "MNIST" / "raw" / name
    content = path.read_bytes()
    path.unlink()
    if spoil:
        path.write_bytes(spoil(content))
    else:
        path.mkdir()
    with pytest.raises(UserError, match=f"{re.escape(str(path.parent))}.*{said}.*--data") as error:
        load_mnist(tmp_path)
    assert "delete" not in str(error.value)


def files_below(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize(("load", "home", "names", "url"), [
    (load_mnist, "MNIST/raw", MNIST_NAMES, data.MNIST_URL),
    (load_characters, "pennchar", ("train.txt", "valid.txt", "test.txt"), data.PENN_URL)])
def test_missing_files_are_named_with_their_place(tmp_path, monkeypatch, load, home, names, url):
    """All are tried to be fetched; some of them are asked for, since the others may be of another data set."""
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    for there in ((), names[:1], names[:-1]):
        folder = tmp_path / str(len(there))
        (folder / home).mkdir(parents=True)
        for name in there:
            (folder / home / name).write_bytes(b"")
        with pytest.raises(UserError) as error:
            load(folder)
        missing, rest = str(error.value).split(" not found in ")
        assert missing.split(", ") == [name for name in names if name not in there]
        assert rest.startswith(str(folder / home))
        assert f"Get the files from {url} and put them there, or name the folder that holds {home} with --data" in rest
        assert ("The download failed" in rest) == (not there)
        assert files_below(folder) == [f"{home}/{name}" for name in sorted(there)]


@pytest.mark.parametrize("other", ["FashionMNIST/raw/train-images-idx3-ubyte", "KMNIST/raw/t10k-labels-idx1-ubyte.gz",
                                   "MNIST/train-images-idx3-ubyte", "train-images-idx3-ubyte", "mnist_train.csv",
                                   "MNIST/raw/emnist-letters-train-images-idx3-ubyte.gz", "simple-examples.tgz"])
@pytest.mark.parametrize("load", [load_mnist, load_characters])
def test_a_folder_with_other_data_is_no_invitation_to_download(tmp_path, monkeypatch, load, other):
    monkeypatch.setattr(urllib.request, "urlopen", lambda *given, **named: pytest.fail("it downloads"))
    (tmp_path / other).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / other).write_bytes(b"x")
    if load is load_characters and other.startswith("MNIST"):
        return                                               # that is no other data: both live in one folder
    with pytest.raises(UserError, match="nothing is downloaded into a folder that holds ") as error:
        load(tmp_path)
    assert "delete" not in str(error.value)
    assert files_below(tmp_path) == [other]


def digests(folder, names):
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def test_mnist_download_that_works(tmp_path, monkeypatch):
    """What torchvision fetches ends up in place, and nothing else stays behind."""
    source = write_mnist(tmp_path / "source", 60, 12) / "MNIST"

    class Fetch:
        def __init__(self, root, train, download):
            assert download
            shutil.copytree(source, Path(root) / "MNIST")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    with contextlib.suppress(Exception):                      # it makes torchvision ready for a torch of a CPU alone
        download.get_mnist(tmp_path / "none")
    monkeypatch.setattr("torchvision.datasets.MNIST", Fetch)
    folder = tmp_path / "new" / "data"
    with pytest.raises(UserError, match=r"The download failed \(train-images-idx3-ubyte has a wrong sha256\)"):
        load_mnist(folder)
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(data, "MNIST_DIGESTS", digests(source / "raw", MNIST_NAMES))
    (folder / "pennchar").mkdir(parents=True)
    (folder / "README.md").write_text("what lies beside the files of a clone")
    assert load_mnist(folder)[0].source["official"]
    assert files_below(folder) == sorted(["README.md", *(f"MNIST/raw/{name}" for name in MNIST_NAMES)])


PARTS = {"train.txt": b" a b \n", "valid.txt": b" a \n", "test.txt": b" b \n"}


def archive(path: Path, prefix="simple-examples/data/ptb.char.", cut=None, **changed) -> str:
    """A .tgz of the three files and another one; → its URL."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in {"../../climbed.txt": b"x", **{f"{prefix}{name}": c for name, c in PARTS.items()},
                              **changed}.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    path.write_bytes(path.read_bytes()[:cut])
    return path.as_uri()


@pytest.fixture
def own_digests(monkeypatch):
    monkeypatch.setattr(data, "PENN_DIGESTS", {name: hashlib.sha256(c).hexdigest() for name, c in PARTS.items()})


@pytest.mark.usefixtures("own_digests")
@pytest.mark.parametrize("before", ["", "./"])
def test_penn_download_that_works(tmp_path, monkeypatch, before):
    monkeypatch.setattr(data, "PENN_URL", archive(tmp_path / "simple.tgz", f"{before}simple-examples/data/ptb.char."))
    corpus = load_characters(tmp_path / "new" / "data")
    assert corpus.vocabulary == ["a", "b", "<eos>"]
    assert corpus.source["official"]
    assert files_below(tmp_path) == ["new/data/pennchar/test.txt", "new/data/pennchar/train.txt",
                                     "new/data/pennchar/valid.txt", "simple.tgz"]


@pytest.mark.usefixtures("own_digests")
@pytest.mark.parametrize(("change", "said"), [
    (lambda path: archive(path, **{"simple-examples/data/ptb.char.test.txt": b" b b \n"}),
     r"test\.txt has a wrong sha256"),
    (lambda path: archive(path, cut=-60), "Compressed file ended"), (lambda path: archive(path, "other/"), "train"),
    (lambda path: path.write_bytes(b"<html>404</html>"), "not a gzip file|file could not be opened"),
    (lambda path: path.write_bytes(gzip.compress(bytes(10240))), "train")])
def test_a_download_that_fails_leaves_nothing_behind(tmp_path, monkeypatch, change, said):
    """Not even a mistyped folder."""
    change(tmp_path / "broken.tgz")
    monkeypatch.setattr(data, "PENN_URL", (tmp_path / "broken.tgz").as_uri())
    with pytest.raises(UserError, match=rf"The download failed \(.*{said}"):
        load_characters(tmp_path / "mistyped" / "data")
    assert files_below(tmp_path) == ["broken.tgz"]
    assert not (tmp_path / "mistyped").exists()


def test_a_server_that_never_ends(tmp_path):
    """It sends a byte now and then: an end after a while, a sentence, and a process that ends too."""
    code = (f"import time, common.data as data, common.download as download\n"
            f"download.LONGEST = 0.3\n"
            f"data.get_mnist = lambda folder: time.sleep(600)\n"
            f"from common.errors import run_main\n"
            f"run_main(lambda: data.load_mnist({str(tmp_path)!r}))\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60,
                          check=False)
    assert done.returncode == 1
    assert "The download failed (TimeoutError)" in done.stderr
    assert done.stderr.count("\n") == 1
    assert files_below(tmp_path) == []


@pytest.mark.parametrize("place", ["file", "file/in", "x" * 5000])
def test_data_folder_that_is_none(tmp_path, monkeypatch, place):
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    (tmp_path / "file").write_text("x")
    for load in (load_characters, load_mnist):
        with pytest.raises(UserError, match=r"--data|--text"):
            load(tmp_path / place)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_digests_by_hand(tmp_path):
    """What `sha256sum` prints: of a text its digest; of a folder's files the digest of its lines."""
    parts = {"train": b"a b\n", "valid": b"a\n", "test": b"b\n"}
    corpus = load_characters(write_parts(tmp_path, **parts))
    lines = "".join(f"{sha256(content)}  {part}.txt\n" for part, content in parts.items())
    assert corpus.source["digest"] == sha256(lines.encode())
    assert load_text(write_text(tmp_path, "\ufeffa\r\nb")).source["digest"] == sha256("\ufeffa\r\nb".encode())


def test_files_that_are_not_the_official_ones(tmp_path, capsys):
    """Named in a line, and in the record, which maps numbers to symbols."""
    load_mnist(write_mnist(tmp_path, 60, 12))
    assert f"{', '.join(MNIST_NAMES)} in {tmp_path}/MNIST/raw: not the official MNIST" in capsys.readouterr().out
    corpus = load_characters(write_parts(tmp_path, train=" t h e _ <unk> \n", valid="t\n", test="h\n"))
    assert capsys.readouterr().out.startswith("train.txt, valid.txt, test.txt in ")
    assert json.loads(json.dumps(corpus.source)) == {"digest": corpus.source["digest"], "official": False,
                                                     "path": str(tmp_path), "vocabulary": corpus.vocabulary}
    assert corpus.vocabulary == ["t", "h", "e", "_", "<unk>", "<eos>"]


def test_a_collected_record_keeps_the_vocabulary(tmp_path):
    """The places of a machine are cut, symbols that look like a path are not."""
    symbols = ["/", "\\", '"', "=", "//", "\n", "a"]
    record = {"path": str(tmp_path / "mine"), "vocabulary": symbols}
    assert json.loads(ABSOLUTE.sub("", json.dumps(record, indent=2))) == {"path": "mine", "vocabulary": symbols}


LANGUAGE = ("language_nvar", *tiny("language_nvar"), "--log-interval", "1")


@pytest.fixture
def begun(main, tmp_path, penn_folder):
    """The folder of a run that was started with a relative --data."""
    shutil.copytree(penn_folder, tmp_path / "mine")
    return main(*LANGUAGE, "--data", "mine")[1]


def test_a_run_goes_on_with_the_same_data_only(begun, main, tmp_path):
    (tmp_path / "mine" / "pennchar" / "train.txt").write_text(fake_text(50, 7))
    before = files_below(begun)
    with pytest.raises(UserError, match=f"this run was started on other data than {tmp_path / 'mine'} holds") as error:
        main("language_nvar", "--resume", begun, "--epochs", "2")
    assert error.value.status == 1
    assert files_below(begun) == before


def test_a_relative_folder_is_found_from_elsewhere(begun, main, capsys, tmp_path, monkeypatch):
    """The absolute path stands in config.json; data that moved are named anew."""
    config = json.loads((begun / "config.json").read_text())
    assert config["options"]["data"] == {"value": str(tmp_path / "mine"), "origin": "typed"}
    assert config["data"]["path"] == str(tmp_path / "mine")
    assert config["data"]["vocabulary"] == load_characters(tmp_path / "mine").vocabulary
    elsewhere = tmp_path / "else" / "where"
    elsewhere.mkdir(parents=True)
    monkeypatch.chdir(elsewhere)
    assert flags_of("--resume", begun).data == tmp_path / "mine"
    (tmp_path / "mine").rename(tmp_path / "moved")
    result, _ = main("language_nvar", "--resume", begun, "--data", "../../moved", "--epochs", "2")
    assert result["data"] == {"digest": config["data"]["digest"], "official": False}
    assert list(elsewhere.iterdir()) == []


def test_a_home_folder_is_spelled_out(monkeypatch, tmp_path):
    """The shell expands `--data ~/data`, and leaves `--data=~/data` to us."""
    monkeypatch.setenv("HOME", str(tmp_path))
    args = flags_of("--data=~/data", "--save=~/runs")
    assert (args.data, args.save) == (tmp_path / "data", tmp_path / "runs")


def flags_of(*typed):
    module = module_of("language_nvar")
    return flags.parse(typed, "language_nvar", module.__doc__, module.DEFAULTS, module.PAPER, language)


def test_a_run_of_before_goes_on(begun, main):
    """Its record has no digest and no --text."""
    config = json.loads((begun / "config.json").read_text())
    del config["data"], config["options"]["text"]
    (begun / "config.json").write_text(json.dumps(config))
    result, _ = main("language_nvar", "--resume", begun, "--epochs", "2")
    assert result["data"]["official"] is False


@pytest.mark.parametrize(("text", "unit", "other"), [("t h e _ c a t \n", "character", "symbol"),
                                                     ("the cat sat <unk> \n", "symbol", "character")])
def test_words_are_not_called_characters(main, capsys, tmp_path, text, unit, other):
    write_parts(tmp_path, train=text * 60, valid=text * 20, test=text * 20)
    result, _ = main(*LANGUAGE, "--data", tmp_path)
    said = capsys.readouterr().out
    assert said.count(f"bits per {unit}") == 2                                        # validation, test
    assert f"bits per {other}" not in said
    assert "not the official Penn Treebank; the result says so" in said
    assert result[f"test_bits_per_{unit}"] == pytest.approx(result["test_loss"] / math.log(2))
    assert f"test_bits_per_{other}" not in result
    assert result["data"]["official"] is False


def test_a_run_of_ones_own_text(main, capsys, tmp_path):
    """A language in which b follows a, learned."""
    own = write_text(tmp_path, "ab\n" * 4000)
    result, folder = main("language_expalpha", *tiny("language_expalpha"), "--text", "own.txt", "--lr", "0.05")
    said = capsys.readouterr().out
    assert "own.txt: 12,000 characters, 3 different; 10,800 to train on, 600 to validate, 600 to test" in said
    assert "bits per character" in said
    assert result["test_bits_per_character"] < 0.8                  # log2 3 = 1.585 without learning
    assert result["data"] == {"digest": sha256(own.read_bytes()), "official": False}
    config = json.loads((folder / "config.json").read_text())
    assert config["data"] == {**result["data"], "path": str(own), "vocabulary": ["\n", "a", "b"]}


@pytest.mark.parametrize(("text", "typed", "said"), [
    ("ab" * 10, (), "the 1 symbols of the valid text are too few for 10 parallel streams; it needs a longer text"),
    ("ab" * 500, ("--batch", "600"), "the 900 symbols of the train text are too few for 600 parallel streams; choose"),
    ("ab" * 500, ("--data", "."), "--text FILE takes the place of --data FOLDER; leave one of them out"),
    ("", (), "the 0 symbols of the train text are too few")])
def test_a_text_that_does_not_do(main, tmp_path, text, typed, said):
    write_text(tmp_path, text)
    with pytest.raises(UserError, match=said):
        main(*LANGUAGE, "--text", "own.txt", *typed)
    assert not (tmp_path / "saves").exists()


def test_streams_by_hand():
    streams = parallel_streams(torch.arange(11), 3)
    assert streams.tolist() == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]


@pytest.mark.parametrize(("length", "bptt"), [(11, 5), (10, 5), (3, 5), (7, 1), (6, 5)])
def test_segments_cover_every_symbol_once(length, bptt):
    streams = parallel_streams(torch.arange(2 * length), 2)
    inputs, targets = [], []
    for symbols, target in segments(streams, bptt):
        assert 1 <= len(symbols) <= bptt
        inputs.append(symbols)
        targets.append(target.view(-1, 2))
    assert torch.equal(torch.cat(inputs), streams[:-1])
    assert torch.equal(torch.cat(targets), streams[1:])


@pytest.mark.skipif("STAIR_DATA" not in os.environ, reason="STAIR_DATA names no folder with the real files")
def test_real_files():
    folder = Path(os.environ["STAIR_DATA"])
    corpus = load_characters(folder)
    assert len(corpus.vocabulary) == 50
    assert (corpus.source["official"], corpus.unit) == (True, "character")
    assert (len(corpus.train), len(corpus.valid), len(corpus.test)) == (5_017_483, 393_043, 442_424)
    train, valid, test = load_mnist(folder)
    assert [len(part) for part in (train, valid, test)] == [50_000, 10_000, 10_000]
    assert (train.source["official"], train.classes) == (True, 10)
    digits = torch.bincount(torch.cat((train.labels, valid.labels)))
    assert digits.tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert test.labels[:5].tolist() == [7, 2, 1, 0, 4]
