#!/usr/bin/env bash
# ImageNet: timm's pretrained seresnet50, its SE blocks replaced, fine-tuned on 8 GPUs; and the SE network fine-tuned likewise,
# without which an accuracy says nothing about the swap.
#
#     bash examples/imagenet_seresnet50.sh DATA_DIR [OPTION...]
#
# DATA_DIR holds train/ and val/ with a folder a class. GPUS=4 in the environment takes 4 GPUs. Further options go to
# `python -m ctxenc finetune`; --arms context leaves the SE network out and halves the time.
#
# A recipe to start from: no part of it has been tuned, or run on ImageNet.
set -euo pipefail
data=${1:?usage: bash examples/imagenet_seresnet50.sh DATA_DIR [OPTION...]}
shift
gpus=${GPUS:-8}

recipe=(
    # Calibrated blocks begin near what the network has learned, and the head stays: a fifteenth of the 300 epochs of a training
    # from the beginning, at a low rate. 1024 images a step.
    --init calibrated
    --epochs 20 --batch-size $((1024 / gpus)) --opt adamw --lr 2e-4 --weight-decay 0.02 --warmup-epochs 1 --sched cosine
    --clip-grad 1.0 # for the first steps, in which blocks and network do not fit each other yet
    # Near the augmentation of the pretraining (ResNet strikes back, arXiv 2110.00476): a sudden change of it costs accuracy too.
    --crop-scale 0.08 --auto-augment rand-m7-mstd0.5-inc1 --color-jitter 0 --mixup 0.1 --cutmix 1.0 --label-smoothing 0.1
    # 1 / (1 - 0.9998) = 5,000 steps are four epochs: at the end the average is of the last ones alone.
    --model-ema --ema-decay 0.9998
)
torchrun --nproc-per-node "$gpus" -m ctxenc finetune --model seresnet50 --pretrained --arms both \
    --data imagenet --data-dir "$data" "${recipe[@]}" --amp bf16 --channels-last --workers 12 \
    --out runs/imagenet_seresnet50 --resume auto "$@"
