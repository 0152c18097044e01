#!/usr/bin/env bash
# ImageNet from the beginning with timm's own train.py: ctxenc_seresnet50, a ResNet-50 with Context Encoding in every unit. The
# recipe follows A2 of "ResNet strikes back" (arXiv 2110.00476, table 2), by which timm's seresnet50.a2_in1k was trained: that is its
# baseline. timm's list of argument files has none for A2. The threshold by which mixed targets become 0 or 1 is that of ML-Decoder's
# command for A2 (github.com/Alibaba-MIIL/ML_Decoder); the first and last learning rates are train.py's own.
#
#     bash examples/imagenet_timm_train.sh TIMM DATA_DIR [OPTION...]
#
# TIMM is a clone of github.com/huggingface/pytorch-image-models, whose train.py is not in timm's wheel. DATA_DIR holds train/ and
# val/. GPUS=4 in the environment takes 4 GPUs. Other networks: ctxenc_seresnext50_32x4d, ctxenc_resnet18 and what else
# timm.list_models("ctxenc_*") names.
set -euo pipefail
timm=${1:?usage: bash examples/imagenet_timm_train.sh TIMM DATA_DIR [OPTION...]}
data=${2:?usage: bash examples/imagenet_timm_train.sh TIMM DATA_DIR [OPTION...]}
shift 2
gpus=${GPUS:-8}

recipe=(
    --epochs 300 --batch-size $((2048 / gpus)) --opt lamb --lr 5e-3 --weight-decay 0.02 --sched cosine --warmup-epochs 5
    --bce-loss --bce-target-thresh 0.2 --smoothing 0 --drop-path 0.05 --aug-repeats 3
    --aa rand-m7-mstd0.5-inc1 --mixup 0.1 --cutmix 1.0 --crop-pct 0.95
)
torchrun --nproc-per-node "$gpus" "$timm/train.py" --device-modules ctxenc.integrations.timm_models \
    --model ctxenc_seresnet50 --data-dir "$data" "${recipe[@]}" --amp --amp-dtype bfloat16 --channels-last --workers 12 "$@"
