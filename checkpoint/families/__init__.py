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
from checkpoint.families.deepseek_v4 import DEEPSEEK_V4 as DEEPSEEK_V4
from checkpoint.families.qwen2 import QWEN2 as QWEN2
from checkpoint.families.qwen3 import QWEN3 as QWEN3
from checkpoint.families.mistral import MISTRAL as MISTRAL
from checkpoint.families.ministral import MINISTRAL as MINISTRAL
from checkpoint.families.kimi_k2 import KIMI_K2 as KIMI_K2
from checkpoint.families.dots1 import DOTS1 as DOTS1
from checkpoint.families.hy_v3 import HY_V3 as HY_V3
from checkpoint.families.ernie4_5_moe import ERNIE4_5_MOE as ERNIE4_5_MOE
from checkpoint.families.qwen2_moe import QWEN2_MOE as QWEN2_MOE
from checkpoint.families.glm4_moe import GLM4_MOE as GLM4_MOE
from checkpoint.families.minimax_m2 import MINIMAX_M2 as MINIMAX_M2
from checkpoint.families.smollm3 import SMOLLM3 as SMOLLM3
from checkpoint.families.olmo2 import OLMO2 as OLMO2
from checkpoint.families.olmo3 import OLMO3 as OLMO3
from checkpoint.families.flex_olmo import FLEX_OLMO as FLEX_OLMO
from checkpoint.families.granite import GRANITE as GRANITE
from checkpoint.families.granitemoe import GRANITEMOE as GRANITEMOE
from checkpoint.families.hunyuan_v1_dense import HUNYUAN_V1_DENSE as HUNYUAN_V1_DENSE
from checkpoint.families.hunyuan_v1_moe import HUNYUAN_V1_MOE as HUNYUAN_V1_MOE
from checkpoint.families.ministral3 import MINISTRAL3 as MINISTRAL3
from checkpoint.families.gemma import GEMMA as GEMMA
from checkpoint.families.gemma2 import GEMMA2 as GEMMA2
from checkpoint.families.gemma3 import GEMMA3 as GEMMA3
from checkpoint.families.gemma3 import GEMMA3_ENCODERS as GEMMA3_ENCODERS
from checkpoint.families.llama4 import LLAMA4_TEXT as LLAMA4_TEXT
from checkpoint.families.llama4 import LLAMA4 as LLAMA4
from checkpoint.families.gemma4 import GEMMA4_TEXT as GEMMA4_TEXT
from checkpoint.families.gemma4 import GEMMA4 as GEMMA4
from checkpoint.families.qwen3_5 import QWEN3_5_TEXT as QWEN3_5_TEXT
from checkpoint.families.qwen3_5 import QWEN3_5 as QWEN3_5
from checkpoint.families.qwen3_5 import QWEN3_5_MOE_TEXT as QWEN3_5_MOE_TEXT
from checkpoint.families.qwen3_5 import QWEN3_5_MOE as QWEN3_5_MOE
from checkpoint.families.qwen3_next import QWEN3_NEXT as QWEN3_NEXT
from checkpoint.families.kimi_linear import KIMI_LINEAR as KIMI_LINEAR
from checkpoint.families.olmo_hybrid import OLMO_HYBRID as OLMO_HYBRID
from checkpoint.families.lfm2 import LFM2 as LFM2
from checkpoint.families.lfm2 import LFM2_MOE as LFM2_MOE
from checkpoint.families.nemotron_h import NEMOTRON_H as NEMOTRON_H
from checkpoint.families.glm_moe_dsa import GLM_MOE_DSA as GLM_MOE_DSA
from checkpoint.families.granitemoehybrid import GRANITEMOEHYBRID as GRANITEMOEHYBRID

FAMILIES = tuple(value for value in list(globals().values()) if isinstance(value, Family))
"""In the order of the lines above, in which a model is matched to one for export."""
