"""The warnings of peft 0.21.2's own under transformers 5.23, of what concerns neither files nor numbers; any other fails a test."""

from __future__ import annotations

import pytest

PEFTS_OWN = [
    pytest.mark.filterwarnings(f"ignore:{what}")
    for what in (
        ".*is_gradient_checkpointing",
        ".*fan_in_fan_out",
        "Could not find a config file",
        "Unable to fetch remote file",
        "Model has `tie_word_embeddings",
        ".*embedding layer",
        "Setting `save_embedding_layers` to `True`",
        "Adapter .* was active",
        "Adapter .*invalid shape",
        "Unsupported layer type",
        "Invalid `(r|oft_block_size)`",
        "LoRA adapter added to ConvNd layer with groups",
        ".*keys did not match any",
    )
]
