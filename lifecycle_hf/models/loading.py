"""Load models and tokenizers by name or path, with adapters and quantisation, in the same way for all trainers."""

import copy
import re
import tempfile
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import torch
from accelerate import PartialState
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils import find_adapter_config_file
from trl.trainer.reward_trainer import suppress_seqcls_warning

from lifecycle_hf.models.adapters.embeddings import embedding_rows, merge_and_untie
from lifecycle_hf.models.adapters.notes import labels_of, read_adapter_notes, save_adapter_notes
from lifecycle_hf.models.heads import RewardModel

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_AUTO = {
    "CAUSAL_LM": AutoModelForCausalLM,
    "QUESTION_ANS": AutoModelForQuestionAnswering,
    "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
    "SEQ_CLS": AutoModelForSequenceClassification,
}
_KINDS = {
    "CAUSAL_LM": "language model",
    "QUESTION_ANS": "question-answering model",
    "SEQ_2_SEQ_LM": "encoder-decoder model",
    "SEQ_CLS": "reward model",
}
_PAD_NAME = re.compile(r"(?<![a-z])pad(?![a-z])", re.IGNORECASE)
_SPARE_NAME = re.compile(r"reserved|unused|extra_id", re.IGNORECASE)
_OTHER_MODALITY = re.compile(r"image|vision|video|audio", re.IGNORECASE)


