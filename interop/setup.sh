#!/bin/sh
# Make one of the two environments: setup.sh auto-gptq|gptqmodel FOLDER
# Versions are those of the pin file of that name beside this script.
set -eu

name=$1
venv=$2
here=$(cd "$(dirname "$0")" && pwd)
pins=$here/$name.txt

case $name in
    auto-gptq) first="torch transformers peft accelerate datasets numpy sentencepiece" ;;
    gptqmodel) first="torch transformers numpy" ;;
    *) echo "setup.sh: no environment '$name'; auto-gptq or gptqmodel" >&2; exit 2 ;;
esac

test -x "$venv/bin/python" || "${PYTHON:-python3}" -m venv "$venv"
# Both packages ask for torch while they are built, so it comes before them.
# shellcheck disable=SC2086  # the list is meant to be split
"$venv/bin/pip" install -q -c "$pins" setuptools wheel $first
BUILD_CUDA_EXT=0 "$venv/bin/pip" install -q -c "$pins" --no-build-isolation "$name"
