"""What Sampler is made of: noise, the network and its weights, one step, its capture."""
