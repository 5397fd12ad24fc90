"""Noising images to their timesteps."""
