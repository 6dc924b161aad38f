#!/usr/bin/env bash
# The Atari 100k benchmark, 26 games x 5 seeds: finds a Python and starts benchmark/run.py, which does the work.
#
#   ./benchmark.sh                                  on this machine: its GPUs, or its CPU if it has none
#   ./benchmark.sh --games Pong,Krull --seeds 0-1   some of the runs
#   ./benchmark.sh --slurm                          as a SLURM job array, by benchmark/slurm.sbatch
#   ./benchmark.sh --status                         what is done, running, failed, waiting
#   ./benchmark.sh --help                           all options
#
# The Python is the one that the runs use, so activate its environment first; PYTHON=... names another.
set -euo pipefail

here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
for python in ${PYTHON:+"$PYTHON"} python python3; do
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        exec "$python" "$here/benchmark/run.py" "$@"
    elif [ "$python" = "${PYTHON-}" ]; then
        break # it was asked for by name: no other will do
    fi
done
echo "benchmark.sh: error: ${PYTHON:-python} is not Python 3.11 or later; activate the right environment, or set PYTHON" >&2
exit 2
