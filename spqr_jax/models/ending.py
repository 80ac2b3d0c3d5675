"""The parts behind and before the blocks that can be packed: the embedding and the head, tied or not."""

from dataclasses import dataclass

from jaxtyping import Array, Float

from spqr_jax.models.decoder import Block, Context, Decoder, Params, Stage, State

EMBEDDING, HEAD = "embed_tokens", "lm_head"
ENDS = EMBEDDING, HEAD


def end_names(model: Decoder) -> tuple[str, ...]:
    """Names of the embedding and, unless it is the same table, of the head.

    Example:
      >>> end_names(model)
      ('embed_tokens', 'lm_head')
    """
    return (EMBEDDING,) if model.config.tie_embeddings else ENDS


def head_name(model: Decoder) -> str:
    """Name of the part that makes logits: the embedding where it is tied."""
    return end_names(model)[-1]


def leaf_name(end: str) -> str:
    """Name of the array of the embedding, `[vocabulary, features]`, or of the head, `[features, vocabulary]`."""
    return "embedding" if end == EMBEDDING else "kernel"


@dataclass(frozen=True)
class FinalNorm:
    """The norm behind the last block of a model, as a function. A Flax module would join the one that holds it."""

    model: Decoder

    def __call__(self, params: Params, hidden: Float[Array, "*batch hidden"]) -> Float[Array, "*batch features"]:
        """The head's input, from the parameters of the norm, if it has any."""
        tree = {"norm": params} if params else {}
        return self.model.apply({"params": tree}, hidden, method=lambda model, hidden: model.norm(hidden))  # type: ignore


class Ending(Block):
    """The final norm and the head as a block, whose one matrix multiplies the normalized hidden states.

    Attributes:
      norm: the model's.
      matrix: name of the head.
    """

    norm: FinalNorm | None = None
    matrix: str = HEAD

    @property
    def stages(self) -> tuple[Stage, ...]:
        """One stage, which makes the head's input."""
        return (Stage("normalize", {"normalized": (self.matrix,)}),)

    def normalize(self, state: State, context: Context) -> State:
        """Adds the head's input."""
        assert self.norm is not None
        return {**state, "normalized": self.norm(self.variables["params"].get("norm", {}), state["hidden"])}


def ending(model: Decoder) -> Ending:
    """The final norm and the head of a model as a block."""
    return Ending(model.config, norm=FinalNorm(model), matrix=head_name(model), parent=None)
