"""Networks built on the Encoding layer."""
