"""Writers answer chats with texts: a local model, a server, or any function with the same arguments.

write(chats, max_tokens=..., temperature=..., seed=..., stop=...) -> one text for each chat
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lifecycle_hf.completions.judges import as_text
from lifecycle_hf.completions.sampling import generate, stop_token_ids
from lifecycle_hf.completions.server import ChatServer
from lifecycle_hf.data.chat import message_text
from lifecycle_hf.data.json_lines import append_samples, read_samples, write_samples
from lifecycle_hf.data.tokenize import encode_prompt
from lifecycle_hf.evaluation.report import write_report
from lifecycle_hf.models.loading import load_causal_lm, load_tokenizer

Chat = list[dict]


class Writer(Protocol):
    """Answer chats with texts.

    Attributes (a function may lack them):
        name: what errors call the writer.
        tokens: {"prompt": n, "completion": n} of all calls so far.
        batch_size: chats whose answers a run keeps together; a kill loses at most so many.
    """

    def __call__(
        self, chats: list[Chat], *, max_tokens: int, temperature: float, seed: int, stop: Sequence[str] = ()
    ) -> list[str]:
        """Return one text for each chat; the same call gives the same texts.

        Args:
            chats: lists of messages with "role" and "content", the last one a user's, or the assistant's: the start of
                an answer, which the text continues.
            max_tokens: most tokens of a text. One that was cut off there is a [`Cut`].
            temperature: 0 for the most likely tokens.
            stop: a text ends before the first of these strings.
        """


class Cut(str):
    """A text that was cut off at `max_tokens`."""


class LocalWriter:
    """Write with a causal language model.

    A model without a chat template continues the text of the message; of several messages that of the turns with their
    roles, up to the next user turn. The start of an answer then stands at the end of the last request.

    Args:
        model: causal LM or PEFT model, or its name or path.
        tokenizer: that of the model, by default.
        batch_size: chats that are decoded together.
    """

    def __init__(
        self, model: str | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, *, batch_size: int = 8
    ):
        named = isinstance(model, str)
        self.name = model if named else model.config._name_or_path
        self.tokenizer = tokenizer if tokenizer is not None else load_tokenizer(self.name)
        self.model = load_causal_lm(model).to(PartialState().device) if named else model
        self.stops, self.batch_size = stop_token_ids(self.model, self.tokenizer), batch_size
        self.tokens = {"prompt": 0, "completion": 0}

    def __call__(self, chats, *, max_tokens, temperature, seed, stop=()):
        """Answer chats, see [`Writer`].

        Raises:
            ValueError: a chat and `max_tokens` do not fit in the model's context, or its template refuses a chat.
        """
        plain = self.tokenizer.chat_template is None
        prompts = [encode_prompt(self.tokenizer, _as_plain(chat) if plain else chat) for chat in chats]
        longest, most = max(map(len, prompts), default=0), getattr(self.model.config, "max_position_embeddings", None)
        if most is not None and longest + max_tokens > most:
            raise ValueError(
                f"a prompt of {longest} tokens and max_tokens={max_tokens} do not fit in the context of {most} tokens"
                ": lower max_tokens, take shorter examples, or another model."
            )
        ids = generate(
            self.model, prompts, max_new_tokens=max_tokens, temperature=temperature, stop_token_ids=self.stops,
            pad_token_id=self.tokenizer.pad_token_id or 0, generator_seed=seed, batch_size=self.batch_size,
        )  # fmt: skip
        self.tokens["prompt"] += sum(map(len, prompts))
        self.tokens["completion"] += sum(map(len, ids))
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        stop = [*stop, "\n\nuser:"] if plain else stop
        return [_up_to(stop, text, row[-1] in self.stops) for text, row in zip(texts, ids, strict=True)]


class ServerWriter:
    """Write through an OpenAI-compatible server; an answer without a text becomes an empty one.

    The start of an answer is sent at the end of the last request, since not all servers continue an answer.

    Args:
        server: [`ChatServer`], with its time-outs, retries and cache.
        batch_size: chats that a run sends together.
    """

    def __init__(self, server: ChatServer, *, batch_size: int = 32):
        self.server, self.name, self.tokens, self.batch_size = server, server.model, server.tokens, batch_size

    def __call__(self, chats, *, max_tokens, temperature, seed, stop=()):
        """Answer chats, see [`Writer`]; chat i has the seed `seed` + i.

        Raises:
            ValueError: the server fails.
        """
        options = {"max_tokens": max_tokens, "temperature": temperature} | ({"stop": list(stop)} if stop else {})
        bodies = [{"messages": _requested(chat), "seed": seed + i} | options for i, chat in enumerate(chats)]
        choices = self.server.ask(bodies)
        texts = [message_text(choice.get("message") or {}) or "" for choice in choices]
        ended = [choice.get("finish_reason") != "length" for choice in choices]
        return [_up_to((), text, end) for text, end in zip(texts, ended, strict=True)]


class Recorded:
    """Ask a writer, and keep its texts in a file of JSON lines; a call that stands there is not made again.

    A run whose calls follow from its seed and from the texts so far goes on where it was killed, and ends as if it had
    not been. A progress bar counts the texts.

    Args:
        writer: [`Writer`] or a function like one. Its `batch_size` chats are asked and kept together, with the seed of
            the call + the index of the first; all chats of a call, where it has none.
        path: the file.
    """

    def __init__(self, writer: Writer, path: str | Path):
        self.writer, self.path = writer, Path(path)
        self.name = getattr(writer, "name", None) or getattr(writer, "__name__", type(writer).__name__)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.bar = tqdm(desc=f"Texts of {self.name}", unit=" texts")
        self._known = {row["key"]: row for row in read_samples(self.path)}

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens of all texts in the file: {"prompt": n, "completion": n}."""
        rows = self._known.values()
        return {name: sum(row["tokens"][name] for row in rows) for name in ("prompt", "completion")}

    def __call__(self, chats, *, max_tokens, temperature, seed, stop=()):
        """Answer chats, see [`Writer`].

        Raises:
            ValueError: the writer fails, returns another number of texts, or something that is no text.
        """
        options, texts = {"max_tokens": max_tokens, "temperature": temperature, "stop": list(stop)}, []
        size = getattr(self.writer, "batch_size", None) or len(chats) or 1
        for start in range(0, len(chats), size):
            texts += self._part(chats[start : start + size], options | {"seed": seed + start})
        return texts

    def finish(self, rows: list[dict], report: dict) -> dict:
        """Write `generated.jsonl` and `report.json` beside the file, and return the report with the tokens."""
        self.bar.close()
        write_samples(self.path.with_name("generated.jsonl"), rows)
        write_report(report | {"tokens": self.tokens}, self.path.parent)
        return report | {"tokens": self.tokens}

    def _part(self, chats: list[Chat], options: dict) -> list[str]:
        key = hashlib.sha256(json.dumps([chats, options], sort_keys=True).encode()).hexdigest()
        if key not in self._known:
            before = dict(getattr(self.writer, "tokens", {}))
            texts = self._written(chats, options)
            row = {
                "key": key,
                "texts": [text.encode("utf-8", "replace").decode() for text in texts],
            }  # no half letters
            row["cut"] = [i for i, text in enumerate(texts) if isinstance(text, Cut)]
            after = getattr(self.writer, "tokens", {})
            row["tokens"] = {name: after.get(name, 0) - before.get(name, 0) for name in ("prompt", "completion")}
            self._known[key] = append_samples(self.path, [row])[0]
        row = self._known[key]
        self.bar.update(len(chats))
        return [Cut(text) if i in row["cut"] else text for i, text in enumerate(row["texts"])]

    def _written(self, chats: list[Chat], options: dict) -> list[str]:
        lost = f"What it wrote before is in {self.path}: run the same again to go on."
        try:
            found = self.writer(chats, **options)
        except Exception as error:
            raise ValueError(f"The writer {self.name!r} failed: {type(error).__name__}: {error}. {lost}") from error
        if not isinstance(found, list | tuple) or len(found) != len(chats):
            got = f"{len(found)} texts" if isinstance(found, list | tuple) else repr(found)[:100]
            raise ValueError(f"The writer {self.name!r} returned {got} for {len(chats)} chats. {lost}")
        for i, text in enumerate(found):
            if not isinstance(text, str):
                asked = as_text(chats[i])[-200:]
                raise ValueError(
                    f"The writer {self.name!r} returned {text!r} for chat {i}, {asked!r}: it must be a text. {lost}"
                )
        return list(found)


def _as_plain(chat: Chat) -> str:
    chat = _requested(chat)
    return as_text(chat) + ("\n\nassistant:" if len(chat) > 1 else "")


def _requested(chat: Chat) -> Chat:
    """Return the chat with the start of an answer, if there is one, at the end of the request before it."""
    if chat[-1]["role"] != "assistant":
        return chat
    *before, last, start = chat
    return [*before, last | {"content": f"{last['content']}\n{start['content']}"}]


def _up_to(stop: Sequence[str], text: str, ended: bool) -> str:
    places = [text.find(string) for string in stop if string in text]
    return text[: min(places)] if places else text if ended else Cut(text)
