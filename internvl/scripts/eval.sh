#!/usr/bin/env bash
# Evaluate InternVL2.5-8B with FlexSelect, in the reference's vocabulary.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/reference_options.sh

ABOUT="Evaluates InternVL2.5-8B on lmms-eval's video benchmarks. token_selector_path is 'self' for
training-free selection, or the folder or hub id of a Lite selector. Needs the 'eval' extra."
OPTIONS="pretrained use_token_selector token_selector_path token_selector_layer drop_func_name
tkn_budget token_selector_type num_frame tasks gpus output_path"
OPTIONS=${OPTIONS//$'\n'/ }

pretrained=OpenGVLab/InternVL2_5-8B
use_token_selector=True
token_selector_path=self
token_selector_layer=15
drop_func_name=token_selection
tkn_budget=8256
token_selector_type=
num_frame=512
tasks=videomme,mlvu_dev,longvideobench_val_v,lvbench
gpus=1
output_path=results/eval/internvl

read_options "$@"
evaluate flexselect_internvl "num_frame=$num_frame"
