#!/usr/bin/env bash
# Train a Lite selector for LLaVA-Video-7B, in the reference's vocabulary.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/reference_options.sh

ABOUT="Trains a selector to rank as LLaVA-Video-7B does at its reference layer. Needs the 'train' extra."
OPTIONS="model_name_or_path token_selector_path token_selector_layer drop_func_name data_path
learning_rate num_train_epochs gpus output_dir"
OPTIONS=${OPTIONS//$'\n'/ }

model_name_or_path=lmms-lab/LLaVA-Video-7B-Qwen2
token_selector_path=lmms-lab/llava-onevision-qwen2-0.5b-ov
token_selector_layer=19
drop_func_name=token_selection
data_path=
learning_rate=1e-5
num_train_epochs=1
gpus=8
output_dir=outputs/selector/llava_video

read_options "$@"
run training make train-selector "MODEL=llava_video" "CKPT=$model_name_or_path" "STUDENT=$token_selector_path" \
  "LAYER=$token_selector_layer" "AGGREGATION=$drop_func_name" "DATA=$data_path" \
  "LR=$learning_rate" "EPOCHS=$num_train_epochs" "GPUS=$gpus" "OUT=$output_dir"
