"""The benchmarks of quantizing and decoding: `python -m spqr_jax.benchmark`."""
