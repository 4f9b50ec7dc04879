"""The shipped engine configurations are what accelerate, DeepSpeed, SLURM and the trainer take them for."""

import copy
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from train import parallel
from train.config import Config
from train.engine import deepspeed_fault, engine_name, fsdp_plugin, make_accelerator
from wan_finetune.errors import InputError
from wan_finetune.settings import load_settings

ROOT = Path(__file__).resolve().parent.parent
YAML = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
JSON = sorted((ROOT / "configs" / "deepspeed").glob("*.json"))
DISTRIBUTED_TYPES = {
    "one_gpu": "NO",
    "ddp": "MULTI_GPU",
    "fsdp2": "FSDP",
    "zero2": "DEEPSPEED",
    "zero3": "DEEPSPEED",
    "two_nodes_ddp": "MULTI_GPU",
    "two_nodes_fsdp2": "FSDP",
}


@pytest.fixture
def config() -> Config:
    return load_settings(Config, ROOT / "configs" / "pocket.toml", [])


@pytest.fixture
def no_accelerator(monkeypatch):
    """As in a process that has made no accelerator; what it sets in the environment is given back."""
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for state in (AcceleratorState, GradientState):
        monkeypatch.setattr(state, "_shared_state", {})


def launch_arguments(file: Path):
    arguments, _, _ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(file), "-m", "train"])
    )
    return arguments


@pytest.mark.parametrize("file", YAML, ids=lambda file: file.stem)
def test_accelerate_knows_every_key(file):
    loaded = load_config_from_file(str(file))  # which raises on an unknown key at the top
    assert isinstance(loaded, ClusterConfig)
    assert loaded.distributed_type == DISTRIBUTED_TYPES[file.stem]
    known = vars(launch_command_parser().parse_args(["-m", "train"]))
    for section in (loaded.fsdp_config, loaded.deepspeed_config, loaded.dynamo_config):
        assert set(section) <= set(known)
    # Precision has one owner, the TOML file.
    assert launch_arguments(file).mixed_precision == "no"


def test_every_engine_has_its_configuration():
    assert {file.stem for file in YAML} == set(DISTRIBUTED_TYPES)
    assert {file.stem for file in JSON} == {"zero2", "zero3"}


@pytest.mark.parametrize("name", ["fsdp2", "two_nodes_fsdp2"])
def test_the_trainer_takes_the_fsdp_configurations(name, monkeypatch, no_accelerator):
    arguments = launch_arguments(ROOT / "configs" / "accelerate" / f"{name}.yaml")
    for key, value in prepare_multi_gpu_env(arguments).items():
        if key.startswith("FSDP_"):
            monkeypatch.setenv(key, value)
    plugin = fsdp_plugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.transformer_cls_names_to_wrap == ["WanTransformerBlock"]
    # Nothing is cast: LoRA, time path and time step keep their fp32.
    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype, policy.cast_forward_inputs) == (None, None, False)


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("FSDP_VERSION", "1", "fsdp_version must be 2"),
        ("FSDP_AUTO_WRAP_POLICY", "NO_WRAP", "TRANSFORMER_BASED_WRAP"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "memory.checkpointing decides"),
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", "fsdp_cpu_ram_efficient_loading must be false"),
    ],
)
def test_an_fsdp_configuration_that_would_train_otherwise_is_refused(
    monkeypatch, no_accelerator, variable, value, words
):
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "WanTransformerBlock")
    monkeypatch.setenv(variable, value)
    with pytest.raises(InputError, match=words):
        fsdp_plugin()


