"""DINOv2 and CLIP as transformers has them: drawn, tiny, in a folder."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
)

from fastdiff.data import ArrayDataset
from fastdiff.errors import InputError
from fastdiff.evaluation.features import feature_network
from fastdiff.evaluation.published import published_scores

pytestmark = pytest.mark.seconds

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
TOWER = {**TINY, "intermediate_size": 32, "image_size": 28, "patch_size": 14, "projection_dim": 12}
TEXT = {**TINY, "intermediate_size": 32, "vocab_size": 20, "projection_dim": 12}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("networks")
    networks = {
        "dinov2": Dinov2Model(Dinov2Config(**TINY, image_size=56, patch_size=14, mlp_ratio=2)),
        "tower": CLIPVisionModelWithProjection(CLIPVisionConfig(**TOWER)),
        "clip": CLIPModel(CLIPConfig(text_config=TEXT, vision_config=TOWER, projection_dim=12)),
    }
    for name, network in networks.items():
        network.eval().save_pretrained(place / name)
    return place, networks


def pictures(count, side):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)


def normalized(images, mean, std):
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    return (images / 255 - mean) / std


@torch.no_grad()
def test_dinov2_answers_its_class_token(folders):
    place, networks = folders
    network, images = feature_network("dinov2", place / "dinov2"), pictures(3, 224)
    shown = normalized(images, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    expected = networks["dinov2"](shown).last_hidden_state[:, 0]
    torch.testing.assert_close(network(images)["pooled"], expected, rtol=1e-4, atol=1e-5)
    assert network.widths == {"pooled": 16} and network.name.startswith("dinov2 ")
    assert network.resizing == "bicubic, antialiased, to 224x224" and not network.published


@torch.no_grad()
@pytest.mark.parametrize("name", ["tower", "clip"])
def test_clip_answers_its_embedding(folders, name):
    """Of the image tower alone, or of the whole network."""
    place, networks = folders
    network, images = feature_network("clip", place / name), pictures(3, 50)
    small = [
        torch.from_numpy(np.array(Image.fromarray(pixels).resize((28, 28), Image.BICUBIC)))
        for pixels in images.permute(0, 2, 3, 1).numpy()
    ]
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    shown = normalized(torch.stack(small).permute(0, 3, 1, 2), mean, std)
    whole = networks[name]
    expected = whole.visual_projection(whole.vision_model(shown).pooler_output)
    found = network(images)["pooled"]
    # Pillow, by which CLIP's own code resizes, rounds to bytes.
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    assert network.widths == {"pooled": 12} and network.resizing.endswith("to 28x28")


def test_scores_by_them(folders, tmp_path):
    network = feature_network("dinov2", folders[0] / "dinov2")
    fake, real = (pictures(n, 16).permute(0, 2, 3, 1).numpy() for n in (6, 9))
    kept = {"folder": tmp_path / "kept", "write_moments": tmp_path / "ref.npz"}
    scores = published_scores(fake, ArrayDataset(real), ["fid", "kid", "prc"], network, **kept)
    assert scores["fid"] > 0 and scores["features"] == network.name
    with np.load(tmp_path / "ref.npz") as archive:
        assert sorted(archive) == ["features", "mu", "sigma"]
    with pytest.raises(InputError, match="metric 'is' needs logits features, which dinov2 .* has"):
        published_scores(fake, ArrayDataset(real), ["fid", "is"], network)


def test_other_networks_are_refused(folders, tmp_path):
    place, networks = folders
    with pytest.raises(InputError, match="of the type 'clip', --features dinov2 takes dinov2: "):
        feature_network("dinov2", place / "clip")
    with pytest.raises(InputError, match="of the type 'dinov2', --features clip takes clip or "):
        feature_network("clip", place / "dinov2")
    networks["dinov2"].save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(InputError, match="lacks weights of a Dinov2Model: encoder.layer.2"):
        feature_network("dinov2", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": 32}))
    with pytest.raises(InputError, match="cannot be read as a Dinov2Model") as caught:
        feature_network("dinov2", tmp_path)
    assert "\n" not in str(caught.value)
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(InputError, match="is not transformers' config.json"):
        feature_network("dinov2", tmp_path)
