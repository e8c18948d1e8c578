#!/usr/bin/env bash
# Used by the Makefile, before there is a Python to run anything else with.
#   bootstrap.sh environment CONSTRAINTS   make .venv with a Python 3.12 and install the pinned dependencies
#   bootstrap.sh install                   build the extension and install the project in place
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
incomplete=.venv/.incomplete # there while pip works: an environment left half-way is made anew

fail() {
  echo "error: $*" >&2
  exit 2
}

# Prints what a Python 3.12 lacks for our purpose (nothing: it is fit); fails for any other version and for shims without one.
lacks() {
  "$1" - 2>/dev/null <<'PYTHON'
import importlib.util, os, sys, sysconfig
if sys.version_info[:2] != (3, 12):
    sys.exit(1)
if not all(map(importlib.util.find_spec, ("venv", "ensurepip"))):
    print("venv and pip (on Debian and Ubuntu: the package python3.12-venv)")
elif not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
    print("the C headers (on Debian and Ubuntu: the package python3.12-dev)")
PYTHON
}

find_python() {
  local candidate lacking unfit=""
  while read -r candidate; do
    [[ $candidate != "$PWD"/.venv/* ]] || continue # the one to be made, activated
    lacking=$(lacks "$candidate") || continue
    [ -n "$lacking" ] || { echo "$candidate" && return; }
    unfit=${unfit:-"$candidate lacks $lacking: install it, then run the same command again."}
  done < <(
    type -ap python3.12 python3 python || true
    printf '%s\n' "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python3.12
    uv python find 3.12 2>/dev/null || true
  )
  fail "${unfit:-"no Python 3.12 on PATH, in pyenv or in uv: install one (uv python install 3.12, pyenv install 3.12, or your system's packages), then run the same command again."}"
}

need_compiler() {
  command -v "${CXX:-c++}" >/dev/null ||
    fail "no C++ compiler ('${CXX:-c++}') on PATH: install one (on Debian and Ubuntu: the package g++) or name it in CXX, then run the same command again."
}

make_environment() {
  local constraints=$1 python
  need_compiler # said before the downloads
  if [ -e "$incomplete" ] || [ "$(lacks .venv/bin/python || echo other)" ] || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    echo "making .venv with $python"
    mkdir -p .venv && touch "$incomplete"
    find .venv -mindepth 1 -maxdepth 1 ! -path "$incomplete" -exec rm -rf '{}' +
    "$python" -m venv .venv
  fi
  touch "$incomplete"
  echo "installing the dependencies of constraints.txt (the first time this downloads about 3 GB)"
  run_pip -r "$constraints"
  rm "$incomplete"
}

install_project() {
  need_compiler
  echo "building the extension"
  # On PATH for ninja, which torch calls by name.
  PATH="$PWD/.venv/bin:$PATH" run_pip --no-build-isolation --no-deps --editable .
  .venv/bin/python -m pip check
  .venv/bin/python -c 'import torch; from sparsecod_mcore import _C; print("the extension has",
    "CUDA kernels" if _C.HAS_CUDA else "no CUDA kernels (SPARSECOD_CUDA=on make build compiles them without a GPU)")'
}

# Says what it does to a person watching, only what went wrong to a log. The machine's pip configuration holds, but for
# the one setting (install for the user) that no virtual environment accepts.
run_pip() {
  local -a quiet=()
  [ -t 1 ] || quiet=(--quiet)
  PIP_USER=0 .venv/bin/python -m pip --disable-pip-version-check install ${quiet[@]+"${quiet[@]}"} "$@"
}

case "${1:-}" in
  environment) make_environment "$2" ;;
  install) install_project ;;
  *) fail "bootstrap.sh takes 'environment CONSTRAINTS' or 'install', not '${1:-}'." ;;
esac
