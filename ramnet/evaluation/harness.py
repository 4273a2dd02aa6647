"""A RAM-Net as a model of lm-evaluation-harness."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM

import ramnet
from ramnet.evaluation.tasks import SEED, load_tasks
from ramnet.hf import HFRamNetForCausalLM
from ramnet.hf.convert import read
from ramnet.hf.tokenizer import read_tokenizer


class HarnessModel(HFLM):
    """lm-evaluation-harness's model of transformers, for tokenizers that may have no token for the end of a text.

    Args:
        model: of any device.
        tokenizer: of transformers. A text that has no context, and a prompt that has no tokens, begin with its token
            for the begin of a text, or else for the end, or else a newline.
        max_length: tokens of a window; longer texts are read in windows.
        batch_size: sequences in a batch.
    """

    def __init__(self, model: HFRamNetForCausalLM, tokenizer: Any, max_length: int, batch_size: int) -> None:
        begins = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        prefix = None
        if begins is None:
            newline = tokenizer.encode("\n", add_special_tokens=False)
            if not newline:
                raise ValueError(
                    "the tokenizer has no token for the begin or the end of a text, and none for a newline; give one"
                    " that has any of them by --tokenizer"
                )
            prefix = newline[-1]
        if {tokenizer.pad_token, tokenizer.unk_token, tokenizer.eos_token} == {None}:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)  # lm-evaluation-harness would add an id
        logger, level = logging.getLogger(HFLM.__module__), logging.getLogger(HFLM.__module__).level
        logger.setLevel(logging.ERROR)  # it warns of each model that is not given by a name
        super().__init__(
            model, backend="causal", tokenizer=tokenizer, max_length=max_length, batch_size=batch_size,
            prefix_token_id=prefix, softmax_dtype="float32",
        )  # fmt: skip
        logger.setLevel(level)

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        for _, context, answer in requests:
            if not context or not answer:
                part = "answer" if context else "context"
                raise ValueError(f"the {part} of a question has no tokens; the tokenizer must give it some")
            if len(answer) > self.max_length:
                raise ValueError(
                    f"an answer has {len(answer)} tokens, and --max-length is {self.max_length}; give a longer one"
                )
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def tok_batch_encode(self, strings: list[str], *args: Any, **kwargs: Any) -> Any:
        """Return the tokens of prompts and their attention mask."""
        begin = self.tokenizer.decode([self.prefix_token_id])
        return super().tok_batch_encode([string or begin for string in strings], *args, **kwargs)

    @property
    def eot_token_id(self) -> Any:
        """The token that ends a generated text; None if the tokenizer has none."""
        return self.tokenizer.eos_token_id

    def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> Any:
        """Return the text of tokens. That of None is None, which lm-evaluation-harness does not add to what ends a
        text."""
        return None if tokens is None else super().tok_decode(tokens, skip_special_tokens)


def evaluate(
    checkpoint: Path,
    names: list[str],
    *,
    task_folder: Path | None = None,
    tokenizer: Path | None = None,
    limit: int | None = None,
    shots: int | None = None,
    max_length: int = 4096,
    batch_size: int = 8,
    device: str = "cpu",
) -> dict[str, Any]:
    """Evaluate a checkpoint, in either format, on tasks of lm-evaluation-harness.

    Args:
        checkpoint: the folder of the model.
        names: as in ``load_tasks``.
        task_folder: as in ``load_tasks``.
        tokenizer: a tokenizer's file or folder; None is the checkpoint's own, or bytes if the vocabulary has 256 ids.
        limit: examples of each task, or None for all.
        shots: as in ``load_tasks``.
        max_length: tokens of a window.
        batch_size: sequences in a batch.
        device: where the model runs.

    Returns:
        The results of lm-evaluation-harness (its fields ``results``, ``groups``, ``versions``, ``n-shot``,
        ``n-samples``, ``higher_is_better``), and ``settings``: what was evaluated how, with which versions.

    Raises:
        ValueError: if the checkpoint is damaged, the tokenizer does not fit it or cannot begin a text, a task is
            refused or has fewer examples than ``shots``, its answers are longer than ``max_length``, or there is no
            such device.
    """
    own = read(checkpoint)
    try:
        own = own.to(device)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"the device {device} cannot be used: {str(error).splitlines()[0]}") from error
    vocabulary = read_tokenizer(tokenizer, checkpoint, own.config.vocab_size)
    tasks = load_tasks(names, task_folder, shots)
    model = HarnessModel(HFRamNetForCausalLM.of(own), vocabulary, max_length, batch_size)
    torch.manual_seed(SEED)
    try:
        found: Any = lm_eval.evaluate(
            model, tasks, limit=limit, bootstrap_iters=1000, log_samples=False, fewshot_as_multiturn=False
        )
    except AssertionError as error:
        if not str(error):
            raise
        raise ValueError(f"lm-evaluation-harness refuses: {error}") from error  # such as to write more than max_length
    except ValueError as error:
        if "larger than population" not in str(error):  # as Python's random.sample says
            raise
        number = "its own number of shots" if shots is None else f"{shots} shots need"
        raise ValueError(f"a task has fewer examples than {number}; give fewer by --shots") from error
    kept = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better")
    settings = {
        "checkpoint": str(checkpoint), "parameters": sum(x.numel() for x in own.parameters()), "limit": limit,
        "max_length": max_length, "batch_size": batch_size, "device": device, "dtype": str(own.head.weight.dtype),
        "ramnet": ramnet.__version__, "lm_eval": lm_eval.__version__,
    }  # fmt: skip
    return {"settings": settings, **{name: found[name] for name in kept if name in found}}
