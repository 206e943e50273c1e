"""The models: moekit's underneath, with the arguments and results of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.utils.generic import can_return_tuple

from moekit.hf.cache import Keys, visible
from moekit.hf.config import FairseqMoeConfig
from moekit.nn.experts import Experts
from moekit.nn.gate import Routing, balance_loss
from moekit.nn.noise import from_torch
from moekit.nn.operations import added, choose_backend
from moekit.nn.passes import Pass
from moekit.nn.positions import Positions
from moekit.nn.transformer import ATTENTION, Transformer


class FairseqMoePreTrainedModel(PreTrainedModel):
    config_class = FairseqMoeConfig
    base_model_prefix = "model"
    _no_split_modules = ["Block"]
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: torch.nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, torch.nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, Experts):
            for name, stack in module.tensors.items():
                init.normal_(stack, std=self.config.initializer_range * (name[0] == "w"))
        elif isinstance(module, Positions) and module.weight is not None:
            init.normal_(module.weight, std=self.config.initializer_range)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Do nothing, as with :class:`FairseqMoeConfig`."""


class FairseqMoeModel(FairseqMoePreTrainedModel):
    """The decoder without logits. ``decoder`` is moekit's model, with the names of :data:`moekit.plain.NAMES`.

    Attributes:
        backend: what it computes with where there are no gradients, as ``moekit.load(backend=...)``.
    """

    backend = "auto"

    def __init__(self, config: FairseqMoeConfig):
        super().__init__(config)
        self.decoder = Transformer(config.of_moekit())
        self.post_init()

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.decoder.embed

    def set_input_embeddings(self, value: torch.nn.Module) -> None:
        self.decoder.embed = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        output_hidden_states: bool | None = None,
        record: Callable[[int, Routing], None] | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """The features of T tokens that come after P in the cache.

        Args:
            input_ids: [B, T], or ``inputs_embeds`` [B, T, input_dim] in their place.
            attention_mask: [B, P + T], 0 for padding, wherever it stands; or [B, 1, T, M], as scaled_dot_product_attention
                takes it.
            position_ids: [B, T] or [1, T], from 0, and -1 for padding; by default they count the tokens that are no padding.
            record: called by each layer with experts, see :class:`moekit.nn.passes.Pass`.
            past_key_values: ``cache`` by its former name.

        Raises:
            ValueError: neither or both of ``input_ids`` and ``inputs_embeds``, positions that the model has not, or attentions are
                asked for.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(
                f"{'neither' if input_ids is None else 'both'} of input_ids and inputs_embeds: expected one of them"
            )
        if kwargs.get("output_attentions"):
            raise ValueError(
                "output_attentions=True: the attention kernels make no matrix of weights; expected False"
            )
        decoder = self._prepared()
        x = decoder.embed(input_ids) if inputs_embeds is None else inputs_embeds
        if cache is None:
            cache = past_key_values
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache()
        asked, seen = self._asked(x, attention_mask, position_ids, cache, record)
        router_logits: list[Tensor] = []
        gates = [layer.moe.gate for layer in decoder.layers if layer.moe is not None]
        wanted = self.config.output_router_logits if output_router_logits is None else output_router_logits
        hooks = [
            gate.register_forward_hook(lambda _, __, out: router_logits.append(out))
            for gate in gates * bool(wanted)
        ]
        try:
            x, pending = decoder.placed(x, asked), None
            states = [x]
            with sdpa_kernel(ATTENTION):
                for layer in decoder.layers:
                    x, pending = layer(x, pending, seen, asked)
                    if output_hidden_states:
                        states.append(x if pending is None else added(x, pending))
            features = decoder.features(x, pending)
        finally:
            for hook in hooks:
                hook.remove()
        states[-1] = features
        return MoeModelOutputWithPast(
            last_hidden_state=features,
            cache=cache,
            hidden_states=tuple(states) if output_hidden_states else None,
            router_logits=tuple(router_logits) if wanted else None,
        )

    def _prepared(self) -> Transformer:
        """The model with the right back end: with gradients "loop", which alone has them, else that of :attr:`backend`."""
        weight = self.decoder.embed.weight
        backend = "loop"
        if not torch.is_grad_enabled():
            backend = choose_backend(self.backend, weight.device, weight.dtype)
        if self.decoder.backend != backend:
            self.decoder.use(backend)
        return self.decoder

    def _asked(
        self,
        x: Tensor,
        mask: Tensor | None,
        at: Tensor | None,
        cache: Cache | None,
        record: Callable[[int, Routing], None] | None,
    ) -> tuple[Pass, Tensor | None]:
        """The pass over embeddings [B, T, input_dim], and which keys each token looks at, as in ``Transformer.forward``."""
        tokens, config = x.shape[1], self.decoder.config
        past = 0 if cache is None else int(cache.get_seq_length())
        if config.learned_positions and past + tokens > config.max_positions:
            raise ValueError(
                f"{past + tokens} tokens, those in the cache included; expected at most {config.max_positions}, the positions "
                "that the model has learned"
            )
        real = None
        if mask is not None and mask.dim() == 2 and not mask.all():
            real = mask.to(x.device).bool()
        slots = max(past + tokens, config.max_positions)
        if at is not None:
            learned = config.max_positions if config.learned_positions else None
            slots = max(slots, _last(at, x.shape[0], tokens, learned) + 1)
        else:
            at = torch.arange(past, past + tokens, device=x.device)[None]
            if real is not None:
                # As in fairseq, padding has the position PAD, which is -1 from 0.
                at = (real.long().cumsum(dim=1) * real - 1)[:, past : past + tokens]
        asked = Pass(
            self.config.capacity_token_fraction,
            padding=None if real is None else ~real[:, past : past + tokens],
            record=record,
            noise=from_torch,
            cache=Keys(cache, at.to(x.device), slots),
        )
        if mask is not None and mask.dim() == 4:
            return asked, mask.to(x.device)
        keys = tokens if cache is None else cache.get_mask_sizes(tokens, 0)[0]
        return asked, visible(past, tokens, keys, real, x.device)


def _last(at: Tensor, samples: int, tokens: int, learned: int | None) -> int:
    """The last position of ``at``, which should be those of ``tokens`` tokens of ``samples`` samples; -1 where there is none.

    Args:
        learned: how many positions the model has learned; None: it has all of them.

    Raises:
        ValueError: ``at`` has another shape, or holds what is no position. Rows of the table are counted from the end below -1.
    """
    if at.dim() > 2 or at.shape[-1:] != (tokens,) or at.numel() not in (tokens, samples * tokens):
        raise ValueError(
            f"position_ids have the shape {list(at.shape)}; expected {[samples, tokens]} or {[1, tokens]}, as the tokens have"
        )
    if not at.numel():
        return -1
    # One wait for the device.
    first, last = torch.stack(at.aminmax()).tolist()
    if first < -1 or (learned is not None and last >= learned):
        wanted = (
            "0 or more"
            if learned is None
            else f"0 to {learned - 1}, the positions that the model has learned"
        )
        raise ValueError(f"position_ids go from {first} to {last}; expected {wanted}, and -1 for padding")
    return last


class FairseqMoeForCausalLM(FairseqMoePreTrainedModel, GenerationMixin):
    """fairseq's language model, with logits of the next token."""

    def __init__(self, config: FairseqMoeConfig):
        super().__init__(config)
        self.model = FairseqMoeModel(config)
        self.post_init()

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: torch.nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> torch.nn.Module:
        decoder = self.model.decoder
        return decoder.embed if decoder.output is None else decoder.output

    def set_output_embeddings(self, value: torch.nn.Module) -> None:
        decoder = self.model.decoder
        if decoder.output is None:
            decoder.embed = value
        else:
            decoder.output = value

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> torch.nn.Module:
        """As in transformers; afterwards all rows count, with those of new tokens."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        if self.config.dictionary_size is not None:
            self.config.dictionary_size = len(embeddings.weight)
        return embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Logits [B, T, vocab_size], or those of the last ``logits_to_keep`` tokens.

        With ``labels`` [B, T], which are shifted here, the mean loss of those that are not -100. With
        ``output_router_logits`` the gates' logits [B T, E] of each layer with experts, and ``aux_loss``, the sum of the
        layers' balance losses (:func:`moekit.nn.gate.balance_loss`), which is part of the loss. The other arguments are
        those of :class:`FairseqMoeModel`.
        """
        routed = self.config.output_router_logits if output_router_logits is None else output_router_logits
        routings: list[Routing] = []
        found = self.model(
            input_ids,
            attention_mask,
            position_ids,
            cache,
            inputs_embeds,
            use_cache,
            routed,
            output_hidden_states,
            (lambda _, routing: routings.append(routing)) if routed else None,
            past_key_values,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        features = found.last_hidden_state[:, kept]
        logits = self.model.decoder.logits(features.to(self.model.decoder.output_weight.device))
        if self.config.dictionary_size is not None:
            logits[..., self.config.dictionary_size :] = -torch.inf
        loss = balance = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        if routings:
            balance = torch.stack([balance_loss(one).to(logits.device) for one in routings]).sum()
            loss = None if loss is None else loss + self.config.router_aux_loss_coef * balance
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=balance,
            logits=logits,
            cache=found.cache,
            hidden_states=found.hidden_states,
            router_logits=found.router_logits,
        )
