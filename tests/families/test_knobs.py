"""What families differ in, each against a plain expression of it, in made-up configurations: one image, one sample."""

import dataclasses
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qwen_batched.families.qwen2_5_vl import FAMILY
from qwen_batched.inputs.batch import Batch, Features
from qwen_batched.model.attention import KVCache
from qwen_batched.model.decoder import Decoder
from qwen_batched.model.decoder_inputs import DecoderInputs
from qwen_batched.model.embedding import embed
from qwen_batched.model.geometry import IMAGE, look_up, make_vision_plan
from qwen_batched.model.image_features import image_features
from qwen_batched.model.parts.mlps import MLP, SwiGLU
from qwen_batched.model.parts.norms import AddLayerNorm, AddRMSNorm
from qwen_batched.model.parts.patches import PatchMerger
from qwen_batched.model.parts.ropes import interleaved
from qwen_batched.model.vision import VisionTransformer
from tests.support import assert_equal_to

CPU = torch.device("cpu")
LAYER_NORM = functools.partial(AddLayerNorm, eps=1e-6)
# Heads of 12 do not fill the width of 40; one more head or a wider one changes the shapes of every product.
TEXT = dataclasses.replace(
    FAMILY.config.text,
    **{"vocab_size": 50, "hidden_size": 40, "intermediate_size": 24, "num_hidden_layers": 3, "explicit_head_dim": 12},
    **{"num_attention_heads": 6, "num_key_value_heads": 2, "mrope_section": (2, 2, 2)},
)
VISION = dataclasses.replace(
    FAMILY.config.vision,
    **{"depth": 4, "hidden_size": 48, "intermediate_size": 20, "num_heads": 2, "patch_size": 4, "out_hidden_size": 40},
    **{"window_size": None, "fullatt_block_indexes": None, "num_position_embeddings": 25},
    deepstack_visual_indexes=(0, 2),
)


def fresh(module):
    """Random weights, biases and scales too, so that none can be left out unseen."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        scale = 0.3 if parameter.ndim > 1 else 0.5
        parameter.data = scale * torch.randn(parameter.shape, generator=generator)
        parameter.data += float(parameter.ndim == 1 and name.endswith("weight"))
    return module.eval()


def random(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- norms and MLPs ---


def plain_rms_norm(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


@pytest.mark.parametrize("residual", [None, random(3, 8, seed=2)], ids=["first", "later"])
def test_norms_equal_their_formulas(residual):
    update = random(3, 8)
    stream = update if residual is None else update + residual
    offset = fresh(AddRMSNorm(8, 1e-3, unit_offset=True))
    layer = fresh(AddLayerNorm(8, eps=1e-3))
    centred = stream - stream.mean(-1, keepdim=True)
    expected = {
        offset: plain_rms_norm(stream, 1 + offset.weight, 1e-3),
        layer: plain_rms_norm(centred, layer.weight, 1e-3) + layer.bias,
    }
    for norm, normed in expected.items():
        ours, after = norm(update, residual)
        assert_equal_to(ours, normed)
        assert torch.equal(after, stream)


def test_a_unit_offset_keeps_small_weights_of_bfloat16():
    norm = AddRMSNorm(8, 1e-6, unit_offset=True).bfloat16()
    norm.weight.data.fill_(0.001)  # 1 + 0.001 is 1 in bfloat16
    x = random(3, 8).bfloat16()
    assert_equal_to(norm(x)[0], plain_rms_norm(x.float(), 1 + norm.weight.float(), 1e-6).bfloat16())


@pytest.mark.parametrize(
    ("activation", "plain"),
    [
        ("gelu", nn.GELU()),
        ("gelu_pytorch_tanh", nn.GELU(approximate="tanh")),
        ("quick_gelu", lambda x: x / (1 + torch.exp(-1.702 * x))),
    ],
)
def test_two_layer_mlps_equal_their_formulas(activation, plain):
    mlp = fresh(MLP(8, 12, activation, names=("linear_fc1", "linear_fc2")))
    x = random(5, 8)
    assert set(mlp.state_dict()) == {f"linear_fc{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
    assert_equal_to(mlp(x), mlp.linear_fc2(plain(mlp.linear_fc1(x))))


# --- the decoder ---


def build_decoder(**options):
    options = {"qkv_bias": False, "qk_norm": functools.partial(AddRMSNorm, eps=1e-6), **options}
    norm = functools.partial(AddRMSNorm, eps=TEXT.rms_norm_eps)
    return fresh(Decoder(TEXT, norm, lambda: SwiGLU(TEXT.hidden_size, TEXT.intermediate_size, bias=False), **options))


def plain_interleaved(positions, inv_freq, sections):
    """Axis of each frequency, one by one: time unless it is every third one's turn of height or width."""
    angles = torch.stack([positions[0].float() * f for f in inv_freq], dim=-1)
    for axis in (1, 2):
        for index in range(axis, 3 * sections[axis], 3):
            angles[:, index] = positions[axis].float() * inv_freq[index]
    return angles.cos(), angles.sin()


