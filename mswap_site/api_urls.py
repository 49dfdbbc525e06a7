"""The whole API on one screen."""

from django.urls import path
from drf_spectacular.views import SpectacularAPIView, SpectacularSwaggerSplitView

from keys import api as keys
from swapper import api

urlpatterns = [
    path("schema/", SpectacularAPIView.as_view(), name="schema"),
    # Its script comes by itself: the content security policy allows none in the page.
    path(
        "docs/",
        SpectacularSwaggerSplitView.as_view(url_name="schema", template_name="api_docs.html"),
        name="docs",
    ),
    path("modelswapper/select-model", api.SelectModel.as_view(), name="select-model"),
    path("modelswapper/usage", api.Usage.as_view(), name="usage"),
    path("modelswapper/me", api.Me.as_view(), name="me"),
    path("modelswapper/selections/<uuid:request_id>", api.Selection.as_view(), name="selection"),
    path(
        "modelswapper/selections/<uuid:request_id>/credentials",
        keys.Credentials.as_view(),
        name="credentials",
    ),
    path("modelswapper/provider-configs", keys.Configs.as_view(), name="provider-configs"),
    path(
        "modelswapper/provider-configs/<uuid:config_id>",
        keys.Config.as_view(),
        name="provider-config",
    ),
    path(
        "modelswapper/provider-configs/<uuid:config_id>/verify",
        keys.Verify.as_view(),
        name="provider-config-verify",
    ),
    path(
        "modelswapper/provider-configs/<uuid:config_id>/models",
        keys.ConfigModels.as_view(),
        name="provider-config-models",
    ),
    path(
        "modelswapper/provider-configs/<uuid:config_id>/models/<uuid:model_id>",
        keys.ConfigModel.as_view(),
        name="provider-config-model",
    ),
    path("modelswapper/models/performance", api.ModelPerformance.as_view(), name="performance"),
    path("modelswapper/health", api.Health.as_view(), name="health"),
]
