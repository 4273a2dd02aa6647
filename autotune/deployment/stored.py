"""What deployments of a model read, written when a trial needs it, and what judges their predictions."""

from __future__ import annotations

import hashlib
from pathlib import Path

from torch import Tensor

from autotune.deployment import judge
from autotune.deployment.space import Space
from export.quality import HeldOut
from ramnet import RamNetForCausalLM
from schedules.deployment import AnyDeployment

MODEL = "model"


class Stored:
    """A folder with a folder for each group of deployments, and the model.

    Args:
        model: a model in float32, which must not change.
        text: held-out text that judges the precisions; None for the model's own predictions.
        space: of the deployments.
        calibration: windows of text, int64 [length] each, that int4 is calibrated on, if any.

    Attributes:
        digest: of the weights.
        judged_by: what judges the precisions, in words.
    """

    def __init__(
        self, model: RamNetForCausalLM, text: HeldOut | None, folder: Path, space: Space,
        calibration: list[Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.config, self.folder, self.space = model.config, folder, space
        self._model, self._calibration = model, calibration
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

    def has(self, deployment: AnyDeployment) -> bool:
        """Return whether what a deployment reads is there."""
        return (self.folder / deployment.group).exists()

    def write(self, deployment: AnyDeployment) -> None:
        """Write what a deployment reads, if it is not there."""
        if not self.has(deployment):
            self.space.write(self._model, deployment, self.folder / deployment.group, self._calibration)
