"""Counter-based Gaussian noise."""
