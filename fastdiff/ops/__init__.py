"""The fused operations."""
