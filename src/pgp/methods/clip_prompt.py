"""CLIP prompt tuning: a learned text context for each task, and one image prompt for all tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgp.backbones.base import Backbone, VisionLanguage
from pgp.methods.base import Method, to_device
from pgp.precision import full_precision
from pgp.rng import make_generator
from pgp.scenario import Task
from pgp.subspace import ProtectedInputs, ProtectedParameter


class TextHead(nn.Module):
    """Logits `(B, C)` of image features: scale * cosine similarity with the text features of each class.

    The text features of a class are computed when its task ends and cached, so that prediction needs no text encoder.
    """

    text: Tensor
    """Text features of unit length, `(C, E)`; zero for classes of future tasks."""

    def __init__(self, classes: int, width: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.register_buffer("text", torch.zeros(classes, width))

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits `(B, C)` of features `(B, E)`."""
        return self.logits(features, self.text)

    def logits(self, features: Tensor, text: Tensor) -> Tensor:
        """Return the logits `(B, n)` of features `(B, E)` for text features `(n, E)` of unit length.

        They are computed in float32: in bfloat16, the best two are often equal.
        """
        with full_precision(features.device):
            return self.scale * F.normalize(features.to(self.text), dim=-1) @ text.to(self.text).T

    def learn(self, labels: Sequence[int], text: Tensor) -> None:
        """Cache text features `(n, E)` of the classes `labels`."""
        rows = to_device(torch.tensor(labels), self.text.device)
        self.text[rows] = F.normalize(text.detach(), dim=-1).to(self.text)


class ZeroShot(Method):
    """CLIP without training, a baseline: the text of a class is its name in a template."""

    @dataclass(frozen=True)
    class Config(Method.Config):
        """Settings of zero-shot classification."""

        tag = "zero-shot"

        template: str = "a photo of a {}."
        """Text of a class; {} stands for its name."""

        def __post_init__(self) -> None:
            _check_template(self.template)

        def build(self, backbone: Backbone, class_names: Sequence[str], generator: torch.Generator) -> ZeroShot:
            """Return CLIP with this template."""
            method = ZeroShot(self, backbone, class_names)
            method.check_names()
            return method

    backbone: VisionLanguage
    head: TextHead
    per_class_tensors: tuple[str, ...] = ("head.text",)
    uses_query = False
    legacy_scope = "cut"

    def __init__(self, config: Method.Config, backbone: Backbone, class_names: Sequence[str]) -> None:
        encoder = _with_text(backbone)
        super().__init__(encoder, TextHead(len(class_names), encoder.embed_dim, encoder.logit_scale))
        self.config = config
        self.class_names = [name.replace("_", " ").strip() for name in class_names]

    def check_names(self) -> None:
        """Raise if a class name is too long for the text encoder.

        Raises:
            ValueError: If the text of a class has too many tokens.
        """
        try:
            self.backbone.tokenize(self.texts(range(len(self.class_names))))
        except ValueError as error:
            raise ValueError(f"a class name is too long for the text encoder: {error}. Give the class a shorter one, in"
                             " names.txt or in the table of images, or shorten the text around it by --method.template"
                             " or --method.context") from error  # fmt: skip

    def texts(self, labels: Sequence[int]) -> list[str]:
        """Return the text of each of the classes `labels`."""
        assert isinstance(self.config, ZeroShot.Config)
        return [self.config.template.format(self.class_names[label]) for label in labels]

    def begin_task(self, task: Task) -> None:
        """Encode the class names of `task`."""
        self.head.learn(task.classes, self.text_features(task))

    def text_features(self, task: Task) -> Tensor:
        """Return the text features `(n, E)` of the classes of `task`, in their order."""
        tokens = to_device(self.backbone.tokenize(self.texts(task.classes)), self.head.text.device)
        with torch.no_grad():
            return self.backbone.encode_text(self.backbone.embed_text(tokens), tokens)

    def features(self, images: Tensor, query: Tensor | None = None, *, by_vote: bool = False) -> Tensor:
        """Return the image features `(B, E)`, not normalised."""
        return self.backbone.project(self.backbone(images, self._prompts(images.shape[0]), num_tokens=1)[:, 0])

    def loss(self, images: Tensor, labels: Tensor, task: Task, prepared: dict[str, Tensor] | None = None) -> Tensor:
        """Return the cross-entropy over the classes of `task`."""
        text = (prepared or {}).get("text")
        text = F.normalize(self.text_features(task) if text is None else text, dim=-1)
        logits = self.head.logits(self.features(images), text)  # (B, n)
        classes = to_device(torch.tensor(task.classes), labels.device)
        targets = (labels.unsqueeze(1) == classes).int().argmax(1)  # (B, n) -> (B,)
        return F.cross_entropy(logits, targets)

    def _prompts(self, count: int) -> dict[int, Tensor]:
        """Return the tokens to insert for `count` images, by layer."""
        return {}


