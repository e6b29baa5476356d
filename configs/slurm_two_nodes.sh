#!/bin/bash
# A run on two nodes of a Slurm cluster. `run.dir`, the data and the base must be on a disk that both nodes see.
#   sbatch configs/slurm_two_nodes.sh pretrain configs/further_pretrain_7b.yaml run.dir=/shared/runs/first
# Without Slurm, start on each node by hand what follows `srun` below, with the first node's name as HOST:
#   torchrun --nnodes 2 --nproc-per-node 4 --rdzv-id first --rdzv-backend c10d --rdzv-endpoint HOST:29500 \
#     -m k2mini pretrain configs/further_pretrain_7b.yaml run.dir=/shared/runs/first
# Tried with two agents on one machine, on CPUs, with stand-ins for Slurm's programs; never on a cluster by us.
#SBATCH --nodes=2
# One task a node: torchrun, which starts one rank a GPU.
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
# For preparing documents, and for each rank's threads.
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
# Ten minutes before the time is over all ranks get SIGTERM, save a checkpoint and end; the same sbatch goes on.
#SBATCH --signal=TERM@600
# Where a node fails, the job is queued again, and goes on from the last checkpoint: `checkpoint.resume` is auto.
#SBATCH --requeue
# A job that is queued again writes on in its log.
#SBATCH --open-mode=append
set -euo pipefail
# The two torchruns meet at a port of the first node, which must be free; K2MINI_PORT names another.
host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
# A checkpoint may take longer than the 30 seconds after which torchrun kills its ranks; PyTorch 2.13 reads this, versions
# before it do not.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=500
# One node's end ends the other: no rank waits for one that is gone. Since Slurm 22.05 srun has to be told the CPUs again.
exec srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" \
  --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$host:${K2MINI_PORT:-29500}" \
  -m k2mini "$@"
