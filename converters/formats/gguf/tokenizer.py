"""The tokenizer in a GGUF file, built with the `tokenizers` library.

`tokenizer.ggml.model` names the algorithm: `gpt2` is byte-level BPE with merges, `llama` is SentencePiece's BPE, whose
merges follow from the scores of its tokens. `tokenizer.ggml.pre` says how byte-level BPE cuts text beforehand; the
expressions are those of llama.cpp, which defines the format.
"""

from collections.abc import Mapping, Sequence

from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from converters.errors import ConversionError
from converters.formats.gguf.header import Metadata

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Each expression in turn cuts its matches out of the pieces that the previous one left.
_SPLITS = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]"),
    "gpt-2": (_GPT2,),
    "llama-bpe": (_LLAMA3,),
    # Decimal digits one by one; llama.cpp cuts out \p{N}, so also characters such as ½.
    "smollm": (r"\p{Nd}", _GPT2),
}
# Other names of these, which llama.cpp treats alike.
_PRE_ALIASES = {
    **dict.fromkeys(("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"), "llama-bpe"),
    **dict.fromkeys(("phi-2", "gigachat", "a.x-4.0", "mellum", "exaone4"), "gpt-2"),
}
_SPACE = "▁"


def build_tokenizer(metadata: Metadata) -> PreTrainedTokenizerFast | None:
    """Builds the tokenizer that the `tokenizer.` keys of a GGUF file describe; None if it has no such keys.

    Raises:
      ConversionError: the algorithm or the way of cutting text is not supported, or a list is missing.

    Example:
      >>> build_tokenizer({"general.architecture": "llama"}) is None
      True
    """
    content = {key.removeprefix("tokenizer."): v for key, v in metadata.items() if key.startswith("tokenizer.")}
    if (pre := content.get("ggml.pre")) in _PRE_ALIASES:
        content["ggml.pre"] = _PRE_ALIASES[pre]
    algorithm = content.get("ggml.model", "none")
    if algorithm == "none":
        return None
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if algorithm not in builders:
        raise ConversionError(f"tokenizer.ggml.model {algorithm!r} is not supported, only {', '.join(builders)}")
    tokens = _required(content, "ggml.tokens")
    tokenizer = builders[algorithm](content, tokens)
    _add_tokens(tokenizer, tokens, content.get("ggml.token_type", ()))
    special = {
        f"{role}_token": _token(content, tokens, f"ggml.{key}_token_id")
        for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if f"ggml.{key}_token_id" in content
    }
    begins = algorithm == "llama" or content.get("ggml.pre") == "llama-bpe"
    bos = special.get("bos_token") if content.get("ggml.add_bos_token", begins) else None
    eos = special.get("eos_token") if content.get("ggml.add_eos_token", False) else None
    tokenizer.post_processor = _enclose(tokenizer, bos, eos)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=content.get("chat_template"),
        clean_up_tokenization_spaces=False,
        **special,
    )


def _byte_level(content: Metadata, tokens: Sequence[str]) -> Tokenizer:
    """BPE over bytes: SmolLM2, LLaMA 3 and Falcon."""
    pre = content.get("ggml.pre", "default")
    if pre not in _SPLITS:
        raise ConversionError(f"tokenizer.ggml.pre {pre!r} is not supported, only {', '.join(_SPLITS)}")
    if content.get("ggml.add_space_prefix", False):
        raise ConversionError("tokenizer.ggml.add_space_prefix is not supported with tokenizer.ggml.model 'gpt2'")
    merges = [tuple(merge.split(" ", 1)) for merge in _required(content, "ggml.merges")]
    # LLaMA 3 keeps a piece that is a token, even where no chain of merges leads to it.
    try:
        model = models.BPE(vocab=_vocabulary(tokens), merges=merges, ignore_merges=pre == "llama-bpe")
    except Exception as error:  # the Rust library raises plain Exception
        raise ConversionError(f"tokenizer.ggml.merges do not fit tokenizer.ggml.tokens: {error}") from error
    tokenizer = Tokenizer(model)
    splits = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in _SPLITS[pre]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(content: Metadata, tokens: Sequence[str]) -> Tokenizer:
    """BPE over characters, with bytes for characters that the vocabulary lacks: LLaMA 1 and 2."""
    vocabulary = _vocabulary(tokens)
    merges = _merges_from_scores(vocabulary, _required(content, "ggml.scores"))
    unknown = _token({"ggml.unknown_token_id": 0, **content}, tokens, "ggml.unknown_token_id")
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", _SPACE)]
    undo: list[decoders.Decoder] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if content.get("ggml.add_space_prefix", True):
        steps.insert(0, normalizers.Prepend(_SPACE))
        undo.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(undo)
    return tokenizer


def _merges_from_scores(vocabulary: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """The pairs of tokens that make a token, highest score first.

    SentencePiece always joins the neighbours whose result has the highest score, so that order is the merges' rank.
    """
    pairs = [
        (-scores[index], index, token[:cut], token[cut:])
        for token, index in vocabulary.items()
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    return [(left, right) for _, _, left, right in sorted(pairs)]


def _add_tokens(tokenizer: Tokenizer, tokens: Sequence[str], kinds: Sequence[int]) -> None:
    """Control tokens are special; these and user-defined ones are found in the text before it is cut."""
    for special, kind in ((True, TokenType.CONTROL), (False, TokenType.USER_DEFINED)):
        found = [token for token, its_kind in zip(tokens, kinds, strict=False) if its_kind == kind]
        tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token in found])


def _enclose(tokenizer: Tokenizer, bos: str | None, eos: str | None) -> processors.TemplateProcessing:
    """Puts the tokens that are to begin and end a text around it, and around each text of a pair."""
    single = [*([f"{bos}:0"] if bos else []), "$A:0", *([f"{eos}:0"] if eos else [])]
    second = [*([f"{bos}:1"] if bos else []), "$B:1", *([f"{eos}:1"] if eos else [])]
    special = [(token, tokenizer.token_to_id(token)) for token in (bos, eos) if token]
    return processors.TemplateProcessing(single=single, pair=[*single, *second], special_tokens=special)


def _vocabulary(tokens: Sequence[str]) -> dict[str, int]:
    return {token: index for index, token in enumerate(tokens)}


def _token(content: Metadata, tokens: Sequence[str], key: str) -> str:
    if not 0 <= content[key] < len(tokens):
        raise ConversionError(f"tokenizer.{key} is {content[key]}, but there are {len(tokens)} tokens")
    return tokens[content[key]]


def _required(content: Metadata, key: str) -> list:
    if not isinstance(content.get(key), list):
        raise ConversionError(f"tokenizer.{key} is missing")
    return content[key]
