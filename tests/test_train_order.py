"""The data order: pure, complete, shuffled anew each epoch; lanes read whole files in order."""

import itertools
import random

import pytest

from ttt.errors import ConfigError
from ttt.train.order import FileLaneOrder, Group, LaneOrder, WindowOrder, deal, once

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


# --- files in random order, and groups with weights ---


def layouts(count, *, most_groups=1, most_files=7):
    """Random files, groups of them with weights, batch sizes and seeds."""
    for number in range(count):
        rng = random.Random(number)
        files, groups, window = [], [], 0
        for group in range(rng.randint(1, most_groups)):
            first = len(files)
            for _ in range(rng.randint(1, most_files)):
                files.append(range(window, window := window + rng.choice((1, 1, 2, 3, 5, 9))))
            weight = rng.choice((0.1, 0.5, 1, 1, 2, 7))
            groups.append(Group(range(first, len(files)), weight, f"source {group}"))
        yield files, groups, rng.randint(1, 5), rng.randrange(1 << 40)


def runs_of_files(windows, files):
    """Windows as a list of files, each of which must be read whole and in order."""
    of = {file.start: file for file in files}
    read, rest = [], list(windows)
    while rest:
        file = of[rest[0]]
        assert rest[: len(file)] == list(file)[: len(rest)]
        read.append(file)
        rest = rest[len(file) :]
    return read


def test_files_are_shuffled_anew_each_epoch_and_their_windows_stay_in_order():
    orders = set()
    for files, _, batch_size, seed in layouts(25):
        order = WindowOrder(files, batch_size=batch_size, shuffle="files", seed=seed)
        count = sum(map(len, files))
        read = flat(order, 3 * count)[: 3 * count]
        for start in (0, count, 2 * count):
            epoch = read[start : start + count]
            assert sorted(epoch) == list(range(count))
            orders.add(tuple(file.start for file in runs_of_files(epoch, files)) if len(files) > 4 else ())
    assert len(orders) > 30  # of the layouts with many files, hardly any order comes twice


def test_the_order_of_files_is_pinned():
    order = WindowOrder(FILES, batch_size=12, shuffle="files", seed=0)
    assert order.at(0).windows == (8, 9, 10, 11, 7, 5, 6, 0, 1, 2, 3, 4)
    lanes = FileLaneOrder(FILES, batch_size=2, shuffle=True, seed=0)
    assert [lanes.at(number).windows for number in range(7)] == [
        (8, 7),
        (9, 5),
        (10, 6),
        (11, 0),
        (5, 1),
        (6, 2),
        (7, 3),
    ]


