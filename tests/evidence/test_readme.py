"""The commands people are told to type: every `python ...` of the README and of the docstrings is parsed."""

import ast
import contextlib
import importlib
import io
import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import LOOPS, ROOT, SCRIPTS, task_of

from common.errors import UserError
from common.runs import flags

README = ROOT / "README.md"
PAGES = [README, ROOT / "data" / "README.md", ROOT / "tests" / "README.md", *sorted((ROOT / "results").glob("*.md"))]
TOOLS = {"pip", "pytest", "venv", "ruff"}                   # not ours to check


def python_commands(text: str) -> list[str]:
    """Commands that start with python, from fenced blocks and from inline code, one line each."""
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`(python3? [^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    lines = [line for block in blocks for line in re.sub(r"\\\n\s*", " ", block).splitlines()] + inline
    pieces = [piece.strip() for line in lines for piece in re.split(r"&&|;|\|", line.split(" #")[0])]
    return [piece.removeprefix("$ ") for piece in pieces
            if re.match(r"(\$ )?(\w+=\S+ )*(\S*/)?python3?(\.\d+)? ", piece)]


def arguments_of(command: str) -> list[str]:
    words = shlex.split(command, comments=True)
    return words[next(i for i, w in enumerate(words) if re.fullmatch(r"(\S*/)?python3?(\.\d+)?", w)) + 1:]


def check(command: str) -> None:
    """Raises where the command could not be typed as it stands."""
    target, *arguments = arguments_of(command)
    if target == "-m":
        module, *arguments = arguments
        if module not in TOOLS:
            check_module(module, arguments)
        return
    script = Path(target).stem
    assert (ROOT / target).exists(), command
    if "--resume" in arguments:                             # the folder is the reader's
        at = arguments.index("--resume")
        assert len(arguments) > at + 1, command
        del arguments[at:at + 2]
    if "--help" in arguments or "-h" in arguments:
        return
    module = importlib.import_module(target.removesuffix(".py").replace("/", "."))
    task = LOOPS[task_of(script)] if script in SCRIPTS else module
    flags.parse(arguments, script, module.__doc__, module.DEFAULTS, module.PAPER, task)


def check_module(name: str, arguments: list[str]) -> None:
    """`python -m NAME`: it is there, and its --help knows every flag that is used."""
    folder = ROOT / name.replace(".", "/")
    module = importlib.import_module(f"{name}.__main__" if folder.is_dir() else name)
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    assert stop.value.code == 0
    for word in arguments:
        flag = word.split("=")[0]
        if re.fullmatch(r"--?[A-Za-z][\w-]*", flag):
            assert re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", out.getvalue()), f"{name} has no {flag}"


COMMANDS = [(str(page.relative_to(ROOT)), command) for page in PAGES
            for command in python_commands(page.read_text(encoding="utf-8"))]
SOURCES = sorted([*ROOT.glob("*.py"),
                  *(path for room in ("common", "evidence", "benchmarks", "examples", "tests/robustness")
                    for path in (ROOT / room).rglob("*.py"))])
DOCSTRINGS = [(str(path.relative_to(ROOT)), line.strip().split("   ")[0]) for path in SOURCES
              for line in (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").splitlines()
              if re.match(r"\s+python ", line)]


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_command_of_a_page(page, command):
    check(command)


@pytest.mark.parametrize(("source", "command"), DOCSTRINGS)
def test_command_of_a_docstring(source, command):
    check(re.sub(r"\[[^\]]*\]", "", command))               # what is in [ ] may be left out


def test_the_published_commands_stand_in_the_readme():
    commands = {shlex.join(arguments_of(c)) for page, c in COMMANDS if page == "README.md"}
    for published in (
        "sMNIST_nvar.py --net-type RNN --nvar log2n --permute --lr 5e-5 --nhid 512 --alpha 0.9 --rinit random --cuda",
        "sMNIST_nvar.py --net-type expRNN --nvar expn --nhid 512 --permute --lr 5e-4 --lr_orth 5e-5 --alpha 0.99 "
        "--rinit cayley --cuda",
        "sMNIST_nvar.py --net-type nnRNN --nvar n2 --nhid 512 --permute --lr 2e-4 --lr_orth 2e-5 --alpha 0.99 "
        "--alam 0.1 --Tdecay 1e-4 --rinit cayley --cuda",
    ):
        assert published in commands


@pytest.mark.parametrize("page", [str(p.relative_to(ROOT)) for p in PAGES])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for link, anchor in re.findall(r"\]\(([^)#]+)(?:#([^)]*))?\)", text):
        target = (ROOT / page).parent / link
        assert link.startswith("http") or target.exists(), link
        if anchor and not link.startswith("http"):
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, anchor


def test_the_readme_names_every_script():
    text = README.read_text(encoding="utf-8")
    assert all(f"{script}.py" in text for script in SCRIPTS)
    assert "@@" not in text                                 # no gap left to be filled in


def test_this_test_finds_commands():
    text = "\n```\nA=1 v/bin/python a.py --x \\\n  --y  # why\npython3 -m venv v && v/bin/pip x\n```\n`python b.py`"
    assert [shlex.split(c) for c in python_commands(text)] == [
        ["A=1", "v/bin/python", "a.py", "--x", "--y"], ["python3", "-m", "venv", "v"], ["python", "b.py"]]
    with pytest.raises(UserError, match="there is no flag --nhdi"):
        check("python copytask_nvar.py --nhdi 3")
    with pytest.raises(AssertionError):
        check("python copytask.py --nhid 3")
    with pytest.raises(AssertionError, match="has no --warp"):
        check("python -m evidence.pictures --warp")


def requirements(name: str) -> list[str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and line[0] not in "#-"]


def test_pyproject_says_what_the_requirements_say():
    """For `uv sync` and for `pip install -r`; nothing is packaged."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["dependencies"] == requirements("requirements.txt")
    pinned = project["tool"]["uv"]["constraint-dependencies"]
    assert pinned == requirements("constraints.txt")[:len(pinned)]
    assert len(pinned) == len(requirements("requirements.txt"))
    assert "build-system" not in project


def test_the_version_is_one():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    version = re.escape(project["version"])
    assert re.search(rf"^version: {version}$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.M)
    assert re.search(rf"^## {version} \(", (ROOT / "CHANGES.md").read_text(encoding="utf-8"), re.M)
    oldest = project["requires-python"].removeprefix(">=")
    assert f"Python {oldest} or newer" in README.read_text(encoding="utf-8")
    assert sys.version_info >= tuple(map(int, oldest.split(".")))
