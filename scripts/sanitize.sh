#!/usr/bin/env bash
# The C++ tests, and all that the fuzz targets keep, under AddressSanitizer with UndefinedBehaviorSanitizer, and under
# ThreadSanitizer; a report of both.
#
#   scripts/sanitize.sh [REPORT]   default: docs/sanitizers.md
set -euo pipefail
cd "$(dirname "$0")/.."
report=${1:-docs/sanitizers.md}
bin=$PWD/.venv/bin
commit=$(git describe --always --dirty '--exclude=*')  # before the report itself changes
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT

run() { # NAME FLAGS: builds and runs; what it printed is in $logs/NAME
  local name=$1 build=build/$1
  shift
  "$bin/cmake" -S . -B "$build" -G Ninja -DCMAKE_MAKE_PROGRAM="$bin/ninja" -DCMAKE_BUILD_TYPE=RelWithDebInfo \
    -DARCHER_BUILD_PYTHON=OFF -DARCHER_BUILD_TESTS=ON -DCMAKE_CXX_FLAGS="-fno-omit-frame-pointer -O1 $*" >"$logs/configure" 2>&1 ||
    { cat "$logs/configure"; return 1; }
  "$bin/cmake" --build "$build" --parallel
  "$build/archer_core_tests" 2>&1 | tee "$logs/$name"
  for target in fuzz_buffer fuzz_restore; do
    "$build/replay_$target" "csrc/fuzz/corpus/$target" >"$logs/replay" 2>&1 || { tail -n 50 "$logs/replay"; return 1; }
    echo "$target: $(tail -n 1 "$logs/replay")" | tee -a "$logs/$name"
  done
}

export ASAN_OPTIONS=detect_leaks=1:strict_string_checks=1:detect_stack_use_after_return=1
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export TSAN_OPTIONS=halt_on_error=1
echo "== AddressSanitizer, UndefinedBehaviorSanitizer"
run asan -fsanitize=address,undefined -fno-sanitize-recover=all
echo "== ThreadSanitizer"
run tsan -fsanitize=thread

{
  echo "# C++ tests under sanitizers"
  echo
  echo "- command: \`make sanitize\`"
  echo "- commit: $commit"
  echo "- machine: $(uname -sm), $(nproc) cores, $("${CXX:-c++}" --version | head -n 1)"
  echo "- date: $(date -u +%F)"
  for name in asan tsan; do
    printf '\n## %s\n\n```\n' "$([[ $name == asan ]] && echo 'AddressSanitizer, leaks, UndefinedBehaviorSanitizer' || echo ThreadSanitizer)"
    cat "$logs/$name"
    echo '```'
  done
} >"$report"
echo "written to $report"
