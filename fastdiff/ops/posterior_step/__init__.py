"""One sampler step from one row of a step table."""
