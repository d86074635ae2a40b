#!/usr/bin/env bash
# The fast suite on every other Python that is installed here (pyenv, or python3.X on the PATH), each in an environment of its own.
set -euo pipefail
cd "$(dirname "$0")/.."
for minor in 12 13; do
  python=$(ls -d "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.$minor.*/bin/python 2>/dev/null | tail -n 1 || true)
  python=${python:-$(command -v "python3.$minor" || true)}
  if [ -z "$python" ]; then
    echo "python 3.$minor is not installed: skipped"
    continue
  fi
  make test PYTHON="$python" VENV=".venv-3.$minor"
done
