"""Tokenizers: that of byte-level models, and one from a file."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ramnet.config import BYTES
from ramnet.training.checkpoint import tokenizer_of


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose token ids are the 256 bytes of UTF-8, as of byte-level models such as "tiny".

    Invalid UTF-8 decodes to U+FFFD. Padding is byte 0, on the left, as ``generate`` needs it. The name of a special
    token in a text is read as bytes, also of one that is added later, unless the call says
    ``split_special_tokens=False``.
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


def read_tokenizer(path: str | Path | None, checkpoint: str | Path, vocab_size: int) -> PreTrainedTokenizerFast:
    """Read the tokenizer of a model.

    Args:
        path: a tokenizer's file (``tokenizer.json``) or folder; None is the one in ``checkpoint``, or else the bytes.
            A file knows of no token for the begin or end of a text, unless ``tokenizer_config.json`` lies beside it.
        checkpoint: the folder of the model.
        vocab_size: V of the model.

    Raises ValueError if there is none, the file is damaged, or the tokenizer has ids that the model has not.
    """
    if path is None and (Path(checkpoint) / "tokenizer.json").is_file():
        path = checkpoint
    if path is None:
        if (trained := tokenizer_of(checkpoint)) is not None:
            raise ValueError(f"{checkpoint} has the tokens of {trained}; give it by --tokenizer")
        if vocab_size != BYTES:
            raise ValueError(f"{checkpoint} holds no tokenizer.json, and a vocabulary of {vocab_size} is not the bytes")
        return byte_tokenizer()
    path = Path(path)
    if not path.exists() or (path.is_dir() and not (path / "tokenizer.json").is_file()):
        raise ValueError(f"{path} is no tokenizer: it is neither a tokenizer.json nor a folder that holds one")
    folder = path
    if path.name == "tokenizer.json" and (path.parent / "tokenizer_config.json").is_file():
        folder = path.parent
    try:
        tokenizer = (
            AutoTokenizer.from_pretrained(folder, local_files_only=True)
            if folder.is_dir()
            else PreTrainedTokenizerFast(tokenizer_file=str(path))
        )
    except Exception as error:  # noqa: BLE001 - the tokenizers library raises bare Exceptions
        raise ValueError(f"{path} is no tokenizer: {' '.join(str(error).split())}") from None
    size = 1 + max(tokenizer.get_vocab().values(), default=-1)
    if size > vocab_size:
        raise ValueError(f"{path} has {size} token ids, but the model in {checkpoint} has only {vocab_size}")
    return tokenizer
