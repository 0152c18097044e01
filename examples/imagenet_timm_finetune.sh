#!/usr/bin/env bash
# ImageNet with timm's own train.py: its pretrained seresnet50, patched. As timm patches nothing, patched_timm_model.py beside this
# file registers such a network, and writes its calibrated start, which train.py then loads like any checkpoint.
#
#     bash examples/imagenet_timm_finetune.sh TIMM DATA_DIR [OPTION...]
#
# TIMM is a clone of github.com/huggingface/pytorch-image-models, whose train.py is not in timm's wheel. DATA_DIR holds train/ and
# val/. GPUS=4 in the environment takes 4 GPUs. The recipe is that of imagenet_seresnet50.sh, with its reasons there.
set -euo pipefail
timm=${1:?usage: bash examples/imagenet_timm_finetune.sh TIMM DATA_DIR [OPTION...]}
data=${2:?usage: bash examples/imagenet_timm_finetune.sh TIMM DATA_DIR [OPTION...]}
shift 2
gpus=${GPUS:-8}
here=$(cd "$(dirname "$0")" && pwd)
start=seresnet50_context.safetensors
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" # where --device-modules finds the module

[ -f "$start" ] || python "$here/patched_timm_model.py" "$data/train" "$start"

recipe=(
    --epochs 20 --batch-size $((1024 / gpus)) --opt adamw --lr 2e-4 --weight-decay 0.02 --warmup-epochs 1 --sched cosine
    --clip-grad 1.0
    --aa rand-m7-mstd0.5-inc1 --mixup 0.1 --cutmix 1.0 --smoothing 0.1 --model-ema --model-ema-decay 0.9998
)
torchrun --nproc-per-node "$gpus" "$timm/train.py" --device-modules patched_timm_model \
    --model seresnet50_context --initial-checkpoint "$start" --data-dir "$data" "${recipe[@]}" \
    --amp --amp-dtype bfloat16 --channels-last --workers 12 "$@"
