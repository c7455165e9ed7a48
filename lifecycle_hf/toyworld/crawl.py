"""A small crawl of which it is known what is wrong with it: Python's documentation with planted faults."""

import importlib
import inspect
import pkgutil
import random
import warnings
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

from lifecycle_hf.curation.minhash import clusters
from lifecycle_hf.data.json_lines import read_samples, write_samples

PLANTED = {
    "copy": "equal documents", "near copy": "near duplicates", "boilerplate": "copies of a long run",
    "garbage": "documents of garbage", "blocked URL": "documents of blocked sites", "PII": "personal data and secrets",
    "clean": "for comparison: clean documents",
}  # fmt: skip
PERSONAL = (
    "jane.doe@example.org", "93.184.216.34", "+49 30 901820", "4111 1111 1111 1111", "DE89 3704 0044 0532 0130 00",
    "AKIAIOSFODNN7EXAMPLE",
)  # fmt: skip
NOTICE = (
    "You are reading a copy of this page that was made for readers without a connection. It may be older than the "
    "page that it was copied from, and nobody answers questions about it. If you find a mistake, look first whether "
    "the newest page still has it, and then write to those who keep the page, with the number of the line, the words "
    "that are wrong, and the words that you would put there, so that the next copy of it can be a better one."
)
MODULES = ("asyncio", "concurrent", "email", "html", "http", "importlib", "json", "logging", "multiprocessing",
           "unittest", "urllib", "xml")  # fmt: skip


def documents() -> list[str]:
    """Return the topics of Python's documentation in pieces, and long docstrings of the standard library.

    The documentation has near duplicates of its own; of each cluster of them the first is returned.
    """
    texts = []
    for text in topics.values():
        paragraphs, piece = text.split("\n\n"), ""
        for paragraph in paragraphs:
            piece += paragraph + "\n\n"
            if len(piece) > 1500:
                texts.append(piece)
                piece = ""
    for module in map(importlib.import_module, MODULES):
        for found in [module, *(importlib.import_module(m.name) for m in _submodules(module))]:
            for _, member in inspect.getmembers(found):
                told = inspect.getdoc(member) or ""
                if len(told) > 600 and getattr(member, "__module__", "").startswith(MODULES):
                    texts.append(told)
    return [texts[i] for i in sorted(set(clusters(texts, 0.6).tolist()))]


def _submodules(package):
    for module in pkgutil.iter_modules(getattr(package, "__path__", ()), f"{package.__name__}."):
        with suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if "__main__" not in module.name and importlib.import_module(module.name):
                yield module


def planted_crawl(folder: Path, seed: int = 0) -> Path:
    """Write `crawl.jsonl` with columns id, url and text into a folder, and return its path.

    The id of a document tells what was planted: "KIND/number" of the keys of `PLANTED`, else "clean/number". A column
    "original" of copies has the id of that document.
    """
    rng, rows = random.Random(seed), []

    def add(kind: str, text: str, site: str = "docs.example.org", original: str | None = None) -> None:
        number = sum(row["id"].startswith(f"{kind}/") for row in rows)
        url = f"https://{site}/{kind.replace(' ', '-')}/{number}"
        rows.append({"id": f"{kind}/{number}", "url": url, "text": text, "original": original})

    for text in documents():
        add("clean", text)
    few, clean = len(rows) // 20, [row for row in rows if len(row["text"]) > 1200]
    for i, row in enumerate(rng.sample(clean, 2 * few)):
        words = row["text"].split(" ")
        if i % 2:
            words[len(words) // 2] += " nevertheless"
        add("near copy" if i % 2 else "copy", " ".join(words), original=row["id"])
    for _ in range(few):
        add("boilerplate", f"{_sentences(rng, 8)} {NOTICE} {_sentences(rng, 8)}")
        add("garbage", " ".join("".join(rng.choices("#$%&*{}|~0123456789", k=9)) for _ in range(90)))
        add("blocked URL", _sentences(rng, 14), site="pornhub.com")
        add("PII", " ".join(f"{_sentences(rng, 3)} Write it down: {text}." for text in PERSONAL))
    rng.shuffle(rows)
    folder.mkdir(parents=True, exist_ok=True)
    write_samples(folder / "crawl.jsonl", rows)
    return folder / "crawl.jsonl"


def _sentences(rng: random.Random, count: int) -> str:
    """Return sentences of the words of the documentation, which stand in no other document."""
    made = (" ".join(rng.choices(_words(), k=rng.randint(10, 18))) for _ in range(count))
    return " ".join(f"{text.capitalize()}." for text in made)


@cache
def _words() -> list[str]:
    return [word for text in topics.values() for word in text.split() if word.isalpha()]


def measure_curation(source: Path, data: Iterable[dict]) -> list[tuple[str, int, int]]:
    """Return (what was planted, how many, how many of them curation found), and the same of clean documents last.

    A copy is found if it or its original is gone. Of a long run all copies but one are to be found. Of clean documents
    those are counted that are gone without a copy that stays.

    Args:
        source: the file of [`planted_crawl`].
        data: the rows that are left, with "id" and "text".
    """
    left, planted = {row["id"]: row["text"] for row in data}, defaultdict(list)
    for row in read_samples(source):
        planted[row["id"].split("/")[0]].append(row)
    found = {kind: sum(row["id"] not in left for row in own) for kind, own in planted.items()}
    counts = {kind: len(own) for kind, own in planted.items()}
    for kind in ("copy", "near copy"):
        found[kind] = sum(not {row["id"], row["original"]} <= left.keys() for row in planted[kind])
    counts["boilerplate"] -= 1
    found["boilerplate"] = counts["boilerplate"] + 1 - sum(NOTICE in text for text in left.values())
    counts["PII"] *= len(PERSONAL)
    found["PII"] = sum(part not in left.get(row["id"], "") for row in planted["PII"] for part in PERSONAL)
    kept = {row["original"] for kind in ("copy", "near copy") for row in planted[kind] if row["id"] in left}
    found["clean"] = sum(row["id"] not in left and row["id"] not in kept for row in planted["clean"])
    return [(label, counts[kind], found[kind]) for kind, label in PLANTED.items()]
