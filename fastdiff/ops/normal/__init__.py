"""Counter-based Gaussian noise."""

from fastdiff.ops.normal.op import draw_like, normal

__all__ = ["draw_like", "normal"]
