"""`python -m pallas_kernels.tune`: measures tiles on this machine's GPU."""

from pallas_kernels.tuning.command import app

if __name__ == "__main__":
    app()
