"""Falcon's checkpoints from before transformers knew them: other names and defaults in `config.json`."""

from dataclasses import replace

from converters.families.falcon import FALCON, read
from converters.formats.options import Options
from spqr_jax.models import FalconConfig

# Options in the config.json of the time before transformers knew Falcon.
_OLD_OPTIONS = {"n_head": "num_attention_heads", "n_head_kv": "num_kv_heads", "n_layer": "num_hidden_layers"}


def read_old(content: Options) -> FalconConfig:
    """Configuration from a `config.json` with the names and defaults from before transformers knew Falcon.

    Raises:
      ConversionError: as `read`.
    """
    content = {_OLD_OPTIONS.get(key, key): value for key, value in content.items()}
    # Of the two versions of the old code, only that of 40B knew this number, and it knew one arrangement only.
    grouped = content.get("num_kv_heads") is not None
    return read({"multi_query": False, "parallel_attn": grouped, "new_decoder_architecture": grouped, **content})


# Exported as Falcon, so the models do not keep these names.
REFINED_WEB = replace(FALCON, name="RefinedWeb", read=read_old)
REFINED_WEB_MODEL = replace(FALCON, name="RefinedWebModel", read=read_old)
