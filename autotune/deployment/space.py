"""What a search of deployments tries in each format: the knobs, their defaults, and how weights are written."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from torch import Tensor

from autotune.deployment import costs
from autotune.deployment.costs import Part
from export.c.build import write_weights
from export.libraries import need
from lowering.aot import build, weights
from lowering.aot.function import FORMATS
from lowering.aot.machines import host
from lowering.aot.token import default_tiling
from lowering.fingerprint import closure, code
from ramnet import RamNetForCausalLM
from ramnet.config import RamNetConfig
from schedules.deployment import AnyDeployment, Deployment, OnnxDeployment

ROWS, LANES, SPINS = (1, 2, 4, 8), (16, 32, 64), (0, 2000, 20000, 200000)


class Space(ABC):
    """The deployments of a model in one format. Those of a group share their files and their loss.

    Args:
        threads: the most threads to try.

    Attributes:
        sizes: the bytes of weights that a token reads, by precision, the fewest first.
        prompts: what is chosen last, for prompts: the part of the search, a knob and its values.
        baseline: what the chosen deployment is compared with; None is ``lowering.compile``.
    """

    sizes: dict[str, int]
    prompts: tuple[tuple[Part, str, tuple[int, ...]], ...]
    baseline: AnyDeployment | None

    def __init__(self, threads: int) -> None:
        self.threads = threads

    @abstractmethod
    def defaults(self) -> list[AnyDeployment]:
        """Return the default of each group, those of the fewest bytes first."""

    @abstractmethod
    def every(self) -> list[AnyDeployment]:
        """Return all deployments."""

    @abstractmethod
    def suggest(self, trial: Any) -> AnyDeployment:
        """Return the deployment that an Optuna trial suggests."""

    @abstractmethod
    def write(self, model: RamNetForCausalLM, deployment: AnyDeployment, folder: Path, calibration: Any) -> None:
        """Write the files of a deployment's group, and samples, to a new folder.

        Raises ValueError or RuntimeError if they cannot be made for this model or on this machine.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a digest of the code and the options that determine what is measured."""


class CSpace(Space):
    """The deployments of the C library of a model."""

    prompts = ((costs.PROMPTS, "tokens", costs.TOKENS), (costs.BLOCK, "block", costs.BLOCKS))
    baseline = None

    def __init__(self, config: RamNetConfig, threads: int) -> None:
        super().__init__(threads)
        self.config = config
        fit = (precision for precision in weights.FILE_TYPES if _fits(config, precision))
        sizes = {precision: weights.read_by_token(config, precision) for precision in fit}
        if not sizes:
            weights.check(config, "float32")  # which raises
        self.sizes = dict(sorted(sizes.items(), key=lambda item: item[1]))

    def defaults(self) -> list[AnyDeployment]:
        machine, common = host(), {"threads": self.threads, "spins": build.LOOPS.spins}
        return [
            Deployment(precision=p, **common, **default_tiling(self.config, p, machine)._asdict()) for p in self.sizes
        ]

    def every(self) -> list[AnyDeployment]:
        found: dict[AnyDeployment, None] = dict.fromkeys(self.defaults())
        for precision, rows, lanes, threads, spins in product(
            self.sizes, ROWS, LANES, range(1, self.threads + 1), SPINS
        ):
            found[self._of(precision, {"rows": rows, "lanes": lanes, "threads": threads, "spins": spins})] = None
        return list(found)

    def suggest(self, trial: Any) -> AnyDeployment:
        precision = trial.suggest_categorical("precision", list(FORMATS))
        knobs = {
            "rows": trial.suggest_categorical("rows", ROWS),
            "lanes": trial.suggest_categorical("lanes", LANES),
            "threads": trial.suggest_int("threads", 1, self.threads),
            "spins": trial.suggest_categorical("spins", SPINS),
        }
        return self._of(precision, knobs)

    def _of(self, precision: str, knobs: dict[str, int]) -> Deployment:
        """Return a deployment. Integers have as many lanes as the processor's instruction, and one thread does not
        wait for others."""
        default = FORMATS[precision].default
        if precision in weights.SCALED:
            knobs["lanes"] = default.lanes
        if knobs["threads"] == 1:
            knobs["spins"] = build.LOOPS.spins
        return Deployment(precision=precision, tokens=default.tokens, **knobs)

    def write(
        self, model: RamNetForCausalLM, deployment: AnyDeployment, folder: Path, calibration: Sequence[Tensor] | None
    ) -> None:
        folder.mkdir()
        write_weights(model, deployment.precision, folder, calibration)

    def fingerprint(self) -> str:
        return _digest(build.sources())


class OnnxSpace(Space):
    """The deployments of a model in onnxruntime.

    Weights of float16 are not among them: onnxruntime makes them float32 when it loads a graph.

    Args:
        kernels: also try the tuned kernels; otherwise graphs have standard operators only.

    Raises ImportError if a library of ``ramnet[export]`` is missing.
    """

    def __init__(self, config: RamNetConfig, threads: int, kernels: bool) -> None:
        need("onnx", "onnxscript", "onnxruntime")
        super().__init__(threads)
        self.formulations = (True, False) if kernels else (False,)
        # MatMulNBits has a scale of 4 bytes for every 32 weights.
        whole = weights.read_by_token(config, "float32")
        self.sizes = {"int8": whole // 4 * 9 // 8, "float32": whole}
        some = sorted({1, max(1, threads // 2), threads})
        self.prompts = ((costs.PROMPT_THREADS, "prompt_threads", tuple(some)),)
        self.baseline = self._of("float32", kernels=False, threads=threads)

    def defaults(self) -> list[AnyDeployment]:
        return [
            self._of(precision, kernels=kernels, threads=self.threads)
            for precision, kernels in product(self.sizes, self.formulations)
        ]

    def every(self) -> list[AnyDeployment]:
        every = product(self.sizes, self.formulations, range(1, self.threads + 1), (True, False))
        return list(dict.fromkeys(self._of(p, kernels=k, threads=n, spinning=s) for p, k, n, s in every))

    def suggest(self, trial: Any) -> AnyDeployment:
        return self._of(
            trial.suggest_categorical("precision", list(self.sizes)),
            kernels=trial.suggest_categorical("kernels", self.formulations),
            threads=trial.suggest_int("threads", 1, self.threads),
            spinning=trial.suggest_categorical("spinning", (True, False)),
        )

    def _of(self, precision: Any, *, kernels: bool, threads: int, spinning: bool = True) -> OnnxDeployment:
        """Return a deployment. One thread does not wait for others."""
        return OnnxDeployment(
            precision=precision, kernels=kernels, threads=threads, prompt_threads=self.threads,
            spinning=spinning or threads == 1,
        )  # fmt: skip

    def write(self, model: RamNetForCausalLM, deployment: AnyDeployment, folder: Path, calibration: object) -> None:
        from export.onnx.build import export_onnx

        assert isinstance(deployment, OnnxDeployment)
        export_onnx(model, folder, precision=deployment.precision, kernels=deployment.kernels)

    def fingerprint(self) -> str:
        import onnxruntime

        own = (code(name) for name in sorted(closure(["export.onnx.build", "export.onnx.model"])))
        return _digest([onnxruntime.__version__, str(self.formulations), *build.sources(), *own])


def _digest(texts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12]


def _fits(config: RamNetConfig, precision: str) -> bool:
    try:
        weights.check(config, precision)
    except ValueError:
        return False
    return True