class CLIPPrompt(ZeroShot):
    """A learned context around each class name, new for every task, and an image prompt that all tasks share.

    The loss compares an image with the classes of its task. The text features of a finished task are cached and do not
    change. Predictions for old images therefore change only through the image prompt, which a projection protects. With
    setting=dil, each domain has the same classes, so its context replaces that of the domain before.

    Differs from the published code: an image is compared with all classes seen so far. The published evaluation uses
    the task label.
    """

    @dataclass(frozen=True)
    class Config(Method.Config):
        """Settings of the published method; the defaults are its values for CIFAR-100."""

        tag = "clip"

        context: int = 16
        """Number of learned vectors in a context, L."""
        name: Literal["end", "middle", "front"] = "end"
        """Position of the class name in its context."""
        per_class: bool = False
        """Learn a context for each class, instead of one for all classes of a task."""
        image_prompt: int = 10
        """Number of learned tokens that are inserted into the sequence of every image."""
        template: str = "{}."
        """Text of a class inside its context; {} stands for its name."""
        protect: Literal["tokens", "affinity", "affinity+aggregation"] = "tokens"
        """What updates of the image prompt must be orthogonal to. tokens: tokens of old images at the input of the
        first block (the paper). affinity: directions that change attention scores. affinity+aggregation: also the
        attention weights of the prompt. The last two are conditions of NSP2; here, they protect the first block
        only."""

        def __post_init__(self) -> None:
            _check_template(self.template)
            for field in ("context", "image_prompt"):
                if getattr(self, field) < 1:
                    raise ValueError(f"expected method.{field} of at least 1, got {getattr(self, field)}")

        def build(self, backbone: Backbone, class_names: Sequence[str], generator: torch.Generator) -> CLIPPrompt:
            """Return untrained CLIP prompts."""
            method = CLIPPrompt(self, backbone, class_names, generator)
            method.check_names()
            return method

    def __init__(
        self, config: CLIPPrompt.Config, backbone: Backbone, class_names: Sequence[str], draws: torch.Generator
    ) -> None:
        super().__init__(config, backbone, class_names)
        self.settings = config
        width, text_width = backbone.width, self.backbone.text_width
        contexts = len(class_names) if config.per_class else 1
        self.per_class_tensors = (*self.per_class_tensors, "context") if config.per_class else self.per_class_tensors
        self._seed = draws.initial_seed()
        if config.protect != "tokens":
            self.check_affinity((0,))
        self.image_prompt = nn.Parameter(torch.empty(config.image_prompt, width).normal_(std=0.02, generator=draws))
        self.context = nn.Parameter(
            torch.empty(contexts, config.context, text_width).normal_(std=0.02, generator=draws)
        )

    @torch.no_grad()
    def begin_task(self, task: Task) -> None:
        """Draw a new context from the run's seed and the task, unless each class has its own."""
        if not self.settings.per_class:
            generator = make_generator(self._seed, "context", task.index)
            # drawn on the CPU, so that the values do not depend on the device
            self.context.copy_(torch.empty(self.context.shape).normal_(std=0.02, generator=generator))
        self.refresh_head(task)

    def refresh_head(self, task: Task) -> None:
        """Encode the class names of `task` in their context, and cache the text features."""
        with torch.no_grad():
            self.head.learn(task.classes, self.text_features(task))

    @property
    def _placeholders(self) -> tuple[int, int]:
        """Number of placeholder words before and after a class name, which the context replaces."""
        L = self.settings.context
        return {"end": (L, 0), "middle": (L // 2, L - L // 2), "front": (0, L)}[self.settings.name]

    def texts(self, labels: Sequence[int]) -> list[str]:
        """Return the text of each of the classes `labels`, with placeholder words for the context."""
        front, back = self._placeholders
        names = [self.settings.template.format(self.class_names[label]) for label in labels]
        return [" ".join(["x"] * front + [name] + ["x"] * back) for name in names]

    def text_features(self, task: Task) -> Tensor:
        """Return the text features `(n, E)` of the classes of `task`, each in its context."""
        config, (front, back) = self.settings, self._placeholders
        tokens = to_device(self.backbone.tokenize(self.texts(task.classes)), self.context.device)  # (n, T)
        ends = tokens.argmax(-1, keepdim=True)  # position of the end token
        before = torch.arange(1, 1 + front, device=tokens.device).expand(len(tokens), -1)
        after = ends - back + torch.arange(back, device=tokens.device)
        positions = torch.cat([before, after], dim=1).unsqueeze(-1)  # (n, L, 1): of the placeholders
        embedded = self.backbone.embed_text(tokens)  # (n, T, W)
        if config.per_class:
            context = self.context[to_device(torch.tensor(task.classes), self.context.device)]
        else:
            context = self.context.expand(len(tokens), -1, -1)
        embedded = embedded.scatter(1, positions.expand_as(context), context.to(embedded.dtype))  # (n, T, W)
        return self.backbone.encode_text(embedded, tokens)

    def batch_constants(self, task: Task) -> dict[str, Tensor]:
        """Return the text features, which all micro-batches of a step share."""
        return {"text": self.text_features(task)}

    def prompt_parameters(self) -> list[nn.Parameter]:
        """Return the image prompt alone, which all tasks share.

        The text context counts as part of the head, because the classifier's weights are computed from it. Each task
        learns a new context (with `per_class`, new rows of it), so it keeps the head's learning rate and is never
        frozen.
        """
        return [self.image_prompt]

    def protected(self) -> dict[str, ProtectedParameter]:
        """Return the image prompt; with aggregation, a second time, along the prompt axis (`shares`)."""
        protected = {"prompts": ProtectedParameter(self.image_prompt)}
        if self.settings.protect == "affinity+aggregation":
            protected["shares"] = ProtectedParameter(self.image_prompt, axis=-2, role="value")
        return protected

    @torch.no_grad()
    def activations(self, images: Tensor, query: Tensor | None = None) -> dict[str, ProtectedInputs]:
        """Return the inputs of the image prompt in the first block.

        No transformer block is computed, except for the attention scores of the first one if `protect` needs them.
        """
        prompts = self._prompts(images.shape[0])
        inputs = {"prompts": ProtectedInputs(self.backbone.embed(images), prompts[0])}
        if self.settings.protect != "tokens":
            trace = self.backbone.trace(images, {0}, prompts)[0]
            inputs["prompts"] = ProtectedInputs(trace.queries, head_maps=self.backbone.affinity_maps(0, moves="prompt"))
            attention = trace.prompt_attention() / self.backbone.norm_scale(self.image_prompt)  # (B, H, N, L)
            inputs["shares"] = ProtectedInputs(attention.flatten(1, 2))  # (B, H * N, L)
        return {space: inputs[space] for space in self.protected()}

    def _prompts(self, count: int) -> dict[int, Tensor]:
        return {0: self.backbone.embed_prompts(self.image_prompt.expand(count, -1, -1))}


def _with_text(backbone: Backbone) -> VisionLanguage:
    if not isinstance(backbone, VisionLanguage):
        raise ValueError(
            f"expected an encoder of images and texts, got {type(backbone).__name__}: choose --backbone clip"
        )
    return backbone


def _check_template(template: str) -> None:
    if template.count("{}") != 1 or "{" in template.replace("{}", ""):
        raise ValueError(f"expected method.template with one {{}} for the class name, got {template!r}")
