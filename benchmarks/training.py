"""A training step, forward and backward, beside transformers', in one run on one GPU: time and peak memory.

    python benchmarks/training.py [--preset 3b] [--keep-checkpoint FOLDER] [--num-layers N]

Real shapes of the 3B model, or of another --preset of any family, whose frames are the nearest multiples of its merged
cells; bfloat16, random weights unless --model names a checkpoint. The loss is the mean square of the last hidden
states. Before any time is printed, gradients are compared with transformers' in float32, beside those of transformers
in bfloat16; a wrong one ends the run with exit code 1. The tables say what was measured and which goals are met, where
the model has goals; a missed goal changes no exit code. The last line is JSON.

What each side does in a step, gradients let go of at its end; there is no optimiser:
  ours           uint8 frames on the GPU and texts; patches, prompts, both networks, backward
  default        transformers as it loads; pixels and token ids are given ready made
  varlen         the same with torch's variable-length attention in the vision tower
  checkpointing  ours with every block's activations computed anew in the backward pass
In the tables of LoRA, adapters by peft on the decoder's linear layers are trained, all else is frozen: adapters in the
model's dtype, and in float32, as peft makes them beside a bfloat16 model unless told otherwise.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Run as a script, python looks for modules beside the script only.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import measure
import peers
import runs
import torch
import whole_peers
from measure import LORA_LAYERS, Goal, Work, note, print_table
from runs import print_beside_ours, ratio_to_ours, text_of
from torch import Tensor, nn

from qwen_batched.transformers_reference import TransformersReference

TEMPLATE = "plain"
# Gradients in bfloat16 deviate from float32's by 1e-2 and more, transformers' own too; ours by no more than this times
# theirs, and a wrong formula by far more.
GRADIENT_ALLOWANCE = 1.1
SMOKE_DEVIATIONS = 3  # of the ratio of two deviations of so few values, which is chance: 1 / sqrt(values)
LORA_RANK = 16

Step = Callable[[], Tensor]  # forward and backward; the loss


@dataclass(frozen=True)
class Shapes:
    """What is measured: steps on `batch`, gradients on `checked`, each with texts of so many tokens."""

    fitted: ClassVar = ("batch", "checked")
    batch: Work
    checked: Work
    text_tokens: int


FULL = Shapes(batch=Work(16, 2, (224, 224)), checked=Work(2, 2, (252, 308)), text_tokens=40)
SMOKE = Shapes(batch=Work(2, 2, (56, 56)), checked=Work(2, 1, (84, 56)), text_tokens=6)

# Whose gradients are compared, of those that the model has.
CHECKED_PARAMETERS = (
    "visual.patch_embed.proj.weight",
    "visual.pos_embed.weight",
    "visual.blocks.0.attn.qkv.weight",
    *(f"visual.blocks.0.mlp.{layer}.weight" for layer in ("down_proj", "fc2", "linear_fc2")),
    "visual.blocks.0.norm1.weight",
    *(f"visual.merger.{layer}.weight" for layer in ("mlp.0", "linear_fc1")),
    "visual.deepstack_merger_list.0.linear_fc1.weight",
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.self_attn.k_proj.bias",
    "model.layers.0.self_attn.k_norm.weight",
    "model.layers.0.mlp.gate_proj.weight",
    "model.layers.0.input_layernorm.weight",
)


@dataclass
class Run(runs.Run):
    """With what the steps ask of the model."""

    def inputs(self, work: Work) -> tuple[Tensor, list[str]]:
        """Frames (B, V, 3, H, W), soft shapes, and B texts of one length."""
        frames = peers.soft_frames(work.images, work.size, self.device).unflatten(0, (work.batch, work.cameras))
        prompts = self.model.processor.prompts
        return frames, [text_of(prompts, self.shapes.text_tokens, seed) for seed in range(work.batch)]

    def ours(self, work: Work, model: nn.Module | None = None) -> Step:
        frames, texts = self.inputs(work)
        model = model or self.model
        return partial(step, lambda: model(frames, texts, template=TEMPLATE, resize=None).last_hidden_state)

    def theirs(self, work: Work, reference: TransformersReference, tower: nn.Module) -> Step:
        """transformers' model with `tower`."""
        frames, texts = self.inputs(work)
        options = {"template": TEMPLATE, "resize": None, "device": self.device, "dtype": self.model.dtype}
        batch = self.model.processor(frames, texts, **options)
        prompts = whole_peers.Prompts.of(batch, self.model.config.vision)
        model = whole_peers.whole_model(reference, tower, prompts)
        pixels = whole_peers.processed(reference, frames, work.size).to(self.model.dtype)
        return partial(step, partial(model, pixels))


