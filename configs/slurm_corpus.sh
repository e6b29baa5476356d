#!/bin/bash
# A corpus out of more papers than one machine reads in time: an array of jobs makes its parts, a last job merges them.
# Papers and parts must be on a disk that all nodes see, under the same paths.
#   sbatch --array=1-16 configs/slurm_corpus.sh /shared/papers /shared/corpus --decontaminate geobench_npee.json
#   sbatch --dependency=afterok:JOB --ntasks=1 --wrap "k2mini corpus merge /shared/corpus.part* --out /shared/corpus"
# Without Slurm, in a loop or by any other scheduler: k2mini corpus IN --out OUT.part3 --part 3/16 and so on, then merge.
# Tried with a stand-in for Slurm's variables on one machine; never on a cluster by us.
#SBATCH --cpus-per-task=32
#SBATCH --mem-per-cpu=1G
#SBATCH --time=24:00:00
# A job that was killed or whose node failed goes on from the groups of files that were complete.
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
papers=$1 out=$2
exec k2mini corpus "$papers" --out "$out.part$SLURM_ARRAY_TASK_ID" --part "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT" \
  --workers "${SLURM_CPUS_PER_TASK:-1}" "${@:3}"
