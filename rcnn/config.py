"""Configuration: what can be set, its unit, its default and where the default comes from.

A field whose default is ``None`` takes the value of the model's recipe (:data:`RECIPES`); :func:`resolve` fills it in,
and the run folder's ``config.yaml`` holds the filled values.
"""

import math
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, TypeVar

_T = TypeVar("_T")

ModelName = Literal["tiny", "resnet18_fpn", "resnet50_fpn", "vgg16"]
Precision = Literal["fp32", "tf32", "bf16", "fp16"]


@dataclass
class RPNConfig:
    """Region proposal network.

    Args:
        anchor_sizes: side of the square anchors of each pyramid level, pixels; one list per level.
        aspect_ratios: height / width of the anchors, the same on each level.
        pre_nms_top_n_train: boxes per level and image that enter NMS in training.
        pre_nms_top_n_test: boxes per level and image that enter NMS in detection.
        post_nms_top_n_train: proposals per image in training.
        post_nms_top_n_test: proposals per image in detection.
        nms_threshold: IoU above which the lower-scored proposal goes.
        high_threshold: IoU from which an anchor is positive.
        low_threshold: IoU under which an anchor is negative.
        batch_size_per_image: anchors per image in the loss.
        positive_fraction: at most this share of them positive.
        allowed_border: pixels by which an anchor may leave the image and still train; negative: any anchor trains.
    """

    anchor_sizes: list[list[float]] | None = None
    aspect_ratios: list[float] | None = None
    pre_nms_top_n_train: int | None = None
    pre_nms_top_n_test: int | None = None
    post_nms_top_n_train: int | None = None
    post_nms_top_n_test: int | None = None
    nms_threshold: float = 0.7
    high_threshold: float = 0.7
    low_threshold: float = 0.3
    batch_size_per_image: int | None = None
    positive_fraction: float = 0.5
    allowed_border: float | None = None


@dataclass
class RoIConfig:
    """Region-of-interest head and the detections made from it.

    Args:
        high_threshold: IoU from which a proposal is positive.
        low_threshold: IoU under which a proposal is background; between the two it is left out.
        batch_size_per_image: proposals per image in the loss.
        positive_fraction: at most this share of them positive.
        dropout: share of the units of the two hidden layers dropped in training.
        score_threshold: detections with a lower score are not returned.
        nms_threshold: IoU above which the lower-scored detection of the same class goes.
        detections_per_image: at most this many detections per image.
    """

    high_threshold: float = 0.5
    low_threshold: float = 0.5
    batch_size_per_image: int | None = None
    positive_fraction: float = 0.25
    dropout: float | None = None
    score_threshold: float | None = None
    nms_threshold: float = 0.5
    detections_per_image: int = 100


@dataclass
class ModelConfig:
    """The detector.

    Args:
        name: which detector.
        weights: file of weights to start from, .pth or .safetensors: a trunk published by torchvision, or a
            checkpoint of this project.
        norm: BatchNorm of a ResNet trunk: batch trains it, frozen keeps the published statistics. Unset: frozen when
            pyramid models start from ``weights``, else batch.
        frozen_stages: trunk stages, from the input on, that do not train; a ResNet has 5, VGG-16 has 5.
        min_size: shorter side of the image as the network sees it, pixels.
        max_size: longer side of it at most, pixels.
        rpn: region proposal network.
        roi: region-of-interest head.
    """

    name: ModelName = "tiny"
    weights: str | None = None
    norm: Literal["batch", "frozen"] | None = None
    frozen_stages: int | None = None
    min_size: int | None = None
    max_size: int | None = None
    rpn: RPNConfig = field(default_factory=RPNConfig)
    roi: RoIConfig = field(default_factory=RoIConfig)


@dataclass
class OptimConfig:
    """Optimiser and learning rate.

    Args:
        name: optimiser.
        lr: learning rate for ``base_batch_size`` images per step; scaled in proportion to the images that a step has.
        base_batch_size: images per step that ``lr`` is meant for; 0 takes ``lr`` as it is.
        momentum: of SGD.
        weight_decay: of the weights.
        decay_norms: whether norms and biases (parameters of one dimension) decay, too.
        lr_factors: start of parameters' names and factor on their learning rate, as ``{backbone.body: 0.1}``; the
            longest start counts.
        schedule: cosine to zero; multistep at ``milestones``; step every ``step_size`` epochs.
        cycles: of the cosine; each begins at the full rate again (warm restarts).
        warmup: share of all steps over which the learning rate rises from zero.
        milestones: shares of all steps at which multistep multiplies by ``gamma``.
        step_size: epochs between two steps of the step schedule.
        gamma: factor of multistep and step.
        clip_norm: the gradient's norm is cut to this; 0 never cuts.
        accumulate: batches whose mean gradient makes one step.
        ema: share that the moving average of the weights keeps at each step, as 0.999; the average is what is evaluated
            and saved as a model. 0: no average.
    """

    name: Literal["sgd", "adamw"] | None = None
    lr: float | None = None
    base_batch_size: int | None = None
    momentum: float = 0.9
    weight_decay: float | None = None
    decay_norms: bool = True
    lr_factors: dict[str, float] = field(default_factory=dict)
    schedule: Literal["cosine", "multistep", "step"] | None = None
    cycles: int = 1
    warmup: float | None = None
    milestones: list[float] = field(default_factory=lambda: [16 / 26, 22 / 26])
    step_size: int = 1
    gamma: float | None = None
    clip_norm: float | None = None
    accumulate: int = 1
    ema: float = 0.0


