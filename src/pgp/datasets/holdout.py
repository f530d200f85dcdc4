"""Test images for data sets without a test split, and the order of their class names."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from pgp.datasets.base import Split
from pgp.scenario import stratified_holdout


def holdout_mask(split: Split, fraction: float, seed: int) -> Tensor:
    """Return which images of `split` to hold out for testing, bool `(n,)`: a fraction of each class in each domain.

    None is held out if `fraction` is 0, or of a class (in a domain) with a single image.
    """
    strata = split.labels
    if split.domains is not None:
        strata = strata + (int(strata.max()) + 1) * split.domains
    return stratified_holdout(strata, fraction, seed)


def check_test_share(test_share: float) -> None:
    """Raise if `test_share` is no valid setting of a data set."""
    if not 0 <= test_share < 1:
        raise ValueError(f"expected dataset.test_share between 0 and 1, got {test_share}: 0 holds out no image")


def natural_order(words: Iterable[str]) -> tuple[str, ...]:
    """Return each word once: sorted by number if all are whole numbers, else in the order of first appearance.

    >>> natural_order(["10", "9", "10"]), natural_order(["dog", "cat", "dog"])
    (('9', '10'), ('dog', 'cat'))
    """
    once = list(dict.fromkeys(words))
    return tuple(sorted(once, key=int) if all(word.isdecimal() for word in once) else once)
