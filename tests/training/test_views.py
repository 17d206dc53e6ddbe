"""Views as methods ask for them."""

from __future__ import annotations

import pytest

from embedserve.errors import InvalidField
from training.views import Augmentation


def test_a_small_crop_is_blurred_by_as_many_pixels_as_the_full_views_beside_it() -> None:
    """The blur is given for 224 pixels and scaled with the view's size, which must not happen twice."""
    augmentation = Augmentation()
    full, crop = augmentation.view(224), augmentation.view(96, full_size=224)
    assert [sigma * 96 / 224 for sigma in crop.blur_sigma] == pytest.approx(list(full.blur_sigma))


def test_blur_that_is_switched_off_stays_off_whatever_a_method_asks_for() -> None:
    assert Augmentation(blur=0).view(32, blur=1.0).blur == 0
    assert Augmentation().view(224, blur=1.0).blur == 1.0


def test_a_full_view_covers_from_the_least_share_to_all() -> None:
    assert Augmentation(crop_min=0.08).view(32).scale == (0.08, 1.0)


@pytest.mark.parametrize("settings", [{"hue": 0.6}, {"flip": -0.1}, {"crop_min": 0.0}, {"brightness": 2.0}])
def test_a_strength_that_makes_no_sense_is_named(settings: dict[str, float]) -> None:
    with pytest.raises(InvalidField, match=next(iter(settings))):
        Augmentation(**settings)
