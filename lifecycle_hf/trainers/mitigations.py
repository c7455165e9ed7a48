"""What makes any trainer pay less alignment tax."""

from accelerate.utils import extract_model_from_parallel
from transformers import TrainerCallback

from lifecycle_hf.alignment_tax.projection import OrthogonalProjection


class ProjectionCallback(TrainerCallback):
    """Runs an [`OrthogonalProjection`] in a `transformers.Trainer`: `ProjectionCallback(loss, k=4).attach(trainer)`.

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
        """Adds this callback to `trainer`, before it trains.

        Raises:
            ValueError: an option is out of range, or the trainer runs on DeepSpeed, or its policy is but a part of
                what FSDP2 shards.
        """
        policy = getattr(trainer.model, "policy", trainer.model)
        if trainer.is_deepspeed_enabled:
            raise ValueError("ProjectionCallback does not run on DeepSpeed: use DDP or FSDP2.")
        if trainer.is_fsdp_enabled and policy is not trainer.model:
            raise ValueError(
                f"ProjectionCallback: the policy is a part of {type(trainer.model).__name__}, and FSDP2 runs only the "
                "whole: use DDP."
            )

        def loss(model):
            with trainer.accelerator.autocast():
                return self.capability_loss(model)

        self.projection, self._trainer = OrthogonalProjection(policy, loss, **self.options), trainer
        if hasattr(trainer, "stateful"):
            # FSDP2's processes hold different pieces.
            home = trainer.stateful_per_rank if trainer.is_fsdp_enabled else trainer.stateful
            home["projection"] = self.projection
        trainer.add_callback(self)
        return self

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if self.projection is None:
            raise ValueError("ProjectionCallback is not attached: call .attach(trainer) in place of callbacks=[...].")
        whole = extract_model_from_parallel(model)
        self.projection.model = getattr(whole, "policy", whole)
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
