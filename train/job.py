"""The main job: data, training in rounds, previews, evaluation, export, report. Each part is run once and resumes."""

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import tomli_w
from accelerate import Accelerator
from accelerate.utils import set_seed

from data.batches import TrainingData
from data.buckets import Bucket
from wan_finetune.adapters import Adapter, as_adapter
from wan_finetune.errors import InputError
from wan_finetune.evaluation.compare import load_judge
from wan_finetune.experts import EXPERTS, ExpertName, base_folder
from wan_finetune.export import verify_adapter_folder, write_adapter_folder
from wan_finetune.lora_start import require_start
from wan_finetune.memory.levers import base_lever, is_out_of_memory
from wan_finetune.quiet import quiet_libraries

from . import showcase
from .best import keep_best, load_best
from .checkpoint import States, resume, save_checkpoint, sole_writer
from .config import Config
from .engine import engine_name, home_device, make_accelerator
from .identity import identity_of
from .optim import find_class
from .panel import Figures
from .preparing import prepare_data
from .previews import Previews
from .provenance import facts_of_expert, facts_of_run
from .publishing import Publisher, write_card
from .recommendation import Candidate, recommend
from .rounds import Stretch, stretches
from .signals import Stopped, StopRequest
from .state import ExpertState
from .supported import require_support, tell_of_policies_for_nothing
from .terminal import progress_bar, say
from .tracking import Metrics
from .trainer import ExpertTrainer, make_bases
from .validation import Validation


def run(config: Config, stop: StopRequest) -> None:
    """Do the whole job, or what is left of it.

    Raises:
        Stopped: a signal came; the same call goes on from there.
    """
    base = base_folder(config.model.base, [EXPERTS[name].component for name in config.steps()], config.model.revision)
    accelerator = make_accelerator(config)
    require_support(config, accelerator)
    quiet_libraries()
    set_seed(config.run.seed)
    folder = config.run_folder
    if (folder / "report.html").is_file():
        say(f"this run is complete: {folder / 'report.html'}. Give another run.name to train again.")
        return
    load_judge(config.evaluation.content)
    for name in config.steps():
        find_class(config.expert(name).optimizer.name)
        # A run that goes on has its weights from a checkpoint.
        if not (folder / "checkpoints").is_dir():
            require_start(config.expert(name).lora, name)
    data = prepare_data(config, accelerator)
    tell_of_policies_for_nothing(config, data)
    metrics = Metrics(config, accelerator)
    publisher = Publisher(config, make_adapter, accelerator.is_main_process)
    with publisher, sole_writer(folder / "checkpoints") if accelerator.is_main_process else nullcontext():
        states = train_experts(config, base, data, metrics, accelerator, stop, publisher)
    validation = Validation(config.validation, folder, accelerator)
    validation.begin({name: state.step for name, state in states.items()})
    if not accelerator.is_main_process:
        return
    facts = facts_of_run(config, base, data)
    chosen = {name: choose_state(config, validation, name, state) for name, state in states.items()}
    adapters = [make_adapter(config, name, state, facts) for name, state in chosen.items()]
    for path in write_adapter_folder(folder / "adapter", adapters):
        say(f"wrote {path}")
    verify_adapter_folder(config.model.base, folder / "adapter", adapters, config.model.revision)
    say("each file was loaded into a fresh expert by diffusers: every key matched, the output changed")
    write_card(config)
    showcase.show(config, metrics, data)
    write_card(config)
    publisher.finish()
    accelerator.end_training()


def train_experts(
    config: Config,
    base: Path,
    data: TrainingData,
    metrics: Metrics,
    accelerator: Accelerator,
    stop: StopRequest,
    publisher: Publisher | None = None,
) -> States:
    """Take every expert to its last step, one stretch after the other; returns their states."""
    folder = config.run_folder / "checkpoints"
    identity = identity_of(config, base, data, accelerator.num_processes)
    states: States = {name: ExpertState() for name in config.steps()}
    if saved := resume(folder, identity, accelerator):
        states |= saved
        say("going on from " + ", ".join(f"{name} step {state.step}" for name, state in states.items()))
    reached = {name: state.step for name, state in states.items()}
    metrics.forget_after(reached)
    if accelerator.is_main_process:
        # Not before it is clear that this run may go on: the file must stay that of the checkpoints.
        (config.run_folder / "config.toml").write_text(tomli_w.dumps(config.resolved()))
    validation = Validation(config.validation, config.run_folder, accelerator)
    validation.begin(reached)
    figures, previews = Figures(config.steps(), reached), Previews(config, metrics.show_clips)

    def save() -> None:
        if accelerator.is_main_process:
            save_checkpoint(folder, states, identity, config.train.keep_checkpoints)
        accelerator.wait_for_everyone()
        if publisher:
            publisher.at_checkpoint(states, validation)

    bases = make_bases(config, base, home_device(accelerator))
    plan = list(stretches(config.steps(), config.train.order, config.train.round_steps))
    for number, stretch in enumerate(plan):
        state = states[stretch.expert]
        if state.step >= stretch.stop or validation.has_stopped(stretch.expert, config.patience(stretch.expert)):
            continue
        if publisher:
            publisher.before_stretch(stretch, states)
        with telling_of_memory(config, stretch.expert, data):
            trainer = ExpertTrainer(config, stretch.expert, state, base, data, accelerator, bases)
            if accelerator.device.type == "cuda" and state.step == 0 and engine_name(accelerator) in ("single", "ddp"):
                trainer.rehearse()
        # Together: one that a signal ends here would leave those that are already in a step waiting for it.
        accelerator.wait_for_everyone()
        with stop.deferred():
            following = next(
                (later.expert for later in plan[number + 1 :] if states[later.expert].step < later.stop), None
            )
            with telling_of_memory(config, stretch.expert, data):
                stopped = run_stretch(trainer, stretch, following, metrics, figures, validation, stop, save)
            trainer.close()
            save()
            if stopped:
                say(f"stopping after {stretch.expert} step {state.step}, which is saved")
                raise Stopped(signal.Signals(stopped).name)
        if accelerator.is_main_process and (target := previews.folder(stretch, states)):
            previews.make(target, [make_adapter(config, name, s) for name, s in states.items() if s.weights])
        accelerator.wait_for_everyone()
    bases.close()
    return states


