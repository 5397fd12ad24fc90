"""Counter-based Gaussian noise."""

from fastdiff.ops.normal.op import draw_like, drawn_apart, normal

__all__ = ["draw_like", "drawn_apart", "normal"]
