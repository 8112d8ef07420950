"""``python -m rcnn.train``: train a detector on a VOC or COCO folder, or on generated flowers."""

import contextlib
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from rcnn import checkpoint, console, detector, distributed, engine, viz
from rcnn.config import TrainConfig, given, resolve
from rcnn.data import flowers, open_dataset
from rcnn.data.dataset import DetectionDataset
from rcnn.images import ImageError
from rcnn.metrics.curves import precision_recall
from rcnn.models.faster_rcnn import FasterRCNN
from rcnn.tracking import Tracker

PROG = "rcnn train"

#: Where the generated data set goes, and how often it is gone through unless told otherwise: it is soon learnt.
FLOWERS = Path("runs") / f"flowers-v{flowers.VERSION}"
FLOWER_EPOCHS = 12

#: Pictures of the validation set that a run leaves with its boxes on.
PICTURES = 12


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; ``argv`` defaults to the process's own arguments."""
    about = "Train a Faster R-CNN. Without arguments: the tiny model on generated flowers. Null: the recipe's."
    parser = console.Parser(PROG, about)
    parser.add_argument("--config", action="config", help="YAML file with any of the options below")
    parser.add_class_arguments(TrainConfig)
    words = sys.argv[1:] if argv is None else list(argv)
    config = TrainConfig(**parser.read_groups(words))
    if config.resume and config.out:
        # The run's own settings, unless told otherwise.
        saved = Path(config.out) / engine.CONFIG
        if not saved.is_file() or not (saved.parent / checkpoint.STATE_LAST).is_file():
            console.fail(PROG, f"{config.out} holds no run to go on with: start it without --resume")
        name = parser.read_groups(["--config", str(saved)])["model"].name
        config = TrainConfig(**parser.read_groups(["--config", str(saved), *words]))
        if config.model.name != name:
            console.fail(PROG, f"{config.out} is a run of {name}, got --model.name {config.model.name}")
    console.run(PROG, lambda: _train(config))


def _train(config: TrainConfig) -> None:
    if not config.data and config.epochs is None:
        config.epochs = FLOWER_EPOCHS
    config = resolve(config)
    device = distributed.init(engine.choose_device(config.device))
    try:
        _run(config, device)
    finally:
        distributed.shutdown()


def _run(config: TrainConfig, device: torch.device) -> None:
    first = distributed.rank() == 0
    folder = _run_folder(config)
    config.out = str(folder)
    if not config.data:
        config.data = str(FLOWERS)
        if first:
            print(f"no --data given: drawing the flower data set in {FLOWERS}")
            flowers.write(FLOWERS)
        distributed.barrier()
    train_set = _open(config, config.train_split)
    val_set = _open(config, config.val_split, train_set.classes)
    torch.manual_seed(config.seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        if config.resume:  # the run's state brings all weights
            model = FasterRCNN(config.model, train_set.classes, config.seed)
        else:
            model = detector.build(config.model, train_set.classes, config.seed)
    if first:
        _announce(config, device, model, train_set, val_set, [str(w.message) for w in caught])
    model.to(device)
    start = time.perf_counter()
    with Tracker(folder if first else None) as tracker:
        try:
            engine.train(config, model, train_set, val_set, folder, tracker)
        except engine.Interrupted as stop:
            tracker.message(str(stop))
            sys.exit(console.INTERRUPTED)
        _finish(config, folder, device, val_set, tracker, time.perf_counter() - start)


def _run_folder(config: TrainConfig) -> Path:
    if config.resume and not config.out:
        raise ValueError("--resume goes on in a run folder: name it with --out")
    name = distributed.broadcast(config.out or f"runs/{config.model.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    folder = Path(name)
    if not config.resume and (folder / checkpoint.STATE_LAST).exists():
        raise ValueError(f"{folder} holds a run already; go on with --resume, or choose another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {folder} cannot be a run folder: {error.strerror}") from None
    return folder


def _open(config: TrainConfig, split: str, classes: list[str] | None = None) -> DetectionDataset:
    return open_dataset(config.data, split, classes=classes, one_based=config.one_based, strict=config.strict)


def _announce(
    config: TrainConfig,
    device: torch.device,
    model: FasterRCNN,
    train_set: DetectionDataset,
    val_set: DetectionDataset,
    cautions: list[str],
) -> None:
    for split, dataset in ((config.train_split, train_set), (config.val_split, val_set)):
        objects = sum(len(record.labels) for record in dataset.records)
        print(f"{split}: {len(dataset)} images, {objects} objects of {len(dataset.classes)} classes in {config.data}")
        console.print_problems(dataset, split)
        if not objects:
            print(f"{split}: no object at all; from this alone nothing but background can be learnt or measured")
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{config.model.name}: {parameters / 1e6:.1f} M parameters on {device}, {distributed.world_size()} process(es)"
    )
    for sentence in [model.loaded] * bool(model.loaded) + cautions:
        print(sentence)
    print(engine.scaled_lr(config.optim, given(config.loader.batch_size) * distributed.world_size())[1])


def _finish(
    config: TrainConfig,
    folder: Path,
    device: torch.device,
    val_set: DetectionDataset,
    tracker: Tracker,
    seconds: float,
) -> None:
    distributed.barrier()  # the first rank has written the best weights
    model = detector.load(folder, device)
    found = engine.evaluate(model, engine.loader_for(model, val_set, config.loader, train=False), val_set)
    if found is None:
        return
    drawn = _draw(val_set, found, folder / "predictions")
    if drawn:
        sheet = viz.contact_sheet(drawn, columns=4)
        viz.save(sheet, folder / "predictions.jpg")
        tracker.image("predictions", np.asarray(sheet), 0)
    plots = viz.plot_run(folder / "results.csv", precision_recall(val_set, found.results), folder / "plots")
    tracker.message(f"trained {seconds / 60:.1f} minutes")
    console.show(console.ap_table(f"{config.val_split}: average precision of the best weights", found.voc, found.coco))
    print(f"run folder: {folder}")
    print(f"pictures with predicted boxes: {folder / 'predictions'}, and on one sheet {folder / 'predictions.jpg'}")
    print(
        f"plots: {folder / 'plots'}" if plots else "plots: none drawn, matplotlib is missing (pip install matplotlib)"
    )


def _draw(dataset: DetectionDataset, found: engine.Evaluation, folder: Path) -> list[Image.Image]:
    """Pictures of the first images with their boxes, saved in ``folder``; what cannot be read was told before."""
    folder.mkdir(exist_ok=True)
    drawn: list[Image.Image] = []
    for index, (record, result) in enumerate(zip(dataset.records, found.results, strict=True)):
        if len(drawn) == PICTURES:
            break
        with contextlib.suppress(ImageError):
            keep = result["scores"] >= 0.5
            names = [dataset.classes[label - 1] for label in result["labels"][keep]]
            pixels = dataset.read(index)
            drawn.append(viz.draw_boxes(pixels, result["boxes"][keep], names, result["scores"][keep], dataset.classes))
            viz.save(drawn[-1], folder / f"{index + 1:06d}_{record.path.stem}.jpg")
    return drawn


if __name__ == "__main__":
    main()
