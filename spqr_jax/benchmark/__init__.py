"""What quantizing and decoding cost: `python -m spqr_jax.benchmark`."""
