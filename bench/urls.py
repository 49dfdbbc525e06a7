"""The real addresses, plus two floors: DRF views that validate a body and do nothing.

`/floor` knows four fields; `/floor-same` knows all that select-model knows.
"""

from django.urls import path
from rest_framework import serializers
from rest_framework.parsers import JSONParser
from rest_framework.renderers import JSONRenderer
from rest_framework.response import Response
from rest_framework.views import APIView

from mswap_site.urls import handler400, handler404, handler500
from mswap_site.urls import urlpatterns as real

__all__ = ["handler400", "handler404", "handler500", "urlpatterns"]


class Body(serializers.Serializer):
    """Four fields of select-model, the least that any such endpoint would check."""

    task_type = serializers.CharField(max_length=200)
    user_id = serializers.CharField(max_length=200)
    user_tier = serializers.CharField(max_length=20, required=False)
    estimated_tokens = serializers.IntegerField(min_value=1)


class SameBody(serializers.Serializer):
    """The fields of select-model, as a serializer would check them."""

    task_type = serializers.CharField(max_length=200)
    user_id = serializers.CharField(max_length=200, required=False)
    user_tier = serializers.CharField(max_length=200, required=False)
    estimated_tokens = serializers.IntegerField(min_value=1, required=False)
    prompt_tokens = serializers.IntegerField(min_value=0, required=False)
    max_completion_tokens = serializers.IntegerField(min_value=0, required=False)
    priority = serializers.ChoiceField(["low", "medium", "high", "critical"], default="medium")
    max_cost = serializers.DecimalField(20, 10, required=False)
    preferred_providers = serializers.ListField(child=serializers.CharField(), required=False)
    excluded_providers = serializers.ListField(child=serializers.CharField(), required=False)
    min_context_length = serializers.IntegerField(min_value=0, required=False)
    required_capabilities = serializers.ListField(child=serializers.CharField(), required=False)
    use_user_keys = serializers.BooleanField(default=False)
    approved = serializers.BooleanField(default=False)
    dry_run = serializers.BooleanField(default=False)


class Floor(APIView):
    serializer = Body
    authentication_classes = ()
    permission_classes = ()
    parser_classes = (JSONParser,)
    renderer_classes = (JSONRenderer,)

    def post(self, request):
        body = self.serializer(data=request.data)
        body.is_valid(raise_exception=True)
        return Response(body.validated_data)


urlpatterns = [
    path("floor", Floor.as_view()),
    path("floor-same", Floor.as_view(serializer=SameBody)),
    *real,
]
