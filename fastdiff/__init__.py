"""fastdiff: fast training and sampling of DDPM-family diffusion models."""
