#!/usr/bin/env bash
# Servers with GPUs, by Slurm: one process a server, which has all of its GPUs.
#   MODEL=org/name MESH=tensor=16 sbatch --nodes=2 slurm.sh "What is the capital of France?"
#SBATCH --job-name=llmir
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
set -euo pipefail
# Slurm runs a copy of this file: run.sh is beside the original.
srun --kill-on-bad-exit=1 "${SLURM_SUBMIT_DIR:-.}/run.sh" "$@"
