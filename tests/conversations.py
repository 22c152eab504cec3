"""Batches as transformers' processor makes them: turns with images between texts, padded, for every family's tests."""

import random

import torch

from qwen_batched.transformers_reference import IMAGE_PAD, VISION_END, VISION_START, _with_image_tokens
from tests.support import photo

WORDS = ["Pick up the red block.", "and", "把红色的积木放在盘子上。", "🤖", "open the drawer", "then what?"]


def conversation(rng, images, turns):
    """One sample's chat with so many images anywhere in its turns."""
    contents = [[{"type": "text", "text": rng.choice(WORDS)}] for _ in range(turns)]
    for _ in range(images):
        content = contents[rng.randrange(0, turns, 2)]  # in a user's turn
        content.insert(rng.randrange(len(content) + 1), {"type": "image"})
    roles = ["user", "assistant"]
    return [{"role": roles[turn % 2], "content": content} for turn, content in enumerate(contents)]


def transformers_batch(reference, factor, counts, seed=0, side="left", turns=3, labels=False):
    """What transformers' processor gives for samples with `counts` images each, of any sizes, and labels on demand."""
    rng = random.Random(seed)
    frames = [photo(rng.randint(1, 5) * factor, rng.randint(1, 4) * factor, i) for i in range(sum(counts))]
    chats = [conversation(rng, count, turns) for count in counts]
    prompts = [reference.tokenizer.apply_chat_template(x, tokenize=False, add_generation_prompt=True) for x in chats]
    assert VISION_START + IMAGE_PAD + VISION_END in "".join(prompts) or not frames
    batch, cells = {}, []
    if frames:
        images = reference._processed(frames, False)
        batch = {name: images[name] for name in ("pixel_values", "image_grid_thw")}
        cells = (batch["image_grid_thw"].prod(-1) // reference.image_processor.merge_size**2).tolist()
    rows = []
    for prompt, count in zip(prompts, counts, strict=True):
        mine, cells = cells[:count], cells[count:]
        rows.append(reference._token_ids(_with_image_tokens(prompt, mine))[0].cpu())
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), reference.tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        place = slice(length - len(row), None) if side == "left" else slice(0, len(row))
        ids[index, place], mask[index, place] = row, 1
    batch |= {"input_ids": ids, "attention_mask": mask}
    image_token = reference.model.config.image_token_id
    batch["mm_token_type_ids"] = (ids == image_token).int()
    if labels:
        # Not of a sample's first token, which has none before it.
        chosen = (torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < 0.4) & (mask == 1)
        chosen &= (mask.cumsum(1) > 1) & (ids != image_token)
        batch["labels"] = ids.where(chosen, -100)
    return batch
