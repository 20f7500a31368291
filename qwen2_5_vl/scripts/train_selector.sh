#!/usr/bin/env bash
# Train a Lite selector for Qwen2.5-VL-7B, in the reference's vocabulary.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/reference_options.sh

ABOUT="Trains a selector to rank as Qwen2.5-VL-7B does at its reference layer. Needs the 'train' extra."
OPTIONS="model_name_or_path token_selector_path token_selector_layer drop_func_name data_path
learning_rate num_train_epochs gpus output_dir"
OPTIONS=${OPTIONS//$'\n'/ }

model_name_or_path=Qwen/Qwen2.5-VL-7B-Instruct
token_selector_path=Qwen/Qwen2-0.5B-Instruct
token_selector_layer=20
drop_func_name=token_selection
data_path=
learning_rate=1e-5
num_train_epochs=3
gpus=8
output_dir=outputs/selector/qwen2_5_vl

read_options "$@"
run training make train-selector "MODEL=qwen2_5_vl" "CKPT=$model_name_or_path" "STUDENT=$token_selector_path" \
  "LAYER=$token_selector_layer" "AGGREGATION=$drop_func_name" "DATA=$data_path" \
  "LR=$learning_rate" "EPOCHS=$num_train_epochs" "GPUS=$gpus" "OUT=$output_dir"