@dataclass
class LoaderConfig:
    """How images reach the network.

    Args:
        batch_size: images per batch and process; auto: the most that fit on the GPU.
        workers: loading processes; -1: one for every two cores, at most 8.
        flip: probability of a horizontal flip in training.
        vertical_flip: probability of a vertical flip in training.
        color: strength of the brightness, contrast and saturation jitter in training, 0..1.
        scale: range of the random zoom in training, as a factor on ``min_size``.
        buckets: pad images to one of a few sizes, and ground truth to a few capacities, so that shapes repeat; unset:
            on a GPU.
    """

    batch_size: int | Literal["auto"] | None = None
    workers: int = -1
    flip: float = 0.5
    vertical_flip: float = 0.0
    color: float | None = None
    scale: tuple[float, float] | None = None
    buckets: bool | None = None


@dataclass
class TrainConfig:
    """A training run.

    Args:
        data: folder in VOC or COCO layout; empty: the generated flower data set.
        train_split: image set that trains.
        val_split: image set that is evaluated after each epoch.
        out: run folder; empty: runs/NAME-DATE-TIME.
        epochs: times that each training image is seen.
        seed: of initial weights, order, augmentation and sampling.
        device: where to train; auto takes a GPU if there is one.
        resume: go on from the run folder's last checkpoint; auto: if there is one, else begin.
        strict: stop at the first bad image or object instead of skipping and reporting it.
        one_based: VOC corners count from 1 and include both ends (the format's rule); false: taken as they are.
        val_interval: epochs between two evaluations; the last epoch is always evaluated.
        log_interval: steps between two lines of the log.
        save_interval: steps between two checkpoints within an epoch; 0: only when the steps of an epoch are done.
        keep: training states that are kept, the newest ones.
        max_time: minutes after which the run saves a checkpoint and ends with exit code 75; 0: no limit.
        patience: evaluations in a row without a better AP after which training ends; 0: never.
        max_bad_steps: steps with a loss or gradient that is not finite which are skipped; one more ends the run.
        deterministic: only algorithms that give the same bits each time.
        sync_bn: BatchNorm takes its statistics over the batches of all processes.
        precision: what layers compute in: IEEE float32; float32 with factors rounded for tensor cores; bfloat16 or
            float16 under autocast, float16 with a scaled loss.
        channels_last: keep maps in the order of NHWC, which convolutions are quicker in.
        compile: let torch.compile fuse the trunk and the heads; the first steps take minutes.
        cuda_graph: record the step of each shape of batch as a CUDA graph and replay it; as usual where it cannot be.
        model: the detector.
        optim: optimiser and learning rate.
        loader: batches and augmentation.
    """

    data: str = ""
    train_split: str = "train"
    val_split: str = "val"
    out: str = ""
    epochs: int | None = None
    seed: int = 0
    device: str = "auto"
    resume: bool | Literal["auto"] = False
    strict: bool = False
    one_based: bool = True
    val_interval: int = 1
    log_interval: int = 10
    save_interval: int = 0
    keep: int = 2
    max_time: float = 0.0
    patience: int = 0
    max_bad_steps: int = 0
    deterministic: bool = False
    sync_bn: bool = False
    precision: Precision = "tf32"
    channels_last: bool = True
    compile: bool = False
    cuda_graph: bool = False
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)


def _pyramid(sizes: list[float], pre: tuple[int, int], post: tuple[int, int], batch: int) -> RPNConfig:
    return RPNConfig(
        anchor_sizes=[[s] for s in sizes],
        aspect_ratios=[0.5, 1.0, 2.0],
        pre_nms_top_n_train=pre[0],
        pre_nms_top_n_test=pre[1],
        post_nms_top_n_train=post[0],
        post_nms_top_n_test=post[1],
        batch_size_per_image=batch,
        allowed_border=-1.0,
    )


