#!/usr/bin/env bash
#SBATCH --job-name=vlmalign
#SBATCH --ntasks-per-node=1
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#
# Run a command as one process per node (each with all of the node's GPUs), and end all of them when one dies.
#
#     sbatch --nodes 4 --gpus-per-node 8 --cpus-per-task 64 scripts/launch_slurm.sh vlmalign align config.yaml
#     scripts/launch_slurm.sh --dry-run vlmalign align config.yaml           # shows what would be run, and runs nothing
#
# The run folder (--run /shared/runs/first) must lie where all nodes see it; --cpus-per-task are the cores of a node.
# Submitted again with the same command, on the same or another number of nodes, a run goes on from its last checkpoint.
# Process ids, their number and the first node are read from SLURM. The job's exit code is usually that of what failed first.
# VLMALIGN_HEARTBEAT: seconds without a sign of life after which a process counts as dead (30).
set -euo pipefail

dry_run=no
if [[ ${1-} == --dry-run ]]; then
    dry_run=yes
    shift
fi
if (($# == 0)); then
    echo "launch_slurm: give the command that each process runs, such as: vlmalign align config.yaml" >&2
    exit 2
fi

export VLMALIGN_HEARTBEAT=${VLMALIGN_HEARTBEAT:-30}

# Runs on every node, around the command: srun itself says that a task was killed, but not what that means.
# shellcheck disable=SC2016  # expanded on the nodes
around='
trap told=yes TERM INT  # the command gets them too, and is waited for
code=0 told=no
"$@" || code=$?
if ((code)) && [[ $told == yes ]]; then
    echo "launch_slurm: process ${SLURM_PROCID-?} on $(hostname) was told to end, and has" >&2
    code=1  # srun returns the highest of all: that of the process that failed by itself
elif ((code == 75)); then
    echo "launch_slurm: process ${SLURM_PROCID-?} on $(hostname) ended since another one had, or could not be reached" >&2
    code=1  # as above
elif ((code)); then
    how="ended with exit code $code"
    if ((code > 128)); then how="was ended by SIG$(kill -l $((code - 128)))"; fi
    if ((code == 137)); then how="$how (often: out of memory)"; fi
    echo "launch_slurm: process ${SLURM_PROCID-?} on $(hostname) $how; a run cannot go on without it, the others are ended." \
        "It goes on from its last checkpoint when the job is submitted again" >&2
fi
exit "$code"'

# One task that fails ends all; those that do not listen to SIGTERM are killed after SLURM`s KillWait. From SLURM 22.05 on
# srun does not take over the --cpus-per-task of sbatch (its manual), and is told again.
cores=${SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK}
job=(srun --label --kill-on-bad-exit=1 ${cores:+"$cores"} bash -c "$around" vlmalign "$@")
if [[ $dry_run == yes ]]; then
    printf '%q ' "${job[@]}"
    echo
    exit 0
fi
exec "${job[@]}"
