from collections import Counter
from itertools import product

import numpy as np
import pytest
from denoising_setting import restore
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from lifecycle_hf.data.denoising import (
    PREFIX_LM,
    SPAN_CORRUPTION,
    UL2_DENOISERS,
    Denoiser,
    DenoisingTokens,
    corrupt_spans,
    count_noise,
    example_rng,
    mask_tokens,
    planned_length,
    random_spans_mask,
    sentinels_needed,
)
from lifecycle_hf.data.rows import CausalRows, DenoisedRows, MaskedRows
from lifecycle_hf.data.special_tokens import add_denoising_tokens

EOS, MODES = 1, {"[R]": 901, "[S]": 902, "[X]": 903}
SENTINELS = np.arange(600, 900, dtype=np.int32)
TOKENS = DenoisingTokens(
    eos_id=EOS,
    vocab_size=1000,
    sentinel_ids=SENTINELS,
    mode_ids=MODES,
    mask_id=3,
    special_ids=np.array([0, EOS, 3, *SENTINELS, 901, 902, 903]),
)
DENOISERS = [*UL2_DENOISERS, SPAN_CORRUPTION, PREFIX_LM]
N = 10_000


def by_name(denoiser):
    return denoiser.name


def text(length, rng=None):
    return (rng or np.random.default_rng(0)).integers(4, 600, size=length, dtype=np.int32)


def test_ul2_settings_are_those_of_the_paper():
    assert [(d.mode, d.mean_span, d.rate) for d in UL2_DENOISERS] == [
        ("[R]", 3, 0.15),
        ("[R]", 8, 0.15),
        ("[S]", None, 0.25),
        ("[X]", 3, 0.5),
        ("[X]", 8, 0.5),
        ("[X]", 64, 0.15),
        ("[X]", 64, 0.5),
    ]


def test_corrupt_spans_of_the_t5_paper():
    # "Thank you for inviting me to your party last week": figure 2 of arXiv 1910.10683, words numbered from 10.
    ids = np.arange(10, 20)
    mask = np.isin(ids, [12, 13, 18])
    inputs, targets = corrupt_spans(ids, mask, np.array([900, 800]), EOS)
    assert inputs.tolist() == [10, 11, 900, 14, 15, 16, 17, 800, 19]
    assert targets.tolist() == [900, 12, 13, 800, 18, EOS]
    assert restore(inputs, targets, np.array([900, 800])).tolist() == ids.tolist()


def test_corrupt_spans_at_both_ends():
    inputs, targets = corrupt_spans(np.array([5, 6, 7]), np.array([True, False, True]), SENTINELS, EOS)
    assert inputs.tolist() == [600, 6, 601]
    assert targets.tolist() == [600, 5, 601, 7, EOS]


def test_restore_refuses_what_does_not_belong_together():
    with pytest.raises(ValueError, match=r"the inputs have the sentinels \[600\], the targets \[601\]"):
        restore(np.array([5, 600]), np.array([601, 6, EOS]), SENTINELS)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(DENOISERS), st.integers(2, 400), st.integers(0, 2**40))
def test_inputs_and_targets_restore_the_original(denoiser, length, seed):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 600, size=length)  # EOS among them, as behind each document
    inputs, targets = denoiser.corrupt(ids, rng, TOKENS)
    assert restore(inputs, targets, SENTINELS).tolist() == ids.tolist()
    largest = denoiser.sizes(length)
    assert len(inputs) + (denoiser.mode is not None) <= largest[0] and len(targets) <= largest[1]
    assert len(inputs) + len(targets) + (denoiser.mode is not None) == largest[2]


