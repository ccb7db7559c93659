#!/usr/bin/env bash
# Builds the C++ core with its doctest tests and runs them.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$PWD/.venv/bin

has_doctest() { echo '#include <doctest/doctest.h>' | "${CXX:-c++}" -E -x c++ - >/dev/null 2>&1; }

echo "== C++ tests"
command -v "${CXX:-c++}" >/dev/null || { echo "error: no C++20 compiler (Debian: apt-get install g++)" >&2; exit 1; }
if ! has_doctest; then
  root=()
  [[ $(id -u) -eq 0 ]] || root=(sudo -n)
  if command -v apt-get >/dev/null && "${root[@]}" true 2>/dev/null; then
    echo "== installing doctest-dev"
    "${root[@]}" apt-get install -y -qq doctest-dev >/dev/null 2>&1 ||
      { "${root[@]}" apt-get update -qq && "${root[@]}" apt-get install -y -qq doctest-dev >/dev/null; } || true
  fi
  has_doctest || { echo "error: the C++ tests need doctest (Debian: apt-get install doctest-dev)" >&2; exit 1; }
fi

mkdir -p build
"$bin/cmake" -S . -B build/cpp -G Ninja -DCMAKE_MAKE_PROGRAM="$bin/ninja" \
  -DARCHER_BUILD_PYTHON=OFF -DARCHER_BUILD_TESTS=ON >build/cpp-configure.log 2>&1 || { cat build/cpp-configure.log; exit 1; }
"$bin/cmake" --build build/cpp --parallel
"$bin/ctest" --test-dir build/cpp --output-on-failure
