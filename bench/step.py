"""``python -m bench --step``: one training step and one detection, in total and by stage, against torchvision's.

Each detector is first proved to be torchvision's: with every anchor and proposal in the loss, so that no sampling is
left to chance, the four losses and the gradient agree. Then both are trained by the same steps (forward, backward,
clipping, fused optimiser) of the same images, and both detect; files are read from the disk by both at the end.
"""

import copy
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import rcnn
from bench.model import anchors_of, differences, everything, peer_of
from bench.peers import Lists, Peer, torchvision_model
from bench.stages import Part, idle, our_parts, stages, step_parts, their_parts
from bench.timing import measure, peak_memory
from rcnn.config import LoaderConfig, ModelConfig, OptimConfig, Precision, TrainConfig, given, resolve
from rcnn.data import flowers, open_dataset
from rcnn.data.batch import Batch
from rcnn.engine import Step, loader_for
from rcnn.graph import WARMUP, GraphedStep
from rcnn.images import PADDING
from rcnn.optim import make_optimizer
from rcnn.precision import computing
from rcnn.structures import Targets

MODELS = ("resnet50_fpn", "vgg16", "tiny")
BATCHES = (1, 2, 8)
#: Height and width of the images: on a GPU what the models are meant for, on a CPU what a run can wait for.
SIZES = {"cuda": (800, 1333), "cpu": (192, 256)}
#: What layers compute in.
PRECISIONS: dict[str, tuple[Precision, ...]] = {"cuda": ("tf32", "bf16"), "cpu": ("fp32",)}
#: As many classes as VOC has, and objects of one image.
CLASSES, OBJECTS = tuple(f"class {k}" for k in range(1, 21)), 8
#: Of the gate: images and their size, multiples of the coarsest stride, which torchvision takes from the image where it
#: is none; and steps of training before anything is compared, since a fresh network finds nothing.
GATE_BATCH, GATE_SIZE, WARM_STEPS = 2, (192, 256), 4
#: Files that ``predict`` reads, pictures of the drawn data set (5 of 7 train), images of a batch of both.
PICTURES, DRAWN, READ_BATCH = 32, {"cuda": 280, "cpu": 45}, 8
#: Seconds for the rivals of a case, calls whose stages are looked at.
SECONDS, STAGED = {"cuda": 4.0, "cpu": 30.0}, 5

Row = dict[str, Any]


@dataclass(frozen=True)
class Rival:
    """A detector in one of its forms.

    Attributes:
        name: of the row.
        net: takes images and targets and gives its losses; has ``detect``.
        parts: gives its stages; None: its steps are recorded and replayed whole.
    """

    name: str
    net: nn.Module
    parts: Callable[[], list[Part]] | None


@dataclass(frozen=True)
class Call:
    """What is timed.

    Attributes:
        function: without arguments.
        parts: its stages; None if it is one piece.
        before: puts away what an earlier call left, before memory is measured.
    """

    function: Callable[[], Any]
    parts: list[Part] | None
    before: Callable[[], Any] = lambda: None


