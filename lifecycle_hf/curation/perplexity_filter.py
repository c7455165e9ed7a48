"""Remove documents that a reference language model finds too surprising, or too easy, for their domain."""

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lifecycle_hf.curation.decisions import Decision
from lifecycle_hf.evaluation.metrics import completion_nll
from lifecycle_hf.models.loading import load_causal_lm, load_tokenizer


class PerplexityFilter:
    """Remove documents whose loss under a reference model is outside the quantiles of their domain.

    The loss is −1/N Σ_t log p(x_t | x_<t) over the N tokens of the document, nats, and kept as the score "nll". The
    first token is predicted from BOS, or from EOS where there is no BOS; of a tokenizer without either it is given. A
    document that is longer than the context is read in windows, each with the half of a context before it. A document
    without a token to predict has no score and is kept.

    Args:
        model: causal LM, trained on trusted text, or its path or name.
        tokenizer: its tokenizer; by default the one at the path.
        lower, upper: quantiles of a domain between which documents are kept; 0 and 1 are no bound.
        thresholds: {domain: (lowest, highest)} of an earlier `fit`, "" for documents without or of unknown domain.
        context: tokens of a window; by default those of the model, at most 1024.
        batch_size: windows that are read together.

    Raises:
        ValueError: the quantiles are not 0 ≤ lower < upper ≤ 1, the context is below 2, or the model is an object
            without a tokenizer.

    Reference: CCNet, https://arxiv.org/abs/1911.00359, section 3.5.
    """

    name = "perplexity"

    def __init__(
        self, model: str | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, *, lower: float = 0.0,
        upper: float = 0.9, thresholds: Mapping[str, tuple[float, float]] | None = None, context: int | None = None,
        batch_size: int = 8,
    ):  # fmt: skip
        if not 0 <= lower < upper <= 1:
            raise ValueError(f"PerplexityFilter: {lower=} and {upper=} must be quantiles, 0 ≤ lower < upper ≤ 1.")
        if context is not None and context < 2:
            raise ValueError(
                f"PerplexityFilter: {context=} must be at least 2, one token that is given and one predicted."
            )
        if tokenizer is None and not isinstance(model, str):
            raise ValueError("PerplexityFilter: the model is an object, so give its tokenizer too.")
        self.model, self.tokenizer, self.context, self.batch_size = model, tokenizer, context, batch_size
        self.lower, self.upper, self.thresholds = lower, upper, dict(thresholds or {})

    def __getstate__(self):
        return {key: value for key, value in vars(self).items() if key != "_loaded"}

    @cached_property
    def _loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, int]:
        model = load_causal_lm(self.model)
        tokenizer = self.tokenizer or load_tokenizer(self.model)
        most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1024
        return model, tokenizer, self.context or min(most, 1024)

    def scores(self, texts: Sequence[str]) -> np.ndarray:
        """Return the loss of each text, nats per token, [N]; NaN where there is no token to predict."""
        model, tokenizer, context = self._loaded
        start = [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None][:1]
        rows = [start + ids for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]] if texts else []
        prompts, completions, owners, half = [], [], [], context // 2
        for i, row in enumerate(rows):
            at = 1
            while at < len(row):
                prompts.append(row[:1] if at == 1 else row[at - half : at])
                completions.append(row[at : context if at == 1 else at + context - half])
                owners.append(i)
                at += len(completions[-1])
        if not prompts:
            return np.full(len(texts), np.nan)
        sums = completion_nll(model, prompts, completions, batch_size=self.batch_size)
        tokens = np.bincount(owners, weights=[len(part) for part in completions], minlength=len(texts))
        with np.errstate(invalid="ignore"):
            return np.bincount(owners, weights=sums, minlength=len(texts)) / tokens

    def fit(self, texts: Sequence[str], domains: Sequence[str | None] | None = None) -> "PerplexityFilter":
        """Set the thresholds of each domain, and of all together under "", on a sample of documents; return self.

        The model should not have been trained on these documents: it would find them easier than new ones.

        Raises:
            ValueError: no document has a token to predict.
        """
        scores = self.scores(texts)
        known = np.isfinite(scores)
        if not known.any():
            raise ValueError(f"PerplexityFilter.fit got {len(texts)} texts without a token to predict: give a sample.")
        names = np.array([domain or "" for domain in domains or [""] * len(texts)], dtype=object)
        groups = {name: scores[known & (names == name)] for name in sorted(set(names[known]))} | {"": scores[known]}
        self.thresholds = {
            name: (
                float(np.quantile(values, self.lower)) if self.lower > 0 else 0.0,
                float(np.quantile(values, self.upper)) if self.upper < 1 else float("inf"),
            )
            for name, values in groups.items()
        }
        return self

    def __call__(self, texts: Sequence[str], *, urls=None, domains=None) -> list[Decision]:
        """Return for each text whether its loss is within the thresholds of its domain.

        Raises:
            ValueError: there are no thresholds.
        """
        if "" not in self.thresholds:
            raise ValueError(
                "PerplexityFilter has no thresholds: call `fit` on a sample, or give those of an earlier fit."
            )
        decisions = []
        for score, domain in zip(self.scores(texts).tolist(), domains or [None] * len(texts), strict=True):
            low, high = self.thresholds.get(domain or "", self.thresholds[""])
            if np.isnan(score):
                decisions.append(Decision())
            else:
                decisions.append(Decision("" if low <= score <= high else "perplexity", scores={"nll": score}))
        return decisions
