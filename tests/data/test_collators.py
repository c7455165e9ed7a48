import pytest
import torch

from lifecycle_hf.data.collators import length_mask, pad_sequences, prompt_lengths


def test_pad_right_and_left():
    rows = [[1, 2, 3], [4], []]
    assert pad_sequences(rows, 0).tolist() == [[1, 2, 3], [4, 0, 0], [0, 0, 0]]
    assert pad_sequences(rows, 9, side="left").tolist() == [[1, 2, 3], [9, 9, 4], [9, 9, 9]]
    assert pad_sequences(rows, 0).dtype == torch.long


def test_pad_errors():
    with pytest.raises(ValueError, match="no sequence"):
        pad_sequences([], 0)
    with pytest.raises(ValueError, match="middle"):
        pad_sequences([[1]], 0, side="middle")


def test_length_mask_comes_from_lengths():
    assert length_mask(torch.tensor([2, 0, 3]), 3).int().tolist() == [[1, 1, 0], [0, 0, 0], [1, 1, 1]]


def test_prompts_end_where_the_loss_begins():
    # right padding, left padding, text without a prompt, nothing to learn; a gap inside is no second prompt
    labels = torch.tensor(
        [[-100, -100, 5, -100, 6, -100], [-100, -100, -100, 5, 6, 7], [4, 5, 6, 7, 8, 9], [-100] * 6]
    )
    mask = torch.tensor([[1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1], [1] * 6, [1] * 6])
    assert prompt_lengths(labels, mask).tolist() == [[2], [1], [0], [6]]
    assert prompt_lengths(labels[:1]).tolist() == [[2]]


def test_every_packed_document_has_its_prompt():
    labels = torch.tensor([[-100, -100, 5, -100, 5, -100, -100], [-100, 5, -100, 5, -100, -100, 5]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1], [0, 1, 2, 3, 0, 1, 2]])
    assert prompt_lengths(labels, position_ids=positions).tolist() == [[2, 1, 2], [1, 2, 0]]
