"""Ask an OpenAI-compatible chat server; every answer is kept on the disk when it arrives."""

import hashlib
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2

AGAIN = (408, 409, 429, 500, 502, 503, 504)
"""Status codes after which a request is made again."""


class ChatServer:
    """Send chat requests to a server with OpenAI's interface (vLLM, TGI, llama.cpp, a provider).

    Args:
        base_url: up to and with `/v1`.
        model: name that the server knows the model by.
        api_key_variable: environment variable that holds the key; requests go without a key if it is not set.
        timeout: seconds that a request may take.
        retries: number of further requests after one that timed out or failed for a passing reason.
        concurrency: requests under way at one time.
        cache: file of JSON lines with all answers so far; a request that stands there is not sent again.

    Attributes:
        tokens: tokens of the prompts and of the completions that the server counted.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key_variable: str = "OPENAI_API_KEY",
        timeout: float = 60.0,
        retries: int = 5,
        concurrency: int = 8,
        cache: str | Path | None = None,
    ):
        self.url, self.model = f"{base_url.rstrip('/')}/chat/completions", model
        self.timeout, self.retries, self.concurrency = timeout, retries, concurrency
        self.cache, self.tokens = Path(cache) if cache else None, {"prompt": 0, "completion": 0}
        key = os.environ.get(api_key_variable)
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._known, self._lock = self._read(), threading.Lock()

    def ask(self, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the first choice of the answer to each request, in order.

        Args:
            bodies: bodies of chat completions without "model": "messages", "max_tokens", "logprobs" and others.

        Raises:
            ValueError: the server can't be reached, refuses a request or gives no choice, after all retries. Answers
                that have arrived are in the cache.
        """
        options = {"timeout": self.timeout, "headers": self._headers}
        with httpx2.Client(**options) as client, ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(lambda body: self._answer(client, {"model": self.model} | body), bodies))

    def _answer(self, client: httpx2.Client, body: dict[str, Any]) -> dict[str, Any]:
        key = hashlib.sha256(json.dumps([self.url, body], sort_keys=True).encode()).hexdigest()
        if key in self._known:
            return self._known[key]
        answer = self._sent(client, body)
        choices = answer.get("choices") or []
        if not choices:
            raise ValueError(f"{self.url} answered without a choice: {str(answer)[:200]}")
        with self._lock:
            for name in self.tokens:
                self.tokens[name] += (answer.get("usage") or {}).get(f"{name}_tokens", 0)
            self._known[key] = choices[0]
            if self.cache is not None:
                with self.cache.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"key": key, "choice": choices[0]}, ensure_ascii=False) + "\n")
        return choices[0]

    def _sent(self, client: httpx2.Client, body: dict[str, Any]) -> dict[str, Any]:
        for attempt in range(self.retries + 1):
            wait, passing = 0.5 * 2**attempt, True
            try:
                response = client.post(self.url, json=body)
                if response.status_code == 200:
                    return response.json()
                why, passing = f"status {response.status_code}: {response.text[:200]}", response.status_code in AGAIN
                wait = float(response.headers.get("Retry-After", wait))
            except (httpx2.TransportError, ValueError) as error:
                why = f"{type(error).__name__}: {error}"
            if not passing or attempt == self.retries:
                break
            time.sleep(min(wait, 60.0))
        raise ValueError(f"{self.url} did not answer a request ({why}). Is the server up, and the model right?")

    def _read(self) -> dict[str, dict[str, Any]]:
        """Return the answers of the cache; a line that a kill cut off is left out."""
        known = {}
        if self.cache is not None and self.cache.exists():
            for line in self.cache.read_text(encoding="utf-8").split("\n"):
                try:
                    row = json.loads(line)
                    known[row["key"]] = row["choice"]
                except (ValueError, LookupError, TypeError):
                    continue
        if self.cache is not None:
            self.cache.parent.mkdir(parents=True, exist_ok=True)
        return known
