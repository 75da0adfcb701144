#!/bin/bash
#SBATCH --job-name=refractor-data
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
# Builds a dataset with arrays of Slurm jobs. Submit from the repository's root, which every node must see, as it must the folder of data.dir,
# on a file system with locks (flock). All at once, each job waiting for the one before it:
#
#   [ARRAY_OPTIONS="--cpus-per-task=4 --mem=8G" SINGLE_OPTIONS="--cpus-per-task=32 --mem=64G"] \
#       bash launch/data_array.sh TASKS CONFIG [key.path=value …]
#
# or one by one:
#
#   sbatch --array=0-15                         launch/data_array.sh read CONFIG [key.path=value …]      files → documents and signatures
#   sbatch              --dependency=afterok:J1 launch/data_array.sh clean CONFIG [key.path=value …]     duplicates, perplexity, tokenizer
#   sbatch --array=0-15 --dependency=afterok:J2 launch/data_array.sh tokenise CONFIG [key.path=value …]  documents → tokens
#   sbatch              --dependency=afterok:J3 launch/data_array.sh finish CONFIG [key.path=value …]    the dataset and its report
#
# A task does its share of the files; what is finished is never done again. So a task that failed or was preempted is repeated as it was
# (`scontrol requeue`, or `SHARES=16 sbatch --array=3,7 …`), or what is missing is shared out anew by an array of any size.
# `clean` refuses to begin, and `finish` does by itself, what is missing. --cpus-per-task sets data.workers; data.memory_limit is each
# task's own. Exit codes: those of `refractor data build`.
set -euo pipefail

usage() {
    echo "usage: bash launch/data_array.sh TASKS CONFIG [key.path=value …]" >&2
    echo "       sbatch [options] launch/data_array.sh read|clean|tokenise|finish CONFIG [key.path=value …]" >&2
    exit 2
}
if [ $# -lt 2 ]; then usage; fi
STAGE=$1
shift

if [[ $STAGE =~ ^[1-9][0-9]*$ ]]; then
    cd "$(dirname "${BASH_SOURCE[0]}")/.."
    BEFORE=
    for STEP in read clean tokenise finish; do
        case $STEP in
            read | tokenise) OPTIONS="--array=0-$((STAGE - 1)) ${ARRAY_OPTIONS:-}" ;;
            *) OPTIONS=${SINGLE_OPTIONS:-} ;;
        esac
        if [ -n "$BEFORE" ]; then OPTIONS="--dependency=afterok:$BEFORE --kill-on-invalid-dep=yes $OPTIONS"; fi
        # shellcheck disable=SC2086  # OPTIONS are words
        BEFORE=$(sbatch --parsable --job-name="refractor-data-$STEP" $OPTIONS launch/data_array.sh "$STEP" "$@")
        BEFORE=${BEFORE%%;*} # a federation adds the cluster's name
        echo "$STEP: job $BEFORE"
    done
    exit 0
fi

ROOT=${SLURM_SUBMIT_DIR:?this is a batch script: submit it with sbatch}
if [ ! -f "$ROOT/launch/common.sh" ]; then
    echo "launch/data_array.sh: $ROOT is not the repository's root; submit from there" >&2
    exit 2
fi
source "$ROOT/launch/common.sh"

CONFIG=$1
shift
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then set -- data.workers="$SLURM_CPUS_PER_TASK" "$@"; fi
case $STAGE in
    read | tokenise)
        SHARES=${SHARES:-${SLURM_ARRAY_TASK_COUNT:-1}}
        ONLY=(--only "$STAGE" --share $((${SLURM_ARRAY_TASK_ID:-0} % SHARES))/"$SHARES")
        ;;
    clean) ONLY=(--only clean) ;;
    finish) ONLY=() ;;
    *) usage ;;
esac
echo "$(date -u +%FT%TZ) job ${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}, task ${SLURM_ARRAY_TASK_ID:-none}: $STAGE ${ONLY[*]}"
exec "$PYTHON" -m refractor_core.cli.main data build "${ONLY[@]}" "$CONFIG" "$@"
