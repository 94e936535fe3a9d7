"""torchvision's compiled part needs CUDA; the schemas of its two operators are enough for what
imports it.

`setup_host.py` puts this file into the tests' ComfyUI environment, where every process runs it at
its start (the workers of jobs too): when torchvision is imported first, the schemas are there
before it.
"""

import sys
from importlib.abc import MetaPathFinder

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class BeforeTorchvision(MetaPathFinder):
    library = None

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision" and self.library is None:
            import torch

            BeforeTorchvision.library = torch.library.Library("torchvision", "FRAGMENT")
            for schema in SCHEMAS:
                self.library.define(schema)


sys.meta_path.insert(0, BeforeTorchvision())
