"""One decoder with three kinds of attention: Llama's layers, with the mask of the config, which start as the identity.

The weights have the same names as in Llama, and this file contains only the differences from Llama. It imports only
torch and transformers, so that a checkpoint can contain its own code (`trust_remote_code=True`).
"""

import copy

import torch
from torch import nn
from transformers import initialization as init
from transformers import masking_utils as masking
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GenericForQuestionAnswering, GenericForSequenceClassification
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.models.llama import modeling_llama as llama
from transformers.utils import can_return_tuple, logging
from transformers.utils.import_utils import is_tracing

from .configuration_lifecycle import LifecycleConfig

logger = logging.get_logger(__name__)


class LifecycleDecoderLayer(llama.LlamaDecoderLayer):
    """Llama's layer, with zero initial weights in its two output projections, so that at the start h + f(h) = h."""

    def __init__(self, config: LifecycleConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.self_attn.o_proj.starts_at_zero = self.mlp.down_proj.starts_at_zero = True


class LifecyclePreTrainedModel(llama.LlamaPreTrainedModel):
    config_class = LifecycleConfig
    config: LifecycleConfig
    _no_split_modules = ["LifecycleDecoderLayer"]

    def _init_weights(self, module):
        super()._init_weights(module)
        if getattr(module, "starts_at_zero", False):
            init.zeros_(module.weight)


class LifecycleModel(LifecyclePreTrainedModel, llama.LlamaModel):
    """The backbone: token ids [B, L] -> hidden states [B, L, H].

    For rows with several packed documents pass `position_ids` that start again at each document, no `attention_mask`
    and, as in Llama, `use_cache=False`. Bidirectional attention has no cache.
    """

    def __init__(self, config: LifecycleConfig):
        LifecyclePreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(LifecycleDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = llama.LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = llama.LlamaRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        prefix_lengths: torch.LongTensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Run Llama's forward pass with the attention of the config.

        Args:
            prefix_lengths: [B], or [B, documents] for packed rows, where [B] gives those of the first documents: the
                number of first tokens that attend to each other in both directions. Cached tokens count, padding does
                not. For `attention="prefix"` only; without it the prefixes have length 0, which is causal attention.

        Raises:
            ValueError: a prefix does not fit its row (not checked during compilation, where the values are unknown),
                or the attention implementation can't mask a prefix.
        """
        if inputs_embeds is None and input_ids is not None:
            inputs_embeds, input_ids = self.embed_tokens(input_ids), None
        if inputs_embeds is not None:
            attention_mask = self._mask(prefix_lengths, inputs_embeds, attention_mask, past_key_values, position_ids)
        if self.config.attention == "bidirectional":
            kwargs |= {"is_causal": False, "use_cache": False}
        return super().forward(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, **kwargs)

    def _mask(self, prefix_lengths, inputs_embeds, attention_mask, past_key_values, position_ids):
        """Return the complete mask if Llama's forward would not make it by itself, else `attention_mask` unchanged."""
        complete = attention_mask is not None and len(attention_mask.shape) == 4
        if prefix_lengths is not None:
            if self.config.attention != "prefix" or complete:
                what = "a 4-D attention_mask" if complete else f"attention={self.config.attention!r}"
                raise ValueError(
                    f"prefix_lengths came with {what}, but it can't be used with that: load the model with "
                    'attention="prefix" and give a 2-D attention_mask or none, or leave prefix_lengths out.'
                )
            return self._prefix_mask(prefix_lengths, inputs_embeds, attention_mask, past_key_values, position_ids)
        if self.config.attention == "prefix" and not complete and _is_empty(past_key_values):
            logger.warning_once(
                f"{type(self).__name__} has attention='prefix' and was called without prefix_lengths: it uses 0 for "
                "every row, which is causal attention. Pass prefix_lengths, [batch]; pass zeros if you want that."
            )
        unmasked = attention_mask is None and past_key_values is None and position_ids is not None
        if unmasked and self.config.attention == "bidirectional":
            documents = masking.find_packed_sequence_indices(position_ids.expand(len(inputs_embeds), -1))
            if documents is not None:
                together = masking.packed_sequence_mask_function(documents)
                return masking.create_bidirectional_mask(self.config, inputs_embeds, None, and_mask_function=together)
        return attention_mask

    def _prefix_mask(self, prefix_lengths, inputs_embeds, attention_mask, past_key_values, position_ids):
        """Return the mask that is causal, and bidirectional among the tokens of each prefix."""
        (batch, queries), device, cache = inputs_embeds.shape[:2], inputs_embeds.device, past_key_values
        real, documents = attention_mask, None
        if real is None:
            keys = queries if cache is None else cache.get_mask_sizes(queries, 0)[0]
            real = torch.ones(batch, keys, device=device)
            if cache is None and position_ids is not None:
                documents = masking.find_packed_sequence_indices(position_ids.expand(batch, -1))
        real = real.to(device).bool()
        documents = torch.zeros_like(real, dtype=torch.long) if documents is None else documents
        prefixes = torch.as_tensor(prefix_lengths, device=device).long()
        blocks = _prefix_blocks(prefixes, real, documents, 0 if cache is None else cache.get_seq_length())
        given = (inputs_embeds, attention_mask, cache, position_ids)
        mask = masking.create_causal_mask(self.config, *given, block_sequence_ids=blocks)
        if mask is not None and len(mask.shape) == 4:
            return mask
        if is_tracing(prefixes) or prefixes.any():
            raise ValueError(
                f"attn_implementation={self.config._attn_implementation!r} can't mask a prefix: load the model with "
                'attn_implementation="sdpa", "eager" or "flex_attention", or with attention="causal".'
            )
        return attention_mask


def _is_empty(cache: Cache | None) -> bool:
    """Return whether the cache holds no tokens; False for a static cache, whose length is the value of a tensor."""
    return cache is None or (not cache.is_compileable and cache.get_seq_length() == 0)


def _prefix_blocks(prefixes, real, documents, encoded) -> torch.Tensor:
    """Return for each token of a prefix the number of its document, and -1 for all other tokens: [B, L].

    Args:
        prefixes: [B] or [B, documents], lengths.
        real: [B, L], false on padding.
        documents: [B, L], numbers of the documents, from 0.
        encoded: number of columns in the cache.
    """
    prefixes = prefixes[:, None] if prefixes.ndim == 1 else prefixes
    batch, width = real.shape
    if prefixes.ndim != 2 or len(prefixes) != batch or prefixes.shape[1] > width:
        raise ValueError(
            f"prefix_lengths has the shape {tuple(prefixes.shape)}, but the batch has {batch} rows of {width} tokens: "
            "give one number for each row, or for packed rows one for each of their documents."
        )
    lengths = torch.zeros_like(documents).scatter_add(1, documents, real.long())
    prefixes = nn.functional.pad(prefixes, (0, width - prefixes.shape[1]))
    if not is_tracing(prefixes):
        _check_prefixes(prefixes, lengths, real[:, :encoded].sum(1, keepdim=True))
    before = lengths.cumsum(1) - lengths
    rank = real.cumsum(1) - 1 - before.gather(1, documents)
    return documents.masked_fill(~real | (rank >= prefixes.gather(1, documents)), -1)


def _check_prefixes(prefixes, lengths, encoded) -> None:
    """Check that every prefix fits its document, and is completely in the cache or completely in this call."""
    cut = (encoded > 0) & (prefixes > encoded)
    wrong = (prefixes < 0) | (prefixes > lengths) | cut
    if not wrong.any():
        return
    row, document = wrong.nonzero()[0].tolist()
    prefix, length, past = (int(x) for x in (prefixes[row, document], lengths[row, document], encoded[row]))
    place = f"row {row}" if (lengths[:, 1:] == 0).all() else f"document {document} of row {row}"
    if 0 <= prefix <= length:
        raise ValueError(
            f"prefix_lengths of {place} is {prefix}, but the cache holds the first {past} tokens, encoded without the "
            "others: encode a prefix in one call. Give the length of the first prompt, or start without a cache."
        )
    raise ValueError(
        f"prefix_lengths of {place} is {prefix}, but it has {length} tokens here, padding not counted: give a number "
        f"from 0 to {length} (a prefix can't be fed in chunks)."
    )


class _LanguageModel(LifecyclePreTrainedModel):
    """The backbone and an LM head, [B, L] -> logits [B, L, V]; transformers chooses the loss by the class name."""

    _tied_weights_keys = llama.LlamaForCausalLM._tied_weights_keys
    _tp_plan = llama.LlamaForCausalLM._tp_plan
    _pp_plan = llama.LlamaForCausalLM._pp_plan
    _fsdp_plan = llama.LlamaForCausalLM._fsdp_plan

    def __init__(self, config: LifecycleConfig):
        super().__init__(config)
        self.model = LifecycleModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        prefix_lengths: torch.LongTensor | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Run LlamaForCausalLM's forward; `prefix_lengths` as in LifecycleModel, loss over `labels` != -100."""
        given = (input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, labels, use_cache)
        return llama.LlamaForCausalLM.forward(self, *given, logits_to_keep, prefix_lengths=prefix_lengths, **kwargs)


class LifecycleForCausalLM(_LanguageModel, GenerationMixin):
    """Next-token prediction with causal or prefix attention; `generate` uses the prompt as the prefix.

    Raises:
        ValueError: the config's attention is bidirectional.
    """

    def __init__(self, config: LifecycleConfig):
        if config.attention == "bidirectional":
            raise ValueError(
                "LifecycleForCausalLM with attention='bidirectional' would see the token that it is to predict: load "
                'it with attention="causal" or "prefix", or use LifecycleForMaskedLM.'
            )
        super().__init__(config)

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        # This is the only step of `generate` that runs once and knows the prompt's attention mask.
        if self.config.attention == "prefix" and model_kwargs.get("prefix_lengths") is None:
            mask, embeds = model_kwargs.get("attention_mask"), model_kwargs.get("inputs_embeds")
            if _is_empty(model_kwargs.get("past_key_values")):
                prompt = input_ids if embeds is None else embeds[..., 0]
                mask = torch.ones_like(prompt) if mask is None else mask
                model_kwargs["prefix_lengths"] = mask.long().sum(-1)
        return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **model_kwargs)

    def prepare_inputs_for_generation(
        self, input_ids, inputs_embeds=None, is_first_iteration=False, prefix_lengths=None, **kwargs
    ):
        """Prepare as in transformers; after the prefix is in the cache, all later tokens are causal."""
        if prefix_lengths is not None and (is_first_iteration or not kwargs.get("use_cache")):
            kwargs["prefix_lengths"] = prefix_lengths
        kwargs |= {"inputs_embeds": inputs_embeds, "is_first_iteration": is_first_iteration}
        return super().prepare_inputs_for_generation(input_ids, **kwargs)

    def create_masks_for_generate(
        self, config, inputs_embeds, attention_mask, *args, is_first_iteration=None, **kwargs
    ):
        """Make masks as in transformers, except for a prompt that may be a prefix, whose mask the model makes."""
        if config.attention == "prefix" and is_first_iteration:
            return attention_mask
        return masking.create_masks_for_generate(config, inputs_embeds, attention_mask, *args, **kwargs)


class LifecycleForMaskedLM(_LanguageModel):
    """Prediction of masked tokens: −log p(y_i | corrupted row), mean over `labels` != -100, not shifted.

    If the config has attention=None, attention is bidirectional.
    """

    def __init__(self, config: LifecycleConfig):
        if config.attention is None:
            config = copy.deepcopy(config)
            config.attention = "bidirectional"
        super().__init__(config)


class LifecycleForSequenceClassification(GenericForSequenceClassification, LifecyclePreTrainedModel):
    """A linear head on the hidden state of each row's last token that is not padding; [B, L] -> logits [B, labels].

    `attention_mask` says what is padding; without it, as in transformers, the pad token of the config is padding.
    """

    def __init__(self, config: LifecycleConfig):
        LifecyclePreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = LifecycleModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids=None, attention_mask=None, inputs_embeds=None, labels=None, prefix_lengths=None, **kwargs
    ) -> SequenceClassifierOutputWithPast:
        """Run the forward pass of LlamaForSequenceClassification; `prefix_lengths` as in LifecycleModel."""
        given = {"inputs_embeds": inputs_embeds, "prefix_lengths": prefix_lengths}
        outputs = self.model(input_ids, attention_mask, **given, **kwargs)
        states, loss = outputs.last_hidden_state, None
        rows = torch.arange(len(states), device=states.device)
        logits = self.score(states[rows, self._last(states, input_ids, attention_mask)])
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        rest = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return SequenceClassifierOutputWithPast(loss=loss, logits=logits, **rest)

    def _last(self, states, input_ids, attention_mask) -> torch.Tensor:
        """Return the index of the last token that is not padding: [B]."""
        width, pad = states.shape[1], self.config.pad_token_id
        if attention_mask is not None and attention_mask.ndim == 2:
            real = attention_mask[:, -width:].to(states.device) > 0
        elif pad is not None and input_ids is not None:
            real = input_ids.to(states.device) != pad
        elif len(states) == 1:
            real = torch.ones(states.shape[:2], device=states.device)
        else:
            raise ValueError(
                "LifecycleForSequenceClassification can't tell the padding of a batch from its tokens: pass a 2-D "
                "attention_mask, or set config.pad_token_id and pass input_ids."
            )
        return (real * torch.arange(width, device=states.device)).argmax(-1)


class LifecycleForQuestionAnswering(GenericForQuestionAnswering, LifecyclePreTrainedModel):
    """Prediction of the start and end of an answer: [B, L] -> start and end logits, [B, L] each.

    `prefix_lengths` is as in LifecycleModel.
    """

    def __init__(self, config: LifecycleConfig):
        LifecyclePreTrainedModel.__init__(self, config)
        self.model = LifecycleModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()
