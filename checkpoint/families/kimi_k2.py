"""Kimi K2 (2025), text: DeepSeek-V3 by another name, without groups of experts."""

import dataclasses

from checkpoint.families.deepseek_v3 import DEEPSEEK_V3

KIMI_K2 = dataclasses.replace(DEEPSEEK_V3, model_type="kimi_k2")
"""Its class is DeepSeek-V3's, whose defaults it has; transformers reads it as such (kimi_k25)."""
