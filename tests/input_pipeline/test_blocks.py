"""The order of blocks: every row once, the same batches with any number of processes, resumed at any step."""

import itertools

import numpy as np
import pytest
import tensorflow as tf

from input_pipeline.blocks import BlockOrder, shuffled
from input_pipeline.graph import require
from input_pipeline.lanes import LaneStream
from input_pipeline.sources import Blocks
from input_pipeline.sources.together import row_by_row


class Made:
    """Blocks of so many rows each. `held`: {block: users}; `most`: how many were held at a time; `holds`: in order."""

    def __init__(self, rows):
        self.rows, self.held, self.most, self.holds = np.array(rows), {}, 0, []
        self.first = np.cumsum(self.rows) - self.rows
        self.of_row = np.repeat(np.arange(len(rows)), rows)

    @property
    def blocks(self):
        return Blocks(self.first, self.rows, 10 * int(self.rows.sum()), self.hold, self.drop)

    def order(self, lanes, window_rows, seed=5):
        return BlockOrder(self.blocks, seed=seed, lanes=lanes, window_bytes=10 * window_rows)

    def hold(self, block, user):
        if block not in self.held:
            self.holds.append(block)
        self.held.setdefault(block, set()).add(user)
        self.most = max(self.most, len(self.held))

    def drop(self, block, user):
        self.held.get(block, set()).discard(user)
        if not self.held.get(block, True):
            del self.held[block]


UNEVEN = [4] * 9 + [1, 4, 4, 3] * 5 + [4] * 8 + [2]


def epoch_of(order, lane, epoch):
    """Its (positions, rows), window by window."""
    return [order.window(lane, number) for number in range(epoch * order._windows, (epoch + 1) * order._windows)]


@pytest.mark.parametrize("lanes", [1, 2, 8, 24])
@pytest.mark.parametrize("rows", [UNEVEN, [5], [3, 3, 1], [64] * 40, [1] * 100])
@pytest.mark.parametrize("window_rows", [1, 40, 10**6])
def test_every_row_comes_once_an_epoch(rows, lanes, window_rows):
    made = Made(rows)
    order = made.order(lanes, window_rows)
    epochs = []
    for epoch in range(3):
        windows = [window for lane in range(lanes) for window in epoch_of(order, lane, epoch)]
        found = np.concatenate([rows for _, rows in windows])
        np.testing.assert_array_equal(np.sort(found), np.arange(sum(rows)))
        for _, some in windows:
            assert len(order.blocks_of(some)) <= order.window_blocks
        epochs.append(found.tolist())
    assert sum(rows) < 60 or epochs[0] != epochs[1] != epochs[2]
    assert order.window_blocks <= max(window_rows * len(rows) / sum(rows) / lanes, 1)
    for lane in range(lanes):  # positions go up, and lead back to the row
        positions, found = (np.concatenate(each) for each in zip(*epoch_of(order, lane, 1), strict=True))
        assert (np.diff(positions) > 0).all()
        assert [order.row_at(lane, position) for position in positions.tolist()] == found.tolist()
        if len(positions):
            np.testing.assert_array_equal(order.between(lane, positions[0], positions[-1] + 1), positions)
            assert [order.number_at(p) for p in positions] == sorted(order.number_at(p) for p in positions)


def test_rows_are_shuffled_over_the_blocks_of_a_window():
    order = Made([16] * 64).order(lanes=2, window_rows=256)
    assert order.window_blocks == 8  # of each lane
    positions, rows = order.window(1, 3)
    blocks = rows // 16
    assert len(set(blocks.tolist())) == 8 and positions.tolist() == list(range(384, 512))
    assert np.mean(np.diff(rows) == 1) < 0.1 and len(set(blocks[:24].tolist())) > 4
    assert sorted(blocks.tolist()) != list(range(min(blocks), min(blocks) + 8))  # and the blocks over the set


def test_the_order_is_that_of_every_version():
    # 64-bit numbers of PCG64 by SeedSequence, which NumPy keeps; so a run resumes with another NumPy.
    assert shuffled(8, 1, 2).tolist() == [5, 6, 3, 2, 1, 0, 4, 7]
    assert sorted(shuffled(1000, 7).tolist()) == list(range(1000)) and shuffled(0, 3).tolist() == []


