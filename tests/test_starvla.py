"""Through starVLA's interface: what transformers' model gives for the same images, instructions and solutions."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image
from torch import nn
from transformers import AutoTokenizer

from qwen_batched.integrations.starvla import StarVLAInterface
from qwen_batched.integrations.still_images import StillImageProcessor
from qwen_batched.testing import write_checkpoint
from qwen_batched.transformers_reference import TransformersReference
from tests.sisters import FACTORS, skip_without
from tests.support import assert_equal_to, photo, relative_error

PRESETS = ["tiny", "qwen3-vl-tiny"]
GRADIENT_TOLERANCE = 1e-4
ACTIONS = [f"<robot_action_{index}>" for index in range(6)]
INSTRUCTIONS = ["pick up the red cube", "open the drawer, then close it again", "把红色的积木放在盘子上。"]
SOLUTIONS = ["<robot_action_3><robot_action_0>", "<robot_action_5>", "<robot_action_1><robot_action_1><robot_action_2>"]


class Config(SimpleNamespace):
    """As starVLA's: attributes and `get`."""

    def get(self, name, default=None):
        return getattr(self, name, default)


def make_config(folder, **vla_data):
    return Config(
        framework=Config(qwenvl=Config(base_vlm=str(folder))),
        datasets=Config(vla_data=Config(**vla_data)),
    )


class Case:
    """A preset's checkpoint with action tokens: starVLA's interface to it, and transformers' model."""

    def __init__(self, preset, folder, device):
        skip_without(preset)
        self.folder, self.device, self.factor = folder, device, FACTORS[preset]
        write_checkpoint(folder, preset, image={"min_pixels": self.factor**2})
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens(ACTIONS)
        tokenizer.save_pretrained(folder)
        self.reference = TransformersReference.from_pretrained(folder, device=device)
        self.interface = self.load()
        assert len(tokenizer) <= self.interface.model.config.text.vocab_size

    def load(self, **options):
        return StarVLAInterface(make_config(self.folder), device=self.device, **options)

    def images(self, *counts):
        """For each sample so many PIL images, no two neighbours of one size."""
        sizes = iter([(2, 3), (1, 1), (4, 2), (3, 3), (1, 5), (2, 2)])
        return [[self.image(*next(sizes), index) for index in range(count)] for count in counts]

    def image(self, h, w, index=0):
        # A few pixels more than whole cells: the image processor resizes.
        frame = photo(h * self.factor + 3, w * self.factor + 5, index)
        return Image.fromarray(frame.permute(1, 2, 0).numpy())


@pytest.fixture(params=PRESETS, scope="module")
def case(request, tmp_path_factory, device):
    return Case(request.param, tmp_path_factory.mktemp(request.param) / "checkpoint", device)


def moved(batch, device):
    """What transformers' model takes of a batch: token types since 5."""
    left_out = () if Version(transformers.__version__).release >= (5,) else ("mm_token_type_ids",)
    return {name: value.to(device) for name, value in batch.items() if name not in left_out}


def theirs(case, batch, **options):
    return case.reference.model(**moved(batch, case.device), use_cache=False, **options)


def one_by_one(case, images, instructions):
    """Each sample's inputs, made by the yardstick's own code."""
    frames = [[torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in sample] for sample in images]
    return [case.reference.processor_inputs(*sample) for sample in zip(frames, instructions, strict=True)]


def test_inputs_are_those_of_transformers_for_each_sample(case):
    images = case.images(2, 1, 3)
    batch = case.interface.build_qwenvl_inputs(images, INSTRUCTIONS)
    samples = one_by_one(case, images, INSTRUCTIONS)
    for ids, mask, sample in zip(batch["input_ids"], batch["attention_mask"], samples, strict=True):
        assert torch.equal(ids[mask.bool()], sample["input_ids"][0])
        assert mask.diff().min() >= 0  # padding on the left
    for name in ("pixel_values", "image_grid_thw"):
        assert torch.equal(batch[name].cpu(), torch.cat([sample[name] for sample in samples]).cpu())
    assert batch["image_grid_thw"].device.type == "cpu"
    others = [name for name in batch if name != "image_grid_thw"]
    assert {batch[name].device.type for name in others} == {torch.device(case.device).type}
    assert case.interface.processor.tokenizer.padding_side == "left"


