"""Records of how a whole model is best deployed on a CPU: found by ``ramnet tune-model``, used by ``ramnet export``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ramnet.config import RamNetConfig, one_line
from ramnet.files import locked, read_text, write_text_atomic
from schedules.records import records_folder

FILENAME = "deployments.jsonl"


class Deployment(BaseModel):
    """How a token of a model is computed.

    Attributes:
        precision: the type of the weight matrices.
        rows: outputs of a matrix product that are computed in one loop.
        lanes: partial sums of a dot product; integers have as many as the processor's instruction.
        tokens: tokens of a block that are computed in one loop.
        block: tokens of a prompt that share a read of the weights.
        threads: of the library.
        spins: how often an idle thread looks for work before it sleeps.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    precision: str
    rows: int = Field(ge=1)
    lanes: int = Field(ge=1)
    tokens: int = Field(ge=1)
    threads: int = Field(ge=1)
    spins: int = Field(ge=0)
    block: int = Field(default=32, ge=32, le=128)

    def __str__(self) -> str:
        return (
            f"{self.precision}, {self.rows} rows of {self.lanes} lanes, {self.tokens} of {self.block} tokens,"
            f" {self.threads} threads, {self.spins} spins"
        )


class Point(BaseModel):
    """A deployment that was measured.

    Attributes:
        seconds: the median time of a token.
        loss: how much worse the model predicts than in float32: the relative increase of bits per token.
        size: bytes of weights that a token reads.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    deployment: Deployment
    seconds: float
    loss: float
    size: int


class DeploymentRecord(BaseModel):
    """The chosen deployment of a model on a device.

    Attributes:
        model: ``digest`` of the configuration.
        gain: the time of ``lowering.compile`` divided by the chosen one's, the median of paired rounds; None if there
            was no time for it.
        front: the points that no other one beats in both time and loss.
        prompt_seconds: the time of a token of a prompt of 256; None if it was not measured.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    model: str
    device: str
    chosen: Point
    gain: float | None
    gain_spread: float | None
    judged_by: str
    most_loss: float
    front: list[Point]
    trials: int
    fingerprint: str
    date: str
    prompt_seconds: float | None = None


def digest(config: RamNetConfig) -> str:
    """Return a digest of a model's configuration."""
    return hashlib.sha256(config.to_json().encode()).hexdigest()[:16]


def path() -> Path:
    """Return the user's file."""
    return records_folder() / FILENAME


def load(file: Path) -> list[DeploymentRecord]:
    """Read the records of a file; none if it is missing. Raises ValueError, naming the line, if one is not a record."""
    if not file.exists():
        return []
    found = []
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        try:
            found.append(DeploymentRecord.model_validate_json(line))
        except ValidationError as error:
            raise ValueError(f"{file}, line {number}, is not a record: {one_line(error)}") from None
    return found


def merge(file: Path, record: DeploymentRecord) -> None:
    """Add a record to the file, in place of one of the same model and device. Processes may do so concurrently."""
    with locked(file):
        others = [each for each in load(file) if (each.model, each.device) != (record.model, record.device)]
        rows = sorted([*others, record], key=lambda each: (each.model, each.device))
        write_text_atomic(file, "".join(json.dumps(each.model_dump()) + "\n" for each in rows))


def find(config: RamNetConfig, device: str, file: Path | None = None) -> DeploymentRecord | None:
    """Return the record of a model on a device, or None."""
    model = digest(config)
    return next((x for x in load(file or path()) if (x.model, x.device) == (model, device)), None)


def front(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other one beats in both time and loss, fastest first."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda each: (each.seconds, each.loss)):
        if not kept or point.loss < kept[-1].loss:
            kept.append(point)
    return kept
