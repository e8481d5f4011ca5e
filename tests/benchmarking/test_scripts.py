"""The scripts of benchmarks/, which no other test starts: what they import is there."""

import ast
import importlib
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parents[2] / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_benchmark_imports_what_is_there(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ("tfdp", "trainers"):
            for alias in node.names:
                found = importlib.import_module(node.module)
                if not hasattr(found, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")
