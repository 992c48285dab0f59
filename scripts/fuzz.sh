#!/usr/bin/env bash
# scripts/fuzz.sh [seconds]: coverage-guided fuzzing of the core under ASan and UBSan, then of saved files.
# The seconds (60 by default) are shared by the harnesses. With CORPUS=folder, what is found worth keeping stays there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

seconds=${1:-60}
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
corpus=${CORPUS:-$work/corpus}
harnesses=(tests/fuzz/fuzz_*.cpp)
share=$((seconds / (${#harnesses[@]} + 1)))
command -v clang++ >/dev/null || { echo "clang++ is needed, with its libFuzzer" >&2; exit 1; }

objects=()
for source in csrc/*.cpp; do
  [[ $source == */bindings.cpp ]] && continue
  objects+=("$work/$(basename "$source").o")
  clang++ -std=c++20 -O1 -g -Wno-psabi -fsanitize=fuzzer-no-link,address,undefined -fno-sanitize-recover=undefined \
    -c "$source" -o "${objects[-1]}"
done
for source in "${harnesses[@]}"; do
  name=$(basename "$source" .cpp)
  mkdir -p "$corpus/$name"
  echo "== $name, $share s"
  clang++ -std=c++20 -O1 -g -Wno-psabi -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=undefined -Icsrc \
    -Itests/fuzz "$source" "${objects[@]}" -lpthread -o "$work/$name"
  "$work/$name" -max_total_time="$share" -max_len=4096 -timeout=20 -rss_limit_mb=2048 -print_final_stats=1 -verbosity=0 \
    -artifact_prefix="${TMPDIR:-/tmp}/$name-" "$corpus/$name" "tests/fuzz/corpus/$name"
done
echo "== saved files, $share s"
"$python" tests/fuzz/files.py --seconds "$share"
