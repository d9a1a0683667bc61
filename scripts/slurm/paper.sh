#!/usr/bin/env bash
# The paper's full table on a Slurm cluster, preset paper. Not run yet: the protocol's unverified values, times and
# device counts are what we would start from.
#
#     bash scripts/slurm/paper.sh cluster.yaml --plan      every script, with jobs and GPU-hours; sends nothing
#     bash scripts/slurm/paper.sh cluster.yaml             sends them
#     hhbench leaderboard "$OUT"
#
# Sent again, it repeats nothing that is done. OUT (default: runs/paper), SEEDS (0:3) and ATTENTIONS (all) are variables.
# Machines that compute often have no network. Fetch first where there is one, into caches that they see:
#     hhbench data fetch cola sst2 mrpc stsb qqp mnli qnli rte wikitext103 imagenet-1k samsum
set -euo pipefail
cluster="${1:?usage: bash scripts/slurm/paper.sh CLUSTER.yaml [--plan] [settings]}"
shift
table() {
  python -m hhbench submit --on slurm --cluster "$cluster" --preset paper --out "${OUT:-runs/paper}" \
    --attn "${ATTENTIONS:-all}" --seeds "${SEEDS:-0:3}" "$@"
}

# A batch of 8 leaves nothing to divide: one device, many trials at a time.
table --task glue --regime finetuned-conversion --time 08:00:00 "$@"
# 512 sequences of 1,024 tokens from scratch: 8 devices, 8 at a time on each.
table --task lm --regime scratch --devices 8 --micro-batch-size 8 --time 24:00:00 "$@"
table --task lm --regime pretrained-conversion --time 24:00:00 "$@"
table --task imagenet --regime finetuned-conversion --devices 4 --workers 8 --time 24:00:00 "$@"
# Llama-2 7B (its licence has to be accepted), low-rank adapters.
table --task summarization --regime pretrained-conversion --time 24:00:00 "$@"
table --task recall --regime scratch --time 04:00:00 "$@"
