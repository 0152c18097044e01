"""The arms of a segmentation training: EncNet and its baselines."""

from typing import Any

from timm.models import get_pretrained_cfg

from ctxenc.runs.folders import check_model_name, installed_versions
from ctxenc.runs.segment_config import IMAGENET, SegmentConfig
from ctxenc.training.segmentation.scenes import MEAN, STD
from ctxenc.training.segmentation.segment_settings import SCENES, SegmentSettings

# EncNet and the baselines of the paper's ablation, with their titles in reports.
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "fcn": ("FCN", {"context": "none", "se_loss": False}),
    "fcn_se": ("FCN + global pooling (SE)", {"context": "pool", "se_loss": False}),
    "encnet_no_se_loss": ("EncNet without SE-loss", {"context": "encoding", "se_loss": False}),
    "encnet": ("EncNet", {"context": "encoding"}),
}


def arm_configs(settings: SegmentSettings, classes: list[str]) -> dict[str, SegmentConfig]:
    """Return the configuration of each arm of `settings`.

    Raises:
        UserError: The backbone does not exist.
    """
    check_model_name(settings.backbone)
    shared: dict[str, Any] = {
        "backbone": settings.backbone,
        "num_classes": len(classes),
        "num_codes": settings.num_codes,
        "aux": settings.aux and settings.aux_weight > 0,  # DDP rejects parameters without gradients
        "smoothing": settings.smoothing,
        "aggregation": settings.aggregation,
        "start": settings.codebook_start,
        "lateral": settings.lateral,
        "output_stride": settings.output_stride,
        "stages": settings.stages,
        "channels": settings.channels,
    }
    colours: dict[str, Any] = IMAGENET
    if settings.data == SCENES:
        colours = {"mean": MEAN, "std": STD}
    elif cfg := get_pretrained_cfg(settings.backbone):
        colours = {"mean": cfg.mean, "std": cfg.std}
    configs = {}
    for arm in settings.arm_names:
        own = {"se_loss": settings.se_loss and settings.se_weight > 0} | ARMS[arm][1]
        configs[arm] = SegmentConfig(
            network=shared | {"se_loss": own["se_loss"]},
            context=own["context"],
            classes=classes,
            mean=list(colours["mean"]),
            std=list(colours["std"]),
            settings=settings.as_dict(),
            versions=installed_versions(),
        )
    return configs
