"""The commands, one file each: the arguments, then a call."""
