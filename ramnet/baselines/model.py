"""A language model whose mixer is one of the baselines, in the skeleton of ``ramnet.RamNetForCausalLM``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from ramnet.baselines import mixers
from ramnet.blocks import GatedConvBlock, SwiGLU
from ramnet.files import written_aside
from ramnet.state import write_safetensors

Name = Literal["attention", "window", "linear", "gla", "deltanet", "gated_deltanet", "mamba2", "rwkv7"]
MIXERS = {
    "attention": mixers.Attention, "window": mixers.Attention, "linear": mixers.LinearAttention,
    "gla": mixers.GatedLinearAttention, "deltanet": mixers.DeltaNet, "gated_deltanet": mixers.GatedDeltaNet,
    "mamba2": mixers.Mamba2, "rwkv7": mixers.Rwkv7,
}  # fmt: skip
_Size = Field(gt=0, lt=2**20)


class BaselineConfig(BaseModel):
    """Hyper-parameters of a baseline; immutable. Fields that ``RamNetConfig`` has mean the same."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    mixer: Name
    vocab_size: int = _Size
    hidden_size: int = _Size
    num_layers: int = _Size
    num_heads: int = _Size
    key_dim: int = Field(gt=0, lt=2**20, description="width of a head's queries and keys")
    value_dim: int = Field(gt=0, lt=2**20, description="width of a head's values")
    window: int | None = Field(None, gt=0, description="tokens that a sliding window sees")
    intermediate_size: int = Field(0, ge=0, description="SwiGLU width; 0 omits the FFN")
    conv_layers: int = Field(0, ge=0, description="gated short convolution blocks before the first layer")
    conv_kernel: int = Field(3, gt=0, description="taps of each gated short convolution")
    tie_embeddings: bool = False
    embedding_std: float = Field(0.02, gt=0)
    final_gain: float = Field(1.0, gt=0)
    norm_eps: float = Field(1e-5, gt=0)

    @model_validator(mode="after")
    def _window_fits(self) -> Self:
        if (self.mixer == "window") != (self.window is not None):
            raise ValueError(f"mixer is {self.mixer!r} and window {self.window}; a window belongs to 'window' alone")
        return self


class Block(nn.Module):
    """x + mixer(LayerNorm(x)), then x + FFN(LayerNorm(x))."""

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__()
        c = config
        self.mixer_norm = nn.LayerNorm(c.hidden_size, eps=c.norm_eps)
        options = {} if c.window is None else {"window": c.window}
        self.mixer: mixers.Mixer = MIXERS[c.mixer](c.hidden_size, c.num_heads, c.key_dim, c.value_dim, **options)
        self.has_ffn = c.intermediate_size > 0
        if self.has_ffn:
            self.ffn_norm = nn.LayerNorm(c.hidden_size, eps=c.norm_eps)
            self.ffn = SwiGLU(c)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.mixer_norm(x))
        return x + self.ffn(self.ffn_norm(x)) if self.has_ffn else x


class BaselineForCausalLM(nn.Module):
    """Embedding, gated short convolutions, blocks, norm and head, each as in ``ramnet.RamNetForCausalLM``."""

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        nn.init.normal_(self.embedding.weight, std=config.embedding_std)
        self.convs = nn.ModuleList(GatedConvBlock(config) for _ in range(config.conv_layers))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        nn.init.constant_(self.norm.weight, config.final_gain)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def hidden_states(self, input_ids: Tensor) -> tuple[Tensor, None]:
        """Return the input of the output head, [B, T, C], of ids [B, T], and no state."""
        x = self.embedding(input_ids)
        before = x.new_zeros(len(x), self.config.conv_kernel - 1, self.config.hidden_size)
        for conv in self.convs:
            x, _ = conv(x, before)
        for block in self.blocks:
            x = block(x)
        return self.norm(x), None

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return logits [B, T, V] of ids [B, T]."""
        return self.head(self.hidden_states(input_ids)[0])

    def save_pretrained(self, directory: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` to ``directory``, each atomically."""
        tensors = self.state_dict()
        if self.config.tie_embeddings:
            del tensors["head.weight"]
        with written_aside(Path(directory) / "config.json") as aside:  # so that a full disk leaves both old files
            aside.write_text(self.config.model_dump_json(indent=2) + "\n", encoding="utf-8")
            write_safetensors(Path(directory) / "model.safetensors", tensors)

    def state_size(self, tokens: int) -> int:
        """Return how many numbers the model keeps of ``tokens`` tokens, convolutions included."""
        c = self.config
        layers = sum(block.mixer.state_size(tokens) for block in self.blocks)  # type: ignore[operator, union-attr]
        return layers + c.conv_layers * (c.conv_kernel - 1) * c.hidden_size
