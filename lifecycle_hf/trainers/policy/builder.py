"""Build the module that PPO runs from names, paths, models and callables, and check them before training."""

import copy
from pathlib import Path

from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import load_peft_weights
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from lifecycle_hf.completions.rewards import CallableReward
from lifecycle_hf.completions.scorer import RewardSource, as_list, is_callable, model_name, unique_name
from lifecycle_hf.completions.scoring import unwrapped
from lifecycle_hf.models.heads import RewardModel
from lifecycle_hf.models.loading import (
    disable_dropout,
    is_adapter,
    is_sharded,
    load_classifier,
    load_reward_model,
    load_tokenizer,
    read_adapter_notes,
    whole,
)
from lifecycle_hf.models.roles import SharedBase, load_adapter_weights, role_weights
from lifecycle_hf.trainers.base.policy import PolicyBuilder
from lifecycle_hf.trainers.policy.actor_critic import VALUE_HEAD, ActorCritic, SharedReward

VALUE_IS = {"head": "a head on the reference's states", "adapter": "an adapter on the policy's base"}
ROLES = ("base", "policy", "value", "reference", "default")


class ActorCriticBuilder(PolicyBuilder):
    """Turn the arguments of [`PPOTrainer`] into the module that PPO runs.

    Attributes:
        rewards: the reward functions, in the order of `reward_funcs`.
        reward_models: the reward models among them by name; they become part of the module.
    """

    def build(self, reward_funcs, reward_processing_classes=None, value_model=None, ref_model=None) -> ActorCritic:
        """Return the module, with dropout off if `disable_dropout` is set, and set `rewards`."""
        self.rewards: list[RewardSource] = []
        self.reward_models: dict[str, nn.Module] = {}
        self._add_rewards(reward_funcs, reward_processing_classes)
        kind, roles = self._value_kind(), {"shared": self.shared}
        if ref_model is not None or self.args.needs_reference:
            roles |= self.reference(ref_model)
        separate = self._value_model(value_model) if kind == "model" else None
        if kind == "adapter":
            self._add_value_role()
        models = {"value_model": separate, "rewards": self.reward_models}
        actor_critic = ActorCritic(self.policy, value=kind, **models, **roles)
        if actor_critic.value_head is not None:
            self._start_value_head(actor_critic, value_model)
        if self.args.disable_dropout:
            disable_dropout(actor_critic)
        return actor_critic

    def _value_kind(self) -> str | None:
        """Return the kind of value function: what `value` says, else an adapter with PEFT, or a model without."""
        if self.args.advantage_estimator != "gae":
            return None
        if self.args.value == "adapter" and self.shared is None:
            raise ValueError(
                "value='adapter' needs a base that policy and value function share: pass a peft_config (--use_peft), "
                "or choose value='head' or value='model'."
            )
        return self.args.value or ("model" if self.shared is None else "adapter")

    def _add_rewards(self, reward_funcs, processing_classes) -> None:
        funcs = as_list(reward_funcs)
        classes = processing_classes if isinstance(processing_classes, list | tuple) else [processing_classes]
        classes = [None] * len(funcs) if list(classes) == [None] else list(classes)
        for option, values in (("reward_processing_classes", classes), ("reward_weights", self.args.reward_weights)):
            if values is not None and len(values) != len(funcs):
                raise ValueError(f"{option} has {len(values)} entries for {len(funcs)} reward_funcs: give one each.")
        for func, tokenizer in zip(funcs, classes, strict=True):
            taken = [source.name for source in self.rewards]
            if is_callable(func):
                function = CallableReward(func, self.args.reward_timeout, self.args.reward_retries)
                self.rewards.append(RewardSource(unique_name(function.name, taken), function=function))
            else:
                name = unique_name(model_name(func), taken, ROLES)
                self.reward_models[name], tokenizer = self._reward_model(func, tokenizer, name)
                self.rewards.append(RewardSource(name, tokenizer=tokenizer))

    def _reward_model(self, func, tokenizer, name: str) -> tuple[nn.Module, PreTrainedTokenizerBase]:
        if isinstance(func, str) and self.shared is not None and _same_base(func, self.shared):
            tokenizer = tokenizer or load_tokenizer(func, trust_remote_code=self.args.trust_remote_code)
            return _shared_reward(func, self.shared, name), tokenizer
        if not isinstance(func, str) and tokenizer is None and not hasattr(func, "score_states"):
            rows, ours = func.config.get_text_config().vocab_size, len(self.tokenizer)
            if rows < ours or func.config._name_or_path not in ("", self.name):
                raise ValueError(
                    f"The reward model {func.config._name_or_path!r} (vocabulary of {rows}) was made for another "
                    f"tokenizer than the policy's ({ours} tokens): pass its own in reward_processing_classes."
                )
            tokenizer = self.tokenizer
        model = load_reward_model(func, tokenizer, init_kwargs=self.init_kwargs)
        return model, model.tokenizer

    def _trained_rewards(self) -> dict[str, nn.Module]:
        """Return the reward models that are trained on, by name; a value function starts from none of weight 0."""
        weights = self.args.reward_weights or [1.0] * len(self.rewards)
        weighted = {source.name for source, weight in zip(self.rewards, weights, strict=True) if weight != 0}
        return {name: model for name, model in self.reward_models.items() if name in weighted}

    def _value_model(self, value_model) -> PreTrainedModel:
        """Return the given model, else a copy of a reward model of the same vocabulary, else one with a zero head."""
        if isinstance(value_model, str):
            return load_classifier(value_model, init_kwargs=self.init_kwargs)
        if value_model is not None:
            if getattr(value_model.config, "num_labels", None) != 1 or not hasattr(value_model, "score"):
                raise ValueError("value_model must be an AutoModelForSequenceClassification with num_labels=1.")
            return value_model
        for reward in self._trained_rewards().values():
            plain = isinstance(reward, RewardModel) and not isinstance(reward.model, PeftModel)
            if plain and reward.tokenizer.get_vocab() == self.tokenizer.get_vocab():
                if is_sharded(reward.model):
                    return load_classifier(reward.config._name_or_path, init_kwargs=self.init_kwargs)
                return copy.deepcopy(reward.model).requires_grad_(True)
        value = self._classifier_from_policy()
        with whole(value.score.weight, writing=True):
            value.score.weight.data.zero_()
        return value

    def _classifier_from_policy(self) -> PreTrainedModel:
        """Return a sequence classifier with one label and the policy's initial weights."""
        if isinstance(self.model, str) and is_adapter(self.model):
            base = PeftConfig.from_pretrained(self.model).base_model_name_or_path
            return load_classifier(base, init_kwargs=self.init_kwargs)
        if isinstance(self.model, str):
            return load_classifier(self.model, init_kwargs=self.policy_kwargs)
        config = copy.deepcopy(self.policy.config)
        config.num_labels = 1
        value = AutoModelForSequenceClassification.from_config(config, dtype=unwrapped(self.policy).dtype)
        prefix = f"{unwrapped(self.policy).base_model_prefix}."
        weights = {name.removeprefix(prefix): w for name, w in role_weights(self.policy).items()}
        value.base_model.load_state_dict({name: weights[name] for name in value.base_model.state_dict()})
        return value

    def _add_value_role(self) -> None:
        """Add a value adapter: a copy of the first reward adapter on the same base, else a new one."""
        shared, configs = self.shared, self.shared.model.peft_config
        rewards = self._trained_rewards().items()
        role = next((name for name, reward in rewards if isinstance(reward, SharedReward)), None)
        fresh = self.peft_config or configs[shared.policy]
        shared.add_role("value", configs[role] if role else fresh, trainable=True)
        if role is not None:
            state = get_peft_model_state_dict(shared.model, adapter_name=role, save_embedding_layers=False)
            load_adapter_weights(shared.model, "value", {k: v.clone() for k, v in state.items()}, role)

    def _start_value_head(self, actor_critic: ActorCritic, value_model) -> None:
        if value_model is not None:
            if not isinstance(value_model, str) or not (Path(value_model) / VALUE_HEAD).exists():
                raise ValueError(
                    f"value_model={value_model!r}: the value function is {VALUE_IS[actor_critic.value]}; give the "
                    "`value` folder of a PPO checkpoint, leave value_model out, or choose value='model'."
                )
            actor_critic.load_value(value_model)
            return
        reward = next((r for r in self._trained_rewards().values() if isinstance(r, SharedReward)), None)
        if actor_critic.value == "adapter" and reward is not None:
            actor_critic.value_head.linear.weight.data.copy_(reward.weight.data)
            actor_critic.value_head.linear.bias.data.fill_(-reward.center)


