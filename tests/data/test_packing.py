import pickle
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset
from denoising_setting import restore
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from lifecycle_hf.data.denoising import PREFIX_LM, UL2_DENOISERS, DenoisingTokens
from lifecycle_hf.data.packing import PackedDataset, RowDataset, RowStream, TokenStream
from lifecycle_hf.data.rows import CausalRows, DenoisedRows, MaskedRows

EOS = 2
SENTINELS = np.arange(600, 700)
TOKENS = DenoisingTokens(
    eos_id=EOS,
    vocab_size=710,
    sentinel_ids=SENTINELS,
    mode_ids={"[R]": 701, "[S]": 702, "[X]": 703},
    mask_id=3,
    special_ids=np.array([EOS, 3, *SENTINELS, 701, 702, 703]),
)
UL2 = DenoisedRows(UL2_DENOISERS, TOKENS, 96)
HAND = [[5, 6], [7], [], [8, 9, EOS]]


def corpus(tokens=20_000):
    """A stream in which each token tells its place, as far as 500 ids go; documents of 40 tokens and EOS."""
    places = np.arange(tokens) % 499 + 10
    return TokenStream.from_documents(places.reshape(-1, 40).tolist(), EOS)


def ids_of(rows):
    return [row["input_ids"].tolist() for row in rows]


class Lines:
    """Documents that are read anew by each `iter`."""

    def __iter__(self):
        for number in range(300):
            yield [number] * (number % 7)


@pytest.mark.parametrize(
    "documents",
    [
        HAND,
        [np.array(ids, dtype=np.int64) for ids in HAND],
        Dataset.from_dict({"input_ids": HAND, "other": ["a", "b", "c", "d"]}),
        Dataset.from_dict({"input_ids": [[8, 9, EOS], None, [5, 6], [7]]}).select([2, 3, 1, 0]),
        datasets.IterableDataset.from_generator(lambda: ({"input_ids": ids, "text": ""} for ids in HAND)),
    ],
    ids=["lists", "arrays", "dataset", "selected", "streamed"],
)
def test_documents_are_joined_by_eos(documents):
    stream = TokenStream.from_documents(documents, EOS)
    assert stream.ids.tolist() == [5, 6, EOS, 7, EOS, 8, 9, EOS]
    assert stream.starts.tolist() == [0, 3, 5]


DOCUMENTS = st.lists(st.lists(st.integers(0, 9), max_size=30), max_size=40)


@settings(max_examples=200, deadline=None)
@given(DOCUMENTS, st.integers(2, 17))
def test_every_token_is_packed_once(documents, context):
    joined = [token for ids in documents if ids for token in (ids if ids[-1] == EOS else [*ids, EOS])]
    if len(joined) < context:
        return
    packed = PackedDataset(TokenStream.from_documents(documents, EOS), context)
    rows = ids_of(packed)
    assert [token for row in rows for token in row] + joined[len(joined) - packed.dropped_tokens :] == joined
    assert all(len(row) == context for row in rows) and packed.dropped_tokens < context
    assert ids_of(RowStream(documents, CausalRows(context), EOS, seed=0)) == rows


def test_documents_of_a_row_are_told_apart():
    stream = TokenStream.from_documents([[5, 6, 7], [8], [9, 10]], EOS)
    # 5 6 7 EOS | 8 EOS | 9 10 EOS, cut to rows of 5 and of 3; a row that begins within a document counts from there,
    # and no model reads the label of a row's first token.
    packed = PackedDataset(stream, 5, across_documents=False)
    assert ids_of(packed) == [[5, 6, 7, EOS, 8]]
    assert packed[0]["labels"].tolist() == [5, 6, 7, EOS, -100]
    assert packed[0]["position_ids"].tolist() == [0, 1, 2, 3, 0]
    packed = PackedDataset(stream, 3, across_documents=False)
    assert ids_of(packed) == [[5, 6, 7], [EOS, 8, EOS], [9, 10, EOS]]
    assert [row["labels"].tolist() for row in packed] == [[5, 6, 7], [EOS, -100, EOS], [9, 10, EOS]]
    assert [row["position_ids"].tolist() for row in packed] == [[0, 1, 2], [0, 0, 1], [0, 1, 2]]


