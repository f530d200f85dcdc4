"""Combine experts: the probability of a task by statistics, times that of a class by its expert's statistics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pgp.readouts.base import Features
from pgp.readouts.lda import LDA
from pgp.subspace import to_float64


class ExpertLDA(LDA):
    """`P(class | image) = sum_task P(task | query) P(class | task, features with the task's expert)`.

    The second factor is LDA among the classes of an expert, with class means of its features, and one covariance pooled
    over all experts. The sum is over the likeliest experts of an image.
    """

    @dataclass(frozen=True)
    class Config(LDA.Config):
        """Settings of LDA on the features of experts; they do not drift."""

        tag = "experts"

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.compensate != "none":
                raise ValueError(f"expected compensate='none' for experts, which do not drift, got {self.compensate!r}")

        @property
        def name(self) -> str:
            """See `Readout.Config.name`."""
            return super().name.replace("lda", "experts", 1)

        @property
        def uses_query(self) -> bool:
            """See `Readout.Config.uses_query`."""
            return True

        @property
        def uses_experts(self) -> bool:
            """See `Readout.Config.uses_experts`."""
            return True

        def build(self, head: nn.Module, classes: int, seed: int) -> ExpertLDA:
            """Return a readout that has seen no class yet."""
            return ExpertLDA(classes, self)

    per_class_statistics = (*LDA.per_class_statistics, "experts")

    def select_features(self, images: Features) -> Tensor:
        """Return what is known of an image with each of its k experts: number, log-probability, features.

        Returns:
            `(B, k * (2 + D))`, with features `(D,)` as the settings select them.
        """
        if images.experts is None or images.expert_logits is None or images.expert_features is None:
            raise ValueError("expected a method with experts for the readout experts, got none: choose --experts task")
        blocks = []
        for number, logit, features in zip(
            images.experts.unbind(1), images.expert_logits.unbind(1), images.expert_features.unbind(1), strict=True
        ):
            selected = super().select_features(images._replace(features=features))  # (B, D)
            blocks.append(torch.cat([number[:, None].to(selected), logit[:, None].to(selected), selected], dim=1))
        return torch.cat(blocks, dim=1)

    def logits(self, features: Tensor) -> Tensor:
        """Return the logarithms of the probabilities of all classes, `(B, C)`; -inf for other experts' classes.

        Raises:
            ValueError: If no task has ended yet.
        """
        self._require_fit("logits")
        width = 2 + self.state["sums"].shape[1]
        total = torch.full((features.shape[0], self.classes), -torch.inf, device=features.device)
        for block in features.unflatten(1, (-1, width)).unbind(1):  # (B, 2 + D)
            within = (
                (self._logits_within_expert(block) / self.temperature)
                .log_softmax(1)
                .nan_to_num(-torch.inf, neginf=-torch.inf)
            )
            total = torch.logaddexp(total, block[:, 1:2] + within)
        return total

    def probabilities(self, logits: Tensor) -> Tensor:
        """See `Readout.probabilities`. The temperature is in the logits already."""
        return logits.softmax(-1)

    @property
    def detects_unknown(self) -> bool:
        """Whether features without prompts are used: distances with different experts cannot be compared."""
        return self.settings.query or self.settings.patches

    def unknown_scores(self, features: Tensor) -> Tensor:
        """Return relative Mahalanobis distances of features without prompts; see `StatisticsReadout`."""
        self._require_fit("unknown_scores")
        return super().unknown_scores(features[:, 2 : 2 + self.state["sums"].shape[1]])  # all experts have the same

    @property
    def _columns_for_unknown(self) -> slice:
        parts = 1 + self.settings.query + self.settings.patches  # of equal width: the first differs between experts
        return slice(self.state["sums"].shape[1] // parts, None)

    def _find_similar_classes(self) -> dict[int, int]:
        return {}  # the router finds them

    @property
    def expert_of_class(self) -> Tensor:
        """Number of the expert of each class, `(C,)`; -1 for classes that were never observed."""
        numbers = (self.state["experts"] / self.state["counts"].clamp(min=1)).round().long()
        return torch.where(self.seen, numbers, -1)

    def _logits_within_expert(self, block: Tensor) -> Tensor:
        """Return the logits `(B, C)` of LDA with one expert, whose other classes have -inf, for rows `(B, 2 + D)`."""
        is_own = self.expert_of_class.to(block.device) == block[:, :1].long()  # (B, C)
        return super().logits(block[:, 2:]).masked_fill(~is_own, -torch.inf)

    def _uncalibrated_logits(self, features: Tensor) -> Tensor:
        return self._logits_within_expert(features)  # held-out images come with the expert of their task

    def _statistics(self, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
        statistics = super()._statistics(features[:, 2:], labels)
        numbers = to_float64(features[:, 0])
        experts = torch.zeros_like(statistics["counts"]).index_add_(0, labels.to(numbers.device), numbers)
        return {**statistics, "experts": experts}