def load_tokenizer(
    name_or_tokenizer: str | PreTrainedTokenizerBase, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint; an adapter without a tokenizer has that of its base model.

    A tokenizer object is returned unchanged. The truncation of the last call before a tokenizer was saved is left out.
    """
    if not isinstance(name_or_tokenizer, str):
        return name_or_tokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_tokenizer, trust_remote_code=trust_remote_code)
    except (OSError, ValueError):
        if not is_adapter(name_or_tokenizer):
            raise
        base = PeftConfig.from_pretrained(name_or_tokenizer).base_model_name_or_path
        return load_tokenizer(base, trust_remote_code)
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()
    return tokenizer


def is_adapter(name: str) -> bool:
    """Return whether a path or Hub name is a PEFT adapter."""
    return find_adapter_config_file(name) is not None


def is_encoder_decoder(model: str | PreTrainedModel | PeftModel, trust_remote_code: bool = False) -> bool:
    """Return whether a model, or the model or the base of the adapter of that name, is an encoder-decoder."""
    if not isinstance(model, str):
        return bool(model.config.is_encoder_decoder)
    name = PeftConfig.from_pretrained(model).base_model_name_or_path if is_adapter(model) else model
    return bool(name and AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code).is_encoder_decoder)


def load_causal_lm(
    model: str | PreTrainedModel | PeftModel,
    *,
    quantization_config: BitsAndBytesConfig | None = None,
    init_kwargs: dict | None = None,
    is_trainable: bool = False,
) -> PreTrainedModel | PeftModel:
    """Load a causal language model, in fp32 unless `init_kwargs` names a dtype.

    An adapter is returned as a PeftModel over its base. A model object is returned as it is.

    Raises:
        ValueError: the checkpoint lacks weights, or it is an adapter that does not fit its base.
    """
    if not isinstance(model, str):
        return prepare_quantized(model)
    return _load("CAUSAL_LM", model, quantization_config, init_kwargs, is_trainable)


def load_pretraining_model(model: str | PreTrainedModel, *, masked: bool, args) -> PreTrainedModel:
    """Load a model to pretrain: a masked LM, or else the encoder-decoder or causal LM that its config describes.

    A model object is returned unchanged.
    """
    if not isinstance(model, str):
        return model
    options = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    seq2seq = is_encoder_decoder(model, trust_remote_code=args.trust_remote_code)
    auto = AutoModelForMaskedLM if masked else AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    return auto.from_pretrained(model, **options)


def load_reward_model(
    model: str | PreTrainedModel | PeftModel | RewardModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    quantization_config: BitsAndBytesConfig | None = None,
    init_kwargs: dict | None = None,
) -> RewardModel:
    """Load a frozen reward model in eval mode: a checkpoint or adapter of RewardTrainer, or a num_labels=1 classifier.

    Raises:
        ValueError: the checkpoint has no trained reward head, or a model object has neither a tokenizer nor a name.
    """
    if hasattr(model, "score_states"):
        return model
    if isinstance(model, str) and (Path(model) / "ensemble.json").is_file():
        from lifecycle_hf.models.ensemble import RewardEnsemble  # which loads its members by this function

        return RewardEnsemble.from_pretrained(model, init_kwargs=init_kwargs)
    if tokenizer is None:
        name = model if isinstance(model, str) else model.config._name_or_path
        if not name:
            raise ValueError(
                "The reward model is an object without a name, so its tokenizer can't be found: pass the tokenizer "
                "(reward_processing_classes in PPOTrainer)."
            )
        tokenizer = load_tokenizer(name, trust_remote_code=(init_kwargs or {}).get("trust_remote_code", False))
    if isinstance(model, str):
        model = _load("SEQ_CLS", model, quantization_config, init_kwargs, is_trainable=False)
    return RewardModel(prepare_quantized(model), tokenizer).eval().requires_grad_(False)


def load_classifier(
    model: str,
    *,
    task: str = "SEQ_CLS",
    quantization_config: BitsAndBytesConfig | None = None,
    init_kwargs: dict | None = None,
) -> PreTrainedModel | PeftModel:
    """Load a sequence classifier to train, or by `task` another model; its head is new if the checkpoint has none.

    A sequence classifier has one label unless `init_kwargs` names others by `id2label`.
    """
    return _load(task, model, quantization_config, init_kwargs, is_trainable=True)


def _load(task: str, name: str, quantization_config, init_kwargs: dict | None, is_trainable: bool):
    if not is_adapter(name):
        return _load_plain(task, name, quantization_config, init_kwargs, is_trainable)
    config = PeftConfig.from_pretrained(name)
    if not config.base_model_name_or_path:
        raise ValueError(
            f"The adapter {name} does not name its base model: set base_model_name_or_path in its config."
        )
    if _KINDS.get(config.task_type, _KINDS[task]) != _KINDS[task]:
        raise ValueError(
            f"{name} is an adapter of a {_KINDS[config.task_type]}, but a {_KINDS[task]} is needed. Merge it into its "
            "base first (the recipes' --merge writes it to OUTPUT_DIR/merged) and start from the merged model."
        )
    init_kwargs = labels_of(read_adapter_notes(name)) | (init_kwargs or {})
    base = _load_plain(task, config.base_model_name_or_path, quantization_config, init_kwargs)
    return load_adapter(base, name, is_trainable=is_trainable)


def _load_plain(task: str, name: str, quantization_config, init_kwargs: dict | None = None, fresh_head: bool = True):
    """Load a model that is not an adapter; `fresh_head` says whether the checkpoint may lack the head of a task."""
    kwargs = {"dtype": torch.float32, **(init_kwargs or {})}
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
        if torch.cuda.is_available() and not is_deepspeed_zero3_enabled():
            kwargs.setdefault("device_map", {"": PartialState().local_process_index})
    if task == "SEQ_CLS" and "id2label" not in kwargs:
        kwargs["num_labels"] = 1
    # The context also removes the head from the list of missing weights, so it is used for a fresh head only.
    with suppress_seqcls_warning() if fresh_head else nullcontext():
        model, info = _AUTO[task].from_pretrained(name, output_loading_info=True, **kwargs)
    absent, backbone = set(info["missing_keys"]), f"{model.base_model_prefix}."
    if fresh_head and task in ("SEQ_CLS", "QUESTION_ANS"):
        absent = {key for key in absent if key.startswith(backbone) and "pooler" not in key}
    if absent and task == "QUESTION_ANS" and "key_mapping" not in kwargs:
        # Llama's head calls the backbone "transformer", and transformers does not find it as "model" in a checkpoint.
        mapping = {"key_mapping": {r"^model\.": backbone}}
        return _load_plain(task, name, quantization_config, (init_kwargs or {}) | mapping, fresh_head)
    if missing := sorted(absent):
        hint = " It has no trained reward head: train one with RewardTrainer." if task == "SEQ_CLS" else ""
        some = f"{missing[:5]}{' ...' if len(missing) > 5 else ''}"
        raise ValueError(f"The checkpoint {name} lacks weights of {type(model).__name__}: {some}.{hint}")
    return prepare_quantized(model)


def prepare_quantized(model):
    """Make 4-bit layers train correctly on CPUs with AVX512-BF16, and return the model; other models do not change.

    On such CPUs the first forward pass without gradients packs `Linear4bit` weights for a kernel that autograd does
    not support, and later gradients are wrong by 29 %.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def is_sharded(model: torch.nn.Module) -> bool:
    """Return whether DeepSpeed ZeRO-3 has sharded the parameters, so that each process holds a part of each."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def whole(parameter: torch.Tensor, writing: bool = False):
    """Return a context that gathers a parameter which ZeRO-3 has sharded; every process must enter it.

    Args:
        writing: whether to copy what the main process writes into the parameter to all processes.
    """
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters([parameter], modifier_rank=0 if writing else None)


@contextmanager
def unsharded(model: torch.nn.Module):
    """Gather a model that FSDP2 has sharded for the time of the context, so that its submodules can be called alone.

    The layers stay gathered between calls. Decoding needs this, because its number of steps differs between processes.

    Args:
        model: a module that can be called without arguments; this call makes FSDP2 treat it as the root.
    """
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not units or getattr(model, "is_whole", False):
        yield
        return
    model()
    model.is_whole = True
    reshards = [_reshards_after_forward(unit) for unit in units]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        model.is_whole = False
        for unit, own in zip(units, reshards, strict=True):
            unit.reshard()
            unit.set_reshard_after_forward(own, recurse=False)


def _reshards_after_forward(unit: FSDPModule) -> bool:
    """Return what `set_reshard_after_forward` was set to in a unit; torch has no public way to read it."""
    state = unit._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    return any(group is not None and group.post_forward_mesh_info is not None for group in groups)


def disable_dropout(model: torch.nn.Module) -> None:
    """Switch dropout off permanently: in dropout layers, and in layers that store the rate as a float attribute."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def end_token_ids(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | PeftModel | None = None) -> set[int]:
    """Return all token ids that end a text: EOS of the tokenizer, the model's config and its generation config."""
    ends = [tokenizer.eos_token_id]
    if model is not None:
        ends.append(model.config.get_text_config().eos_token_id)
        if (generation := getattr(model, "generation_config", None)) is None and model.config._name_or_path:
            with suppress(OSError):
                generation = GenerationConfig.from_pretrained(model.config._name_or_path)
        ends.append(getattr(generation, "eos_token_id", None))
    return {token for end in ends for token in (end if isinstance(end, list | tuple) else [end]) if token is not None}


def check_pad_token(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | PeftModel | None = None) -> None:
    """Check that the pad token, if one is set, has a row in the model's embeddings.

    Raises:
        ValueError: the pad token is outside the vocabulary or the embeddings.
    """
    rows = None if model is None else embedding_rows(model)
    pad = tokenizer.pad_token_id
    if tokenizer.pad_token is not None and (pad is None or (rows is not None and pad >= rows)):
        raise ValueError(
            f"The pad token {tokenizer.pad_token!r} (id {pad}) is outside the vocabulary of {rows} tokens. Call "
            "model.resize_token_embeddings(len(tokenizer)), or set tokenizer.pad_token to a token of the vocabulary."
        )


def ensure_pad_token(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | PeftModel | None = None) -> int:
    """Give the tokenizer a pad token that does not end texts, set it in the configs of `model`, and return its id.

    The first that exists is used: the present pad token if it does not end texts, a special token for padding, a
    reserved special token, the unknown token. If there is none, "<|pad|>" is added, with a new row in the model's
    embeddings if they have no unused row.

    Raises:
        ValueError: see [`check_pad_token`].
    """
    check_pad_token(tokenizer, model)
    rows = None if model is None else embedding_rows(model)
    ends = end_token_ids(tokenizer, model)
    pad = tokenizer.pad_token_id
    if pad is None or pad in ends:
        candidates = _pad_candidates(tokenizer, ends, rows)
        if candidates:
            tokenizer.pad_token = candidates[0]
        else:
            tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
            if rows is not None and tokenizer.pad_token_id >= rows:
                model.resize_token_embeddings(len(tokenizer))
    if model is not None:
        for config in (model.config, model.config.get_text_config(), getattr(model, "generation_config", None)):
            if config is not None:
                config.pad_token_id = tokenizer.pad_token_id
    return tokenizer.pad_token_id


def _pad_candidates(tokenizer, ends: set[int], rows: int | None) -> list[str]:
    """Return the tokens of the tokenizer that can serve as pad token, the best one first."""
    special = {token.content: id_ for id_, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special}
    named = [token for token in special if _PAD_NAME.search(token) and not _OTHER_MODALITY.search(token)]
    spare = [token for token in special if _SPARE_NAME.search(token)]
    unknown = [tokenizer.unk_token] if tokenizer.unk_token is not None else []
    taken = ends | {tokenizer.bos_token_id}
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in named + spare + unknown]
    return [token for token, id_ in ids if id_ not in taken and (rows is None or id_ < rows)]


