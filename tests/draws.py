"""How many problems Hypothesis draws."""

import os

from hypothesis import settings


def examples(usual: int) -> int:
    """Those of every run, unless CTXENC_EXAMPLES or a profile, as in `pytest --hypothesis-profile nightly`, has another number."""
    own = os.environ.get("CTXENC_EXAMPLES")
    if own is not None:
        return int(own)
    chosen = settings().max_examples
    return usual if chosen == settings.get_profile("default").max_examples else chosen
