"""EquilibriumForCausalLM: a language model of this library as a model of transformers.

Letters: B batch, T time, S stored positions, D width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from equilibria.fixed_point import Method
from equilibria.hf import cache as caches
from equilibria.hf.arguments import given_cache, key_padding_mask, refuse, used_stop
from equilibria.hf.configuration import EquilibriumConfig
from equilibria.hf.vocabulary import resize
from equilibria.layers.linear import fold
from equilibria.lm.model.embedding import widened

CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""The name of the cache in outputs: "cache" since transformers 5.24."""


@dataclasses.dataclass
class EquilibriumOutput(CausalLMOutputWithPast):
    """The output of a causal language model, and how its solve ended."""

    evals: int | None = None
    """Number of evaluations of f in this forward pass."""
    residual: Float[Tensor, " B"] | None = None
    """The relative residual of each row."""
    converged: Bool[Tensor, " B"] | None = None
    """True for rows that met the tolerance."""


class EquilibriumForCausalLM(PreTrainedModel, GenerationMixin):
    """p(next token | all tokens before) by one equilibrium of the whole text, with one cache slot per position.

    Args:
        config: the configuration; ``EquilibriumConfig.of`` makes it from objects of this library, and
            ``equilibria.hf.from_run`` makes config and model from a run.
    """

    config_class = EquilibriumConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = False
    accepts_loss_kwargs = True
    _no_split_modules = ["Equilibrium"]  # noqa: RUF012
    _tied_weights_keys = None
    _can_compile_fullgraph = False

    def __init__(self, config: EquilibriumConfig) -> None:
        super().__init__(config)
        config.check()
        edge = config.edge_token_id is not None
        self.model = config.decoded_language().build(
            config.vocab_size - edge, method=config.decoded_method(), eval_stop=config.decoded_eval_stop()
        )
        if config.folded:
            fold(self.model)
        self.post_init()

    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Float[Tensor, "B T D"] | None = None,
        labels: Int[Tensor, "B T"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        rtol: float | None = None,
        atol: float | None = None,
        max_evals: int | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **refused: Any,
    ) -> EquilibriumOutput | tuple[Any, ...]:
        """Logits, and the loss if there are labels.

        Args:
            input_ids: the tokens that follow those in the cache.
            attention_mask: 1 at text, 0 at padding, for the positions in the cache and the new ones [B S+T]; padding
                lies before or after a text. None for no padding.
            position_ids: checked, and not used: positions enter by their distances.
            cache: a cache of transformers; solved positions are added to it. Only without gradients.
            past_key_values: the name of ``cache`` before transformers 5.24; give one of the two.
            inputs_embeds: the vectors of ``get_input_embeddings()`` instead of ``input_ids``.
            labels: the tokens themselves; position t is scored by label t + 1, and −100 is not scored.
            use_cache: return a cache; None for the configuration's choice, without gradients.
            logits_to_keep: number of last positions that get logits, 0 for all; or their indices.
            rtol: relative tolerance of this solve; None for that of the configuration.
            atol: absolute tolerance of this solve.
            max_evals: budget of this solve.
            output_hidden_states: also return the vectors of the embedding and the layer's output.
            return_dict: False for a tuple.
            cache_position: not used: the cache knows its length.
            num_items_in_batch: number that the summed loss is divided by; None for the number of scored positions.
            refused: any other argument is an error.

        Raises:
            TypeError: an argument is unknown.
            ValueError: an argument has no exact meaning here, such as a cache with gradients.
        """
        refuse(refused)
        past = given_cache(cache, past_key_values)
        use_cache = self._use_cache(use_cache, past)
        x = self._vectors(input_ids, inputs_embeds)
        mask = key_padding_mask(attention_mask, position_ids, seen=caches.seen(past), time=x.shape[1])
        if use_cache and past is None:
            past = DynamicCache(config=self.config)
        before, new = (None, None) if mask is None else (mask[:, : -x.shape[1]], mask[:, -x.shape[1] :])
        memory = caches.read(past, self.config, like=x, mask=before)
        method = self._method(rtol=rtol, atol=atol, max_evals=max_evals)
        out = self.model.layer(x, memory, method=method, key_padding_mask=new)
        if use_cache and past is not None:
            caches.write(past, self.config, out, x=x)
        output = self.model.head.dropped(out.output)
        logits = self._logits(output, logits_to_keep)
        loss = None if labels is None else self._loss(out.output, output, logits, labels, num_items_in_batch)
        solution = out.solution
        result = EquilibriumOutput(
            loss=loss,
            logits=logits,
            hidden_states=(x, out.output)
            if output_hidden_states or self._wants_hidden_states(output_hidden_states)
            else None,
            evals=solution.evals,
            residual=solution.residual,
            converged=solution.converged,
            **{CACHE: past if use_cache else None},
        )
        return result.to_tuple() if return_dict is False else result
