#!/usr/bin/env bash
# Evaluate LLaVA-Video-7B with FlexSelect, in the reference's vocabulary.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/reference_options.sh

ABOUT="Evaluates LLaVA-Video-7B on lmms-eval's video benchmarks. token_selector_path is 'self' for
training-free selection, or the folder or hub id of a Lite selector. Needs the 'eval' extra."
OPTIONS="pretrained use_token_selector token_selector_path token_selector_layer drop_func_name
tkn_budget token_selector_type max_frames_num tasks gpus output_path"
OPTIONS=${OPTIONS//$'\n'/ }

pretrained=lmms-lab/LLaVA-Video-7B-Qwen2
use_token_selector=True
token_selector_path=self
token_selector_layer=19
drop_func_name=token_selection
tkn_budget=6720
token_selector_type=
max_frames_num=512
tasks=videomme,mlvu_dev,longvideobench_val_v,lvbench
gpus=1
output_path=results/eval/llava_video

read_options "$@"
evaluate flexselect_llava_video "max_frames_num=$max_frames_num"
