"""What an action head asks of the model: tokens behind a cached prompt, and training steps from cached features.

    python benchmarks/policies.py [--preset 3b] [--model FOLDER] [--num-layers N] [--commit HASH]

bfloat16, random weights unless --model names a checkpoint. Before any time is printed, an extension is compared with a
full forward of prompt and suffix; a wrong one ends the run with exit code 1. The last line is JSON.

  extension      `extend` of 8 embeddings behind the prompt of one sample, timed one by one, from an idle GPU to an idle
                 one, causal and bidirectional; beside it a decoding step of 8 samples with prompts of the same length:
                 the difference of a long and a short `generate` over the difference of their tokens
  training step  forward and backward of a batch with a frozen vision transformer, from frames and from cached features:
                 with the whole decoder trained, and with LoRA on its linear layers, adapters in the model's dtype
"""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Run as a script, python looks for modules beside the script only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import measure
import runs
import torch
from measure import LORA_LAYERS, Goal, Work, note
from torch import Tensor, nn

from qwen_batched import Features

TOKENS = 8  # behind the prompt
LORA_RANK = 16
# Of a decoding step of as many samples; of the step from frames, whole decoder and LoRA.
EXTENSION_MUST, FROZEN_MUST, LORA_MUST = 1.3, 0.87, 0.75
ALLOWED_DEVIATION = 3e-2  # bfloat16, of hidden states by another path


@dataclass(frozen=True)
class Shapes:
    """The control loop's frames and the tokens of its prompt, the training batch, and new tokens of `generate`."""

    fitted: ClassVar = ("camera", "batch")
    camera: Work
    context: int
    batch: Work
    text_tokens: int
    short: int
    long: int


FULL = Shapes(Work(1, 3, (224, 224)), 241, Work(16, 2, (224, 224)), 40, 16, 80)
SMOKE = Shapes(Work(1, 1, (56, 56)), 40, Work(2, 2, (56, 56)), 6, 2, 5)


class Run(runs.Run):
    """With its inputs."""

    def prompts(self, batch: int) -> tuple[Tensor, list[str]]:
        """Frames and texts of `batch` prompts of `context` tokens."""
        camera = Work(batch, self.shapes.camera.cameras, self.shapes.camera.size)
        frames = measure.random_frames(camera, 1, self.device)[0]
        encoder = self.model.processor.prompts
        made = self.model.processor(frames[:1], [runs.text_of(encoder, 1)], resize=None)
        besides = made["input_ids"].shape[1] - 1
        return frames, [runs.text_of(encoder, self.shapes.context - besides, seed) for seed in range(batch)]