def _same_base(adapter: str, shared: SharedBase) -> bool:
    """Return whether a reward adapter was trained on the policy's base model, with the same quantisation."""
    if not is_adapter(adapter):
        return False
    theirs = PeftConfig.from_pretrained(adapter).base_model_name_or_path
    ours = shared.model.peft_config[shared.policy].base_model_name_or_path
    if not theirs or not ours or (theirs != ours and Path(theirs).resolve() != Path(ours).resolve()):
        return False
    quantised = getattr(shared.model.get_base_model(), "is_quantized", False)
    return quantised == ("quantization_config" in read_adapter_notes(adapter))


def _shared_reward(path: str, shared: SharedBase, role: str) -> SharedReward:
    """Load a reward model's adapter as a frozen role of the shared base, and return its score head."""
    weights = load_peft_weights(path, device="cpu")
    heads = [key for key in weights if key.endswith("score.weight")]
    if len(heads) != 1:
        raise ValueError(
            f"The reward adapter {path} has {len(heads)} score heads, not 1: train it with RewardTrainer."
        )
    head = weights.pop(heads[0])
    shared.add_role(role, PeftConfig.from_pretrained(path), trainable=False)
    load_adapter_weights(shared.model, role, weights, path)
    return SharedReward(head, read_adapter_notes(path).get("reward_center", 0.0))
