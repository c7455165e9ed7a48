"""A policy and its reference as one module, and what the trainers of such a module share."""

import copy
import warnings
from contextlib import nullcontext
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lifecycle_hf.data.tokenize import require_eos
from lifecycle_hf.models.loading import check_pad_token, load_causal_lm, load_tokenizer, save_adapter_notes
from lifecycle_hf.models.shared_base import SharedBase
from lifecycle_hf.scoring import Completions, completion_logprobs
from lifecycle_hf.trainers.base import LifecycleTrainerMixin

SHAPE = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings",
)  # fmt: skip
"""What of a config must agree for a checkpoint to be of the same model."""


class PolicyAndReference(nn.Module):
    """The model that trains and what it is compared with, as one module, so that one engine (DDP, ZeRO) holds both.

    Args:
        policy: causal LM that trains, or a PeftModel over one.
        reference: frozen causal LM, or None where `reference_role` names an adapter of the shared base, "base" for
            the base with adapters off, or where there is no reference.
        shared: the roles of the policy's PeftModel.
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
        self.shared = shared
        self.reference_role = reference_role

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
        """Modules of their own that never train."""
        return [] if self.reference is None else [self.reference]

    def train(self, mode: bool = True):
        """As in torch; what is frozen stays in eval mode."""
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    @property
    def _no_split_modules(self) -> list[str]:
        """The layers that FSDP shards one by one, by the names of their classes."""
        models = [m for m in self.modules() if isinstance(m, PreTrainedModel)]
        return sorted({name for model in models for name in model._no_split_modules or ()})

    def tie_weights(self) -> None:
        """Ties what the models tie; FSDP asks for it after it has moved them."""
        for model in [m for m in self.modules() if isinstance(m, PreTrainedModel)]:
            model.tie_weights()

    @property
    def checkpointed(self) -> list[nn.Module]:
        """The models that gradient checkpointing is for."""
        return [self.policy]

    def activation_checkpointing_enable(self, **kwargs):
        """Checkpoints what trains; roles on a shared base are recomputed under the right adapter."""
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
        """Computes what `want` names.

        "logprobs", "entropy", "ref_logprobs": [B, T], at `temperature`; "entropy_gradient" gives the entropies one.
        "ref_states": the hidden states [B, T + 1, H] that "ref_logprobs" are read from. "prompt_logprobs": [B], see
        [`completion_logprobs`]. "texts": log-probs of `texts` [B', T'] at temperature 1.
        """
        out = {}
        if "ref_logprobs" in want:  # before the policy, whose activations are kept from its forward on
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
        """The weights of one submodule out of those of the whole, where these are given."""
        prefix = f"{name}."
        if state_dict is None:
            return None
        return {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}

    def save_pretrained(self, folder: str, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Writes the policy as an ordinary checkpoint (or adapter).

        Args:
            state_dict: weights of this whole module, where they are sharded over processes.
        """
        if self.shared is None:
            self.policy.save_pretrained(folder, state_dict=self.part("policy", state_dict))
            return
        self.shared.save_adapter(self.shared.policy, folder, self.part("policy", state_dict))
        save_adapter_notes(self.policy, folder)

    def load_pretrained(self, folder: str) -> None:
        """Reads back what [`save_pretrained`] wrote.

        Raises:
            ValueError: if the checkpoint belongs to another model, naming both.
        """
        if self.shared is not None:
            self.shared.load_adapter(self.shared.policy, folder)
        else:
            load_weights(self.policy, folder)


def load_weights(model: PreTrainedModel, folder: str | Path) -> None:
    """Reads the weights of a checkpoint into a model that stands already.

    Raises:
        ValueError: if the checkpoint belongs to another model, naming what differs.
    """
    theirs = type(model.config).from_pretrained(folder)
    for name in SHAPE:
        here, there = getattr(model.config, name, None), getattr(theirs, name, None)
        if here != there:
            raise ValueError(
                f"The checkpoint {folder} belongs to another base model: its {name} is {there!r}, the model here has "
                f"{here!r}."
            )
    model.load_state_dict(type(model).from_pretrained(folder, dtype=model.dtype).state_dict())


class PolicyBuilder:
    """Names, paths and models to the policy that trains.

    Args:
        args: options with `trust_remote_code` and those of `transformers.TrainingArguments`.
        quantization_config, init_kwargs: how the policy is loaded.
    """

    def __init__(self, args, quantization_config=None, init_kwargs: dict | None = None):
        self.args, self.quantization_config = args, quantization_config
        self.policy_kwargs = {**(init_kwargs or {}), "trust_remote_code": args.trust_remote_code}
        # A revision names a commit of the policy's repository and of no other.
        self.init_kwargs = {name: value for name, value in self.policy_kwargs.items() if name != "revision"}

    def policy(
        self, model, peft_config: PeftConfig | None, processing_class=None
    ) -> tuple[PreTrainedModel | PeftModel, bool, PreTrainedTokenizerBase]:
        """The policy, whether it starts from an adapter that was trained before, and its tokenizer."""
        if processing_class is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            processing_class = load_tokenizer(name, trust_remote_code=self.args.trust_remote_code)
        policy, trained = self._load(model, peft_config)
        require_eos(processing_class, "processing_class")
        check_pad_token(processing_class, policy)
        if processing_class.pad_token_id is None:  # any token will do: masks come from lengths
            processing_class.pad_token = processing_class.eos_token
        return policy, trained, processing_class

    def _load(self, model, peft_config: PeftConfig | None) -> tuple[PreTrainedModel | PeftModel, bool]:
        policy = load_causal_lm(
            model, quantization_config=self.quantization_config, init_kwargs=self.policy_kwargs, is_trainable=True
        )
        if isinstance(policy, PeftModel):
            if peft_config is not None:
                warnings.warn(
                    "The model is an adapter already and trains on as it is: peft_config does not shape it.",
                    stacklevel=5,
                )
            return policy, True
        if peft_config is None:
            if getattr(policy, "is_quantized", False):
                raise ValueError("A quantised model can't train by itself: pass a peft_config (--use_peft).")
            return policy, False
        plugin = self.args.deepspeed_plugin
        sharded = plugin is not None and plugin.zero_stage == 3 and not getattr(policy, "is_quantized", False)
        # ZeRO-3 gathers parameters of one dtype together, so the adapters must have the base's.
        config = copy.deepcopy(peft_config)
        config.task_type = config.task_type or "CAUSAL_LM"  # what AutoPeftModelForCausalLM reads
        return get_peft_model(policy, config, adapter_name="policy", autocast_adapter_dtype=not sharded), False


class PolicyTrainerMixin(LifecycleTrainerMixin):
    """Checkpoints of a trainer whose model is a [`PolicyAndReference`]: the policy stands at their root."""

    def check_engine(self) -> None:
        """Raises a ValueError under an engine that these trainers do not run on."""
        name = type(self).__name__
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.fsdp_version != 2:
            raise ValueError(f"{name} runs on FSDP2, not FSDP1: set fsdp_version: 2 (accelerate_configs/fsdp2.yaml).")
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{name} sees {self.args.n_gpu} GPUs in one process, which would mean DataParallel: start it with "
                "`accelerate launch`, or show it one GPU (CUDA_VISIBLE_DEVICES=0)."
            )

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The policy as an ordinary checkpoint, and the tokenizer."""
        if not self.args.should_save:
            return
        folder = output_dir if output_dir is not None else self.args.output_dir
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.accelerator.unwrap_model(self.model).save_pretrained(folder, state_dict)
        self.processing_class.save_pretrained(folder)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        self.accelerator.unwrap_model(self.model).load_pretrained(resume_from_checkpoint)
