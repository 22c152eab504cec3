"""Gradients of our model and of transformers', of the same loss of the same samples."""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from tests.support import own_tokens, relative_error

# Float32 sums in another order, once forward and once back; a wrong index or a missing term gives 1e-2 and more.
GRADIENT_TOLERANCE = 1e-4


def photos_as_floats(images):
    """uint8 frames as floats in 0..1, leaves that want a gradient; a tensor or a list of one per camera."""
    if images is None:
        return None
    if isinstance(images, Tensor):
        return (images.float() / 255).requires_grad_()
    return [(frames.float() / 255).requires_grad_() for frames in images]


def cameras_of(images):
    """Frames (B, V, 3, H, W) or V times (B, 3, H, W) as one list of (B, 3, H, W) per camera."""
    if images is None:
        return []
    return list(images.unbind(1)) if isinstance(images, Tensor) else list(images)


def published_parameters(reference):
    """transformers' parameters by their published names, which are ours."""
    named = {f"visual.{name}": parameter for name, parameter in reference.visual.named_parameters()}
    named |= {f"model.{name}": parameter for name, parameter in reference.decoder.named_parameters()}
    head = reference.model.lm_head.weight
    return named if head is named["model.embed_tokens.weight"] else named | {"lm_head.weight": head}


def reference_pixels(reference, frames):
    """Float frames (3, H, W) as transformers' `pixel_values` (patches, patch size), with a way back for gradients."""
    processor, device = reference.image_processor, frames[0].device
    mean, std = (
        torch.tensor(getattr(processor, f"image_{name}"), device=device)[:, None, None] for name in ("mean", "std")
    )
    patch, merge = processor.patch_size, processor.merge_size
    layout = "c (h mh ph) (w mw pw) -> (h w mh mw) c 1 ph pw"
    patches = [
        rearrange((frame - mean) / std, layout, ph=patch, pw=patch, mh=merge, mw=merge)
        .expand(-1, -1, processor.temporal_patch_size, -1, -1)
        .flatten(1)
        for frame in frames
    ]
    return torch.cat(patches)


def reference_inputs(reference, frames, text, template="chat"):
    """What transformers' model takes for float frames (3, H, W) of one sample."""
    blank = [torch.zeros(frame.shape, dtype=torch.uint8) for frame in frames]
    inputs = reference._model_inputs(**reference.processor_inputs(blank, text, template))
    return inputs | ({"pixel_values": reference_pixels(reference, frames)} if frames else {})


def of_sample(images, camera_mask, sample):
    """The frames (3, H, W) of the cameras that a sample has."""
    cameras = enumerate(cameras_of(images))
    return [frames[sample] for camera, frames in cameras if camera_mask is None or camera_mask[sample, camera]]


def probe(length, width, seed, device):
    """Random weights (length, width): their product with hidden states is a loss that every token has a part in."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(length, width, generator=generator).to(device)


def probe_loss(out):
    """Of our output: the sum over samples, own tokens and hidden states of a random weight times the value."""
    batch = range(len(out.attention_mask))
    return probed([[own_tokens(x, out.attention_mask, sample) for x in out.hidden_states] for sample in batch])


def reference_probe_loss(reference, images, texts, camera_mask=None, template="chat", layers=(-1,)):
    """The same of transformers' outputs, one sample at a time."""
    hidden_states = []
    for sample, text in enumerate(texts):
        inputs = reference_inputs(reference, of_sample(images, camera_mask, sample), text, template)
        out = reference.model(**inputs, output_hidden_states=True, use_cache=False)
        hidden_states.append([out.hidden_states[layer][0] for layer in layers])
    return probed(hidden_states)


def probed(hidden_states):
    """Hidden states (S, D) of each sample and layer to a scalar in which every value counts."""
    return sum(
        (x * probe(*x.shape, 10 * sample + layer, x.device)).sum()
        for sample, layers in enumerate(hidden_states)
        for layer, x in enumerate(layers)
    )


def gradients(loss, parameters, frames=None):
    """Gradients by name, those of float frames under `frames.<camera>`; None where the loss does not depend on it."""
    named = dict(parameters)
    frames = [] if frames is None else [frames] if isinstance(frames, Tensor) else frames
    named |= {f"frames.{camera}": frame for camera, frame in enumerate(frames)}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return dict(zip(named, found, strict=True))


def errors(ours, theirs):
    """Relative L2 by name; fails where one side alone has a gradient, or one is not finite or all zero."""
    assert ours.keys() == theirs.keys()
    found = {}
    for name, gradient in ours.items():
        if name.startswith("frames.") and theirs[name] is None:  # of a camera that no sample has
            assert bool((gradient == 0).all()), f"{name}: a gradient of absent pixels"
            continue
        assert (gradient is None) == (theirs[name] is None), f"{name}: only one of the two has a gradient"
        if gradient is not None:
            assert float(theirs[name].norm()) > 0, f"{name}: nothing to compare"
            found[name] = relative_error(gradient, theirs[name])
    return found


def assert_gradients_equal(ours, theirs, tolerance: float = GRADIENT_TOLERANCE, needed: Sequence[str] = ()) -> None:
    """Fails where any gradient's relative L2 is above `tolerance`, or one of `needed` is not there."""
    found = errors(ours, theirs)
    for part in needed:
        assert any(part in name for name in found), f"no gradient of {part}"
    worst = max(found, key=found.get)
    assert found[worst] <= tolerance, f"{worst}: relative L2 {found[worst]:.2e} is above {tolerance:.0e}"