def plain_rotation(x_SNE, cos, sin):
    first, second = x_SNE.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def plain_decoder(decoder, x_SD, positions, tables, deep=()):
    """Outputs of all blocks, each before the deep feature that is added to it, and the last after the final norm."""
    inv_freq = TEXT.rope_theta ** (-torch.arange(0, 12, 2).float() / 12)
    cos, sin = tables(positions, inv_freq, TEXT.mrope_section)
    mask = torch.ones(len(x_SD), len(x_SD)).tril().log()
    outputs = []
    for index, block in enumerate(decoder.layers):
        attention, mlp = block.self_attn, block.mlp
        normed = plain_rms_norm(x_SD, block.input_layernorm.weight, TEXT.rms_norm_eps)
        q, k, v = (getattr(attention, f"{name}_proj")(normed).view(len(x_SD), -1, 12) for name in "qkv")
        if hasattr(attention, "q_norm"):
            q = plain_rms_norm(q, attention.q_norm.weight, 1e-6)
            k = plain_rms_norm(k, attention.k_norm.weight, 1e-6)
        q, k = plain_rotation(q, cos, sin), plain_rotation(k, cos, sin)
        k, v = k.repeat_interleave(3, dim=1), v.repeat_interleave(3, dim=1)
        scores = torch.einsum("sne,tne->nst", q, k) / 12**0.5 + mask
        x_SD = x_SD + attention.o_proj(torch.einsum("nst,tne->sne", scores.softmax(-1), v).flatten(1))
        normed = plain_rms_norm(x_SD, block.post_attention_layernorm.weight, TEXT.rms_norm_eps)
        x_SD = x_SD + mlp.down_proj(F.silu(mlp.gate_proj(normed)) * mlp.up_proj(normed))
        outputs.append(x_SD)
        x_SD = x_SD + deep[index] if index < len(deep) else x_SD
    return [*outputs[:-1], plain_rms_norm(x_SD, decoder.norm.weight, TEXT.rms_norm_eps)]


def plain_sectioned(positions, inv_freq, sections):
    axes = [axis for axis, count in enumerate(sections) for _ in range(count)]
    angles = torch.stack([positions[axis].float() * f for axis, f in zip(axes, inv_freq, strict=True)], dim=-1)
    return angles.cos(), angles.sin()


KINDS = {
    "head norms": ({}, plain_sectioned),
    "biases": ({"qkv_bias": True, "qk_norm": None}, plain_sectioned),
    "neither, interleaved": ({"qk_norm": None, "rope": interleaved}, plain_interleaved),
    "all": ({"qkv_bias": True, "rope": interleaved}, plain_interleaved),
}


