"""Scalar heads: one value per position, or one reward per sequence."""

from collections.abc import Callable

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lifecycle_hf.data.collators import length_mask


class ScalarHead(nn.Module):
    """Compute v = w·h + b, with w = 0 and b = 0 at the start; hidden states [..., H] -> values [...] in fp32.

    The product is computed in fp32 for every dtype of the parameters, also under autocast.
    """

    def __init__(self, hidden_size: int, bias: bool = True, dtype: torch.dtype | None = None):
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1, bias=bias, dtype=dtype)
        nn.init.zeros_(self.linear.weight)
        if bias:
            nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        bias = self.linear.bias
        with torch.autocast(hidden.device.type, enabled=False):
            values = nn.functional.linear(
                hidden.float(), self.linear.weight.float(), None if bias is None else bias.float()
            )
        return values.squeeze(-1)


class NormalisedHead(ScalarHead):
    """Compute v = w·tanh(U·LayerNorm(h) + c) + b: a head with one hidden layer for the states of a frozen model.

    Without the norm its gradient is as large as the states, which are in the tens. Without the hidden layer it
    explains one third of the variance of the returns, while an adapter explains nine tenths (docs/ppo.md).
    """

    def __init__(self, hidden_size: int):
        super().__init__(hidden_size)
        self.norm = nn.LayerNorm(hidden_size)
        self.dense = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        norm, dense = self.norm, self.dense
        with torch.autocast(hidden.device.type, enabled=False):
            parameters = norm.weight.float(), norm.bias.float()
            normed = nn.functional.layer_norm(hidden.float(), norm.normalized_shape, *parameters, norm.eps)
            hidden = torch.tanh(nn.functional.linear(normed, dense.weight.float(), dense.bias.float()))
        return super().forward(hidden)


def last_token_hidden(hidden: torch.Tensor, lengths: torch.LongTensor) -> torch.Tensor:
    """Return the hidden state of the last token before the padding of each row: [B, L, H], lengths [B] -> [B, H]."""
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), lengths.to(hidden.device) - 1]


class RewardModel(nn.Module):
    """Use a sequence-classification model (num_labels=1) as a reward: r = score(h_last) − config.reward_center.

    The last token is found by the lengths, so every pad token works. `model` may be a PeftModel.

    Raises:
        ValueError: the model has more than one label, or no linear head named ``score``, or is a prompt-learning
            adapter.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase):
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        head = self._base().score
        if not any(hasattr(p, "ds_id") for p in head.parameters()):  # all sharded parameters need the same dtype
            head.float()  # a score in bf16 has only two exact digits

    @property
    def config(self):
        return self._base().config

    @property
    def device(self) -> torch.device:
        return self._base().device

    def _base(self) -> PreTrainedModel:
        is_peft = isinstance(self.model, PeftModel)
        if is_peft and self.model.active_peft_config.is_prompt_learning:
            raise ValueError("A reward model can't be a prompt-learning adapter (prefix, prompt, p-tuning): use LoRA.")
        base = self.model.get_base_model() if is_peft else self.model
        name = type(base).__name__
        if getattr(base.config, "num_labels", None) != 1:
            raise ValueError(
                f"{name} has num_labels={base.config.num_labels}, but a reward model has one score: load it by "
                "AutoModelForSequenceClassification.from_pretrained(..., num_labels=1)."
            )
        if not hasattr(base, "score"):
            raise ValueError(
                f"{name} has no linear head named 'score', which a reward model needs: use the "
                "AutoModelForSequenceClassification of a decoder, or pass your model as a callable reward function."
            )
        return base

    @property
    def backbone(self) -> PreTrainedModel:
        base = self._base()
        return getattr(base, base.base_model_prefix)

    def read(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return centred scores [B] in fp32 from the hidden states [B, H] of the last tokens."""
        base = self._base()
        with torch.autocast(hidden.device.type, enabled=False):
            raw = base.score(hidden.to(next(base.score.parameters()).dtype)).squeeze(-1)
        return raw.float() - getattr(base.config, "reward_center", 0.0)

    def score_states(self, last_hidden: Callable[[nn.Module], torch.Tensor]) -> torch.Tensor:
        """Return centred scores [B] from a function of the backbone to the hidden states [B, H] of the last tokens."""
        return self.read(last_hidden(self.backbone))

    def forward(self, input_ids: torch.LongTensor, lengths: torch.LongTensor) -> torch.Tensor:
        """Return centred scores [B] in fp32 of right-padded rows `input_ids` [B, L] with `lengths` [B] real tokens."""
        mask = length_mask(lengths.to(input_ids.device), input_ids.shape[1])
        output = self.backbone(input_ids=input_ids, attention_mask=mask.long(), use_cache=False)
        return self.read(last_token_hidden(output.last_hidden_state, lengths))

    def score(self, input_ids: torch.LongTensor, lengths: torch.LongTensor) -> torch.Tensor:
        """Return centred scores [B], like a call of the model."""
        return self(input_ids, lengths)
