"""The language filter by a callable, and by a stand-in of the package fasttext."""

import pickle
import sys
from types import SimpleNamespace

import pytest

from lifecycle_hf.curation import LanguageFilter


def by_letters(texts):
    return [{"de": 0.8, "en": 0.2} if "ü" in text else {"en": 0.7, "fr": 0.3} for text in texts]


def test_one_of_the_languages_is_enough():
    decisions = LanguageFilter(by_letters)(["hello", "grüße", "", "\n"])
    assert [decision.reason for decision in decisions] == ["", "language", "", ""]
    assert [decision.scores for decision in decisions] == [{"language_en": 0.7}, {"language_en": 0.2}, {}, {}]
    assert all(decision.kept for decision in LanguageFilter(by_letters, ["en", "de"])(["hello", "grüße"]))
    assert not LanguageFilter(by_letters, threshold=0.7)(["hello"])[0].kept and LanguageFilter(by_letters)([]) == []


def test_a_model_of_fasttext(tmp_path, monkeypatch):
    (tmp_path / "lid.bin").write_bytes(b"")

    def predict(text, k):
        assert "\n" not in text and k == -1
        return ("__label__en", "__label__zh"), (0.75, 0.25)

    monkeypatch.setitem(
        sys.modules, "fasttext", SimpleNamespace(load_model=lambda path: SimpleNamespace(predict=predict))
    )
    block = LanguageFilter(tmp_path / "lid.bin", ["zh", "en"])
    assert block(["two\nlines"])[0].scores == {"language_zh": 0.25, "language_en": 0.75}
    assert pickle.loads(pickle.dumps(block))(["two\nlines"])[0].kept


def test_what_is_missing_is_told(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no fastText model at 'lid.176.bin'. Download"):
        LanguageFilter("lid.176.bin")
    (tmp_path / "lid.bin").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "fasttext", None)
    with pytest.raises(ImportError, match="pip install fasttext-numpy2-wheel"):
        LanguageFilter(tmp_path / "lid.bin")(["a"])
