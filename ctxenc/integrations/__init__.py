"""Provide networks built on the Encoding layer: EncNet, Deep TEN and the CIFAR networks, with tools to train and load them.

`import ctxenc.integrations.timm_models` registers the classification networks with timm.
"""

try:
    import timm as _timm  # noqa: F401
except ImportError as error:
    raise ImportError(f"ctxenc.integrations needs the extra: pip install 'ctxenc[timm]' ({error})") from error

from ctxenc.integrations.checkpoints import load_encnet_checkpoint, save_encnet_checkpoint
from ctxenc.integrations.cifar import cifar_encnet, cifar_resnet, cifar_senet
from ctxenc.integrations.codewords import init_codewords
from ctxenc.integrations.deepten import DeepTEN
from ctxenc.integrations.encnet import EncNet
from ctxenc.integrations.encoding_module import EncodingModule, add_context_encoding
from ctxenc.integrations.inference import predict
from ctxenc.integrations.losses import DiceLoss, EncNetLoss, presence

__all__ = [
    "DeepTEN",
    "DiceLoss",
    "EncNet",
    "EncNetLoss",
    "EncodingModule",
    "add_context_encoding",
    "cifar_encnet",
    "cifar_resnet",
    "cifar_senet",
    "init_codewords",
    "load_encnet_checkpoint",
    "predict",
    "presence",
    "save_encnet_checkpoint",
]
