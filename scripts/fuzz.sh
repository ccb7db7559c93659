#!/usr/bin/env bash
# The fuzz targets, one after the other, and a report of what they found:
#   fuzz_buffer    any calls with any arguments, against a plain twin (csrc/fuzz/)
#   fuzz_restore   any state that a loader may hand to the core
#   fuzz_loader    any folder that is loaded as a saved buffer (scripts/fuzz_loader.py)
# What covers something new is kept, as few files as cover it all: csrc/fuzz/corpus and tests/corpus, which the tests
# replay. A finding ends its target; the input lies in build/fuzz/findings then.
#
#   scripts/fuzz.sh [SECONDS] [REPORT]   default: 600 for each target, docs/fuzzing.md
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-600}
report=${2:-docs/fuzzing.md}
bin=$PWD/.venv/bin
build=build/fuzz
max_bytes=1024 # of an input
commit=$(git describe --always --dirty '--exclude=*')
[[ $commit != *-dirty ]] || commit="${commit%-dirty} + uncommitted"

has_libfuzzer() {
  command -v "$clang" >/dev/null &&
    echo 'extern "C" int LLVMFuzzerTestOneInput(const char*, unsigned long) { return 0; }' |
    "$clang" -std=c++20 -fsanitize=fuzzer,address,undefined -x c++ - -o /dev/null >/dev/null 2>&1
}

clang=${CLANGXX:-clang++}
if ! has_libfuzzer; then
  root=()
  [[ $(id -u) -eq 0 ]] || root=(sudo -n)
  if command -v apt-get >/dev/null && "${root[@]}" true 2>/dev/null; then
    echo "== installing clang libclang-rt-dev"
    "${root[@]}" apt-get update -qq && "${root[@]}" apt-get install -y -qq clang libclang-rt-dev >/dev/null || true
  fi
  has_libfuzzer || {
    echo "error: no '$clang' with libFuzzer and AddressSanitizer (Debian: apt-get install clang libclang-rt-dev)" >&2
    exit 1
  }
fi

# Atheris is libFuzzer for Python, and no part of what the other checks need: an environment of its own, with .venv's
# packages behind it.
venv=.venv-fuzz
if ! "$venv/bin/python" -c 'import atheris' 2>/dev/null; then
  echo "== installing atheris into $venv"
  "$bin/python" -m venv --clear "$venv"
  "$bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
    >"$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/behind.pth"
  "$venv/bin/python" -m pip --disable-pip-version-check -qq install atheris
fi

echo "== building"
mkdir -p "$build/findings"
"$bin/cmake" -S . -B "$build" -G Ninja -DCMAKE_MAKE_PROGRAM="$bin/ninja" -DCMAKE_BUILD_TYPE=RelWithDebInfo \
  -DCMAKE_CXX_COMPILER="$clang" -DARCHER_BUILD_PYTHON=OFF -DARCHER_BUILD_FUZZERS=ON >"$build/configure.log" 2>&1 ||
  { cat "$build/configure.log"; exit 1; }
"$bin/cmake" --build "$build" --parallel --target fuzz_buffer fuzz_restore

# The core takes memory by large chunks, which the sanitizer's defaults make slow: so little memory kept back, and no
# fresh pages for its own notes.
export ASAN_OPTIONS=detect_leaks=1:detect_stack_use_after_return=1:quarantine_size_mb=8:clear_shadow_mmap_threshold=100000000
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
memory=/dev/shm # for saved folders, thousands a second
[[ -w $memory ]] || memory=${TMPDIR:-/tmp}
TMPDIR=$(mktemp -d -p "$memory")
export TMPDIR
trap 'rm -rf "$TMPDIR"' EXIT
rows=() found=0

# fuzz NAME CORPUS COUNTERS COMMAND...: goes on from what is kept, and keeps what covers something new. Counters: 1
# where how often a line is run is something new too.
fuzz() {
  local name=$1 kept=$2 counters=$3 work=$build/corpus-$1 log=$build/$1.log
  shift 3
  mkdir -p "$kept" "$work"
  echo "== $name, $seconds s"
  local status=0 before
  before=$(find "$build/findings" -type f | wc -l)
  "$@" -max_total_time="$seconds" -max_len="$max_bytes" -len_control=20 -timeout=10 -rss_limit_mb=2048 \
    -print_final_stats=1 -artifact_prefix="$build/findings/$name-" "$work" "$kept" >"$log" 2>&1 || status=$?
  local findings=$(($(find "$build/findings" -type f | wc -l) - before))
  if ((status != 0)); then
    found=1
    grep -v -e '^#[0-9]*\s' -e '^"' "$log" | tail -n 40
  fi
  stat() { sed -n "s/^stat::$1: *//p" "$log"; }
  local coverage
  coverage=$(sed -n 's/.* cov: \([0-9]*\) .*/\1/p' "$log" | tail -n 1)
  echo "   $(stat number_of_executed_units) runs, $(stat average_exec_per_sec) a second, coverage $coverage, findings $findings"
  merge "$kept" "$work" "$counters" "$@"
  rows+=("| $name | $seconds | $(stat number_of_executed_units) | $(stat average_exec_per_sec) | $coverage | $(find "$kept" -type f | wc -l) files, $(find "$kept" -type f -printf '%s\n' | awk '{ n += $1 } END { print n }') bytes | $findings |")
}

merge() { # KEPT WORK COUNTERS COMMAND...: as few files as cover what all of them cover
  local kept=$1 work=$2 counters=$3 merged
  shift 3
  merged=$(mktemp -d)
  "$@" -set_cover_merge=1 -use_counters="$counters" -max_len="$max_bytes" "$merged" "$kept" "$work" >"$build/merge.log" 2>&1 ||
    { tail -n 40 "$build/merge.log"; return 1; }
  rm -rf "$kept"
  mkdir -p "$kept"
  find "$merged" -type f -exec mv -t "$kept" {} +
}

fuzz fuzz_buffer csrc/fuzz/corpus/fuzz_buffer 0 "$build/fuzz_buffer"
fuzz fuzz_restore csrc/fuzz/corpus/fuzz_restore 0 "$build/fuzz_restore"
fuzz fuzz_loader tests/corpus/fuzz_loader 1 "$venv/bin/python" scripts/fuzz_loader.py

{
  echo "# Fuzzing"
  echo
  echo "- command: \`make fuzz\`, that is \`scripts/fuzz.sh $seconds\`"
  echo "- commit: $commit"
  echo "- machine: $(uname -sm), $(nproc) cores, $("$clang" --version | head -n 1), atheris $("$venv/bin/python" -m pip list 2>/dev/null | awk '$1 == "atheris" { print $2 }')"
  echo "- date: $(date -u +%F)"
  echo
  echo '| target | seconds | runs | runs a second | coverage | corpus | findings |'
  echo '|---|---|---|---|---|---|---|'
  printf '%s\n' "${rows[@]}"
  echo
  echo "Coverage counts the edges of the code that is instrumented: the whole core and the target under AddressSanitizer"
  echo "and UndefinedBehaviorSanitizer; for fuzz_loader the Python modules that load. The corpus is as few inputs as cover"
  echo "all of them; \`make test\` replays it."
} >"$report"
echo "written to $report"
exit "$found"