@pytest.mark.parametrize("shuffle", [True, False, "files"])
def test_each_group_gives_its_share_at_every_moment_and_each_of_its_windows_once_an_epoch_of_its_own(shuffle):
    for files, groups, batch_size, seed in layouts(15, most_groups=4, most_files=4):
        order = WindowOrder(files, batch_size=batch_size, shuffle=shuffle, seed=seed, groups=groups)
        read = flat(order, 200 // batch_size)
        total = sum(group.weight for group in groups)
        for group in groups:
            own = [window for file in files[group.files.start : group.files.stop] for window in file]
            at = [place for place, window in enumerate(read) if window in own]
            for place in (10, 50, len(read)):
                given = sum(1 for one in at if one < place)
                assert abs(given - place * group.weight / total) <= len(groups) / 2
            mine = [read[place] for place in at]
            for start in range(0, len(mine) - len(own) + 1, len(own)):
                epoch = mine[start : start + len(own)]
                assert sorted(epoch) == own
                if shuffle != True:  # noqa: E712 - "files" is true too
                    runs_of_files(epoch, files)


def test_of_one_group_the_order_is_that_without_groups():
    for files, _, batch_size, seed in layouts(5):
        for shuffle in (True, False, "files"):
            plain = WindowOrder(files, batch_size=batch_size, shuffle=shuffle, seed=seed)
            grouped = WindowOrder(
                files, batch_size=batch_size, shuffle=shuffle, seed=seed, groups=[Group(range(len(files)), 3.0)]
            )
            assert flat(plain, 30) == flat(grouped, 30)


def lanes_of(order, passes):
    """Windows and starts of each row."""
    read = [order.at(number) for number in range(passes)]
    return [
        [(reading.windows[row], reading.starts[row]) for reading in read] for row in range(len(read[0].windows))
    ], read


def rows_that_fit(files, groups, wanted):
    """At most so many rows, and so few that no group's share needs more files at once than it has."""
    total = sum(group.weight for group in groups)
    return max(1, min([wanted, *(int(len(group.files) * total / group.weight) for group in groups)]))


def holds_for_lanes(make, count=20, most_groups=1):
    """Whether each row reads whole files, no file is in two rows, and the file read least often is next."""
    for files, groups, batch_size, seed in layouts(count, most_groups=most_groups):
        rows = rows_that_fit(files, groups, batch_size)
        lanes, read = lanes_of(make(files, batch_size=rows, seed=seed, groups=groups), 80)
        for lane in lanes:
            begun = runs_of_files([window for window, _ in lane], files)
            starts = {0, *itertools.accumulate(map(len, begun))}
            if any(start != (place in starts) for place, (_, start) in enumerate(lane)):
                return "starts"
        of = {window: number for number, file in enumerate(files) for window in file}
        group_of = {number: group for group in groups for number in group.files}
        times = [0] * len(files)
        for reading in read:
            now = [of[window] for window in reading.windows]
            if len(set(now)) < len(now):
                return "a file in two rows"
            begun = [number for number, start in zip(now, reading.starts, strict=True) if start]
            for number in begun:
                times[number] += 1
            for number in begun:
                idle = [other for other in group_of[number].files if other not in now]
                if any(times[other] < times[number] - 1 for other in idle):
                    return "another was due"
    return "right"


def in_random_order(files, *, batch_size, seed, groups):
    return FileLaneOrder(files, batch_size=batch_size, shuffle=True, seed=seed, groups=groups)


def test_with_carried_states_each_row_reads_whole_files_of_its_own():
    assert holds_for_lanes(in_random_order) == "right"
    assert holds_for_lanes(in_random_order, most_groups=3) == "right"


def test_lanes_that_take_the_next_file_unseen_are_caught():
    class Forgetful(FileLaneOrder):
        """Files go back when they are taken."""

        def _change_files(self, now):
            super()._change_files(now)
            for group in self._groups:
                group.__init__(group.numbers.start, group._files, group._weight, None)

    assert holds_for_lanes(lambda files, **told: Forgetful(files, shuffle=True, **told)) != "right"


def test_files_of_equal_length_are_each_read_once_an_epoch_by_all_rows_together():
    files = [range(3 * number, 3 * number + 3) for number in range(6)]
    lanes, _ = lanes_of(FileLaneOrder(files, batch_size=3, shuffle=True, seed=4), 3 * 2 * 4)
    for epoch in range(4):
        read = [window for lane in lanes for window, _ in lane[6 * epoch : 6 * epoch + 6]]
        assert sorted(read) == list(range(18))
    assert len({tuple(window for window, _ in lane[6 * epoch :][:6]) for lane in lanes for epoch in range(4)}) > 6


def test_lanes_are_a_pure_function_of_seed_and_pass():
    for files, groups, _, seed in layouts(10, most_groups=3):
        forwards = FileLaneOrder(files, batch_size=1, shuffle=True, seed=seed, groups=groups)
        passes = [forwards.at(number) for number in range(60)]
        fresh = FileLaneOrder(files, batch_size=1, shuffle=True, seed=seed, groups=groups)
        assert [fresh.at(number) for number in reversed(range(60))] == passes[::-1]
        assert FileLaneOrder(files, batch_size=1, shuffle=True, seed=seed, groups=groups).at(41) == passes[41]


@pytest.mark.parametrize("shuffle", [True, False])
def test_lanes_give_each_group_its_share(shuffle):
    files = [*(range(4 * n, 4 * n + 4) for n in range(5)), range(20, 50), range(50, 51), range(51, 60)]
    groups = [Group(range(0, 5), 2.0), Group(range(5, 8), 1.0)]
    order = FileLaneOrder(files, batch_size=3, shuffle=shuffle, seed=1, groups=groups)
    read = flat(order, 2000)
    assert sum(window < 20 for window in read) / len(read) == pytest.approx(2 / 3, abs=0.01)
    begun = [window for window in read if window in (0, 4, 8, 12, 16)][:15]
    assert (begun == [0, 4, 8, 12, 16] * 3) == (not shuffle)


def test_a_share_that_needs_more_files_at_once_than_there_are_is_refused():
    groups = [Group(range(0, 1), 3.0, "a.jsonl"), Group(range(1, 4), 1.0, "b.jsonl")]
    with pytest.raises(ConfigError, match=r"a\.jsonl has 1 files, but its share of 75% is 3 of 4 rows"):
        FileLaneOrder(FILES, batch_size=4, shuffle=True, seed=0, groups=groups)
    with pytest.raises(ConfigError, match=r"data has 4; write batch_size: 4 or less"):
        FileLaneOrder(FILES, batch_size=5, shuffle=True, seed=0)


def test_a_group_without_a_window_is_refused_by_name():
    groups = [Group(range(0, 2)), Group(range(2, 3), 1.0, "b.jsonl")]
    with pytest.raises(ConfigError, match=r"b\.jsonl has not one window; leave it out"):
        WindowOrder([range(0, 2), range(2, 3), range(3, 3)], batch_size=1, shuffle=True, seed=0, groups=groups)
