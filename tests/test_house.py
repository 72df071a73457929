"""The house rules: who may import whom, and what is installed."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {"kernels", "gptcore", "bench", "tests", "train"}
ALLOWED = {
    "kernels": {"kernels"},
    "gptcore": {"gptcore", "kernels"},
    "bench": {"bench", "gptcore", "kernels"},
    "train": {"gptcore"},
}
KERNELS_NEED = {"torch", "triton", "numpy"}


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
    import sys

    outside = set().union(*map(imports, files_of("kernels")))
    assert outside - sys.stdlib_module_names <= KERNELS_NEED | {"kernels"}


def test_the_walk_sees_a_forbidden_import(tmp_path):
    damaged = tmp_path / "damaged.py"
    damaged.write_text("def f():\n    from gptcore.model import GPT\n    import bench.harness\n")
    assert imports(damaged) & ROOMS - ALLOWED["kernels"] == {"gptcore", "bench"}


def test_no_package_inits_under_tests():
    assert list((ROOT / "tests").rglob("__init__.py")) == []
