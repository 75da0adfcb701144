#!/bin/bash
# Trains on this machine through torchrun.
#
#   bash launch/dev.sh CONFIG [key.path=value …]
#
# NPROC ranks: one for each GPU, or 2 where there is none. Ctrl-C, SIGTERM and SIGUSR1 save a checkpoint and pause; the same command
# goes on from there. Exit codes: 0 completed, 1 failed, 2 bad config, 75 paused.
set -euo pipefail

if [ $# -lt 1 ]; then
    echo "usage: [NPROC=n] bash launch/dev.sh CONFIG [key.path=value …]" >&2
    exit 2
fi
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$ROOT/launch/common.sh"

if [ -z "${NPROC:-}" ]; then
    NPROC=$(gpus)
    if [ "$NPROC" -eq 0 ]; then NPROC=2; fi
fi
CONFIG=$1
shift
# exec: signals reach `refractor train` itself, which asks its ranks to save.
exec "$PYTHON" -m refractor_core.cli.main train "$CONFIG" --nproc "$NPROC" "$@"
