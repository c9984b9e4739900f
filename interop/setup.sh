#!/bin/sh
# Make one of the environments: setup.sh auto-gptq|gptqmodel|mlx FOLDER
# Versions are those of the pin file of that name beside this script.
set -eu

name=$1
venv=$2
here=$(cd "$(dirname "$0")" && pwd)
pins=$here/$name.txt

case $name in
    auto-gptq) first="torch transformers peft accelerate datasets numpy sentencepiece" ;;
    gptqmodel) first="torch transformers numpy" ;;
    mlx)
        # Wheels only; what mlx-lm needs beside MLX stands in the environment of PYTHON.
        case $(uname -sm) in
            "Linux x86_64" | "Linux aarch64") backend=mlx-cpu ;;
            "Darwin arm64") backend=mlx-metal ;;
            *) echo "MLX has no wheels for $(uname -sm): its tests are skipped"; exit 0 ;;
        esac
        "$PYTHON" -m venv "$venv"
        site='import sysconfig; print(sysconfig.get_path("purelib"))'
        "$PYTHON" -c "$site" >"$("$venv/bin/python" -c "$site")/project.pth"
        "$venv/bin/pip" install -q -c "$pins" --no-deps --only-binary :all: mlx "$backend" mlx-lm
        exit 0
        ;;
    *) echo "setup.sh: no environment '$name'; auto-gptq, gptqmodel or mlx" >&2; exit 2 ;;
esac

test -x "$venv/bin/python" || "${PYTHON:-python3}" -m venv "$venv"
# Both packages ask for torch while they are built, so it comes before them.
# shellcheck disable=SC2086  # the list is meant to be split
"$venv/bin/pip" install -q -c "$pins" setuptools wheel $first
BUILD_CUDA_EXT=0 "$venv/bin/pip" install -q -c "$pins" --no-build-isolation "$name"
