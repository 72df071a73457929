"""The house rules: who may import whom, and what is installed."""

import ast
import runpy
import sys
import types
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import gptcore

ROOT = Path(__file__).parents[1]
ROOMS = {"kernels", "gptcore", "bench", "tests", "train"}
ALLOWED = {
    "kernels": {"kernels"},
    "gptcore": {"gptcore", "kernels"},
    "bench": {"bench", "gptcore", "kernels"},
    "train": {"gptcore"},
}
KERNELS_NEED = {"torch", "triton", "numpy"}
NEWER = {"tomllib"}  # of the standard library, from Python 3.11 on


def imports(path: Path) -> set[str]:
    """Top-level names of the packages a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module.split(".")[0])
    return names


def files_of(room: str) -> list[Path]:
    """The Python files of a room."""
    return [ROOT / "train.py"] if room == "train" else sorted((ROOT / room).rglob("*.py"))


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_go_one_way(room):
    wrong = {
        str(path.relative_to(ROOT)): sorted(imports(path) & ROOMS - ALLOWED[room])
        for path in files_of(room)
        if imports(path) & ROOMS - ALLOWED[room]
    }
    assert wrong == {}


def test_kernels_need_only_torch_triton_and_numpy():
    outside = set().union(*map(imports, files_of("kernels")))
    assert outside - sys.stdlib_module_names <= KERNELS_NEED | {"kernels"}


def test_the_walk_sees_a_forbidden_import(tmp_path):
    damaged = tmp_path / "damaged.py"
    damaged.write_text("def f():\n    from gptcore.model import GPT\n    import bench.harness\n")
    assert imports(damaged) & ROOMS - ALLOWED["kernels"] == {"gptcore", "bench"}


@pytest.fixture
def shipped(monkeypatch):
    """What setup.py says: packages, and the versions of what they need and of all extras."""
    said = {}
    monkeypatch.setitem(sys.modules, "setuptools", types.SimpleNamespace(setup=said.update))
    runpy.run_path(str(ROOT / "setup.py"))
    needed, extras = (
        {needed.name: needed.specifier for needed in map(Requirement, texts)}
        for texts in (said["install_requires"], sum(said["extras_require"].values(), []))
    )
    return set(said["packages"]), needed, extras


def test_what_is_imported_is_installed(shipped):
    packages, needed, extras = shipped
    sources = [path for room in ("kernels", "gptcore") for path in files_of(room)]
    assert packages == {".".join(path.relative_to(ROOT).parts[:-1]) for path in sources}
    foreign = set().union(*map(imports, sources)) - sys.stdlib_module_names - NEWER - packages
    assert foreign - extras.keys() == needed.keys()


def test_constraints_are_versions_that_setup_takes(shipped):
    _, needed, extras = shipped
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    for name, version in (line.split("==") for line in lines if not line.startswith("#")):
        assert version in (needed | extras)[name]


def test_public_names_come_from_where_they_are_defined():
    for name in gptcore.__all__:
        home = gptcore._HOME.get(name, "config")
        assert getattr(gptcore, name).__module__ == f"gptcore.{home}"


def test_no_package_inits_under_tests():
    assert list((ROOT / "tests").rglob("__init__.py")) == []
