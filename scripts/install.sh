#!/usr/bin/env bash
# Fills .venv, one part a call:
#   run     the interpreter, torch, what the package needs
#   dev     what the checks need
#   build   the C++ extension, and the package itself as an editable install
# PYTHON and TORCH in the environment override the choices made here.
set -euo pipefail
cd "$(dirname "$0")/.."
pip=(.venv/bin/python -m pip --disable-pip-version-check -qq)

say() { echo "== $*"; }
stop() { echo "error: $*" >&2; exit 1; }

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

find_python() {
  if [[ -n ${PYTHON:-} ]]; then
    new_enough "$PYTHON" || stop "PYTHON: wanted an interpreter of Python 3.10 or newer, got '$PYTHON'"
    echo "$PYTHON"
    return
  fi
  for candidate in python3 python3.{11,12,13,10,14}; do
    if new_enough "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  stop "no Python >= 3.10 on PATH; name one: make PYTHON=/path/to/python3 ..."
}

# The project's requirements without torch, then those of the extras named: one a line.
requirements() {
  .venv/bin/python - "$@" <<'EOF'
import sys
try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib
with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
wanted = [r for r in project["dependencies"] if not r.startswith("torch")]
for extra in sys.argv[1:]:
    wanted += project["optional-dependencies"][extra]
print("\n".join(wanted))
EOF
}

install_torch() {
  local spec=${TORCH:-} index=()
  if nvidia-smi -L >/dev/null 2>&1; then
    spec=${spec:-torch>=2.12}
    say "NVIDIA GPU found: installing $spec (CUDA build)"
  else
    spec=${spec:-torch==2.13.0}
    local cpu_index=https://download.pytorch.org/whl/cpu
    # Without this index a plain pip may choose the CUDA build: several GB, for nothing.
    if .venv/bin/python -c "import urllib.request as u; u.urlopen('$cpu_index/torch/', timeout=2)" 2>/dev/null; then
      index=(--extra-index-url "$cpu_index")
      say "no NVIDIA GPU: installing $spec (CPU build)"
    else
      say "no NVIDIA GPU, and $cpu_index does not answer: installing $spec from pip's own sources"
    fi
  fi
  "${pip[@]}" install "${index[@]}" "$spec"
}

install_run() {
  if [[ ! -x .venv/bin/python ]]; then
    local python
    python=$(find_python)
    say "making .venv with $("$python" --version)"
    "$python" -m venv .venv || stop "cannot make a virtual environment (Debian: apt-get install python3-venv)"
  fi
  install_torch
  say "installing what archer_fast needs"
  requirements report | "${pip[@]}" install -r /dev/stdin "setuptools>=77" "cmake>=3.18" ninja "pybind11>=2.13"
}

install_dev() {
  say "installing what the checks need"
  requirements envs tensorboard test dev | "${pip[@]}" install -r /dev/stdin
}

install_build() {
  command -v "${CXX:-c++}" >/dev/null || stop "no C++20 compiler: wanted '${CXX:-c++}' on PATH (Debian: apt-get install g++)"
  say "building archer_fast._C"
  "${pip[@]}" install --no-build-isolation --no-deps --editable .
}

case ${1:-} in
  run | dev | build) ;;
  *) stop "usage: scripts/install.sh run|dev|build" ;;
esac
"install_$1"
say "done in $SECONDS s"
