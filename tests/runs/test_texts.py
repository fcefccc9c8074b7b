"""Texts: symbols and their numbers by hand, texts of one's own, and what a person is told of files that are none."""

from pathlib import Path

import pytest
import torch

from common.data import load_characters, load_text, symbols_of, text_of
from common.errors import UserError


def write_parts(folder: Path, **parts) -> Path:
    (folder / "pennchar").mkdir(exist_ok=True)
    for part, content in parts.items():
        path = folder / "pennchar" / f"{part}.txt"
        if content is None:
            path.mkdir()
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def test_tokens_by_hand(tmp_path):
    folder = write_parts(tmp_path, train=" a b _ c \n b a \n", valid=" c \n", test=" a a \n _ \n")
    corpus = load_characters(folder)
    assert corpus.vocabulary == ["a", "b", "_", "c", "<eos>"]
    assert corpus.train.tolist() == [0, 1, 2, 3, 4, 1, 0, 4]
    assert corpus.valid.tolist() == [3, 4]
    assert corpus.test.tolist() == [0, 0, 4, 2, 4]
    assert corpus.train.dtype == torch.int64


@pytest.mark.parametrize("text", ["a b\nc", "a b\nc\n", "a b\r\nc\r\n", "a b\rc\r", "  a   b\n c  \n", "a\tb\n\tc\t\n",
                                  "\ufeffa b\nc\n"])
def test_line_ends_and_blanks(tmp_path, text):
    corpus = load_characters(write_parts(tmp_path, train=text, valid="a\n", test="a\n"))
    assert [corpus.vocabulary[k] for k in corpus.train] == ["a", "b", "<eos>", "c", "<eos>"]


@pytest.mark.parametrize("symbol", [*"\u00a0\u2028\u2029\u3000\f\v\x1c\x85\u200b\ufeff"])
def test_everything_else_is_a_symbol(tmp_path, symbol):
    """Python takes most of these for blanks or line ends; the format does not."""
    corpus = load_characters(write_parts(tmp_path, train=f"a {symbol} b\n", valid="a\n", test=f"a {symbol}\n"))
    assert [corpus.vocabulary[k] for k in corpus.train] == ["a", symbol, "b", "<eos>"]
    assert corpus.unit == "character"


@pytest.mark.parametrize(("line", "unit"), [
    ("t h e _ < u n k >", "character"), ("<unk> a <eos> <s> </s>", "character"), ("é 漢", "character"),
    ("the cat", "symbol"), ("a bc <unk>", "symbol"), ("< a <> b", "symbol")])
def test_what_is_counted(tmp_path, line, unit):
    assert load_characters(write_parts(tmp_path, train=line, valid=line, test=line)).unit == unit


@pytest.mark.parametrize(("part", "content", "sentence"), [
    ("valid", "a z\n", r"valid\.txt holds the symbol 'z', which train\.txt never shows; the three files must"),
    ("test", "abc" * 999, r"test\.txt holds the symbol 'abcabc"), ("valid", None, r"valid\.txt cannot be read.*direct"),
    ("train", b"a \xff b", r"train\.txt cannot be read.*utf-8"), ("valid", b"a\0b", r"valid\.txt cannot .*zero byte")])
def test_files_that_are_wrong(tmp_path, part, content, sentence):
    folder = write_parts(tmp_path, **{"train": "a b\n", "valid": "a\n", "test": "b\n", part: content})
    with pytest.raises(UserError, match=sentence) as error:
        load_characters(folder)
    assert len(str(error.value)) < 500


def test_numbers_as_a_text_to_read():
    """A Penn Treebank text has lines and blanks; a text of one's own is shown as it is; words stand apart."""
    penn = ["t", "h", "e", "_", "<unk>", "<eos>"]
    assert text_of([0, 1, 2, 3, 4, 5, 0], penn) == "the <unk>\nt"
    assert symbols_of("the e\n", penn) == ["t", "h", "e", "_", "e", "<eos>"]
    own = ["\t", "\n", "_", "\xad", "\u3000", "<"]
    assert text_of(range(6), own) == "\t\n_\xad\u3000<"
    assert symbols_of("_\n<", own) == ["_", "\n", "<"]
    words = ["the", "cat", "<eos>"]
    assert text_of([1, 0, 2, 1], words) == "cat the \n cat"
    assert symbols_of("the cat\n cat", words) == ["the", "cat", "<eos>", "cat"]


def write_text(folder, content) -> Path:
    path = folder / "own.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_a_text_by_hand(tmp_path, capsys):
    path = write_text(tmp_path, "ba\r\nc é漢" + "x" * 13)
    corpus = load_text(path)
    assert corpus.vocabulary == ["\n", " ", "a", "b", "c", "x", "é", "漢"]
    assert corpus.train.tolist() == [3, 2, 0, 4, 1, 6, 7, *[5] * 11]
    assert corpus.valid.tolist() == corpus.test.tolist() == [5]
    assert corpus.train.dtype == torch.int64
    assert corpus.unit == "character"
    said = f"{path}: 20 characters, 8 different; 18 to train on, 1 to validate, 1 to test\n"
    assert capsys.readouterr().out == said


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


@pytest.mark.parametrize("content", [b"a\xff", "abc".encode("utf-16"), "abc".encode("utf-16-le"), b"\x1f\x8b\x08\0"])
def test_texts_that_are_none(tmp_path, content):
    with pytest.raises(UserError, match=r"own\.txt cannot be read.*--text"):
        load_text(write_text(tmp_path, content))


@pytest.mark.parametrize(("path", "said"), [
    ("nothing", "No such file"), (".", "Is a directory"), ("x" * 5000, "too long")])
def test_a_text_that_is_no_file(tmp_path, path, said):
    with pytest.raises(UserError, match=f"{said}.*--text"):
        load_text(tmp_path / path)


def test_a_text_takes_the_place_of_the_folder(tmp_path, penn_folder):
    own = write_text(tmp_path, "ab" * 20)
    assert load_characters(None, own).vocabulary == ["a", "b"]
    assert len(load_characters(penn_folder).vocabulary) > 2
    with pytest.raises(UserError, match=r"own\.txt is not a folder; a text of your own is read with --text"):
        load_characters(own)
