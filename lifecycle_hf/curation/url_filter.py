"""Remove documents by the URLs that they come from, by datatrove's URL filter and its lists."""

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

from lifecycle_hf.curation.decisions import Decision

Entries = Iterable[str] | Path | str
REASONS = {
    "domain": "blocked_domain",
    "subdomain": "blocked_subdomain",
    "hard_blacklisted": "blocked_word",
    "soft_blacklisted": "blocked_soft_words",
    "blacklisted_subword": "blocked_subword",
}
"""Reasons of a removal by datatrove's names of them; one more is "blocked_url"."""


class UrlFilter:
    """Remove a document whose URL is blocked; one without a URL is kept.

    A URL is blocked if its domain, its host or its page is listed, if one of its words is, if at least
    `soft_threshold` of its words are soft words, or if one of the subwords stands anywhere in its letters and digits.
    Case does not count. Domains are cut by the public suffix list of tldextract's package, without the network.

    Args:
        integrated: whether datatrove's own lists are used beside those given: 4.6 million domains and 20,000 pages of
            adult, gambling, malware and similar sites (UT1), and English words. The first call in each process then
            takes some 4 seconds and 0.8 GB of memory; they are unpacked once, into the cache of Hugging Face's assets.
        domains, urls, words, soft_words, subwords: more to block, each a list, or a file with one entry in a line;
            empty lines, and lines that begin with "#", are left out.
        soft_threshold: how many different soft words block a URL.

    Raises:
        ValueError: a word has no letter or digit of ASCII, which are all that datatrove reads of a word.
    """

    name = "url"

    def __init__(
        self, *, integrated: bool = True, domains: Entries = (), urls: Entries = (), words: Entries = (),
        soft_words: Entries = (), subwords: Entries = (), soft_threshold: int = 2,
    ):  # fmt: skip
        self.integrated, self.soft_threshold = integrated, soft_threshold
        self.domains = [entry.lower() for entry in _entries(domains)]
        self.urls = [_page(entry) for entry in _entries(urls)]
        self.words = {"words": words, "soft_words": soft_words, "subwords": subwords}
        for kind, given in self.words.items():
            self.words[kind] = _entries(given)
            if empty := [word for word in self.words[kind] if not re.search("[A-Za-z0-9]", word)]:
                raise ValueError(
                    f"UrlFilter: {kind} has {empty[0]!r}, in which stands no letter from a to z and no digit. It "
                    "would block every URL: leave it out."
                )

    def __call__(self, texts: Sequence[str], *, urls=None, domains=None) -> list[Decision]:
        """Return for each text whether its URL is blocked, and why."""
        pairs = zip(texts, urls or [None] * len(texts), strict=True)
        found = [(url or "").strip().lower() for _, url in pairs]
        given = self.domains, self.urls, *(self.words[kind] for kind in ("words", "subwords", "soft_words"))
        known = loaded_filter(self.soft_threshold, self.integrated, *map(tuple, given)) if any(found) else None
        return [Decision(_fault(known, url) if url else "") for url in found]


def _fault(known, url: str) -> str:
    from datatrove.data import Document

    if _page(url) in known.block_listed_url:  # datatrove compares it with the scheme, which its list lacks
        return "blocked_url"
    found = known.filter(Document(text="", id="", metadata={"url": url}))
    return "" if found is True else REASONS[found[1]]


@lru_cache(1)  # not in the block, which datatrove copies for each task
def loaded_filter(soft_threshold: int, integrated: bool, domains: tuple, urls: tuple, *words: tuple):
    """Return datatrove's filter with its lists loaded, once for a block and its copies in a process."""
    from datatrove.pipeline.filters import URLFilter
    from tldextract import TLDExtract

    found = URLFilter(soft_threshold, domains, urls, *words, use_integrated_lists=integrated)
    found.tldextractor = TLDExtract(suffix_list_urls=(), cache_dir=None)
    found.download_data()  # unpacks what the wheel has; nothing is downloaded
    found.block_listed_url = {_page(url) for url in found.block_listed_url}
    return found


def _page(url: str) -> str:
    """Return a URL without case, scheme, "www." and slashes at its end."""
    return re.sub(r"^(?:[a-z][a-z0-9+.-]*:)?//", "", url.strip().lower()).removeprefix("www.").rstrip("/")


def _entries(given: Entries) -> list[str]:
    lines = Path(given).read_text().splitlines() if isinstance(given, str | Path) else given
    return [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
