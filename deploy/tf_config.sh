#!/usr/bin/env bash
# One worker of a job whose machines are started by hand. On each machine, with the same list and arguments:
#
#   WORKERS=10.0.0.1:2222,10.0.0.2:2222 INDEX=0 deploy/tf_config.sh --run_dir /shared/run   # on 10.0.0.1
#   WORKERS=10.0.0.1:2222,10.0.0.2:2222 INDEX=1 deploy/tf_config.sh --run_dir /shared/run   # on 10.0.0.2
#
# WORKERS lists every worker as ADDRESS:PORT, in the same order everywhere; INDEX is this one's place in it, from 0.
# Each machine must reach the others under these addresses. The run directory must be one that all of them see.
set -euo pipefail

: "${WORKERS:?must list every worker, as in WORKERS=10.0.0.1:2222,10.0.0.2:2222}"
: "${INDEX:?must be the place of this machine in WORKERS, from 0}"
TF_CONFIG=$(printf '{"cluster": {"worker": ["%s"]}, "task": {"type": "worker", "index": %d}}' "${WORKERS//,/\", \"}" "$INDEX")
export TF_CONFIG
exec "${PYTHON:-python}" -u -m tfdp.train "$@"
