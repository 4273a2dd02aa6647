"""The configuration of a RAM-Net as transformers stores it."""

from __future__ import annotations

import json
from typing import Any, ClassVar

from pydantic import ValidationError
from transformers import PreTrainedConfig

from ramnet.config import RamNetConfig, one_line


class HFRamNetConfig(PreTrainedConfig):
    """transformers' configuration of a RAM-Net, which holds a ``RamNetConfig`` as a whole.

    Args:
        ramnet: the ``RamNetConfig``, or its fields as JSON has them; None is the preset "tiny".
        use_cache: whether ``forward`` returns a cache outside training.
        **options: of ``PreTrainedConfig``; ``vocab_size`` and ``tie_word_embeddings`` replace fields of ``ramnet``.

    Raises:
        ValueError: if ``ramnet`` is not a valid ``RamNetConfig``, or a field of it other than ``vocab_size``, or
            ``num_hidden_layers``, is given beside it, as in a checkpoint of this project's own format; the message
            names the field.
    """

    model_type = "ramnet"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache"]

    # Fields stay together under one name, because ``temperature`` and ``top_k`` of a RAM-Net would be taken for options
    # of generation, which transformers removes from configurations.
    ramnet: Any = None
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        _check_beside(kwargs)
        super().__post_init__(**kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        # from_pretrained and update set an option after the constructor has run.
        super().__setattr__(name, _ramnet(value) if name == "ramnet" else value)

    @property
    def vocab_size(self) -> int:
        """V, the number of token ids."""
        return self.ramnet.vocab_size

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:
        self.ramnet = self.ramnet.model_copy(update={"vocab_size": value})

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether the output head shares the embedding's weights."""
        return self.ramnet.tie_embeddings

    @tie_word_embeddings.setter
    def tie_word_embeddings(self, value: bool) -> None:
        self.ramnet = self.ramnet.model_copy(update={"tie_embeddings": value})

    @property
    def hidden_size(self) -> int:
        """C, the width of the residual stream."""
        return self.ramnet.hidden_size

    @property
    def num_hidden_layers(self) -> int:
        """Convolution blocks and RAM-Net blocks; ``hidden_states`` of a model's output has one entry more."""
        return self.ramnet.conv_layers + self.ramnet.num_layers

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **options: Any) -> Any:
        """Return the configuration of a file. Raises ValueError as the constructor, or if ``ramnet`` is missing."""
        _check_beside(options)
        own = RamNetConfig.model_fields.keys() & config_dict.keys() - {"vocab_size"}  # which the constructor names
        if config_dict.get("ramnet") is None and options.get("ramnet") is None and not own:
            raise ValueError("the configuration has no field ramnet, which holds the fields of a RamNetConfig")
        # Other programs read it there; the RamNetConfig says it, too, and may have been edited.
        config_dict = {name: value for name, value in config_dict.items() if name != "tie_word_embeddings"}
        return super().from_dict(config_dict, **options)

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as JSON has it."""
        fields = {"ramnet": self.ramnet.model_dump(mode="json"), "tie_word_embeddings": self.tie_word_embeddings}
        return {**super().to_dict(), **fields}


def _ramnet(value: Any) -> RamNetConfig:
    """Return the ``RamNetConfig`` that ``value`` is, or whose fields it has; None is the preset "tiny"."""
    if value is None:
        return RamNetConfig.preset("tiny")
    if isinstance(value, RamNetConfig):
        return value
    try:
        return RamNetConfig.model_validate_json(json.dumps(value))
    except (ValidationError, TypeError) as error:
        problem = one_line(error).removeprefix("RamNetConfig: ") if isinstance(error, ValidationError) else error
        raise ValueError(f"the field ramnet is not a RamNetConfig: {problem}") from None


def _check_beside(options: dict[str, Any]) -> None:
    """Raise ValueError if a field of a ``RamNetConfig`` is given beside the whole."""
    beside = sorted((RamNetConfig.model_fields.keys() - {"vocab_size"} | {"num_hidden_layers"}) & options.keys())
    if beside:
        raise ValueError(
            f"{beside[0]} is given, but HFRamNetConfig takes a RamNetConfig as a whole (ramnet=…); ramnet.hf.convert"
            " converts a checkpoint of this project's own format"
        )
