"""A sister family's tiny checkpoint in both libraries: what tests that run for every family share."""

import pytest
import transformers

from qwen_batched import QwenBatchedVL
from qwen_batched.testing import PRESETS, write_checkpoint
from qwen_batched.transformers_reference import ARCHITECTURES, TransformersReference
from tests.parity.test_whole_model_parity import assert_equals_transformers
from tests.support import photos

FACTORS = {"tiny": 28, "qwen2-vl-tiny": 28, "qwen3-vl-tiny": 32}  # sides of merged cells, in pixels

# For `write_checkpoint`, where each block costs seconds. There is one of every kind: windowed ones around one of full
# attention; one without deep features before three with them; a decoder block behind those that take deep features.
FEW_BLOCKS = {
    "tiny": {"vision": {"depth": 3, "fullatt_block_indexes": [1]}, "text": {"num_hidden_layers": 3}},
    "qwen2-vl-tiny": {"vision": {"depth": 2}},
    "qwen3-vl-tiny": {
        "vision": {"depth": 4, "deepstack_visual_indexes": [1, 2, 3]},
        "text": {"num_hidden_layers": 4},
    },
}


def skip_without(preset):
    """Skips where the installed transformers lacks the preset's family."""
    family = PRESETS[preset].family
    if not hasattr(transformers, ARCHITECTURES[family]):
        pytest.skip(f"transformers {transformers.__version__} has no {family}")


class Sister:
    """A preset's checkpoint, our models of it by padding side, transformers' model, and the sides of its cells.

    `options` are `write_checkpoint`'s.
    """

    def __init__(self, preset, folder, device="cpu", **options):
        skip_without(preset)
        self.preset, self.folder, self.device, self.factor = preset, folder, device, FACTORS[preset]
        write_checkpoint(folder, preset, image={"min_pixels": self.factor**2}, **options)
        self.models = {side: self.load(padding_side=side).requires_grad_(False) for side in ("left", "right")}
        self.model = self.models["left"]
        self.reference = self.load_reference()
        self.layers = tuple(range(self.model.config.text.num_hidden_layers + 1))

    def load(self, **options):
        return QwenBatchedVL.from_pretrained(self.folder, device=self.device, **options)

    def load_reference(self):
        reference = TransformersReference.from_pretrained(self.folder, device=self.device)
        reference.run(**reference.processor_inputs([], "a"))  # it hooks the blocks that it has at its first call
        return reference

    def photos(self, batch, cameras, h, w, seed=0):
        """Of h x w merged cells."""
        return photos(batch, cameras, h * self.factor, w * self.factor, seed)

    def check(self, images, texts, **options):
        """Compares every output with transformers'."""
        assert_equals_transformers(self.models, self.reference, images, texts, layers=self.layers, **options)
