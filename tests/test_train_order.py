"""The data order: pure, complete, shuffled anew each epoch; lanes read whole files in order."""

import itertools

import pytest

from ttt.errors import ConfigError
from ttt.train.order import LaneOrder, WindowOrder, deal, once

FILES = [range(0, 5), range(5, 7), range(7, 8), range(8, 12)]


def flat(order, passes):
    return [window for number in range(passes) for window in order.at(number).windows]


@pytest.mark.parametrize("batch_size", [1, 3, 5])
def test_shuffled_order_reads_each_window_once_an_epoch_and_differs_between_epochs(batch_size):
    order = WindowOrder(FILES, batch_size=batch_size, shuffle=True, seed=3)
    read = flat(order, 3 * 12)[: 3 * 12]
    epochs = [read[start : start + 12] for start in (0, 12, 24)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != list(range(12))


def test_order_is_a_pure_function_of_seed_and_pass():
    first = WindowOrder(FILES, batch_size=4, shuffle=True, seed=7)
    forwards = [first.at(number) for number in range(20)]
    second = WindowOrder(FILES, batch_size=4, shuffle=True, seed=7)
    assert [second.at(number) for number in reversed(range(20))] == forwards[::-1]
    other = WindowOrder(FILES, batch_size=4, shuffle=True, seed=8)
    assert [other.at(number) for number in range(20)] != forwards


def test_the_permutation_is_pinned():
    """A new numpy or an edit here must not silently change the order that a resumed run continues with."""
    order = WindowOrder([range(0, 8)], batch_size=8, shuffle=True, seed=0)
    assert order.at(0).windows == (3, 2, 1, 6, 0, 7, 4, 5)
    assert order.at(1).windows == (7, 4, 5, 1, 6, 2, 0, 3)


def test_accumulated_passes_read_what_one_larger_batch_reads():
    small = WindowOrder(FILES, batch_size=2, shuffle=True, seed=1)
    large = WindowOrder(FILES, batch_size=6, shuffle=True, seed=1)
    assert flat(small, 30) == flat(large, 10)


def test_unshuffled_order_is_the_order_of_the_files():
    order = WindowOrder(FILES, batch_size=5, shuffle=False, seed=0)
    assert flat(order, 5) == [*range(12), *range(12), 0]
    assert order.at(1).starts == (True, False, True, True, False)


def test_each_lane_reads_whole_files_in_order_and_marks_where_they_start():
    order = LaneOrder(FILES, batch_size=2)
    passes = [order.at(number) for number in range(24)]
    assert {window for reading in passes for window in reading.windows} == set(range(12))
    for row in range(2):
        before = None
        for reading in passes:
            window, start = reading.windows[row], reading.starts[row]
            assert start == (window in {0, 5, 7, 8})
            assert start or window == before + 1
            before = window


def test_lanes_are_balanced_by_length():
    lanes = deal(FILES, 2)
    assert sorted(sum(map(len, lane)) for lane in lanes) == [6, 6]
    assert sorted(file.start for lane in lanes for file in lane) == [0, 5, 7, 8]


def test_fewer_files_than_lanes_is_refused_with_the_way_out():
    with pytest.raises(ConfigError, match=r"batch_size: 5 .* the data has 4; write batch_size: 4 or less"):
        LaneOrder([*FILES, range(12, 12)], batch_size=5)


@pytest.mark.parametrize("files", [[], [range(0, 0)]])
def test_no_window_is_refused(files):
    for make in (
        lambda: WindowOrder(files, batch_size=1, shuffle=True, seed=0),
        lambda: LaneOrder(files, batch_size=1),
        lambda: once(files, batch_size=2, lanes=True),
        lambda: once(files, batch_size=2, lanes=False),
    ):
        with pytest.raises(ConfigError, match="not one window"):
            make()


@pytest.mark.parametrize("lanes", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_evaluation_reads_every_window_once(lanes, batch_size):
    readings = once(FILES, batch_size=batch_size, lanes=lanes)
    assert sorted(window for reading in readings for window in reading.windows) == list(range(12))


def test_evaluation_lanes_shrink_from_the_end_and_keep_their_rows():
    readings = once(FILES, batch_size=3, lanes=True)
    sizes = [len(reading.windows) for reading in readings]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 3
    assert sizes[-1] < 3
    for before, after in itertools.pairwise(readings):
        for row, window in enumerate(after.windows):
            assert after.starts[row] or window == before.windows[row] + 1
