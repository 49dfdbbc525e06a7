"""The real addresses, plus `/floor`: a DRF view that validates a small body and does nothing."""

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


class Floor(APIView):
    authentication_classes = ()
    permission_classes = ()
    parser_classes = (JSONParser,)
    renderer_classes = (JSONRenderer,)

    def post(self, request):
        body = Body(data=request.data)
        body.is_valid(raise_exception=True)
        return Response(body.validated_data)


urlpatterns = [path("floor", Floor.as_view()), *real]
