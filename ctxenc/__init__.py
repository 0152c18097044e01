"""Context encoding for image backbones.

The Encoding layer of Deep TEN (CVPR 2017, arXiv 1612.02844) and EncNet (CVPR 2018, arXiv 1803.08904), the block built on it
that takes the place of Squeeze-and-Excitation, and one call that swaps it into an existing network.
"""

from ctxenc.context import ContextEncoding
from ctxenc.encoding import Encoding
from ctxenc.functional import assign, backend_info, encode, use_backend
from ctxenc.parameters import parameter_groups
from ctxenc.runs.loading import load
from ctxenc.swap.calibration import calibrate
from ctxenc.swap.patching import find_context_blocks, find_se_blocks, patch_se_blocks, restore_se_blocks
from ctxenc.swap.se_classes import register_se_class

__version__ = "0.1.0"

__all__ = [
    "ContextEncoding",
    "Encoding",
    "assign",
    "backend_info",
    "calibrate",
    "encode",
    "find_context_blocks",
    "find_se_blocks",
    "load",
    "parameter_groups",
    "patch_se_blocks",
    "register_se_class",
    "restore_se_blocks",
    "use_backend",
]
