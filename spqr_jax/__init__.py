"""SpQR in JAX."""
