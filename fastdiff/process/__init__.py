"""Diffusion processes: their schedules, losses, likelihood and published loops."""
