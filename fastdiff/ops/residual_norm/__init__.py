"""A residual block's sum and the norm that reads it, in one pass."""
