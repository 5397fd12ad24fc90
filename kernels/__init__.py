"""Triton kernels, one file per operation; installed as fastdiff.kernels."""
