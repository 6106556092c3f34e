"""Restoring real images: colour, files, tiling, and jobs over many files."""

from memnet_fast.restore.images import jpeg_quality
from memnet_fast.restore.restorer import Restored, Restorer

__all__ = ["Restored", "Restorer", "jpeg_quality"]
