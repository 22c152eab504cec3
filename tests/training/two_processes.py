"""What two processes make of halves of a batch. Started by torchrun; `test_distributed.py` judges what they write.

In: a checkpoint, a folder, and the scenarios' names, all where none is given. Out: in that folder,
`<scenario>.<rank>.pt` for each scenario that was got through.
"""

import importlib.util
import sys
import zlib
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from qwen_batched import QwenBatchedVL
from qwen_batched.model import geometry
from tests.support import own_tokens, photos

IMAGES = photos(4, 2, 56, 84)
TEXTS = ["Pick up the red block.", "", "Open the top drawer, then close the bottom drawer.\n", "Go on."]
ANSWERS = ["yes", "no", "yes", "no"]  # of as many tokens, so that the mean over processes is that over samples
# The second half has no images; "cameras missing" says so by a mask, "text only" by having none.
MASK = torch.tensor([[True, True], [True, True], [False, False], [False, False]])
WHOLE = {"images": IMAGES, "texts": TEXTS, "camera_mask": MASK}
HALVES = {
    "text only": [{"images": IMAGES[:2], "texts": TEXTS[:2]}, {"images": None, "texts": TEXTS[2:]}],
    "cameras missing": [
        {"images": IMAGES[:2], "texts": TEXTS[:2], "camera_mask": MASK[:2]},
        {"images": IMAGES[2:], "texts": TEXTS[2:], "camera_mask": MASK[2:]},
    ],
    "answers": [ANSWERS[:2], ANSWERS[2:]],
}
RATE = 0.01


def load(checkpoint):
    return QwenBatchedVL.from_pretrained(checkpoint, device="cpu")


def with_lora(checkpoint):
    """Vision and decoder with LoRA, the same in every process."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(load(checkpoint), LoraConfig(target_modules=["qkv", "q_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def loss_of(out):
    """The mean over samples of what a sample's own tokens come to."""
    samples = range(len(out.attention_mask))
    return sum(own_tokens(out.last_hidden_state, out.attention_mask, i).square().mean() for i in samples) / len(samples)


def own_states(out):
    """Hidden states of each sample's own tokens, by sample, of the whole batch."""
    first = dist.get_rank() * len(TEXTS) // 2 if dist.is_initialized() else 0
    mask = out.attention_mask
    return {f"sample {first + i}": own_tokens(out.last_hidden_state, mask, i) for i in range(len(mask))}


def gradients_of(model, inputs, loss=loss_of, steps=2):
    """Of the last of some steps: where a gradient was not waited for, DDP notices at the next."""
    for _ in range(steps):
        model.zero_grad()
        loss(model(**inputs)).backward()
    return {name.removeprefix("module."): whole(x.grad) for name, x in model.named_parameters() if x.requires_grad}


def whole(x):
    return x.full_tensor() if isinstance(x, torch.distributed.tensor.DTensor) else x


def shard(model, **options):
    for block in model.blocks:
        fully_shard(block, **options)
    return fully_shard(model, **options)


# --- the scenarios: each takes a checkpoint and this process's half of the batch, of each kind ---


def ddp_text_only(checkpoint, halves):
    return gradients_of(DistributedDataParallel(load(checkpoint)), halves["text only"])


def ddp_cameras_missing(checkpoint, halves):
    return gradients_of(DistributedDataParallel(load(checkpoint)), halves["cameras missing"])


def ddp_answers(checkpoint, halves):
    model = DistributedDataParallel(load(checkpoint))
    return gradients_of(model, halves["text only"] | {"targets": halves["answers"]}, loss=lambda out: out.loss)


def ddp_lora(checkpoint, halves):
    return gradients_of(DistributedDataParallel(with_lora(checkpoint)), halves["text only"])


def ddp_frozen_tower(checkpoint, halves):
    """Nobody waits for a frozen tower that each process has whole: without images it is not run."""
    model = load(checkpoint)
    model.visual.requires_grad_(False)
    with mock.patch.object(model.visual, "_run_pass", side_effect=model.visual._run_pass) as run:
        found = gradients_of(DistributedDataParallel(model), halves["text only"])
    assert run.called == (halves["text only"]["images"] is not None)
    return found