# torchvision's detection references: SGD 0.02 for 16 images, 1e-4, 26 epochs of which the rate drops after 16 and 22.
_REFERENCE_OPTIM = OptimConfig(
    name="sgd",
    lr=0.02,
    base_batch_size=16,
    weight_decay=1e-4,
    schedule="multistep",
    warmup=0.01,
    gamma=0.1,
    clip_norm=0.0,
)
_REFERENCE_LOADER = LoaderConfig(batch_size=2, color=0.0, scale=(1.0, 1.0))
_REFERENCE_ROI = RoIConfig(batch_size_per_image=512, dropout=0.0, score_threshold=0.05)

#: What a model's unset fields become. Sources: torchvision's ``fasterrcnn_resnet50_fpn`` and its training reference for
#: the pyramid models; Ren et al. (2015) and the original project's tutorial for vgg16; trials on two cores for tiny.
RECIPES: dict[str, TrainConfig] = {
    "tiny": TrainConfig(
        epochs=28,
        model=ModelConfig(
            frozen_stages=0,
            min_size=240,
            max_size=320,
            rpn=_pyramid([24, 48, 96, 192], (300, 300), (300, 300), 128),
            roi=RoIConfig(batch_size_per_image=96, dropout=0.0, score_threshold=0.01),
        ),
        optim=OptimConfig(
            name="adamw",
            lr=1e-3,
            base_batch_size=8,
            weight_decay=0.05,
            schedule="cosine",
            warmup=0.06,
            gamma=0.1,
            clip_norm=5.0,
        ),
        loader=LoaderConfig(batch_size=8, color=0.4, scale=(0.75, 1.05)),
    ),
    **{
        name: TrainConfig(
            epochs=26,
            model=ModelConfig(
                frozen_stages=frozen,
                min_size=800,
                max_size=1333,
                rpn=_pyramid([32, 64, 128, 256, 512], (2000, 1000), (2000, 1000), 256),
                roi=_REFERENCE_ROI,
            ),
            optim=_REFERENCE_OPTIM,
            loader=_REFERENCE_LOADER,
        )
        for name, frozen in (("resnet18_fpn", 2), ("resnet50_fpn", 2))
    },
    "vgg16": TrainConfig(
        epochs=10,
        model=ModelConfig(
            frozen_stages=2,
            min_size=600,
            max_size=1000,
            rpn=RPNConfig(
                anchor_sizes=[[64, 128, 256, 512]],
                aspect_ratios=[0.5, 1.0, 2.0],
                pre_nms_top_n_train=12000,
                pre_nms_top_n_test=6000,
                post_nms_top_n_train=2000,
                post_nms_top_n_test=300,
                batch_size_per_image=256,
                allowed_border=0.0,
            ),
            roi=RoIConfig(batch_size_per_image=128, dropout=0.5, score_threshold=0.05),
        ),
        optim=OptimConfig(
            name="sgd",
            lr=1e-3,
            base_batch_size=2,
            weight_decay=5e-4,
            schedule="step",
            warmup=0.01,
            gamma=0.8,
            clip_norm=10.0,
        ),
        loader=LoaderConfig(batch_size=2, color=0.0, scale=(1.0, 1.0)),
    ),
}


def _fill(config: _T, recipe: Any) -> _T:
    changes: dict[str, Any] = {}
    for f in fields(config):  # type: ignore[arg-type]
        value, default = getattr(config, f.name), getattr(recipe, f.name)
        if is_dataclass(value):
            changes[f.name] = _fill(value, default)
        elif value is None and default is not None:
            changes[f.name] = default
    return replace(config, **changes)  # type: ignore[type-var]


def resolve(config: TrainConfig) -> TrainConfig:
    """The configuration with every unset field taken from the recipe of ``config.model.name``.

    Raises:
        ValueError: the model's name is not known, or a value is out of its range.
    """
    if config.model.name not in RECIPES:
        raise ValueError(f"model.name must be one of {', '.join(RECIPES)}, got {config.model.name!r}")
    config = _fill(config, RECIPES[config.model.name])
    if config.model.norm is None:
        frozen = config.model.weights is not None and config.model.name != "tiny"
        config = replace(config, model=replace(config.model, norm="frozen" if frozen else "batch"))
    _check(config)
    return config


def given(value: _T | None) -> _T:
    """A field that :func:`resolve` has filled in.

    Raises:
        ValueError: the configuration was not resolved.
    """
    if value is None:
        raise ValueError("the configuration must be resolved first (rcnn.config.resolve), got an unset field")
    return value