def test_documents_told_apart_do_not_see_each_other(tiny_llama):
    model = tiny_llama[0]()
    documents = [[5, 6, 7], [8, 9, 10, 11]]
    row = PackedDataset(TokenStream.from_documents(documents, EOS), 9, across_documents=False)[0]
    inputs = {name: torch.from_numpy(row[name])[None] for name in ("input_ids", "position_ids")}
    with torch.no_grad():
        together = model(**inputs, use_cache=False).logits[0, 4:]
        alone = model(input_ids=torch.tensor([[8, 9, 10, 11, EOS]])).logits[0]
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("epoch", [0, 1, 5])
@pytest.mark.parametrize(
    "plan", [UL2, DenoisedRows([PREFIX_LM], TOKENS, 32), CausalRows(24)], ids=lambda p: p.names[0]
)
def test_each_epoch_reads_the_rotated_stream_once(plan, epoch):
    stream = corpus()
    rows = RowDataset(stream, plan, seed=3)
    rows.set_epoch(epoch)

    def original(row):
        if "prefix_length" not in row:
            return row["input_ids"].tolist()
        ids, prefix = row["input_ids"], row["prefix_length"]
        mode = UL2_DENOISERS[row["denoiser"]].mode if plan is UL2 else None
        assert mode is None or ids[0] == TOKENS.mode_ids[mode]
        return restore(ids[int(mode is not None) : prefix], ids[prefix:], SENTINELS).tolist()

    read = [token for row in rows for token in original(row)]
    assert len(read) + rows.dropped_tokens == len(stream) and rows.dropped_tokens < plan.lengths.max()
    offsets = [n for n in range(len(stream)) if stream.ids[n] == read[0]]
    assert any(np.roll(stream.ids, -offset)[: len(read)].tolist() == read for offset in offsets)


def test_epochs_differ_in_rotation_and_noise_but_not_in_length():
    rows = RowDataset(corpus(), UL2, seed=0)
    first, kinds = ids_of(rows), [row["denoiser"] for row in rows]
    assert all(94 <= len(row) <= 96 for row in first)
    rows.set_epoch(1)
    assert len(rows) == len(first) and [row["denoiser"] for row in rows] == kinds
    assert sum(a == b for a, b in zip(first, ids_of(rows))) == 0
    rows.set_epoch(0)
    assert ids_of(rows) == first == ids_of(RowDataset(corpus(), UL2, seed=0))
    assert ids_of(RowDataset(corpus(), UL2, seed=1)) != first


def test_denoisers_come_as_often_as_their_weights():
    rows = RowDataset(corpus(400_000), UL2, seed=0)
    counts = Counter(rows[index]["denoiser"] for index in range(len(rows)))
    share = np.array([counts[kind] for kind in range(7)]) / len(rows)
    assert np.abs(share - 1 / 7).max() <= 4 * np.sqrt(6 / 49 / len(rows))


@pytest.mark.parametrize("workers", [1, 2])
def test_rows_do_not_depend_on_workers(workers):
    rows = RowDataset(corpus(4000), UL2, seed=0)
    loader = DataLoader(rows, batch_size=None, num_workers=workers, persistent_workers=True)
    for epoch in (0, 1):  # the workers, which live on, see the second epoch
        rows.set_epoch(epoch)
        assert ids_of(loader) == ids_of(rows)


