"""accelerate's dispatcher over two processes: what each makes of its rows. `test_accelerate.py` judges what they write.

In: a checkpoint and a folder. Out: in that folder, `<way>.<rank>.pt` with the losses and gradients of each way.
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader, IterableDataset

from qwen_batched import QwenBatchedVL
from tests.support import photos

FRAMES = photos(8, 2, 56, 84)
TEXTS = ["Go on."] * 8  # of as many tokens: batches that are joined must agree
ANSWERS = ["yes", "no"] * 4  # of as many tokens, so that the mean over processes is that over samples
WAYS = {"split": {"split_batches": True}, "joined": {"split_batches": False}}


class Stream(IterableDataset):
    """The samples' indices, in order."""

    def __iter__(self):
        return iter(range(len(TEXTS)))


def batches(model, size):
    """A loader that prepares batches of this many samples, all padded to one length."""

    def collate(rows):
        return model.processor(FRAMES[rows], [TEXTS[i] for i in rows], targets=[ANSWERS[i] for i in rows])

    return DataLoader(Stream(), batch_size=size, collate_fn=collate)


def gradients_of(model):
    return {name.removeprefix("module."): x.grad for name, x in model.named_parameters()}


def main(checkpoint, folder):
    for way, options in WAYS.items():
        loading = DataLoaderConfiguration(dispatch_batches=True, **options)
        accelerator = Accelerator(cpu=True, dataloader_config=loading)
        model = QwenBatchedVL.from_pretrained(checkpoint, device="cpu")
        loader = batches(model, 4 if way == "split" else 2)
        prepared, loader = accelerator.prepare(model, loader)
        losses = []
        for batch in loader:
            out = prepared(**batch)
            accelerator.backward(out.loss)
            losses.append(out.loss.detach())
        found = {"losses": torch.stack(losses), "gradients": gradients_of(prepared)}
        torch.save(found, Path(folder) / f"{way}.{accelerator.process_index}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
