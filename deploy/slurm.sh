#!/usr/bin/env bash
# One worker of tfdp.train on each node, until the run is finished. Submit it from the folder that holds tfdp:
#
#   sbatch deploy/slurm.sh --config FILE.yaml --training.steps 20000
#
# What follows the script's name goes to every worker. SLURM's own variables tell the workers of each other, so
# there is no TF_CONFIG. 120 s before the time limit SLURM sends SIGTERM: the workers save a checkpoint and end
# with 75, the job is queued again under the same number, and goes on in the same run directory.
#
#SBATCH --job-name=tfdp
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
##SBATCH --gpus-per-node=1
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
set -euo pipefail

: "${SLURM_JOB_ID:?is set by SLURM: submit this script with sbatch}"
RUN_DIR=${RUN_DIR:-runs/slurm-$SLURM_JOB_ID}   # a folder that all nodes see; the same one after a requeue
MAX_REQUEUES=${MAX_REQUEUES:-20}               # requeues of this job, over its whole life
PYTHON=${PYTHON:-python}
unset TF_CONFIG                                # one left in the environment would win over SLURM's variables
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}   # srun does not inherit it by itself

# When one worker dies the others notice and end with 76; --wait bounds that, in seconds after the first end.
code=0
srun --label --kill-on-bad-exit=0 --wait=300 \
    "$PYTHON" -u -m tfdp.train --run_dir "$RUN_DIR" "$@" || code=$?

# srun ends with the highest code of its workers: 75 stopped on request, 76 lost a peer, 128 + n killed by signal n.
requeues=${SLURM_RESTART_COUNT:-0}
if [[ $code == 75 || $code == 76 || $code -gt 128 ]]; then
    if (( requeues < MAX_REQUEUES )); then
        echo "slurm.sh: exit code $code after $requeues requeues: queued again, goes on in $RUN_DIR"
        scontrol requeue "$SLURM_JOB_ID"
    else
        echo "slurm.sh: exit code $code after $requeues requeues, MAX_REQUEUES is $MAX_REQUEUES: not queued again" >&2
    fi
fi
exit "$code"
