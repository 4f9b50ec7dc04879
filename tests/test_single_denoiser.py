"""A base with one denoiser, such as Wan2.1, takes the whole way by the same code."""

import json

import pytest
import torch
from diffusers import WanPipeline

from tests.tiny_model import write_tiny_base
from train.job import run
from train.signals import StopRequest
from wan_finetune.errors import InputError

ONE = ("train.experts=['single']", "single={steps=4, learning_rate=1e-3}")


@pytest.fixture(scope="module")
def single_base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("single") / "tiny"
    write_tiny_base(folder, num_experts=1)
    return folder


def test_one_denoiser_is_trained_over_all_noise_levels_and_its_adapter_loads_in_one_line(make_config, single_base):
    config = make_config(*ONE, f"model.base='{single_base}'", "validation.levels=8")
    run(config, StopRequest())
    folder = config.run_folder
    written = {path.name for path in (folder / "adapter").iterdir()}
    assert written == {"pytorch_lora_weights.safetensors", "comfyui", "README.md"}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(line["expert"], line["step"]) for line in lines] == [("single", step) for step in (1, 2, 3, 4)]
    validation = json.loads((folder / "validation.jsonl").read_text().splitlines()[0])
    sigmas = [level["sigma"] for level in validation["levels"]]
    assert min(sigmas) < 0.4 and max(sigmas) > 0.95  # shift 3 leaves few below
    assert (folder / "report.html").is_file()
    pipe = WanPipeline.from_pretrained(single_base)
    before = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    pipe.load_lora_weights(str(folder / "adapter"))
    loaded = {name: value for name, value in pipe.transformer.named_parameters() if ".lora_B." in name}
    assert loaded and all(value.any() for value in loaded.values())
    assert all(
        torch.equal(pipe.transformer.state_dict()[n.replace(".weight", ".base_layer.weight")], v)
        for n, v in before.items()
        if n.endswith("attn1.to_q.weight")
    )


def test_experts_that_the_base_does_not_have_are_named(make_config, single_base):
    with pytest.raises(InputError, match=r"has no transformer_2/.*; a model with one denoiser takes train.experts"):
        run(make_config(f"model.base='{single_base}'"), StopRequest())
    with pytest.raises(InputError, match="the base has no 'single' expert; it has two"):
        run(make_config(*ONE, "run.name='other'"), StopRequest())
