"""Find SE blocks, replace them by ContextEncoding blocks, undo the swap, and start the new blocks from data."""
