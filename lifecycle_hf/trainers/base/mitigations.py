"""Mitigations of the alignment tax, set up in any trainer by its options."""

import warnings
from dataclasses import fields

from datasets import Dataset
from transformers import TrainerCallback

from lifecycle_hf.mitigation.ewc import EWC
from lifecycle_hf.mitigation.projection import OrthogonalProjection
from lifecycle_hf.mitigation.trade_off import LagrangeMultiplier
from lifecycle_hf.trainers.base.auxiliary import active_policy
from lifecycle_hf.trainers.base.capability import CapabilityLoss
from lifecycle_hf.trainers.base.options import MitigationOptions

NEEDS_TEXTS = ("ptx_coef", "ptx_ceiling", "ewc_coef", "projection")
SERVES = {"ptx_rate": "ptx_ceiling", "ewc": "ewc_coef", "ewc_rows": "ewc_coef"}
"""Options that do nothing without another, as those of the projection do without `projection`."""
SEEDS = {"ptx": 0, "ewc": 1, "projection": 2}
"""Added to the run's, so that each has texts in an order of its own."""


def mitigations_in_force(args) -> dict[str, object]:
    """Return {option: value} of the [`MitigationOptions`] in `args` that were changed and have an effect."""
    options = fields(MitigationOptions) if isinstance(args, MitigationOptions) else ()
    changed = {item.name: getattr(args, item.name) for item in options if getattr(args, item.name) != item.default}
    readers = _readers(changed)
    acts = {"ptx_max_length": readers, "ptx_batch_size": [name for name in readers if name != "ewc_coef"]}
    return {name: value for name, value in changed.items() if acts.get(name, True)}


def _readers(changed: dict[str, object]) -> list[str]:
    """The options that read texts, among those that are not at their defaults."""
    return [name for name in NEEDS_TEXTS if name in changed and not (name == "ewc_coef" and "ewc" in changed)]


def check_mitigations(args: MitigationOptions, dataset: Dataset | None) -> None:
    """Check the options before anything is computed, and that those that need texts have them.

    Raises:
        ValueError: naming the option, its value and what to do.
    """
    changed = mitigations_in_force(args)
    for name, value in changed.items():
        served = "projection" if name.startswith("projection_") else SERVES.get(name, name)
        if served not in changed:
            raise ValueError(
                f"{name}={value!r} does nothing while {served} is {getattr(args, served)}: set {served}, or leave "
                f"{name} out."
            )
    if {"ewc", "ewc_rows"} <= changed.keys():
        raise ValueError(
            f"ewc_rows={args.ewc_rows} does nothing beside ewc={args.ewc!r}, whose Fisher is known: leave one out."
        )
    wanted = _readers(changed)
    if wanted and dataset is None:
        raise ValueError(
            f"{wanted[0]}={getattr(args, wanted[0])} is set, but ptx_dataset is not: give the texts to protect, or "
            f"leave {wanted[0]} out."
        )
    if dataset is not None and not wanted:
        warnings.warn(
            "ptx_dataset is given, but ptx_coef is 0 and nothing else reads it: no pretraining is mixed in.",
            stacklevel=3,
        )


