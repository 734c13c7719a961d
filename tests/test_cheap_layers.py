"""Do the cheap layers compute what torch's own do?"""

import pytest
import torch
import torch.nn.functional as F

from behrt.cheap_layers import Dropout, Linear, lowered, missing_to_recur

CPU = torch.device("cpu")


def frozen_layer() -> Linear:
    layer = Linear(6, 5)
    layer.weight.requires_grad_(False)
    return layer


@pytest.mark.parametrize("trained", [True, False])
def test_a_linear_layer_under_autocast_gives_what_torchs_own_gives(trained: bool) -> None:
    layer, x = frozen_layer(), torch.randn(7, 6)
    layer.weight.requires_grad_(trained)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


def test_a_frozen_weight_is_cast_once_and_anew_when_it_has_changed() -> None:
    layer, x = frozen_layer(), torch.randn(7, 6)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
        first = layer._cast
        layer(x)
        assert layer._cast is first
        with torch.no_grad():
            layer.weight.mul_(2)
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
        layer.weight.data = torch.randn(5, 6)
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


def test_a_weight_that_an_evaluation_cast_can_be_trained_through() -> None:
    layer, x = frozen_layer(), torch.randn(7, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.inference_mode():
            layer(x)
        layer(x).float().sum().backward()
    assert x.grad is not None
    assert "_cast" not in layer.state_dict()


def test_only_autocast_lowers_a_tensor() -> None:
    x = torch.randn(3)
    assert lowered(x) is x
    with torch.autocast("cpu", torch.bfloat16):
        assert lowered(x).dtype is torch.bfloat16


def test_shapes_are_made_to_recur_in_lower_precision_on_the_cpu_alone() -> None:
    assert missing_to_recur(100, 64, CPU) == 0
    with torch.autocast("cpu", torch.bfloat16):
        assert [missing_to_recur(count, 64, CPU) for count in (1, 64, 100)] == [63, 0, 28]
        assert missing_to_recur(100, 64, torch.device("cuda")) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dropout_keeps_or_drops_whole_elements_of_any_float(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(31, 33).to(dtype)
    result = Dropout(0.5)(x.T).T  # not contiguous
    kept = result != 0
    assert result.dtype is dtype
    torch.testing.assert_close(result[kept], 2 * x[kept], rtol=0, atol=0)
    assert 0.4 < kept.float().mean() < 0.6


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_dropout_drops_its_share_at_random_places_and_scales_up_the_rest(share: float) -> None:
    torch.manual_seed(0)
    x = torch.ones(100_001, requires_grad=True)
    dropped = Dropout(share).train()(x)
    kept = dropped.detach() != 0
    margin = 4 * (share * (1 - share) / 100_000) ** 0.5  # four standard errors
    assert (~kept).double().mean().item() == pytest.approx(share, abs=margin)
    torch.testing.assert_close(dropped[kept], torch.full((int(kept.sum()),), 1 / (1 - share)), rtol=1e-3, atol=0)
    for distance in (1, 2, 3, 4):  # four neighbours share one draw of 64 bits, and must not know of each other
        both = (~kept[distance:] & ~kept[:-distance]).double().mean().item()
        assert both == pytest.approx(share**2, abs=2 * margin)
    dropped.sum().backward()
    assert torch.equal(x.grad, dropped.detach())


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    dropout, ones = Dropout(0.3), torch.ones(100_003)  # not a multiple of four: the last draw is used in part
    result = dropout(ones)
    dropped = (result == 0).float().mean().item()
    assert abs(dropped - 0.3) < 5 * (0.3 * 0.7 / 100_003) ** 0.5
    torch.testing.assert_close(result[result != 0], torch.full_like(result[result != 0], 1 / 0.7), rtol=1e-4, atol=0)


def test_neighbouring_elements_are_dropped_independently_of_each_other() -> None:
    torch.manual_seed(0)
    dropped = (Dropout(0.5)(torch.ones(200_000)) == 0).double().view(-1, 4)  # a row: what one draw decided
    correlation = torch.corrcoef(dropped.T) - torch.eye(4, dtype=torch.float64)
    assert correlation.abs().max() < 5 / len(dropped) ** 0.5


def test_dropout_passes_the_gradient_of_what_it_kept_and_is_off_in_evaluation() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(50, 7, requires_grad=True)
    result = Dropout(0.4)(hidden)
    result.sum().backward()
    assert hidden.grad is not None
    assert ((hidden.grad == 0) == (result == 0)).all()
    assert Dropout(0.4).eval()(hidden) is hidden
