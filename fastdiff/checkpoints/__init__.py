"""Checkpoints: our own, published ones, and diffusers' directories."""
