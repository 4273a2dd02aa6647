"""The weights of a model in each precision, written when a trial needs them, and what judges their predictions."""

from __future__ import annotations

import hashlib
from pathlib import Path

from torch import Tensor

from autotune.deployment import judge
from export.c.build import write_weights
from export.quality import HeldOut
from lowering.aot import weights
from ramnet import RamNetForCausalLM

MODEL = "model"


class Stored:
    """A folder with a folder of weights and samples for each precision, and the model.

    Args:
        model: a model in float32, which must not change.
        text: held-out text that judges the precisions; None for the model's own predictions.
        calibration: windows of text, int64 [length] each, that int4 is calibrated on, if any.

    Attributes:
        sizes: the bytes of weights that a token reads, by precision, the fewest first.
        digest: of the weights.
        judged_by: what judges the precisions, in words.
    """

    def __init__(
        self, model: RamNetForCausalLM, text: HeldOut | None, folder: Path, calibration: list[Tensor] | None = None
    ) -> None:
        self.config, self.folder, self._model, self._calibration = model.config, folder, model, calibration
        fit = [precision for precision in weights.FILE_TYPES if _fits(model, precision)]
        sizes = {precision: weights.read_by_token(model.config, precision) for precision in fit}
        self.sizes = dict(sorted(sizes.items(), key=lambda item: item[1]))
        self.judged_by = "its own predictions in float32" if text is None else f"text {text.source}"
        found = hashlib.sha256()
        for _, value in sorted(model.named_parameters()):
            found.update(value.detach().numpy().data)
        for ids in (*([] if text is None else [text.ids]), *(each.numpy() for each in calibration or [])):
            found.update(ids.data)
        self.digest = found.hexdigest()[:16]
        judge.save(folder / judge.FILENAME, model, text)

    def write_model(self) -> None:
        """Write the model in float32 as ``from_pretrained`` reads it."""
        self._model.save_pretrained(self.folder / MODEL)

    def write(self, precision: str) -> None:
        """Write the weights and the samples of a precision, if they are not there."""
        folder = self.folder / precision
        if not folder.exists():
            folder.mkdir()
            write_weights(self._model, precision, folder, self._calibration)


def _fits(model: RamNetForCausalLM, precision: str) -> bool:
    try:
        weights.check(model.config, precision)
    except ValueError:
        return False
    return True
