#!/usr/bin/env bash
# Installs the package in each way a user may, every time from a clean copy of the sources, and tries the result
# from outside of them. PYTHON names the interpreter; GFLOWGR_STRICT=1 makes compiler warnings errors.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

work=$(mktemp -d)
readonly work
trap 'rm -rf "$work"' EXIT
readonly python=$work/venv/bin/python
readonly wheel_limit=$((2 * 1024 * 1024))

say() { printf '\n-- %s\n' "$*"; }

pip() { "$python" -m pip --disable-pip-version-check "$@" --quiet; }

# All that git would track: no build directory, no compiled core.
mkdir "$work/snapshot"
git ls-files -z --cached --others --exclude-standard --deduplicate |
  while IFS= read -r -d '' file; do
    if [[ -e $file ]]; then printf '%s\0' "$file"; fi
  done |
  tar --null --files-from=- -cf - | tar -C "$work/snapshot" -xf -

# Prints the path of a new copy of the sources.
copy_of_sources() {
  local copy
  copy=$(mktemp -d "$work/sources.XXXX")
  cp -R "$work/snapshot/." "$copy"
  echo "$copy"
}

remove() { pip uninstall --yes gflowgr; }

# try LOCATION: imports the package, which has to lie under LOCATION, and runs a compiled op.
try() {
  (cd "$work" && "$python" -W error - "$1") <<'PYTHON'
import sys
from pathlib import Path

import torch

import gflowgr
import gflowgr.kernels
from gflowgr import PrefixTrie, _core, ops

for module in (gflowgr, gflowgr.kernels, _core):
    location = Path(module.__file__).resolve()
    if not location.is_relative_to(Path(sys.argv[1]).resolve()):
        sys.exit(f"{module.__name__} was imported from {location}, not from under {sys.argv[1]}")
trie = PrefixTrie([[0, 1], [0, 4], [3, 2]])
logits, nodes = torch.randn(3, 5), torch.tensor([0, 1, 2])
compiled = ops.trie_log_softmax(logits, nodes, trie, backend="cpp")
torch.testing.assert_close(compiled, ops.trie_log_softmax(logits, nodes, trie, backend="torch"))
print(f"gflowgr {gflowgr.__version__} works from {Path(gflowgr.__file__).parent}")
PYTHON
}

# complete WHEEL: every Python file, stub and marker of the sources is in it, under the limit of size.
complete() {
  local size
  size=$(stat -c %s "$1")
  echo "$(basename "$1"): $((size / 1024)) KiB"
  ((size < wheel_limit)) || { echo "the wheel has $size bytes, needs less than $wheel_limit" >&2; exit 1; }
  "$python" - "$1" "$work/snapshot" <<'PYTHON'
import sys
import zipfile
from pathlib import Path

wheel, sources = zipfile.ZipFile(sys.argv[1]), Path(sys.argv[2])
expected = {"gflowgr/py.typed", "gflowgr/_core.pyi"}
for folder, package in (("gflowgr", "gflowgr"), ("kernels", "gflowgr/kernels")):
    for file in (sources / folder).rglob("*.py"):
        expected.add(f"{package}/{file.relative_to(sources / folder).as_posix()}")
names = set(wheel.namelist())
missing = expected - names
if missing:
    sys.exit(f"the wheel lacks {sorted(missing)}")
foreign = {name for name in names - expected if ".dist-info/" not in name and not name.startswith("gflowgr/")}
if foreign:
    sys.exit(f"the wheel holds {sorted(foreign)}, which belong to no package")
if not any(name.endswith("/LICENSE") for name in names):
    sys.exit("the wheel lacks the licence")
PYTHON
}

"${PYTHON:-python3}" -m venv "$work/venv"
site_packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("platlib"))')
readonly site_packages

say "pip install . (isolated build, with the runtime requirements)"
SECONDS=0
pip install --constraint constraints.txt "$(copy_of_sources)"
echo "took ${SECONDS} s, torch included"
try "$site_packages"
remove

say "pip install -e ."
copy=$(copy_of_sources)
pip install --no-deps --editable "$copy"
try "$copy"
remove

say "wheel (isolated build)"
SECONDS=0
pip wheel --no-deps --wheel-dir "$work/wheel" "$(copy_of_sources)"
echo "took ${SECONDS} s"
complete "$work"/wheel/gflowgr-*.whl
pip install --no-deps "$work"/wheel/gflowgr-*.whl
try "$site_packages"
remove

say "sdist, and a wheel from it"
pip install build
"$python" -m build --sdist --outdir "$work/sdist" "$(copy_of_sources)" >"$work/sdist.log" 2>&1 ||
  { cat "$work/sdist.log" >&2; exit 1; }
echo "$(basename "$work"/sdist/gflowgr-*.tar.gz): $(($(stat -c %s "$work"/sdist/gflowgr-*.tar.gz) / 1024)) KiB"
pip wheel --no-deps --wheel-dir "$work/wheel-of-sdist" "$work"/sdist/gflowgr-*.tar.gz
complete "$work"/wheel-of-sdist/gflowgr-*.whl
pip install --no-deps "$work"/wheel-of-sdist/gflowgr-*.whl
try "$site_packages"
remove

say "pip install --no-build-isolation --no-deps . (cmake, ninja and pybind11 being there)"
pip install cmake ninja pybind11 'setuptools>=77'
PATH=$work/venv/bin:$PATH pip install --no-build-isolation --no-deps "$(copy_of_sources)"
try "$site_packages"
remove

say "GFLOWGR_WITHOUT_CPP=1 pip install ."
GFLOWGR_WITHOUT_CPP=1 pip install --no-deps "$(copy_of_sources)"
(cd "$work" && "$python" -W error -) <<'PYTHON'
import sys

import torch

from gflowgr import PrefixTrie, ops

trie = PrefixTrie([[0, 1], [0, 4], [3, 2]])
ops.trie_log_softmax(torch.randn(5), torch.tensor(0), trie)
try:
    ops.trie_log_softmax(torch.randn(5), torch.tensor(0), trie, backend="cpp")
except RuntimeError as refusal:
    print(refusal)
else:
    sys.exit('backend="cpp" served without the extension')
PYTHON
remove

say "every way of installing works"
