#!/usr/bin/env bash
# The pilot: documents → dataset → training on two ranks → evaluation → report → archive in outbox/.
# usage: [OUTBOX=folder] bash launch/pilot.sh [key=value …]      Interrupt it with Ctrl-C; the same command goes on where it stopped.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT"
source launch/common.sh
config=configs/runs/pilot.yaml
say() { printf '\n\033[1m%s\033[0m\n' "pilot: $*"; }

run_dir=$(refractor config show "$config" "$@" --key run.dir)
say "1/5 documents to dataset";  refractor data build "$config" "$@"
say "2/5 training on 2 ranks";   refractor train "$config" "$@" --nproc 2
say "3/5 evaluation";            refractor eval run "$run_dir"
say "4/5 report";                refractor eval report "$run_dir"
say "5/5 archive";               refractor archive "$run_dir" --outbox "${OUTBOX:-outbox}"
