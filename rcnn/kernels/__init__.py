"""The detection ops, one room each. A function wins the name of its room: ``kernels.nms`` is the op, not the module."""

from rcnn.kernels.anchors import anchors, cell_anchors
from rcnn.kernels.detections import detections
from rcnn.kernels.matching import match, match_anchors, match_proposals
from rcnn.kernels.nms import batched_nms, nms, nms_padded
from rcnn.kernels.proposals import proposals
from rcnn.kernels.roi_align import multiscale_roi_align, roi_align
from rcnn.kernels.roi_pool import roi_pool
from rcnn.kernels.warmup import warmup

__all__ = [
    "anchors",
    "batched_nms",
    "cell_anchors",
    "detections",
    "match",
    "match_anchors",
    "match_proposals",
    "multiscale_roi_align",
    "nms",
    "nms_padded",
    "proposals",
    "roi_align",
    "roi_pool",
    "warmup",
]
