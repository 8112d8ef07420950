"""Average precision by the rules of VOC and COCO, and precision-recall curves.

Each function takes a data set and one ``{"boxes", "labels", "scores"}`` of arrays per image, in the data set's order.
"""
