"""The network as a sampler calls it: its weights, their layout, its buffers."""
