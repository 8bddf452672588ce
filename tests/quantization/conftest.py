"""The small model and what it is quantised to, which most tests here start from."""

import pytest


@pytest.fixture(scope="session")
def model(tiny_model):
    return tiny_model


@pytest.fixture(scope="session")
def quantised(tiny_quantized):
    return tiny_quantized
