"""Full fine-tuning beside LoRA: the copy of the layer stands innermost, and the other way round is refused in words."""

from __future__ import annotations

import pytest
import torch

import weft
from tests.conftest import jolt, llama


def test_a_whole_copy_comes_first() -> None:
    model = weft.adapt(weft.adapt(llama(), weft.Full(), name="full"), weft.LoRA(rank=2), name="lora")
    jolt(model)
    ids = torch.arange(3, 12)[None]
    weft.use(model, ["full", "lora"])
    both = model(ids).logits
    with pytest.raises(weft.WeftError, match="must come first"):
        weft.use(model, ["lora", "full"])
        model(ids)
    weft.use(model, ["full", "lora"])
    weft.merge(model)
    assert torch.allclose(model(ids).logits, both, atol=1e-4)
