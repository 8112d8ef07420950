"""Faster R-CNN in Python: train on your own VOC or COCO folder, evaluate, predict."""

__version__ = "0.1.0"

from rcnn import kernels
from rcnn.config import ModelConfig, TrainConfig
from rcnn.detector import build, load
from rcnn.models.faster_rcnn import FasterRCNN
from rcnn.structures import Targets

__all__ = ["FasterRCNN", "ModelConfig", "Targets", "TrainConfig", "build", "kernels", "load"]