@torch.no_grad()
def measure_extension(run: Run) -> None:
    model, (frames, texts) = run.model, run.prompts(1)
    width = model.config.text.hidden_size
    embeds = torch.randn(1, TOKENS, width, device=run.device, dtype=model.dtype) * 0.02
    cache = model.prefill(frames, texts, resize=None)
    check_extension(run, frames, texts, embeds)
    many = run.prompts(TOKENS)

    def generate(tokens: int) -> object:
        allowed = [5]  # no token ends a sample
        return model.generate(*many, resize=None, max_new_tokens=tokens, allowed_tokens=allowed)

    short, long = run.shapes.short, run.shapes.long
    calls: dict[str, Callable[[], object]] = {
        "ours": partial(model.extend, cache, embeds),
        "bidirectional": partial(model.extend, cache, embeds, causal=False),
        "prefill": partial(model.prefill, frames, texts, resize=None),
    }
    for call in (*calls.values(), partial(generate, long)):
        for _ in range(3):
            call()
    times = run.times(calls, seconds=1.0, take=measure.single_times, most=400)
    steps = []
    for _ in range(2 if run.options.smoke else 7):
        found = [measure.single_times(partial(generate, count), run.device, 1)[0] for count in (short, long)]
        steps.append((found[1] - found[0]) / (long - short))
    step = sorted(steps)[len(steps) // 2]
    runs.print_beside_ours(f"B=1, S={run.shapes.context}, {TOKENS} embeddings behind it", times)
    print(f"a decoding step of {TOKENS} samples: {step:.3f} ms ({min(steps):.3f} .. {max(steps):.3f})", flush=True)
    for name in ("ours", "bidirectional"):
        ratio = times[name]["median"] / step
        run.goals.append(Goal(f"an extension, {name}, over the decoding step", ratio, EXTENSION_MUST, None, "x"))
    run.report["extension"] = {"times": times, "step": step, "steps": steps}
    measure.release(run.device)


def check_extension(run: Run, frames: Tensor, texts: list[str], embeds: Tensor) -> None:
    """Compares with prompt and suffix in one sequence: transformers' form of batch takes any embeddings."""
    model = run.model
    out = model(frames, texts, resize=None, layers=(0, -1))
    length = out.input_ids.shape[1]
    steps = out.position_ids.amax() + 1 + torch.arange(TOKENS, device=run.device)
    positions = torch.cat((out.position_ids, steps.expand(3, 1, -1)), dim=2)
    if model.config.vision.deepstack_visual_indexes is None:
        whole = torch.cat((out.hidden_states[0], embeds), dim=1)
        want = model(inputs_embeds=whole, position_ids=positions, layers=(-1,), logits_to_keep=1).last_hidden_state
        deviation = measure.relative_l2(
            model.extend(model.prefill(frames, texts, resize=None), embeds), want[:, length:]
        )
        if not deviation <= ALLOWED_DEVIATION:
            run.wrong.append(f"an extension deviates by {deviation:.2e} from a full forward")
        run.report["deviation"] = deviation


def step(forward: Callable[[], Any], parameters: Iterable[nn.Parameter]) -> Tensor:
    loss = forward().last_hidden_state.float().square().mean()
    loss.backward()
    for parameter in parameters:
        parameter.grad = None
    return loss.detach()


def measure_training(run: Run) -> None:
    model, work = run.model, run.shapes.batch
    model.visual.requires_grad_(False)
    frames = measure.random_frames(work, 1, run.device)[0]
    texts = [runs.text_of(model.processor.prompts, run.shapes.text_tokens, seed) for seed in range(work.batch)]
    is_deep = model.config.vision.deepstack_visual_indexes is not None
    with torch.no_grad():
        features = model.encode_images(frames, resize=None, deepstack=is_deep)
        features = Features(features.main.clone(), [x.clone() for x in features.deep]) if is_deep else features.clone()
    title = f"B={work.batch}, {work.cameras} x {work.size}, frozen vision transformer"
    time_training(run, title, model, frames, texts, features, FROZEN_MUST)
    peft = run.attempt("peft", lambda: __import__("peft"))
    if peft is not None:
        config = peft.LoraConfig(r=LORA_RANK, target_modules=LORA_LAYERS)
        adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
        model.visual.requires_grad_(False)
        time_training(run, title + ", LoRA on the decoder", adapted, frames, texts, features, LORA_MUST)


def time_training(
    run: Run, title: str, model: nn.Module, frames: Tensor, texts: list[str], features: object, must: float
) -> None:
    note(title)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    options = {"template": "plain"}
    calls = {
        "ours": partial(step, partial(model, None, texts, image_features=features, **options), parameters),
        "from frames": partial(step, partial(model, frames, texts, resize=None, **options), parameters),
    }
    losses = [call() for call in calls.values()]
    if not torch.allclose(*losses, rtol=1e-2):
        run.wrong.append(f"{title}: losses {losses}")
    for call in calls.values():
        for _ in range(2):
            call()
    times = run.times(calls, seconds=2.0, take=measure.single_times)
    runs.print_beside_ours(title, times)
    ratio = times["ours"]["median"] / times["from frames"]["median"]
    run.goals.append(Goal(f"{title}: from features over from frames", ratio, must, None, "x"))
    run.report[title] = times
    measure.release(run.device)


def run_all(options: Namespace, temporary: str) -> int:
    run, _ = Run.begin(options, SMOKE if options.smoke else FULL, temporary)
    measure_extension(run)
    if not run.wrong:
        measure_training(run)
    return run.finish("policies")


if __name__ == "__main__":
    runs.main(runs.whole_model_parser(__doc__), run_all)
