"""The pages on one screen."""

from django.urls import path

from keys.views import keys, settings, tokens
from swapper.views import emergency
from swapper.views.activity import activity, activity_csv
from swapper.views.overview import overview, overview_charts
from swapper.views.requests import holds, request_page

urlpatterns = [
    path("", overview, name="overview"),
    path("overview/charts/", overview_charts, name="overview-charts"),
    path("activity/", activity, name="activity"),
    path("activity/groups.csv", activity_csv, {"what": "groups"}, name="activity-groups-csv"),
    path("activity/calls.csv", activity_csv, {"what": "calls"}, name="activity-calls-csv"),
    path("requests/<uuid:request_id>/", request_page, name="request"),
    path("holds/", holds, name="holds"),
    path("keys/", keys.key_list, name="keys"),
    path("keys/add/", keys.key_add, name="key_add"),
    path("keys/system-models/", keys.key_fallback, name="key_fallback"),
    path("keys/<uuid:config_id>/", keys.key_detail, name="key"),
    path("keys/<uuid:config_id>/row/", keys.key_row, name="key_row"),
    path("keys/<uuid:config_id>/check/", keys.key_check, name="key_check"),
    path("keys/<uuid:config_id>/verify/", keys.key_verify, name="key_verify"),
    path("keys/<uuid:config_id>/switch/", keys.key_switch, name="key_switch"),
    path("keys/<uuid:config_id>/replace/", keys.key_replace, name="key_replace"),
    path("keys/<uuid:config_id>/delete/", keys.key_delete, name="key_delete"),
    path("keys/<uuid:config_id>/models/", keys.key_models, name="key_models"),
    path("keys/<uuid:config_id>/models/<uuid:model_id>/", keys.key_model, name="key_model"),
    path("tokens/", tokens.tokens, name="tokens"),
    path("tokens/new/", tokens.create, name="token_create"),
    path("tokens/<int:pk>/revoke/", tokens.revoke, name="token_revoke"),
    path("settings/", settings.settings, name="settings"),
    path("settings/webhook/", settings.webhook, name="webhook"),
    path("settings/webhook/delete/", settings.webhook_delete, name="webhook_delete"),
    path("settings/webhook/test/", settings.webhook_test, name="webhook_test"),
    path("stop/", emergency.emergency_stop, name="emergency-stop"),
    path("stop/go-on/", emergency.go_on, name="emergency_stop_go_on"),
]
