import pytest

from on_both import unet_on


@pytest.fixture
def unet(device):
    return unet_on(device.name)
