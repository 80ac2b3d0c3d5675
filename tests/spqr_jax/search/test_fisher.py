"""Derivatives along changes of matrices, taken part by part, are those of the whole model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny_llama import CONFIG, tiny_params

from spqr_jax.models import Llama
from spqr_jax.models.decoder import layer_name
from spqr_jax.search.fisher import output_of_block, slopes_of_block, slopes_of_embedding, slopes_of_ending

TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (3, 6)).astype(np.int32)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_slopes_are_those_of_the_whole_model(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Instead of drawn tokens, the likeliest.
    monkeypatch.setattr(jax.random, "categorical", lambda key, logits: jnp.argmax(logits, -1))
    model = Llama(dataclasses.replace(CONFIG, tie_embeddings=tied))
    params, moves = (jax.tree.map(jnp.asarray, tiny_params(seed, model)) for seed in (0, 1))
    head = "embed_tokens" if tied else "lm_head"
    states = [model.apply({"params": {"embed_tokens": params["embed_tokens"]}}, TOKENS, method="embed")]
    for index in range(CONFIG.num_layers):
        states.append(output_of_block(model.new_block(index), params[layer_name(index)], states[-1]))

    ending = {name: params[name] for name in ("norm", head)}
    along = {"norm": jax.tree.map(jnp.zeros_like, params["norm"]), head: moves[head]}
    gradients, slopes = slopes_of_ending(model, ending, along, states.pop(), jax.random.key(0))
    found = {head: slopes}
    for index in reversed(range(CONFIG.num_layers)):
        kernels = {"q_proj": moves[layer_name(index)]["q_proj"]["kernel"]}
        gradients, slopes = slopes_of_block(
            model.new_block(index), params[layer_name(index)], kernels, states.pop(), gradients
        )
        found[f"{layer_name(index)}.q_proj"] = slopes["q_proj"]
    looked_up = slopes_of_embedding(model, params["embed_tokens"], moves["embed_tokens"], TOKENS, gradients)
    found["embed_tokens"] = found.get("embed_tokens", 0) + looked_up

    likeliest = model.apply({"params": params}, TOKENS).argmax(-1)

    def log_probability(params: dict[str, object]) -> jax.Array:
        logits = model.apply({"params": params}, TOKENS)
        return jnp.take_along_axis(jax.nn.log_softmax(logits), likeliest[..., None], 2).sum((1, 2))

    for name, slopes in found.items():
        part, *matrix = name.split(".")
        along = jax.tree.map(jnp.zeros_like, params)
        if matrix:
            along[part]["q_proj"]["kernel"] = moves[part]["q_proj"]["kernel"]
        else:
            along[part] = moves[part]
        expected = jax.jvp(log_probability, (params,), (along,))[1]
        np.testing.assert_allclose(slopes, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max(), err_msg=name)
