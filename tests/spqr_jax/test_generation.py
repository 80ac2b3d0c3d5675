import itertools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from helpers import tiny_llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pallas_kernels.backends.table import BACKENDS
from spqr_jax import generation
from spqr_jax.generation import generate, stream
from spqr_jax.models import Llama
from spqr_jax.models.stacked_blocks import stack_blocks, unstack_blocks
from spqr_jax.prompts import chat_prompt

CONFIG = replace(tiny_llama.CONFIG, max_positions=256)
MODEL = Llama(CONFIG)
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [5], [3, 5, 8]]


@pytest.fixture(scope="module")
def params():
    """Random parameters, large enough that the next token depends on the context."""
    return stack_blocks(tiny_llama.tiny_params(1, MODEL, scale=0.5))


@pytest.fixture(scope="module")
def greedy(params):
    return generate(MODEL, params, PROMPTS, max_new_tokens=20)


def without_cache(params, prompt, count):
    """Greedy tokens from whole forward passes over the unpadded prompt."""
    tokens = list(prompt)
    forward = jax.jit(lambda tokens, last: MODEL.apply({"params": params}, tokens)[0, last])
    for _ in range(count):
        padded = np.zeros((1, len(prompt) + count), np.int32)
        padded[0, : len(tokens)] = tokens
        tokens.append(int(forward(padded, len(tokens) - 1).argmax()))
    return tokens[len(prompt) :]


def until(tokens, stop):
    return tokens[: tokens.index(stop)] if stop in tokens else tokens


def test_greedy_tokens_are_those_of_whole_passes(params, greedy):
    assert greedy == [without_cache(params, prompt, 20) for prompt in PROMPTS]
    assert all(len(set(tokens)) > 5 for tokens in greedy), "the fixture is too easy"


def test_prompts_do_not_depend_on_their_batch(params, greedy):
    assert [generate(MODEL, params, [prompt], max_new_tokens=20)[0] for prompt in PROMPTS] == greedy


def test_tokens_do_not_depend_on_the_rounding_of_lengths(params, greedy, monkeypatch):
    monkeypatch.setattr(generation, "_BUCKET", 7)
    assert generate(MODEL, params, PROMPTS, max_new_tokens=20) == greedy


def test_similar_lengths_share_a_compiled_program(params):
    generate(MODEL, params, [[1, 2, 3]], max_new_tokens=5)
    compiled = generation.extend._cache_size(), generation.decode._cache_size()
    generate(MODEL, params, [list(range(40))], max_new_tokens=9)
    assert (generation.extend._cache_size(), generation.decode._cache_size()) == compiled


def test_fewer_new_tokens_are_a_prefix(params, greedy):
    for count in (1, 2, 7):
        assert generate(MODEL, params, PROMPTS, max_new_tokens=count) == [tokens[:count] for tokens in greedy]


def test_stop_tokens_end_a_sequence_and_are_left_out(params, greedy):
    first, second = greedy[0][3], greedy[1][0]
    expected = [until(until(tokens, first), second) for tokens in greedy]
    assert expected[1] == []
    assert generate(MODEL, params, PROMPTS, max_new_tokens=20, stop_tokens=[first, second]) == expected


@pytest.mark.parametrize("chunk", [1, 3, 50])
def test_stream_yields_the_tokens_of_generate(params, chunk):
    options = {"max_new_tokens": 20, "temperature": 0.8, "stop_tokens": range(5)}
    pieces = list(stream(MODEL, params, PROMPTS, chunk=chunk, **options))
    joined = [list(itertools.chain(*rows)) for rows in zip(*pieces, strict=True)]
    assert joined == generate(MODEL, params, PROMPTS, **options)
    assert all(len(row) <= chunk for piece in pieces for row in piece)


def test_stream_ends_when_all_sequences_have_stopped(params, greedy):
    stop_tokens = [tokens[index] for tokens, index in zip(greedy, (3, 0, 5), strict=True)]
    pieces = list(stream(MODEL, params, PROMPTS, max_new_tokens=20, stop_tokens=stop_tokens))
    lengths = [next(i for i, token in enumerate(tokens) if token in stop_tokens) for tokens in greedy]
    assert len(set(lengths)) > 1
    assert len(pieces) == max(lengths) + 1
    assert pieces[-1] == [[], [], []]