def scene(count: int, height: int, width: int, device: torch.device) -> Batch:
    """A batch of noise in large blobs, with random boxes; padded to whole multiples of 32 pixels."""
    random = torch.Generator().manual_seed(0)
    rough = torch.rand(count, 3, height // 16, width // 16, generator=random) * 255
    pictures = F.interpolate(rough, size=(height, width), mode="bilinear").to(torch.uint8)
    images = torch.tensor(PADDING, dtype=torch.uint8)[:, None, None].repeat(count, 1, -(-height // 32) * 32, 1)
    images = images.repeat(1, 1, 1, -(-width // 32) * 32)
    images[:, :, :height, :width] = pictures
    size = torch.tensor([width, height])
    corner = torch.rand(count * OBJECTS, 2, generator=random) * 0.6 * size
    side = (0.1 + 0.3 * torch.rand(count * OBJECTS, 2, generator=random)) * size
    targets = Targets(
        boxes=torch.cat((corner, corner + side), 1),
        labels=torch.randint(1, len(CLASSES) + 1, (count * OBJECTS,), generator=random),
        offsets=torch.arange(count + 1) * OBJECTS,
        image_sizes=torch.tensor([[height, width]]).repeat(count, 1).float(),
        image_ids=torch.arange(count),
    )
    return Batch(images, targets, list(range(count)), torch.ones(count, 2), []).to(device)


def detector(name: str, size: tuple[int, int], device: torch.device) -> tuple[rcnn.FasterRCNN, OptimConfig]:
    """A model as its recipe has it, after a few steps on one small batch, and the recipe's optimiser.

    ResNet-50 is as with published weights: frozen norms, here with the statistics of that batch.

    Args:
        name: of the model.
        size: that it resizes pictures to: shorter side and longer side at most, pixels.
        device: where it goes.
    """
    torch.manual_seed(0)
    recipe = resolve(TrainConfig(model=ModelConfig(name=name, min_size=size[0], max_size=size[1])))
    batch = scene(GATE_BATCH, *GATE_SIZE, device)
    if name == "resnet50_fpn":
        fresh = rcnn.FasterRCNN(replace(recipe.model, frozen_stages=0), CLASSES).to(device)
        for module in fresh.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        with torch.no_grad():
            fresh(batch.images, batch.targets)
        state = {key: value for key, value in fresh.state_dict().items() if not key.endswith("num_batches_tracked")}
        recipe = replace(recipe, model=replace(recipe.model, norm="frozen"))
    model = rcnn.FasterRCNN(recipe.model, CLASSES).to(device)
    if name == "resnet50_fpn":
        model.load_state_dict(state)
    step = Step(model, make_optimizer(model, replace(recipe.optim, name="adamw"), 1e-4), clip_norm=5.0)
    for _ in range(WARM_STEPS):
        step([batch])
    return model, recipe.optim


def gate(model: rcnn.FasterRCNN) -> dict[str, float]:
    """Prove that ours and torchvision's are the same detector.

    Both compute in float32 and in channels_last, hence by the same convolutions: what remains is the order of the sums,
    the longest of which goes over the anchors of the batch. The gradient is reported and no more: through fifty layers
    rounding flips a ReLU here and there (for ResNet-50 torchvision's own in its two memory formats differ by 6e-3, and
    ours folds the frozen norms into the convolutions as well).

    Returns:
        Relative differences of the losses and of the gradient.

    Raises:
        AssertionError: a loss differs by more.
    """
    batch = scene(GATE_BATCH, *GATE_SIZE, model.mean.device)
    anchors = anchors_of(model, *GATE_SIZE)
    whole = everything(model, batch.targets, anchors)
    with computing("fp32", model.mean.device):
        report = differences(whole, _peer(whole, batch, "channels_last"), batch.images, batch.targets)
    tolerance = GATE_BATCH * anchors * torch.finfo(torch.float32).eps
    for name, difference in report.items():
        if name != "gradient":
            assert difference <= tolerance, f"{name} differs by {difference:.2g}, more than {tolerance:.2g}"
    return report


def _peer(model: rcnn.FasterRCNN, batch: Batch, memory_format: str = "contiguous_format") -> nn.Module:
    """torchvision's detector on a batch."""
    if model.config.name == "tiny":
        peer = peer_of(model)
    else:
        height, width = (int(side) for side in batch.targets.image_sizes[0])
        peer = Peer(torchvision_model(model, height, width), Lists.of(batch.images, batch.targets))
    return peer.to(memory_format=getattr(torch, memory_format))


def _rivals(model: rcnn.FasterRCNN, batch: Batch, compared: bool) -> list[Rival]:
    rivals = [Rival("rcnn", model, partial(our_parts, model))]
    if model.mean.device.type == "cuda":
        nchw = copy.deepcopy(model)
        nchw.use_channels_last(False)
        rivals.append(Rival("rcnn, NCHW", nchw, partial(our_parts, nchw)))
        rivals.append(Rival("rcnn, CUDA graph", copy.deepcopy(model), None))
    if compared:
        for name, order in (("torchvision", "contiguous_format"), ("torchvision, channels_last", "channels_last")):
            peer = _peer(model, batch, order)
            rivals.append(Rival(name, peer, partial(their_parts, peer.net if isinstance(peer, Peer) else peer)))
    return rivals


def training(
    model: rcnn.FasterRCNN, optim: OptimConfig, batch: Batch, precision: Precision, compared: bool, repeats: int
) -> list[Row]:
    """Rows of one training step of a batch. The learning rate is 0, so that each step does the same work."""
    device = model.mean.device
    calls: dict[str, Call] = {}
    for rival in _rivals(model, batch, compared):
        optimizer = make_optimizer(rival.net.train(), optim, 0.0)
        take: Any = Step(rival.net, optimizer, given(optim.clip_norm), precision=precision).on_device
        parts = None if rival.parts is None else [*rival.parts(), *step_parts(optimizer)]
        if parts is None:
            take = GraphedStep(take, optimizer, device, print)
        before = partial(optimizer.zero_grad, set_to_none=True)
        calls[rival.name] = Call(partial(take, [batch]), parts, before)
    return _timed("training step", calls, model, batch, precision, repeats)


def detection(model: rcnn.FasterRCNN, batch: Batch, precision: Precision, compared: bool, repeats: int) -> list[Row]:
    """Rows of one detection of a batch, up to results without padding."""
    device = model.mean.device

    def ours(net: Any) -> Any:
        with computing(precision, device):
            return net.detect(batch.images, batch.targets.image_sizes).unpad()

    def theirs(net: Any) -> Any:
        with computing(precision, device):
            return net.detect(batch.images, batch.targets)

    calls = {}
    for rival in _rivals(model, batch, compared):
        if rival.parts is not None:
            detect = ours if isinstance(rival.net, rcnn.FasterRCNN) else theirs
            calls[rival.name] = Call(partial(detect, rival.net.eval()), rival.parts())
    return _timed("detection", calls, model, batch, precision, repeats)


def _timed(
    task: str, calls: dict[str, Call], model: rcnn.FasterRCNN, batch: Batch, precision: Precision, repeats: int
) -> list[Row]:
    device = model.mean.device
    warmup = WARMUP + 2 if device.type == "cuda" else 1  # a step is recorded after so many
    timings = measure(
        {name: call.function for name, call in calls.items()}, repeats, warmup, SECONDS[device.type], device
    )
    rows = []
    for name, call in calls.items():
        call.before()
        timing, count = timings[name], len(batch.indices)
        row = {
            "model": model.config.name, "task": task, "batch": count, "precision": precision, "with": name,
            "size": [int(side) for side in batch.targets.image_sizes[0]],
            **asdict(timing),
            "images_per_second": count / timing.median,
            "speedup": timings["torchvision"].median / timing.median if "torchvision" in timings else None,
            "idle": idle(call.function, timing.median, device),
        }  # fmt: skip
        if call.parts is not None:
            row["peak_memory"] = peak_memory(call.function, device)
            row["stages"] = stages(call.function, call.parts, min(repeats, STAGED), device)
        rows.append(row)
    return rows


def predicting(model: rcnn.FasterRCNN, files: list[Path], compared: bool, repeats: int) -> list[Row]:
    """Rows of ``predict``: files to boxes on the host, the same files by torchvision's detector."""
    device = model.mean.device
    height, width = given(model.config.min_size), given(model.config.max_size)
    rivals: dict[str, Callable[[], Any]] = {"rcnn": partial(model.predict, files, batch_size=READ_BATCH)}
    if device.type == "cuda":
        rivals["rcnn, half"] = partial(model.predict, files, batch_size=READ_BATCH, half=True)
    if compared and model.config.name != "tiny":
        net = torchvision_model(model, height, width).eval()
        rivals["torchvision"] = partial(_torchvision_predicts, net, files, device)
    timings = measure(rivals, repeats, 1, SECONDS[device.type], device)
    return [
        {
            "model": model.config.name, "task": "predict", "batch": READ_BATCH, "files": len(files),
            "precision": PRECISIONS[device.type][0], "with": name,
            "size": [height, width],
            **asdict(timing),
            "images_per_second": len(files) / timing.median,
            "speedup": timings["torchvision"].median / timing.median if "torchvision" in timings else None,
        }
        for name, timing in timings.items()
    ]  # fmt: skip


@torch.no_grad()
def _torchvision_predicts(net: nn.Module, files: Sequence[Path], device: torch.device) -> list[dict[str, Tensor]]:
    results = []
    for start in range(0, len(files), READ_BATCH):
        images = []
        for file in files[start : start + READ_BATCH]:
            with Image.open(file) as image:
                pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
            images.append(pixels.to(device).float() / 255)
        with computing("tf32", device):
            results += [{key: value.cpu() for key, value in one.items()} for one in net(images)]
    return results


def loading(model: rcnn.FasterRCNN, optim: OptimConfig, data: Path, precision: Precision) -> Row:
    """The loader alone, and the share of the time of training that goes by waiting for it.

    An epoch is trained from the loader, and then once more from the batches that it gave: the difference is what they
    cost.
    """
    dataset = open_dataset(str(data), "train")
    recipe = resolve(TrainConfig(model=model.config, loader=LoaderConfig(batch_size=READ_BATCH)))
    loader = loader_for(model, dataset, recipe.loader, train=True)
    step = Step(model.train(), make_optimizer(model, optim, 0.0), precision=precision)

    def trained(batches: Iterable[Batch]) -> tuple[float, list[Batch]]:
        kept, pending = [], None
        start = time.perf_counter()
        for batch in batches:
            kept.append(batch)
            result = step([batch])
            if pending is not None:
                pending.read()
            pending = result
        assert pending is not None
        pending.read()
        return time.perf_counter() - start, kept

    for batch in loader:  # workers start, kernels are made
        step([batch]).read()
    loader.set_epoch(1)
    start = time.perf_counter()
    images = sum(len(batch.indices) for batch in loader)
    alone = time.perf_counter() - start
    loader.set_epoch(2)
    together, kept = trained(loader)
    ready, _ = trained(kept)
    return {
        "model": model.config.name,
        "batch": READ_BATCH,
        "precision": precision,
        "size": [given(model.config.min_size), given(model.config.max_size)],
        "images": images,
        "workers": loader.num_workers,
        "loader_images_per_second": images / alone,
        "images_per_second": images / together,
        "data": max(0.0, 1 - ready / together),
    }


def pictures(folder: Path, size: tuple[int, int]) -> list[Path]:
    """JPEGs of a size, drawn flowers made larger or smaller."""
    files = []
    for number, file in enumerate(sorted((folder / "VOC2007" / "JPEGImages").glob("*.jpg"))[:PICTURES]):
        files.append(folder / f"{number}.jpg")
        with Image.open(file) as image:
            image.resize((size[1], size[0])).save(files[-1], quality=90)
    return files


def run(
    models: Sequence[str],
    batches: Sequence[int],
    data: Path | None,
    device: torch.device,
    compared: bool,
    repeats: int,
) -> Iterator[dict[str, Any]]:
    """Gates, then rows.

    Args:
        models: of :data:`MODELS`.
        batches: images per batch.
        data: VOC or COCO folder for the loader; None draws flowers.
        device: where to.
        compared: with torchvision.
        repeats: timed calls of each.

    Yields:
        For each model ``{"gate": differences by model, "rows": one dict per time, "loader": one dict}``.
    """
    size = SIZES[device.type]
    with tempfile.TemporaryDirectory() as temporary:
        drawn = flowers.write(Path(temporary) / "flowers", count=DRAWN[device.type])
        files = pictures(drawn, size)
        for name in models:
            model, optim = detector(name, size, device)
            found = {name: gate(model)} if compared else {}
            rows: list[Row] = []
            for precision in PRECISIONS[device.type]:
                for count in batches:
                    batch = scene(count, *size, device)
                    rows += training(model, optim, batch, precision, compared, repeats)
            for precision in PRECISIONS[device.type]:
                for count in batches:
                    batch = scene(count, *size, device)
                    rows += detection(model, batch, precision, compared, repeats)
            rows += predicting(model, files, compared, repeats)
            row = loading(model, optim, data or drawn, PRECISIONS[device.type][-1])
            yield {"gate": found, "rows": rows, "loader": [row]}
