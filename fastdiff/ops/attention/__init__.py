"""Multi-head self-attention on a packed qkv projection."""
