"""What the tests of serving share: a tiny base with an adapter and a classifier, opened once a file."""

import pytest

from tests.served import SAMPLING, write_adapter
from tests.tiny_classifier import write_tiny_classifier
from wan_finetune.safety import FRAME_SWITCH
from wan_finetune.serving.generator import open_generator
from wan_finetune.serving.settings import ServingSettings

BASE = "Wan-AI/Wan2.2-T2V-A14B-Diffusers"


@pytest.fixture(scope="module")
def adapter(tiny_base, tmp_path_factory):
    return write_adapter(tiny_base, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return write_tiny_classifier(tmp_path_factory.mktemp("classifier"), "nothing")


@pytest.fixture(scope="module")
def settings(tiny_base, adapter):
    table = {"base": str(tiny_base), "adapter": str(adapter), "sampling": SAMPLING}
    return ServingSettings.model_validate(table)


@pytest.fixture(scope="module")
def generator(settings, classifier):
    return open_generator(settings, {FRAME_SWITCH: str(classifier)})
