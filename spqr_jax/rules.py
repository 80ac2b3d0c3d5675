"""Rules: other settings for some matrices, or none at all, by patterns on the matrices' names."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from pallas_kernels.errors import SpqrError
from spqr_jax.config import Rules, SpqrConfig, changed
from spqr_jax.models.decoder import Decoder, layer_name
from spqr_jax.models.ending import ENDS, end_names

OF_THE_RUN = ("sequential", "refit", "embedding_bits")
"""Settings that no rule can change."""


@dataclass(frozen=True)
class Plan:
    """The settings of every matrix.

    Attributes:
      config: of matrices that no rule matches.
      rules: changes of it.
    """

    config: SpqrConfig
    rules: Rules = ()

    @classmethod
    def of(cls, config: SpqrConfig, rules: Rules = ()) -> "Plan":
        """A configuration and the rules that change it.

        Raises:
          SpqrError: a rule has an unknown setting, a value that cannot be, or a setting of the whole run.

        Example:
          >>> plan = Plan.of(COMPACT, [("layers_0.*", {"bits": 8}), ("*.down_proj", None)])
          >>> plan.find("layers_0.down_proj").bits, plan.find("layers_1.down_proj"), plan.find("layers_1.q_proj").bits
          (8, None, 4)
        """
        for pattern, changes in rules:
            _check_changes(config, pattern, changes)
        return cls(config, tuple((pattern, changes) for pattern, changes in rules))

    def find(self, name: str) -> SpqrConfig | None:
        """The configuration of a matrix, such as `layers_0.q_proj` or `embed_tokens`; None leaves it dense."""
        own = self.config.of_ends() if name in ENDS else self.config
        for pattern, changes in self.rules:
            if fnmatchcase(name, pattern):
                if changes is None or (own is None and "bits" not in changes):
                    return None
                return changed(own or self.config, changes)
        return own

    def ends(self, model: Decoder) -> tuple[str, ...]:
        """Which of embedding and head are quantized."""
        return tuple(name for name in end_names(model) if self.find(name) is not None)

    def checked(self, model: Decoder) -> "Plan":
        """The plan, if each rule matches a matrix of a model, and matrices of one input have one order.

        Raises:
          SpqrError: a rule matches no matrix, or matrices of one input would be quantized in different orders.
        """
        names = list(matrix_paths(model))
        for pattern, _ in self.rules:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise SpqrError(f"the rule {pattern!r} matches no matrix: the names go from {names[0]} to {names[-1]}")
        for index in range(model.config.num_layers):
            for matrices in model.new_block(index).feeds().values():
                found = {name: self.find(f"{layer_name(index)}.{name}") for name in matrices}
                orders = {name: config.permutation for name, config in found.items() if config is not None}
                if len(set(orders.values())) > 1:
                    each = ", ".join(f"{name} {order}" for name, order in orders.items())
                    raise SpqrError(
                        f"{layer_name(index)}: matrices of one input need one permutation, but the rules give {each}"
                    )
        return self


def described(rules: Rules) -> dict[str, str]:
    """Rules in words, by their patterns.

    Example:
      >>> described([("layers_0.*", {"bits": 8, "group_size": 32}), ("*.down_proj", None)])
      {'layers_0.*': 'bits 8, group size 32', '*.down_proj': 'left dense'}
    """

    def words(changes: Mapping[str, Any] | None) -> str:
        if changes is None:
            return "left dense"
        return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in changes.items())

    return {pattern: words(changes) for pattern, changes in rules}


def matrix_paths(model: Decoder) -> Iterator[str]:
    """Names of all matrices that can be quantized; the stack of all experts' is one. Embedding and head come last.

    Example:
      >>> list(matrix_paths(model))[:2]
      ['layers_0.q_proj', 'layers_0.k_proj']
    """
    for index in range(model.config.num_layers):
        yield from (f"{layer_name(index)}.{name}" for name in model.new_block(index).matrices())
    yield from end_names(model)


def _check_changes(config: SpqrConfig, pattern: str, changes: Mapping[str, Any] | None) -> None:
    for name in changes or ():
        if name in OF_THE_RUN:
            raise SpqrError(f"the rule {pattern!r} sets {name}, which holds for the whole run: set it there")
    try:
        changed(config, changes or {})
    except SpqrError as error:
        raise SpqrError(f"the rule {pattern!r}: {error}") from None
