"""Rotary embedding (Su et al. 2021), and its scalings for texts longer than those of the training."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from spqr_jax.models.optional import optional

Scaling = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]


@dataclass(frozen=True)
class RotaryConfig:
    """Angles from positions, and how they are scaled.

    Attributes:
      theta: base of the geometric series of frequencies.
      scaling: `default`; `linear`, positions divided by `factor`; `dynamic`, a base that grows with the length of the
        text beyond `original_context` (NTK); `llama3`, only long wavelengths divided, with a ramp between
        `original_context / low_freq_factor` and `original_context / high_freq_factor`; `yarn` (Peng et al. 2023), a
        ramp over the features from `beta_fast` to `beta_slow` turns in `original_context`; `longrope` (Ding et al.
        2024), one divisor per frequency, from `short_factors` or, for texts beyond `original_context`, `long_factors`.
      factor: of the scaling.
      low_freq_factor: of `llama3`.
      high_freq_factor: of `llama3`.
      original_context: tokens that the model was trained with, before it was scaled.
      share: part of a head's features, the first ones, that is rotated.
      attention_factor: cosines and sines are multiplied by it (`yarn`, `longrope`).
      beta_fast: of `yarn`.
      beta_slow: of `yarn`.
      truncate: the ramp of `yarn` starts and ends at whole features.
      short_factors: of `longrope`.
      long_factors: of `longrope`.
    """

    theta: float = 10000.0
    scaling: Scaling = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192
    share: float = optional(1.0)
    attention_factor: float = optional(1.0)
    beta_fast: float = optional(32.0)
    beta_slow: float = optional(1.0)
    truncate: bool = optional(True)
    short_factors: tuple[float, ...] = optional(())
    long_factors: tuple[float, ...] = optional(())

    @property
    def depends_on_length(self) -> bool:
        """Whether one more token changes the angles of those before it."""
        return self.scaling in ("dynamic", "longrope")

    def frequencies(self, head_dim: int, length: Int[Array, ""] | int = 0) -> Float[Array, " half"]:
        """Radians per position of each pair of features, `[rotated features / 2]`, for a text of a length."""
        features = int(head_dim * self.share)
        exponents = jnp.arange(0, features, 2, dtype=jnp.float32) / features
        return _SCALED[self.scaling](self, exponents, features, length)


Scaled = Callable[[RotaryConfig, Array, int, Array | int], Array]
"""Frequencies from a configuration, the exponents of its base, the number of rotated features and a length."""


def _default(rotary: RotaryConfig, exponents: Array, features: int, length: Array | int) -> Array:
    return 1.0 / (rotary.theta**exponents)


def _linear(rotary: RotaryConfig, exponents: Array, features: int, length: Array | int) -> Array:
    return _default(rotary, exponents, features, length) / rotary.factor


def _dynamic(rotary: RotaryConfig, exponents: Array, features: int, length: Array | int) -> Array:
    longer = jnp.maximum(length, rotary.original_context) / rotary.original_context
    base = rotary.theta * (rotary.factor * longer - (rotary.factor - 1)) ** (features / (features - 2))
    return 1.0 / (base**exponents)


def _llama3(rotary: RotaryConfig, exponents: Array, features: int, length: Array | int) -> Array:
    frequencies = _default(rotary, exponents, features, length)
    turns = rotary.original_context * frequencies / (2 * math.pi)
    ramp = (turns - rotary.low_freq_factor) / (rotary.high_freq_factor - rotary.low_freq_factor)
    keep = jnp.clip(ramp, 0.0, 1.0)
    return keep * frequencies + (1 - keep) * frequencies / rotary.factor


def _yarn(rotary: RotaryConfig, exponents: Array, features: int, length: Array | int) -> Array:
    def feature(turns: float) -> float:
        """Feature, as a fraction, that turns so often in the original context."""
        return features * math.log(rotary.original_context / (turns * 2 * math.pi)) / (2 * math.log(rotary.theta))

    first, last = feature(rotary.beta_fast), feature(rotary.beta_slow)
    if rotary.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, features - 1)
    width = last - first or 0.001
    divided = jnp.clip((jnp.arange(features // 2, dtype=jnp.float32) - first) / width, 0.0, 1.0)
    frequencies = _default(rotary, exponents, features, length)
    return frequencies / rotary.factor * divided + frequencies * (1 - divided)


def _longrope(rotary: RotaryConfig, exponents: Array, features: int, length: Array | int) -> Array:
    long, short = jnp.array(rotary.long_factors), jnp.array(rotary.short_factors)
    return 1.0 / (jnp.where(length > rotary.original_context, long, short) * rotary.theta**exponents)


_SCALED: Mapping[Scaling, Scaled] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}


def rotate(
    x: Float[Array, "batch tokens heads head_dim"],
    positions: Int[Array, "batch tokens"],
    frequencies: Float[Array, " half"],
    factor: Float[Array, ""] | float = 1.0,
) -> Float[Array, "batch tokens heads head_dim"]:
    """Rotates the pair (x[i], x[i + half]) by position · frequency[i], times a factor, in float32.

    Features beyond the pairs do not change.
    """
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if not isinstance(factor, float) or factor != 1.0:
        cos, sin = cos * factor, sin * factor
    half = len(frequencies)
    x32 = x[..., : 2 * half].astype(jnp.float32)
    first, second = jnp.split(x32, 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return rotated if 2 * half == x.shape[-1] else jnp.concatenate([rotated, x[..., 2 * half :]], axis=-1)
