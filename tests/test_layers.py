"""The layers of the house: nothing imports upwards, nothing imports in a circle, no import hides in a function."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = (  # a module may import from lower layers, and from what stands before it in its own
    ("common.errors", "common.stair", "common.orthogonal", "common.optim"),
    ("common.recurrence", "common.download", "common.data"),
    ("common.cells", "common.network"),
    ("common.runs.records", "common.runs.flags", "common.runs.machine",
     "common.runs.provenance", "common.runs.curves", "common.runs.progress", "common.runs.folder",
     "common.runs.run"),
    ("common.copytask", "common.smnist", "common.language"),
    tuple(sorted(path.stem for path in ROOT.glob("*_*.py"))),
    ("evidence.published", "evidence.rows", "evidence.table",
     "evidence.pictures", "evidence.launch", "evidence.pages", "evidence.__main__", "benchmarks.authors_way",
     "benchmarks.__main__"),
)


def path_of(module: str) -> Path:
    path = ROOT / Path(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


PLACES = {module: (layer, place) for layer, modules in enumerate(LAYERS) for place, module in enumerate(modules)
          if path_of(module).exists()}
ENGINES = sorted(f"common.recurrence.{path.stem}" for path in (ROOT / "common" / "recurrence").glob("[!_]*.py"))
LATE = {("common.recurrence.triton_engine", "common.recurrence.triton_kernels")}  # triton may be missing


def imports(module: str) -> list[tuple[str, bool]]:
    """(the project's module that `module` imports, whether at the top of its file)."""
    found, tree = [], ast.parse(path_of(module).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [full if path_of(full := f"{node.module}.{alias.name}").exists() else node.module
                     for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            names = [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)]
        found += [(name, node in tree.body) for name in names if path_of(name).exists()]
    return found


def place_of(module: str) -> tuple[int, int]:
    return PLACES["common.recurrence" if module.startswith("common.recurrence") else module]


@pytest.mark.parametrize("module", [*PLACES, *ENGINES])
def test_imports_go_down(module):
    for imported, at_the_top in imports(module):
        assert at_the_top or (module, imported) in LATE, f"{module} imports {imported} in a function"
        if not (module.startswith("common.recurrence") and imported.startswith("common.recurrence")):
            assert place_of(imported) < place_of(module), f"{module} imports {imported}, which lies above it"


def test_the_engines_form_no_circle():
    left = {module: {name for name, _ in imports(module) if name.startswith("common.recurrence")}
            for module in ["common.recurrence", *ENGINES]}
    while left:
        free = [module for module, needs in left.items() if not needs & left.keys()]
        assert free, f"a circle among {', '.join(sorted(left))}"
        for module in free:
            del left[module]


def test_every_module_has_its_place():
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts) for room in ("common", "evidence", "benchmarks")
               for path in (ROOT / room).rglob("*.py") if path.name != "__init__.py"}
    assert modules <= {*PLACES, *ENGINES}


@pytest.mark.parametrize("task", ["copytask", "smnist", "language"])
def test_a_training_loop_fits_a_screen(task):
    """30 lines from def to end, docstring not counted: what is no part of the algorithm stands beside it."""
    tree = ast.parse(path_of(f"common.{task}").read_text(encoding="utf-8"))
    train, = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train")
    docstring = train.body[0]
    assert train.end_lineno - train.lineno - (docstring.end_lineno - docstring.lineno) <= 30


@pytest.mark.parametrize("script", LAYERS[5])
def test_a_script_reads_from_top_to_bottom(script):
    """Docstring, DEFAULTS, PAPER, main; short; its name is the one its docstring's commands use."""
    source = (ROOT / f"{script}.py").read_text(encoding="utf-8")
    tree = ast.parse(source)
    assert ast.get_docstring(tree)
    assert source.index("\nDEFAULTS = ") < source.index("\nPAPER = ") < source.index("\ndef main(")
    assert len(source.splitlines()) <= 120
    assert f"python {script}.py" in ast.get_docstring(tree)
