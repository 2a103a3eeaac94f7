"""The reason why no public family holds a model is that of the nearest one."""

import dataclasses

import pytest

from checkpoint.public import export_family
from configs import models
from configs.architecture import LayerSpec, ModelConfig
from configs.checks import UserError


def dense_with_windows() -> ModelConfig:
    """The nano student with its teacher's attention, of which every other layer has a window."""
    student = models.v31_nano_student()
    (layer,) = student.pattern
    kinds = dict.fromkeys(spec.attention for spec in models.v31_nano().pattern)
    pattern = tuple(LayerSpec(attention=kind, ffn=layer.ffn) for kind in kinds)
    return dataclasses.replace(student, pattern=pattern)


NEAREST = [
    # Windows are Mistral's, shared experts behind grouped-query attention ERNIE's.
    (dense_with_windows, "mistral: this family has one attention for all layers"),
    (models.v31_nano, "mixtral: this family has one attention for all layers"),
    (models.v3_nano, r"mixtral: the family mixtral can't say all .*sink_logits was True"),
    (models.v31_dynamic_nano, r"ernie4_5_moe: .*router\.num_null_experts was 2, now 0"),
]


@pytest.mark.parametrize(("model", "reason"), NEAREST, ids=lambda x: getattr(x, "__name__", ""))
def test_the_nearest_familys_reason_is_told(model, reason: str):
    with pytest.raises(UserError, match=f"nearest is {reason}") as caught:
        export_family(model())
    assert "deepseek" not in str(caught.value)


def test_the_family_that_was_asked_for_is_told():
    with pytest.raises(
        UserError, match=r"family gpt_oss does not hold .*num_sink_tokens was 4, now 0"
    ):
        export_family(models.v31_nano(), "gpt_oss")
