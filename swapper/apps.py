from django.apps import AppConfig


class SwapperConfig(AppConfig):
    name = "swapper"
