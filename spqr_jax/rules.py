"""Rules: other settings for some matrices, or none at all, by patterns on the matrices' names."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from pallas_kernels.errors import SpqrError
from spqr_jax.config import Rules, SpqrConfig, changed
from spqr_jax.models.decoder import Decoder, layer_name

OF_THE_RUN = ("sequential", "refit")
"""Settings that no rule can change."""


@dataclass(frozen=True)
class Plan:
    """The settings of every matrix.

    Attributes:
      config: of matrices that no rule matches.
      rules: a pattern, and the configuration of the matrices that it matches; None leaves them dense.
    """

    config: SpqrConfig
    rules: tuple[tuple[str, SpqrConfig | None], ...] = ()

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
        return cls(config, tuple((pattern, _changed(config, pattern, changes)) for pattern, changes in rules))

    def find(self, name: str) -> SpqrConfig | None:
        """The configuration of a matrix, such as `layers_0.q_proj`; None leaves it dense."""
        for pattern, config in self.rules:
            if fnmatchcase(name, pattern):
                return config
        return self.config

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

    def as_rules(self) -> tuple[tuple[str, dict[str, Any] | None], ...]:
        """The rules as `Plan.of` takes them."""
        own = dataclasses.asdict(self.config)

        def changes(config: SpqrConfig | None) -> dict[str, Any] | None:
            values = None if config is None else dataclasses.asdict(config).items()
            return None if values is None else {name: value for name, value in values if value != own[name]}

        return tuple((pattern, changes(config)) for pattern, config in self.rules)


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
    """Names of all matrices that are quantized; the stack of all experts' is one.

    Example:
      >>> list(matrix_paths(model))[:2]
      ['layers_0.q_proj', 'layers_0.k_proj']
    """
    for index in range(model.config.num_layers):
        yield from (f"{layer_name(index)}.{name}" for name in model.new_block(index).matrices())


def _changed(config: SpqrConfig, pattern: str, changes: Mapping[str, Any] | None) -> SpqrConfig | None:
    if changes is None:
        return None
    for name in changes:
        if name in OF_THE_RUN:
            raise SpqrError(f"the rule {pattern!r} sets {name}, which holds for the whole run: set it there")
    try:
        return changed(config, changes)
    except SpqrError as error:
        raise SpqrError(f"the rule {pattern!r}: {error}") from None
