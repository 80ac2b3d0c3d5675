"""What quantization costs models that have learned something: SpQR < GPTQ < round-to-nearest at equal bits."""

from dataclasses import replace

import pytest
from helpers.trained_models import LENGTH, MODELS, byte_tokens, calibration_tokens, trained

from spqr_jax import SpqrConfig, perplexity, quantize, summarize
from spqr_jax.measure.divergence import mean_divergence, window_divergences
from spqr_jax.measure.perplexity import cut_windows

# Two bits, because models as small as these lose next to nothing at three. GPTQ and round-to-nearest spend on 16-bit
# statistics what SpQR spends on outliers, so that all have about three bits per weight, and SpQR the fewest. They are
# the paper's methods, with its code's damping: the refit helps GPTQ as well and draws them together.
SPQR = SpqrConfig(bits=2, group_size=32, outlier_threshold=0.5, damping=1.0, refit=False)
GPTQ = replace(SPQR, outlier_threshold=None, scale_bits=None, zero_bits=None)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_spqr_beats_gptq_beats_round_to_nearest(name: str) -> None:
    model, params = trained(name)
    calibration = calibration_tokens()
    perplexities = [perplexity(model, params, byte_tokens("test"), window=LENGTH, max_windows=200)]
    bits = []
    for config, tokens in ((SPQR, calibration), (GPTQ, calibration), (GPTQ, None)):
        quantized, _ = quantize(params, tokens, model=model, config=config)
        perplexities.append(perplexity(model, quantized, byte_tokens("test"), window=LENGTH, max_windows=200))
        bits.append(summarize(quantized).bits_per_weight)
    assert perplexities == sorted(perplexities), f"original, SpQR, GPTQ, round-to-nearest: {perplexities}"
    assert bits[0] < min(bits[1:]) < max(bits) < bits[0] + 0.25, bits


@pytest.mark.slow
def test_wider_codes_in_larger_groups_beat_narrow_ones_with_more_outliers() -> None:
    """Why the presets are not the paper's settings; these weights were never in 4 bits before."""
    model, params = trained("llama")
    windows = cut_windows(byte_tokens("test"), window=LENGTH, max_windows=60)
    sizes, divergences = [], []
    for config in (SpqrConfig(), SpqrConfig(bits=4, group_size=32, outlier_threshold=None)):
        quantized, _ = quantize(params, calibration_tokens(), model=model, config=config)
        sizes.append(summarize(quantized).bits_per_weight)
        divergences.append(mean_divergence(list(window_divergences(model, params, quantized, windows))).kl)
    assert sizes[1] < sizes[0] + 0.2
    assert divergences[1] < divergences[0] / 2
