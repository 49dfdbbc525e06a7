"""JSON by msgspec: Decimals become strings (money is never a float), datetimes RFC 3339 in UTC."""

from typing import Any

import msgspec
from rest_framework.renderers import BaseRenderer

encoder = msgspec.json.Encoder(decimal_format="string")


class MsgspecJSONRenderer(BaseRenderer):
    media_type = "application/json"
    format = "json"
    charset = None

    def render(
        self, data: Any, accepted_media_type: Any = None, renderer_context: Any = None
    ) -> bytes:
        return b"" if data is None else encoder.encode(data)
