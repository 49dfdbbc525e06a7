"""DeepSeek: GET /models.

* List: https://api-docs.deepseek.com/api/list-models
* Errors: https://api-docs.deepseek.com/quick_start/error_codes (401 wrong key, 402 no balance)
"""

from __future__ import annotations

import re

from keys.providers.base import Adapter

ADAPTER = Adapter(
    type="deepseek",
    label="DeepSeek",
    base_url="https://api.deepseek.com",
    key_pattern=re.compile(r"sk-(?!ant-|or-)[A-Za-z0-9_-]{16,}"),
    key_hint="starts with sk-",
)