def test_unstacked_parameters_give_the_same_tokens(params, greedy):
    assert generate(MODEL, unstack_blocks(params), PROMPTS, max_new_tokens=20) == greedy


def test_decoding_block_by_block_gives_the_same_tokens(params, greedy, monkeypatch):
    monkeypatch.setattr(generation, "choose", lambda implementation: BACKENDS["pallas"])
    decoded: list[Any] = []

    def decode(model, policy, params, *args):
        decoded.append(params)
        return compiled(model, policy, params, *args)

    compiled = generation.decode
    monkeypatch.setattr(generation, "decode", decode)
    for form in (params, unstack_blocks(params)):
        assert generate(MODEL, form, PROMPTS, max_new_tokens=20) == greedy
    assert all({"layers_0", "layers_1"} < set(form) for form in decoded)
    assert len(decoded) == 2


def test_greedy_tokens_are_those_of_transformers():
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig as TorchConfig
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    reference = LlamaForCausalLM(
        TorchConfig(
            vocab_size=CONFIG.vocab_size,
            hidden_size=CONFIG.hidden_size,
            intermediate_size=CONFIG.mlp_size,
            num_hidden_layers=CONFIG.num_layers,
            num_attention_heads=CONFIG.num_heads,
            num_key_value_heads=CONFIG.num_kv_heads,
            head_dim=CONFIG.head_dim,
            max_position_embeddings=CONFIG.max_positions,
            initializer_range=0.5,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).eval()
    params = from_torch(reference.state_dict())
    length = max(map(len, PROMPTS))
    padded = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])

    def expected(**options):
        output = reference.generate(padded, attention_mask=mask, do_sample=False, max_new_tokens=20, **options)
        return output[:, length:].tolist()

    greedy = expected()
    assert all(len(set(tokens)) > 5 for tokens in greedy), "the reference is too easy"
    assert generate(MODEL, params, PROMPTS, max_new_tokens=20) == greedy

    stop = greedy[2][6]
    stopped = [until(tokens, stop) for tokens in expected(eos_token_id=stop)]
    assert any(len(tokens) < 20 for tokens in stopped)
    assert generate(MODEL, params, PROMPTS, max_new_tokens=20, stop_tokens=[stop]) == stopped


def from_torch(state):
    """Our parameters from a PyTorch LLaMA's: kernels are transposed, embedding and norms renamed."""
    params = {}
    for name, value in state.items():
        *path, last = name.removeprefix("model.").replace("layers.", "layers_").split(".")
        last = {"embed_tokens": "embedding", "norm": "scale"}.get(path[-1], "kernel")
        if path[-1].endswith("layernorm"):
            last = "scale"
        path = [part for part in path if part not in ("self_attn", "mlp")]
        node = params
        for part in path:
            node = node.setdefault(part, {})
        node[last] = jnp.asarray(value.numpy().T if last == "kernel" else value.numpy())
    return params


def test_the_same_seed_gives_the_same_tokens(params):
    def sampled(seed):
        return generate(MODEL, params, PROMPTS, max_new_tokens=20, temperature=1.0, seed=seed)

    assert sampled(7) == sampled(7)
    assert sampled(7) != sampled(8)


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}])
def test_sampling_from_one_token_is_greedy(params, greedy, options):
    assert generate(MODEL, params, PROMPTS, max_new_tokens=20, temperature=1.5, **options) == greedy


def kept(probabilities, top_k, top_p):
    """The definition of top-k, then top-p, token by token: which ids may be drawn."""
    ids = np.argsort(-probabilities)[:top_k]
    if top_p is None:
        return set(ids)
    restricted = probabilities[ids] / probabilities[ids].sum()
    count = 1
    while restricted[:count].sum() < top_p:
        count += 1
    return set(ids[:count])


