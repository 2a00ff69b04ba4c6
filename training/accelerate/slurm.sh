#!/bin/bash
# Several machines under Slurm: sbatch training/accelerate/slurm.sh --config training/configs/transdiff_b.yaml ...
# Submitted again (or requeued after a node failed) it goes on from the latest checkpoint.
#SBATCH --job-name=transdiff
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# One launcher a machine; each starts a process for each of its GPUs.
srun --kill-on-bad-exit=1 bash -c '
  accelerate launch --multi_gpu \
    --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * SLURM_GPUS_ON_NODE))" \
    --machine_rank "$SLURM_NODEID" --main_process_ip "$0" --main_process_port 29500 --rdzv_backend c10d \
    --mixed_precision no -m training.train "$@"
' "$head_node" "$@"
