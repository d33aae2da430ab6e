"""EquilibriumForCausalLM: a language model of this library as a model of transformers.

Letters: B batch, T time, S stored positions, D width, V vocabulary.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from equilibria.core.graph import refused_if_untracked
from equilibria.fixed_point import Method
from equilibria.hf import cache as caches
from equilibria.hf import remote
from equilibria.hf.arguments import (
    check_ids,
    check_no_gradient_of_a_cache,
    check_text_at_the_end,
    check_weights,
    checked_vectors,
    given_cache,
    kept_positions,
    key_padding_mask,
    refuse,
    used_stop,
)
from equilibria.hf.configuration import EquilibriumConfig
from equilibria.hf.edges import EdgesRead, lowest_at_edge, resized
from equilibria.hf.loss import IGNORED, check_labels_come_with_their_count, extra_loss, scored, targets_of
from equilibria.hf.weights import are_folded, check_form, draw
from equilibria.layers.linear import fold
from equilibria.lm.model.model import NO_LOSSES
from equilibria.lm.model.tables import widened
from equilibria.torch_private import is_replica

CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""The name of the cache in outputs: "cache" since transformers 5.24."""


@dataclasses.dataclass
class EquilibriumOutput(CausalLMOutputWithPast):
    """The output of a causal language model, and how its solve ended."""

    evals: int | None = None
    """Number of evaluations of f in this forward pass; None from ``nn.DataParallel``, which joins tensors alone."""
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

    config: EquilibriumConfig
    config_class = EquilibriumConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = False
    accepts_loss_kwargs = True
    _no_split_modules = ["Equilibrium"]  # noqa: RUF012
    _can_compile_fullgraph = False

    def __init__(self, config: EquilibriumConfig) -> None:
        super().__init__(config)
        config.check()
        self._cell = config.cell
        self.model = config.decoded_language().build(
            config.table_rows, method=config.decoded_method(), eval_stop=config.decoded_eval_stop()
        )
        if config.folded:
            fold(self.model)
        self.model.embedding.register_forward_pre_hook(EdgesRead(config))
        self._built = copy.deepcopy((config.method, config.eval_stop))
        """``config.method`` and ``config.eval_stop`` as they were when the layer was built."""
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
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        tokenizer: Any = None,
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
            labels: the tokens themselves; position t is scored by label t + 1. Padding and labels of −100 are not.
            use_cache: return a cache; None for the configuration's choice, without gradients.
            logits_to_keep: number of last positions that get logits, 0 for all; or their indices.
            rtol: relative tolerance of this solve; None for that of the configuration.
            atol: absolute tolerance of this solve.
            max_evals: budget of this solve.
            output_attentions: must not be true: a solve has one attention per evaluation.
            output_hidden_states: also return the vectors of the embedding and the layer's output.
            return_dict: False for a tuple; None for the configuration's choice.
            cache_position: not used: the cache knows its length.
            num_items_in_batch: number that the summed loss is divided by; None for the number of scored positions.
            tokenizer: not used: ``generate(stop_strings=…)`` passes it on.
            refused: any other argument is an error.

        Raises:
            TypeError: an argument is unknown.
            ValueError: an argument has no exact meaning here, such as a cache with gradients.
        """
        del tokenizer
        self._check_call(refused, output_attentions)
        check_labels_come_with_their_count(labels, num_items_in_batch)
        past = given_cache(cache, past_key_values)
        use_cache = self._uses_cache(use_cache, past)
        hidden = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        x = self._vectors(input_ids, inputs_embeds)
        chosen = kept_positions(logits_to_keep, x.shape[1])
        mask = key_padding_mask(attention_mask, position_ids, seen=caches.seen(past), new=x.shape[:2])
        if use_cache and past is None:
            past = DynamicCache(config=self.config)
        before, new = (None, None) if mask is None else (mask[:, : -x.shape[1]], mask[:, -x.shape[1] :])
        memory = caches.read(past, self._cell, like=x, mask=before)
        method = self._method(rtol=rtol, atol=atol, max_evals=max_evals)
        out = self.model.layer(x, memory, method=method, key_padding_mask=new)
        if use_cache and past is not None:
            caches.write(past, self._cell, out, x=x)
        output = self.model.head.dropped(out.output)
        if labels is None:
            loss, logits = None, self._logits(output[:, chosen])
        else:  # the loss needs the logits of all positions
            check_ids("labels", labels, self.config.vocab_size, shape=x.shape[:2], ignored=IGNORED)
            targets = targets_of(labels, new, self.config, counted=num_items_in_batch is not None)
            every = self._logits(output)
            loss = self._loss(every, out.output, output, targets, num_items_in_batch)
            logits = every[:, chosen]
        kept: dict[str, Any] = {CACHE: past if use_cache else None}
        result = EquilibriumOutput(
            loss=refused_if_untracked(loss),
            logits=refused_if_untracked(logits),
            hidden_states=refused_if_untracked((x, out.output)) if hidden else None,
            evals=None if is_replica(self) else out.solution.evals,
            residual=out.solution.residual,
            converged=out.solution.converged,
            **kept,
        )
        as_tuple = (self.config.return_dict if return_dict is None else return_dict) is False
        return result.to_tuple() if as_tuple else result

    def _check_call(self, others: dict[str, Any], output_attentions: bool | None) -> None:
        attentions = self.config.output_attentions if output_attentions is None else output_attentions
        refuse({**others, "output_attentions": attentions or None})
        check_weights(self, self.model.embedding)

    def _uses_cache(self, use_cache: bool | None, past: Cache | None) -> bool:
        if use_cache or past is not None:
            check_no_gradient_of_a_cache()
        return self.config.use_cache and not torch.is_grad_enabled() if use_cache is None else use_cache

    def _method(self, *, rtol: float | None, atol: float | None, max_evals: int | None) -> Method:
        layer: Any = self.model.layer
        if (self.config.method, self.config.eval_stop) == self._built:
            method = layer.method if self.training else layer.evaluation_method
        else:  # the configuration was changed after the layer was built
            method = self.config.decoded_method()
            method = method if self.training else method.with_stop(self.config.decoded_eval_stop())
        return used_stop(method, rtol=rtol, atol=atol, max_evals=max_evals)

    def _vectors(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Float[Tensor, "B T D"]:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds, and not both.")
        if input_ids is None:
            return checked_vectors(inputs_embeds, width=self.config.hidden_size, dtype=self.dtype)
        check_ids("input_ids", input_ids, self.config.vocab_size)
        return self.model.embedding(input_ids)

    def _logits(self, output: Float[Tensor, "B T O"]) -> Float[Tensor, "B T V"]:
        return lowest_at_edge(self.model.head.logits(output, self.model.embedding), self.config)

    def _loss(
        self,
        logits: Float[Tensor, "B T V"],
        output: Float[Tensor, "B T O"],
        kept: Float[Tensor, "B T O"],
        targets: Int[Tensor, "B _"],
        count: Tensor | int | None,
    ) -> Float[Tensor, ""]:
        """The mean nll of the targets of all positions but the last, in float32 or wider, plus the extra losses."""
        predicted = widened(logits[:, :-1])
        nll = functional.cross_entropy(
            predicted.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        count = scored(targets, count)
        loss, losses = nll / count, self.model.losses
        extra = None
        if self.training and losses != NO_LOSSES:
            extra = extra_loss(losses, output[:, :-1], kept[:, :-1], targets, count)
        return loss if extra is None else loss + extra

    def generate(self, *args: Any, **choices: Any) -> Any:
        """As in transformers; a prompt that ends in padding is an error."""
        check_text_at_the_end(choices.get("attention_mask"))
        parent: Any = super()
        return parent.generate(*args, **choices)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As in transformers, but the cache has its older name, under which peft looks for its prompt."""
        parent: Any = super()
        found = parent.prepare_inputs_for_generation(*args, **kwargs)  # "kwargs": transformers reads the name
        return {("past_key_values" if name == CACHE else name): value for name, value in found.items()}

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **choices: Any) -> None:
        """As in transformers, with the file that finds the classes of a model that was exported."""
        self.config.folded = self.config.folded or are_folded(self.model)
        super().save_pretrained(save_directory, *args, **choices)
        if getattr(self.config, "auto_map", None):
            remote.write(Path(save_directory))

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **choices: Any) -> Any:
        """As in transformers; a file with weights of another form, or of another model, is an error."""
        found: Any = super().from_pretrained(*args, output_loading_info=True, **choices)
        model, told = found
        check_form(told, folded=model.config.folded)
        return (model, told) if output_loading_info else model

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModelForCausalLM") -> None:
        """Do nothing: transformers would copy the source of this module beside the weights."""

    def get_input_embeddings(self) -> nn.Module:
        """The embedding; its result can be given as ``inputs_embeds``."""
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding."""
        value.register_forward_pre_hook(EdgesRead(self.config))
        self.model.embedding = value

    def get_submodule(self, target: str) -> nn.Module:
        """As in PyTorch; peft asks for BERT's name of the embedding, or else guesses one by its number of rows."""
        return self.model.embedding if target == "embeddings.word_embeddings" else super().get_submodule(target)

    def get_output_embeddings(self) -> None:
        """None: a tied head reads the embedding, and another one is no ``nn.Linear``."""

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Give embedding and head rows for more ids, as after ``tokenizer.add_tokens``; new rows start at the mean.

        Raises:
            ValueError: the embedding is divided into clusters, or the number is smaller than the vocabulary.
        """
        resize = super().resize_token_embeddings
        return resized(self, new_num_tokens, resize, pad_to_multiple_of, mean_resizing=mean_resizing)

    @staticmethod
    def create_masks_for_generate(*, attention_mask: Tensor | None = None, **ignored: Any) -> Tensor | None:
        """The mask as it is, one number per position: the cell makes its own mask of pairs."""
        del ignored
        return attention_mask

    def _init_weights(self, module: nn.Module) -> None:
        draw(module)


AutoModelForCausalLM.register(EquilibriumConfig, EquilibriumForCausalLM)