def check_adapter_base(adapter: str, base_name: str) -> None:
    """Check that an adapter names the given base model as its own.

    Raises:
        ValueError: the adapter names another base model; the message contains both names.
    """
    trained_on = PeftConfig.from_pretrained(adapter).base_model_name_or_path or base_name
    names = (trained_on, base_name)
    if len({str(Path(name).resolve()) if Path(name).is_dir() else name.rstrip("/") for name in names}) > 1:
        raise ValueError(
            f"The checkpoint {adapter} belongs to the base model {trained_on}, not to {base_name}. Load it over "
            f"{trained_on}, or, if they are the same model, correct base_model_name_or_path in {adapter}."
        )


def check_adapter_weights(own: dict, theirs: dict, source: str | Path, base_name: str | None) -> None:
    """Check that the tensors of an adapter checkpoint have the names and shapes of the model's adapter.

    Args:
        own, theirs: weights of the model's adapter and of the checkpoint, as `get_peft_model_state_dict` names them.
        source: the checkpoint's name in the message.
        base_name: the name of the model's base.

    Raises:
        ValueError: a tensor is missing, unknown or of another shape; the message names the first one.
    """
    here, there = ({name: tuple(tensor.shape) for name, tensor in state.items()} for state in (own, theirs))
    for key in sorted(here.keys() | there.keys()):
        if here.get(key) != there.get(key):
            pair = f"{there.get(key, 'missing')} in the checkpoint and {here.get(key, 'missing')} in the model"
            raise ValueError(
                f"The adapter checkpoint {source} does not fit this model: {key} is {pair}. Use the base model (here "
                f"{base_name}) and the adapter configuration of the checkpoint."
            )


