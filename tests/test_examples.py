"""Each file of `examples/` runs as a user would run it; it ends in an assert of its own."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples"
FILES = sorted(FOLDER.glob("*.py"))


def imported(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_example(file: Path, tmp_path: Path) -> None:
    needed = imported(file) | ({"gflowgr._core"} if "numpy_trie" in file.read_text("utf-8") else set())
    missing = sorted(name for name in needed if importlib.util.find_spec(name) is None)
    if missing:
        reason = (
            f"{', '.join(missing)} not installed: pip install 'gflowgr[examples]', see examples/README.md"
        )
        if os.environ.get("GFLOWGR_STRICT") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, str(file)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d", done.stdout), f"{file.name} shows no figure"
    assert not any(tmp_path.iterdir()), f"{file.name} leaves files behind"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_an_example_is_short_and_checks_something(file: Path) -> None:
    code = file.read_text("utf-8")
    assert sum(1 for line in code.splitlines() if line.strip()) <= 80
    assert any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(code)))
    assert f"python examples/{file.name}" in code


def test_the_list_names_every_example() -> None:
    listed = re.findall(r"^\| `(\w+\.py)` \|", (FOLDER / "README.md").read_text("utf-8"), re.MULTILINE)
    assert sorted(listed) == [file.name for file in FILES]