def accelerate_ddp(checkpoint, halves):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = load(checkpoint)
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=RATE))
    assert isinstance(prepared, DistributedDataParallel)
    accelerator.backward(loss_of(prepared(**halves["text only"])))
    optimizer.step()
    return dict(accelerator.unwrap_model(prepared).named_parameters())


def fsdp_text_only(checkpoint, halves):
    return gradients_of(shard(load(checkpoint)), halves["text only"])


def fsdp_cameras_missing(checkpoint, halves):
    return gradients_of(shard(load(checkpoint)), halves["cameras missing"])


def fsdp_answers(checkpoint, halves):
    model = shard(load(checkpoint))
    return gradients_of(model, halves["text only"] | {"targets": halves["answers"]}, loss=lambda out: out.loss)


def fsdp_checkpointing(checkpoint, halves):
    model = shard(load(checkpoint))
    model.gradient_checkpointing_enable()
    return gradients_of(model, halves["text only"])


def fsdp_frozen_tower(checkpoint, halves):
    """A frozen tower is sharded all the same."""
    model = load(checkpoint)
    model.visual.requires_grad_(False)
    return gradients_of(shard(model), halves["text only"])


def fsdp_whole_model_at_once(checkpoint, halves):
    return gradients_of(fully_shard(load(checkpoint)), halves["text only"])


def fsdp_groups_of_blocks(checkpoint, halves):
    model = load(checkpoint)
    for blocks in (model.visual.blocks, model.model.layers):
        for start in range(0, len(blocks), 2):
            fully_shard(list(blocks[start : start + 2]))
    return gradients_of(fully_shard(model), halves["text only"])


def fsdp_mixed_precision(checkpoint, halves):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return gradients_of(shard(load(checkpoint), mp_policy=policy), halves["text only"])


def fsdp_training_and_inference(checkpoint, halves):
    """A step of training between two of inference, where weights are packed as on a GPU: FSDP's must not be."""
    model = shard(load(checkpoint))
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)

    @mock.patch.object(nn.Parameter, "is_cuda", True, create=True)
    @mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: False)
    @torch.no_grad()
    def infer():
        return model(**halves["text only"])

    before = infer()
    loss_of(model(**halves["text only"])).backward()
    optimizer.step()
    return own_states(before) | {f"{name}, trained": x for name, x in own_states(infer()).items()}


def fsdp_save(checkpoint, halves):
    """What a sharded model gathers is saved; its shards are refused."""
    model = shard(load(checkpoint))
    folder = Path(sys.argv[2])
    try:
        model.save_pretrained(folder / "refused")
    except ValueError as error:
        refusal = str(error)
    gathered = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        model.save_pretrained(folder / "saved", state_dict=gathered)
    return {"refusal": refusal, "refused exists": (folder / "refused").exists()}


SCENARIOS = (
    *(ddp_text_only, ddp_cameras_missing, ddp_answers, ddp_lora, ddp_frozen_tower, accelerate_ddp, fsdp_text_only),
    *(fsdp_cameras_missing, fsdp_answers, fsdp_checkpointing, fsdp_frozen_tower, fsdp_whole_model_at_once),
    *(fsdp_groups_of_blocks, fsdp_mixed_precision, fsdp_training_and_inference, fsdp_save),
)
# Packages that a test may do without.
NEEDS = {ddp_lora: "peft", accelerate_ddp: "accelerate"}


def main(checkpoint, folder, *names):
    torch.set_num_threads(1)
    # As few that the processes would make different numbers of passes through the tower, were each to choose.
    geometry.PATCHES_PER_PASS = 16
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    halves = {kind: half[rank] for kind, half in HALVES.items()}
    for scenario in SCENARIOS:
        if names and scenario.__name__ not in names:
            continue
        if scenario in NEEDS and importlib.util.find_spec(NEEDS[scenario]) is None:
            continue
        torch.save(scenario(checkpoint, halves), folder / f"{scenario.__name__}.{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
