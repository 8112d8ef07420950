"""Data sets with boxes, and the batches made from them."""

from collections.abc import Sequence
from pathlib import Path

from rcnn.data.batch import Batch
from rcnn.data.coco import COCODataset, coco_annotations, to_coco
from rcnn.data.dataset import DataError, DetectionDataset, Record
from rcnn.data.loader import Loader, make_loader
from rcnn.data.transforms import Augment
from rcnn.data.voc import VOCDataset, voc_root

__all__ = [
    "Augment",
    "Batch",
    "COCODataset",
    "DataError",
    "DetectionDataset",
    "Loader",
    "Record",
    "VOCDataset",
    "make_loader",
    "open_dataset",
    "to_coco",
]


def open_dataset(
    path: "str | Path",
    split: str,
    *,
    classes: Sequence[str] | None = None,
    one_based: bool = True,
    strict: bool = False,
) -> DetectionDataset:
    """Open a folder in VOC or COCO layout, whichever it is.

    Args:
        path: the data folder; see :class:`VOCDataset` and :class:`COCODataset` for what it may hold.
        split: image set, as ``train``.
        classes: names of the foreground classes in the order of their labels; default: the data set's own.
        one_based: VOC corners count from 1 and include both ends; no effect on COCO.
        strict: raise at the first bad object or image instead of skipping and reporting it.

    Raises:
        DataError: there is no such folder, it has neither layout, or its content is at fault.
    """
    root = Path(path)
    if not root.is_dir():
        raise DataError(f"{root}: expected a data folder, but there is none")
    if voc_root(root) is not None:
        return VOCDataset(root, split, classes, one_based=one_based, strict=strict)
    if coco_annotations(root):
        return COCODataset(root, split, classes, strict=strict)
    raise DataError(
        f"{root}: expected a VOC folder (Annotations, JPEGImages, ImageSets/Main, here or in VOC2007) or a COCO folder "
        f"(annotations/instances_SPLIT.json or SPLIT/_annotations.coco.json), got neither"
    )