def test_rows_outlive_a_restart():
    rows = RowDataset(corpus(4000), MaskedRows(TOKENS, 32), seed=0)
    rows.set_epoch(2)
    again = pickle.loads(pickle.dumps(rows.stream.ids))
    fresh = RowDataset(TokenStream(again.astype(np.uint16), rows.stream.starts), MaskedRows(TOKENS, 32), seed=0)
    fresh.set_epoch(2)
    assert ids_of(fresh) == ids_of(rows)
    assert all((row["labels"] != -100).sum() == (row["labels"] >= 0).sum() for row in fresh)
    with pytest.raises(IndexError):
        rows[len(rows)]


def streamed_dataset():
    return datasets.IterableDataset.from_generator(lambda: ({"input_ids": ids} for ids in Lines()))


@pytest.mark.parametrize("documents", [Lines(), streamed_dataset()], ids=["iterable", "streamed dataset"])
@pytest.mark.parametrize("workers, world", [(0, 2), (2, 1), (2, 2)])
def test_streamed_rows_are_shared_out_once(documents, workers, world):
    plan = DenoisedRows([PREFIX_LM, *UL2_DENOISERS[:5]], TOKENS, 48)
    whole = ids_of(RowStream(documents, plan, EOS, seed=0))
    assert len(whole) > 15 and len({len(row) for row in whole}) <= 3
    shares = [
        ids_of(
            DataLoader(RowStream(documents, plan, EOS, seed=0, rank=rank, world_size=world), None, num_workers=workers)
        )
        for rank in range(world)
    ]
    assert sorted(row for share in shares for row in share) == sorted(whole)
    assert max(map(len, shares)) - min(map(len, shares)) <= max(workers, 1)


def test_streamed_epochs_differ_in_noise():
    rows = RowStream(Lines(), UL2, EOS, seed=0)
    first = ids_of(rows)
    assert ids_of(rows) == first
    rows.set_epoch(1)
    assert ids_of(rows) != first


def test_streamed_text_is_packed_as_it_is():
    rows = ids_of(RowStream(Lines(), CausalRows(16), EOS, seed=0))
    assert rows == ids_of(PackedDataset(TokenStream.from_documents(Lines(), EOS), 16))


SHORT = TokenStream.from_documents([[5, 6, 7]], EOS, "eval_dataset")
WRONG = {
    "empty": (
        lambda: TokenStream.from_documents([[], []], EOS, "eval_dataset"),
        "eval_dataset: the corpus has no token",
    ),
    "column": (
        lambda: TokenStream.from_documents(Dataset.from_dict({"text": ["a"]}), EOS),
        r"train_dataset: packing reads the column 'input_ids', not \['text'\]. Tokenise first",
    ),
    "text": (lambda: TokenStream.from_documents(["a b"], EOS), "reads lists of token ids, not str. Tokenise first"),
    "short": (lambda: PackedDataset(SHORT, 8), "eval_dataset: the corpus has 4 tokens, fewer than the 8 of one"),
    "short rows": (lambda: RowDataset(SHORT, CausalRows(8), seed=0), "eval_dataset: the corpus has 4 tokens, fewer"),
    "short rows of a stream": (
        lambda: list(RowStream([[5]], CausalRows(8), EOS, seed=0, where="eval_dataset")),
        "eval_dataset: the corpus has 2 tokens, fewer than the 8",
    ),
    "text in a stream": (
        lambda: list(RowStream(["a b"], CausalRows(8), EOS, seed=0, where="eval_dataset")),
        "eval_dataset: packing reads lists of token ids, not str",
    ),
    "empty stream": (lambda: list(RowStream([], CausalRows(8), EOS, seed=0)), "the corpus has 0 tokens"),
    "context": (lambda: PackedDataset(SHORT, 1), "context_length=1: a row needs at least 2 tokens"),
    "read once": (
        lambda: RowStream(iter([[5]]), CausalRows(8), EOS, seed=0),
        "a list_iterator, which can be read only",
    ),
    "rank": (lambda: RowStream([[5]], CausalRows(8), EOS, seed=0, rank=2, world_size=2), "rank=2 must lie between 0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_corpora_are_refused_by_name(case):
    make, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        make()
