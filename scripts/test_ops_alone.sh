#!/usr/bin/env bash
# `archer_fast.ops` must work with nothing but torch installed: a virtual environment of its own (.venv-ops) with torch
# and this package, no dependency of ours, not even NumPy.
set -euo pipefail
cd "$(dirname "$0")/.."

SECONDS=0
spec=$(.venv/bin/python -c 'import torch; print("torch==" + torch.__version__.split("+")[0])')
[[ -x .venv-ops/bin/python ]] || .venv/bin/python -m venv .venv-ops
pip=(.venv-ops/bin/python -m pip --disable-pip-version-check -qq)
# What builds the wheel is found in .venv: build tools are no part of the promise.
rm -rf build/lib* build/wheel-ops
.venv/bin/python -m pip --disable-pip-version-check -qq wheel --no-deps --no-build-isolation --wheel-dir build/wheel-ops .
"${pip[@]}" install "$spec"
"${pip[@]}" install --no-deps --force-reinstall build/wheel-ops/*.whl
echo "== ops alone: .venv-ops with $spec in $SECONDS s"
# From another folder: here Python would import the sources instead of what was installed.
(cd build && ../.venv-ops/bin/python -W error::UserWarning:archer_fast ../scripts/ops_alone.py)
