"""Whose a parameter of a PeftModel is, by its name."""


def split_adapter(name: str, prefix: str) -> tuple[str | None, str]:
    """The adapter that a parameter belongs to, None for those of the base, and the parameter's name without it.

    A layer of the base may have an adapter's name ("value" in BERT's attention), so only the part counts that follows
    a container of adapters: one that starts with the tuner's `prefix`, or one that PEFT has for every tuner.
    """
    parts, kept = name.split("."), ("modules_to_save", "trainable_tokens_delta")
    place = next((i for i, kind in enumerate(parts[:-1], 1) if kind.startswith(prefix) or kind in kept), None)
    return (None, name) if place is None else (parts.pop(place), ".".join(parts))
