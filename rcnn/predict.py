"""``python -m rcnn.predict``: boxes on your pictures, as pictures and as JSON."""

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rcnn import console, detector, engine, viz
from rcnn.files import write_json
from rcnn.images import SUFFIXES, ImageError

PROG = "rcnn predict"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; ``argv`` defaults to the process's own arguments."""
    parser = console.Parser(
        PROG, "Detect objects in pictures; write the pictures with boxes, and a JSON of the detections."
    )
    parser.add_argument("inputs", type=str, nargs="+", help="files, folders or globs")
    parser.add_argument("--checkpoint", type=str, required=True, help="run folder or model file (.safetensors)")
    parser.add_argument("--out", type=str, default="predictions", help="folder for the results")
    parser.add_argument("--score_threshold", type=float, default=0.5, help="detections with a lower score are left out")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--batch_size", type=int, default=8, help="pictures per pass")
    parser.add_argument(
        "--half", type=bool, default=False, help="compute in 16 bits: float16 on a GPU, bfloat16 on a CPU"
    )
    parser.add_argument("--strict", type=bool, default=False, help="stop at the first picture that cannot be read")
    options = parser.read(argv)
    console.run(PROG, lambda: _predict(options))


def find(inputs: Sequence[str]) -> list[Path]:
    """The picture files that the inputs mean: files as they are, folders by suffix, globs expanded; each one once.

    Raises:
        ValueError: an input that means no picture.
    """
    files: dict[Path, None] = {}
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            inside = (p for p in path.iterdir() if not p.name.startswith("."))
            found = sorted(p for p in inside if p.suffix.lower() in SUFFIXES and p.is_file())
        elif path.exists():
            found = [path]
        else:
            found = sorted(p for p in map(Path, glob.glob(text, recursive=True)) if p.is_file())
        if not found:
            raise ValueError(f"{text} must be a picture, a folder of pictures or a glob that finds some, got none")
        files |= dict.fromkeys(found)
    return list(files)


def _predict(options: Any) -> None:
    if options.batch_size < 1:
        raise ValueError(f"batch_size must be greater than 0, got {options.batch_size}")
    files = find(options.inputs)
    model = detector.load(options.checkpoint, engine.choose_device(options.device))
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    if own := next((path for path in files if path.resolve().parent == out.resolve()), None):
        raise ValueError(f"{out} holds the input {own.name}, which its result might overwrite; choose another --out")
    content: list[dict[str, Any]] = []
    skipped: list[str] = []
    taken: set[str] = set()
    found = model.predict_each(files, options.score_threshold, options.batch_size, options.half)
    for path, one in zip(files, found, strict=True):
        if isinstance(one, ImageError):
            if options.strict or len(files) == 1:
                raise one
            skipped.append(str(one))
            continue
        array, result = one
        name = path.stem
        while name in taken:  # two folders may hold files of the same name
            name += "_"
        taken.add(name)
        boxes, scores, names = result["boxes"].tolist(), result["scores"].tolist(), result["names"]
        viz.save(viz.draw_boxes(array, boxes, names, scores, model.classes), out / f"{name}.jpg")
        rows = zip(names, result["labels"].tolist(), scores, boxes, strict=True)
        content.append(
            {
                "file": str(path),
                "picture": f"{name}.jpg",
                "width": array.shape[1],
                "height": array.shape[0],
                "detections": [{"name": n, "label": k, "score": s, "box": box} for n, k, s, box in rows],
            }
        )
        print(f"{path}: {len(result['names'])} objects")
    for sentence in skipped:
        print(f"{sentence}; skipped")
    if not content:
        raise ValueError(f"none of the {len(files)} pictures could be read")
    write_json(out / "detections.json", {"classes": model.classes, "images": content})
    objects = sum(len(image["detections"]) for image in content)
    print(
        f"{objects} objects in {len(content)} pictures, {len(skipped)} skipped; pictures and detections.json in {out}"
    )


if __name__ == "__main__":
    main()
