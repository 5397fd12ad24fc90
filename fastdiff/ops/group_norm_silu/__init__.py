"""GroupNorm, FiLM and SiLU in one pass."""
