#!/bin/bash
# From the directory above this one: sbatch launch/slurm.sh RUN distill TEACHER --recipe onebit-llama-7b ...
# or pretrain. Two nodes: sbatch --nodes 2 launch/slurm.sh ...; another engine: CONFIG=launch/zero3_1x8.yaml sbatch ...
#SBATCH --job-name=signbit
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# Two to three minutes before the end this script gets a signal, and puts the job back into the queue.
#SBATCH --signal=B:USR1@120
set -euo pipefail
run=$1
shift
if [ -f "$run/run.json" ]; then set -- "$@" --resume; fi
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# A job that gets no further than its last checkpoint would come back for ever: it is left to its time limit.
checkpoints() { (cd "$run" 2>/dev/null && ls -d checkpoint-*) 2>/dev/null || true; }
before=$(checkpoints)
requeue() {
  if [ "$(checkpoints)" = "$before" ]; then
    echo "slurm.sh: no checkpoint since this start, so the job is not requeued; lower --save-every" >&2
  else
    scontrol requeue "$SLURM_JOB_ID" || echo "slurm.sh: the job could not be requeued; submit it again to go on" >&2
  fi
}
trap requeue USR1

# Since SLURM 22.05 srun does not take --cpus-per-task from the job. $SLURM_NODEID is each node's own, the rest is the same.
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
  bash -c 'exec accelerate launch --machine_rank "$SLURM_NODEID" "$@"' accelerate \
  --config_file "${CONFIG:-launch/fsdp2_${SLURM_JOB_NUM_NODES}x8.yaml}" --main_process_ip "$head" \
  --main_process_port $((20000 + SLURM_JOB_ID % 10000)) -m signbit "$@" -o "$run" &
wait $! || wait $! # the signal ends the first, and the second has the status of the run
