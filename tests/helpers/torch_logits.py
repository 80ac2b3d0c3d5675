"""Logits of a checkpoint in transformers' PyTorch."""

from pathlib import Path

import numpy as np


def torch_logits_of(directory: Path, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The logits in float32; positions do not count the padding, where `mask` is False."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    ones = torch.from_numpy(mask.astype(np.int64))
    with torch.no_grad():
        outputs = model(torch.from_numpy(tokens), attention_mask=ones, position_ids=(ones.cumsum(-1) - 1).clamp(min=0))
    return outputs.logits.numpy()