@pytest.mark.parametrize("file", JSON, ids=lambda file: file.stem)
def test_deepspeed_and_the_trainer_take_the_deepspeed_configurations(file):
    settings = json.loads(file.read_text())
    assert deepspeed_fault(settings) is None
    assert settings["zero_optimization"]["stage"] == int(file.stem[-1])
    # DeepSpeed's own classes, in a process of its own: importing them changes torch.
    script = (
        "import json, sys; from deepspeed.runtime.config import DeepSpeedConfig\n"
        "settings = {**json.load(open(sys.argv[1])), 'gradient_clipping': 1.0}\n"
        "parsed = DeepSpeedConfig(settings)\n"
        "assert parsed.zero_config.stage == settings['zero_optimization']['stage']\n"
        "assert not parsed.bfloat16_config.enabled and parsed.gradient_accumulation_steps == 1\n"
        "settings['zero_optimization']['stagee'] = 1\n"
        "try:\n    DeepSpeedConfig(settings)\n"
        "except Exception as error:\n    assert 'stagee' in str(error)\n"
        "else:\n    sys.exit('an unknown key was taken')\n"
    )
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(file)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_accelerate_hands_deepspeed_the_shipped_file(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = launch_arguments(ROOT / "configs" / "accelerate" / f"{name}.yaml")
    arguments.deepspeed_fields_from_accelerate_config = "deepspeed_config_file,zero3_init_flag"
    _, environment = prepare_deepspeed_cmd_env(arguments)
    assert (ROOT / environment["ACCELERATE_DEEPSPEED_CONFIG_FILE"]).name == f"{name}.json"
    assert Path(environment["ACCELERATE_DEEPSPEED_CONFIG_FILE"]).is_file()
    assert environment["ACCELERATE_DEEPSPEED_ZERO3_INIT"] == "false"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"zero_optimization": {"stage": 1}}, "stage must be 2 or 3"),
        ({"optimizer": {"type": "AdamW"}}, "optimizer must be left out"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler must be left out"),
        ({"bf16": {"enabled": True}}, "bf16.enabled must be false"),
        ({"fp16": {"enabled": True}}, "fp16.enabled must be false"),
        ({"gradient_accumulation_steps": 4}, "train.gradient_accumulation decides"),
        ({"gradient_clipping": 1.0}, "optimizer.gradient_clip decides"),
        ({"train_micro_batch_size_per_gpu": "auto"}, "train_micro_batch_size_per_gpu must be a number"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer"),
    ],
)
def test_a_deepspeed_configuration_with_a_second_owner_is_refused(change, words):
    settings = {**json.loads(JSON[0].read_text()), **copy.deepcopy(change)}
    assert words in str(deepspeed_fault(settings))


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_what_accelerate_makes_of_a_launch_is_compared_with_what_was_asked(config, monkeypatch, no_accelerator, engine):
    # On a CPU it forgets FSDP, and starts as many runs of one process as there should be processes.
    monkeypatch.setenv("WORLD_SIZE", "2")
    if engine == "fsdp2":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        monkeypatch.setenv("FSDP_VERSION", "2")
        monkeypatch.setenv("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
    with pytest.raises(InputError, match=f"asked for 2 processes under {engine} and accelerate runs 1 under single"):
        make_accelerator(config)


def test_a_sharding_engine_with_one_process_is_not_taken_for_none(config, monkeypatch, no_accelerator):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
    with pytest.raises(InputError, match="under fsdp2 and accelerate runs 1 under single"):
        make_accelerator(config)


def test_accelerates_own_accumulation_is_not_heard(config, monkeypatch, no_accelerator):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    accelerator = make_accelerator(config)
    assert isinstance(accelerator, Accelerator) and accelerator.gradient_accumulation_steps == 1
    assert engine_name(accelerator) == "single"


@pytest.mark.parametrize("engine", ["fsdp2", "zero2", "zero3"])
def test_an_optimizer_whose_state_cannot_be_cut_up_is_refused(monkeypatch, engine):
    model = torch.nn.Linear(4, 4)
    monkeypatch.setattr(parallel, "engine_name", lambda accelerator: engine)
    with pytest.raises(InputError, match=f"Adafactor does not run under {engine}.*ddp.yaml"):
        parallel.parallelize(None, model, torch.optim.Adafactor(model.parameters()), {}, 1.0)


# --- docs/engines.md -------------------------------------------------------------------------------------------------


def test_the_pages_commands_name_what_is_there(monkeypatch):
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "engines.md").read_text(encoding="utf-8")
    for name in re.findall(r"(?:configs|tests)/[\w/]+\.\w+", page):
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"`(\w+)\.yaml`|`(two_nodes_\w+)`", page):
        assert (ROOT / "configs" / "accelerate" / f"{''.join(name)}.yaml").is_file(), name
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"\.\[(\w+)\]", page)) <= extras.keys()
    launches = re.findall(r"^\.venv/bin/accelerate launch (.*)$", page, re.M)
    assert launches
    for line in launches:
        parsed, _, _ = _validate_launch_command(launch_command_parser().parse_args(shlex.split(line)))
        assert parsed.module and parsed.training_script == "train"
        assert Path(parsed.training_script_args[1]).is_file()


# --- SLURM -----------------------------------------------------------------------------------------------------------

FAKE_SRUN = """\
#!/usr/bin/env bash
# Runs the command as a machine's task would, and passes a signal on as srun does.
shift # --kill-on-bad-exit
export SLURM_NODEID=1
trap 'kill -USR1 $!' USR1
"$@" &
while kill -0 $! 2>/dev/null; do wait $! || status=$?; done
exit "$status"
"""
FAKE_SCONTROL = """\
#!/usr/bin/env bash
if [[ $1 == show ]]; then
    echo node-a
    sleep 0.2 # whoever reads one line alone is gone by now
    echo node-b
else
    echo "$@" >requeued
fi
"""
FAKE_ACCELERATE = """\
#!/usr/bin/env bash
trap 'echo USR1 >>signals; exit 1' USR1
printf '%s\\n' "$@" >arguments.partial
mv arguments.partial arguments
while :; do sleep 0.05; done
"""


def test_the_slurm_script_starts_every_machine_and_passes_the_signal_on(tmp_path, monkeypatch):
    for path, text in {
        "tools/srun": FAKE_SRUN,
        "tools/scontrol": FAKE_SCONTROL,
        ".venv/bin/accelerate": FAKE_ACCELERATE,
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
        (tmp_path / path).chmod(0o755)
    script = shutil.copy(ROOT / "configs" / "slurm" / "train.sbatch", tmp_path)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path / 'tools'}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_JOB_ID": "41",
        "ENGINE": "fsdp2",
    }
    process = subprocess.Popen(["bash", str(script), "a b.toml", "data.trigger=x y"], env=environment)
    deadline = time.monotonic() + 60
    while not (tmp_path / "arguments").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 0
    assert (tmp_path / "signals").read_text() == "USR1\n"
    assert (tmp_path / "requeued").read_text() == "requeue 41\n"
    given = (tmp_path / "arguments").read_text().splitlines()
    assert given[-5:] == ["-m", "train", "--config", "a b.toml", "data.trigger=x y"]
    # accelerate itself understands the line.
    monkeypatch.chdir(ROOT)
    parsed, _, _ = _validate_launch_command(launch_command_parser().parse_args(given[1:]))
    assert (parsed.num_machines, parsed.num_processes, parsed.machine_rank) == (2, 16, 1)
    assert (parsed.main_process_ip, parsed.main_process_port) == ("node-a", 20041)
    assert parsed.use_fsdp and parsed.fsdp_version == 2
