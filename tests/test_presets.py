"""A preset belongs to its environment: with another --env-id its keywords, repeats and episode lengths do not count.
For the scripts that are still in the long form; of dreamerv3.py see test_house.py and test_contract.py."""

import dataclasses
import importlib
import sys

import pytest

SCRIPTS = "ha2018_carracing ijepa genie_lam".split()
OF_ENVIRONMENTS = "env_kwargs action_repeat max_episode_steps min_episode_steps demonstrator".split()


def parsed(script, monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", [script.__name__ + ".py", *argv])
    return dataclasses.asdict(script.parse_args(script.Args, script.PRESETS, ""))


def expected(script, preset, *without):
    """What the preset alone says."""
    given = {k: v for k, v in script.PRESETS[preset].items() if k not in without}
    return dataclasses.asdict(script.Args(**given | {"preset": preset}))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_preset_of_another_environment(name, monkeypatch):
    script = importlib.import_module(name)
    for preset in script.PRESETS:
        assert parsed(script, monkeypatch, "--preset", preset) == expected(script, preset)
        if "env_id" not in script.Args.__dataclass_fields__:
            continue
        args, alone = (
            parsed(script, monkeypatch, "--preset", preset, "--env-id", "CartPole-v1"),
            expected(script, preset),
        )
        if alone["env_id"] == "CartPole-v1":
            assert args == alone
            continue
        plain = dataclasses.asdict(script.Args())
        assert all(args[k] == plain[k] for k in OF_ENVIRONMENTS if k in args)
        assert args == expected(script, preset, *OF_ENVIRONMENTS) | {"env_id": "CartPole-v1"}  # the rest does count
        # The own environment, named, also with an underscore; flags win; games of one family share the preset.
        for flag in ("--env-id", "--env_id"):
            assert parsed(script, monkeypatch, "--preset", preset, flag, alone["env_id"]) == alone
        mine = ["--env-id", "CartPole-v1", "--max-episode-steps", "7", "--env-kwargs", '{"a": 1}']
        args = parsed(script, monkeypatch, *mine, f"--preset={preset}")
        assert (args["max_episode_steps"], args["env_kwargs"]) == (7, '{"a": 1}')
        if "/" in alone["env_id"]:
            other = alone["env_id"].split("/")[0] + "/Other-v5"
            assert parsed(script, monkeypatch, "--preset", preset, "--env-id", other) == alone | {"env_id": other}
