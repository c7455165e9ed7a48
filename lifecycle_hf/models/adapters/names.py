"""Find the adapter that a parameter of a PeftModel belongs to, by its name."""


def split_adapter(name: str, prefix: str) -> tuple[str | None, str]:
    """Return the adapter of a parameter (None if it is of the base model), and the parameter's name without it.

    A layer of the base model may have the same name as an adapter ("value" in BERT's attention). So the adapter is
    looked for only behind a module that holds adapters: its name starts with the tuner's `prefix`, or it is one of
    those that PEFT has for every tuner.
    """
    parts, kept = name.split("."), ("modules_to_save", "trainable_tokens_delta")
    place = next((i for i, kind in enumerate(parts[:-1], 1) if kind.startswith(prefix) or kind in kept), None)
    return (None, name) if place is None else (parts.pop(place), ".".join(parts))
