"""The hyper-parameters of training."""

from __future__ import annotations

import math
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ramnet.config import one_line

BUDGET = ("steps", "seconds")  # the fields that end a run
HELD_OUT_SEED = 2**32 - 1  # draws the examples that are held out, so no run has it
MOST = 2**31  # of rows and of tokens in a row: more have no memory, and sizes stay within int64


class Recipe(BaseModel):
    """Hyper-parameters of training; immutable. Raises ValueError, naming the value, if a field is out of range."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    steps: int | None = Field(None, gt=0, le=2**53, description="total number of steps")
    seconds: float | None = Field(None, gt=0, allow_inf_nan=False, description="total training time in seconds")
    batch_size: int = Field(64, gt=0, le=MOST, description="examples in a step")
    learning_rate: float = Field(1e-2, gt=0, allow_inf_nan=False, description="peak learning rate, after warm-up")
    final_learning_rate: float = Field(0.0, ge=0, allow_inf_nan=False, description="learning rate at the end")
    warmup_steps: int = Field(50, ge=0, le=2**53, description="steps of linear warm-up")
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False, description="weight decay of AdamW on matrices")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of AdamW's first moment")
    beta2: float = Field(0.95, ge=0, lt=1, description="decay of AdamW's second moment")
    clip_norm: float = Field(1.0, gt=0, le=1e9, description="largest norm of the gradient")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="of matrix products; weights, moments, residual stream, addresses and memory are float32"
    )
    seed: int = Field(0, ge=0, lt=HELD_OUT_SEED, description="seed of the initial weights and the data")

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise ValueError(one_line(error)) from None

    @model_validator(mode="after")
    def _ends(self) -> Self:
        if self.steps is None and self.seconds is None:
            raise ValueError("neither steps nor seconds is given; a run needs an end")
        if self.final_learning_rate > self.learning_rate:
            raise ValueError(
                f"final_learning_rate is {self.final_learning_rate}; it must be at most learning_rate,"
                f" {self.learning_rate}"
            )
        return self

    def spent(self, step: int, elapsed: float) -> float:
        """Return the fraction of the budget used after ``step`` steps and ``elapsed`` seconds, from 0 to 1."""
        shares = (step / self.steps if self.steps else 0.0, elapsed / self.seconds if self.seconds else 0.0)
        return min(1.0, max(shares))

    def learning_rate_at(self, step: int, spent: float) -> float:
        """Return the learning rate: linear warm-up over steps, times a cosine over the budget from peak to end."""
        warm_up = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        above = (self.learning_rate - self.final_learning_rate) * 0.5 * (1 + math.cos(math.pi * spent))
        return warm_up * (self.final_learning_rate + above)
