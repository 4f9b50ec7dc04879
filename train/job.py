"""The main job: data, training in rounds, previews, evaluation, export, report. Each part is run once and resumes."""

import signal
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path

import tomli_w
from accelerate import Accelerator
from accelerate.utils import set_seed

from data.batches import TrainingData
from wan_finetune import __version__
from wan_finetune.adapters import Adapter
from wan_finetune.evaluation.compare import load_judge
from wan_finetune.experts import EXPERTS, ExpertName, base_folder
from wan_finetune.export import verify_adapter_folder, write_adapter_folder
from wan_finetune.quiet import quiet_libraries

from . import showcase
from .checkpoint import resume, save_checkpoint, sole_writer
from .config import Config
from .engine import make_accelerator
from .identity import identity_of
from .precompute import prepare_data
from .rounds import Stretch, stretches
from .signals import Stopped, StopRequest
from .tracking import Metrics, progress_bar, say
from .trainer import ExpertState, ExpertTrainer

States = dict[ExpertName, ExpertState]


def run(config: Config, stop: StopRequest) -> None:
    """Do the whole job, or what is left of it.

    Raises:
        Stopped: a signal came; the same call goes on from there.
    """
    base = base_folder(config.model.base, [EXPERTS[name].component for name in config.steps()], config.model.revision)
    accelerator = make_accelerator(config)
    quiet_libraries()
    set_seed(config.run.seed)
    folder = config.run_folder
    if (folder / "report.html").is_file():
        say(f"this run is complete: {folder / 'report.html'}. Give another run.name to train again.")
        return
    load_judge(config.evaluation.content)
    data = prepare_data(config, accelerator)
    metrics = Metrics(config, accelerator)
    with sole_writer(folder / "checkpoints") if accelerator.is_main_process else nullcontext():
        states = train_experts(config, base, data, metrics, accelerator, stop)
    if not accelerator.is_main_process:
        return
    adapters = [make_adapter(config, name, state) for name, state in states.items()]
    for path in write_adapter_folder(folder / "adapter", adapters):
        say(f"wrote {path}")
    verify_adapter_folder(config.model.base, folder / "adapter", adapters, config.model.revision)
    say("each file was loaded into a fresh expert by diffusers: every key matched, the output changed")
    showcase.show(config, metrics, data)
    accelerator.end_training()


def train_experts(
    config: Config, base: Path, data: TrainingData, metrics: Metrics, accelerator: Accelerator, stop: StopRequest
) -> States:
    """Take every expert to its last step, one stretch after the other; returns their states."""
    folder = config.run_folder / "checkpoints"
    identity = identity_of(config, base, data, accelerator.num_processes)
    states: States = {name: ExpertState() for name in config.steps()}
    if saved := resume(folder, identity, accelerator):
        states |= saved
        say("going on from " + ", ".join(f"{name} step {state.step}" for name, state in states.items()))
    metrics.forget_after({name: state.step for name, state in states.items()})
    if accelerator.is_main_process:
        # Not before it is clear that this run may go on: the file must stay that of the checkpoints.
        (config.run_folder / "config.toml").write_text(tomli_w.dumps(config.resolved()))

    def save() -> None:
        if accelerator.is_main_process:
            save_checkpoint(folder, states, identity, config.train.keep_checkpoints)
        accelerator.wait_for_everyone()

    for stretch in stretches(config.steps(), config.train.order, config.train.round_steps):
        state = states[stretch.expert]
        if state.step >= stretch.stop:
            continue
        trainer = ExpertTrainer(config, stretch.expert, state, base, data, accelerator)
        with stop.deferred():
            stopped = run_stretch(trainer, stretch, metrics, stop, save)
            trainer.close()
            save()
            if stopped:
                say(f"stopping after {stretch.expert} step {state.step}, which is saved")
                raise Stopped(signal.Signals(stopped).name)
        if is_midway(config, states) and accelerator.is_main_process:
            adapters = [make_adapter(config, name, s) for name, s in states.items() if s.weights]
            showcase.preview_midway(config, adapters)
        accelerator.wait_for_everyone()
    return states


def run_stretch(
    trainer: ExpertTrainer,
    stretch: Stretch,
    metrics: Metrics,
    stop: StopRequest,
    save: Callable[[], None],
) -> int:
    """Steps of one expert up to the stretch's end, or to a signal, which is returned; 0 where none came."""
    config, state = trainer.config, trainer.state
    label = f"{stretch.expert}-noise expert, steps {state.step + 1}-{stretch.stop}"
    with progress_bar(label, stretch.stop - stretch.start) as bar:
        while state.step < stretch.stop:
            record = trainer.take_step()
            metrics.add(record)
            bar.update(state.step - stretch.start, f"loss {record.loss:.4f}  {record.seconds:.2f} s/step")
            if stopped := stop.check(trainer.accelerator):
                return stopped
            # Once in a while: a checkpoint.
            if state.step % config.train.checkpoint_every_steps == 0 and state.step < stretch.stop:
                trainer.save_state()
                save()
    return 0


def is_midway(config: Config, states: Mapping[ExpertName, ExpertState]) -> bool:
    """Whether half of all steps are done and the midway preview is not there yet."""
    done, total = sum(state.step for state in states.values()), sum(config.steps().values())
    return total / 2 <= done < total and not showcase.midway_folder(config).is_dir()


def make_adapter(config: Config, name: ExpertName, state: ExpertState) -> Adapter:
    """An expert's state as an adapter that says what it is; no paths, no names of people or machines."""
    lora = config.expert(name).lora
    return Adapter(
        expert=name,
        rank=lora.rank,
        alpha=lora.scale_alpha,
        targets=lora.targets,
        weights=state.weights,
        about={
            "base": config.model.public_name,
            "trigger": config.data.trigger,
            "steps": str(state.step),
            "training_shift": repr(config.expert(name).flow.shift),
            "sampling_shift": repr(config.sampling.shift),
            "fps": repr(config.data.fps),
            "toolkit": f"wan-finetune {__version__}",
        },
    )
