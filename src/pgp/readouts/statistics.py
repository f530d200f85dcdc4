"""Class means and second moments: stored instead of images, corrected for drift, used to recognise unknown images."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from pgp.distributed import all_gather_rows, all_reduce_sum_
from pgp.readouts.base import Features, Readout
from pgp.readouts.calibration import NUM_FOLDS, NUM_HELD_OUT, TEMPERATURES, HeldOutTest, HeldOutTests, brier_scores
from pgp.readouts.compensation import affine_drift, mean_shift, nearness, transformed_covariance
from pgp.readouts.covariance import SquaredDistances, rounding_error, shrink
from pgp.subspace import float64_device, to_float64

SIMILAR = 0.5
"""A new class is similar to an old one if the squared distance of their means is at most this fraction of that to any
other old class."""
LARGEST_BATCH = 1024
"""Size of the parts in which held-out images are used, so that tensors of them in float64 stay small."""


class HeldOutBatch(NamedTuple):
    """Images that a fit leaves out."""

    features: Tensor
    """`(B, D)`."""
    labels: Tensor
    """`(B,)`."""
    augmented: bool
    """Whether these are augmented views."""

    def of_classes(self, chosen: Tensor) -> HeldOutBatch:
        """Return the images whose class is `chosen (C,)`."""
        rows = chosen[self.labels]
        return HeldOutBatch(self.features[rows.to(self.features.device)], self.labels[rows], self.augmented)


class StatisticsReadout(Readout):
    """A readout that is fitted to class means and one pooled covariance.

    The statistics of a class are computed once, after the training of its task, and stored: `C * D + D * D` numbers,
    however many images there are. They become wrong when later training changes the features. Projection reduces this
    drift. The rest can be compensated: it is estimated on images of the current task, and the statistics are corrected
    by the estimate.

    Images that `hold_out` receives are left out of a fit, one for each fold, which is tested on them. Only these
    results are kept (`HeldOutTests`); they choose the regularisation, the temperature and the threshold for unknown
    images.

    Args:
        classes: Number of labels.
        config: The settings.
        candidates: Values of the regularisation to choose from, by the Brier score of held-out images.
        default: The value until images have been held out.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Readout.Config):
        """Which features are used, and how old statistics are corrected for drift."""

        query: bool = False
        """Append the query of an image, its features without prompts, to its features with prompts. The query never
        drifts, so half of the statistics stay correct, and the drift of the other half is estimated better."""
        patches: bool = False
        """Append the mean of the patch tokens of the frozen encoder without prompts. It never drifts either."""
        normalize: bool = False
        """Normalise each part (features, query, mean patch token) to length 1."""
        compensate: Literal["none", "shift", "linear", "nearby"] = "none"
        """How to correct old statistics for the drift of features, estimated on the images of each new task. shift:
        move each mean by the average drift of the images near it (Yu et al., CVPR 2020). linear: transform means and
        covariance by an affine map, fitted by ridge regression. nearby: the same, with a weight for each class
        that falls with its distance from the images of the new task: they do not show the drift of other kinds."""
        bandwidth: float = 1.0
        """Width of the Gaussian weights for compensate=shift, in standard deviations within classes."""
        ridge: float = 1.0
        """Ridge penalty for compensate=linear and nearby, in multiples of the mean variance of the features."""

        def __post_init__(self) -> None:
            if not (self.bandwidth > 0 and self.ridge > 0):
                raise ValueError(f"expected bandwidth and ridge above 0, got {self.bandwidth} and {self.ridge}")

        @property
        def suffix(self) -> str:
            """Suffix of the readout's name for these settings, such as `+query+shift`."""
            flags = [name for name in ("query", "patches", "normalize") if getattr(self, name)]
            flags += [] if self.compensate == "none" else [self.compensate]
            return "".join(f"+{flag}" for flag in flags)

        @property
        def uses_query(self) -> bool:
            """See `Readout.Config.uses_query`."""
            return self.query

        @property
        def uses_patches(self) -> bool:
            """See `Readout.Config.uses_patches`."""
            return self.patches

    max_folds: int = NUM_FOLDS
    """Number of folds that are used: fewer if a fit takes long."""
    per_class_statistics: tuple[str, ...] = ("counts", "sums")
    """Names of the statistics that have a row for each class."""

    def __init__(
        self, classes: int, config: StatisticsReadout.Config, candidates: tuple[float, ...], default: float
    ) -> None:
        self.classes, self.settings, self.candidates = classes, config, candidates
        self.default = self.regularisation = default
        """Amount of regularisation of the fit, one of the candidates; `default` until held-out images choose."""
        self.needs_drift = config.compensate != "none"
        self.state: dict[str, Tensor] = {}
        self._task: dict[str, Tensor] = {}
        self._held_out: list[list[HeldOutBatch]] = [[] for _ in range(self.max_folds)]  # by fold
        self.tests = HeldOutTests(len(candidates), NUM_HELD_OUT * self.max_folds // NUM_FOLDS)
        """Results on held-out images of the latest tasks."""
        self._known_distances: _KnownDistances | None = None

    def select_features(self, images: Features) -> Tensor:
        """Return the features, and the queries and mean patch tokens if they are used, `(B, D + Q + Q)`."""
        settings = self.settings
        used = [images.features, images.query if settings.query else None, images.patches if settings.patches else None]
        parts = [part.to(images.features) for part in used if part is not None]
        assert len(parts) == 1 + settings.query + settings.patches, "the caller passes what the settings use"
        return torch.cat([nn.functional.normalize(part) for part in parts] if settings.normalize else parts, 1)

    def observe(self, features: Tensor, labels: Tensor) -> None:
        """Add a batch to the counts `(C,)`, sums `(C, D)` and pooled products `(D, D)` of this task, in float64."""
        _accumulate(self._task, self._statistics(features, labels))

    def hold_out(self, features: Tensor, labels: Tensor, *, augmented: bool, fold: int = 0) -> None:
        """See `Readout.hold_out`. Of a readout whose fit takes long, the first `max_folds` folds are used."""
        if fold < self.max_folds:
            labels = labels.to(float64_device(labels.device))
            self._held_out[fold].append(HeldOutBatch(features.detach(), labels, augmented))

    def _statistics(self, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
        features = to_float64(features.detach())
        one_hot = nn.functional.one_hot(labels, self.classes).to(features)  # (B, C)
        return {"counts": one_hot.sum(0), "sums": one_hot.T @ features, "products": features.T @ features}

    def end_task(self) -> None:
        """Add the statistics of this task to those of earlier tasks, and fit to them.

        Collective: in a distributed run, every process must call it.

        Raises:
            ValueError: If no features of this task were observed, or some are not finite.
        """
        if not self._task:
            raise ValueError("expected features of this task, got none: call observe() before end_task()")
        for tensor in self._task.values():
            all_reduce_sum_(tensor)
        _require_finite(self._task["products"])
        self.similar_classes = self._find_similar_classes() if self.state and self.detects_unknown else {}
        new, self._task = self._task, {}
        for name, tensor in self.state.items():
            new[name] += tensor
        self.state = new
        self._test_on_held_out_images()
        self._fit()

    def _find_similar_classes(self) -> dict[int, int]:
        """Return the classes of this task that are similar to an old class, by the fit to earlier tasks; see `Readout`.

        There are none as long as held-out images do not tell what is unlike all classes.
        """
        new = (self._task["counts"] > 0) & ~self.seen
        means = (self._task["sums"] / self._task["counts"].clamp(min=1)[:, None])[new]  # (N, D)
        threshold = self.unknown_threshold(0.95)
        if not len(means) or threshold is None or self.seen.sum() < 2:
            return {}
        known, _ = self._distances()
        nearest, number = known(means[:, self._columns_for_unknown]).topk(2, largest=False)
        similar = (nearest[:, 0] <= SIMILAR * nearest[:, 1]) & (self.unknown_scores(means) <= threshold)
        old = self.seen.nonzero()[:, 0][number[:, 0]]
        return dict(zip(new.nonzero()[:, 0][similar].tolist(), old[similar].tolist(), strict=True))

    def _test_on_held_out_images(self) -> None:
        """Fit without the images of each fold and test on them, to choose regularisation, temperature and threshold.

        Collective: in a distributed run, every process must call it.
        """
        folds = [_concatenate(batches) for batches in self._held_out]
        self._held_out = [[] for _ in folds]
        device = self.state["counts"].device
        images = views = 0
        errors = torch.zeros(2, len(self.candidates), len(TEMPERATURES), dtype=torch.float64)
        for batches in self._without_each(folds):
            images += sum(len(batch.labels) for batch in batches if not batch.augmented)
            views += sum(len(batch.labels) for batch in batches)
            for index, candidate in enumerate(self.candidates):
                self.regularisation = candidate
                self._fit()
                for part in _parts(batches):
                    errors[:, index] += brier_scores(self._uncalibrated_logits(part.features), part.labels).cpu()
        images, views = all_reduce_sum_(torch.tensor([images, views], device=device)).tolist()
        errors = all_reduce_sum_(errors.to(device)).cpu()
        if images:  # else none was held out, or of their classes, no image is left to fit to
            self.tests.add(HeldOutTest(images, views, errors))
        self._choose()
        if images and self.detects_unknown:
            unlike = [torch.empty(0)]
            for batches in self._without_each(folds):
                parts = (part for part in _parts(batches) if not part.augmented)
                unlike += [self.unknown_scores(part.features).cpu() for part in parts]
            self.tests.add_unlike(all_gather_rows(torch.cat(unlike)))

    def _without_each(self, folds: Sequence[Sequence[HeldOutBatch]]) -> Iterator[list[HeldOutBatch]]:
        """Yield the images of each fold, while `state` leaves them out: those of classes of which others are left.

        Collective: in a distributed run, every process must call it. Folds without which no class has two images are
        passed over.
        """
        total = self.state
        for batches in folds:
            held_out = {name: torch.zeros_like(tensor) for name, tensor in total.items()}
            for part in _parts(batches):
                _accumulate(held_out, self._statistics(part.features, part.labels))
            for tensor in held_out.values():
                all_reduce_sum_(tensor)
            if not bool(held_out["counts"].any()):
                continue
            self.state = {name: torch.sub(total[name], tensor, out=tensor) for name, tensor in held_out.items()}
            if self.state["counts"].sum() > self.seen.sum():  # some class has two images left, so features vary
                yield [batch.of_classes(self.seen) for batch in batches]
            self.state = total

    def _choose(self) -> None:
        """Choose regularisation and temperature, which are the best on held-out images, if there are any."""
        self.regularisation, self.temperature = self.default, 1.0
        if self.tests.is_informative:
            best = self.tests.best_candidate
            self.regularisation, self.temperature = self.candidates[best], self.tests.temperature(best)

    @property
    def detects_unknown(self) -> bool:
        """See `Readout.detects_unknown`."""
        return True

    @property
    def _columns_for_unknown(self) -> slice:
        """The features that `unknown_scores` uses: by default, all."""
        return slice(None)

    def unknown_scores(self, features: Tensor) -> Tensor:
        """Return relative Mahalanobis distances `(B,)` of features `(B, D)` (Ren et al., 2021).

        This is `min_c (x - m_c)^T S^-1 (x - m_c) - (x - m)^T T^-1 (x - m)`: the squared distance to the nearest class
        mean under the pooled covariance S, less that to the mean m of all images under their covariance T. Both
        covariances are shrunk as the readout's.
        """
        self._require_fit("unknown_scores")
        x = to_float64(features[:, self._columns_for_unknown]).to(self.state["sums"].device)
        nearest, background = (distances(x).amin(1) for distances in self._distances())
        return (nearest - background).to(features.device, torch.float32)

    def _distances(self) -> tuple[SquaredDistances, SquaredDistances]:
        """Return the distances to all class means, and those to the mean of all images, by the current statistics."""
        known = self._known_distances
        if known and known.state is self.state and known.regularisation == self.regularisation:
            return known.distances
        own = self._columns_for_unknown
        counts, sums, products = self.state["counts"], self.state["sums"][:, own], self.state["products"][own, own]
        mean = sums.sum(0) / counts.sum()  # (D,)
        total = products / counts.sum() - torch.outer(mean, mean)  # (D, D)
        within = self.pooled_covariance()
        if within is not None:
            within = shrink(within[own, own], self.regularisation)
        varies = bool(total.trace() > rounding_error(products))
        distances = (
            SquaredDistances(self.means[self.seen][:, own], within),
            SquaredDistances(mean[None], shrink(total, self.regularisation) if varies else None),
        )
        self._known_distances = _KnownDistances(self.state, self.regularisation, distances)
        return distances

    def unknown_threshold(self, keep: float) -> float | None:
        """See `Readout.unknown_threshold`."""
        return self.tests.threshold(keep)

    def compensate(self, before: Tensor, after: Tensor) -> None:
        """Correct the statistics of old classes for the drift of the features `(n, D)`; see `Readout.compensate`.

        Raises:
            ValueError: If some features are not finite.
        """
        if not self.state or not self.needs_drift:
            return
        for rows in (before, after):
            _require_finite(rows)
        device = self.state["sums"].device
        before, after = (to_float64(rows).to(device) for rows in (before, after))
        counts, means, within = self.state["counts"], self.means, self._within()
        if self.settings.compensate == "shift":
            variance = within.trace() / self._degrees_of_freedom() * self.settings.bandwidth**2
            variance = variance.clamp(min=torch.finfo(torch.float64).tiny)
            means = means + mean_shift(means, before, after, float(variance))
        else:
            weights = nearness(means, before) if self.settings.compensate == "nearby" else torch.ones_like(counts)
            centre, offset, matrix = affine_drift(before, after, self.settings.ridge)
            means = means + weights[:, None] * (offset + (means - centre) @ matrix)
            within = transformed_covariance(within, matrix, weights, counts / counts.sum())
        sums = means * counts[:, None]  # (C, D)
        self.state = {"counts": counts, "sums": sums, "products": within + means.T @ sums}

    def state_dict(self) -> dict[str, Tensor]:
        """Return counts, sums and products, and the results on held-out images."""
        return {**self.state, **self.tests.state_dict()} if self.state else {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore a `state_dict` and fit to it. It may cover only the first classes."""
        self.state = dict(state)
        if not state:
            return
        self.tests.load_state_dict({name: self.state.pop(name) for name in self.tests.state_dict()})
        self._choose()
        for name in self.per_class_statistics:
            missing = self.classes - len(state[name])
            if missing < 0:
                raise ValueError(f"expected a state of at most {self.classes} classes, got one of {len(state[name])}")
            self.state[name] = torch.cat([state[name], state[name].new_zeros(missing, *state[name].shape[1:])])
        self._fit()

    @abc.abstractmethod
    def _fit(self) -> None:
        """Fit to the statistics, with the current `regularisation`."""

    def _uncalibrated_logits(self, features: Tensor) -> Tensor:
        """Return the logits `(B, C)` that are divided by the temperature."""
        return self.logits(features)

    def _require_fit(self, caller: str) -> None:
        if not self.state:
            raise ValueError(f"expected at least one task before {caller}(): call observe() and end_task() first")

    @property
    def seen(self) -> Tensor:
        """Whether each class was observed, `(C,)` bool."""
        return self.state["counts"] > 0

    @property
    def means(self) -> Tensor:
        """Class means, `(C, D)` float64; 0 for classes never observed."""
        return self.state["sums"] / self.state["counts"].clamp(min=1)[:, None]

    def covariance(self, shrinkage: float) -> Tensor | None:
        """Return the shrunk covariance within classes `(D, D)`, or None if features do not vary within classes.

        It is `(1 - a) S + a tr(S)/D I`, with S the pooled covariance and a = `shrinkage`.
        """
        pooled = self.pooled_covariance()
        return None if pooled is None else shrink(pooled, shrinkage)

    def pooled_covariance(self) -> Tensor | None:
        """Return the covariance within classes S `(D, D)`, or None if features do not vary within classes."""
        within = self._within()
        varies = bool(within.trace() > rounding_error(self.state["products"]))
        return within / self._degrees_of_freedom() if varies else None

    def _within(self) -> Tensor:
        """Return the sum over images of `(x - m_c)(x - m_c)^T`, `(D, D)`."""
        return self.state["products"] - self.means.T @ self.state["sums"]

    def _degrees_of_freedom(self) -> Tensor:
        return (self.state["counts"].sum() - self.seen.sum()).clamp(min=1)


def _parts(batches: Sequence[HeldOutBatch]) -> Iterator[HeldOutBatch]:
    """Yield the images in batches of at most `LARGEST_BATCH`."""
    for batch in batches:
        for features, labels in zip(
            batch.features.split(LARGEST_BATCH), batch.labels.split(LARGEST_BATCH), strict=True
        ):
            yield HeldOutBatch(features, labels, batch.augmented)


def _concatenate(batches: Sequence[HeldOutBatch]) -> list[HeldOutBatch]:
    """Return the images as one batch without augmentation and one with it, if there are any."""
    whole = []
    for augmented in (False, True):
        same = [batch for batch in batches if batch.augmented == augmented]
        if same:
            features = torch.cat([batch.features for batch in same])
            whole.append(HeldOutBatch(features, torch.cat([batch.labels for batch in same]), augmented))
    return whole


class _KnownDistances(NamedTuple):
    """Distances that were computed, and from what."""

    state: Mapping[str, Tensor]
    regularisation: float
    distances: tuple[SquaredDistances, SquaredDistances]


def _require_finite(features: Tensor) -> None:
    """Raise unless features, or sums of their products, are finite."""
    if not bool(features.isfinite().all()):
        raise ValueError("expected features of this task that are finite, got NaN or infinity: with 16-mixed,"
                         " choose --precision bf16-mixed or 32-true")  # fmt: skip


def _accumulate(total: dict[str, Tensor], new: dict[str, Tensor]) -> None:
    """Add the tensors of `new` to those of `total` in place, by name. The first ones are kept as they are."""
    for name, tensor in new.items():
        if name in total:
            total[name] += tensor
        else:
            total[name] = tensor