def test_a_chat_is_tokenized_in_one_call_or_two(case):
    processor = StillImageProcessor.of(case.interface.model)
    processor.tokenizer.padding_side = "left"
    images = case.images(2, 1)
    chats = [
        [
            {
                "role": "user",
                "content": [*({"type": "image", "image": image} for image in sample), {"type": "text", "text": text}],
            }
        ]
        for sample, text in zip(images, INSTRUCTIONS, strict=False)
    ]
    found = processor.apply_chat_template(
        chats, tokenize=True, add_generation_prompt=True, return_dict=True, padding=True, return_tensors="pt"
    )
    expected = case.interface.build_qwenvl_inputs(images, INSTRUCTIONS[:2])
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value.cpu()), name
    alone = processor.apply_chat_template(chats[0], tokenize=True, add_generation_prompt=True)
    assert alone == [expected["input_ids"][0][expected["attention_mask"][0].bool()].tolist()]
    assert processor.batch_decode(alone) == [processor.decode(alone[0])]
    assert processor.decode(alone[0]).startswith(processor.apply_chat_template(chats[0])[:20])
    assert processor("a", return_tensors="pt")["mm_token_type_ids"].tolist() == [[0]]


def test_hidden_states_of_all_layers_and_logits_equal_transformers(case):
    batch = case.interface.build_qwenvl_inputs(case.images(2, 1, 3), INSTRUCTIONS)
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        out = case.interface(**batch, output_attentions=False, output_hidden_states=True, return_dict=True)
        want = theirs(case, batch, output_hidden_states=True)
    assert out.loss is None
    pairs = zip((*out.hidden_states, out.logits), (*want.hidden_states, want.logits), strict=True)
    for ours, reference in pairs:
        assert_equal_to(ours[mask], reference[mask])


def test_text_alone_equals_transformers(case):
    batch = case.interface.build_qwenvl_inputs([[], []], INSTRUCTIONS[:2])
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        assert_equal_to(case.interface(**batch).logits[mask], theirs(case, batch).logits[mask])


def test_labels_begin_at_the_first_action_token_and_the_loss_equals_transformers(case):
    interface = case.interface
    batch = interface.build_qwenvl_inputs(case.images(1, 3, 2), INSTRUCTIONS, SOLUTIONS)
    tokenizer = interface.processor.tokenizer
    assert interface.action_tokens == tuple(tokenizer.convert_tokens_to_ids([ACTIONS[0], ACTIONS[-1]]))
    assert interface.action_tokens == (interface._ACTION_TOKEN_MIN, interface._ACTION_TOKEN_MAX)
    for ids, labels, solution in zip(batch["input_ids"], batch["labels"], SOLUTIONS, strict=True):
        chosen = labels != -100
        text = tokenizer.decode(labels[chosen])
        assert text == f"{solution}<|im_end|>\n<|im_start|>assistant\n"
        assert torch.equal(labels[chosen], ids[len(ids) - chosen.sum() :])
    with torch.no_grad():
        assert_equal_to(interface(**batch).loss, theirs(case, batch).loss)


def test_padding_and_samples_without_action_tokens_have_no_labels(case):
    batch = case.interface.build_qwenvl_inputs(case.images(0, 1), ["a", "b"], ["nothing", SOLUTIONS[0]])
    assert (batch["labels"][0] == -100).all() and (batch["labels"][1] != -100).any()
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


def test_a_hook_on_the_embedding_puts_queries_in_as_with_transformers(case):
    batch = case.interface.build_qwenvl_inputs(case.images(1, 2), [f"{text} {ACTIONS[0]}" for text in INSTRUCTIONS[:2]])
    is_query = batch["input_ids"] == case.interface.action_tokens[0]
    assert is_query.sum(dim=1).tolist() == [1, 1]
    mask = batch["attention_mask"].bool()

    def put_queries(module, arguments, out):
        return torch.where(is_query[..., None], torch.linspace(-1, 1, out.shape[-1]).to(out), out)

    calls = (
        (case.interface.model, lambda: case.interface(**batch, output_hidden_states=True)),
        (case.reference.model, lambda: theirs(case, batch, output_hidden_states=True)),
    )
    hidden = []
    for model, call in calls:
        hook = model.get_input_embeddings().register_forward_hook(put_queries)
        with torch.no_grad():
            hidden.append(call().hidden_states[-1][mask])
        hook.remove()
    with torch.no_grad():
        plain = case.interface(**batch, output_hidden_states=True).hidden_states[-1][mask]
    assert_equal_to(hidden[0], hidden[1])
    assert relative_error(plain, hidden[1]) > 0.01


class Framework(nn.Module):
    """As starVLA's frameworks with an action head: the last layer's last token, then a linear layer."""

    def __init__(self, interface):
        super().__init__()
        self.qwen_vl_interface = interface
        self.head = nn.Linear(interface.model.config.hidden_size, 7)

    def forward(self, images, instructions, actions):
        inputs = self.qwen_vl_interface.build_qwenvl_inputs(images=images, instructions=instructions)
        outputs = self.qwen_vl_interface(**inputs, output_attentions=False, output_hidden_states=True, return_dict=True)
        return nn.functional.l1_loss(self.head(outputs.hidden_states[-1][:, -1]), actions)


