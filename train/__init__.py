"""Training: losses so far; installed as `gsa_jax.train`."""
