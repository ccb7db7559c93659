#!/usr/bin/env bash
# Tests the part without torch on the oldest and the newest Python (>= 3.10) that this machine has, each in a small
# environment of its own (.venv-3.x) into which the package is installed as a wheel, without torch.
set -euo pipefail
cd "$(dirname "$0")/.."

main=$(.venv/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true)
found=()
for minor in {10..20}; do
  for candidate in "python3.$minor" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3."$minor".*/bin/python; do
    version=$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true)
    if [[ $version == "3.$minor" ]]; then
      found+=("$candidate")
      break
    fi
  done
done
echo "== Pythons on this machine: ${found[*]:-none}"

versions=()
for python in ${found[0]+"${found[0]}"} ${found[1]+"${found[-1]}"}; do
  version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  if [[ $version == "$main" ]]; then
    echo "== Python $version: skipped here, it is that of .venv"
  else
    [[ -x .venv-$version/bin/python ]] || "$python" -m venv ".venv-$version"
    versions+=("$version")
  fi
done
mkdir -p build
pids=()
trap 'kill ${pids[@]+"${pids[@]}"} 2>/dev/null || true' EXIT # Ctrl-C does not reach what runs beside us

together() { # FUNCTION: with every version at once; what each one says comes in one piece
  local i status=0
  pids=()
  for i in "${!versions[@]}"; do
    "$1" "${versions[i]}" >"build/$1-${versions[i]}.log" 2>&1 &
    pids+=($!)
  done
  for i in "${!versions[@]}"; do
    wait "${pids[i]}" || status=$?
    cat "build/$1-${versions[i]}.log"
  done
  pids=()
  return "$status"
}

pip_of() { ".venv-$1/bin/python" -m pip --disable-pip-version-check -qq "${@:2}"; }

install_needs() {
  pip_of "$1" install "setuptools>=77" "cmake>=3.18" ninja "pybind11>=2.13" numpy safetensors google-crc32c \
    pytest pytest-timeout hypothesis
}

run_tests() {
  echo "== Python $1, without torch"
  # From another folder: here `python -c` would import the sources instead of what was installed.
  cd build
  "../.venv-$1/bin/pytest" -q -c ../pyproject.toml --rootdir .. -m "not slow" \
    ../tests/test_{arguments,trajectory,packing,transitions,padding,staging,prefetch,token_packer,buffer,buffer_sampling,buffer_features,buffer_records,feature_file,segments,segments_damage,buffer_crash}.py ../tests/envs
}

SECONDS=0
together install_needs
for version in ${versions[@]+"${versions[@]}"}; do # one after the other: they compile in one folder, on all cores
  rm -rf build/lib* # setuptools would ship modules that are long gone from the sources
  pip_of "$version" install --no-deps --no-build-isolation --force-reinstall .
done
echo "== Python ${versions[*]:-none}: installed in $SECONDS s"
together run_tests
