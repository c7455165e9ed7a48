"""The policy and its reference as one module, and the base of the trainers of such a module."""

import copy
import warnings
from contextlib import nullcontext
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from lifecycle_hf.completions.scoring import Completions, completion_logprobs
from lifecycle_hf.data.tokenize import require_eos
from lifecycle_hf.models.loading import check_pad_token, load_causal_lm, load_tokenizer, save_adapter_notes
from lifecycle_hf.models.reference import frozen_copy
from lifecycle_hf.models.roles import SharedBase
from lifecycle_hf.trainers.base.checkpoints import PolicyCheckpointMixin
from lifecycle_hf.trainers.base.trainer import LifecycleTrainerMixin

SHAPE = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings",
)  # fmt: skip
"""Entries of a config that must agree if a checkpoint is of the same model."""


class PolicyAndReference(nn.Module):
    """Hold the policy and its reference as one module, so that one engine (DDP, ZeRO) wraps both.

    Args:
        policy: causal LM that trains, or a PeftModel over one.
        reference: frozen causal LM; None if `reference_role` is set or there is no reference.
        shared: the roles of the policy's PeftModel.
        reference_role: adapter of the shared base that is the reference, or "base" for the base with adapters off.
    """

    def __init__(
        self,
        policy: nn.Module,
        *,
        reference: nn.Module | None = None,
        shared: SharedBase | None = None,
        reference_role: str | None = None,
    ):
        super().__init__()
        self.policy = policy
        self.reference = None if reference is None else reference.requires_grad_(False)
        self.shared, self.reference_role = shared, reference_role

    @property
    def config(self):
        return self.policy.config

    @property
    def policy_role(self) -> str | None:
        return self.shared.policy if self.shared is not None else None

    def role(self, role: str | None):
        return self.shared.role(role) if self.shared is not None else nullcontext()

    @property
    def frozen(self) -> list[nn.Module]:
        """Separate modules that never train."""
        return [] if self.reference is None else [self.reference]

    def train(self, mode: bool = True):
        """Set the mode as in torch; frozen modules stay in eval mode."""
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    @property
    def _models(self) -> list[PreTrainedModel]:
        return [module for module in self.modules() if isinstance(module, PreTrainedModel)]

    @property
    def _no_split_modules(self) -> list[str]:
        """Class names of the layers that FSDP shards one by one."""
        return sorted({name for model in self._models for name in model._no_split_modules or ()})

    def tie_weights(self) -> None:
        """Tie the weights of every model again; FSDP calls this after it has moved them."""
        for model in self._models:
            model.tie_weights()

    @property
    def checkpointed(self) -> list[nn.Module]:
        """Models for which gradient checkpointing is enabled."""
        return [self.policy]

    def activation_checkpointing_enable(self, **kwargs):
        """Enable gradient checkpointing for models that train; each layer is recomputed under its own adapter."""
        for model in self.checkpointed:
            model.activation_checkpointing_enable(**kwargs)
        if self.shared is not None:
            self.policy.enable_input_require_grads()
            self.shared.keep_roles_in_checkpointing()

    def forward(
        self,
        batch: Completions | None = None,
        texts: Completions | None = None,
        *,
        want: tuple[str, ...] = (),
        temperature: float = 1.0,
    ) -> dict[str, torch.Tensor]:
        """Compute the entries that `want` names.

        "logprobs", "entropy", "ref_logprobs": [B, T], at `temperature`; with "entropy_gradient" the entropies have a
        gradient. "ref_states": the hidden states [B, T + 1, H] from which "ref_logprobs" are computed.
        "prompt_logprobs": [B], see [`completion_logprobs`]. "texts": log-probs of `texts` [B', T'] at temperature 1.
        """
        out = {}
        if "ref_logprobs" in want:  # before the policy, whose forward pass leaves activations in memory
            with torch.no_grad(), self.role(self.reference_role):
                reference = self.reference if self.reference is not None else self.policy
                states = "ref_states" in want
                scores = completion_logprobs(reference, batch, temperature=temperature, states=states)
                out |= {"ref_logprobs": scores.logprobs} | ({"ref_states": scores.states} if states else {})
        if self.shared is not None:
            self.shared.activate(self.policy_role)
        if "logprobs" in want:
            extra = {name: name in want for name in ("entropy", "entropy_gradient")}
            extra["prompts"] = "prompt_logprobs" in want
            scores = completion_logprobs(self.policy, batch, temperature=temperature, **extra)
            out |= {name: value for name, value in scores._asdict().items() if value is not None}
        if "texts" in want:
            out["texts"] = completion_logprobs(self.policy, texts).logprobs
        return out

    def part(self, name: str, state_dict: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor] | None:
        """Return the weights of the submodule `name` out of `state_dict`; None if there is no `state_dict`."""
        if state_dict is None:
            return None
        return {k.removeprefix(f"{name}."): v for k, v in state_dict.items() if k.startswith(f"{name}.")}

    def save_pretrained(self, folder: str, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Write the policy as an ordinary checkpoint (or adapter).

        Args:
            state_dict: weights of this whole module, if they are sharded over processes.
        """
        weights = self.part("policy", state_dict)
        if self.shared is None:
            self.policy.save_pretrained(folder, state_dict=weights)
        else:
            self.shared.save_adapter(self.shared.policy, folder, weights)
            save_adapter_notes(self.policy, folder)

    def load_pretrained(self, folder: str) -> None:
        """Read the weights that [`save_pretrained`] wrote.

        Raises:
            ValueError: the checkpoint belongs to another model; the message names the difference.
        """
        if self.shared is not None:
            self.shared.load_adapter(self.shared.policy, folder)
        else:
            load_weights(self.policy, folder)


def load_weights(model: PreTrainedModel, folder: str | Path) -> None:
    """Read the weights of a checkpoint into an existing model.

    Raises:
        ValueError: the checkpoint belongs to another model; the message names the first difference.
    """
    theirs = type(model.config).from_pretrained(folder)
    for name in SHAPE:
        here, there = (getattr(config, name, None) for config in (model.config, theirs))
        if here != there:
            difference = f"its {name} is {there!r}, the model here has {here!r}"
            raise ValueError(f"The checkpoint {folder} belongs to another base model: {difference}.")
    model.load_state_dict(type(model).from_pretrained(folder, dtype=model.dtype).state_dict())


class PolicyBuilder:
    """Turn names, paths and models into the policy that trains, its tokenizer and its reference.

    Args:
        args: options with `trust_remote_code` and those of `transformers.TrainingArguments`.
        model: a name or path (of a model or an adapter), a causal LM or a PeftModel.
        processing_class: tokenizer; by default the model's.
        peft_config: the adapter to train, where `model` is not one already.
        quantization_config, init_kwargs: options for loading the policy.

    Attributes:
        policy: the causal LM, or a PeftModel over one.
        shared: the roles of the policy's adapters; None without PEFT.
        tokenizer: the tokenizer, which has an EOS token and a pad token.
        policy_kwargs, init_kwargs: keyword arguments of `from_pretrained` for the policy, and for other models.

    Raises:
        ValueError: a quantised model without an adapter, or a tokenizer without EOS or with a wrong pad token.
    """

    def __init__(
        self, args, model, processing_class=None, peft_config=None, quantization_config=None, init_kwargs=None
    ):
        self.args, self.model, self.peft_config = args, model, peft_config
        self.name = model if isinstance(model, str) else model.config._name_or_path
        self.policy_kwargs = {**(init_kwargs or {}), "trust_remote_code": args.trust_remote_code}
        # A revision names a commit of the policy's repository and of no other.
        self.init_kwargs = {name: value for name, value in self.policy_kwargs.items() if name != "revision"}
        named = self.name if processing_class is None else processing_class
        self.tokenizer = load_tokenizer(named, trust_remote_code=args.trust_remote_code)
        loaded = load_causal_lm(
            model, quantization_config=quantization_config, init_kwargs=self.policy_kwargs, is_trainable=True
        )
        self.starts_from_adapter = isinstance(loaded, PeftModel)
        self.policy = self._with_adapter(loaded)
        self.shared = SharedBase(self.policy) if isinstance(self.policy, PeftModel) else None
        require_eos(self.tokenizer, "processing_class")
        check_pad_token(self.tokenizer, self.policy)
        if self.tokenizer.pad_token_id is None:  # any token will do, because masks are made from lengths
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def _with_adapter(self, policy: PreTrainedModel | PeftModel) -> PreTrainedModel | PeftModel:
        quantised, plugin = getattr(policy, "is_quantized", False), self.args.deepspeed_plugin
        if self.starts_from_adapter and self.peft_config is not None:
            warnings.warn("The model is an adapter already, which trains on: peft_config is ignored.", stacklevel=4)
        elif quantised and not self.starts_from_adapter and self.peft_config is None:
            raise ValueError("A quantised model can't train by itself: pass a peft_config (--use_peft).")
        if self.starts_from_adapter or self.peft_config is None:
            return policy
        sharded = plugin is not None and plugin.zero_stage == 3 and not quantised
        # ZeRO-3 gathers parameters of one dtype together, so the adapters must have the dtype of the base.
        config = copy.deepcopy(self.peft_config)
        config.task_type = config.task_type or "CAUSAL_LM"  # what AutoPeftModelForCausalLM reads
        return get_peft_model(policy, config, adapter_name="policy", autocast_adapter_dtype=not sharded)

    def reference(self, ref_model=None) -> dict:
        """Return the arguments `reference` and `reference_role` of [`PolicyAndReference`].

        Without a `ref_model` the reference is the policy at the start: with PEFT the base with its adapters off, or a
        frozen copy of the adapter that the policy starts from; else a frozen copy, or the checkpoint loaded again.

        Args:
            ref_model: a name or an object, or None.

        Raises:
            ValueError: `ref_model` is the policy itself, or ZeRO-3 has sharded the model that would be copied.
        """
        if ref_model is not None and ref_model is self.model and not isinstance(ref_model, str):
            raise ValueError("ref_model is the model that trains, and would be frozen with it: leave ref_model out.")
        if ref_model is not None:
            return {"reference": load_causal_lm(ref_model, init_kwargs=self.init_kwargs).eval()}
        moves = getattr(self.args, "rounds", 1) > 1  # a reference that moves needs weights of its own
        if self.starts_from_adapter or (moves and self.shared is not None):
            self.shared.copy_role("reference", self.shared.policy)
            return {"reference_role": "reference"}
        if self.shared is not None:
            return {"reference_role": "base"}
        if isinstance(self.model, str):
            return {"reference": load_causal_lm(self.model, init_kwargs=self.policy_kwargs).eval()}
        return {"reference": frozen_copy(self.policy)}


class PolicyTrainerMixin(PolicyCheckpointMixin, LifecycleTrainerMixin):
    """Put this before `transformers.Trainer` in the bases of a trainer whose model is a [`PolicyAndReference`]."""

    def check_engine(self) -> None:
        """Check that the trainer supports the engine of this run.

        Raises:
            ValueError: it is FSDP1, or DataParallel over several GPUs of one process.
        """
        name = type(self).__name__
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.fsdp_version != 2:
            raise ValueError(f"{name} runs on FSDP2, not FSDP1: set fsdp_version: 2 (accelerate_configs/fsdp2.yaml).")
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{name} does not support DataParallel, but one process sees {self.args.n_gpu} GPUs: start it with "
                "`accelerate launch`, or set CUDA_VISIBLE_DEVICES=0."
            )
