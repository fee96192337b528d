#!/usr/bin/env bash
# The runs behind README.md's table: all-MiniLM-L6-v2 on RTE, MRPC and STS-B, dense, then pruned four ways.
#   results/core/run.sh GLUE_FOLDER OUTPUT_FOLDER
# Run from the repository's root. A run that is complete is skipped; one that was killed continues.
set -euo pipefail
glue=$1 out=$2
python=${PYTHON:-.venv/bin/python}
start=$($python -c 'from token_pruning.data import find_minilm; print(find_minilm())')

stage() {  # task, name, options…
  local task=$1 name=$2; shift 2
  grep -qs '"finished": true' "$out/$task/$name/run.json" && return
  $python run.py --arch pibert-base --task "$task" --data_dir "$glue" --bs 32 --bf16 --output_dir "$out/$task/$name" "$@"
}

for task in ${TASKS:-MRPC STSB RTE}; do
  stage $task dense --restore "$start" --masking_mode none --lr 1e-4 --epoch 5
  dense=$out/$task/dense
  stage $task soft --restore "$dense" --masking_mode soft --lr 5e-5 --epoch 3 --lambda 0.08 --temperature 1e-3 \
    --lr_threshold 2e-4 --no_load --prune_mode absolute_threshold --final_token_threshold 0.01 --scoring_mode mean
  stage $task hard --restore "$out/$task/soft" --masking_mode hard --lr 1e-4 --epoch 3
  stage $task topk --restore "$dense" --masking_mode hard --lr 1e-4 --epoch 3 --prune_mode topk --token_keep_rate -1
  stage $task manual --restore "$dense" --masking_mode hard --lr 1e-4 --epoch 3 \
    --prune_mode absolute_threshold --final_token_threshold 0.008 --scoring_mode mean
done