def assert_distributed(drawn, logits, temperature, top_k, top_p):
    """Every draw is allowed, and their counts pass a chi-square test."""
    logits = np.asarray(logits, np.float64)
    weights = np.exp((logits - logits.max()) / temperature)
    probabilities = weights / weights.sum()
    support = kept(probabilities, top_k, top_p)
    assert set(drawn) <= support

    inside = np.zeros(probabilities.size, bool)
    inside[list(support)] = True
    expected = np.where(inside, probabilities, 0) / probabilities[inside].sum() * drawn.size
    counts = np.bincount(drawn, minlength=probabilities.size)
    # The test wants some draws in each class: the unlikely tokens are one class together.
    rare = expected < 5
    observed, expected = (np.append(a[~rare], a[rare].sum()) for a in (counts, expected))
    used = expected > 0
    assert used.sum() > 3, "too few classes for a test"
    assert scipy.stats.chisquare(observed[used], expected[used]).pvalue > 1e-3


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(0.5, None, None), (2.0, 7, None), (1.0, 1000, None), (1.5, None, 0.8), (1.5, 12, 0.6)],
)
def test_choices_have_the_distribution_of_the_logits(temperature, top_k, top_p):
    logits = 2 * np.random.default_rng(2).standard_normal(CONFIG.vocab_size).astype(np.float32)
    policy = generation.Policy(temperature, top_k, top_p, stop_tokens=())
    choose = jax.jit(lambda rows: generation._choose(rows, policy, jax.random.key(3)))
    drawn = np.asarray(choose(np.broadcast_to(logits, (4096, logits.size))))
    assert_distributed(drawn, logits, temperature, top_k, top_p)


def test_each_step_and_each_prompt_draws_anew(params):
    # Where all tokens have the same embedding the logits are the same at every step, so that all draws are alike.
    embedding = jnp.broadcast_to(params["embed_tokens"]["embedding"][0], (CONFIG.vocab_size, CONFIG.hidden_size))
    params = {**params, "embed_tokens": {"embedding": embedding}}
    logits = jax.jit(MODEL.apply)({"params": params}, jnp.zeros((1, 1), jnp.int32))[0, 0]
    rows = np.asarray(generate(MODEL, params, [[1]] * 64, max_new_tokens=64, temperature=1.5, top_k=12, top_p=0.8))
    assert_distributed(rows.ravel(), logits, temperature=1.5, top_k=12, top_p=0.8)
    assert len(np.unique(rows, axis=0)) == len(np.unique(rows, axis=1).T) == 64


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0, but must be at least 1"),
        ([[1]], {"temperature": -0.5}, "temperature is -0.5"),
        ([[1]], {"temperature": float("nan")}, "temperature is nan"),
        ([[1]], {"top_k": 0}, "top_k is 0, but must be at least 1"),
        ([[1]], {"top_p": 0.0}, "top_p is 0.0, but must be over 0 and at most 1"),
        ([[1]], {"top_p": 1.5}, "top_p is 1.5"),
        ([], {}, "there are no prompts"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1, 61]], {}, "token id 61 is outside the vocabulary of 61 tokens"),
        ([[-1]], {}, "token id -1 is outside the vocabulary of 61 tokens"),
        ([[1], [1] * 250], {"max_new_tokens": 7}, "a prompt of 250 tokens and 7 new ones exceed the 256 positions"),
    ],
)
def test_errors(params, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate(MODEL, params, prompts, **{"max_new_tokens": 3, **options})


def test_stream_checks_when_called(params):
    with pytest.raises(ValueError, match="chunk is 0"):
        stream(MODEL, params, [[1]], max_new_tokens=3, chunk=0)


def test_the_last_position_can_be_generated(params):
    assert len(generate(MODEL, params, [[1] * 250], max_new_tokens=6)[0]) == 6


def test_chat_prompt_applies_the_template_where_there_is_one():
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "user", "assistant", "hello", "world", ":"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    assert chat_prompt(tokenizer, "hello world") == [3, 4]

    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}assistant :{% endif %}"
    )
    assert chat_prompt(tokenizer, "hello world") == [1, 5, 3, 4, 2, 5]
