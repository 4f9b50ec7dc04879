"""Memory that runs out: the batch is split at an equal gradient, or the run says what else would help."""

import pytest
import torch
from PIL import Image

from tests.tiny_runs import close, train
from train.engine import make_accelerator
from train.preparing import prepare_data
from train.state import ExpertState
from train.trainer import ExpertTrainer
from wan_finetune.errors import InputError
from wan_finetune.experts import base_folder

OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.fixture
def make_trainer(make_config):
    made = []

    def make(*overrides, name="high"):
        config = make_config("train.batch_size=4", *overrides)
        accelerator = make_accelerator(config)
        data = prepare_data(config, accelerator)
        made.append(ExpertTrainer(config, name, ExpertState(), base_folder(config.model.base), data, accelerator))
        return made[-1]

    yield make
    for trainer in made:
        trainer.prefetcher.close()


def holds_at_most(trainer, clips, error=OUT_OF_MEMORY):
    """Let the model fail on more clips than these; the sizes that came, in order."""
    seen = []

    def look(module, arguments, keywords):
        seen.append(len(keywords["hidden_states"]))
        if seen[-1] > clips:
            raise error

    trainer.model.register_forward_pre_hook(look, with_kwargs=True)
    return seen


@pytest.mark.parametrize("clips", [1, 2])
def test_a_batch_that_does_not_fit_is_split_and_the_gradient_is_the_same(make_trainer, clips, capsys):
    whole, split = make_trainer("run.name='whole'"), make_trainer("run.name='split'")
    seen = holds_at_most(split, clips)
    expected, found = [whole.take_step() for _ in range(2)], [split.take_step() for _ in range(2)]
    # The second step knows already.
    assert seen == {2: [4, 2, 2, 2, 2], 1: [4, 2, 1, 1, 1, 1, 1, 1, 1, 1]}[clips]
    for one, other in zip(expected, found, strict=True):
        assert other.loss == pytest.approx(one.loss, rel=1e-6)
        assert other.gradient_norm == pytest.approx(one.gradient_norm, rel=1e-5)
    said = capsys.readouterr().out.replace("\n", " ")
    assert f"out of memory in 64x64x9: each micro-batch goes through in {4 // clips} parts from now on" in said


def test_one_clip_that_does_not_fit_ends_the_run_with_the_next_thing_to_try(make_trainer):
    trainer = make_trainer()
    holds_at_most(trainer, 0)
    with pytest.raises(
        InputError, match=r"out of memory in 64x64x9, high expert.*one clip at a time is still too much"
    ):
        trainer.take_step()
    assert trainer.state.step == 0


def test_another_error_is_not_taken_for_it(make_trainer):
    trainer = make_trainer()
    seen = holds_at_most(trainer, 0, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        trainer.take_step()
    assert seen == [4]


def test_processes_do_not_split_behind_each_others_back(make_trainer, monkeypatch):
    trainer = make_trainer()
    work = trainer.load_step(0)
    holds_at_most(trainer, 1)
    monkeypatch.setattr("train.trainer.engine_name", lambda accelerator: "ddp")
    with pytest.raises(InputError, match="the processes would have to agree on it"):
        trainer.accumulate_gradient(work, 0)


def test_a_rehearsal_splits_before_the_first_step_and_moves_nothing(make_trainer):
    plain, rehearsed = make_trainer("run.name='plain'"), make_trainer("run.name='rehearsed'")
    seen = holds_at_most(rehearsed, 2)
    rehearsed.rehearse()
    assert seen == [4, 2, 2] and rehearsed.state.step == 0
    assert all(parameter.grad is None for parameter in rehearsed.parameters)
    assert rehearsed.take_step().loss == pytest.approx(plain.take_step().loss, rel=1e-6)


def test_a_rehearsal_tries_the_largest_batch_of_each_checkpointing_policy(make_trainer, shared, tmp_path):
    for number in range(4):
        Image.new("RGB", (64, 64), (60 * number, 20, 90)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text("a wall")
    trainer = make_trainer(
        f"data.sources=[{{path='{shared / 'ember'}'}}, {{path='{tmp_path}'}}]",
        "data.buckets=['64x64x9', '64x64x1']",
        "memory={checkpointing='full', checkpointing_by_bucket={'64x64x1'='none'}}",
        name="low",
    )
    frames = []
    trainer.model.register_forward_pre_hook(
        lambda _, arguments, keywords: frames.append(keywords["hidden_states"].shape[2]), with_kwargs=True
    )
    trainer.rehearse()
    assert sorted(frames) == [1, 3]  # of latents: a still's, and a clip's of nine frames


@pytest.mark.parametrize(
    "where", ["wan_finetune.memory.residence.load_base", "train.parallel.Parallel.update", "train.job.validate"]
)
@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OUT_OF_MEMORY, r'with the high expert.*CUDA out of memory.*Next: memory.quantization = "int8"'),
        (MemoryError("1 GiB could not be locked; lower memory.stream_blocks"), "high expert: 1 GiB could not.*blocks$"),
    ],
    ids=["device", "host"],
)
def test_memory_that_ends_where_no_batch_can_be_split_is_told_with_the_next_lever(
    make_config, monkeypatch, where, error, told
):
    def no_room(*_, **__):
        raise error

    monkeypatch.setattr(where, no_room)
    config = make_config("memory.checkpointing='full'")
    with pytest.raises(InputError, match=told):
        train(config)


def test_a_split_run_reaches_the_same_weights(make_config, monkeypatch):
    settings = ["train.batch_size=4", "high.steps=3", "train.experts=['high']"]
    whole = train(make_config("run.name='whole'", *settings))
    backward = ExpertTrainer.backward

    def no_room(self, work, step, splits):
        if splits == 1:
            raise OUT_OF_MEMORY
        return backward(self, work, step, splits)

    monkeypatch.setattr(ExpertTrainer, "backward", no_room)
    split = train(make_config("run.name='split'", *settings))
    assert close(whole["high"], split["high"])
