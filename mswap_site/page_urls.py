"""The pages on one screen."""

from django.urls import path

from swapper.views.overview import overview

urlpatterns = [
    path("", overview, name="overview"),
]