def protect(trainer, dataset: Dataset | None, *, mixes: bool = False, capability=CapabilityLoss) -> None:
    """Set up what the trainer's [`MitigationOptions`] ask for.

    Args:
        dataset: text, chat or prompt-completion rows of what the model should go on knowing.
        mixes: whether the trainer mixes a plain `ptx_coef` into its loss itself.
        capability: makes the loss on these rows, from the arguments of [`CapabilityLoss`].
    """
    args = trainer.args
    check_mitigations(args, dataset)

    def texts(use: str, batch_size: int | None, **options) -> CapabilityLoss:
        options |= {"batch_size": batch_size or args.per_device_train_batch_size, "max_length": args.ptx_max_length}
        options |= {"where": "ptx_dataset", "strict": getattr(args, "strict_data", False)}
        return capability(dataset, trainer.processing_class, seed=args.seed + SEEDS[use], **options)

    if args.ptx_ceiling is not None:
        weight = LagrangeMultiplier(args.ptx_ceiling, rate=args.ptx_rate, initial=args.ptx_coef)
        trainer.add_auxiliary_loss("ptx", texts("ptx", args.ptx_batch_size), weight)
    elif args.ptx_coef > 0 and not mixes:
        trainer.add_auxiliary_loss("ptx", texts("ptx", args.ptx_batch_size), args.ptx_coef)
    if args.ewc_coef > 0:
        trainer.check_auxiliary("ewc", reads_weights=True)
        policy = active_policy(trainer.model)
        if args.ewc is not None:
            ewc = EWC.load(args.ewc, policy, device=args.device)
        else:
            rows = texts("ewc", 1, reduction="sum")
            ewc = EWC.estimate(policy, (rows(policy) for _ in range(args.ewc_rows)))
        trainer.add_auxiliary_loss("ewc", ewc, args.ewc_coef)
    if args.projection is not None:
        options = {name: getattr(args, f"projection_{name}") for name in ("k", "batches", "every", "when", "scope",
                                                                            "refresh")}  # fmt: skip
        loss = texts("projection", args.ptx_batch_size)
        ProjectionCallback(loss, level=args.projection, **options).attach(trainer)


class ProjectionCallback(TrainerCallback):
    """Run an [`OrthogonalProjection`] in a `transformers.Trainer`: `ProjectionCallback(loss, k=4).attach(trainer)`.

    Args:
        capability_loss: `f(policy) -> scalar`, in the trainer's autocast. Of a model that wraps a `policy` it gets
            that, and the value function keeps its gradients.
        options: those of `OrthogonalProjection`.

    Logs `projection/cosine`, `projection/removed` and `projection/loss`, which a trainer of this library averages over
    the steps between two log lines; any other trainer logs the last. The directions are in the checkpoints of the
    library's trainers; elsewhere a resumed run starts with new ones.

    Attributes: `projection`, once attached.
    """

    def __init__(self, capability_loss, **options):
        self.capability_loss, self.options = capability_loss, options
        self.projection, self._trainer = None, None

    def attach(self, trainer) -> "ProjectionCallback":
        """Add this callback to `trainer`, before it trains.

        Raises:
            ValueError: an option is out of range, or the trainer runs on DeepSpeed, or its policy is but a part of
                what FSDP2 shards.
        """
        policy = active_policy(trainer.model)
        if trainer.is_deepspeed_enabled:
            raise ValueError("ProjectionCallback does not run on DeepSpeed: use DDP or FSDP2.")
        if trainer.is_fsdp_enabled and policy is not trainer.model:
            raise ValueError(
                f"ProjectionCallback: the policy is a part of {type(trainer.model).__name__}, and FSDP2 runs only the "
                "whole: use DDP."
            )

        def loss(model):
            active_policy(trainer.model)
            with trainer.accelerator.autocast():
                return self.capability_loss(model)

        self.projection, self._trainer = OrthogonalProjection(policy, loss, **self.options), trainer
        if hasattr(trainer, "stateful"):
            # FSDP2's processes hold different pieces.
            home = trainer.stateful_per_rank if trainer.is_fsdp_enabled else trainer.stateful
            home["projection"] = self.projection
            if isinstance(self.capability_loss, CapabilityLoss):
                trainer.stateful["projection_texts"] = self.capability_loss
        trainer.add_callback(self)
        return self

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if self.projection is None:
            raise ValueError("ProjectionCallback is not attached: call .attach(trainer) in place of callbacks=[...].")
        self.projection.model = active_policy(model)
        self.projection.attach(optimizer)

    def on_optimizer_step(self, args, state, control, **kwargs):
        if hasattr(self._trainer, "metrics"):
            for name, value in self._values().items():
                self._trainer.metrics["train"].add(name, value)

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_log and not hasattr(self._trainer, "metrics"):
            due = control.should_log, control.should_evaluate  # which the line would turn off
            self._trainer.log(self._values())
            control.should_log, control.should_evaluate = due

    def on_train_end(self, args, state, control, **kwargs):
        self.projection.detach()

    def _values(self):
        values = self.projection.metrics().items()
        return {f"projection/{name}": value for name, value in values if value == value}
