"""A C++ source of a line as a library in the user's cache: what is kept, what is loaded, what is said."""

import os
import shutil
import stat
import subprocess
import sys

import pytest
from conftest import ROOT

from common.recurrence import native_build
from common.recurrence.native_build import Unavailable, cache_folder, load_or_build

pytestmark = pytest.mark.skipif(os.name == "nt" or shutil.which("g++") is None, reason="g++ on a POSIX system")
only_root = pytest.mark.skipif(getattr(os, "getuid", int)() != 0, reason="only root can make files of other users")
ANOTHER = 12345


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A source, and a cache of its own."""
    (tmp_path / "answer.cpp").write_text('extern "C" long answer() { return ANSWER; }\n')
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "g++")
    native_build.say_once.cache_clear()
    return tmp_path


@pytest.fixture
def build(place):
    """build(answer) → what the library answers. `tried` lists the trials; `trial.wrong` is what they find."""
    def built(answer=42):
        return load_or_build(place / "answer.cpp", [f"ANSWER={answer}"], trial).answer()

    def trial(path):
        built.tried.append(path)
        return built.wrong
    built.tried, built.wrong = [], None
    return built


def kept(place):
    """What the cache holds beside its lock."""
    folder = place / "cache" / "stair-rnn"
    return sorted(path for path in folder.iterdir() if path.name != "lock") if folder.is_dir() else []


def test_compiled_once_and_tried_once(build, place, capsys):
    assert [build(), build(), build(7), build()] == [42, 42, 7, 42]
    assert len(build.tried) == len(kept(place)) == 2
    assert all(path.suffix == ".so" and stat.S_IMODE(path.stat().st_mode) == 0o700 for path in kept(place))
    first, *then = capsys.readouterr().err.splitlines()
    assert first == "stair: compiling the native engine, once on this machine: ten seconds, or thirty where it is busy"
    assert set(then) == {"stair: compiled and tested in 0 s"}


def test_what_a_library_is_made_from_tells_it_apart(build, place, monkeypatch):
    build()
    for change in (lambda: monkeypatch.setenv("CXX", "g++ -O1"),
                   lambda: (place / "answer.cpp").write_text('extern "C" long answer() { return ANSWER + 0; }\n'),
                   lambda: monkeypatch.setattr("platform.machine", lambda: "another processor")):
        change()
        assert build() == 42
    assert len(kept(place)) == 4


def test_what_is_not_right_is_not_kept(build, place):
    build.wrong = "it says 41"
    with pytest.raises(Unavailable, match="the compiled library is not right: it says 41"):
        build()
    assert kept(place) == []


def test_damage_is_compiled_again(build, place):
    build()
    healthy, = kept(place)
    code = healthy.read_bytes()
    for damaged in (b"", code[:-1], code + b"x", code[:5000] + bytes([code[5000] ^ 1]) + code[5001:]):
        healthy.unlink()                                             # it is loaded here
        healthy.write_bytes(damaged)
        healthy.chmod(0o700)
        assert build() == 42
    assert len(build.tried) == 5
    assert kept(place) == [healthy]


@pytest.mark.parametrize("how", ["open", "group", "link", pytest.param("foreign", marks=only_root)])
def test_only_files_of_our_own_are_loaded(build, place, how):
    """A planted library has the right name and the right digest, but others could have written it."""
    build()
    planted, = kept(place)
    if how == "link":
        planted.symlink_to(planted.rename(place / planted.name))
    elif how == "foreign":
        os.chown(planted, ANOTHER, ANOTHER)
    else:
        planted.chmod(0o707 if how == "open" else 0o770)
    assert build() == 42
    assert len(build.tried) == 2                                     # not loaded but compiled again
    found, = kept(place)
    assert (found.is_symlink(), found.stat().st_uid, stat.S_IMODE(found.stat().st_mode)) == (False, os.getuid(), 0o700)


PROGRAM = """
import os, sys
from pathlib import Path
from common.recurrence.native_build import load_or_build
def trial(path):
    with open(sys.argv[1] + "/trials", "a") as file:
        file.write("x")
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), 9)
print(load_or_build(Path(sys.argv[1]) / "answer.cpp", ["ANSWER=42"], trial).answer())
"""


def process(place, how):
    return subprocess.Popen([sys.executable, "-c", PROGRAM, place, how], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_two_processes_at_once_compile_once(place):
    assert [p.communicate(timeout=60)[0] for p in (process(place, "whole"), process(place, "whole"))] == ["42\n"] * 2
    assert (place / "trials").read_text() == "x"


def test_a_killed_build_is_cleared_away_by_the_next(build, place):
    assert process(place, "killed").wait(timeout=60) == -9
    assert [path.name.startswith("build-") for path in kept(place)] == [True]
    assert build() == 42
    assert [path.suffix for path in kept(place)] == [".so"]


def alone(build, capsys):
    """The reason why the library was compiled for this process alone."""
    assert build() == 42
    line = capsys.readouterr().err.splitlines()[-1]
    before, _, reason = line.partition(", because ")
    assert before == "stair: the native engine was compiled for this process alone"
    return reason


@pytest.mark.parametrize("mode", [0o777, 0o755, 0o500])
def test_a_folder_of_our_own_with_another_mode_is_set_right(build, place, mode):
    build()
    (place / "cache" / "stair-rnn").chmod(mode)
    assert build() == 42
    assert len(build.tried) == 1
    assert stat.S_IMODE((place / "cache" / "stair-rnn").stat().st_mode) == 0o700


def test_all_that_is_made_is_private(build, place, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(place / "home"))
    (place / "home").mkdir()
    build()
    for made in (".cache", ".cache/stair-rnn"):
        assert stat.S_IMODE((place / "home" / made).stat().st_mode) == 0o700
    monkeypatch.setenv("XDG_CACHE_HOME", "~/elsewhere")
    assert cache_folder() == place / "home" / "elsewhere" / "stair-rnn"


@only_root
@pytest.mark.parametrize("made", [(), (".cache",), (".cache", ".cache/stair-rnn")])
def test_nothing_is_made_in_the_home_of_another_user(build, place, monkeypatch, capsys, made):
    home = place / "home"
    for folder in (home, *(home / name for name in made)):
        folder.mkdir(mode=0o755)
        os.chown(folder, ANOTHER, ANOTHER)
    before = sorted(home.rglob("*"))
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(home))
    assert alone(build, capsys) == f"{[home, *(home / name for name in made)][-1]} belongs to another user"
    assert sorted(home.rglob("*")) == before


@only_root
def test_a_shared_place_with_the_sticky_bit_is_nobodys_home(build, place):
    (place / "cache").mkdir()
    os.chown(place / "cache", ANOTHER, ANOTHER)
    (place / "cache").chmod(0o1777)
    build()
    assert len(kept(place)) == 1


@pytest.mark.parametrize(("link", "reason"), [("cache", "cache is a link to nowhere"),
                                              ("cache/stair-rnn", "cache/stair-rnn is a link to nowhere")])
def test_a_link_to_nowhere_is_said_as_such(build, place, capsys, link, reason):
    (place / link).parent.mkdir(exist_ok=True)
    (place / link).symlink_to(place / "nowhere")
    assert alone(build, capsys) == f"{place}/{reason}"
    assert not (place / "nowhere").exists()


def test_a_link_to_a_folder_of_our_own_is_followed(build, place):
    (place / "scratch").mkdir()
    (place / "cache").mkdir()
    (place / "cache" / "stair-rnn").symlink_to(place / "scratch")
    build()
    assert len(kept(place)) == 1


def test_a_cache_that_cannot_be_written(build, place, capsys):
    (place / "cache").write_text("a file")
    assert alone(build, capsys) == f"{place}/cache/stair-rnn cannot be written to (Not a directory)"


@pytest.fixture
def compiler(place, monkeypatch):
    """compiler(line): g++ after a line of shell, in which $* is what was typed."""
    def made(line):
        script = place / "compiler"
        noted = f'[ "$*" = --version ] || echo "$*" >> {place}/typed'
        script.write_text(f'#!/bin/sh\n{noted}\n{line}\nexec g++ "$@"\n')
        script.chmod(0o700)
        monkeypatch.setenv("CXX", str(script))
    return made


@pytest.mark.parametrize(("refused", "compilations"), [("avoid-fma-max-bits", 2), ("march", 4), ("mno-such", 1)])
def test_a_refused_flag_is_left_out(build, place, compiler, refused, compilations):
    """Some processors know no -march, and then no -mcpu here either."""
    compiler(f'case "$*" in *{refused}*|*mcpu*) '
             f'echo "cc: error: unrecognized command-line option -{refused}=native -mcpu=native" >&2; exit 1;; esac')
    assert build() == 42
    assert len((place / "typed").read_text().splitlines()) == compilations


@pytest.mark.parametrize(("end", "told"), [
    ("kill -9 $$", "signal 9"), ("kill -2 $$", "signal 2"),
    ('echo "cc: fatal error: Killed signal terminated program cc1plus" >&2; exit 1', "Killed signal terminated"),
    ('echo " /usr/lib/cc1plus -march=znver4 --param=avoid-fma-max-bits=0" >&2; exit 1', "znver4")])
def test_a_compiler_that_was_killed_keeps_nothing(build, place, compiler, end, told):
    """It would be a slow library for good. The next run tries again."""
    compiler(f'case "$*" in *march*) {end};; esac')
    with pytest.raises(Unavailable, match=f"could not compile answer.cpp: .*{told}"):
        build()
    assert kept(place) == []
    compiler("")
    assert build() == 42
    assert "-march=native" in (place / "typed").read_text().splitlines()[-1]


@pytest.mark.parametrize(("line", "told"), [
    ("echo Schiefgelaufen >&2; exit 1", "could not compile answer.cpp: Schiefgelaufen$"),
    ("echo one >&2; echo 'x: error: two' >&2; exit 1", "could not compile answer.cpp: x: error: two$"),
    ("exit 3", "could not compile answer.cpp: exit status 3$"),
    ("exit 0", "could not compile answer.cpp: it wrote no library$"),
    ('for last; do :; done; echo text > "$last"; exit 0', "the compiled library does not load")])
def test_a_compiler_that_makes_no_library_is_one_sentence(build, place, compiler, line, told):
    compiler(f'[ "$*" = --version ] || {{ {line}; }}')
    with pytest.raises(Unavailable, match=told) as error:
        build()
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(("variables", "told"), [
    ({"CXX": "no-such-compiler"}, "CXX is 'no-such-compiler', which is not a program"),
    ({"CXX": '""'}, "which is not a program"), ({"CXX": "g++ '"}, "which is not a command: no closing quotation"),
    ({"CXX": "g++ \\"}, "which is not a command: no escaped character"),
    ({"CXX": "", "PATH": "/nowhere"}, r"no C\+\+ compiler found"), ({"CXX": "NO_PROGRAM"}, "--version' failed")])
def test_what_is_no_compiler_is_one_sentence(build, place, monkeypatch, variables, told):
    (place / "NO_PROGRAM").write_text("\0")
    (place / "NO_PROGRAM").chmod(0o700)
    for name, value in variables.items():
        monkeypatch.setenv(name, value.replace("NO_PROGRAM", str(place / "NO_PROGRAM")))
    with pytest.raises(Unavailable, match=told):
        build()
