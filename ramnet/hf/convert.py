"""Conversion between the two checkpoint formats."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ramnet.files import read_text
from ramnet.hf.configuration import HFRamNetConfig
from ramnet.hf.modeling import HFRamNetForCausalLM
from ramnet.model import RamNetForCausalLM
from ramnet.state import read_safetensors
from ramnet.training.checkpoint import tokenizer_of

_PREFIX = "ramnet."
# What stands beside the weights in either format: a tokenizer's files, and the defaults of generate.
_BESIDE = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
           "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "chat_template.jinja",
           "additional_chat_templates", "generation_config.json")  # fmt: skip


def of_transformers(directory: str | Path) -> bool:
    """Return whether ``directory`` holds a checkpoint in transformers' format, rather than this project's own.

    Raises ValueError if it holds neither, or a model of another type.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise ValueError(f"{directory} is not a checkpoint: it has no config.json")
    try:
        config = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict) or "model_type" not in config:
        return False
    if config["model_type"] != HFRamNetConfig.model_type:
        raise ValueError(f"{directory} holds a model of type {config['model_type']!r}; it must be a RAM-Net")
    return True


def read(directory: str | Path) -> RamNetForCausalLM:
    """Read a model in either format. Each weight has the dtype that it has in its file.

    Raises ValueError, naming the file, if a file is missing or damaged or does not fit the configuration.
    """
    if not of_transformers(directory):
        return RamNetForCausalLM.from_pretrained(directory)
    directory = Path(directory)
    config = HFRamNetConfig.from_pretrained(directory).ramnet
    index, names = directory / SAFE_WEIGHTS_INDEX_NAME, {SAFE_WEIGHTS_NAME}
    # transformers, too, prefers the one file, beside which it leaves the index of shards that it has removed.
    if index.is_file() and not (directory / SAFE_WEIGHTS_NAME).is_file():
        try:
            names = set(json.loads(read_text(index))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{index} does not say which file has which weight; it is damaged") from None
    tensors: dict[str, Tensor] = {}
    for name in sorted(names):
        tensors |= {key.removeprefix(_PREFIX): x for key, x in read_safetensors(directory / name).items()}
    return RamNetForCausalLM.read(config, tensors, directory)


def convert(source: str | Path, output: str | Path) -> None:
    """Write the checkpoint ``source`` to the folder ``output`` in the other format.

    The ``RamNetConfig``, each weight, with its dtype, the files of a tokenizer, or the one that it was trained with,
    and the defaults of ``generate`` stay as they are. transformers' other options, such as ``use_cache``, have no place
    in this project's format.

    Raises:
        ValueError: if ``source`` is not a checkpoint, the tokenizer that it was trained with is missing, or ``output``
            is the same folder or a file.
        OSError: if a file cannot be written.
    """
    if Path(source).resolve() == Path(output).resolve():
        raise ValueError(f"{output} would be written over what is read; choose another folder")
    if Path(output).exists() and not Path(output).is_dir():
        raise ValueError(f"{output} is a file; a checkpoint needs a folder")
    model = read(source)
    tokenizer = tokenizer_of(source)
    if tokenizer is not None and not tokenizer.is_file():
        raise ValueError(
            f"{source} was trained on the tokens of {tokenizer}, which is no file any more; put it there, or into"
            f" {source} as tokenizer.json"
        )
    if of_transformers(source):
        model.save_pretrained(output)
    else:
        HFRamNetForCausalLM.of(model).save_pretrained(output)
    if tokenizer is not None:
        shutil.copyfile(tokenizer, Path(output) / "tokenizer.json")
    for name in _BESIDE:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, Path(output) / name)
        elif (Path(source) / name).is_dir():
            shutil.copytree(Path(source) / name, Path(output) / name, dirs_exist_ok=True)
