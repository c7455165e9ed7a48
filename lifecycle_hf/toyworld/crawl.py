"""A small crawl whose faults are known: Python's documentation, with copies, junk, personal data and blocked pages."""

import ast
import random
import string
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path

from lifecycle_hf.curation.minhash import clusters
from lifecycle_hf.data.corpora import python_documentation

LIBRARY = Path(sysconfig.get_paths()["stdlib"])
LENGTHS = (1200, 3000)
"""Fewest and most characters of a document, unless one paragraph is longer."""
LONG = 40
"""Fewest words of a docstring."""
NO_LIBRARY = ("ensurepip", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "turtledemo")
"""Folders whose docstrings are not those of the library."""
TRUSTED = 4
"""Every fourth document of Python is trusted text, and not in the crawl."""
PLANTED = {"blocked page": 20, "garbage": 30, "spam": 40, "exact copy": 20, "near copy": 20, "long run": 12,
           "personal data": 30}  # fmt: skip
NOTICE = (
    "You are reading an archived copy of this page, which volunteers keep for study and for research. It is given "
    "as it is, without any promise that its text is right, complete or of use for what you have in mind. Whoever "
    "copies the page to another place keeps this notice in it, names the archive as the source, and tells the "
    "readers that the page can be older than the one that it was taken from. Write to the archive where a page "
    "should not be kept, and it is deleted."
)
"""A run of 92 words, which is planted in several documents."""
_OFFERS = ("watches", "pills", "loans", "tickets", "phones", "shoes", "courses", "rings")
_PRAISE = ("amazing", "free", "cheap", "exclusive", "incredible", "best", "secret", "luxury", "instant", "new")
_SPAM = (
    "Buy the {praise} {offer} of the year and save up to {number} percent today.",
    "Click on the link and we will send you {praise} {offer} with free delivery.",
    "All of our customers love the {praise} {offer}, and you will love them too.",
    "This {praise} deal on {offer} ends in {number} hours, so do not wait to order.",
    "Sign up for the newsletter and be the first to hear of {praise} {offer}.",
    "Thousands have made money with {praise} {offer} from home, and that without any work.",
    "It is the {praise} way to get {offer} that doctors and banks do not want you to know.",
)


@cache
def documents() -> list[str]:
    """Return Python's reference and the longer docstrings of its library in pieces of a page, no two of them alike.

    A page of which less than 85 % are letters and blanks, such as a table or code, is left out.
    """
    return _unlike([*python_documentation()["text"], *map(_docstrings, sorted(LIBRARY.glob("*.py")))])


def trusted() -> list[str]:
    """Return the documents that are trusted."""
    return documents()[::TRUSTED]


def held_out() -> list[str]:
    """Return pages that are neither trusted nor in a crawl: docstrings of the packages of Python's library."""
    files = (path for path in sorted(LIBRARY.glob("*/*.py")) if path.parent.name not in NO_LIBRARY)
    return _unlike(map(_docstrings, files), known=documents())


def junk(seed: int = 1, n: int = 60) -> list[str]:
    """Return spam and garbage, other than that of a crawl with another seed."""
    draw = random.Random(seed)
    return [_spam(draw) if i % 2 else _garbage(draw, i) for i in range(n)]


def crawl(seed: int = 0) -> list[dict]:
    """Return the rows of a crawl, shuffled: "id", "text", "url", "domain", and what was "planted" in the document.

    "planted" is "" or a key of [`PLANTED`], "original" the id of the original of a copy, and "items" the strings of
    personal data.
    """
    draw, pages = random.Random(seed), documents()
    clean = [page for i, page in enumerate(pages) if i % TRUSTED]
    rows = [{"text": text, "planted": "", "original": "", "items": []} for text in clean]
    draw.shuffle(rows)
    hosts = iter(rows)
    for kind in ("long run", "personal data", "blocked page"):
        for _ in range(PLANTED[kind]):
            row = next(hosts)
            row["planted"] = kind
            if kind == "long run":
                row["text"] += f"\n\n{NOTICE}"
            elif kind == "personal data":
                row["items"] = _personal(draw)
                row["text"] += "\n\nWrite or call: {}, {}; pay by {} or {}; log in at {} with {}.".format(
                    *row["items"]
                )
    for i, row in enumerate(rows):
        row |= {"id": f"page-{i}", "url": f"https://docs{i % 7}.example.org/page/{i}", "domain": "docs"}
        if row["planted"] == "blocked page":
            row["url"] = f"https://www.888casino.com/offers/{i}"
    for kind in ("exact copy", "near copy"):
        for _ in range(PLANTED[kind]):
            one = next(hosts)
            text = one["text"] if kind == "exact copy" else _altered(one["text"], draw)
            rows.append(_row(f"copy-{len(rows)}", text, kind) | {"original": one["id"]})
    for kind, write in (("garbage", _garbage), ("spam", lambda draw, i: _spam(draw))):
        rows += [_row(f"{kind}-{i}", write(draw, i), kind) for i in range(PLANTED[kind])]
    draw.shuffle(rows)
    return rows


