"""What a changed configuration means for a run that goes on."""

import json
import shutil
import types
import typing
from collections.abc import Iterator

import pytest
import torch
from pydantic import BaseModel
from safetensors.torch import load_file, save_file

from tests.tiny_runs import same, train
from train.checkpoint import found
from train.config import Config
from train.engine import make_accelerator
from train.identity import Identity, compare_samples, flatten, identity_of, require_same_run, rule_of
from train.preparing import prepare_data
from wan_finetune.errors import InputError
from wan_finetune.experts import base_folder


def keys_of(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key of a configuration, through tables, optional tables and lists of tables."""
    for name, field in model.model_fields.items():
        inner = [field.annotation, *typing.get_args(field.annotation)]
        tables = [part for part in inner if isinstance(part, type) and issubclass(part, BaseModel)]
        if tables:
            yield from keys_of(tables[0], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def test_every_key_of_the_configuration_has_a_rule():
    keys = list(keys_of(Config))
    assert {"run.seed", "data.sources.focus", "high.lora.rank", "single.optimizer.schedule"} <= set(keys)
    without = []
    for key in keys:
        try:
            rule_of(key)
        except KeyError:
            without.append(key)
    assert not without, f"say in train/identity.py what a change of these means for a resumed run: {without}"
    with pytest.raises(KeyError, match=r"new_table\.key has no rule"):
        rule_of("new_table.key")


def test_what_is_flattened_are_keys_of_the_configuration(make_config):
    known = set(keys_of(Config))
    for key in flatten(make_config()):
        assert ".".join(part for part in key.split(".") if not part.isdigit()) in known


FATAL = [
    ("run.seed=1", r"run\.seed: 0 -> 1 \(every draw hangs on it\); restore it"),
    ("lora.rank=4", r"high\.lora\.rank: 8 -> 4 .*\n.*low\.lora\.rank: 8 -> 4"),
    ("lora.alpha=3", r"high\.lora\.alpha: 8\.0 -> 3\.0"),
    ("low.lora.targets=['attn1.to_q']", r"low\.lora\.targets: .* -> \[\"attn1\.to_q\"\]"),
    ("flow.shift=4.0", r"high\.flow\.shift: 3\.0 -> 4\.0 \(the noise levels"),
    ("train.experts=['high']", r"train\.experts: .*; leave it in train\.experts \(an expert at its last step costs"),
    ("high.steps=1", r"high\.steps: 4 -> 1 \(2 are done\); as many steps are done; give at least"),
    ("train.batch_size=3", r"global_batch\.64x64x9: 2 -> 3 .*; choose train\.gradient_accumulation so"),
    ("data.trigger=acme", r"data: 24 clips changed .*; changed were data\.trigger: \"ember style\" -> \"acme\""),
    ("optimizer.name=adamw8bit", r"high\.optimizer\.name: \"adamw\" -> \"adamw8bit\""),
]
WARNED = [
    ("low.learning_rate=1e-5", "low.learning_rate: 0.003 -> 1e-05"),
    ("optimizer.weight_decay=0.2", "high.optimizer.weight_decay: 0.01 -> 0.2"),
    ("optimizer.gradient_clip=0.5", "low.optimizer.gradient_clip: 1.0 -> 0.5"),
    ("optimizer.schedule=constant", 'high.optimizer.schedule: "cosine" -> "constant"'),
    ("optimizer.warmup_steps=2", "high.optimizer.warmup_steps: 1 -> 2"),
    ("high.steps=9", "high.steps: 4 -> 9 (the learning rate takes another course)"),
    ("data.caption_dropout=0.5", "data.caption_dropout: 0.1 -> 0.5"),
    ("model.dtype=bfloat16", 'model.dtype: "float32" -> "bfloat16" (the frozen base'),
    ("memory.checkpointing=full", 'memory.checkpointing: "none" -> "full"'),
    ("train.mixed_precision=bf16", 'train.mixed_precision: "no" -> "bf16"'),
    ("lora.dropout=0.1", "high.lora.dropout: 0.0 -> 0.1"),
]
FINE = [
    *["run.name=other", "train.checkpoint_every_steps=7", "train.keep_checkpoints=5", "train.order=sequence"],
    *["train.round_steps=3", "sampling.steps=3", "evaluation.seeds=[4]", "tracking.tracker=tensorboard"],
    *["data.decode_timeout_seconds=5", "data.on_error=skip", "data.windows_per_clip=1", "lora.alpha=8"],
    "train.experts=['low', 'high']",
]


@pytest.fixture
def identity(make_config):
    """The identity of a configuration, by its overrides."""

    def of(*overrides: str, processes: int = 1) -> Identity:
        config = make_config(*overrides)
        # accelerate has one precision a process, which does not matter here.
        data = prepare_data(config, make_accelerator(make_config()))
        return identity_of(config, base_folder(config.model.base), data, processes)

    return of


def test_fatal_changes_stop_and_name_key_values_and_remedy(identity):
    saved = identity()
    for override, message in FATAL:
        with pytest.raises(InputError, match=message) as caught:
            require_same_run(saved, identity(override), {"high": 2, "low": 2}, "runs/x/step-000004")
        assert str(caught.value).startswith("runs/x/step-000004: was written with another configuration"), override
        assert "run.name" in str(caught.value)


def test_warned_changes_are_told_and_fine_ones_are_not(identity):
    saved, done = identity(), {"high": 2, "low": 2}
    for override, told in WARNED:
        assert any(str(c).startswith(told) for c in require_same_run(saved, identity(override), done, "x")), override
    for override in FINE:
        assert require_same_run(saved, identity(override), done, "x") == [], override
    # A constant learning rate does not know how many steps there are.
    constant = identity("optimizer.schedule=constant")
    assert require_same_run(constant, identity("optimizer.schedule=constant", "high.steps=9"), done, "x") == []


def test_the_number_of_processes_is_free_while_the_global_batch_stays(identity):
    saved = identity("train.batch_size=4")
    for override, processes in [("train.gradient_accumulation=1", 2), ("train.gradient_accumulation=2", 1)]:
        resplit = identity("train.batch_size=2", override, processes=processes)
        assert require_same_run(saved, resplit, {"high": 2}, "x") == []
    with pytest.raises(InputError, match=r"global_batch\.64x64x9: 4 -> 8"):
        require_same_run(saved, identity("train.batch_size=4", processes=2), {"high": 2}, "x")


def test_an_expert_that_has_done_nothing_is_free_to_change(identity):
    saved, done = identity(), {"high": 2}
    assert require_same_run(saved, identity("low.lora.rank=4", "low.flow.shift=2.0", "low.steps=1"), done, "x") == []
    with pytest.raises(InputError, match=r"high\.lora\.rank"):
        require_same_run(saved, identity("high.lora.rank=4"), done, "x")


def test_clips_that_came_and_went_are_counted():
    old = torch.tensor([[1, 10], [2, 20], [2, 21], [3, 30]])
    assert compare_samples(old, old.clone()) == ""
    new = torch.tensor([[1, 10], [2, 20], [2, 29], [4, 40], [5, 50]])
    told = compare_samples(old, new)
    assert told == "2 clips added, 1 clip removed, 1 clip changed (frames, captions, masks, windows, or held out)"
    assert compare_samples(old, old[[1, 0, 2, 3]]) == "the same clips in another order"


def test_a_moved_folder_is_the_same_data_and_a_changed_one_is_not(make_config, shared, tmp_path, capsys):
    whole = train(make_config("run.name='whole'", "high.steps=2", "low.steps=1"))
    train(make_config("run.name='part'", "high.steps=1", "low.steps=1", "optimizer.schedule=constant"))
    moved = tmp_path / "moved"
    shutil.copytree(shared / "ember", moved)
    there = f"data.sources=[{{path='{moved}'}}]"
    longer = ["run.name='part'", "high.steps=2", "low.steps=1", there]
    resumed = train(make_config(*longer))
    assert "warning: changed since step-000002" in capsys.readouterr().out  # the schedule
    assert same(whole["low"], resumed["low"]) and resumed["high"].step == 2
    manifests = [path.read_text() for path in (tmp_path / "part" / "checkpoints").glob("*/manifest.json")]
    assert manifests and not any(str(folder) in text for text in manifests for folder in (tmp_path, shared))
    before = (tmp_path / "part" / "config.toml").read_bytes()
    (moved / "clip-00.txt").write_text("another caption")
    for suffix in (".mp4", ".txt"):
        (moved / f"clip-01{suffix}").unlink()
        shutil.copy(moved / f"clip-02{suffix}", moved / f"new{suffix}")
    with pytest.raises(InputError, match=r"data: 1 clip added, 1 clip removed, 1 clip changed \(frames, captions"):
        train(make_config(*longer))
    shutil.copytree(moved, tmp_path / "elsewhere")
    longer[-1] = f"data.sources=[{{path='{tmp_path / 'elsewhere'}'}}]"
    # A folder is told by its name, and by a hash from another of that name.
    with pytest.raises(InputError, match=r'data\.sources\.0\.path: "moved \(\w{8}\)" -> "elsewhere \(\w{8}\)"'):
        train(make_config(*longer))
    # The file beside the checkpoints stays theirs.
    assert (tmp_path / "part" / "config.toml").read_bytes() == before


def test_another_base_under_the_same_name_is_refused(make_config, tiny_base, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    moved = tmp_path / "moved"
    settings = ["high.steps=1", "low.steps=1", "train.experts=['high']"]
    train(make_config(*settings, f"model.base='{base}'"))
    base.rename(moved)
    settings[0] = "high.steps=2"
    assert train(make_config(*settings, f"model.base='{moved}'"))["high"].step == 2
    file = next((moved / "transformer").glob("*.safetensors"))
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"base\.high: .* -> .*the adapter fits the weights.*restore model\.base"):
        train(make_config(*settings, f"model.base='{moved}'"))


def test_a_manifest_holds_what_decides_and_nothing_else(make_config):
    config = make_config("train.experts=['high']", "high.steps=1")
    train(config)
    text = (found(config.run_folder / "checkpoints")[0] / "manifest.json").read_text()
    values = json.loads(text)["configuration"]
    assert values["high.lora.rank"] == 8 and values["run.seed"] == 0 and "run.name" not in values
    assert not [key for key in values if key.startswith(("low.", "lora.", "sampling."))]


def test_a_changed_value_counts_from_the_resume_on(make_config):
    """A fresh optimizer takes its hyperparameters from its saved state unless it is told not to."""
    first = ["run.name='part'", "high.steps=1", "train.experts=['high']", "optimizer.schedule=constant"]
    train(make_config(*first))
    resumed = train(make_config(*first, "high.steps=2", "optimizer.weight_decay=0.25"))
    assert [group["weight_decay"] for group in resumed["high"].optimizer["param_groups"]] == [0.25]


def test_types_of_keys_are_seen_through():
    class Inner(BaseModel):
        value: int = 0

    class Outer(BaseModel):
        plain: int = 0
        table: Inner = Inner()
        maybe: Inner | None = None
        several: list[Inner] = []

    assert isinstance(Outer.model_fields["maybe"].annotation, types.UnionType)
    assert list(keys_of(Outer)) == ["plain", "table.value", "maybe.value", "several.value"]