def images_per_batch(config: LoaderConfig) -> int:
    """The batch size as a number.

    Raises:
        ValueError: it is not set, or is ``auto``, which training turns into a number first.
    """
    if not isinstance(config.batch_size, int):
        raise ValueError(f"loader.batch_size must be a number by now, got {config.batch_size}")
    return config.batch_size


def resolve_model(config: ModelConfig) -> ModelConfig:
    """The model's part of :func:`resolve`."""
    return resolve(TrainConfig(model=config)).model


def _check(config: TrainConfig) -> None:
    model, optim, loader = config.model, config.optim, config.loader
    fractions = {
        "model.rpn.positive_fraction": model.rpn.positive_fraction,
        "model.rpn.nms_threshold": model.rpn.nms_threshold,
        "model.rpn.high_threshold": model.rpn.high_threshold,
        "model.rpn.low_threshold": model.rpn.low_threshold,
        "model.roi.positive_fraction": model.roi.positive_fraction,
        "model.roi.high_threshold": model.roi.high_threshold,
        "model.roi.low_threshold": model.roi.low_threshold,
        "model.roi.nms_threshold": model.roi.nms_threshold,
        "model.roi.score_threshold": model.roi.score_threshold,
        "model.roi.dropout": model.roi.dropout,
        "optim.warmup": optim.warmup,
        "loader.flip": loader.flip,
        "loader.vertical_flip": loader.vertical_flip,
        "loader.color": loader.color,
        "optim.ema": optim.ema,
    }
    for name, value in fractions.items():
        if not 0 <= given(value) <= 1:
            raise ValueError(f"{name} must be between 0 and 1, got {value}")
    above_zero = {
        "epochs": config.epochs,
        "val_interval": config.val_interval,
        "log_interval": config.log_interval,
        "model.min_size": model.min_size,
        "model.max_size": model.max_size,
        "model.rpn.pre_nms_top_n_train": model.rpn.pre_nms_top_n_train,
        "model.rpn.pre_nms_top_n_test": model.rpn.pre_nms_top_n_test,
        "model.rpn.post_nms_top_n_train": model.rpn.post_nms_top_n_train,
        "model.rpn.post_nms_top_n_test": model.rpn.post_nms_top_n_test,
        "model.rpn.low_threshold": model.rpn.low_threshold,
        "model.rpn.batch_size_per_image": model.rpn.batch_size_per_image,
        "model.roi.low_threshold": model.roi.low_threshold,
        "model.roi.batch_size_per_image": model.roi.batch_size_per_image,
        "model.roi.detections_per_image": model.roi.detections_per_image,
        "keep": config.keep,
        "loader.batch_size": 1 if loader.batch_size == "auto" else loader.batch_size,
        "optim.accumulate": optim.accumulate,
        "optim.cycles": optim.cycles,
        "optim.lr": optim.lr,
        "optim.step_size": optim.step_size,
        "optim.gamma": optim.gamma,
        "each of model.rpn.anchor_sizes": min((s for level in given(model.rpn.anchor_sizes) for s in level), default=0),
        "each of model.rpn.aspect_ratios": min(given(model.rpn.aspect_ratios), default=0),
    }
    for name, value in above_zero.items():
        if not 0 < given(value) < math.inf:
            raise ValueError(f"{name} must be greater than 0, got {value}")
    not_below_zero = {
        "model.frozen_stages": model.frozen_stages,
        "optim.base_batch_size": optim.base_batch_size,
        "optim.momentum": optim.momentum,
        "optim.weight_decay": optim.weight_decay,
        "optim.clip_norm": optim.clip_norm,
        "each of optim.lr_factors": min(optim.lr_factors.values(), default=0),
        "save_interval": config.save_interval,
        "max_time": config.max_time,
        "patience": config.patience,
        "max_bad_steps": config.max_bad_steps,
    }
    for name, value in not_below_zero.items():
        if not 0 <= given(value) < math.inf:
            raise ValueError(f"{name} must be 0 or greater, got {value}")
    if given(model.max_size) < given(model.min_size):
        raise ValueError(
            f"model.max_size, the longer side at most, must not be less than model.min_size ({model.min_size}), "
            f"got {model.max_size}"
        )
    for room, low, high in (
        ("model.rpn", model.rpn.low_threshold, model.rpn.high_threshold),
        ("model.roi", model.roi.low_threshold, model.roi.high_threshold),
    ):
        if low > high:
            raise ValueError(f"{room}.low_threshold must not exceed {room}.high_threshold ({high}), got {low}")
    scale = loader.scale
    if scale is None or not 0 < scale[0] <= scale[1]:
        raise ValueError(f"loader.scale must be two factors, 0 < low <= high, got {scale}")