def spans_of(mask):
    return int(mask[0]) + int(np.count_nonzero(mask[1:] & ~mask[:-1]))


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 300), st.floats(0.01, 0.99), st.floats(1, 80), st.integers(0, 2**32), st.booleans())
def test_spans_mask_has_its_noise_and_its_spans(length, rate, mean_span, seed, rolled):
    options = {"rate": rate, "mean_span": mean_span, "random_roll": rolled}
    mask = random_spans_mask(length, np.random.default_rng(seed), **options)
    noise = int(mask.sum())
    assert len(mask) == length and (rolled or (not mask[0] and mask[-1]))
    assert noise == min(max(round(length * rate), 1), length - 1)
    assert spans_of(mask) == min(max(round(noise / mean_span), 1), noise, length - noise)


def possible(length, noise, spans):
    """Every mask with so much noise in so many spans, by trying all of them."""
    masks = (np.array(bits, dtype=bool) for bits in product((0, 1), repeat=length))
    return [mask for mask in masks if mask.sum() == noise and spans_of(mask) == spans]


@pytest.mark.parametrize("rolled", [True, False], ids=["random_roll", "T5"])
@pytest.mark.parametrize(
    ("length", "rate", "mean_span", "spans"), [(5, 0.4, 1, 2), (9, 0.4, 2, 2), (12, 0.15, 3, 1), (8, 0.5, 1.3, 3)]
)
def test_every_mask_is_equally_likely(length, rate, mean_span, spans, rolled):
    wanted = possible(length, count_noise(length, rate), spans)
    wanted = [mask.tobytes() for mask in wanted if rolled or (not mask[0] and mask[-1])]
    options, rng = {"rate": rate, "mean_span": mean_span, "random_roll": rolled}, np.random.default_rng(0)
    counts = Counter(random_spans_mask(length, rng, **options).tobytes() for _ in range(4000))
    assert counts.keys() == set(wanted)
    mean = 4000 / len(wanted)
    assert max(abs(count - mean) for count in counts.values()) <= 4.5 * np.sqrt(mean)


@pytest.mark.parametrize("length", [12, 60])
def test_span_corruption_hides_the_first_and_the_last_token_equally_often(length):
    def masks(**options):
        rng = np.random.default_rng(0)
        return np.array([random_spans_mask(length, rng, rate=0.15, mean_span=3, **options) for _ in range(3000)])

    hidden, fixed = masks().mean(0), masks(random_roll=False).mean(0)
    noise, spans = count_noise(length, 0.15), {12: 1, 60: 3}[length]
    # The kept tokens leave kept + 1 places for the spans; the first token is noise if a span has the first place.
    first = spans / (length - noise + 1)
    error = 4 * np.sqrt(first * (1 - first) / 3000)
    assert abs(hidden[0] - first) <= error and abs(hidden[-1] - first) <= error
    assert abs(hidden.mean() - noise / length) < 1e-9 and hidden.min() > 0
    inner = hidden[noise - 1 : length - noise + 1]
    assert np.abs(inner - inner.mean()).max() <= 0.05  # one place is as good as another
    assert fixed[0] == 0 and fixed[-1] == 1 and (spans > 1 or set(fixed) == {0, 1})


@pytest.mark.parametrize("denoiser", [d for d in UL2_DENOISERS if d.mean_span], ids=by_name)
def test_noise_rate_and_mean_span(denoiser):
    rng = np.random.default_rng(1)
    lengths = rng.integers(1000, 3000, size=N).tolist()
    masks = (random_spans_mask(n, rng, rate=denoiser.rate, mean_span=denoiser.mean_span) for n in lengths)
    noise, spans = np.array([(np.count_nonzero(mask), spans_of(mask)) for mask in masks]).T
    wanted = np.array(lengths) * denoiser.rate
    assert np.abs(noise - wanted).max() <= 1
    # Rounding moves a count by at most a half, so a sum of N counts has a standard error below √N / 2.
    assert abs(noise.sum() - wanted.sum()) <= 4 * np.sqrt(N) / 2
    assert abs(spans.sum() - noise.sum() / denoiser.mean_span) <= 4 * np.sqrt(N) / 2


