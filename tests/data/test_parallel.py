"""Processes that keep the order, pass errors on, and leave nothing behind."""

import time
from collections.abc import Iterator

import pytest

from sparsecod_mcore.data.parallel import available_cores, ordered_map
from sparsecod_mcore.errors import UserError


def slow_for_even(number: int) -> int:
    time.sleep(0.02 * (number % 2 == 0))
    if number == 13:
        raise UserError("13 is not accepted")
    return number * number


@pytest.mark.parametrize("workers", [1, 3])
def test_results_keep_the_order(workers: int) -> None:
    assert list(ordered_map(slow_for_even, range(12), workers)) == [n * n for n in range(12)]


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_comes_in_its_place(workers: int) -> None:
    results = ordered_map(slow_for_even, range(40), workers)
    assert [next(results) for _ in range(13)] == [n * n for n in range(13)]
    with pytest.raises(UserError, match="13 is not accepted"):
        next(results)


def test_input_is_drawn_only_a_few_ahead() -> None:
    drawn: list[int] = []

    def numbers() -> Iterator[int]:
        for number in range(14, 200):
            drawn.append(number)
            yield number

    results = ordered_map(slow_for_even, numbers(), workers=2)
    assert next(results) == 14 * 14
    assert len(drawn) <= 4
    results.close()


def test_there_is_a_core() -> None:
    assert available_cores() >= 1
