"""Sample completions from the policy of a trainer, whatever engine holds its weights."""

from contextlib import contextmanager, nullcontext

import torch
from trl.models.utils import add_hooks, remove_hooks
from trl.trainer.utils import print_prompt_completions_sample

from lifecycle_hf.completions.rewards import Samples
from lifecycle_hf.completions.sampling import VLLMSampler, generate
from lifecycle_hf.models.adapters.limits import can_merge
from lifecycle_hf.models.loading import is_sharded, unsharded
from lifecycle_hf.models.roles import role_weights
from lifecycle_hf.trainers.base.policy import PolicyAndReference

EXACT = (torch.float32, torch.float64)
RESERVED = ("prompt", "prompt_ids", "prompts", "completions")


class PolicySampler:
    """Sample completions from the policy of a trainer.

    Args:
        trainer: its model is a [`PolicyAndReference`]; its `args` have the options of sampling of [`PPOConfig`].
        stop_token_ids: tokens that end a completion.
    """

    def __init__(self, trainer, stop_token_ids: list[int]):
        self.trainer, self.args, self.accelerator = trainer, trainer.args, trainer.accelerator
        self.tokenizer, self.stop_token_ids, self.vllm = trainer.processing_class, stop_token_ids, None
        models = self.accelerator.unwrap_model(trainer.model)
        self.mergeable = models.shared is not None and can_merge(models.policy)
        if models.shared is not None and not self.mergeable and (self.args.merge_adapter or self.args.use_vllm):
            option = "use_vllm" if self.args.use_vllm else "merge_adapter"
            kind = models.policy.active_peft_config.peft_type.value
            raise ValueError(
                f"{option} needs an adapter that can be merged, and {kind} can't: leave {option} out, or train LoRA."
            )
        if self.args.use_vllm:
            check_vllm(models, trainer.is_fsdp_enabled)
            self.vllm = VLLMSampler(self.accelerator, self.args.vllm_server_base_url, self.args.vllm_server_timeout)

    def sample(
        self, rows: list[dict], n: int = 1, seed: int | None = None, *, reference: bool = False
    ) -> tuple[Samples, list[list[int]]]:
        """Return `n` completions in a row for each row, as texts with the row's other columns, and as tokens.

        Args:
            rows: dicts with "prompt" and "prompt_ids".
            seed: seed of this call, which then leaves torch's random state unchanged.
            reference: sample from the reference instead of the policy.
        """
        args, prompts = self.args, [row["prompt_ids"] for row in rows]
        options = {"max_new_tokens": args.max_completion_length, "temperature": args.temperature}
        options |= {"stop_token_ids": self.stop_token_ids, "generator_seed": seed, "num_generations": n}
        with self._whole_model(reference) as policy, self.accelerator.autocast():
            if self.vllm is not None:
                ids = self.vllm(_untied(role_weights(policy)), prompts, **options)
            else:
                pad, size = self.tokenizer.pad_token_id, args.generation_batch_size
                ids = generate(policy, prompts, **options, pad_token_id=pad, batch_size=size)
        rows = [row for row in rows for _ in range(n)]
        columns = {name: [row[name] for row in rows] for name in rows[0] if name not in RESERVED}
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return Samples([row["prompt"] for row in rows], texts, columns), ids

    def ended(self, completion_ids: list[list[int]]) -> torch.Tensor:
        """Return whether each completion has its stop token, [N]."""
        return torch.tensor([ids[-1] in self.stop_token_ids for ids in completion_ids])

    @contextmanager
    def _whole_model(self, reference: bool):
        """Yield the policy or the reference. If it is sharded, it is gathered once for the whole decoding."""
        engine = self.trainer.model_wrapped
        models = self.accelerator.unwrap_model(engine)
        policy = models.reference if reference and models.reference is not None else models.policy
        role = (reference and models.reference_role) or models.policy_role
        with models.role(role), unsharded(models):
            sharded = [p for p in policy.parameters() if hasattr(p, "ds_id")]
            if not sharded:
                with models.shared.merged() if role != "base" and self._merges(models) else nullcontext():
                    yield policy
                return
            from deepspeed.runtime.zero import GatheredParameters

            with GatheredParameters(sharded):
                remove_hooks(engine)
                try:
                    yield policy
                finally:
                    add_hooks(engine)

    def _merges(self, models: PolicyAndReference) -> bool:
        """Return whether decoding runs on merged weights; in low precision merging would round small changes away."""
        if not self.mergeable or self.args.merge_adapter is False or self.trainer.is_fsdp_enabled:
            return False
        exact = next(models.policy.parameters()).dtype in EXACT
        return bool(self.args.merge_adapter) or self.vllm is not None or exact


def check_vllm(model: PolicyAndReference, fsdp: bool) -> None:
    """Check that the vLLM server can get whole weights with the adapter merged in.

    Raises:
        ValueError: the policy is quantised or sharded, or its adapter has weights that merging leaves out.
    """
    config = model.policy.active_peft_config if model.shared is not None else None
    beside = [name for name in ("modules_to_save", "trainable_token_indices") if getattr(config, name, None)]
    sharded = model.shared is not None and is_sharded(model.policy)
    if getattr(model.policy, "is_quantized", False) or sharded or beside or fsdp:
        raise ValueError(
            "use_vllm needs weights that can be sent whole: no quantised policy, no FSDP, no adapters under ZeRO-3, "
            f"none with {' or '.join(beside) or 'modules_to_save'}, which merging leaves out. Use DDP or ZeRO-2 and "
            "plain adapters, or leave use_vllm out."
        )


def _untied(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return every tensor once, under the first of its names."""
    names = {id(tensor): name for name, tensor in reversed(weights.items())}
    return {name: tensor for name, tensor in weights.items() if names[id(tensor)] == name}


def show_samples(trainer, samples: Samples, columns: dict[str, torch.Tensor], steps: int = 1) -> None:
    """Print a table of completions and their scores on the main process, once in `logging_steps` optimizer steps.

    Args:
        steps: optimizer steps between two calls.
    """
    state, n = trainer.state, trainer.args.num_completions_to_print
    every = max(1, round(state.logging_steps or 1) // steps)
    if trainer.accelerator.is_main_process and (state.global_step // steps) % every == 0:
        shown = {name: values[:n].tolist() for name, values in columns.items()}
        print_prompt_completions_sample(samples.prompts[:n], samples.completions[:n], shown, None, state.global_step)