def step(run: Callable[[], Tensor]) -> Tensor:
    """Runs forward, and backward from the mean square of what came out."""
    loss = run().float().square().mean()
    loss.backward()
    return loss.detach()


def without_gradients(run: Step, parameters: Iterable[nn.Parameter]) -> Step:
    """A step that lets go of the gradients it made."""
    parameters = list(parameters)

    def stepped() -> Tensor:
        loss = run()
        for parameter in parameters:
            parameter.grad = None
        return loss

    return stepped


def run_all(options: argparse.Namespace, temporary: str) -> int:
    run, folder = Run.begin(options, SMOKE if options.smoke else FULL, temporary)
    reference = check_gradients(run, folder)
    if not run.wrong:
        measure_steps(run, reference)
        measure_lora(run, reference)
        set_goals(run)
    return run.finish("training")


# --- gradients, before any time ---


def check_gradients(run: Run, folder: str) -> TransformersReference:
    """Compares gradients with transformers' in float32. Returns transformers in our dtype."""
    note("gradients against transformers in float32")
    load = partial(whole_peers.load, folder, run.options.num_layers, device=run.device)
    exact = their_gradients(run, load(dtype=torch.float32))
    measure.release(run.device)
    reference = load(dtype=run.model.dtype)
    theirs = their_gradients(run, reference)
    run.ours(run.shapes.checked)()
    rows, report = [], run.report.setdefault("gradients", {})
    for name in theirs:
        ours = measure.relative_l2(run.model.get_parameter(name).grad, exact[name])
        default = measure.relative_l2(theirs[name], exact[name])
        report[name] = {"ours": ours, "default": default, "ratio": ours / default}
        rows.append((name, f"{ours:.2e}", f"{default:.2e}", f"{ours / default:.3f}"))
        chance = SMOKE_DEVIATIONS / math.sqrt(exact[name].numel()) if run.options.smoke else 0.0
        if not ours / default <= GRADIENT_ALLOWANCE + chance:
            run.wrong.append(f"the gradient of {name} deviates {ours / default:.3f} times as much as transformers'")
    run.model.zero_grad()
    print(f"Gradients' relative L2 distance from transformers' in float32; ratio <= {GRADIENT_ALLOWANCE}")
    print_table(("parameter", "ours", "default", "ratio"), rows)
    return reference


def their_gradients(run: Run, reference: TransformersReference) -> dict[str, Tensor]:
    """By our names."""
    run.theirs(run.shapes.checked, reference, reference.visual)()
    our_name = run.model.family.keys.module_name
    names = {our_name(name): parameter for name, parameter in reference.model.named_parameters()}
    found = {name: names[name].grad.clone() for name in CHECKED_PARAMETERS if name in names}
    reference.model.zero_grad()
    return found


# --- times ---


def measure_steps(run: Run, reference: TransformersReference) -> None:
    """Every parameter is trained."""
    note("full steps")
    work = run.shapes.batch
    steps = {"ours": without_gradients(run.ours(work), run.model.parameters())}
    for name, tower in towers_of(run, reference).items():
        parameters = [*reference.model.parameters(), *tower.parameters()]
        steps[name] = without_gradients(run.theirs(work, reference, tower), parameters)
    run.report["full"] = timed(run, f"B={work.batch}, {work.cameras} x {work.size}: a full step", steps)
    note("with checkpointing")
    run.model.gradient_checkpointing_enable()
    run.report["full"] |= timed(run, "the same with checkpointing", {"checkpointing": steps["ours"]})
    run.model.gradient_checkpointing_disable()


