"""Counter-based Gaussian noise."""

from fastdiff.ops.normal.op import draw_at, draw_like, drawn_apart, normal

__all__ = ["draw_at", "draw_like", "drawn_apart", "normal"]
