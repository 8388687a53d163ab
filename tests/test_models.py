"""Networks: shapes, the paper's sizes, and what curves and symmetries need of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small import agree, terms
from torch import nn
from torch.func import functional_call

from mcnotes import models

IMAGES = {"28 x 28 x 1": (1, 28), "32 x 32 x 3": (3, 32)}
NARROW = {"mlp": 16, "tinyten": 4, "googlenet": 0.125}


def narrow(name: str, channels: int, size: int, **options: object) -> nn.Module:
    torch.manual_seed(0)
    return models.build(
        name,
        num_classes=7,
        in_channels=channels,
        image_size=size,
        width=NARROW.get(name, 4),
        **options,
    )


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("name", models.BUILDERS)
class TestEveryNetwork:
    def test_maps_images_to_logits_and_changes_nothing_given(self, name: str, image: str) -> None:
        channels, size = IMAGES[image]
        net = narrow(name, channels, size).eval()
        x = torch.rand(3, channels, size, size)
        before = x.clone()
        logits = net(x)
        assert logits.shape == (3, 7)
        assert torch.equal(x, before)
        # In eval mode an image's logits do not depend on its neighbours in the batch.
        agree(net(x[1:2]), logits[1:2], terms(net))

    def test_runs_from_a_dict_of_tensors(self, name: str, image: str) -> None:
        channels, size = IMAGES[image]
        net, other = narrow(name, channels, size).eval(), narrow(name, channels, size).eval()
        with torch.no_grad():
            for p in other.parameters():
                p.mul_(0.5)
        theta = {key: value.detach() for key, value in other.state_dict().items()}
        x = torch.rand(2, channels, size, size)
        assert torch.equal(functional_call(net, theta, (x,)), other(x))
        assert not torch.allclose(net(x), other(x))

    def test_the_same_seed_draws_the_same_weights(self, name: str, image: str) -> None:
        a, b = narrow(name, *IMAGES[image]), narrow(name, *IMAGES[image])
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("name", models.BUILDERS)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_can_be_exported(name: str, training: bool) -> None:
    net = narrow(name, 3, 32).train(training)
    x = torch.rand(2, 3, 32, 32)
    graph = torch.export.export(net, (x,)).graph
    called = {str(node.target) for node in graph.nodes if node.op == "call_function"}
    in_place = {name for name in called if name.split(".")[-2].endswith("_")}
    assert in_place <= {"aten.add_.Tensor"}  # BatchNorm's count of batches, in train mode
    assert training or not in_place


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (lambda: models.TinyTen(10, in_channels=3), 86_458),  # the paper: 0.09 M
        (lambda: models.TinyTen(10, in_channels=1, width=8), 21_906),
        (lambda: models.ResNet(32, 10), 466_906),  # the paper: 0.47 M
        (lambda: models.ResNet(32, 10, shortcut="pad"), 464_154),  # He et al.: 0.46 M
        (lambda: models.GoogLeNet(100), 5_702_404),
        (lambda: models.GoogLeNet(100, auxiliary=True), 10_237_388),  # the paper: 10.24 M
    ],
)
def test_parameter_counts(make: Callable[[], nn.Module], count: int) -> None:
    with torch.device("meta"):
        assert parameters(make()) == count


def test_resnets_without_parameters_in_the_shortcuts_are_as_large_as_published() -> None:
    # He et al. (2016), table 6: 0.27 M, 0.46 M and 0.85 M for depths 20, 32 and 56.
    with torch.device("meta"):
        counts = [parameters(models.ResNet(depth, shortcut="pad")) for depth in (20, 32, 56)]
    assert [round(count / 1e6, 2) for count in counts] == [0.27, 0.46, 0.85]


def test_tinyten_has_the_widths_of_its_docstring() -> None:
    widths = [block.conv.out_channels for block in models.TinyTen(width=8).blocks]
    assert widths == [8, 8, 16, 16, 16, 32, 32, 32]


@pytest.mark.parametrize("name", ["tinyten", "resnet20", "googlenet"])
def test_wider_networks_have_more_parameters(name: str) -> None:
    build = models.BUILDERS[name]
    widths = [0.25, 0.5, 1.0] if name == "googlenet" else [4, 8, 16]
    with torch.device("meta"):
        counts = [parameters(build(width=width)) for width in widths]
    assert all(2.5 * a < b for a, b in itertools.pairwise(counts)), counts


@pytest.mark.parametrize("norm", models.NORMS)
def test_a_decoder_sees_no_later_letter(norm: str) -> None:
    torch.manual_seed(0)
    net = models.Decoder(11, context=6, width=8, norm=norm)
    tokens = torch.randint(11, (3, 6))
    logits = net(tokens)
    assert logits.shape == (3, 6, 11)
    later = tokens.clone()
    later[:, 4:] = (later[:, 4:] + 1) % 11
    agree(net(later)[:, :4], logits[:, :4], terms(net))
    agree(net(tokens[:, :4]), logits[:, :4], terms(net))  # and may be given fewer
    assert not torch.allclose(net(later)[:, 4:], logits[:, 4:])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"width": 6}, "width 6 cannot be shared by 4 heads"),
        ({"heads": 0}, "heads: got 0"),
        ({"norm": "batch"}, "norm: got 'batch'"),
    ],
)
def test_an_impossible_transformer_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        models.Decoder(11, **options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"image_size": 5}, "images of 5 pixels have no patch of 7"),
        ({"patch": 0}, "patch: got 0"),
        ({"image_size": 14.5}, "image_size: got 14.5"),
    ],
)
def test_impossible_patches_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        models.ViT(**options)


def test_normalisation_is_fixed_and_inside() -> None:
    x = torch.tensor([0.0, 0.5, 1.0])
    assert models.normalise(x).tolist() == [-2, 0, 2]


def test_convolutions_before_batchnorm_have_no_bias() -> None:
    for name in ("tinyten", "resnet20", "googlenet"):
        for module in narrow(name, 3, 32).modules():
            if isinstance(module, nn.Conv2d):
                assert module.bias is None


class TestShortcuts:
    def test_padding_keeps_every_second_pixel_and_adds_zeros(self) -> None:
        block = models.ResidualBlock(2, 6, stride=2, shortcut="pad").eval()
        nn.init.zeros_(block.second.norm.weight)  # what is left is the shortcut
        x = torch.rand(1, 2, 4, 4)
        y = block(x)
        assert torch.equal(y[:, 2:4], x[:, :, ::2, ::2])
        assert not y[:, [0, 1, 4, 5]].any()

    def test_within_a_stage_it_is_the_identity(self) -> None:
        block = models.ResidualBlock(3, 3, stride=1, shortcut="conv").eval()
        nn.init.zeros_(block.second.norm.weight)
        x = torch.rand(1, 3, 4, 4)
        assert torch.equal(block(x), x)


class TestAuxiliaryHeads:
    def test_they_speak_in_train_mode_only(self) -> None:
        net = narrow("googlenet", 3, 32, auxiliary=True)
        x = torch.rand(2, 3, 32, 32)
        out = net.train()(x)
        assert [logits.shape for logits in out] == [(2, 7)] * 3
        assert net.eval()(x).shape == (2, 7)

    def test_they_share_no_parameters_with_the_main_head(self) -> None:
        net = narrow("googlenet", 3, 32, auxiliary=True).train()
        logits, early, late = net(torch.rand(2, 3, 32, 32))
        for which, mine in (("4a", early), ("4d", late)):
            head = list(net.auxiliary[which].parameters())
            main = torch.autograd.grad(logits.sum(), head, retain_graph=True, allow_unused=True)
            assert all(slope is None for slope in main)
            own = torch.autograd.grad(mine.square().sum(), head, retain_graph=True)
            assert all(slope.any() for slope in own[-2:])


class TestErrors:
    def test_an_unknown_network_names_the_known_and_the_closest(self) -> None:
        with pytest.raises(ValueError, match=r"got 'ResNet-32', expected .* mean 'resnet32'"):
            models.build("ResNet-32", num_classes=10, in_channels=3)
        with pytest.raises(
            ValueError, match=r"got 'zzz', expected a network; there are: .*googlenet, vit, .*"
        ):
            models.build("zzz", num_classes=10, in_channels=3)

    def test_an_mlp_needs_the_image_size(self) -> None:
        with pytest.raises(ValueError, match="pass image_size"):
            models.build("mlp", num_classes=10, in_channels=1)

    @pytest.mark.parametrize("depth", [2, 18, 33])
    def test_a_depth_that_no_resnet_has(self, depth: int) -> None:
        with pytest.raises(ValueError, match=rf"got depth={depth}, expected 6n \+ 2"):
            models.ResNet(depth)

    def test_an_unknown_shortcut(self) -> None:
        with pytest.raises(ValueError, match="got shortcut='none', expected 'conv' or 'pad'"):
            models.ResNet(20, shortcut="none")
