"""One file per public family: its config's keys, and the table of its tensors."""

from checkpoint.families.base import Family
from checkpoint.families.deepseek_v2 import DEEPSEEK_V2
from checkpoint.families.deepseek_v3 import DEEPSEEK_V3
from checkpoint.families.deepseek_v32 import DEEPSEEK_V32
from checkpoint.families.gpt_oss import GPT_OSS
from checkpoint.families.llama import LLAMA
from checkpoint.families.mixtral import MIXTRAL
from checkpoint.families.olmoe import OLMOE
from checkpoint.families.qwen3_moe import QWEN3_MOE

FAMILIES: tuple[Family, ...] = (
    LLAMA,
    MIXTRAL,
    QWEN3_MOE,
    OLMOE,
    GPT_OSS,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    DEEPSEEK_V32,
)
"""In the order in which a model is matched to one for export."""
