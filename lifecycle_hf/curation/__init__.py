"""A corpus becomes a clean corpus, by blocks that each decide about documents; and the quality of instruction data."""

from importlib import import_module

_HOME_OF = dict.fromkeys(("MinHashDedup", "candidate_pairs", "clusters", "signatures"), "minhash")
_HOME_OF |= {"SubstringDedup": "substring"}
_HOME_OF |= dict.fromkeys(("exact_answer", "measure_instructions", "select_instructions"), "instructions")
_HOME_OF |= {"curate": "pipeline", "funnel_table": "pipeline", "ApplyBlocks": "steps"}
_HOME_OF |= {"ClassifierScorer": "classifiers", "LanguageFilter": "language", "PIIRemover": "pii"}
_HOME_OF |= {"PerplexityFilter": "perplexity_filter", "QualityClassifier": "quality", "QualityRules": "quality_rules"}
_HOME_OF |= {"ToxicityFilter": "toxicity", "UrlFilter": "url_filter"}
"""Public names by the module that has them. They are imported when they are first asked for."""
__all__ = sorted(_HOME_OF)


def __getattr__(name):
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}")
    try:
        return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    except ModuleNotFoundError as error:
        told = f"{name} needs {error.name}: pip install 'lifecycle_hf[curation]'."
        raise ModuleNotFoundError(told, name=error.name) from error
