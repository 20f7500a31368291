#!/usr/bin/env bash
# Evaluate Qwen2.5-VL-7B with FlexSelect, in the reference's vocabulary.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/reference_options.sh

ABOUT="Evaluates Qwen2.5-VL-7B on lmms-eval's video benchmarks. token_selector_path is 'self' for
training-free selection, or the folder or hub id of a Lite selector. Needs the 'eval' extra."
OPTIONS="pretrained use_token_selector token_selector_path token_selector_layer drop_func_name
tkn_budget token_selector_type max_num_frames tasks gpus output_path"
OPTIONS=${OPTIONS//$'\n'/ }

pretrained=Qwen/Qwen2.5-VL-7B-Instruct
use_token_selector=True
token_selector_path=self
token_selector_layer=20
drop_func_name=token_selection
tkn_budget=7040
token_selector_type=
max_num_frames=1024
tasks=videomme,mlvu_dev,longvideobench_val_v,lvbench
gpus=1
output_path=results/eval/qwen2_5_vl

read_options "$@"
evaluate flexselect_qwen2_5_vl "max_num_frames=$max_num_frames"
