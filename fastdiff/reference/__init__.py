"""Each operation as the papers write it, in plain PyTorch: what every kernel is checked against."""
