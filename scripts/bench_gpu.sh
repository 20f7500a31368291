#!/usr/bin/env bash
# Every benchmark that needs a GPU, in order of the bars they answer (docs/performance.md).
#
#   bash scripts/bench_gpu.sh [folder]       default folder: outputs/bench
#
# One CUDA GPU of 24 GB or more (80 GB for full at 512 frames). Each step stores its own JSON and
# Markdown; one that fails does not keep the others from running, and is named at the end, with exit
# code 1. A method that runs out of memory is reported as "does not fit": that is a result.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${1:-outputs/bench}
PYTHON=${PYTHON:-.venv/bin/python}
failed=()

step() {
    local name=$1
    shift
    echo "== $name: $*" >&2
    "$PYTHON" scripts/bench.py --device cuda --out "$OUT" --name "$name" "$@" || failed+=("$name")
}

# 1. 512 frames of LLaVA-Video-7B against full: from features >= 3x and >= 12x (Lite), from pictures
#    >= 2.8x and >= 6x, >= 60% of the matrix rate in the scoring pass.
step llava-7b --model llava --shape 7b --frames 128 256 512 --repeats 5 --check
# 2. Peak device memory flat (+- 5%) from 128 to 4,096 frames.
step llava-7b-memory --model llava --shape 7b --frames 128 512 1024 2048 4096 --repeats 1 \
    --methods flexselect flexselect-lite uniform --check
# 3. The longest video that fits in 24 GB, full against ours.
step llava-7b-24gb --model llava --shape 7b --frames 64 128 256 512 1024 2048 4096 --repeats 1 \
    --memory-gib 24
# 4. The other families.
step qwen-7b --model qwen --shape 7b --frames 128 256 512 --repeats 5
step internvl-8b --model internvl --shape 7b --frames 128 256 512 --repeats 5
# 5. What compiled layers and another kernel are worth.
step llava-7b-compiled --model llava --shape 7b --frames 512 --repeats 5 --compile
if "$PYTHON" -c "import flash_attn" 2>/dev/null; then
    step llava-7b-flash --model llava --shape 7b --frames 512 --repeats 5 \
        --attention flash_attention_2 --check
fi
# 6. The parts: relevance, mapping back, the Spearman loss.
step parts-gpu --micro --repeats 20
# 7. Selector and model on two devices, where there are two.
if [ "$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')" -gt 1 ]; then
    step llava-7b-two-devices --model llava --shape 7b --frames 512 --selector-device cuda:1
fi

if [ ${#failed[@]} -gt 0 ]; then
    echo "Failed or missed a bar: ${failed[*]}" >&2
    exit 1
fi
