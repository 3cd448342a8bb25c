#!/bin/bash
# SLURM: two machines of eight GPUs, from the repository's root. Checked for syntax only; not run on a cluster.
#
#     sbatch train/launch/slurm.sh train/tinyimagenet.py --batch-size 13
# Two minutes before the time limit SLURM sends SIGTERM: the run saves its state and is requeued to resume from it.

#SBATCH --job-name=timm-sugar
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append

set -u
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))

# torchrun also stops its processes with SIGTERM, and waits 30 seconds for them to save.
srun --kill-on-bad-exit=1 bash -c "torchrun --nnodes $SLURM_NNODES --nproc_per_node 8 --node_rank \$SLURM_NODEID \
    --master_addr $head_node --master_port $port $(printf '%q ' "$@")"
status=$?

# Stopped before it finished: the same command resumes from the checkpoint.
if [ "$status" -ne 0 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 20 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
