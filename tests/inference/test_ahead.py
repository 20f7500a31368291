"""Work ahead in a thread: the same items and errors in the same order, and no thread left over."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexselect.inference.ahead import ahead


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "flexselect" in thread.name]


@given(st.lists(st.integers(), max_size=20), st.integers(1, 4))
def test_items_come_in_order(items: list[int], depth: int) -> None:
    assert list(ahead(items, depth)) == items
    assert threads() == []


def test_an_error_comes_after_what_came_before_it() -> None:
    def broken() -> Iterator[int]:
        yield 1
        yield 2
        raise ValueError("the third")

    made = ahead(broken())
    assert [next(made), next(made)] == [1, 2]
    with pytest.raises(ValueError, match="the third") as error:
        next(made)
    # Whoever looks for the cause finds the place in the iterator.
    assert any(entry.name == "broken" for entry in error.traceback)
    assert threads() == []


def test_the_next_item_is_made_while_this_one_is_in_use() -> None:
    """Waits for the other side: one that is asked only when needed never gets there."""
    second = threading.Event()

    def items() -> Iterator[int]:
        yield 1
        second.set()
        yield 2

    made = ahead(items())
    assert next(made) == 1
    assert second.wait(timeout=60)
    assert list(made) == [2]


@pytest.mark.parametrize("depth", [1, 3])
def test_only_a_few_items_are_ahead(depth: int) -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(50):
            made.append(number)
            yield number

    for number in ahead(items(), depth):
        # In use, waiting, and one in the making.
        assert len(made) <= number + 1 + depth + 1


def test_giving_up_closes_the_iterator_and_ends_the_thread() -> None:
    closed = []

    def endless() -> Iterator[int]:
        try:
            while True:
                yield 0
        finally:
            closed.append(threading.current_thread().name)

    made = ahead(ahead(endless()))
    assert next(made) == 0
    made.close()
    assert threads() == []
    assert closed == ["flexselect-ahead"]
