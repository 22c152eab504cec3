"""The rows of a prepared batch, read token by token, and each computed alone from its parts."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen_batched import QwenBatchedVL
from qwen_batched.checkpoint.config import QwenVLConfig, VisionConfig
from qwen_batched.inputs.prepared import HostFacts
from tests.fuzz.reading import Doubts, Refused, read_tensor

NO_LABEL = -100
OF_TOKENS = ("input_ids", "attention_mask", "camera_ids", "feature_index")


@dataclass
class Row:
    """A sample of a prepared batch.

    Attributes:
        mask: Bool (S,), where its U tokens are.
        ids: Its tokens (U,).
        positions: (3, U).
        labels: (U,); None where there are none.
        images: Of each present camera the pixels (P, patch_dim) and the grid.
        image_token_id: Which of its tokens stand for image cells.
    """

    mask: Tensor
    ids: Tensor
    positions: Tensor
    labels: Tensor | None
    images: list[tuple[Tensor, tuple[int, int]]]
    image_token_id: int

    @property
    def finite(self) -> bool:
        return all(bool(pixels.isfinite().all()) for pixels, _ in self.images)

    @property
    def in_one_piece(self) -> bool:
        """Whether no padding stands between its tokens."""
        places = self.mask.nonzero().flatten()
        return int(places[-1] - places[0]) + 1 == len(places)


def read_pixels(
    pixel_values: object, raster_order: object, vision: VisionConfig, doubts: Doubts
) -> tuple[list[Tensor], list[tuple[int, int]]]:
    """Of each camera the pixels (B, P, patch_dim) and the grid."""
    if isinstance(pixel_values, Tensor) and isinstance(raster_order, Tensor):
        pixels, order = read_tensor(pixel_values, doubts), read_tensor(raster_order, doubts)
        if pixels.ndim != 4 or 0 in pixels.shape:
            raise Refused("pixels that are not (B, V, P, patch_dim)")
        cameras, orders = list(pixels.unbind(1)), [order] * pixels.shape[1]
    elif isinstance(pixel_values, (list, tuple)) and isinstance(raster_order, (list, tuple)):
        cameras = [read_tensor(part, doubts) for part in pixel_values]
        orders = [read_tensor(order, doubts) for order in raster_order]
    else:
        raise Refused("pixels and grids of two kinds")
    if len(cameras) != len(orders) or not cameras:
        raise Refused("another number of grids than of cameras")
    if any(part.ndim != 3 for part in cameras):
        raise Refused("pixels that are not (B, P, patch_dim) for each camera")
    grids = []
    for part, order in zip(cameras, orders, strict=True):
        if order.ndim != 3 or order.dtype != torch.int64 or order.numel() == 0 or order.shape[0] != len(cameras[0]):
            raise Refused("a grid that is not int64 (B, h, w)")
        _, h, w = order.shape
        if not part.dtype.is_floating_point or part.dtype.itemsize == 1:
            raise Refused("pixels that are not floating")
        if part.shape != (len(cameras[0]), h * w * vision.cell_patches, vision.patch_dim) or part.numel() == 0:
            raise Refused("pixels that do not fit their grid")
        grids.append((h, w))
    return [part.contiguous() for part in cameras], grids


def read_rows(batch: dict[str, object], config: QwenVLConfig, doubts: Doubts) -> list[Row]:
    """Raises `Refused` where one of them is not as a processor makes it."""
    needed = {*OF_TOKENS, "rope_positions", "prepared"}
    if "pixel_values" in batch:
        needed |= {"pixel_values", "raster_order"}
        allowed = needed | {"camera_present", "labels"}
    else:
        allowed = needed | {"labels"}
    if needed - set(batch) or set(batch) - allowed:
        raise Refused("fields missing, or too many")
    facts = batch["prepared"]
    if not isinstance(facts, HostFacts):
        raise Refused("another marker")
    if any(not isinstance(number, (int, type(None))) for number in (facts.tokens, facts.answer_tokens)):
        doubts.add("facts that are no numbers")
    fields = {name: read_tensor(batch[name], doubts) for name in (*OF_TOKENS, "rope_positions")}
    ids = fields["input_ids"]
    if ids.ndim != 2 or ids.numel() == 0:
        raise Refused("ids that are not (B, S)")
    size, length = ids.shape
    if "labels" in batch:
        fields["labels"] = read_tensor(batch["labels"], doubts)
    for name, field in fields.items():
        shape = (size, 3, length) if name == "rope_positions" else (size, length)
        if field.shape != shape or field.dtype != (torch.bool if name == "attention_mask" else torch.int64):
            raise Refused(f"{name} of another shape or dtype")
    images, grids = [], []
    if "pixel_values" in batch:
        images, grids = read_pixels(batch["pixel_values"], batch["raster_order"], config.vision, doubts)
        if len(images[0]) != size:
            raise Refused("pixels of another number of samples")
    present = torch.ones(size, len(images), dtype=torch.bool)
    if "camera_present" in batch:
        present = read_tensor(batch["camera_present"], doubts)
        if present.shape != (size, len(images)) or present.dtype != torch.bool:
            raise Refused("camera_present that is not bool (B, V)")
    rows = []
    for index in range(size):
        own = {name: field[index] for name, field in fields.items()}
        here = [camera for camera in range(len(images)) if present[index, camera]]
        _check_tokens(own, [(camera, grids[camera]) for camera in here], grids, config)
        mask = own["attention_mask"]
        labels = own["labels"][mask] if "labels" in own else None
        pixels = [(images[camera][index], grids[camera]) for camera in here]
        rows.append(
            Row(mask, own["input_ids"][mask], own["rope_positions"][:, mask], labels, pixels, config.image_token_id)
        )
    return rows


def _check_tokens(
    own: dict[str, Tensor], here: list[tuple[int, tuple[int, int]]], grids: list[tuple[int, int]], config: QwenVLConfig
) -> None:
    """Walks along a sequence, and expects of each token what the one before leaves."""
    vocabulary = config.text.vocab_size
    cells = [(camera, cell, h, w) for camera, (h, w) in here for cell in range(h * w)]
    first = [sum(h * w for h, w in grids[:camera]) for camera in range(len(grids))]
    position = used = 0
    labels = own["labels"].tolist() if "labels" in own else [NO_LABEL] * len(own["input_ids"])
    columns = zip(
        *(own[name].tolist() for name in OF_TOKENS),
        zip(*own["rope_positions"].tolist(), strict=True),
        labels,
        strict=True,
    )
    tokens = 0
    for token, is_token, camera, feature, places, label in columns:
        if not 0 <= token < vocabulary:
            raise Refused("an id out of range")
        if label != NO_LABEL and not (is_token and 0 <= label < vocabulary):
            raise Refused("a label out of range, or on padding")
        if not is_token:
            expected = (-1, -1, (0, 0, 0))
        elif token != config.image_token_id:
            tokens += 1
            expected = (-1, -1, (position,) * 3)
            position += 1
        else:
            if used == len(cells):
                raise Refused("more image tokens than cells")
            tokens += 1
            which, cell, h, w = cells[used]
            expected = (which, first[which] + cell, (position, position + cell // w, position + cell % w))
            used += 1
            if cell == h * w - 1:
                position += max(h, w)
        if (camera, feature, places) != expected:
            raise Refused("a token that is not where its batch says")
    if used != len(cells) or tokens == 0:
        raise Refused("fewer image tokens than cells, or no token")


def compute_alone(model: QwenBatchedVL, row: Row, layers: list[int], norm: str) -> dict[str, object]:
    """Hidden states (U, D) of the `layers`, logits (U, vocabulary) and the loss of each label, None without labels."""
    embeds = model.model.embed_tokens(row.ids).clone()
    features = [
        model.visual(pixels[None, None], torch.zeros(1, *grid, dtype=torch.int64)).flatten(0, 3)
        for pixels, grid in row.images
    ]
    if features:
        embeds[row.ids == row.image_token_id] = torch.cat(features).to(embeds.dtype)
    last = model.config.text.num_hidden_layers
    mask = torch.ones(1, len(row.ids), dtype=torch.bool)
    states = model.model(embeds[None], row.positions[:, None], mask, layers, norm)
    final = model.model(embeds[None], row.positions[:, None], mask, [last])[0][0]
    logits = model.logits(final)
    losses = None
    if row.labels is not None:
        losses = F.cross_entropy(logits[:-1], row.labels[1:], ignore_index=NO_LABEL, reduction="none")
        losses = losses[row.labels[1:] != NO_LABEL]
    return {"hidden_states": [x[0] for x in states], "logits": logits, "losses": losses}
