"""The whole API on one screen."""

from django.urls import path
from drf_spectacular.views import SpectacularAPIView, SpectacularSwaggerView

from swapper import api

urlpatterns = [
    path("schema/", SpectacularAPIView.as_view(), name="schema"),
    path("docs/", SpectacularSwaggerView.as_view(url_name="schema"), name="docs"),
    path("modelswapper/select-model", api.SelectModel.as_view(), name="select-model"),
    path("modelswapper/usage", api.Usage.as_view(), name="usage"),
    path("modelswapper/me", api.Me.as_view(), name="me"),
    path("modelswapper/models/performance", api.ModelPerformance.as_view(), name="performance"),
    path("modelswapper/health", api.Health.as_view(), name="health"),
]
