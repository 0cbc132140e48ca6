import threading

import pytest

from rankclip_jax.train import input_wait
from rankclip_jax.train.recorder import Pace


class Clock:
    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(input_wait.time, "monotonic", lambda: self.now)


class Batches:
    """Each batch takes so many seconds and reads so many samples."""

    def __init__(self, clock, script):
        self.clock, self.script, self.read = clock, iter(script), 7

    def __next__(self):
        seconds, samples, at_half = next(self.script)
        self.clock.now += seconds / 2
        at_half()
        self.clock.now += seconds / 2
        self.read += samples
        return samples


class Step:
    """An output of a step that ends when told."""

    def __init__(self):
        self.ended = threading.Event()

    def block_until_ready(self):
        assert self.ended.wait(10)
        return self

    def end(self, wait):
        self.ended.set()
        wait._step_end.result(10)  # the thread has looked at the clock


def test_only_the_wait_after_the_end_of_the_step_before_counts(monkeypatch):
    clock, steps = Clock(monkeypatch), [Step() for _ in range(4)]
    script = [
        (50.0, 4, lambda: None),  # the first: nothing waits for it yet
        (6.0, 5, lambda: steps[0].end(wait)),  # the step ends in the middle: 3 s of idle devices
        (8.0, 4, lambda: None),  # the step runs on beyond: none
        (1.0, 4, lambda: None),  # the step ended before the wait began: all of it
    ]
    wait = input_wait.InputWait(Batches(clock, script))
    next(wait)
    wait.step_started(steps[0])
    next(wait)
    wait.step_started(steps[1])
    assert wait.take() == (3.0, 9)
    next(wait)
    clock.now += 2
    steps[1].end(wait)
    wait.step_started(steps[2])
    steps[2].end(wait)
    clock.now += 5  # the host is busy elsewhere; not the data's fault
    next(wait)
    assert wait.take() == (1.0, 8)
    assert wait.take() == (0.0, 0)


def test_the_console_line_and_the_numbers_say_it(monkeypatch):
    clock = Clock(monkeypatch)
    progress = Pace(10, 110, batch_size=32)
    clock.now += 20
    line, speed = progress.line(20, {"loss": 1.5}, 5.0, 400)
    assert speed == {"images_per_second": 16.0, "images_read_per_second": 20.0, "data_wait": 0.25}
    assert "16 images/s (waits for data 25 %)  00:03:00 left" in line
    clock.now += 10
    line, speed = progress.line(30, {}, 0.0, 0)
    assert "waits" not in line and speed["data_wait"] == 0.0


def test_more_than_a_day_is_left_in_days(monkeypatch):
    clock = Clock(monkeypatch)
    progress = Pace(0, 400_000, batch_size=32)
    clock.now += 1
    assert progress.line(1, {}, 0.0, 0)[0].endswith("  4 d 15:06:39 left")  # 399,999 s


@pytest.mark.parametrize("resize, remedy", [("host", "config.data.resize=device"), ("device", "--short-side 288")])
def test_advice_is_one_line_with_a_remedy(resize, remedy):
    text = input_wait.advice(0.43, 851.2, resize)
    assert text.startswith("input-bound: the devices waited for data 43 % of the time; this host reads 851 images/s")
    assert remedy in text and "\n" not in text