def measure_lora(run: Run, reference: TransformersReference) -> None:
    """Adapters on the decoder are trained, all else is frozen."""
    note("adapters")
    peft = run.attempt("peft", lambda: __import__("peft"))
    if peft is None:
        return
    work = run.shapes.batch
    config = peft.LoraConfig(r=LORA_RANK, target_modules=LORA_LAYERS)
    towers = towers_of(run, reference)
    ours = peft.get_peft_model(run.model, config, autocast_adapter_dtype=False)
    peft.inject_adapter_in_model(config, reference.model)
    for parameter in [*reference.model.parameters(), *(p for tower in towers.values() for p in tower.parameters())]:
        parameter.requires_grad_(False)
    our_adapters, their_adapters = (
        [p.requires_grad_(True) for name, p in model.named_parameters() if "lora_" in name]
        for model in (ours, reference.model)
    )
    steps = {"ours": without_gradients(run.ours(work, ours), our_adapters)}
    steps |= {
        name: without_gradients(run.theirs(work, reference, tower), their_adapters) for name, tower in towers.items()
    }
    title = f"B={work.batch}, {work.cameras} x {work.size}: LoRA on the decoder, adapters in "
    run.report["lora"] = timed(run, title + "the model's dtype", steps)
    for parameter in (*our_adapters, *their_adapters):
        parameter.data = parameter.data.float()
    run.report["lora_float32"] = timed(run, title + "float32", steps)


def towers_of(run: Run, reference: TransformersReference) -> dict[str, nn.Module]:
    towers = {"default": reference.visual}
    if run.device.type == "cuda":
        varlen = run.attempt("varlen", partial(peers.with_varlen_attention, reference.visual))
        towers |= {} if varlen is None else {"varlen": varlen}
    return towers


def timed(run: Run, title: str, steps: Mapping[str, Step]) -> dict[str, dict[str, Any]]:
    """Wall times of single steps in turns, and the most memory that each allocates above the weights."""
    for one in steps.values():
        one()
    times = run.times(steps, seconds=3.0, take=measure.single_times)
    for name, one in steps.items():
        times[name]["peak_gib"] = measure.peak_gib(one, run.device)
    print_beside_ours(title, times if "ours" in times else times | {"ours": run.report["full"]["ours"]})
    print_table(("", "peak GiB above weights"), [(name, f"{row['peak_gib']:.2f}") for name, row in times.items()])
    return times


# --- goals ---


def set_goals(run: Run) -> None:
    if not run.has_goals:
        return
    full = run.report["full"]
    peak = {name: row["peak_gib"] for name, row in full.items()}
    least = min(peak.get(name, float("inf")) for name in ("default", "varlen"))
    run.goals += [
        Goal("full step over transformers' default", ratio_to_ours(full, "default"), 2.5, 3.3, "x", at_least=True),
        Goal("  over its varlen", ratio_to_ours(full, "varlen"), 1.35, 1.8, "x", at_least=True),
        Goal("  peak memory over transformers' least", peak["ours"] / least if least else None, 1.0, None, "x"),
        Goal(
            "  peak memory with checkpointing over without",
            peak["checkpointing"] / peak["ours"] if peak["ours"] else None,
            0.6,
            None,
            "x",
        ),
    ]
    for name, title in (("lora", "LoRA on the decoder over default"), ("lora_float32", "  with adapters in float32")):
        ratio = ratio_to_ours(run.report.get(name), "default")
        run.goals.append(Goal(title, ratio, 3.0, None, "x", at_least=True))


if __name__ == "__main__":
    runs.main(runs.whole_model_parser(__doc__), run_all)
