"""Plants defects into a copy of the sources, one at a time, and requires the tests to notice each.

    python tests/mutation/check.py            all of them, about half a minute each
    python tests/mutation/check.py flows      those whose file or description contains "flows"

Ends with `planted N, killed N`; the exit status is 1 if a defect survives. Needs cmake, ninja and pybind11.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from defects import DEFECTS, Defect

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("csrc", "gflowgr", "kernels", "tests", "pyproject.toml")
# A defect may make a worker wait for ever.
LIMIT_SECONDS = 900


def copy_sources(copy: Path) -> None:
    leave = shutil.ignore_patterns("*.so", "__pycache__", ".*", "build")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=leave)
        else:
            shutil.copy2(source, copy / name)
    # As an installation has it.
    (copy / "gflowgr" / "kernels").symlink_to(copy / "kernels")


def configure(copy: Path, build: Path) -> None:
    import pybind11

    # Debug, because it compiles faster and the defects are in what the code means.
    subprocess.run(
        [
            *("cmake", "-S", str(copy / "csrc"), "-B", str(build), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Debug"),
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={copy / 'gflowgr'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ],
        check=True,
        capture_output=True,
    )


def compile_core(build: Path) -> None:
    done = subprocess.run(["cmake", "--build", str(build)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the core does not compile:\n{done.stdout}{done.stderr}")


def environment_of(copy: Path) -> dict[str, str]:
    tools = str(Path(sys.executable).parent)
    return os.environ | {
        "PATH": os.pathsep.join([tools, os.environ.get("PATH", "")]),
        "PYTHONPATH": str(copy),
        # A file that is changed twice within a second would otherwise run as it was.
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "GFLOWGR_HYPOTHESIS": "first-failure",
    }


def require_the_copy_is_used(copy: Path) -> None:
    modules = "gflowgr, gflowgr._core, gflowgr.kernels"
    program = f"import {modules}; print(*(m.__file__ for m in ({modules})), sep='\\n')"
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, env=environment_of(copy), cwd=copy, check=True, capture_output=True, text=True
    )
    for file in done.stdout.split():
        if copy.resolve() not in Path(file).resolve().parents:
            raise SystemExit(f"the tests would import {file}, which is not in the copy {copy}")


def ask(copy: Path, tests: str) -> tuple[int | None, str]:
    """The exit status of pytest, None past the limit, and the last line that says why."""
    files, _, selection = tests.partition(" -k ")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-r", "fE"]
    command += [f"tests/{file}" for file in files.split()] + (["-k", selection] if selection else [])
    try:
        done = subprocess.run(
            command, env=environment_of(copy), cwd=copy, capture_output=True, text=True, timeout=LIMIT_SECONDS
        )
    except subprocess.TimeoutExpired:
        return None, f"more than {LIMIT_SECONDS} s"
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return done.returncode, (lines or done.stdout.splitlines()[-1:] or [done.stderr[-300:]])[0]


def killed(status: int | None) -> bool:
    """A failed test, a crash, or no end; anything else, such as no test collected, shows nothing."""
    return status is None or status == 1 or status < 0


def require_one(copy: Path, defect: Defect) -> None:
    count = (copy / defect.file).read_text().count(defect.old)
    if count != 1:
        raise SystemExit(
            f"{defect.what}: {defect.file} contains this {count} times, needs once:\n{defect.old}"
        )


def plant(copy: Path, build: Path, defect: Defect) -> tuple[bool, str]:
    file = copy / defect.file
    sound = file.read_text()
    try:
        file.write_text(sound.replace(defect.old, defect.new))
        # Also where the defect is in Python: the core may still hold the one before.
        compile_core(build)
        status, why = ask(copy, defect.tests)
    finally:
        file.write_text(sound)
    return killed(status), why


def main(wanted: list[str]) -> int:
    chosen = [d for d in DEFECTS if not wanted or any(word in f"{d.file} {d.what}" for word in wanted)]
    if not chosen:
        raise SystemExit(f"no defect matches {wanted}")
    with tempfile.TemporaryDirectory() as folder:
        copy, build = Path(folder) / "copy", Path(folder) / "build"
        copy_sources(copy)
        for defect in chosen:
            require_one(copy, defect)
        configure(copy, build)
        compile_core(build)
        require_the_copy_is_used(copy)
        for tests in sorted({defect.tests for defect in chosen}):
            status, why = ask(copy, tests)
            if status != 0:
                raise SystemExit(f"without any defect, {tests} gives {status}: {why}")
        print(f"the sound copy passes; planting {len(chosen)} defects", flush=True)
        survivors = 0
        for number, defect in enumerate(chosen, 1):
            begin = time.monotonic()
            dead, why = plant(copy, build, defect)
            survivors += not dead
            print(
                f"{number:3} {'killed  ' if dead else 'SURVIVED'} {time.monotonic() - begin:5.0f} s  "
                f"{defect.file}: {defect.what}\n      {why}",
                flush=True,
            )
    print(f"planted {len(chosen)}, killed {len(chosen) - survivors}")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
