"""Records of how a whole model is best deployed on a CPU: found by ``ramnet tune-model``, used by ``ramnet export``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ramnet.config import RamNetConfig, one_line
from ramnet.files import locked, read_text, write_text_atomic
from schedules.records import records_folder

FILENAME = "deployments.jsonl"


class _Deployment(BaseModel):
    """How a token of a model is computed.

    Attributes:
        format: of the export.
        files: the knobs that determine its files; deployments that share them are a group.
        prompts: the knobs that only prompts depend on.
        precision: the type of the weight matrices.
        threads: that compute a single token.
    """

    format: ClassVar[str]
    files: ClassVar[tuple[str, ...]]
    prompts: ClassVar[tuple[str, ...]]
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    precision: str
    threads: int = Field(ge=1)

    @property
    def group(self) -> str:
        """The name of its group."""
        return " ".join(f"{knob}={getattr(self, knob)}" for knob in self.files)

    @property
    def of_a_token(self) -> str:
        """All that a single token depends on."""
        return f"{self.format} {self.model_dump_json(exclude=set(self.prompts))}"


class Deployment(_Deployment):
    """How the C library computes a token of a model.

    Attributes:
        rows: outputs of a matrix product that are computed in one loop.
        lanes: partial sums of a dot product; integers have as many as the processor's instruction.
        tokens: tokens of a block that are computed in one loop.
        block: tokens of a prompt that share a read of the weights.
        spins: how often an idle thread looks for work before it sleeps.
    """

    format = "c"
    files = ("precision",)
    prompts = ("tokens", "block")

    rows: int = Field(ge=1)
    lanes: int = Field(ge=1)
    tokens: int = Field(ge=1)
    spins: int = Field(ge=0)
    block: int = Field(default=32, ge=32, le=128)

    def __str__(self) -> str:
        return (
            f"{self.precision}, {self.rows} rows of {self.lanes} lanes, {self.tokens} of {self.block} tokens,"
            f" {self.threads} threads, {self.spins} spins"
        )


class OnnxDeployment(_Deployment):
    """How onnxruntime computes a token of a model.

    Attributes:
        kernels: whether each layer's memory is a node that runs on the tuned kernels.
        prompt_threads: that compute a prompt.
        spinning: whether idle threads look for work before they sleep.
    """

    format = "onnx"
    files = ("precision", "kernels")
    prompts = ("prompt_threads",)

    kernels: bool
    prompt_threads: int = Field(ge=1)
    spinning: bool

    def __str__(self) -> str:
        return (
            f"{self.precision}, {'kernels' if self.kernels else 'standard operators'}, {self.threads} threads,"
            f" {self.prompt_threads} for prompts, {'spinning' if self.spinning else 'sleeping'}"
        )


AnyDeployment = Deployment | OnnxDeployment


class Point(BaseModel):
    """A deployment that was measured.

    Attributes:
        seconds: the median time of a token.
        loss: how much worse the model predicts than in float32: the relative increase of bits per token.
        size: bytes of weights that a token reads.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    deployment: AnyDeployment
    seconds: float = Field(gt=0)
    loss: float
    size: int


class DeploymentRecord(BaseModel):
    """The chosen deployment of a model on a device.

    Attributes:
        model: ``digest`` of the configuration.
        gain: the time of ``gain_over`` divided by the chosen one's, the median of paired rounds; None if there was no
            time for it.
        front: the points that no other one beats in both time and loss.
        prompt_seconds: the time of a token of a prompt of 256; None if it was not measured.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    model: str
    device: str
    chosen: Point
    gain: float | None
    gain_spread: float | None
    gain_over: str = "lowering.compile"
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


def merge(file: Path, record: DeploymentRecord, tried: Sequence[AnyDeployment]) -> bool:
    """Add a record to the file, in place of one of the same model, device and format. Processes may do so
    concurrently.

    Args:
        tried: what the record's search has measured. A known record of the same code stays if this search did not
            measure its deployment, unless the new one is faster.

    Returns:
        Whether it was added.
    """
    file = file.resolve()  # replace the target of a link, not the link
    with locked(file):
        there = load(file)
        known = next((each for each in there if _key(each) == _key(record)), None)
        if (
            known is not None
            and known.fingerprint == record.fingerprint
            and known.chosen.seconds <= record.chosen.seconds
            and known.chosen.deployment.of_a_token not in {each.of_a_token for each in tried}
        ):
            return False
        rows = sorted([*(each for each in there if each is not known), record], key=_key)
        write_text_atomic(file, "".join(json.dumps(each.model_dump()) + "\n" for each in rows))
        return True


def find(config: RamNetConfig, device: str, kind: str, file: Path | None = None) -> DeploymentRecord | None:
    """Return the record of a model on a device in the format ``kind``, "c" or "onnx"; None if there is none."""
    key = (digest(config), device, kind)
    return next((each for each in load(file or path()) if _key(each) == key), None)


def _key(record: DeploymentRecord) -> tuple[str, str, str]:
    return record.model, record.device, record.chosen.deployment.format


def front(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other one beats in both time and loss, fastest first."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda each: (each.seconds, each.loss)):
        if not kept or point.loss < kept[-1].loss:
            kept.append(point)
    return kept
