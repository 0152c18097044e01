"""The commands, a file each: its arguments, then a call."""
