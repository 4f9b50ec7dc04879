"""The [memory] table, what is refused and why, and what to try when memory runs out."""

import itertools
import tomllib

import pytest
import torch

from wan_finetune.errors import InputError
from wan_finetune.memory.levers import is_out_of_memory, next_lever
from wan_finetune.memory.settings import MemorySettings
from wan_finetune.memory.support import Combination, check_supported, every_combination, refusal
from wan_finetune.settings import load_settings


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["quantization=fp8", "checkpointing=none"], "until the backward pass"),
        (["quantization=int8", "checkpointing_by_bucket={'832x480x33'='none'}"], "until the backward pass"),
        (["stream_blocks=4", "checkpointing=none"], "weights that have left the device"),
        (["stream_blocks=4", "resident=both"], "two do not"),
        (["checkpointing_by_bucket={'832x480'='full'}"], "832x480x81"),
        (["checkpointing_by_bucket={'832x480x81'='often'}"], "selective"),
        (["stream_blocks=-1"], "greater than or equal"),
        (["quantisation=fp8"], "did you mean quantization?"),
    ],
)
def test_a_table_that_cannot_work_is_refused_with_its_reason(tmp_path, overrides, says):
    (tmp_path / "memory.toml").write_text("", encoding="utf-8")
    with pytest.raises(InputError, match=says.replace("?", r"\?")):
        load_settings(MemorySettings, tmp_path / "memory.toml", overrides)


def test_a_bucket_without_a_policy_of_its_own_has_the_general_one():
    settings = MemorySettings(checkpointing="selective", checkpointing_by_bucket={"832x480x81": "full"})
    assert settings.policy("832x480x81") == "full" and settings.policy("832x480x33") == "selective"


def test_every_row_of_the_support_table_runs_or_says_key_reason_and_remedy():
    rows = every_combination()
    assert len(rows) == len(set(rows)) == 4 * 5 * 3 * 2 * 3 * 4
    keys = ("train.mixed_precision", "memory.", "lora.")
    for row in rows:
        reason = refusal(row)
        if reason is None:
            check_supported(row)
            continue
        assert reason.startswith(keys) and "; use " in reason and ":" in reason, reason
        with pytest.raises(InputError):
            check_supported(row)


def test_what_goes_wrong_silently_is_refused_whatever_else_is_chosen():
    for row in every_combination():
        if row.quantization != "none" and row.engine in ("fsdp2", "zero2", "zero3"):
            assert refusal(row)
        if row.adaptation in ("pissa", "olora") and (row.quantization != "none" or row.kept):
            assert refusal(row)
        if row.precision == "fp16":
            assert refusal(row)
    plain = [
        Combination(quantization=kind, engine=engine, precision=precision, dtype=dtype)
        for kind, engine, (precision, dtype) in itertools.product(
            ("none", "fp8", "int8", "nf4"),
            ("single", "ddp"),
            (("no", "float32"), ("bf16", "float32"), ("bf16", "bfloat16")),
        )
    ]
    assert not any(refusal(row) for row in plain)
    assert not any(refusal(Combination(engine=engine)) for engine in ("single", "ddp", "fsdp2", "zero2", "zero3"))


def raised(error: BaseException, cause: BaseException | None = None) -> BaseException:
    try:
        raise error from cause
    except BaseException as caught:
        return caught


def test_out_of_memory_is_told_from_other_faults_also_inside_a_library_s_own_error():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert is_out_of_memory(raised(RuntimeError("step failed"), torch.OutOfMemoryError("out of memory")))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory is mentioned by a user's text"))
    with pytest.raises(RuntimeError) as real:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(real.value)


@pytest.mark.parametrize("bucket", ["832x480x81", "256x256x1"])
def test_the_levers_end_and_each_is_a_setting_that_is_accepted(bucket):
    settings = MemorySettings(
        checkpointing="none", checkpointing_by_bucket={"64x64x1": "none", bucket: "none"}, resident="both"
    )
    seen: list[str] = []
    while (advice := next_lever(settings, bucket)).startswith("memory."):
        assert advice not in seen and len(seen) < 12
        seen.append(advice)
        change = tomllib.loads(advice.rpartition(": ")[0].removeprefix("memory."))
        settings = MemorySettings.model_validate({**settings.model_dump(), **change})
        assert refusal(Combination(quantization=settings.quantization, streaming=settings.stream_blocks > 0)) is None
    assert settings.quantization == "nf4" and settings.stream_blocks == 40 and settings.policy(bucket) == "offloaded"
    first = next(a.split(" ")[0] for a in seen if "quantization" in a or "stream" in a)
    assert first == ("memory.stream_blocks" if bucket == "832x480x81" else "memory.quantization")
    assert advice.startswith("data.buckets")
