"""A group norm as a scale and a shift per sample and channel."""
