# What the launch scripts share. Source it with ROOT set to the repository.
#
# Exit codes of every launch script, those of `refractor train`: 0 completed, 1 failed, 2 bad config, 75 paused with a checkpoint saved.

# The interpreter: PYTHON from outside, else the one that `make setup` made, else the active environment's.
if [ -z "${PYTHON:-}" ]; then
    if [ -x "$ROOT/.venv/bin/python" ]; then PYTHON=$ROOT/.venv/bin/python; else PYTHON=python3; fi
fi
# Works on nodes where nothing is installed but the dependencies.
export PYTHONPATH="$ROOT:$ROOT/kernels${PYTHONPATH:+:$PYTHONPATH}"

refractor() { "$PYTHON" -m refractor_core.cli.main "$@"; }

# gpus: how many this machine has.
gpus() { { nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU' || true; }

# exit_code STATUS_JSON: the code for the state that a run's status.json tells. One that still says running died without a word.
exit_code() {
    case $("$PYTHON" -c 'import json, sys; print(json.load(open(sys.argv[1]))["state"])' "$1" 2>/dev/null) in
        completed) echo 0 ;;
        paused) echo 75 ;;
        *) echo 1 ;;
    esac
}
