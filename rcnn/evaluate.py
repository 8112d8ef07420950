"""``python -m rcnn.evaluate``: COCO and VOC average precision of a checkpoint on a data set."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from rcnn import console, detector, distributed, engine
from rcnn.config import LoaderConfig, Precision
from rcnn.data import open_dataset
from rcnn.files import check_target, write_json

PROG = "rcnn evaluate"

_COCO = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; ``argv`` defaults to the process's own arguments."""
    parser = console.Parser(PROG, "Evaluate a checkpoint: COCO and VOC average precision, as a table and as JSON.")
    parser.add_argument("--checkpoint", type=str, required=True, help="run folder or model file (.safetensors)")
    parser.add_argument("--data", type=str, required=True, help="folder in VOC or COCO layout")
    parser.add_argument("--split", type=str, default="val", help="image set")
    parser.add_argument(
        "--out", type=str, default="", help="JSON file; default: evaluation_SPLIT.json at the checkpoint"
    )
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--batch_size", type=int, default=8, help="images per pass")
    parser.add_argument(
        "--workers", type=int, default=-1, help="loading processes; -1: one for every two cores, at most 8"
    )
    parser.add_argument("--half", type=bool, default=False, help="compute in 16 bits, as predict does with it")
    parser.add_argument("--one_based", type=bool, default=True, help="VOC corners count from 1 and include both ends")
    parser.add_argument("--strict", type=bool, default=False, help="stop at the first bad image or object")
    options = parser.read(argv)
    console.run(PROG, lambda: _evaluate(options))


def _evaluate(options: Any) -> None:
    device = distributed.init(engine.choose_device(options.device))
    try:
        model = detector.load(options.checkpoint, device)
        checkpoint = Path(options.checkpoint)
        folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
        out = Path(options.out) if options.out else folder / f"evaluation_{options.split}.json"
        _check(out)
        dataset = open_dataset(
            options.data, options.split, classes=model.classes, one_based=options.one_based, strict=options.strict
        )
        loading = LoaderConfig(batch_size=options.batch_size, workers=options.workers, color=0.0, scale=(1.0, 1.0))
        loader = engine.loader_for(model, dataset, loading, train=False)
        precision: Precision = "tf32" if not options.half else "fp16" if device.type == "cuda" else "bf16"
        found = engine.evaluate(model, loader, dataset, precision=precision)
    finally:
        distributed.shutdown()
    if found is None:
        return
    content = {
        "checkpoint": options.checkpoint,
        "data": options.data,
        "split": options.split,
        "images": len(dataset),
        "precision": precision,
        "losses": found.losses,
        "voc": found.voc,
        "coco": found.coco,
        "problems": dataset.problems + found.skipped,
    }
    write_json(out, content)
    console.print_problems(dataset, options.split)
    for sentence in found.skipped:
        print(f"{sentence}; it counts as an image without detections")
    console.show(console.ap_table(f"{options.split}: {len(dataset)} images", found.voc, found.coco))
    table = Table(*_COCO, title="COCO")
    table.add_row(*(f"{found.coco[name]:.3f}" if found.coco[name] >= 0 else "-" for name in _COCO))
    console.show(table)
    print(f"written: {out}")


def _check(out: Path) -> None:
    """Tell of a place that cannot be written before the work, on all processes."""
    problem = None
    if not distributed.rank():
        try:
            check_target(out)
        except OSError as error:
            problem = error
    problem = distributed.broadcast(problem)
    if problem is not None:
        raise problem


if __name__ == "__main__":
    main()
