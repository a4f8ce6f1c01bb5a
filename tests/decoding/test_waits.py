"""How often a decoding step waits for the device, and copies to it: counted, on any machine."""

from __future__ import annotations

from typing import Any

import pytest
from counted_waits import Counted, leave_out_the_host

import fastvlm
from fastvlm.compat.versions import attention_refused

if attention_refused() is not None:
    pytest.skip(str(attention_refused()), allow_module_level=True)

from models import FAMILIES, PAD


def of_steps(model: Any, inputs: Any, short: int, long: int, **wish: Any) -> dict[str, float]:
    """Of one step: the difference of a long and a short call, by its tokens."""
    found = []
    for tokens in (4, short, long):  # the first call looks at more
        with Counted() as counted:
            model.generate(
                **inputs, max_new_tokens=tokens, eos_token_id=None, suppress_tokens=[PAD, 2], **wish
            )
        found.append(counted.found)
    names = set(found[1]) | set(found[2])
    return {name: (found[2][name] - found[1][name]) / (long - short) for name in names}


@pytest.fixture(autouse=True)
def on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    leave_out_the_host(monkeypatch)


@pytest.mark.parametrize(
    ("wish", "copies"),
    [
        # tokens; their scores so far, order, tokens, bans everywhere and of rows
        ({"num_beams": 1}, 3),
        ({"num_beams": 1, "do_sample": True}, 3),
        ({"num_beams": 3, "no_repeat_ngram_size": 2, "early_stopping": True}, 5),
    ],
)
@pytest.mark.parametrize("name", ["bart", "florenz"])
def test_a_step_waits_once(name: str, wish: dict[str, Any], copies: int) -> None:
    model = FAMILIES[name].build()
    inputs = FAMILIES[name].inputs(model)
    theirs = of_steps(model, inputs, 6, 12, **wish)
    with fastvlm.patched(model):
        ours = of_steps(model, inputs, 6, 12, **wish)
    assert ours["waits"] == 1, ours
    assert ours["tolist"] == 1, ours
    assert ours.get("copies", 0) <= copies, ours
    assert theirs["waits"] >= 1  # the count sees what there is
