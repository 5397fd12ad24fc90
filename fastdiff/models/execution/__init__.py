"""A network's inference as a flat list of fused operations."""