@contextmanager
def telling_of_memory(config: Config, expert: ExpertName, data: TrainingData) -> Iterator[None]:
    """Memory that runs out where there is no batch to split, above all while the base is loaded: told as what it is.

    Raises:
        InputError: with the next thing to change.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if isinstance(error, MemoryError):
            raise InputError(f"{expert} expert: {str(error) or 'the memory of this machine is full'}") from error
        largest = max(set(data.samples.column("bucket")), key=lambda name: Bucket.parse(name).tokens)
        said = next(iter(str(error).splitlines()), "")
        raise InputError(
            f"out of memory with the {expert} expert, outside of a batch that could be split ({said}). "
            f"Next: {base_lever(config.memory, largest)}"
        ) from error


def run_stretch(
    trainer: ExpertTrainer,
    stretch: Stretch,
    following: ExpertName | None,
    metrics: Metrics,
    figures: Figures,
    validation: Validation,
    stop: StopRequest,
    save: Callable[[], None],
) -> int:
    """Steps of one expert up to the stretch's end, or to a signal, which is returned; 0 where none came."""
    config, state = trainer.config, trainer.state
    patience = config.patience(stretch.expert)
    label = f"{stretch.expert} expert, steps {state.step + 1}-{stretch.stop}"
    figures.begin()
    with progress_bar(label, stretch.stop - stretch.start) as bar:
        validate(trainer, metrics, validation)
        while state.step < stretch.stop and not validation.has_stopped(stretch.expert, patience):
            record = trainer.take_step()
            metrics.add(record)
            figures.add(record)
            bar.update(
                state.step - stretch.start, figures.note(), figures.details(record, validation.latest(stretch.expert))
            )
            if stopped := stop.check(trainer.accelerator):
                return stopped
            # Once in a while: reading the next expert ahead, the held-out loss, and a checkpoint.
            if following and trainer.bases.is_time_for(following, record.seconds * (stretch.stop - state.step)):
                trainer.bases.prepare_next(following)
            validate(trainer, metrics, validation)
            if state.step % config.train.checkpoint_every_steps == 0 and state.step < stretch.stop:
                trainer.save_state()
                save()
    return 0


def validate(trainer: ExpertTrainer, metrics: Metrics, validation: Validation) -> None:
    """Measure an expert's held-out loss if it is due, and keep the weights where it is the lowest so far."""
    config, expert = trainer.config, trainer.expert
    if not validation.is_due(expert, trainer.state.step, trainer.settings.steps):
        return
    found = validation.measure(trainer)
    if found is None:
        return
    values = {"held_out_loss": found.loss, "held_out_loss_base": found.base_loss, "effect_size": found.effect}
    values |= {f"held_out_loss_at_{level.sigma:.2f}": level.loss for level in found.levels}
    metrics.track(expert, found.step, {name: value for name, value in values.items() if value is not None})
    if found.step and found.loss == min(each.loss for each in validation.of(expert) if each.step):
        trainer.save_state()
        if trainer.accelerator.is_main_process:
            keep_best(
                config.run_folder / "checkpoints", expert, found.step, trainer.state.average or trainer.state.weights
            )


def choose_state(config: Config, validation: Validation, name: ExpertName, state: ExpertState) -> ExpertState:
    """The state that becomes the adapter; what speaks for which is said aloud."""
    history = [each for each in validation.of(name) if each.step > 0]
    if not history:
        if config.validation.export == "best":
            say(f"{EXPERTS[name].title}: no held-out loss was measured, so its last state becomes the adapter")
        return state
    candidates = [Candidate(step=each.step, held_out_loss=each.loss) for each in history]
    best = recommend(candidates, history[0].base_loss)
    say(f"{EXPERTS[name].title}: step {best.step} of {state.step} is recommended: {best.reason}")
    if config.validation.export == "last" or best.step == state.step:
        return state
    weights = load_best(config.run_folder / "checkpoints", name, best.step)
    return replace(state, step=best.step, weights=weights, average={})


def make_adapter(
    config: Config, name: ExpertName, state: ExpertState, run_facts: Mapping[str, str] | None = None
) -> Adapter:
    """An expert's state as an adapter that says what it is.

    Args:
        run_facts: of `facts_of_run`, where the adapter is to be kept.
    """
    return as_adapter(
        name,
        config.expert(name).lora,
        state.average or state.weights,
        state.taken,
        about={**facts_of_expert(config, name, state.step), **(run_facts or {})},
    )
