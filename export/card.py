"""The model card of an export: README.md, for people and for model hubs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ramnet.config import RamNetConfig


class Card(NamedTuple):
    """What a model card says.

    Attributes:
        library: what runs the export, as hubs name it, such as "onnxruntime"; it is also a tag.
        summary: what was exported and how, in a sentence or two.
        files: the purpose of each file by its name; sizes are those of the files in the folder.
        numbers: what was measured, by its name: errors, agreement, speeds.
        calls: code by language, such as "python" or "cpp".
        notes: paragraphs on what a user must know.
    """

    library: str
    summary: str
    files: Mapping[str, str]
    numbers: Mapping[str, str]
    calls: Mapping[str, str]
    notes: Sequence[str] = ()

    def text(self, config: RamNetConfig, folder: Path) -> str:
        """Return the card of a model whose files are in ``folder``."""
        tags = f"library_name: {self.library}\npipeline_tag: text-generation\ntags:\n- ram-net\n- {self.library}"
        sizes = [(name, purpose, _size(folder / name)) for name, purpose in self.files.items()]
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
            _table(("file", "what it is", "size"), sizes),
            "## Measured",
            _table(("what", ""), list(self.numbers.items())),
            "## Use",
            *code,
        ]
        return "\n\n".join(parts) + "\n"


def ids(config: RamNetConfig) -> str:
    """Say how text becomes ids."""
    if config.vocab_size == 256:
        return "Each byte of the UTF-8 text is one id, 0 to 255; no token marks the beginning or the end."
    last = config.vocab_size - 1
    return f"Ids are 0 to {last}, from the tokenizer that the model was trained with; it is not included."


def state(config: RamNetConfig) -> str:
    """Say what the state before the first token is."""
    conv = " and the convolutions' inputs" if config.conv_layers else ""
    size = config.num_layers * config.num_heads * config.slots * (config.value_dim + 1) * 4
    return (
        f"**The state before the first token is not all zeros.** The memory{conv} and the position are 0, and every"
        f" element of each mass is 1/{config.slots} = {1 / config.slots!r}. A mass of zeros gives wrong results without"
        f" an error. A state has {size / 1e6:.1f} MB for each sequence, whatever its length."
    )


def _architecture(config: RamNetConfig) -> str:
    c = config
    return (
        f"{c.num_layers} layers of width {c.hidden_size}, {c.num_heads} heads with {c.slots} slots of {c.value_dim}"
        f" numbers each, of which a token writes {c.top_k} and reads {c.top_k}; a vocabulary of {c.vocab_size}."
    )


def _size(path: Path) -> str:
    size = path.stat().st_size
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} KB"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
