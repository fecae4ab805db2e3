from __future__ import annotations

import torch
from torchvision.models import vgg16

from diffusion.models.lpips import LPIPS


def test_distance_is_that_of_the_paper() -> None:
    torch.manual_seed(0)
    network, layers = LPIPS().eval(), vgg16(weights=None).features.eval()
    layers.load_state_dict({key.split(".", 1)[1]: t for key, t in network.net.state_dict().items()})
    first, second = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
    expected = torch.zeros(2)
    a, b = (first - shift) / scale, (second - shift) / scale
    with torch.no_grad():
        for index, layer in enumerate(layers[:30]):
            a, b = layer(a), layer(b)
            if index in (3, 8, 15, 22, 29):
                weights = network.get_submodule(f"lin{(3, 8, 15, 22, 29).index(index)}.model.1").weight[0, :, 0, 0]
                difference = (torch.nn.functional.normalize(a) - torch.nn.functional.normalize(b)).square()
                expected += torch.einsum("bchw,c->b", difference, weights) / (a.shape[-1] * a.shape[-2])
        torch.testing.assert_close(network(first, second), expected, atol=1e-5, rtol=1e-4)
        assert network(first, first).abs().max() == 0
    assert {"net.slice1.0.weight", "net.slice5.28.bias", "lin4.model.1.weight", "scaling_layer.shift"} < set(
        network.state_dict()
    )
