"""Find SE blocks, replace them by ContextEncoding blocks, undo the swap, and start the new blocks from data."""

import sys

from ctxenc.swap import patching, se_classes

# Models pickled whole by earlier versions refer to their classes by these module names.
sys.modules |= {"ctxenc.patching": patching, "ctxenc.se_blocks": se_classes}
