"""GPT-Neo in JAX/Flax, with attention through Gaussian splats."""
