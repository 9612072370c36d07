"""Models that the tests share: small, random, of many kinds."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that needs the network is a fault

import pytest
import torch
import transformers
from torch import nn

torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other


def llama(seed: int = 0, dtype: torch.dtype = torch.float32, **more: object) -> nn.Module:
    """A Llama of two layers with grouped keys and an untied head."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        **dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
               max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False) | more
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def gpt2(seed: int = 0) -> nn.Module:
    """A GPT-2: Conv1D layers, learnt positions, a tied head."""
    torch.manual_seed(seed)
    config = transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=0)
    return transformers.GPT2LMHeadModel(config).eval()


class ConvNet(nn.Module):
    """No transformer: convolutions of several kinds, an embedding and linear layers; takes (n, 3, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular")
        self.second = nn.Conv2d(8, 8, 3, stride=2, dilation=2, padding=2, bias=False)
        self.third = nn.Conv2d(8, 12, 3, padding=1, groups=4)
        self.out = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.third(torch.relu(self.second(torch.relu(self.first(x))))))
        return self.out(x.mean((2, 3)))


class Plain(nn.Module):
    """No transformer: an embedding, two linear layers and a norm; takes ids (n, t)."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.up = nn.Linear(16, 24, bias)
        self.norm = nn.LayerNorm(24)
        self.down = nn.Linear(24, 16, bias)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        return x + self.down(self.norm(torch.relu(self.up(x))))


def jolt(module: nn.Module, size: float = 0.1, seed: int = 7) -> None:
    """Move every trainable parameter, so that an adapter does something."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn_like(p))


@pytest.fixture
def ids() -> torch.Tensor:
    torch.manual_seed(3)
    return torch.randint(3, 40, (5, 7))