def found(rows: Iterable[dict], kept: dict[str, str], removed: dict[str, set[str]]) -> list[list]:
    """Return [kind, step that is made for it, planted, found, clean documents that this step removed] of each kind.

    A document, an original or its copy, a long run but one, or a string of personal data is found if it is not in the
    clean corpus.

    Args:
        rows: of [`crawl`].
        kept: {id: text} of the clean corpus.
        removed: {step: ids of the documents that it removed}.
    """
    rows, table = list(rows), []
    clean = {row["id"] for row in rows if not row["planted"]} - {row["original"] for row in rows}
    for kind, step in zip(PLANTED, ("url", "rules", "quality", "minhash", "minhash", "substring", "pii")):
        planted = [row for row in rows if row["planted"] == kind]
        if step not in removed:
            continue
        if kind == "long run":
            gone = sorted(NOTICE not in kept.get(row["id"], "") for row in planted)[1:]
        elif kind == "personal data":
            gone = [item not in kept.get(row["id"], "") for row in planted for item in row["items"]]
        else:
            pairs = [{row["id"], row["original"] or row["id"]} for row in planted]
            gone = [not pair <= kept.keys() for pair in pairs]
        table.append([kind, step, len(gone), sum(gone), len(clean & removed[step])])
    return table


def _unlike(texts: Iterable[str], known: Sequence[str] = ()) -> list[str]:
    """Return the pages of texts that are mostly letters, and like no earlier page and no known one."""
    pages = [*known, *(piece for text in texts for piece in _pieces(text) if _letters(piece) >= 0.85)]
    firsts = enumerate(zip(pages, clusters(pages, 0.5)))
    return [page for i, (page, first) in firsts if first == i >= len(known)]


def _row(name: str, text: str, kind: str) -> dict:
    page = {"id": name, "text": text, "url": f"https://{name}.example.net", "domain": "web"}
    return page | {"planted": kind, "original": "", "items": []}


def _docstrings(path: Path) -> str:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (
        ast.get_docstring(node) or "" for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, kinds)
    )
    return "\n\n".join(text for text in dict.fromkeys(found) if len(text.split()) >= LONG)


def _letters(text: str) -> float:
    return sum(letter.isalpha() or letter.isspace() for letter in text) / len(text)


def _pieces(text: str) -> Iterator[str]:
    """Yield the text in pieces of whole paragraphs; a last one that is too short is left out."""
    piece = ""
    for paragraph in text.split("\n\n"):
        if piece and len(piece) + len(paragraph) > LENGTHS[1]:
            yield piece.strip("\n")
            piece = ""
        piece += f"{paragraph}\n\n"
    if len(piece) >= LENGTHS[0]:
        yield piece.strip("\n")


def _altered(text: str, draw: random.Random) -> str:
    """Return the text with every hundredth word replaced: a Jaccard similarity of runs of five words of about .9."""
    parts = text.split(" ")
    words = [i for i, part in enumerate(parts) if part.isalpha()]
    for start in range(0, len(words), 100):
        parts[draw.choice(words[start : start + 100])] = "".join(draw.choices(string.ascii_lowercase, k=8))
    return " ".join(parts)


def _garbage(draw: random.Random, i: int) -> str:
    """Return signs without words, one line again and again, or a few words."""
    if i % 3 == 0:
        return "".join(draw.choices(string.punctuation + string.digits + "   ", k=draw.randint(400, 2000)))
    line = " ".join("".join(draw.choices(string.ascii_lowercase, k=draw.randint(3, 9))) for _ in range(8))
    return f"{line}\n" * draw.randint(20, 60) if i % 3 == 1 else line


def _spam(draw: random.Random) -> str:
    def sentence(pattern):
        words = {"praise": draw.choice(_PRAISE), "offer": draw.choice(_OFFERS), "number": draw.randint(5, 95)}
        return pattern.format(**words)

    return "\n".join(map(sentence, draw.sample(_SPAM, 6)))


def _personal(draw: random.Random) -> list[str]:
    """Return an e-mail address, a phone number, a card, an IBAN, an IP address and a key that are all well formed."""
    name = "".join(draw.choices(string.ascii_lowercase, k=8))
    card = [4, *draw.choices(range(10), k=14)]
    total = sum(sum(divmod(2 * digit, 10)) if i % 2 == 0 else digit for i, digit in enumerate(card))
    number = "".join(map(str, [*card, -total % 10]))
    account = "".join(draw.choices(string.digits, k=18))
    check = 98 - int(f"{account}131400") % 97  # D = 13, E = 14
    return [
        f"{name}@mail.{draw.choice(['com', 'org', 'de'])}",
        f"+44 20 7946 {draw.randint(0, 9999):04d}",
        " ".join(number[i : i + 4] for i in range(0, 16, 4)),
        f"DE{check:02d}{account}",
        f"8.{draw.randint(8, 200)}.{draw.randint(1, 200)}.{draw.randint(1, 250)}",
        "AKIA" + "".join(draw.choices(string.ascii_uppercase + "234567", k=16)),
    ]
