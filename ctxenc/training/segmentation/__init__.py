"""What the commands of ctxenc run for segmentation: measures, and pictures of masks."""
