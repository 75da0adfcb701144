#!/bin/bash
#SBATCH --job-name=refractor
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
# Trains on several nodes under Slurm. Submit from the repository's root, which every node must see:
#
#   sbatch [--nodes=N --gpus-per-node=8 --time=… --partition=…] launch/multinode.sh CONFIG [key.path=value …]
#
# One torchrun for each node, NPROC ranks under it: one for each GPU of the allocation, or 1 where there is none.
#
# Two minutes before the time limit (--signal), or on `scancel --batch --signal=USR1 JOB`, the ranks save, and the job puts itself back
# into the queue. `refractor pause RUN_DIR` and `scancel JOB` save too, and leave the job ended: submit it again to go on.
# Exit codes: 0 completed, 1 failed, 2 bad config, 75 paused with a checkpoint saved.
#
# How signals behave, each line tried on a real Slurm (tests/cluster):
# - TERM to srun kills the ranks at once; USR1 to srun is forwarded to them. So this shell never sends TERM.
# - A step's signal reaches torchrun too, which dies of USR1. So it is started with USR1 ignored; the ranks set handlers of their own.
# - A signal that comes before they did is lost. So it is sent again until they are gone.
# - srun returns 0 although a node was lost, if the other ranks left in order. So status.json says what became of the run, not srun.
set -uo pipefail

if [ $# -lt 1 ]; then
    echo "usage: sbatch [options] launch/multinode.sh CONFIG [key.path=value …]" >&2
    exit 2
fi
ROOT=${SLURM_SUBMIT_DIR:?this is a batch script: submit it with sbatch}
if [ ! -f "$ROOT/launch/common.sh" ]; then
    echo "launch/multinode.sh: $ROOT is not the repository's root; submit from there" >&2
    exit 2
fi
source "$ROOT/launch/common.sh"

NPROC=${NPROC:-${SLURM_GPUS_ON_NODE:-1}}
RESEND_SECONDS=5

# A bad config ends here, before any process group, with every mistake listed.
refractor train "$@" --check $((SLURM_NNODES * NPROC)) || exit $?
RUN_DIR=$(refractor config show "$@" --key run.dir) || exit $?
STATUS=$RUN_DIR/status.json
rm -f "$RUN_DIR/requests/pause" "$RUN_DIR/requests/save" # wishes for a job that is gone
stamp() { stat -c '%i %y' "$STATUS" 2>/dev/null; }
BEFORE=$(stamp)

export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
echo "$(date -u +%FT%TZ) job $SLURM_JOB_ID, attempt $((${SLURM_RESTART_COUNT:-0} + 1)): $SLURM_NNODES nodes x $NPROC ranks, $RUN_DIR"

SRUN= ASKING= REQUEUE=
ask_to_stop() {
    if [ -n "$ASKING" ] || [ -z "$SRUN" ]; then return; fi
    echo "$(date -u +%FT%TZ) asking the ranks to save and stop"
    while kill -USR1 "$SRUN" 2>/dev/null; do sleep $RESEND_SECONDS; done &
    ASKING=$!
}
trap 'REQUEUE=1; ask_to_stop' USR1
trap ask_to_stop TERM

# shellcheck disable=SC2016  # the inner shell expands SLURM_NODEID: it differs from node to node
srun --cpus-per-task="$SLURM_CPUS_ON_NODE" --cpu-bind=none --kill-on-bad-exit=1 bash -c '
    trap "" USR1
    exec "$0" -m torch.distributed.run --nnodes="$SLURM_NNODES" --node-rank="$SLURM_NODEID" --nproc-per-node="$1" \
        --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" -m refractor_core.cli.main train "${@:2}"' \
    "$PYTHON" "$NPROC" "$@" &
SRUN=$!
if [ -n "$REQUEUE" ]; then ask_to_stop; fi # it came while srun was not there yet

# A trapped signal ends `wait` early.
wait "$SRUN"
RC=$?
while kill -0 "$SRUN" 2>/dev/null; do
    wait "$SRUN"
    RC=$?
done
if [ -n "$ASKING" ]; then kill "$ASKING" 2>/dev/null; fi

# An untouched status.json tells of an earlier attempt, not of this one.
CODE=1
if [ "$(stamp)" != "$BEFORE" ] || [ "$RC" -eq 0 ]; then CODE=$(exit_code "$STATUS"); fi
echo "$(date -u +%FT%TZ) srun returned $RC, exit code $CODE"
if [ $CODE -eq 75 ] && [ -n "$REQUEUE" ]; then
    echo "$(date -u +%FT%TZ) back into the queue"
    scontrol requeue "$SLURM_JOB_ID" # ends this shell
fi
exit $CODE