def test_prefix_lm_splits():
    sequential = next(d for d in UL2_DENOISERS if d.mode == "[S]")
    inputs, targets = sequential.corrupt(np.arange(8), np.random.default_rng(0), TOKENS)
    assert (inputs.tolist(), targets.tolist()) == ([0, 1, 2, 3, 4, 5], [6, 7])
    prefixes = [len(PREFIX_LM.corrupt(np.arange(5), example_rng(0, 0, n), TOKENS)[0]) for n in range(N)]
    counts = np.bincount(prefixes, minlength=5)
    assert counts[0] == 0 and np.abs(counts[1:] - N / 4).max() <= 4 * np.sqrt(N * 3 / 16)


def test_masked_lm_rates():
    rng = np.random.default_rng(2)
    rows = rng.integers(0, 1000, size=(N, 128), dtype=np.int32)
    options = {"mask_id": TOKENS.mask_id, "vocab_size": 1000, "special_ids": TOKENS.special_ids}
    out = [mask_tokens(ids, example_rng(0, 0, n), **options) for n, ids in enumerate(rows)]
    inputs, labels = (np.stack(part) for part in zip(*out))
    special = np.isin(rows, TOKENS.special_ids)
    chosen = labels != -100
    assert not chosen[special].any()
    assert (inputs[~chosen] == rows[~chosen]).all() and (labels[chosen] == rows[chosen]).all()

    def near(count, total, probability):
        return abs(count - total * probability) <= 4 * np.sqrt(total * probability * (1 - probability))

    ordinary, total = 1000 - len(TOKENS.special_ids), chosen.sum()
    masked, same = inputs[chosen] == TOKENS.mask_id, inputs[chosen] == rows[chosen]
    assert near(total, (~special).sum(), 0.15)
    assert near(masked.sum(), total, 0.8)
    # One random token in `ordinary` is the original again.
    assert near(same.sum(), total, 0.1 + 0.1 / ordinary)
    drawn = inputs[chosen][~masked & ~same]
    assert not np.isin(drawn, TOKENS.special_ids).any() and len(np.unique(drawn)) == ordinary


def test_random_tokens_are_all_ordinary_ones():
    inputs, _ = mask_tokens(
        np.full(2000, 4), np.random.default_rng(0), rate=0.999, mask_id=2, vocab_size=8, special_ids=[5, 0, 2]
    )
    assert set(inputs.tolist()) == {1, 2, 3, 4, 6, 7}


def test_masked_lm_of_unsigned_ids():
    inputs, labels = mask_tokens(
        np.full(50, 4, dtype=np.uint16), np.random.default_rng(0), mask_id=2, vocab_size=8, special_ids=[0, 2]
    )
    assert inputs.dtype == np.uint16 and set(labels.tolist()) == {-100, 4}


# One stack, 512 tokens: text + 2 · spans + EOS + mode; e.g. X3 has 382 tokens, 191 noise, 64 spans: 382 + 128 + 2.
@pytest.mark.parametrize(
    "denoiser, length",
    list(zip(UL2_DENOISERS, [464, 492, 511, 382, 454, 508, 502])),
    ids=lambda value: str(value)[:20],
)
def test_planned_lengths_fill_512(denoiser, length):
    assert planned_length(denoiser, 512) == length
    row = DenoisedRows([denoiser], TOKENS, 512).row(0, text(length), np.random.default_rng(0))
    assert len(row["input_ids"]) == len(row["labels"]) == 512


