"""What recipes share: their arguments, and what happens before and after training."""

from lifecycle_hf.cli.arguments import (
    MeasuredArguments,
    PolicyArguments,
    ProtectedArguments,
    RecipeArguments,
    load_ptx,
    load_splits,
    load_texts,
    model_init_kwargs,
    resolve_model,
    resolve_reward,
    trainer_inputs,
)
from lifecycle_hf.cli.constituting import ConstitutionArguments, constitute
from lifecycle_hf.cli.curating import CurationArguments, curate_and_report
from lifecycle_hf.cli.instructing import InstructArguments, instruct
from lifecycle_hf.cli.parsing import parse
from lifecycle_hf.cli.running import (
    finish,
    monitor_preferences,
    monitor_tax,
    resume_point,
    train_and_report,
    train_policy,
)
from lifecycle_hf.cli.sampling import BestOfNArguments, sample_and_train
from lifecycle_hf.cli.writing import WriterArguments, load_tasks, load_writer, tell_written
from lifecycle_hf.data.loading import first_rows
from lifecycle_hf.evaluation.report import write_report
