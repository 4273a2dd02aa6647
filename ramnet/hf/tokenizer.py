"""The tokenizer of byte-level models."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose token ids are the 256 bytes of UTF-8, as of byte-level models such as "tiny".

    Invalid UTF-8 decodes to U+FFFD. Padding is byte 0, on the left, as ``generate`` needs it.
    """
    names = bytes_to_unicode()
    tokenizer = Tokenizer(models.BPE(vocab={name: byte for byte, name in names.items()}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    # With split_special_tokens, a text that holds the name of the padding is tokenized as any other.
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=names[0], padding_side="left", split_special_tokens=True,
        clean_up_tokenization_spaces=False, model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