def test_planned_length_is_that_of_t5():
    # seqio's compute_input_and_target_lengths(512, 0.15, 3) is (568, 114).
    assert planned_length(SPAN_CORRUPTION, 512, 114) == 568
    assert planned_length(SPAN_CORRUPTION, 512, 113) < 568
    row = DenoisedRows([SPAN_CORRUPTION], TOKENS, 512, target_length=114).row(0, text(568), np.random.default_rng(0))
    assert (len(row["input_ids"]), len(row["labels"])) == (512, 114)
    assert row["input_ids"][-1] == row["labels"][-1] == EOS


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(DENOISERS), st.integers(80, 4000))
def test_rows_fill_the_context(denoiser, context):
    length = planned_length(denoiser, context)
    assert context - 2 <= denoiser.sizes(length)[2] <= context < denoiser.sizes(length + 1)[2]
    length = planned_length(denoiser, context, context)
    inputs, targets, _ = denoiser.sizes(length + 1)
    assert inputs + 1 > context or targets > context


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(DENOISERS), st.integers(80, 500), st.integers(0, 99))
def test_rows_of_one_stack_align_labels(denoiser, context, seed):
    plan = DenoisedRows([denoiser], TOKENS, context)
    ids = text(int(plan.lengths[0]))
    inputs, targets = denoiser.corrupt(ids, np.random.default_rng(seed), TOKENS)
    row = plan.row(0, ids, np.random.default_rng(seed))
    mode = [MODES[denoiser.mode]] if denoiser.mode else []
    assert row["prefix_length"] == len(mode) + len(inputs)
    assert row["input_ids"].tolist() == mode + inputs.tolist() + targets.tolist()
    assert row["labels"].tolist() == [-100] * row["prefix_length"] + targets.tolist()


def test_rows_of_encoder_and_decoder():
    denoiser = Denoiser("hand", rate=0.25, mode="[S]")
    plan = DenoisedRows([denoiser], TOKENS, 8, target_length=8)
    # 8 tokens, 2 of them noise: mode + 6 + EOS just fit.
    assert plan.lengths.tolist() == [8]
    row = plan.row(0, np.arange(10, 18), np.random.default_rng(0))
    assert row["input_ids"].tolist() == [902, 10, 11, 12, 13, 14, 15, EOS]
    assert row["labels"].tolist() == [16, 17] and "prefix_length" not in row


def test_weights_set_how_often_a_denoiser_is_drawn():
    plan = DenoisedRows(UL2_DENOISERS, TOKENS, 512, weights=[0, 3, 0, 0, 0, 1, 0])
    counts = np.bincount(plan.draw(np.random.default_rng(0), N), minlength=7)
    assert counts[[0, 2, 3, 4, 6]].sum() == 0 and abs(counts[1] - 0.75 * N) <= 4 * np.sqrt(N * 3 / 16)
    even = np.bincount(DenoisedRows(UL2_DENOISERS, TOKENS, 512).draw(np.random.default_rng(0), N), minlength=7)
    assert np.abs(even - N / 7).max() <= 4 * np.sqrt(N * 6 / 49)


def test_noise_depends_on_seed_epoch_and_index_alone():
    draws = {key: example_rng(*key).integers(2**60) for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]}
    assert len(set(draws.values())) == 4
    assert all(example_rng(*key).integers(2**60) == draw for key, draw in draws.items())


def few(count):
    return DenoisingTokens(eos_id=EOS, vocab_size=1000, sentinel_ids=SENTINELS[:count])


