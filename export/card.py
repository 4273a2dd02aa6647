"""The model card of an export: README.md, for people and for model hubs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from export.folder import DESCRIPTION
from export.manifest import Quality, Speed
from ramnet.config import RamNetConfig
from ramnet.files import sha256
from ramnet.markdown import markdown_table

FILENAME = "README.md"
_LICENCE = (
    "The code in this folder is under the Apache License 2.0 (`LICENSE`). The weights are under the terms of whoever"
    " trained them."
)


class Card(NamedTuple):
    """What a model card says.

    Attributes:
        library: what runs the export, as hubs name it, such as "onnxruntime"; it is also a tag.
        summary: what was exported and how, in a sentence or two.
        files: the purpose of each file by its name; sizes and digests are those of the files in the folder.
        numbers: what was measured, by its name, such as the largest error.
        precision: the type of the weight matrices.
        speed: None if it was not measured.
        quality: None if it was not measured.
        calls: code by language, such as "python" or "cpp".
        notes: paragraphs on what a user must know.
        where: where the quality was measured, such as " in Node".
    """

    library: str
    summary: str
    files: Mapping[str, str]
    numbers: Mapping[str, str]
    precision: str
    speed: Speed | None
    quality: Quality | None
    calls: Mapping[str, str]
    notes: Sequence[str] = ()
    where: str = ""

    def text(self, config: RamNetConfig, folder: Path) -> str:
        """Return the card of a model whose files are in ``folder``."""
        tags = f"library_name: {self.library}\npipeline_tag: text-generation\ntags:\n- ram-net\n- {self.library}"
        files = [
            (name, purpose, _size(folder / name), f"`{sha256(folder / name)}`") for name, purpose in self.files.items()
        ]
        code = [f"```{language}\n{lines.strip()}\n```" for language, lines in self.calls.items()]
        parts = [
            f"---\n{tags}\n---",
            "# RAM-Net",
            self.summary,
            _architecture(config),
            "## Text and state",
            ids(config),
            state(config),
            *self.notes,
            "## Files",
            markdown_table(("file", "what it is", "size", "SHA-256"), files),
            f"`{DESCRIPTION}` has the configuration and the digests of all files; `ramnet verify` checks them and"
            " repeats the comparison with PyTorch.",
            "## Measured",
            markdown_table(("what", ""), [*self.numbers.items(), ("time of a token", _time(self.speed))]),
            *_bits(self.quality, f"{self.precision}, this export{self.where}"),
            "## Use",
            *code,
            "## Licence",
            _LICENCE,
        ]
        return "\n\n".join(parts) + "\n"

    def save(self, config: RamNetConfig, folder: Path) -> None:
        (folder / FILENAME).write_text(self.text(config, folder), encoding="utf-8")


def ids(config: RamNetConfig) -> str:
    """Say how text becomes ids."""
    if config.vocab_size == 256:
        return "Each byte of the UTF-8 text is one id, 0 to 255; no token marks the beginning or the end."
    last = config.vocab_size - 1
    return f"Ids are 0 to {last}, from the tokenizer that the model was trained with; it is not included."


def state(config: RamNetConfig) -> str:
    """Say what the state before the first token is."""
    conv = " and the convolutions' inputs" if config.conv_layers else ""
    size = sum(layer.num_heads * layer.slots * (layer.value_dim + 1) * 4 for layer in config.layers)
    slots = [layer.slots for layer in config.layers]
    if len(set(slots)) == 1:
        each = f"1/{slots[0]} = {1 / slots[0]!r}"
    else:
        each = f"1/M, where the M of the layers are {', '.join(map(str, slots))}"
    return (
        f"**The state before the first token is not all zeros.** The memory{conv} and the position are 0, and every"
        f" element of each mass is {each}. A mass of zeros gives wrong results without an error. A state has"
        f" {size / 1e6:.1f} MB for each sequence, whatever its length."
    )


def _architecture(config: RamNetConfig) -> str:
    c = config
    heads = [
        f"{layer.num_heads} heads with {layer.slots} slots of {layer.value_dim} numbers each, of which a token writes"
        f" {layer.top_k} and reads {layer.top_k}"
        for layer in c.layers
    ]
    if len(c.kinds) == 1:
        return f"{c.num_layers} layers of width {c.hidden_size}, {heads[0]}; a vocabulary of {c.vocab_size}."
    each = "; ".join(f"layer {i} has {text}" for i, text in enumerate(heads))
    return f"{c.num_layers} layers of width {c.hidden_size}: {each}. A vocabulary of {c.vocab_size}."


def _time(speed: Speed | None) -> str:
    if speed is None:
        return "not measured"
    threads = f"{speed.threads} thread{'s' if speed.threads > 1 else ''}"
    return f"{speed.token_seconds * 1e6:.0f} µs, {threads}, on {speed.processor}"


def _bits(quality: Quality | None, measured: str) -> list[str]:
    """Say what the precision costs."""
    if quality is None:
        return ["Bits per byte were not measured."]
    rows = [
        ("float32, PyTorch", f"{quality.float32:.4f}", "100 %"),
        (measured, f"{quality.bits_per_byte:.4f}", f"{100 * quality.agreement:.1f} %"),
    ]
    return [
        f"On {quality.tokens} tokens of text {quality.text}:",
        markdown_table(("precision", "bits per byte", "most probable token is float32's"), rows),
    ]


def _size(path: Path) -> str:
    size = path.stat().st_size
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} KB"