@pytest.mark.parametrize(("options", "tables"), KINDS.values(), ids=KINDS)
@torch.no_grad()
def test_a_decoder_of_other_heads_equals_a_plain_one(options, tables):
    decoder = build_decoder(**options)
    x = random(2, 7, 40)
    positions = torch.randint(0, 9, (3, 2, 7), generator=torch.Generator().manual_seed(3))
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, :3] = False
    outputs = decoder(x, positions, mask, layers=(1, 2, 3), tokens=11)
    for sample, first in ((0, 0), (1, 3)):
        expected = plain_decoder(decoder, x[sample, first:], positions[:, sample, first:], tables)
        for ours, theirs in zip(outputs, expected, strict=True):
            assert_equal_to(ours[sample, first:], theirs)


@pytest.mark.parametrize(("options", "tables"), KINDS.values(), ids=KINDS)
@torch.no_grad()
def test_decoding_with_other_heads_equals_the_prompt_at_once(options, tables):
    decoder = build_decoder(**options)
    x = random(2, 6, 40)
    positions = torch.randint(0, 9, (3, 2, 6), generator=torch.Generator().manual_seed(3))
    cache = KVCache(3, 2, 8, 2, TEXT.head_dim, x)
    decoder(x[:, :4], positions[:, :, :4], torch.ones(2, 4, dtype=torch.bool), cache=cache)
    for place in (4, 5):
        ours = decoder.step(x[:, place], positions[:, :, place], cache)
        for sample in (0, 1):
            prompt = x[sample, : place + 1], positions[:, sample, : place + 1]
            assert_equal_to(ours[sample], plain_decoder(decoder, *prompt, tables)[-1][-1])


@pytest.mark.parametrize("count", [1, 2, 3])
@torch.no_grad()
def test_deep_features_are_added_behind_the_first_blocks(count):
    decoder = build_decoder()
    x, deep = random(1, 5, 40), [random(1, 5, 40, seed=seed) for seed in range(count)]
    positions = torch.arange(5).expand(3, 1, 5)
    outputs = decoder(x, positions, torch.ones(1, 5, dtype=torch.bool), layers=(1, 2, 3), deep_features=deep)
    expected = plain_decoder(decoder, x[0], positions[:, 0], plain_sectioned, [each[0] for each in deep])
    for ours, theirs in zip(outputs, expected, strict=True):
        assert_equal_to(ours[0], theirs)


def test_deep_features_stand_where_the_main_ones_do():
    index = torch.tensor([[-1, 0, 1, 2], [-1, -1, 2, 0]])
    features = Features(random(2, 1, 1, 3, 40), [random(2, 1, 1, 3, 40, seed=2)])
    ids = torch.arange(8).view(2, 4)
    decoder = build_decoder()
    batch = Batch(input_ids=ids, feature_index=index)
    embeds, (placed,) = embed(decoder, DecoderInputs.of(batch, features, None))
    for ours, maps, text in ((embeds, features.main, decoder.embed_tokens(ids)), (placed, features.deep[0], None)):
        expected = torch.zeros(2, 4, 40) if text is None else text.clone()
        expected[0, 1:] = maps[0, 0, 0]
        expected[1, 2:] = maps[1, 0, 0, [2, 0]]
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("as_list", [False, True])
@torch.no_grad()
def test_a_batch_of_images_gives_deep_features_too(as_list):
    tower = build_vision(VISION)
    pixels = random(2, 1, 24, VISION.patch_dim)
    found = image_features(tower, Batch(pixel_values=pixels, grids=((2, 3),), as_list=as_list))
    expected = tower(pixels, ((2, 3),), deepstack=True)
    for ours, theirs in zip((found.main, *found.deep), (expected.main, *expected.deep), strict=True):
        assert torch.equal(torch.stack(ours, dim=1) if as_list else ours, theirs)


# --- the vision transformer ---


def build_vision(config, patch_bias=True):
    width = config.hidden_size * config.cell_patches
    return fresh(
        VisionTransformer(
            config,
            norm=LAYER_NORM,
            mlp=lambda: MLP(config.hidden_size, config.intermediate_size, "gelu_pytorch_tanh"),
            merger=lambda: PatchMerger(config, LAYER_NORM(config.hidden_size)),
            deep_merger=lambda: PatchMerger(config, LAYER_NORM(width), norm_joined=True),
            patch_bias=patch_bias,
        )
    )


