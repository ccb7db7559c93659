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

chosen=()
for python in ${found[0]+"${found[0]}"} ${found[1]+"${found[-1]}"}; do
  version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  if [[ $version == "$main" ]]; then
    echo "== Python $version: skipped here, it is that of .venv"
  else
    chosen+=("$version=$python")
  fi
done

for choice in ${chosen[@]+"${chosen[@]}"}; do
  version=${choice%%=*} python=${choice#*=} venv=.venv-${choice%%=*}
  SECONDS=0
  [[ -x $venv/bin/python ]] || "$python" -m venv "$venv"
  pip=("$venv/bin/python" -m pip --disable-pip-version-check -qq)
  "${pip[@]}" install "setuptools>=77" "cmake>=3.18" ninja "pybind11>=2.13" numpy safetensors google-crc32c \
    pytest pytest-timeout hypothesis
  rm -rf build/lib* # setuptools would ship modules that are long gone from the sources
  "${pip[@]}" install --no-deps --no-build-isolation --force-reinstall .
  echo "== Python $version, without torch: installed in $SECONDS s"
  # From another folder: here `python -c` would import the sources instead of what was installed.
  (cd build && "../$venv/bin/pytest" -q -c ../pyproject.toml --rootdir .. -m "not slow" \
    ../tests/test_{arguments,trajectory,packing,transitions,padding,staging,prefetch,token_packer,buffer,buffer_sampling,buffer_features,buffer_records,feature_file,segments,segments_damage,buffer_crash}.py ../tests/envs)
done
