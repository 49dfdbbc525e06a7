"""Qwen, by Alibaba Cloud Model Studio (DashScope), in its OpenAI-compatible mode: GET models.

* Addresses: https://www.alibabacloud.com/help/en/model-studio/compatibility-of-openai-with-dashscope
  (each region has its own, and its own keys)
* Errors: https://help.aliyun.com/en/model-studio/error-code-start (401 InvalidApiKey also for
  the key of another region; 403 AccessDenied) and https://help.aliyun.com/en/model-studio/error-code
  (400 Arrearage)

The list itself is not in these pages; the address answers as OpenAI's does.
"""

from __future__ import annotations

import re

from keys.providers.base import Adapter, ApiError, Checked, State, out_of_credit


class Qwen(Adapter):
    __slots__ = ()

    def refusal(self, status: int, error: ApiError) -> Checked:
        if error.code.lower() == "arrearage":
            return out_of_credit()
        if status == 401:
            return Checked(
                State.INVALID,
                "The provider refuses the key: it is wrong or revoked, or belongs to another"
                " region than the base URL.",
            )
        return Adapter.refusal(self, status, error)


ADAPTER = Qwen(
    type="qwen",
    label="Qwen (Alibaba Cloud)",
    base_url="https://dashscope-intl.aliyuncs.com/compatible-mode/v1",
    key_pattern=re.compile(r"sk-(?!ant-|or-)[A-Za-z0-9_.-]{16,}"),
    key_hint="starts with sk-",
)
