"""`python -m tests.export.traced FOLDER ...`: operations of checkpoints' vision programs, plain and packed.

A process of its own, since the tests' kernels are the interpreter's, which reads values. Prints a line of JSON each.
"""

import json
import sys
from dataclasses import replace

from qwen_batched import QwenBatchedVL
from qwen_batched.export.packing import packed
from qwen_batched.export.parts import Parts
from qwen_batched.export.programs import detached
from qwen_batched.export.request import ExportRequest
from qwen_batched.export.tracing import trace


def main(folder):
    model = QwenBatchedVL.from_pretrained(folder, device="cpu", num_layers=1)
    cell = model.processor.config.vision.cell_size
    request = ExportRequest.of(model, "engine", (4 * cell, 5 * cell), 2, (1, 8), None, "uint8", 18, ["vision"])
    part = Parts(detached(model), request).part("vision")
    before = operations(part)
    after = operations(replace(part, program=packed(part.program, with_kernels=True)))
    is_changed = any("attend" in module.__dict__ for module in model.modules())
    print(json.dumps({"before": before, "after": after, "live_model_is_changed": is_changed}))


def operations(part):
    return [str(node.target) for node in trace(part).graph.nodes if node.op == "call_function"]


if __name__ == "__main__":
    for checkpoint in sys.argv[1:]:
        main(checkpoint)
