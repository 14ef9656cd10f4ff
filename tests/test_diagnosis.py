"""The failures that users report are told in the log once, in plain words, and nothing is told of a healthy run."""

import numpy as np
import pytest

from tests.running import SCRIPTS, load, small, small_args, train

FLAT, FALLING = [50.0] * 20, list(np.geomspace(50.0, 5.0, 20))


@pytest.fixture(params=SCRIPTS)
def script(request):
    return load(request.param)


def values(script, **changes):
    """A healthy run's log line."""
    policy = "actor/most_common" if script.__name__.endswith("atari") else "actor/saturated"
    return {"losses/kl": 5.0, policy: 0.5, "skipped/model": 0.0, "skipped/actor": 0.0, "skipped/value": 0.0} | changes


@pytest.mark.parametrize("errors", [[], FLAT, FALLING], ids=["first line", "flat", "falling"])
def test_of_a_healthy_run_nothing_is_said(script, errors):
    assert script.diagnose(values(script), errors, small_args(script, free_nats=3.0)) == {}


@pytest.mark.parametrize(("free_nats", "kl", "collapsed"), [(3.0, 2.9, True), (3.0, 3.1, False), (0.0, 0.01, True)])
def test_a_kl_under_its_free_nats_beside_a_flat_image_loss_is_called_a_posterior_that_ignores(
    script, free_nats, kl, collapsed
):
    args = small_args(script, free_nats=free_nats)
    found = script.diagnose(values(script, **{"losses/kl": kl}), FLAT, args)
    assert [*found] == ["collapse"] * collapsed
    assert not collapsed or "posterior ignores it" in found["collapse"] and "--free-nats" in found["collapse"]
    for errors in (FALLING, FLAT[:19]):  # still learning; too early to tell
        assert script.diagnose(values(script, **{"losses/kl": kl}), errors, args) == {}


def test_an_actor_that_knows_but_one_action_and_a_skipped_update_are_told(script):
    args = small_args(script)
    collapsed = {"actor/most_common": 0.995} if script.__name__.endswith("atari") else {"actor/saturated": 0.96}
    found = script.diagnose(values(script, **collapsed), FALLING, args)
    assert [*found] == ["saturation"] and "--actor-entropy" in found["saturation"]
    assert script.diagnose(values(script, **collapsed), FALLING[:19], args) == {}, "at first it may be, and passes"
    found = script.diagnose(values(script, **{"skipped/value": 1.0}), FALLING, args)
    assert [*found] == ["skipped"] and "skipped" in found["skipped"]


def test_the_share_of_collapsed_actions_is_measured_on_what_was_imagined(script):
    torch = script.torch
    if script.__name__.endswith("atari"):
        action = torch.eye(3)[torch.tensor([[0, 0, 1], [0, 0, 2]])]
        assert script.action_metrics(action)["actor/most_common"].item() == pytest.approx(4 / 6)
    else:
        action = torch.tensor([[0.999, -1.0], [0.5, -0.98]])
        assert script.action_metrics(action)["actor/saturated"].item() == 0.5


def test_a_run_tells_each_kind_of_trouble_once_and_drifting_imagination_among_them(
    script, tmp_path, monkeypatch, capsys
):
    open_loop = script.open_loop

    def drifting(agent, batch):
        video, _, observed = open_loop(agent, batch)
        return video, 11 * observed, observed

    monkeypatch.setattr(script, "open_loop", drifting)
    monkeypatch.setattr(script, "diagnose", lambda values, errors, args: {"saturation": "one action"})
    train(script, tmp_path, small(script, eval_every=100))
    told = capsys.readouterr().err
    assert told.count("warning: one action") == 1
    assert told.count("warning: imagined images drift away") == 1


def test_a_run_whose_imagination_follows_the_truth_is_not_told_that_it_drifts(script, tmp_path, capsys):
    train(script, tmp_path, small(script, total_steps=120, eval_every=100))
    assert "drift" not in capsys.readouterr().err
