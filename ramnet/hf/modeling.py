"""RAM-Net as a model of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel, initialization
from transformers.modeling_outputs import CausalLMOutputWithPast

from ramnet import ops
from ramnet.hf.cache import HFRamNetCache
from ramnet.hf.configuration import HFRamNetConfig
from ramnet.loss import IGNORED, check_labels, next_labels, summed_cross_entropy
from ramnet.model import RamNetForCausalLM

_FSDP: tuple[type, ...] = ()
if torch.distributed.is_available():
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    _FSDP = (FSDPModule, FullyShardedDataParallel)

# Arguments of this project's model that have another name here, or none.
_OTHER_NAMES = {
    "state": "give cache=HFRamNetCache(state)",
    "cu_seqlens": "give cu_seq_lens_q",
    "in_place": "omit it, as the state of a cache is updated in any case",
}


class CheckpointedRamNet(RamNetForCausalLM):
    """A ``RamNetForCausalLM`` whose blocks are recomputed in the backward pass if ``gradient_checkpointing`` is set, as
    ``PreTrainedModel.activation_checkpointing_enable`` does."""

    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., tuple[Tensor, Tensor, Tensor]]

    def run_block(self, block: nn.Module, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(ops.keeping(super().run_block), block, *args)
        return super().run_block(block, *args)


class HFRamNetForCausalLM(PreTrainedModel, GenerationMixin):
    """A RAM-Net language model with the interface of transformers.

    Attributes:
        ramnet: the ``RamNetForCausalLM``, which computes everything.
    """

    config: HFRamNetConfig
    config_class = HFRamNetConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _is_stateful = True
    # The state is on the device of the ids, so that no layer may be on another one.
    _no_split_modules: ClassVar[list[str]] = ["CheckpointedRamNet"]
    _tied_weights_keys: ClassVar[dict[str, str]] = {"ramnet.head.weight": "ramnet.embedding.weight"}

    def __init__(self, config: HFRamNetConfig) -> None:
        super().__init__(config)
        self.ramnet = CheckpointedRamNet(config.ramnet)
        if not self.ramnet.embedding.weight.is_meta:
            # The constructor has drawn the initial weights; only those that a checkpoint lacks are drawn later.
            for module in self.ramnet.modules():
                vars(module)["_is_hf_initialized"] = True
        self.post_init()

    @classmethod
    def of(cls, model: RamNetForCausalLM) -> Self:
        """Return a model for transformers that shares the parameters of ``model``."""
        with torch.device("meta"):
            wrapped = cls(HFRamNetConfig(ramnet=model.config))
        for name, parameter in model.named_parameters():  # load_state_dict changes the given ones otherwise
            wrapped.ramnet.get_parameter(name).requires_grad_(parameter.requires_grad)
        wrapped.ramnet.load_state_dict(model.state_dict(keep_vars=True), assign=True)
        wrapped.tie_weights()
        wrapped.config.dtype = wrapped.dtype
        return wrapped.train(model.training)

    def _init_weights(self, module: nn.Module) -> None:
        """Draw the parameters of ``module`` that a checkpoint lacks, or of new embeddings, as the constructor does."""
        path = next((name for name, each in self.ramnet.named_modules() if each is module), None)
        if path is not None:
            drawn = RamNetForCausalLM(self.config.ramnet).get_submodule(path)
            for given, own in zip(module.parameters(recurse=False), drawn.parameters(recurse=False), strict=True):
                initialization.copy_(given, own)
        elif isinstance(module, nn.Embedding):
            initialization.normal_(module.weight, std=self.config.ramnet.embedding_std)

    def get_input_embeddings(self) -> nn.Module:
        return self.ramnet.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.ramnet.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        return self.ramnet.head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.ramnet.head = new_embeddings

    def resize_token_embeddings(self, *args: Any, **options: Any) -> nn.Module:
        """Change the number of token ids, as ``PreTrainedModel`` does."""
        embeddings = super().resize_token_embeddings(*args, **options)
        self.ramnet.config = self.config.ramnet
        return embeddings

    def tie_weights(self, *args: Any, **options: Any) -> None:
        """Tie the output head to the embedding if the configuration says so, as ``PreTrainedModel`` does."""
        super().tie_weights(*args, **options)
        self.ramnet.config = self.config.ramnet

    def forward(  # noqa: PLR0913 - transformers hands over each of these by its name
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: HFRamNetCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cu_seq_lens_q: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **ignored: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Compute logits, and the loss if ``labels`` are given.

        Args:
            input_ids: int64 [B, T].
            attention_mask: bool or integer, or floating with values 0 and 1, [B, T], or [B, T' + T] with the T'
                columns that the cache has read; 1 for a token and 0 for padding, which may be anywhere in a row and
                does not change the results of its tokens.
            cache: the state after the tokens before ``input_ids``, which is updated.
            inputs_embeds: floating [B, T, C], instead of ``input_ids``.
            labels: int64 [B, T], usually ``input_ids`` itself, shifted internally. Labels of −100, of padding and of
                the first token of each sequence are ignored.
            use_cache: return a cache; the default is the configuration's, and not to in training.
            output_hidden_states: return the input of each block [B, T, C], and that of the output head; the default is
                the configuration's.
            return_dict: False returns a tuple of what is not None.
            logits_to_keep: return logits of this many last tokens only, or of those at these positions; 0 is all. In
                training with labels, 0 is none, so that all logits are never in memory at once.
            cu_seq_lens_q: int32 or int64 [S + 1], the offsets of S documents packed into one row, as
                ``DataCollatorWithFlattening(return_flash_attn_kwargs=True)`` gives them.
            num_items_in_batch: the number of labels other than −100, without those of the first column, of all
                accumulated batches, which Trainer gives. The loss is then the share of this batch in their mean.
                Trainer also counts labels that are ignored for another reason, such as that of the first token after
                padding on the left; each batch is weighted by what Trainer counts in it.
            **ignored: options of other models, such as ``output_attentions``; ``position_ids`` only beside
                ``cu_seq_lens_q``, as a RAM-Net counts positions itself. ``past_key_values`` and ``cache_params`` are
                other models' names of ``cache``.

        Returns:
            ``loss`` in nats, ``logits`` [B, T, V], ``cache`` and ``hidden_states``, as far as they were asked for.

        Raises:
            ValueError: if FSDP has sharded all layers as one module, not exactly one of ``input_ids`` and
                ``inputs_embeds`` is given, two caches are given, ``position_ids`` or ``seq_idx`` is given without
                ``cu_seq_lens_q``, an argument has another name here, the mask has neither the columns of the input nor
                those and the cache's, or it says of a column that the cache has read what it was not read as; and as
                ``RamNetForCausalLM.forward``.
            TypeError: if a cache is another model's; and as ``RamNetForCausalLM.forward``.
        """
        if isinstance(self.ramnet, _FSDP):
            raise ValueError(
                "FSDP has sharded the layers as one module, by its default; give TrainingArguments"
                " fsdp_config={'transformer_layer_cls_to_wrap': ['Block']}"
            )
        if (input_ids is None) == (inputs_embeds is None):
            given = (
                "neither input_ids nor inputs_embeds is"
                if input_ids is None
                else "input_ids and inputs_embeds are both"
            )
            raise ValueError(f"{given} given; give one of them")
        for name in ("position_ids", "seq_idx"):
            if ignored.get(name) is not None and cu_seq_lens_q is None:
                raise ValueError(
                    f"{name} is given, but a RAM-Net counts positions itself;"
                    " mark padding by attention_mask and packed documents by cu_seq_lens_q"
                )
        for name, instead in _OTHER_NAMES.items():
            if ignored.get(name) is not None:
                raise ValueError(f"{name} is given, which a model of transformers does not take; {instead}")
        cache = _cache(cache, ignored)
        read = inputs_embeds if input_ids is None else input_ids
        assert read is not None
        if read.dim() != (2 if inputs_embeds is None else 3):
            argument, axes = ("input_ids", "[B, T]") if inputs_embeds is None else ("inputs_embeds", "[B, T, C]")
            raise ValueError(f"{argument} has shape {list(read.shape)}; it must be {axes}")
        tokens = read.shape[1]
        if labels is not None:
            check_labels(labels, read[..., 0] if input_ids is None else read, self.config.vocab_size)
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = _of_zeros_and_ones(attention_mask)
        if attention_mask is not None and attention_mask.dim() == 2:
            before = max(0, attention_mask.shape[1] - tokens)
            if cache is not None and cache.state is not None:
                cache.check_mask(attention_mask[:, :before])
                attention_mask = attention_mask[:, before:]
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if cache is None and use_cache:
            cache = HFRamNetCache()
        state = None if cache is None else cache.state
        in_place = state is not None and tokens == 1 and not torch.is_grad_enabled()
        run = self.ramnet.hidden_states if inputs_embeds is None else self.ramnet.run_layers
        seen: list[Tensor] | None = [] if output_hidden_states else None
        hidden, state = run(
            read, state, attention_mask=attention_mask, cu_seqlens=cu_seq_lens_q, in_place=in_place, block_inputs=seen
        )
        if cache is not None:
            cache.has_read(state, tokens, attention_mask)
        loss = None
        if labels is not None:
            wanted = next_labels(labels, attention_mask, cu_seq_lens_q).flatten()
            total = summed_cross_entropy(
                self.ramnet.run_head, hidden[:, :-1].flatten(0, 1), wanted, self.config.vocab_size
            )
            count = (wanted != IGNORED).sum()
            if num_items_in_batch is None:
                loss = total / count
            else:
                share = (labels[:, 1:] != IGNORED).sum() / num_items_in_batch
                loss = total * (share / count.clamp(min=1))
        logits = None
        if labels is None or not self.training or isinstance(logits_to_keep, Tensor) or logits_to_keep:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.ramnet.run_head(hidden[:, kept])
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            cache=cache if use_cache else None,
            hidden_states=None if seen is None else (*seen, hidden),
        )
        return output.to_tuple() if return_dict is False else output

    def prepare_inputs_for_generation(  # generate looks for these names in the signature
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        inputs_embeds: Tensor | None = None,
        cache: HFRamNetCache | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the arguments of ``forward`` for the next step of ``generate``.

        Raises ValueError if the cache has read all that is given.
        """
        if next_sequence_length is not None and next_sequence_length < 1:
            name, given = ("input_ids", input_ids) if inputs_embeds is None else ("inputs_embeds", inputs_embeds)
            if not given.shape[1]:
                raise ValueError(f"{name} has shape {list(given.shape)}; a prompt needs a token")
            raise ValueError(
                f"{name} has {given.shape[1]} columns, of which the cache has read"
                f" {0 if cache is None else cache.columns}; give the tokens after them too, and an attention_mask of"
                " all"
            )
        inputs = super().prepare_inputs_for_generation(
            input_ids, next_sequence_length=next_sequence_length, inputs_embeds=inputs_embeds, cache=cache,
            is_first_iteration=is_first_iteration, **kwargs,
        )  # fmt: skip
        if cache is not None and not is_first_iteration:
            inputs.pop("attention_mask", None)  # a generated token is no padding
        if "cache" in inputs:  # PEFT asks the cache by this name whether it has inserted its virtual tokens
            inputs["past_key_values"] = inputs.pop("cache")
        return inputs

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *rest: Any) -> None:
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *rest)
        if not generation_config.use_cache and model_kwargs.get("cache") is not None:
            raise ValueError("a cache is given but use_cache is False; a RAM-Net can go on from a cache only with it")
        attention_mask = model_kwargs.get("attention_mask")
        if attention_mask is not None and attention_mask.dim() == 2:
            ends = attention_mask[:, -1:] == 0
            if bool(ends.any()):
                raise ValueError(f"attention_mask ends in padding in row {int(ends.nonzero()[0, 0])}; pad on the left")
        if generation_config.use_cache and model_kwargs.get("cache") is None:
            model_kwargs["cache"] = HFRamNetCache()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False


def _of_zeros_and_ones(mask: Tensor) -> Tensor:
    """Return a floating mask of 0 and 1, such as PEFT makes for its prompts, as bool; another one as it is."""
    return mask.bool() if bool(((mask == 0) | (mask == 1)).all()) else mask


def _cache(cache: Any, others: dict[str, Any]) -> HFRamNetCache | None:
    """Return the cache that is given as ``cache``, or by the names that it has in other models."""
    names = ("past_key_values", "cache_params")
    given = {"cache": cache} | {name: others[name] for name in names if name in others}
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        if not isinstance(value, HFRamNetCache):
            raise TypeError(f"{name} is a {type(value).__name__}; a RAM-Net goes on from the cache of an output")
        if value is not next(iter(given.values())):
            raise ValueError(f"{' and '.join(given)} are different caches; give one of them")
    return next(iter(given.values()), None)
