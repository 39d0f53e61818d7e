"""Growth by reaction and diffusion: the speed theory gives, ten times less in grey matter, none in fluid."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glioma_nas.synthetic.fields import Axes, Field, SmoothField, interpolate
from glioma_nas.synthetic.growth import Ground, displaced, grow, mass_effect, seed

STEP_MM = 2.0


def axes(side: int) -> Axes:
    line = (np.arange(side) - side // 2) * STEP_MM
    return line, line, line


def full(side: int, value: float) -> Field:
    return np.full((side, side, side), value, dtype=np.float32)


def grown(ground: Ground, volume_ml: float, **options: float) -> Field:
    return grow(seed(ground, np.zeros(3)), ground, length_mm=options.get("length_mm", 2.0), volume_ml=volume_ml)


def test_growth_in_even_tissue_is_a_ball_of_the_wanted_volume() -> None:
    ground = Ground.of(axes(33), full(33, 1), full(33, 0))
    u = grown(ground, 20)
    volume_ml = (u > 0.5).sum() * STEP_MM**3 / 1000
    assert 20 <= volume_ml < 26
    radii = [int((line > 0.5).sum()) for line in (u[:, 16, 16], u[16, :, 16], u[16, 16, :])]
    assert max(radii) - min(radii) <= 1


def test_growth_is_ten_times_slower_to_diffuse_in_grey_matter() -> None:
    side = 33
    wm = full(side, 0)
    wm[side // 2 :] = 1
    ground = Ground.of(axes(side), wm, 1 - wm)
    white = ground.conductance[1][-4, 16, 16]
    grey = ground.conductance[1][3, 16, 16]
    assert white == pytest.approx(10 * grey, rel=1e-5)
    u = grown(ground, 25)
    # A Fisher border moves with the root of the diffusivity.
    assert (u[side // 2 :] > 0.5).sum() > 1.5 * (u[: side // 2] > 0.5).sum()


def test_no_cell_enters_fluid_or_crosses_it() -> None:
    side = 25
    wm = full(side, 1)
    wm[16:18] = 0
    u = grown(Ground.of(axes(side), wm, full(side, 0)), 200)
    assert (u[16:18] == 0).all()
    assert (u[18:] == 0).all()
    assert (u[:16] > 0.5).mean() > 0.9


def test_growth_keeps_to_a_tract() -> None:
    side = 33
    wm = full(side, 0.3)
    wm[:, 13:20, 13:20] = 1
    u = grown(Ground.of(axes(side), wm, 1 - wm), 8)
    along, across = (u[:, 16, 16] > 0.5).sum(), (u[16, :, 16] > 0.5).sum()
    assert along > 1.4 * across


@settings(max_examples=15, deadline=None)
@given(st.floats(0.5, 6), st.integers(0, 2**31))
def test_density_stays_between_0_and_1(length_mm: float, chance: int) -> None:
    generator = np.random.default_rng(chance)
    wm = generator.random((13, 13, 13), dtype=np.float32)
    ground = Ground.of(axes(13), wm, (1 - wm) * generator.random((13, 13, 13), dtype=np.float32))
    start = generator.random((13, 13, 13), dtype=np.float32) * (ground.room > 0)
    vigour = np.exp(generator.standard_normal((13, 13, 13), dtype=np.float32))
    u = grow(start, ground, length_mm=length_mm, volume_ml=5, vigour=vigour)
    assert u.min() >= -1e-6
    assert u.max() <= 1 + 1e-6


def test_mass_pushes_outwards_by_what_was_asked_and_not_at_the_skull() -> None:
    side = 41
    grid = np.sqrt(sum(axis**2 for axis in np.meshgrid(*axes(side), indexing="ij", sparse=True)))
    mass, brain = (grid < 14).astype(np.float32), (grid < 38).astype(np.float32)
    push = mass_effect(mass, brain, STEP_MM, 6.0)
    size = np.sqrt(sum(part**2 for part in push))
    assert size.max() == pytest.approx(6.0, rel=1e-3)
    assert size[grid > 38].max() < 0.5
    assert push[0][27, 20, 20] > 4
    assert push[0][13, 20, 20] < -4
    assert (displaced(mass, push, STEP_MM) > 0.5).sum() > 1.2 * mass.sum()


def test_field_is_the_same_function_on_every_grid() -> None:
    field = SmoothField.draw(15, np.random.default_rng(0))
    fine = np.arange(-60, 61, 2.0)
    coarse = fine[::3]
    np.testing.assert_allclose(
        field.on((fine, fine, fine))[::3, ::3, ::3], field.on((coarse, coarse, coarse)), atol=1e-5
    )
    large = SmoothField.draw(8, np.random.default_rng(1)).on((fine, fine, fine))
    assert large.std() == pytest.approx(1, abs=0.1)


def test_interpolation_is_linear_and_zero_outside() -> None:
    old, new = np.arange(5.0), np.array([0.5, 3.25, 7.0])
    values = (old[:, None, None] + 10 * old[None, :, None] + 0 * old).astype(np.float32)
    result = interpolate(values, (old, old, old), (new, new, new))
    assert result[0, 1, 0] == pytest.approx(0.5 + 32.5)
    assert (result[2] == 0).all()
