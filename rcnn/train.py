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

from rcnn import console, detector, distributed, engine, replay, run_folder, training, viz
from rcnn.config import TrainConfig, images_per_batch, resolve
from rcnn.data import flowers, open_dataset
from rcnn.data.dataset import DetectionDataset
from rcnn.images import ImageError
from rcnn.metrics.curves import match_detections
from rcnn.models.faster_rcnn import FasterRCNN
from rcnn.optim import scaled_lr
from rcnn.stopping import Interrupted, Reason
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
    parser.add_argument(
        "--replay", type=str, default="", help="compute a saved bad step once more, say what is amiss, and end"
    )
    parser.add_class_arguments(TrainConfig)
    words = sys.argv[1:] if argv is None else list(argv)
    options = parser.read_groups(words)
    file = options.pop("replay")
    config = TrainConfig(**options)
    if file:
        console.run(PROG, lambda: _replay(file, config.device))
        return
    if config.resume and config.out:
        # The run's own settings, unless told otherwise.
        saved = Path(config.out) / run_folder.CONFIG
        if saved.is_file() and run_folder.states(saved.parent):
            name = _settings(parser, ["--config", str(saved)]).model.name
            config = _settings(parser, ["--config", str(saved), *words])
            if config.model.name != name:
                console.fail(PROG, f"{config.out} is a run of {name}, got --model.name {config.model.name}")
        elif config.resume == "auto":
            config.resume = False
        else:
            console.fail(PROG, f"{config.out} holds no run to go on with: start it without --resume")
    console.run(PROG, lambda: _train(config))


def _settings(parser: console.Parser, words: Sequence[str]) -> TrainConfig:
    options = parser.read_groups(words)
    del options["replay"]
    return TrainConfig(**options)


def _replay(file: str, device: str) -> None:
    found = replay.replay(file, engine.choose_device(device))
    facts = found.facts
    print(f"step {facts['step']}, learning rate {facts['lr']:g}, images {facts['files']}")
    for name, value in found.losses.items():
        print(f"{name}: {value:g} (in the run {facts['losses'][name]:g})")
    print(f"gradient norm: {found.norm:g} (in the run {facts['norm']:g})")
    print("\n".join(found.amiss) or "everything is finite this time")


def _train(config: TrainConfig) -> None:
    if not config.data and config.epochs is None:
        config.epochs = FLOWER_EPOCHS
    config = resolve(config)
    with engine.deterministic(config.deterministic):
        device = distributed.init(engine.choose_device(config.device))
        code = _run(config, device)
        # Not after an error: the others may be gone, and NCCL would wait for them.
        distributed.shutdown()
    if code:
        sys.exit(code)


def _run(config: TrainConfig, device: torch.device) -> int:
    """The exit code of the run."""
    first = distributed.rank() == 0
    folder = _run_folder(config)
    config.out = str(folder)
    lock = run_folder.Lock(folder, print) if first else None
    try:
        if first:
            run_folder.remove_leavings(folder)
        return _train_in(config, folder, device, first)
    finally:
        if lock is not None:
            lock.release()


def _train_in(config: TrainConfig, folder: Path, device: torch.device, first: bool) -> int:
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
    model.to(device).use_channels_last(config.channels_last)
    if config.compile:
        model.compile_layers()
    if config.loader.batch_size == "auto":
        most = -(-len(train_set) // distributed.world_size())
        fits = engine.find_batch_size(model, config.optim, most, config.precision)
        config.loader.batch_size = -distributed.maximum(-fits)[0]  # the least of all processes
    if first:
        _announce(config, device, model, train_set, val_set, [str(w.message) for w in caught])
    start = time.perf_counter()
    with Tracker(folder if first else None) as tracker:
        try:
            training.train(config, model, train_set, val_set, folder, tracker)
        except Interrupted as stop:
            tracker.message(str(stop))
            return console.INTERRUPTED if stop.reason == Reason.INTERRUPTED else console.PREEMPTED
        _finish(config, folder, device, val_set, tracker, time.perf_counter() - start)
    return 0


def _run_folder(config: TrainConfig) -> Path:
    if config.resume and not config.out:
        raise ValueError("--resume goes on in a run folder: name it with --out")
    name = distributed.broadcast(config.out or f"runs/{config.model.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    folder = Path(name)
    if not config.resume and run_folder.states(folder):
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
    print(scaled_lr(config.optim, images_per_batch(config.loader), distributed.world_size())[1])


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
    loader = engine.loader_for(model, val_set, config.loader, train=False)
    found = engine.evaluate(model, loader, val_set, precision=config.precision)
    if found is None:
        return
    drawn = _draw(val_set, found, folder / "predictions")
    if drawn:
        sheet = viz.contact_sheet(drawn, columns=4)
        viz.save(sheet, folder / "predictions.jpg")
        tracker.image("predictions", np.asarray(sheet))
    curves = {name: curve for name, curve in match_detections(val_set, found.results).items() if curve.gt}
    for name, curve in curves.items():
        tracker.precision_recall(f"precision_recall/{name}", curve.scores, curve.hits, curve.gt)
    lines = {name: (curve.recall, curve.precision) for name, curve in curves.items()}
    plots = viz.plot_run(folder / "results.csv", lines, folder / "plots")
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