WRONG = {
    "no sentinels": (
        lambda: DenoisedRows([SPAN_CORRUPTION], few(4), 512),
        r"'span_corruption' in a row of 465 tokens \(context_length=512\) makes 23 spans, and there are 4 sentinels. "
        r"Add more with add_denoising_tokens\(tokenizer, n_sentinels=23\)",
    ),
    "no sentinels for a mask": (
        lambda: corrupt_spans(np.arange(4), np.array([0, 1, 0, 1], dtype=bool), SENTINELS[:1], EOS),
        "the mask makes 2 spans, and there are 1 sentinels",
    ),
    "context below a span": (
        lambda: DenoisedRows(UL2_DENOISERS, TOKENS, 64),
        "denoiser 'X64': context_length=64 leaves room for 60 tokens of text, too few for a span of 64",
    ),
    "no context": (lambda: planned_length(PREFIX_LM, 1), "context_length=1 leaves room for 0 tokens"),
    "no target": (lambda: planned_length(SPAN_CORRUPTION, 99, 1), "context_length=99 and target_length=1 leaves room"),
    "no mode": (
        lambda: DenoisedRows(UL2_DENOISERS[:1], few(300), 512),
        r"its token '\[R\]' is none of \[\]. Add it: add_denoising_tokens",
    ),
    "weights": (
        lambda: DenoisedRows(UL2_DENOISERS, TOKENS, 512, weights=[1, 2]),
        r"weights=\[1.0, 2.0\]: one for each",
    ),
    "negative": (lambda: DenoisedRows([PREFIX_LM], TOKENS, 9, weights=[-1]), "none negative, not all zero"),
    "rate": (lambda: Denoiser("d", rate=1.5), "denoiser 'd': rate=1.5 must lie between 0 and 1"),
    "mean span": (lambda: Denoiser("d", rate=0.5, mean_span=0.5), "mean_span=0.5 must be at least 1"),
    "no rate": (lambda: Denoiser("d", rate=None, mean_span=3), "mean_span=3 needs a rate"),
    "one token": (lambda: count_noise(1, 0.15), "a row of 1 tokens can't be corrupted"),
    "no mask token": (lambda: MaskedRows(few(0), 512), r"needs a mask token: add_denoising_tokens\(tokenizer, mask="),
    "masked rate": (lambda: MaskedRows(TOKENS, 512, rate=0.0), "rate=0.0 must lie between 0 and 1"),
    "causal": (lambda: CausalRows(1), "context_length=1: a row needs at least 2 tokens"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_settings_are_refused_by_name(case):
    make, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        make()


def test_tokens_are_added_once(tokenizer):
    before, needed = len(tokenizer), sentinels_needed(UL2_DENOISERS, 128)
    # X3 at 128 tokens: 94 of text, 47 noise, 16 spans: 94 + 32 + 2.
    assert needed == 16
    tokens = add_denoising_tokens(tokenizer, n_sentinels=needed, modes=list(MODES), mask="<mask>")
    assert len(tokenizer) == before + 16 + 3 + 1 == tokens.vocab_size
    assert tokenizer.convert_ids_to_tokens(tokens.sentinel_ids[[0, 15]].tolist()) == ["<extra_id_0>", "<extra_id_15>"]
    assert tokens.mask_id == tokenizer.mask_token_id and tokens.eos_id == tokenizer.eos_token_id
    added = {*tokens.sentinel_ids.tolist(), *tokens.mode_ids.values(), tokens.mask_id, tokens.eos_id}
    assert added <= set(tokens.special_ids.tolist()) and len(added) == 21
    assert tokenizer.decode([tokens.mode_ids["[X]"]], skip_special_tokens=True) == ""
    again = add_denoising_tokens(tokenizer, n_sentinels=20, modes=list(MODES), mask="<mask>")
    assert len(tokenizer) == tokens.vocab_size + 4
    assert again.sentinel_ids[:16].tolist() == tokens.sentinel_ids.tolist() and again.mode_ids == tokens.mode_ids
    assert len(DenoisedRows(UL2_DENOISERS, tokens, 128).lengths) == 7


def test_a_tokenizer_of_fixed_vocabulary_is_refused(tokenizer):
    class FixedTokenizer(PreTrainedTokenizerFast):
        def _add_tokens(self, new_tokens, special_tokens=False):
            return 0

    fixed = FixedTokenizer(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>")
    with pytest.raises(ValueError, match=r"train: FixedTokenizer has no room for 3 .*\(<extra_id_0>, \[R\], <mask>\)"):
        add_denoising_tokens(fixed, n_sentinels=1, modes=["[R]"], mask="<mask>", where="train")
    with pytest.raises(ValueError, match="has no EOS token"):
        add_denoising_tokens(PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer))
