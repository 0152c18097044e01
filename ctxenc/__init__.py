"""Context encoding for image backbones.

The Encoding layer of Deep TEN (CVPR 2017, arXiv 1612.02844) and EncNet (CVPR 2018, arXiv 1803.08904), the block built on it
that takes the place of Squeeze-and-Excitation, and one call that swaps it into an existing network.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ctxenc.context import ContextEncoding
    from ctxenc.encoding import Encoding
    from ctxenc.functional import assign, backend_info, encode, use_backend
    from ctxenc.runs.loading import load
    from ctxenc.swap.calibration import calibrate
    from ctxenc.swap.patching import find_context_blocks, find_se_blocks, patch_se_blocks, restore_se_blocks
    from ctxenc.swap.se_classes import register_se_class
    from ctxenc.weight_decay import parameter_groups

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

_MODULES = ["context", "encoding", "functional", "weight_decay"]
_MODULES += ["runs.loading", "swap.calibration", "swap.patching", "swap.se_classes"]


def __getattr__(name: str) -> Any:
    """Import the library when one of its names is first used: torch takes 2 s, and `python -m ctxenc --help` needs none of it."""
    if not name.startswith("__"):
        for module in map(import_module, (f"ctxenc.{each}" for each in _MODULES)):
            globals().update({each: getattr(module, each) for each in __all__ if hasattr(module, each)})
        if name in globals():
            return globals()[name]
    raise AttributeError(f"module 'ctxenc' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Moved(ModuleType):
    """Stand for a module of earlier versions: models pickled whole refer to their classes by its name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # inspect looks for the file of every module, also while torch is being imported
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(import_module(_MOVED[self.__name__]), name)


_MOVED = {"ctxenc.patching": "ctxenc.swap.patching", "ctxenc.se_blocks": "ctxenc.swap.se_classes"}
sys.modules.update({name: _Moved(name) for name in _MOVED})
