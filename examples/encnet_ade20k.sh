#!/usr/bin/env bash
# ADE20K with EncNet (arXiv 1803.08904), section 4, then its mIoU and the masks of eight validation images, at six scales and mirrored too.
# The paper reports 41.11 % mIoU with ResNet-50. What training measures after each epoch is of one scale.
#
#     bash examples/encnet_ade20k.sh DATA_DIR [OPTION...]
#
# DATA_DIR holds ADEChallengeData2016. One GPU, or GPUS=4 in the environment: 16 images a step either way, and the statistics of the
# norms are those of all 16. Further options go to `python -m ctxenc segment train`, such as --amp bf16 --channels-last for speed,
# which the paper's networks were trained without.
set -euo pipefail
data=${1:?usage: bash examples/encnet_ade20k.sh DATA_DIR [OPTION...]}
shift
gpus=${GPUS:-1}
run=runs/segment/ade20k

# What is not named is the paper's by default: 120 epochs of SGD at 0.01 (0.1 for the head), poly 0.9, weight decay 1e-4; crops of 480
# pixels of images at 0.5 to 2 times 520, rotated by up to 10 degrees; 32 codewords; SE-loss 0.2, and 0.2 for the auxiliary head, as
# in the authors' code. resnet50s is their backbone: the three convolutions of its stem have 64, 64 and 128 channels.
torchrun --nproc-per-node "$gpus" -m ctxenc segment train --data ade20k --data-dir "$data" \
    --backbone resnet50s --pretrained-backbone --batch-size $((16 / gpus)) --workers 8 --out "$run" --resume auto "$@"

# Images are resized to 520 pixels first, so scales are factors of that, as the authors' are.
python -m ctxenc segment evaluate "$run" --checkpoint last --scales 0.5 0.75 1 1.25 1.5 1.75 --flip --crop 480

python -m ctxenc segment predict "$run" "$data/ADEChallengeData2016/images/validation/ADE_val_0000000[1-8].jpg" \
    --base-size 520 --scales 0.5 0.75 1 1.25 1.5 1.75 --flip --crop 480 --out masks
