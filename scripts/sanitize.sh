#!/usr/bin/env bash
# scripts/sanitize.sh [address] [thread]: the tests that reach the C++ core, under ASan and UBSan, and a program of
# readers, writers, nested calls and forks under TSan and under ASan. Both without arguments.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
sources=(tests/fuzz/threads.cpp)
for source in csrc/*.cpp; do
  [[ $source == */bindings.cpp ]] || sources+=("$source")
done

address() {
  echo "== ASan and UBSan: build"
  mkdir "$work/package"
  cp -r gflowgr "$work/package/"
  rm -rf "$work"/package/gflowgr/_core*.so "$work/package/gflowgr/kernels"
  cp -r kernels "$work/package/gflowgr/kernels"
  cmake -S csrc -B "$work/build" -G Ninja -DCMAKE_BUILD_TYPE=Debug -DGFLOWGR_SANITIZE=ON -DGFLOWGR_STRICT=ON \
    -DCMAKE_CXX_COMPILER=g++ -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$work/package/gflowgr" \
    -DPython_EXECUTABLE="$(command -v "$python")" -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" >"$work/log" ||
    { cat "$work/log" >&2; return 1; }
  cmake --build "$work/build" >"$work/log" || { cat "$work/log" >&2; return 1; }

  echo "== ASan and UBSan: tests"
  # The interpreter never frees much of what it holds; the core's own leaks show in the fuzzers and below.
  # ASan needs address space without end, so tests that limit it are left out. Exceptions are only seen if the
  # C++ library comes in with the sanitizer.
  env PYTHONPATH="$work/package" ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
    UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=1 \
    LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)" \
    "$python" -m pytest -q -x -p no:cacheprovider tests/test_core.py tests/test_trie.py tests/test_trie_file.py \
    tests/test_live_catalogue.py tests/test_token_widths.py tests/test_numpy_trie.py tests/test_filters.py \
    tests/test_limits.py -k "not out_of_memory and not no_threads"
  g++ -std=c++20 -O1 -g -Wno-psabi -fsanitize=address,undefined -fno-sanitize-recover=undefined -Icsrc "${sources[@]}" \
    -lpthread -o "$work/threads"
  "$work/threads"
}

thread() {
  # g++ 12's TSan faults in the resolvers of functions built for several instruction sets, before main.
  command -v clang++ >/dev/null || { echo "clang++ is needed for TSan" >&2; return 1; }
  echo "== TSan"
  clang++ -std=c++20 -O1 -g -Wno-psabi -fsanitize=thread -Icsrc "${sources[@]}" -lpthread -o "$work/threads-tsan"
  "$work/threads-tsan" without-forks
}

for kind in "${@:-address}"; do "$kind"; done
if (($# == 0)); then thread; fi
