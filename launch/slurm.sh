#!/bin/bash
# sbatch launch/slurm.sh TEACHER RUN --recipe onebit-llama-7b ...       two nodes: sbatch --nodes 2 launch/slurm.sh ...
#SBATCH --job-name=signbit
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# Ten minutes before the end the batch script gets a signal, and puts the job back into the queue.
#SBATCH --signal=B:USR1@600
set -euo pipefail
teacher=$1 run=$2
shift 2
resume=()
[ -f "$run/run.json" ] && resume=(--resume)
trap 'scontrol requeue "$SLURM_JOB_ID"' USR1
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=1 bash -c "accelerate launch --config_file launch/fsdp2_${SLURM_JOB_NUM_NODES}x8.yaml \
  --main_process_ip $head --main_process_port 29500 --machine_rank \$SLURM_NODEID \
  -m signbit distill '$teacher' -o '$run' ${resume[*]:-} $*" &
wait $!
