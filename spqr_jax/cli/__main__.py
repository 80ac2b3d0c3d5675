"""`python -m spqr_jax.cli` is `spqr`."""

from spqr_jax.cli import main

if __name__ == "__main__":
    main()
