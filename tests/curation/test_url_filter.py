"""Blocked URLs, by own lists and by those of datatrove."""

import copy
import pickle

import pytest

from lifecycle_hf.curation import UrlFilter
from lifecycle_hf.curation.url_filter import loaded_filter


@pytest.fixture(scope="module")
def own():
    return UrlFilter(
        integrated=False,
        domains=["bad.com", "# a comment", "", "spam.blog.site.co.uk"],
        urls=["https://www.good.net/Bad-Page/"],
        words=["casino"],
        soft_words=["win", "prize", "free"],
        subwords=["free money"],
    )


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("https://bad.com/x", "blocked_domain"),
        ("HTTP://WWW.bad.com/x", "blocked_domain"),
        ("bad.com", "blocked_domain"),
        ("https://bad.com.org", ""),
        ("https://notbad.com", ""),
        ("http://spam.blog.site.co.uk/1", "blocked_subdomain"),
        ("http://blog.site.co.uk/1", ""),
        ("http://good.net/bad-page", "blocked_url"),
        ("http://good.net/bad-page/2", ""),
        ("https://x.org/Casino-night", "blocked_word"),
        ("https://x.org/casinos", ""),
        ("https://x.org/win-a-prize", "blocked_soft_words"),
        ("https://x.org/win-win-win", ""),
        ("https://x.org/get_free-mo.ney", "blocked_subword"),
        ("http://[::1]:8000/", ""),
        ("http://127.0.0.1/", ""),
        ("not a url at all", ""),
        ("", ""),
        (" ", ""),
        (None, ""),
    ],
)
def test_own_lists(own, url, reason):
    assert own(["text"], urls=[url])[0].reason == reason


def test_each_text_has_one_url(own):
    with pytest.raises(ValueError, match="shorter"):
        own(["a", "b"], urls=["https://bad.com"])


def test_no_urls_keep_all(own):
    assert [decision.kept for decision in own(["a", ""])] == [True, True] and own([]) == []


def test_lists_from_files_and_pickled(tmp_path):
    (tmp_path / "domains.txt").write_text("# ours\n\nbad.com\n")
    block = UrlFilter(integrated=False, domains=tmp_path / "domains.txt")
    urls = ["https://bad.com", "https://fine.example"]
    expected = ["blocked_domain", ""]
    assert [decision.reason for decision in block(["", ""], urls=urls)] == expected
    assert [decision.reason for decision in pickle.loads(pickle.dumps(block))(["", ""], urls=urls)] == expected


def test_copies_of_a_block_load_its_lists_once(own):
    """datatrove copies a step for each task; the integrated lists take 4 seconds."""
    own([""], urls=["https://a.org"])
    before = loaded_filter.cache_info()
    assert copy.deepcopy(own)([""], urls=["https://bad.com"])[0].reason == "blocked_domain"
    assert pickle.loads(pickle.dumps(own))([""], urls=["https://a.org"])[0].kept
    after = loaded_filter.cache_info()
    assert (after.hits - before.hits, after.misses - before.misses) == (2, 0)


@pytest.mark.parametrize("kind", ["words", "soft_words", "subwords"])
def test_a_word_that_blocks_everything_is_refused(kind):
    with pytest.raises(ValueError, match=f"{kind} has '!!', in which stands no letter"):
        UrlFilter(integrated=False, **{kind: ["ok", "!!"]})


def test_nothing_is_fetched(own, monkeypatch):
    """tldextract asks the network for its list of suffixes unless it is told not to."""
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    loaded_filter.cache_clear()
    assert own([""], urls=["https://bad.com"])[0].reason == "blocked_domain"


@pytest.mark.slow
def test_integrated_lists(tmp_path, monkeypatch):
    """Takes 8 s and 0.8 GB. The pages of the list have no scheme; datatrove alone never finds one of them."""
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path))
    block = UrlFilter()
    urls = ["https://pornhub.com/", "https://docs.python.org/3/library/re.html", "https://x.org/xxx-porn"]
    found = [decision.reason for decision in block([""] * 3, urls=urls)]
    assert found == ["blocked_domain", "", "blocked_word"]
    known = loaded_filter(2, True, (), (), (), (), ())
    assert loaded_filter.cache_info().hits == 1 and len(known.block_listed_domains) > 4_000_000
    listed = next(iter(known.block_listed_url))
    assert block([""], urls=[f"https://{listed}"])[0].reason == "blocked_url"