def load_adapter(base: PreTrainedModel, path: str, *, is_trainable: bool = False) -> PeftModel:
    """Load the adapter at `path` onto `base`, and apply the notes of [`save_adapter_notes`].

    Raises:
        ValueError: a tensor of the checkpoint does not fit the base (by name or shape); the message names both.
    """
    notes = read_adapter_notes(path)
    base_name = base.config._name_or_path or type(base).__name__
    if notes.get("vocab_size", 0) > embedding_rows(base):
        base.resize_token_embeddings(notes["vocab_size"])
    try:
        model = PeftModel.from_pretrained(base, path, is_trainable=is_trainable)
    except RuntimeError as error:
        detail = str(error).splitlines()[-1].strip(" \t.")
        raise ValueError(
            f"The adapter checkpoint {path} does not fit {base_name}: {detail}. Load it over its own base model."
        ) from error
    if (Path(path) / ADAPTER_WEIGHTS).is_file():
        theirs = load_file(Path(path) / ADAPTER_WEIGHTS)
        own = get_peft_model_state_dict(model, save_embedding_layers=False)
        # PEFT may add the base's embeddings to an adapter that is on them.
        whole = get_peft_model_state_dict(model, save_embedding_layers=True)
        own |= {name: tensor for name, tensor in whole.items() if name in theirs}
        check_adapter_weights(own, theirs, path, base_name)
    for key in {"pad_token_id", "reward_center"} & notes.keys():
        setattr(base.config, key, notes[key])
    return model


def merge_adapter(model_or_path: str | PeftModel, output_dir: str | Path) -> PreTrainedModel:
    """Merge an adapter into its base, W + (α/r)·BA in fp32, write the full checkpoint to `output_dir` and return it.

    A quantised base is dequantised first: a merge into 4-bit weights would change the logits by 0.1 to 40. An adapter
    on disk is merged into the base that it was trained on, quantised as its notes say. A model object does not change.
    If the base ties its embeddings and the adapter changes one of the two, the merged checkpoint holds both.

    Raises:
        ValueError: there is no adapter at the path.
    """
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(model_or_path, PeftModel):
            path = folder
            model_or_path.save_pretrained(folder)
            save_adapter_notes(model_or_path, folder)
            base = copy.deepcopy(model_or_path).unload()
        else:
            path = str(model_or_path)
            base = _base_of(path)
        if getattr(base, "hf_quantizer", None) is not None:
            base = base.dequantize(dtype=torch.float32)
        merged = merge_and_untie(load_adapter(base.float(), path))
    merged.save_pretrained(output_dir)
    if not isinstance(model_or_path, PeftModel):
        load_tokenizer(path).save_pretrained(output_dir)
    return merged


def _base_of(adapter: str) -> PreTrainedModel:
    """Load the base model that an adapter was trained on, quantised as the adapter's notes say."""
    if not is_adapter(adapter):
        raise ValueError(f"{adapter} holds no adapter (no adapter_config.json): there is nothing to merge.")
    config, notes = PeftConfig.from_pretrained(adapter), read_adapter_notes(adapter)
    quantization = notes.get("quantization_config")
    quantization = BitsAndBytesConfig.from_dict(quantization) if quantization else None
    return _load_plain(config.task_type, config.base_model_name_or_path, quantization, labels_of(notes))
