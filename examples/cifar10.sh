#!/usr/bin/env bash
# CIFAR-10 as in EncNet (arXiv 1803.08904), section 4.3: its 14-layer network with SE (64d) and, beside it, with Context Encoding
# (16k64d). The paper's errors are 4.65 % and 3.96 %.
#
#     bash examples/cifar10.sh DATA_DIR [OPTION...]
#
# DATA_DIR holds cifar-10-batches-py; the option --download fetches it. Further options go to `python -m ctxenc finetune`, such as
# --seeds 3 or --device cuda:1.
set -euo pipefail
data=${1:?usage: bash examples/cifar10.sh DATA_DIR [OPTION...]}
shift

network=(
    --model seresnet_cifar_64d --arms both
    # Swapped like this, the network is encnet_cifar_16k64d: ContextEncoding.paper in every unit.
    --num-codes 16 --rd-ratio 0.25 --pool concat --smoothing sampled
)
recipe=(
    --epochs 600 --batch-size 128 --sched cosine --warmup-epochs 0
    --opt momentum --lr 0.1 # timm's "sgd" would be Nesterov's
    # The default of the authors' code, whose help text says 1e-4. timm's optimizers leave biases, norms and codewords undecayed.
    --weight-decay 5e-4
    --crop-padding 4 --color-jitter 0 # and timm mirrors half of the images
)
python -m ctxenc finetune --data cifar10 --data-dir "$data" "${network[@]}" "${recipe[@]}" \
    --out runs/cifar10 --resume auto "$@"
