"""Look inside a network: the owner codeword of every pixel, the use of the codebook, and the gates.

    import ctxenc.viz
    import matplotlib.pyplot  # then a notebook shows figures

    ctxenc.viz.assignment_map(model, "photograph.jpg")

`python -m ctxenc look` writes the same as PNGs.
"""

try:
    import matplotlib as _matplotlib  # noqa: F401
    from PIL import Image as _Image  # noqa: F401
except ImportError as error:
    raise ImportError(f"ctxenc.viz needs the extra: pip install 'ctxenc[viz]' ({error})") from error

from ctxenc.viz.figures import assignment_map, overview, presence_chart
from ctxenc.viz.observing import Look, Observation, encoding_blocks, look
from ctxenc.viz.palette import OTHERS, PALETTE
from ctxenc.viz.usage import Usage, codebook_usage, gates

__all__ = [
    "OTHERS",
    "PALETTE",
    "Look",
    "Observation",
    "Usage",
    "assignment_map",
    "codebook_usage",
    "encoding_blocks",
    "gates",
    "look",
    "overview",
    "presence_chart",
]
