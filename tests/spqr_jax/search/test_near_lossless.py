"""The hold-out protocol: what is calibrated on and what is measured on do not overlap."""

import numpy as np
import pytest

from pallas_kernels.errors import SpqrError
from spqr_jax.search.near_lossless import hold_out
from spqr_jax.texts import random_windows


@pytest.mark.parametrize(
    ("tokens", "max_positions", "windows"),
    [
        (200_000, 2048, (10, 1024)),  # at most ten windows
        (20_000, 2048, (4, 1024)),  # at most a quarter of the text
        (4096, 2048, (1, 1024)),
        (4096, 256, (4, 256)),  # at most the model's positions
    ],
)
def test_the_end_of_a_text_is_held_out(tokens: int, max_positions: int, windows: tuple[int, int]) -> None:
    text = np.arange(tokens)
    held = hold_out(text, sequences=50, length=64, max_positions=max_positions, seed=3)
    split = tokens - windows[0] * windows[1]
    np.testing.assert_array_equal(held.windows, text[split:].reshape(windows))
    assert windows[0] * windows[1] <= tokens / 4
    np.testing.assert_array_equal(held.calibration_tokens, random_windows(text[:split], 50, 64, 3))
    assert held.calibration_tokens.max() < split


def test_a_text_too_short_to_hold_a_window_out() -> None:
    with pytest.raises(SpqrError, match=r"has 4095 tokens, .* window of 1024 out it needs 4096"):
        hold_out(np.arange(4095), sequences=4, length=64, max_positions=2048)
    with pytest.raises(SpqrError, match="3072 tokens, too few for windows of 4096"):
        hold_out(np.arange(4096), sequences=4, length=4096, max_positions=8192)
