"""What each op says of arguments that it cannot take: one sentence that names the argument, on every device."""

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rcnn import kernels
from rcnn.structures import Proposals, Targets

NAN = float("nan")
OPS = (
    *("nms", "batched_nms", "nms_padded", "match", "match_anchors", "match_proposals", "proposals", "detections"),
    *("roi_align", "pyramid", "roi_pool"),
)


class Sound:
    """Sound arguments of every op; each test spoils one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 11, 11]], device=device)
        self.scores = torch.tensor([0.9, 0.8], device=device)
        self.elsewhere = torch.zeros(2, device="meta")
        self.targets = Targets(
            boxes=self.boxes,
            labels=torch.tensor([1, 2], device=device),
            offsets=torch.tensor([0, 2], device=device),
            image_sizes=torch.tensor([[20.0, 20.0]], device=device),
            image_ids=torch.tensor([0], device=device),
        )
        self.candidates = Proposals(self.boxes[None], self.scores[None], torch.tensor([2], device=device))
        self.step = torch.tensor(0, device=device)
        self.maps = torch.zeros(1, 4, 5, 5, device=device)
        self.rois = torch.tensor([[0, 0, 0, 3.0, 3.0]], device=device)

    def nms(self, **changed: Any) -> Any:
        return kernels.nms(**{"boxes": self.boxes, "scores": self.scores, "iou_threshold": 0.5, **changed})

    def batched_nms(self, **changed: Any) -> Any:
        idxs = torch.zeros(2, dtype=torch.int64, device=self.device)
        sound = {"boxes": self.boxes, "scores": self.scores, "idxs": idxs, "iou_threshold": 0.5}
        return kernels.batched_nms(**{**sound, **changed})

    def nms_padded(self, **changed: Any) -> Any:
        sound = {"boxes": self.boxes[None], "count": self.candidates.count, "iou_threshold": 0.5, "max_output": 2}
        return kernels.nms_padded(**{**sound, **changed})

    def match(self, **changed: Any) -> Any:
        truth = {"gt_boxes": self.boxes, "gt_labels": self.targets.labels, "gt_offsets": self.targets.offsets}
        sound = {"boxes": self.boxes, "high_threshold": 0.7, "low_threshold": 0.3, **truth}
        return kernels.match(**{**sound, **changed})

    def match_anchors(self, **changed: Any) -> Any:
        sound = {"anchors": self.boxes, "targets": self.targets, "seed": 0, "step": self.step}
        return kernels.match_anchors(**{**sound, **changed})

    def match_proposals(self, **changed: Any) -> Any:
        sound = {"proposals": self.candidates, "targets": self.targets, "seed": 0, "step": self.step}
        return kernels.match_proposals(**{**sound, **changed})

    def proposals(self, **changed: Any) -> Any:
        sound = {
            "objectness": self.scores[None],
            "deltas": torch.zeros(1, 2, 4, device=self.device),
            "anchors": self.boxes,
            "image_sizes": self.targets.image_sizes,
            "level_sizes": [2],
            "pre_nms_top_n": 2,
            "post_nms_top_n": 2,
        }
        return kernels.proposals(**{**sound, **changed})

    def detections(self, **changed: Any) -> Any:
        sound = {
            "logits": torch.zeros(2, 3, device=self.device),
            "deltas": torch.zeros(2, 12, device=self.device),
            "proposals": self.candidates,
            "image_sizes": self.targets.image_sizes,
        }
        return kernels.detections(**{**sound, **changed})

    def roi_align(self, **changed: Any) -> Any:
        return kernels.roi_align(**{"input": self.maps, "boxes": self.rois, "output_size": 2, **changed})

    def pyramid(self, **changed: Any) -> Any:
        sound = {"features": [self.maps], "rois": self.rois, "output_size": 2, "spatial_scales": [0.5]}
        return kernels.multiscale_roi_align(**{**sound, **changed})

    def roi_pool(self, **changed: Any) -> Any:
        return kernels.roi_pool(**{"input": self.maps, "boxes": self.rois, "output_size": 2, **changed})

    def anchors(self, **changed: Any) -> Any:
        return kernels.anchors(**{"cells": self.boxes[None], "shapes": [(1, 2)], "strides": [4], **changed})


Spoil = Callable[[Sound], Any]
CASES: list[tuple[Spoil, str]] = [
    (lambda s: s.nms(boxes=s.boxes[:, :3]), r"boxes must have shape \(N, 4\), got \(2, 3\)"),
    (lambda s: s.nms(boxes=s.boxes.long()), "boxes must be float32, bfloat16 or float16, got torch.int64"),
    (lambda s: s.nms(scores=s.elsewhere), "scores must be on .*, where boxes is, got meta"),
    (lambda s: s.nms(iou_threshold=NAN), "iou_threshold must lie in 0..1, got nan"),
    (lambda s: s.nms(iou_threshold=-0.1), "iou_threshold must lie in 0..1, got -0.1"),
    (lambda s: s.batched_nms(idxs=s.scores), "idxs must have an integer dtype, got torch.float32"),
    (lambda s: s.batched_nms(idxs=s.elsewhere.long()), "idxs must be on .*, where boxes is, got meta"),
    (lambda s: s.nms_padded(count=s.scores[:1]), "count must be torch.int64, got torch.float32"),
    (lambda s: s.nms_padded(max_output=-1), r"max_output must be an integer in 0..2147483647, got -1"),
    (lambda s: s.match(boxes=s.boxes.long()), "boxes must be float32, bfloat16 or float16, got torch.int64"),
    (lambda s: s.match(gt_boxes=s.boxes.to("meta")), "gt_boxes must be on .*, where boxes is, got meta"),
    (lambda s: s.match(gt_boxes=s.boxes.long()), "gt_boxes must be float32, bfloat16 or float16, got torch.int64"),
    (lambda s: s.match(gt_labels=s.scores), "gt_labels must be torch.int64, got torch.float32"),
    (lambda s: s.match(gt_offsets=s.targets.offsets.int()), "gt_offsets must be torch.int64, got torch.int32"),
    (lambda s: s.match(high_threshold=NAN), "high_threshold must be a finite number, got nan"),
    (lambda s: s.match(low_threshold=-0.1), "thresholds must satisfy .*, got -0.1 and 0.7"),
    (lambda s: s.match_anchors(anchors=s.boxes[0]), r"anchors must have shape \(N, 4\) with N at least 1, got \(4,\)"),
    (lambda s: s.match_anchors(allowed_border=NAN), "allowed_border must be a finite number, got nan"),
    (lambda s: s.match_anchors(positive_fraction=NAN), "positive_fraction must lie in 0..1, got nan"),
    (lambda s: s.match_anchors(step=s.step.to("meta")), "step must be on .*, where anchors is, got meta"),
    (
        lambda s: s.match_anchors(targets=replace(s.targets, boxes=s.boxes.to("meta"))),
        "targets.boxes must be on .*, where anchors is, got meta",
    ),
    (lambda s: s.match_proposals(box_weights=(1, 1, NAN, 1)), "box_weights must be 4 numbers above 0, got .*nan"),
    (
        lambda s: s.match_proposals(proposals=replace(s.candidates, boxes=s.boxes[None].to("meta"))),
        "proposals.count must be on meta, where proposals.boxes is, got",
    ),
    (lambda s: s.proposals(objectness=s.scores), r"objectness must have shape \(B, N\), got \(2,\)"),
    (
        lambda s: s.proposals(objectness=s.scores[None].long()),
        "objectness must be float32, bfloat16 or float16, got torch.int64",
    ),
    (lambda s: s.proposals(anchors=s.boxes.double()), "anchors must be torch.float32, got torch.float64"),
    (lambda s: s.proposals(anchors=s.boxes.to("meta")), "anchors must be on .*, where objectness is, got meta"),
    (lambda s: s.proposals(level_sizes=[3, -1]), r"level_sizes\[1\] must be an integer in 0..2147483647, got -1"),
    (lambda s: s.proposals(iou_threshold=NAN), "iou_threshold must lie in 0..1, got nan"),
    (lambda s: s.proposals(min_size=-1.0), "min_size must be at least 0, got -1.0"),
    (lambda s: s.proposals(pre_nms_top_n=0), r"pre_nms_top_n must be an integer in 1..2147483647, got 0"),
    (lambda s: s.detections(logits=s.maps), r"logits must have shape \(2, K \+ 1\), got"),
    (
        lambda s: s.detections(deltas=torch.zeros(2, 12, device="meta")),
        "deltas must be on .*, where logits is, got meta",
    ),
    (lambda s: s.detections(score_threshold=NAN), "score_threshold must lie in 0..1, got nan"),
    (lambda s: s.detections(iou_threshold=-1), "iou_threshold must lie in 0..1, got -1"),
    (
        lambda s: s.detections(detections_per_image=0),
        "detections_per_image must be an integer in 1.*, got 0",
    ),
    (lambda s: s.roi_align(boxes=s.rois[:, :4]), r"boxes must have shape \(R, 5\), got \(1, 4\)"),
    (lambda s: s.roi_align(boxes=s.rois.to("meta")), "boxes must be on .*, where input is, got meta"),
    (lambda s: s.roi_align(boxes=s.rois.clone().requires_grad_()), "boxes must not require a gradient: roi_align has"),
    (lambda s: s.roi_align(spatial_scale=NAN), "spatial_scale must be a finite number, got nan"),
    (lambda s: s.roi_align(output_size=0), "output_size must be one or two positive integers, got 0"),
    (lambda s: s.roi_align(input=s.maps.long()), "input must be float32, bfloat16 or float16, got torch.int64"),
    (lambda s: s.roi_pool(boxes=s.rois.to("meta")), "boxes must be on .*, where input is, got meta"),
    (lambda s: s.roi_pool(boxes=s.rois.clone().requires_grad_()), "boxes must not require a gradient: roi_pool has"),
    (lambda s: s.roi_pool(input=s.maps[0]), r"input must have shape \(B, C, H, W\) with H, W > 0, got \(4, 5, 5\)"),
    (
        lambda s: s.anchors(cells=s.boxes),
        r"cells must be float32 of shape .*, got torch.float32 of \(2, 4\)",
    ),
    (lambda s: s.anchors(shapes=[(-1, 1)]), r"shapes\[0\] must be an integer in 0..2147483647, got -1"),
    (lambda s: s.nms(boxes=s.boxes.numpy(force=True)), "boxes must be a torch.Tensor, got ndarray"),
    (lambda s: s.nms(boxes=s.boxes.to_sparse()), "boxes must be a dense tensor, got torch.sparse_coo"),
    (lambda s: s.nms(boxes=s.boxes.to(torch.float8_e5m2)), "boxes must be float32, bfloat16 or float16, got .*float8"),
    (lambda s: s.nms(boxes=s.boxes.to("meta"), scores=s.elsewhere), "boxes must hold data, got a tensor on the meta"),
    (lambda s: s.nms(iou_threshold="0.5"), "iou_threshold must be a number, got str"),
    (lambda s: s.nms(iou_threshold=Fraction(1, 2)), "iou_threshold must be a number, got Fraction"),
    (lambda s: s.nms_padded(max_output=True), "max_output must be an integer, got True"),
    (lambda s: s.nms_padded(max_output=1 << 40), r"max_output must be an integer in 0..2147483647, got 1099511627776"),
    (lambda s: s.match(boxes=s.boxes.double()), "boxes must be float32, bfloat16 or float16, got torch.float64"),
    (lambda s: s.match_anchors(seed=1.5), "seed must be an integer, got 1.5"),
    (lambda s: s.match_anchors(step=0), "step must be a torch.Tensor, got int"),
    (lambda s: s.match_anchors(batch_size_per_image=4.0), "batch_size_per_image must be an integer, got 4.0"),
    (
        lambda s: s.match_anchors(targets=replace(s.targets, image_ids=s.targets.image_ids.int())),
        "targets.image_ids must be torch.int64, got torch.int32",
    ),
    (
        lambda s: s.match_proposals(proposals=replace(s.candidates, count=s.candidates.count.int())),
        "proposals.count must be torch.int64, got torch.int32",
    ),
    (
        lambda s: s.match_proposals(proposals=replace(s.candidates, count=s.candidates.count.repeat(3))),
        r"proposals.count must have shape \(1,\), got \(3,\)",
    ),
    (lambda s: s.proposals(post_nms_top_n=2.0), "post_nms_top_n must be an integer, got 2.0"),
    (lambda s: s.proposals(level_sizes=[2.0]), r"level_sizes\[0\] must be an integer, got 2.0"),
    (lambda s: s.detections(box_weights=(1, 1, 0, 1)), "box_weights must be 4 numbers above 0, got .*0"),
    (lambda s: s.roi_align(boxes=[s.boxes, s.elsewhere]), r"boxes\[1\] must be on .*, where boxes\[0\] is, got meta"),
    (lambda s: s.roi_align(boxes=5), "boxes must be a torch.Tensor or one tensor per image, got int"),
    (lambda s: s.roi_align(output_size=2.0), "output_size must be one or two positive integers, got 2.0"),
    (lambda s: s.roi_align(output_size=True), "output_size must be one or two positive integers, got True"),
    (lambda s: s.roi_align(sampling_ratio=NAN), "sampling_ratio must be an integer, got nan"),
    (lambda s: s.roi_align(sampling_ratio=10**8), "sampling_ratio must be at most 1024, got 100000000"),
    (lambda s: s.pyramid(features=s.maps), "features must be a sequence of maps, got one torch.Tensor"),
    (lambda s: s.pyramid(canonical_scale=0), "canonical_scale must be above 0, got 0"),
    (lambda s: s.pyramid(canonical_level=NAN), "canonical_level must be a finite number, got nan"),
    (lambda s: s.anchors(shapes=[(1.5, 2)]), r"shapes\[0\] must be an integer, got 1.5"),
    (lambda s: s.anchors(strides=[float("inf")]), r"strides\[0\] must be a finite number, got inf"),
    (lambda s: s.anchors(shapes=5), "shapes must be a list or tuple, got int"),
    (lambda s: s.anchors(shapes=[5]), r"shapes\[0\] must be a list or tuple, got int"),
    (lambda s: s.anchors(strides=4), "strides must be a list or tuple, got int"),
    (lambda s: s.anchors(strides=[[4]]), r"strides\[0\] must be a number, got list"),
    (lambda s: kernels.cell_anchors(32.0, [1.0]), "sizes must be a list or tuple, got float"),
    (
        lambda s: kernels.cell_anchors([32.0], ["1"]),
        r"aspect_ratios must be one or more positive numbers, got \('1',\)",
    ),
    (lambda s: s.proposals(level_sizes=2), "level_sizes must be a list or tuple, got int"),
    (lambda s: s.proposals(min_size=10**400), "min_size must be at least 0, got 1000"),
    (lambda s: s.detections(box_weights=1.0), "box_weights must be a list or tuple, got float"),
    (lambda s: s.detections(proposals=s.boxes), "proposals must be rcnn.structures.Proposals, got Tensor"),
    (lambda s: s.match_proposals(proposals=None), "proposals must be rcnn.structures.Proposals, got NoneType"),
    (lambda s: s.match_proposals(targets={}), "targets must be rcnn.structures.Targets, got dict"),
    (lambda s: s.match_anchors(targets=s.boxes), "targets must be rcnn.structures.Targets, got Tensor"),
    (
        lambda s: s.match_anchors(targets=replace(s.targets, boxes=s.boxes.double())),
        "targets.boxes must be float32, bfloat16 or float16, got torch.float64",
    ),
    (
        lambda s: s.match_anchors(targets=replace(s.targets, labels=s.targets.labels[:1])),
        r"targets.labels must have shape \(2,\), got \(1,\)",
    ),
    (
        lambda s: s.match_proposals(targets=replace(s.targets, offsets=s.targets.offsets[:1])),
        r"targets.offsets must have shape \(B \+ 1,\) with B at least 1, got \(1,\)",
    ),
    (lambda s: s.pyramid(features=5), "features must be a list or tuple, got int"),
    (lambda s: s.pyramid(spatial_scales=0.5), "spatial_scales must be a list or tuple, got float"),
    (lambda s: s.pyramid(spatial_scales=[NAN]), "spatial_scales must be a finite number, got nan"),
    (lambda s: s.pyramid(rois=s.boxes), r"rois must have shape \(R, 5\), got \(2, 4\)"),
    (lambda s: s.pyramid(rois=s.rois.to("meta")), "rois must be on .*, where features is, got meta"),
    (lambda s: s.pyramid(rois=s.rois.clone().requires_grad_()), "rois must not require a gradient.*pass rois.detach"),
    (lambda s: s.roi_align(output_size=1 << 20), "output_size must be at most 1024, got 1048576"),
    (lambda s: s.roi_pool(output_size=10**30), "output_size must be at most 1024, got 10000"),
    (lambda s: s.anchors(strides=[0]), r"strides\[0\] must be above 0, got 0"),
]


@pytest.mark.parametrize(("call", "message"), CASES, ids=[message[:40] for _, message in CASES])
def test_one_sentence_that_names_the_argument(device: torch.device, call: Spoil, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{message}") as raised:
        call(Sound(device))
    assert "\n" not in str(raised.value)


def test_the_sound_arguments_are_sound(device: torch.device) -> None:
    """Otherwise a case above might fail for another reason than the one that it spoils."""
    sound = Sound(device)
    for name in (*OPS, "anchors"):
        getattr(sound, name)()


def off_the_boundary(x: Tensor) -> Tensor:
    """The same values, contiguous, one element behind a 16-byte boundary, where kernels cannot read a box at once."""
    view = x.new_zeros(x.numel() + 16).flatten()[1 : 1 + x.numel()].view(x.shape).copy_(x)
    assert view.is_contiguous()
    assert view.data_ptr() % 16
    return view


def test_tensors_off_the_16_byte_boundary(device: torch.device) -> None:
    def moved(value: Any) -> Any:
        return type(value)(**{name: off_the_boundary(x) for name, x in vars(value).items()})

    sound, spoilt = Sound(device), Sound(device)
    for name in ("boxes", "scores", "step", "maps", "rois"):
        setattr(spoilt, name, off_the_boundary(getattr(sound, name)))
    spoilt.targets, spoilt.candidates = moved(sound.targets), moved(sound.candidates)
    for name in (*OPS, "anchors"):
        found, expected = (getattr(each, name)() for each in (spoilt, sound))
        pairs = [(found, expected)]
        if not isinstance(found, Tensor):
            pairs = list(zip(*(x if isinstance(x, tuple) else vars(x).values() for x in pairs[0]), strict=True))
        assert all(torch.equal(a, b) for a, b in pairs), name


def test_numbers_of_numpy_are_numbers(device: torch.device) -> None:
    sound = Sound(device)
    assert torch.equal(sound.roi_align(output_size=np.int64(2)), sound.roi_align())
    assert torch.equal(sound.nms(iou_threshold=np.float32(0.5)), sound.nms())


@pytest.mark.parametrize("op", ["nms", "batched_nms", "roi_align", "roi_pool", "proposals", "detections"])
def test_float64_is_for_the_cpu(emulator: object, op: str) -> None:
    """Gradients are checked in float64 on the CPU; a kernel has no such type."""
    sound = Sound(torch.device("cpu"))
    spoilt = {
        "nms": {"boxes": sound.boxes.double()},
        "batched_nms": {"boxes": sound.boxes.double()},
        "roi_align": {"input": sound.maps.double()},
        "roi_pool": {"input": sound.maps.double()},
        "proposals": {"objectness": sound.scores[None].double(), "deltas": torch.zeros(1, 2, 4).double()},
        "detections": {"logits": torch.zeros(2, 3).double(), "deltas": torch.zeros(2, 12).double()},
    }
    with pytest.raises(ValueError, match="float32, .*bfloat16.* on a GPU, got .*float64"):
        getattr(sound, op)(**spoilt[op])
