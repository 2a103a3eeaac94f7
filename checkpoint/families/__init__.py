"""One file per public family: its config's keys, and the table of its tensors.

A line here adds a family.
"""

# ruff: isort: off
from checkpoint.families.base import Family
from checkpoint.families.llama import LLAMA as LLAMA
from checkpoint.families.mixtral import MIXTRAL as MIXTRAL
from checkpoint.families.qwen3_moe import QWEN3_MOE as QWEN3_MOE
from checkpoint.families.olmoe import OLMOE as OLMOE
from checkpoint.families.gpt_oss import GPT_OSS as GPT_OSS
from checkpoint.families.deepseek_v2 import DEEPSEEK_V2 as DEEPSEEK_V2
from checkpoint.families.deepseek_v3 import DEEPSEEK_V3 as DEEPSEEK_V3
from checkpoint.families.deepseek_v32 import DEEPSEEK_V32 as DEEPSEEK_V32

FAMILIES = tuple(value for value in list(globals().values()) if isinstance(value, Family))
"""In the order of the lines above, in which a model is matched to one for export."""
