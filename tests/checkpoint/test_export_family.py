"""The reason why no public family holds a model is that of the nearest one."""

import pytest

from checkpoint.public import export_family
from configs import models
from configs.checks import UserError

NEAREST = [
    # A dense layer's nearest is Llama, experts' with grouped-query attention are Mixtral's.
    (models.v31_nano_student, "llama: this family has one attention for all layers"),
    (models.v31_nano, "mixtral: this family has one attention for all layers"),
    (models.v3_nano, r"mixtral: the family mixtral can't say all .*learned_sinks was True"),
    (models.v31_dynamic_nano, r"mixtral: .*ffn\.num_shared_experts was 1, now 0"),
]


@pytest.mark.parametrize(("model", "reason"), NEAREST, ids=lambda x: getattr(x, "__name__", ""))
def test_the_nearest_familys_reason_is_told(model, reason: str):
    with pytest.raises(UserError, match=f"nearest is {reason}") as caught:
        export_family(model())
    assert "deepseek" not in str(caught.value)


def test_the_family_that_was_asked_for_is_told():
    with pytest.raises(UserError, match=r"family gpt_oss does not hold .*num_sinks was 4, now 0"):
        export_family(models.v31_nano(), "gpt_oss")
