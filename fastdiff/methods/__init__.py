"""Sampling methods: each a file that writes the rows of a step table."""
