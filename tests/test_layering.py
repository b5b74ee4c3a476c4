"""The shape of the code: imports only go down, files stay short, and reading data runs no code."""

import ast
import functools
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = sorted((ROOT / "seqlab").rglob("*.py"))
FOLDERS = ("seqlab", "tests", "benchmarks", "configs", "docs")
FILES = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]

#: A file imports its own floor and lower ones; two names on one floor do not know each other.
FLOORS = (
    ("errors", "heap", "launch"),
    ("settings",),
    ("tasks",),
    ("parallel",),
    ("kernels",),
    ("layers",),
    ("conformance", "models"),
    ("train", "infer"),
    ("linearize",),
    ("doctor", "evaluate", "experiment", "plan"),
    ("compare",),
    ("bench",),
    ("__init__",),
    ("cli",),
    ("__main__",),
)
FLOOR = {name: height for height, names in enumerate(FLOORS) for name in names}
NEVER = {("linearize", "infer")}

FORBIDDEN_NAMES = {"utils", "common", "helpers", "base", "misc", "factory", "manager"}
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml"}
#: Config files and mixer files are Python that a user names: only these two may run them.
RUNS_USER_FILES = {"seqlab/train/config.py", "seqlab/layers/registry.py"}


@functools.cache
def tree(file: pathlib.Path) -> ast.Module:
    return ast.parse(file.read_text("utf-8"))


def place(file: pathlib.Path) -> str:
    """The name under which FLOORS knows a file of the package."""
    first = file.relative_to(ROOT / "seqlab").parts[0]
    return first.removesuffix(".py")


def imports(file: pathlib.Path) -> set[str]:
    """What a file imports of seqlab, anywhere in it, by the names of FLOORS."""
    found = set()
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            if node.module == "seqlab":
                found |= {f"seqlab.{alias.name}" for alias in node.names}
            else:
                found.add(node.module)
    parts = (name.split(".") for name in found if name.split(".")[0] == "seqlab")
    return {p[1] if len(p) > 1 and p[1] in FLOOR else "__init__" for p in parts}


def name_of(file: pathlib.Path) -> str:
    return file.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("file", PACKAGE, ids=name_of)
def test_imports_go_down(file):
    here = place(file)
    for there in imports(file) - {here}:
        assert FLOOR[there] < FLOOR[here], f"{here} must not import {there}"
        assert (here, there) not in NEVER, f"{here} must not import {there}"


def test_no_file_has_a_name_that_says_nothing():
    assert {f.stem for f in FILES}.isdisjoint(FORBIDDEN_NAMES)
    assert {p.name for f in FILES for p in f.parents}.isdisjoint(FORBIDDEN_NAMES)


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_files_and_functions_are_short(file):
    assert len(file.read_text("utf-8").splitlines()) <= 400
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= 60, f"{node.name} has {length} lines"


@pytest.mark.parametrize("file", PACKAGE, ids=name_of)
def test_no_data_can_run_code(file):
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            roots = {(module or alias.name).split(".")[0] for alias in node.names}
            assert roots.isdisjoint(UNPICKLERS)
            assert "runpy" not in roots or name_of(file) in RUNS_USER_FILES
        elif isinstance(node, ast.Call):
            called = getattr(node.func, "id", getattr(node.func, "attr", ""))
            assert called not in ("eval", "exec") or isinstance(node.func, ast.Attribute)
            assert called != "exec_module" or name_of(file) in RUNS_USER_FILES
            allowed = [k for k in node.keywords if k.arg == "allow_pickle"]
            assert all(isinstance(k.value, ast.Constant) and not k.value.value for k in allowed)


def test_every_mixer_is_one_file():
    folder = ROOT / "seqlab" / "layers" / "mixers"
    assert [p for p in folder.iterdir() if p.is_dir() and p.name != "__pycache__"] == []


MIXERS = ROOT / "seqlab" / "layers" / "mixers"
NAMES = {file.stem for file in MIXERS.glob("*.py")} - {"__init__"}
KERNELS = {path.name for path in (ROOT / "seqlab" / "kernels").iterdir()}
#: The maps of published checkpoints speak of mixers, and what puts one in the place of another;
#: nothing else does but a mixer's own file.
SPEAK = (ROOT / "seqlab" / "models" / "families", ROOT / "seqlab" / "linearize")


@pytest.mark.parametrize("file", [f for f in PACKAGE if f.parent not in SPEAK], ids=name_of)
def test_a_mixer_is_named_in_its_own_file_alone(file):
    spoken, imported = set(), set()
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            spoken |= {node.value} & (NAMES - KERNELS)
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "seqlab.layers.mixers":
                imported |= {alias.name for alias in node.names}
            elif node.module.startswith("seqlab.layers.mixers."):
                imported.add(node.module.rpartition(".")[2])
    assert imported | spoken <= ({file.stem} if file.parent == MIXERS else set())


@pytest.mark.parametrize("file", sorted(MIXERS.glob("*.py")), ids=lambda file: file.stem)
def test_a_mixer_is_a_short_file_without_loops_over_time(file):
    assert len(file.read_text("utf-8").splitlines()) <= 150
    for node in ast.walk(tree(file)):
        called = getattr(node, "attr", getattr(node, "id", ""))
        assert called not in ("scan", "fori_loop", "while_loop", "associative_scan", "custom_vjp")