def opened(made, lanes, process=(0, 1), start=(), batch=16, bad=(), window_rows=40, span=50):
    """(a LaneStream, its batches as NumPy). `made.missed` counts reads that are not from memory."""
    made.missed = 0

    def read(row):
        made.missed += made.of_row[row] not in made.held
        return [b"%d" % row]

    together = row_by_row(1, read)
    stream = LaneStream(made.order(lanes, window_rows), together, start, batch // process[1], process)

    def sample(place, row, given):
        require(tf.reduce_all(row != tf.constant([-1, *bad], tf.int64)), "bad")
        return {"position": place, "row": tf.strings.to_number(given.strings[0], tf.int64)}

    stream.begin(span)
    data = stream.samples(sample, dict.fromkeys(("position", "row"), tf.constant(0, tf.int64)))
    return stream, data.batch(batch // process[1]).as_numpy_iterator()


def run(made, lanes, count, *args, **options):
    """[(rows, positions afterwards, rows that were passed over)] of so many batches."""
    stream, batches = opened(made, lanes, *args, **options)
    came = []
    for got in itertools.islice(batches, count):
        passed = stream.passed(got["position"])
        assert [stream.row_of(place) for place in got["position"]] == got["row"].tolist()
        came.append((got["row"].tolist(), stream.position, [stream.row_of(place) for place in passed]))
    return came


BAD = [0, 1, 2, 3, 17, 40, 41, 99, 120]


def test_batches_are_the_same_with_any_number_of_processes():
    whole = run(Made(UNEVEN), 8, 30, bad=BAD)
    for count in (2, 4, 8):
        parts = [run(Made(UNEVEN), 8, 30, (index, count), bad=BAD) for index in range(count)]
        for (rows, positions, passed), *shares in zip(whole, *parts, strict=True):
            assert rows == [row for share, _, _ in shares for row in share]
            assert positions == tuple(position for _, own, _ in shares for position in own)
            assert passed == [row for _, _, own in shares for row in own]


def test_a_lane_gives_its_share_of_each_batch_and_bad_rows_are_passed_over():
    made = Made(UNEVEN)
    came, order = run(made, 4, 40, bad=BAD), made.order(4, 40)
    for lane in range(4):
        wanted = np.concatenate([rows for _, rows in (order.window(lane, n) for n in range(100))])
        good = [row for row in wanted.tolist() if row not in BAD]
        assert [row for rows, _, _ in came for row in rows[4 * lane : 4 * lane + 4]] == good[:160]
    passed = [row for _, _, some in came for row in some]
    assert set(passed) == set(BAD)  # holes are none


@pytest.mark.parametrize("count", [1, 2])
def test_resuming_at_any_step_gives_the_batches_that_would_have_come(count):
    whole = run(Made(UNEVEN), 4, 24, bad=BAD)
    for step in range(1, 16) if count == 1 else (3, 8, 13):
        for index in range(count):
            own = slice(index * 4 // count, (index + 1) * 4 // count)
            made = Made(UNEVEN)
            again = run(made, 4, 3, (index, count), whole[step - 1][1][own], bad=BAD)
            share = slice(index * 16 // count, (index + 1) * 16 // count)
            assert [rows for rows, _, _ in again] == [rows[share] for rows, _, _ in whole[step : step + 3]]


def test_no_more_is_read_than_is_needed_and_two_windows_are_held():
    made = Made([4] * 96)
    came = run(made, 4, 24, span=24, window_rows=64)  # one epoch, and 4 windows of 6 blocks, of each lane
    assert sorted(row for rows, _, _ in came for row in rows) == list(range(384))
    assert sorted(made.holds) == list(range(96)), "each once, and nothing of the next epoch"
    assert made.missed == 0 and made.most <= 4 * 2 * 4
    again = Made([4] * 96)
    run(again, 4, 16, start=came[7][1], span=16, window_rows=64)
    assert len(again.holds) <= 64 + 16, "one window again"


@pytest.mark.parametrize("window_rows", [1, 16, 64])
def test_windows_that_are_smaller_than_a_batch_are_held_while_they_are_in_use(window_rows):
    made = Made([4] * 96)
    came = run(made, 2, 12, batch=64, span=12, window_rows=window_rows)
    assert sorted(row for rows, _, _ in came[:6] for row in rows) == list(range(384))
    assert made.missed == 0 and len(made.holds) <= 2 * 96


def test_a_lane_without_a_good_row_says_so_and_keeps_its_place():
    made = Made([4] * 64)
    bad = made.order(4, 64).window(2, 0)[1][:8].tolist()  # all of two batches
    stream, batches = opened(made, 4, bad=bad, window_rows=64, span=2)
    assert (next(batches)["position"] < 0).tolist() == [False] * 8 + [True] * 4 + [False] * 4
    assert list(itertools.islice(stream.places(), 4))[2] == 2  # lane 2 of 4, position 0
