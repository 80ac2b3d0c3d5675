"""Token ids of texts and lists, and sequences cut and packed from them."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.byte_tokenizer import byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from spqr_jax.texts import calibration_sequences, integer_ids, pack, random_windows, token_ids

TOKENIZER = byte_tokenizer()
IDS = np.arange(10)


@pytest.mark.parametrize(
    "same",
    [
        IDS,
        IDS[None],
        IDS.tolist(),
        [IDS.tolist()],
        [[0], [1, 2, 3], [4, 5, 6, 7, 8, 9]],
        jnp.arange(10),
        [IDS[:3], IDS[3:]],
    ],
    ids=str,
)
def test_forms_of_the_same_ids(same: object) -> None:
    np.testing.assert_array_equal(token_ids(same), IDS)
    np.testing.assert_array_equal(random_windows(same, 3, 4), random_windows(IDS, 3, 4))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1.5, 2], "type float64, such as 1.5"),
        (np.array([1.0, 2.0]), "type float64"),
        (np.array([0.5], np.float16), "type float16"),
        ([True, False], "type bool"),
        ([[1, 2], [True]], "type bool"),
        ([[1, 2], [0.5, 1]], "type float64"),
        ([1 + 0j], "type complex128"),
        ([2**40], "token id 1099511627776 exceeds 32 bits"),
        (np.array([2**32 + 5], np.uint64), "exceeds 32 bits"),
        ([-(2**40)], "exceeds 32 bits"),
        (["sky", 5], "among the texts is a int"),
        ("sky", "no tokenizer"),
        (["sky", "sea"], "no tokenizer"),
    ],
    ids=str,
)
def test_what_is_no_token_id_is_refused(ids: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        token_ids(ids)
    with pytest.raises(ValueError, match=message):
        random_windows(ids, 1, 1)


def test_no_ids_are_integers() -> None:
    assert integer_ids([]).dtype == np.int32
    assert token_ids([[], [1]]).tolist() == [1]


@given(st.lists(st.lists(st.integers(0, 99), max_size=9), min_size=1, max_size=9), st.integers(1, 9))
def test_packing_keeps_the_order_and_drops_less_than_a_sequence(lists: list[list[int]], length: int) -> None:
    joined = [*itertools.chain(*lists)]
    if len(joined) < length:
        with pytest.raises(ValueError, match=f"has {len(joined)} tokens, too few for windows of {length}"):
            pack(lists, length=length)
        return
    packed = pack(lists, length=length)
    assert packed.shape[1] == length
    assert packed.reshape(-1).tolist() == joined[: packed.size]
    assert len(joined) - packed.size < length


def test_strings_are_joined_by_an_empty_line() -> None:
    expected = TOKENIZER.encode("sky\n\nsea", add_special_tokens=False)
    assert token_ids(["sky", "sea"], TOKENIZER).tolist() == expected
    assert token_ids("sky\n\nsea", TOKENIZER).tolist() == expected


def test_a_text_of_one_window_is_one_window() -> None:
    np.testing.assert_array_equal(random_windows(IDS, 1, 10), IDS[None])
    np.testing.assert_array_equal(random_windows(IDS[None], 2, 10), [IDS, IDS])
    np.testing.assert_array_equal(pack(IDS, length=10), IDS[None])
    with pytest.raises(ValueError, match="has 10 tokens, too few for windows of 11"):
        random_windows(IDS, 1, 11)


def test_calibration_sequences_of_equal_length_stay() -> None:
    for same in (IDS.reshape(2, 5), IDS.reshape(2, 5).tolist()):
        np.testing.assert_array_equal(calibration_sequences(same, 3), IDS.reshape(2, 5))


def test_calibration_sequences_of_unequal_length_are_packed() -> None:
    lists = [[0, 1, 2], [3], [4, 5, 6, 7, 8, 9]]
    np.testing.assert_array_equal(calibration_sequences(lists, 5), IDS.reshape(2, 5))
    np.testing.assert_array_equal(calibration_sequences(lists, 99), IDS[None])
    long = ["a" * 600, "b" * 600]
    assert calibration_sequences(long, 2048, TOKENIZER).shape == (2, 512)
    assert calibration_sequences("ab", 64, TOKENIZER).shape == (1, 2)