@pytest.mark.slow
def test_a_framework_trains_a_step_as_with_transformers(case):
    torch.manual_seed(0)
    interface = case.load(lm_head=False)
    framework = Framework(interface).to(case.device).train()
    reference = TransformersReference.from_pretrained(case.folder, device=case.device)
    images, actions = case.images(1, 2, 3), torch.randn(3, 7, device=case.device)

    head = copy.deepcopy(framework.head)
    batch = moved(interface.build_qwenvl_inputs(images, INSTRUCTIONS), case.device)
    hidden = reference.model(**batch, use_cache=False, output_hidden_states=True).hidden_states[-1]
    want = nn.functional.l1_loss(head(hidden[:, -1]), actions)
    want.backward()

    optimizer = torch.optim.SGD(framework.parameters(), lr=1e-3)
    loss = framework(images, INSTRUCTIONS, actions)
    assert_equal_to(loss, want)
    loss.backward()
    name_of = interface.model.family.keys.module_name
    gradients = {name_of(name): x.grad for name, x in reference.model.named_parameters()}
    for name, parameter in interface.model.named_parameters():
        assert (parameter.grad is None) == (gradients[name] is None), name
        if parameter.grad is not None and gradients[name].norm() > 0:
            assert relative_error(parameter.grad, gradients[name]) <= GRADIENT_TOLERANCE, name
    assert relative_error(framework.head.weight.grad, head.weight.grad) <= GRADIENT_TOLERANCE
    optimizer.step()
    with torch.no_grad():
        assert framework(images, INSTRUCTIONS, actions) < loss


def test_it_works_under_autocast_and_outside(case):
    batch = case.interface.build_qwenvl_inputs(case.images(1, 2), INSTRUCTIONS[:2])
    mask = batch["attention_mask"].bool()
    kind = torch.device(case.device).type
    half = case.load(dtype=torch.bfloat16)
    with torch.no_grad():
        plain = [model(**batch, output_hidden_states=True).hidden_states[-1] for model in (case.interface, half)]
        with torch.autocast(kind, dtype=torch.bfloat16):
            cast = [model(**batch, output_hidden_states=True).hidden_states[-1] for model in (case.interface, half)]
        assert not torch.equal(cast[0], plain[0])  # products of float32 weights are in bfloat16
    assert torch.equal(cast[1], plain[1]) and cast[1].dtype == torch.bfloat16
    assert relative_error(cast[0][mask], plain[0][mask]) < 0.05


def test_the_prompt_of_the_config_is_filled_in(case):
    as_dicts = {
        "framework": {"qwenvl": {"base_vlm": str(case.folder)}},
        "datasets": {"vla_data": {"CoT_prompt": "Task: {instruction}. Act."}},
    }
    expected = case.interface.build_qwenvl_inputs([[]], ["Task: stop. Act."])["input_ids"]
    for config in (make_config(case.folder, CoT_prompt="Task: {instruction}. Act."), as_dicts):
        interface = StarVLAInterface(config, device=case.device)
        assert interface.config is config
        assert torch.equal(interface.build_qwenvl_inputs([[]], ["stop"])["input_ids"], expected)


def test_generated_tokens_equal_transformers(case):
    batch = case.interface.build_qwenvl_inputs(case.images(1, 2, 0), INSTRUCTIONS)
    found = case.interface.generate(**batch, max_length=batch["input_ids"].shape[1] + 6, do_sample=False)
    want = case.reference.model.generate(**moved(batch, case.device), max_new_tokens=6, do_sample=False)
    assert torch.equal(found, want)


def test_action_tokens_may_be_said_and_are_needed_for_solutions(case, checkpoint):
    first = case.interface.action_tokens[0]
    interface = case.load(processor=case.interface.processor, action_tokens=(first + 3, first + 3))
    labels = interface.build_qwenvl_inputs([[]], ["a"], ["<robot_action_1><robot_action_3>"])["labels"]
    assert labels[labels != -100][0] == first + 3
    without = StarVLAInterface(make_config(checkpoint), device=case.device)
    assert without.action_tokens is None
    with pytest.raises(ValueError, match="give action_tokens"):
        without.build_qwenvl_inputs([[]], ["a"], ["b"])


def test_what_does_not_fit_is_refused(case):
    build = case.interface.build_qwenvl_inputs
    for given in (([[]], INSTRUCTIONS), ([[], []], INSTRUCTIONS[:2], SOLUTIONS)):
        with pytest.raises(ValueError, match="one of each"):
            build(*given)
    with pytest.raises(ValueError, match="image token"):
        build(case.images(1), ["a <|image_pad|>"])
    for config in ({}, {"framework": {"qwenvl": {}}}, make_config("")):
        with pytest.raises(ValueError, match="base_vlm must name"):
            StarVLAInterface(config)
