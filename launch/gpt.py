"""A small byte-level GPT: large enough to learn real text, small enough for a laptop's CPU."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from launch.settings import ModelSettings

VOCABULARY = 256  # a token is a byte


class Attention(nn.Module):
    """Causal multi-head self-attention. ``[batch, time, width] -> [batch, time, width]``."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.heads = settings.heads
        self.dropout = settings.dropout
        self.qkv = nn.Linear(settings.width, 3 * settings.width, bias=False)
        self.out = nn.Linear(settings.width, settings.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        heads = (batch, time, self.heads, width // self.heads)
        q, k, v = (part.view(heads).transpose(1, 2) for part in self.qkv(x).split(width, dim=2))
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        projected: Tensor = self.out(y.transpose(1, 2).reshape(batch, time, width))
        return projected


class Block(nn.Module):
    """One pre-norm transformer layer: attention, then a GELU MLP four times as wide."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(settings.width)
        self.attention = Attention(settings)
        self.mlp_norm = nn.LayerNorm(settings.width)
        self.up = nn.Linear(settings.width, 4 * settings.width, bias=False)
        self.down = nn.Linear(4 * settings.width, settings.width, bias=False)
        self.dropout = nn.Dropout(settings.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        x = x + self.dropout(self.down(F.gelu(self.up(self.mlp_norm(x)))))
        return x


class GPT(nn.Module):
    """Byte-level language model with learned positions and a head tied to the embedding.

    Made by :func:`build`, which also draws the initial weights.
    """

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        self.context = settings.context
        self.embedding = nn.Embedding(VOCABULARY, settings.width)
        self.position = nn.Embedding(settings.context, settings.width)
        self.dropout = nn.Dropout(settings.dropout)
        self.blocks = nn.ModuleList(Block(settings) for _ in range(settings.layers))
        self.norm = nn.LayerNorm(settings.width)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats per byte, a float32 scalar.

        Args:
            tokens: int64 ``[batch, time]``, values below 256, ``time <= context``.
            targets: int64 ``[batch, time]``, the byte that follows each token.
        """
        return F.cross_entropy(self.logits(tokens).float().flatten(0, 1), targets.flatten())

    def logits(self, tokens: Tensor) -> Tensor:
        """Scores ``[batch, time, 256]`` of the byte that follows each of ``[batch, time]`` tokens.

        Raises:
            ValueError: ``time`` is longer than the context the model was built for.
        """
        time = tokens.shape[1]
        if time > self.context:
            raise ValueError(
                f"tokens: got {time} positions, but model.context is {self.context}; "
                "shorten the windows or raise model.context"
            )
        x = self.dropout(self.embedding(tokens) + self.position.weight[:time])
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embedding.weight)

    def initialise(self, seed: int) -> None:
        """Draw every weight from a private generator; the global random state is not touched."""
        generator = torch.Generator().manual_seed(seed)
        std = 0.02
        # 2 * layers branches add into the residual stream; this keeps its variance near one.
        branch_std = std / math.sqrt(2 * len(self.blocks))
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:  # only layer norms have vectors
                nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
            else:
                is_branch_end = name.endswith(("attention.out.weight", "down.weight"))
                spread = branch_std if is_branch_end else std
                nn.init.normal_(parameter, std=spread, generator=generator)


def build(settings: ModelSettings, seed: int) -> GPT:
    """A GPT on the CPU in float32; equal settings and seed give equal bits on every rank."""
    with torch.device("meta"):  # construction on meta draws no random numbers
        model = GPT(settings)
    model.to_empty(device="cpu")
    model.initialise(seed)
    return model


def count_parameters(model: nn.Module) -> int:
    """Number of trainable elements; tied weights count once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
