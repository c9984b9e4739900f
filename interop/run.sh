#!/bin/sh
# Export pico as GPTQ in several settings, load each folder with both libraries, compare.
#   run.sh BIN OUT AUTO_GPTQ_VENV GPTQMODEL_VENV
# BIN holds the project's own `dus-edge` and `python`.
set -eu

bin=$1
out=$2
auto_gptq=$3
gptqmodel=$4
here=$(cd "$(dirname "$0")" && pwd)
folders=

export_case() {
    folder=$out/$1
    shift
    echo "dus-edge gptq pico $*"
    # Little calibration: it is the reading that is compared, not the quality.
    "$bin/dus-edge" gptq pico "$@" --chunks 2 --ctx 64 -o "$folder" --overwrite >/dev/null 2>&1 ||
        { echo "run.sh: the export failed: dus-edge gptq pico $*" >&2; exit 1; }
    folders="$folders $folder"
}

mkdir -p "$out"
export_case b4-g64 --bits 4 --group-size 64
export_case b4-g64-act --bits 4 --group-size 64 --desc-act
export_case b4-g32-act-asym --bits 4 --group-size 32 --desc-act --asym
export_case b2-g32-asym --bits 2 --group-size 32 --asym
export_case b3-g64 --bits 3 --group-size 64
export_case b8-row --bits 8 --group-size -1

# shellcheck disable=SC2086  # folders is a list, and OUT has no blanks
{
    echo "auto-gptq runs"
    "$auto_gptq/bin/python" "$here/load_auto_gptq.py" "$out/logits" $folders >"$out/auto-gptq.log" 2>&1
    echo "GPTQModel runs"
    "$gptqmodel/bin/python" "$here/load_gptqmodel.py" "$out/logits" $folders >"$out/gptqmodel.log" 2>&1
    "$bin/python" "$here/compare.py" "$out/logits" auto-gptq gptqmodel -- $folders
}