def plain_layer_norm(x, norm):
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, 1e-6)


def plain_merger(merger, x_PC, cell):
    joined = x_PC.reshape(-1, cell * x_PC.shape[-1])
    normed = plain_layer_norm(x_PC if merger.ln_q.weight.shape == x_PC.shape[-1:] else joined, merger.ln_q)
    return merger.mlp[2](F.gelu(merger.mlp[0](normed.reshape(joined.shape))))


def plain_vision(tower, pixels, h, w):
    """One image of h x w cells, cells in raster order: the merged features, those of deep blocks, block outputs."""
    config, merge = tower.config, tower.config.spatial_merge_size
    leading, heads = config.leading_tokens, config.num_heads
    cells = torch.arange(h * w)
    inner = torch.arange(merge)
    rows = ((cells // w)[:, None, None] * merge + inner[:, None]).expand(-1, merge, merge).flatten()
    columns = ((cells % w)[:, None, None] * merge + inner).expand(-1, merge, merge).flatten()
    x = F.linear(pixels, tower.patch_embed.proj.weight.flatten(1), tower.patch_embed.proj.bias)
    if leading:
        x = torch.cat((tower.class_embedding, x))
    side = round((config.num_position_embeddings - leading) ** 0.5)
    table = tower.pos_embed.weight[leading:].T.view(1, -1, side, side)
    resized = F.interpolate(table, size=(h * merge, w * merge), mode="bilinear", align_corners=True)[0]
    x = x + torch.cat((tower.pos_embed.weight[:leading], resized[:, rows, columns].T))
    size = config.head_dim
    angles = torch.zeros(len(x), size // 2)
    if config.rope_theta is not None:
        inv_freq = config.rope_theta ** (-torch.arange(0, size // 2, 2).float() / (size // 2))
        angles[leading:] = torch.cat([place[:, None] * inv_freq for place in (rows, columns)], dim=1)
    outputs = []
    for block in tower.blocks:
        q, k, v = block.attn.qkv(plain_layer_norm(x, block.norm1)).view(len(x), 3, heads, size).unbind(1)
        q, k = (plain_rotation(each, angles.cos(), angles.sin()) for each in (q, k))
        scores = torch.einsum("sne,tne->nst", q, k) / size**0.5
        x = x + block.attn.proj(torch.einsum("nst,tne->sne", scores.softmax(-1), v).flatten(1))
        normed = plain_layer_norm(x, block.norm2)
        x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(normed), approximate="tanh"))
        outputs.append(x[leading:])
    deep = zip(getattr(tower, "deepstack_merger_list", ()), config.deepstack_visual_indexes or (), strict=True)
    deep = [plain_merger(merger, outputs[index], merge**2) for merger, index in deep]
    return plain_merger(tower.merger, outputs[-1], merge**2), deep, outputs


TOWERS = {
    "position table and rotary": {},
    "no rotary": {"rope_theta": None},
    "a leading token": {"leading_tokens": 1, "num_position_embeddings": 26, "rope_theta": None},
    "leading tokens and rotary, cells of one patch": {
        **{"leading_tokens": 2, "num_position_embeddings": 27, "spatial_merge_size": 1}
    },
}


@pytest.mark.parametrize("fields", TOWERS.values(), ids=TOWERS)
@pytest.mark.parametrize(("h", "w"), [(1, 1), (2, 3), (5, 2)])
@torch.no_grad()
def test_a_vision_transformer_of_other_parts_equals_a_plain_one(fields, h, w):
    config = dataclasses.replace(VISION, **fields)
    tower = build_vision(config)
    merge = config.spatial_merge_size
    pixels = random(2, 2, h * w * config.cell_patches, config.patch_dim)
    raster_order = torch.zeros(2, h, w, dtype=torch.int64)
    main, deep = tower(pixels, raster_order, deepstack=True)
    assert torch.equal(tower(pixels, raster_order), main)
    (block,) = tower(pixels, raster_order, layers=[1])
    for place in ((0, 0), (1, 1)):
        expected, expected_deep, outputs = plain_vision(tower, pixels[place], h, w)
        assert_equal_to(main[place].flatten(0, 1), expected)
        for ours, theirs in zip(deep, expected_deep, strict=True):
            assert_equal_to(ours[place].flatten(0, 1), theirs)
        cells = block[place].unflatten(0, (h, merge)).unflatten(2, (w, merge)).transpose(1, 2)
        assert_equal_to(cells.flatten(0, 3), outputs[1])


@torch.no_grad()
def test_cameras_of_other_sizes_equal_each_by_itself():
    tower = build_vision(dataclasses.replace(VISION, leading_tokens=1, num_position_embeddings=26))
    sizes = [(2, 3), (1, 4)]
    pixels = [random(2, 4 * h * w, VISION.patch_dim, seed=h) for h, w in sizes]
    orders = [torch.zeros(2, h, w, dtype=torch.int64) for h, w in sizes]
    present = torch.tensor([[True, True], [True, False]])
    found = tower(pixels, orders, present, deepstack=True)
    assert isinstance(found, Features)
    for camera, (h, w) in enumerate(sizes):
        main, deep, _ = plain_vision(tower, pixels[camera][0], h, w)
        assert_equal_to(found.main[camera][0].flatten(0, 1), main)
        for ours, theirs in zip(found.deep, deep, strict=True):
            assert_equal_to(ours[camera][0].flatten(0, 1), theirs)
            assert present[1, camera] or not ours[camera][1].any()


def test_every_part_of_a_tower_gets_a_gradient():
    tower = build_vision(VISION)
    main, deep = tower(random(1, 1, 24, VISION.patch_dim), torch.zeros(1, 2, 3, dtype=torch.int64), deepstack=True)
    sum(each.square().sum() for each in (main, *deep)).backward()
    assert [name for name, x in tower.named_parameters() if x.grad is None or not x.grad.any()] == []


def test_layers_and_deep_features_are_not_asked_for_at_once():
    tower = build_vision(VISION)
    with pytest.raises(ValueError, match="layers must be None with deepstack"):
        tower(random(1, 1, 4, VISION.patch_dim), torch.zeros(1, 1, 1, dtype=torch.int64), layers=[0], deepstack=True)


@pytest.mark.parametrize(("h", "w"), [(1, 1), (2, 2), (3, 7), (24, 24), (30, 5)])
def test_taps_of_a_position_table_equal_its_interpolation(h, w):
    config = dataclasses.replace(VISION, num_position_embeddings=48 * 48, spatial_merge_size=2)
    table = random(48 * 48, 3)
    taps = make_vision_plan(config, h, w, CPU).taps
    resized = F.interpolate(table.T.view(1, 3, 48, 48), size=(2 * h, 2 * w), mode="bilinear", align_corners=True)
    cells = resized[0].permute(1, 2, 0).unflatten(0, (h, 2)).unflatten(2, (w, 2)).transpose(1, 2)
    # Positions of two rules of float32 differ by 1e-6 of the table's side.
    torch.testing.assert_close(look_up(taps, table), cells.flatten(0, 3), atol=2e-4, rtol=0)


@pytest.mark.parametrize("entries", [24, 26])
def test_a_position_table_that_is_no_square_is_refused(entries):
    with pytest.raises(ValueError, match=f"must be a square and 0 leading tokens, got {entries}"):
        dataclasses.replace(VISION, num_position_embeddings=entries)


def test_without_windows_cells_stand_in_raster_order():
    plan = make_vision_plan(VISION, 3, 5, CPU)
    assert plan.window_order.tolist() == list(range(15))
    assert list(plan.segments) == [IMAGE]
