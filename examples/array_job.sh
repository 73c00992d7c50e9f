#!/usr/bin/env bash
# A calibration on machines that cannot reach each other: every task does its share, and the last step
# adds them up, to the bits of one process that did it all.
#
#     sbatch --array=0-99 examples/array_job.sh MODEL TEXT OUT     # a task of a SLURM array
#     examples/array_job.sh MODEL TEXT OUT 0 4                     # or by hand: share 0 of 4
#     examples/array_job.sh MODEL TEXT OUT combine 4               # when all are done
#
# A task that is stopped and started again goes on where it was.
set -euo pipefail
model=$1 text=$2 out=$3
share=${4:-${SLURM_ARRAY_TASK_ID:?a number of this share, or run it as an array job}}
of=${5:-${SLURM_ARRAY_TASK_COUNT:?how many shares there are}}
if [ "$share" = combine ]; then
    reap combine "$out"-[0-9]*.safetensors --out "$out.safetensors"
    exit
fi
if [ ! -e "$out-$share.safetensors" ]; then
    reap calibrate "$model" --data "$text" ${TOKENS:+--max-tokens "$TOKENS"} \
        --shard "$share/$of" --out "$out-$share.safetensors"
fi
