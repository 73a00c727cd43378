"""Parts of what is too large as a whole."""

import pytest

from kdiffusion.models.kernels.parts import num_parts


@pytest.mark.parametrize(
    "length, size, limit, parts",
    [
        (12, 100, 100, 1),
        (12, 101, 100, 2),
        (12, 450, 100, 6),
        (7, 150, 100, 7),
        (4, 900, 100, 4),
    ],
    ids=["whole", "halves", "a divisor", "a prime", "none small enough"],
)
def test_parts_are_equal_and_as_few_as_the_limit_allows(length, size, limit, parts):
    assert num_parts(length, size, limit) == parts
