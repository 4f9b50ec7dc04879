"""Batches made ahead: the same ones, in the same order, and no thread is left over."""

import threading
import time

import pytest

from data.prefetching import Prefetcher


@pytest.fixture(autouse=True)
def others():
    """Threads of other tests' trainers are not this file's matter."""
    OTHERS.clear()
    OTHERS.update(threading.enumerate())


OTHERS: set[threading.Thread] = set()


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch" and thread not in OTHERS]


def test_steps_come_in_order_and_as_made_without_it():
    with Prefetcher(lambda step: step * step) as ahead:
        assert [ahead.take(step) for step in range(5, 40)] == [step * step for step in range(5, 40)]
    assert not threads()


def test_other_step_than_the_next_begins_anew_from_there():
    made = []

    def make(step):
        made.append(step)
        return step

    with Prefetcher(make, ahead=1) as ahead:
        assert [ahead.take(step) for step in (3, 4, 10, 11, 4, 4)] == [3, 4, 10, 11, 4, 4]
        assert len(threads()) == 1
    assert set(made) <= {3, 4, 5, 6, 7, 10, 11, 12, 13, 14}


def test_no_more_is_made_ahead_than_asked():
    made = []

    def make(step):
        made.append(step)
        return step

    with Prefetcher(make, ahead=3) as ahead:
        ahead.take(0)
        time.sleep(0.3)
        assert made == [0, 1, 2, 3, 4], "one taken, three waiting, one in hand"


def test_next_batch_is_made_while_the_last_one_is_used():
    with Prefetcher(lambda step: time.sleep(0.02) or step + 1) as ahead:
        ahead.take(0)
        waited = 0.0
        for step in range(1, 11):
            time.sleep(0.1)
            begun = time.monotonic()
            ahead.take(step)
            waited += time.monotonic() - begun
    assert waited < 0.1, "without it 0.2 s"


def test_error_comes_with_its_step_and_the_next_try_begins_anew():
    broken = [True]

    def make(step):
        if step == 2 and broken:
            raise ValueError(f"step {step} is damaged")
        return step

    with Prefetcher(make) as ahead:
        assert ahead.take(0) == 0 and ahead.take(1) == 1
        with pytest.raises(ValueError, match="step 2 is damaged"):
            ahead.take(2)
        assert not threads()
        broken.clear()
        assert ahead.take(2) == 2


def test_closing_twice_or_unused_does_nothing():
    ahead = Prefetcher(lambda step: step)
    ahead.close()
    ahead.take(0)
    ahead.close()
    ahead.close()
    assert not threads()
