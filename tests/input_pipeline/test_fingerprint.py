"""Every format says what it holds: the same in another place, something else when a row changes."""

import pytest

from input_pipeline.sources.fingerprint import fingerprint
from tests.support.source_files import LAYOUTS, open_as, samples


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_a_source_holds(layout, tmp_path):
    def of(name, made):
        (tmp_path / name).mkdir()
        return fingerprint(open_as(layout, tmp_path / name, made))

    made = samples(12)
    first = of("first", made)
    assert len(first) == 16 and int(first, 16)
    assert of("elsewhere", made) == first
    assert of("shorter", made[:-1]) != first
    if layout not in ("folder", "tfds_array_record"):  # whose index has names, or numbers, alone
        assert of("another", [*made[:-1], (made[-1][0], made[-1][1] + " and more")]) != first
