"""RMSNorm over channels, FiLM and SiLU in one pass."""
